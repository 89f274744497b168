"""Test the benchmark runner with fake contestants."""

import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
from support.programs import ROOT, TIMEOUT, load, wait_until

from cifar10_suite import processor

TIME_LIMIT = 3  # seconds, for contestants that hang

# Fakes of the suite's programs and of each contestant. Those that take turns
# end with the benchmark.
STEPS = """\
import itertools, json
for number in itertools.count(1):
  examples = 128 * number
  report = {'time': time.time(), 'examples': examples, 'cpu_secs': examples}
  print(json.dumps(report))
  time.sleep(0.001)
  if os.getppid() != bench:
    break
"""
TRAINING = """\
import datetime
print('Recipe tutorial, in float32')
for step in range(0, 1 if '--max_steps=1' in sys.argv else 10**6, 10):
  print(
    f'{datetime.datetime.now()}: step {step}, loss = 4.67 '
    '(10.5 examples/sec; 0.320 sec/batch)'
  )
  time.sleep(0.001)
  if os.getppid() != bench:
    break
"""
PROGRAMS = {
  'download.py': '',
  'cifar10_eval.py': '',
  'cifar10_train.py': TRAINING,
  'benchmarks/precision.py': """print('{"bfloat16": true}')""",
  'benchmarks/matmul.py': """print('{"gflop_per_sec": 7}')""",
  'benchmarks/tutorial.py': STEPS,
  'benchmarks/inputs.py': STEPS,
  'benchmarks/step_alone.py': STEPS,
  'benchmarks/keras_peer.py': STEPS,
  'benchmarks/torch_peer.py': STEPS,
}
KERAS = 'Keras, bfloat16'


class Suite:
  """A copy of the benchmark with fake programs."""

  def __init__(self, root):
    self._root = root
    for name in ('benchmarks', 'cifar10_suite', '.venv/bin'):
      os.makedirs(root / name)
    (root / '.venv/bin/python').symlink_to(sys.executable)
    for name in (
      'benchmarks/bench.py',
      'benchmarks/turns.py',
      'cifar10_suite/processor.py',
      'cifar10_suite/__init__.py',
    ):
      shutil.copy(os.path.join(ROOT, name), root / name)
    self._fifo = str(root / 'fifo')
    os.mkfifo(self._fifo)
    for name, code in PROGRAMS.items():
      self.write(name, code)

  @property
  def bench(self):
    return str(self._root / 'benchmarks/bench.py')

  def write(self, name, code):
    """Write a fake program that records each of its runs in a file."""
    (self._root / name).write_text(
      'import os, signal, subprocess, sys, time\n'
      "bench = int(os.environ.get('BENCH_PID', 0))\n"
      f'fifo = os.open({self._fifo!r}, os.O_RDWR)\n'
      f'with open({str(self._root / name)!r} + ".runs", "a") as file:\n'
      '  print(*sys.argv[1:], file=file)\n' + code
    )

  def runs(self, name):
    """Return the arguments of each run of a program."""
    try:
      with open(self._root / f'{name}.runs') as file:
        return [line.split() for line in file]
    except FileNotFoundError:
      return []

  def wait_until_all_end(self):
    """Wait until no process has a program's pipe open for writing."""
    reader = os.open(self._fifo, os.O_RDONLY | os.O_NONBLOCK)

    def is_at_end():
      try:
        return os.read(reader, 1) == b''
      except BlockingIOError:
        return False

    wait_until(is_at_end)
    os.close(reader)

  def all_results(self):
    with open(self._root / 'results/bench.json') as file:
      return json.load(file)

  def results(self):
    """Return the entry of this processor."""
    return self.all_results()[processor.describe()]

  def damage_results(self):
    (self._root / 'results/bench.json').write_text('{')

  def has_chart(self):
    return (self._root / 'results/bench.png').exists()


@pytest.fixture
def suite(tmp_path):
  return Suite(tmp_path)


@pytest.fixture
def turns(turns, monkeypatch):
  monkeypatch.setattr(turns, 'SLICE_SECS', 0.1)
  return turns


@pytest.fixture
def run(suite, turns, monkeypatch, capsys):
  """A function that runs the benchmark; returns its exit status and lines.

  Only contestants whose name contains one of `names` are included.
  """

  def run_bench(*flags, names=('',), time_limit=TIMEOUT):
    monkeypatch.setattr(sys, 'argv', ['bench.py', *flags])
    monkeypatch.setattr(sys, 'path', [*sys.path])
    monkeypatch.setattr(turns, 'TIME_LIMIT', time_limit)
    bench = load(suite.bench)
    in_turn = bench.contestants_in_turn

    def select(contestants):
      return {
        name: contestant
        for name, contestant in contestants.items()
        if any(part in name for part in names)
      }

    bench.contestants_in_turn = lambda folder: select(in_turn(folder))
    bench.CONTESTANTS_ALONE = select(bench.CONTESTANTS_ALONE)
    status = 0
    try:
      bench.main()
    except SystemExit as error:
      status = error.code or 0
    return status, capsys.readouterr().out.splitlines()

  return run_bench


def row(lines, name):
  """Return the cells of a contestant's row in the table."""
  (line,) = [line for line in lines if line.startswith(f'| {name} |')]
  return line.removeprefix('| ').removesuffix(' |').split(' | ')


def test_all_contestants_report(suite, run):
  status, lines = run('--rounds=1')
  assert status == 0
  assert lines[0] == f'On {processor.describe()}'
  assert sum(line.endswith(': warmed up') for line in lines) == 18

  rate, times_tutorial, gflop, peak_mib, other = row(lines, KERAS)[1:]
  tutorial_rate = row(lines, "the tutorial's way")[1]
  assert float(times_tutorial) == pytest.approx(
    int(rate) / int(tutorial_rate), abs=0.006
  )
  assert int(gflop) == pytest.approx(int(rate) * 105e6 / 1e9, abs=1)
  assert int(peak_mib) > 1
  assert 'cpu_us_per_example 1e+06' in other
  assert row(lines, 'its input alone')[2:4] == ['', '']
  assert row(lines, 'matrix product, bfloat16')[3] == '7'
  assert 'eval_secs' in row(lines, 'its evaluation')[-1]
  results = suite.results()
  assert results['failures'] == {}
  assert results['python'] == platform.python_version()
  assert len(results['rounds']) == 21
  for name in 'this suite, float32', 'recipe fast, bfloat16', KERAS:
    ((figures),) = results['rounds'][name]
    assert figures['examples_per_sec'] > 0
    assert 0 < figures['startup_secs'] < TIMEOUT
  assert suite.has_chart()


def test_the_table_has_medians_of_the_rounds(suite, run):
  status, lines = run('--rounds=3', names=['Keras, float32'])
  assert status == 0
  rates = [
    figures['examples_per_sec']
    for figures in suite.results()['rounds']['Keras, float32']
  ]
  assert len(set(rates)) == 3
  assert row(lines, 'Keras, float32')[1] == f'{sorted(rates)[1]:.0f}'


def test_a_contestant_is_stopped_while_another_runs(turns, tmp_path):
  """Each program counts the time in which it was not stopped."""
  turns.NUM_SLICES, turns.SLICE_SECS = 2, 0.5
  code = """
import json, sys, time
name, rate = sys.argv[1], float(sys.argv[2])
last, running = time.time(), 0
while True:
  time.sleep(0.001)
  now = time.time()
  if now - last < 0.7:  # it was not stopped for two slices
    running += now - last
  last = now
  print(json.dumps({'time': now, 'examples': running * rate}))
  with open(sys.argv[3], 'a') as file:
    print(name, file=file)
"""
  log = tmp_path / 'log'
  rates = {'a': 1e4, 'b': 2e4, 'c': 5e4}
  programs = {
    name: turns.Steps([sys.executable, '-c', code, name, str(rate), str(log)])
    for name, rate in rates.items()
  }
  failures = {}
  figures = turns.alternate(programs, failures)
  assert failures == {}
  for name, rate in rates.items():
    assert figures[name]['examples_per_sec'] == pytest.approx(rate, rel=0.1)
  order = [name for name, _ in itertools.groupby(log.read_text().split())]
  assert order == list('abc') * (1 + turns.NUM_SLICES)


CRASH = """\
def check():
  raise ValueError('Found no kernel\\nfor LRN | T in [DT_FLOAT]\\n')
check()
"""


@pytest.mark.parametrize(
  ('code', 'failure'),
  [
    (CRASH, 'for LRN | T in [DT_FLOAT]'),
    ('sys.exit(3)', 'exit status 3'),
    ('', 'ended too soon'),
    ("print('{}', '[1]', 'rubbish', sep='\\n')", 'ended too soon'),
    ('os.kill(os.getpid(), signal.SIGKILL)', 'killed by SIGKILL'),
    (
      "print('warming up', file=sys.stderr)\ntime.sleep(60)",
      f'not done after {TIME_LIMIT} s; warming up',
    ),
  ],
  ids=['crash', 'status', 'silence', 'rubbish', 'killed', 'hang'],
)
def test_a_failure_costs_the_others_nothing(suite, run, code, failure):
  suite.write(
    'benchmarks/keras_peer.py',
    'if sys.argv[1] == "bf16":\n  pass\n'
    + textwrap.indent(code, '  ')
    + '\nelse:\n'
    + textwrap.indent(STEPS, '  '),
  )
  status, lines = run(
    '--rounds=2',
    names=['Keras, ', 'PyTorch, bfloat16', 'product, float32'],
    time_limit=TIME_LIMIT if 'not done' in failure else TIMEOUT,
  )
  assert status == 1
  assert lines.count(f'{KERAS}: failed: {failure}') == 1
  assert [
    arguments[0] for arguments in suite.runs('benchmarks/keras_peer.py')
  ] == ['float32', 'bf16', 'float32']  # the failed one is not repeated

  escaped = failure.replace('|', r'\|')
  assert row(lines, KERAS)[1:] == ['', '', '', '', f'failed: {escaped}']
  assert int(row(lines, 'Keras, float32')[1]) > 0
  assert int(row(lines, 'PyTorch, bfloat16, no input')[1]) > 0
  results = suite.results()
  assert results['failures'] == {KERAS: failure}
  assert len(results['rounds']) == 3 and KERAS not in results['rounds']
  assert {len(figures) for figures in results['rounds'].values()} == {2}
  assert suite.has_chart()


@pytest.mark.parametrize(
  ('ending', 'failure'),
  [
    ("sys.exit('Out of memory')", 'Out of memory'),
    ('time.sleep(60)', 'reported less than twice in its slices'),
  ],
  ids=['ends', 'hangs'],
)
def test_a_contestant_may_fail_in_its_slices(suite, run, ending, failure):
  suite.write(
    'benchmarks/tutorial.py',
    f'def end(*_):\n  {ending}\nsignal.signal(signal.SIGCONT, end)\n{STEPS}',
  )
  name = "the tutorial's way"
  status, lines = run('--rounds=1', names=[name, KERAS])
  assert status == 1
  assert f'{name}: warmed up' in lines
  assert f'{name}: failed: {failure}' in lines
  assert suite.results()['failures'] == {name: failure}
  assert list(suite.results()['rounds']) == [KERAS]


def test_a_later_failure_keeps_earlier_figures(suite, run):
  once = f'{suite.bench}.once'
  suite.write(
    'benchmarks/tutorial.py',
    f'if os.path.exists({once!r}):\n'
    "  sys.exit('Out of memory')\n"
    f"open({once!r}, 'w').close()\n{STEPS}",
  )
  status, lines = run('--rounds=2', names=['tutorial', KERAS])
  assert status == 1
  name = "the tutorial's way"
  cells = row(lines, name)
  assert int(cells[1]) > 0
  assert cells[-1].endswith('; failed: Out of memory')
  assert len(suite.results()['rounds'][name]) == 1
  assert suite.results()['failures'] == {name: 'Out of memory'}


@pytest.mark.parametrize(
  ('output', 'shown'),
  [
    ('', "''"),
    ('rubbish', "'rubbish'"),
    ('[1]', "'[1]'"),
    ('{"gflop_per_sec": null}', """'{"gflop_per_sec": null}'"""),
  ],
  ids=['silence', 'rubbish', 'no object', 'no number'],
)
def test_a_contestant_may_print_something_else(suite, run, output, shown):
  suite.write('benchmarks/matmul.py', f'print({output!r})')
  status, lines = run('--rounds=2', names=['product', 'Keras, float32'])
  assert status == 1
  failure = f'printed no figures, but {shown}'
  names = ['matrix product, float32', 'matrix product, bfloat16']
  assert suite.results()['failures'] == dict.fromkeys(names, failure)
  for name in names:
    assert lines.count(f'{name}: failed: {failure}') == 1
    assert row(lines, name)[-1] == f'failed: {failure}'
  assert len(suite.results()['rounds']['Keras, float32']) == 2


@pytest.mark.parametrize(
  ('program', 'code', 'failure', 'failed'),
  [
    (
      'cifar10_train.py',
      "sys.exit('Cannot write')",
      'Cannot write',
      ['this suite, float32', 'this suite, bfloat16', 'its evaluation'],
    ),
    (
      'cifar10_train.py',
      "print('Recipe tutorial, in float32')",
      'ended too soon',
      ['this suite, float32', 'this suite, bfloat16'],
    ),
    (
      'cifar10_eval.py',
      "sys.exit('No checkpoint')",
      'No checkpoint',
      ['its evaluation'],
    ),
  ],
  ids=['training', 'no steps', 'evaluation'],
)
def test_the_programs_may_fail_too(suite, run, program, code, failure, failed):
  suite.write(program, code)
  status, lines = run('--rounds=1', names=['this suite', 'its ev', 'Keras, '])
  assert status == 1
  results = suite.results()
  assert results['failures'] == dict.fromkeys(failed, failure)
  assert len(results['rounds']) == 5 - len(failed)
  for name in failed:
    assert row(lines, name)[-1] == f'failed: {failure}'


def test_if_all_fail_an_earlier_entry_remains(suite, run):
  assert run('--rounds=1', names=['Keras, float32'])[0] == 0
  before = suite.results()
  suite.write('benchmarks/keras_peer.py', "sys.exit('No Keras')")
  assert run('--rounds=1', names=['Keras, float32'])[0] == 1
  assert suite.results() == before


def test_other_processors_keep_their_entries(suite, run):
  os.makedirs(os.path.dirname(suite.bench) + '/../results')
  other = {'date': '2026-01-01', 'rounds': {'Keras': [{'peak_mib': 1}]}}
  with open(os.path.dirname(suite.bench) + '/../results/bench.json', 'w') as f:
    json.dump({'Other processor': other}, f)
  status, _ = run('--rounds=1', names=['Keras, '])
  assert status == 0
  assert suite.all_results()['Other processor'] == other
  assert len(suite.results()['rounds']) == 2
  assert suite.has_chart()


def test_a_missing_interpreter_is_a_failure(suite, run, monkeypatch, tmp_path):
  monkeypatch.setattr(sys, 'executable', str(tmp_path / 'no_python'))
  status, lines = run('--rounds=1', names=['PyTorch', 'Keras, float32'])
  assert status == 1
  failures = suite.results()['failures']
  assert len(failures) == 4 and all('PyTorch' in name for name in failures)
  assert 'no_python' in row(lines, 'PyTorch, float32, no input')[-1]


def test_a_talkative_contestant_is_not_blocked(suite, run):
  text = "'x' * 1000000"
  suite.write(
    'benchmarks/inputs.py',
    f'print({text}, file=sys.stderr)\nprint({text})\n{STEPS}',
  )
  status, lines = run('--rounds=1', '--inputs')
  assert status == 0
  assert int(row(lines, 'its input alone')[1]) > 0


@pytest.mark.parametrize('hangs', [False, True], ids=['steps', 'hangs'])
def test_nothing_that_a_contestant_started_remains(suite, run, hangs):
  suite.write(
    'benchmarks/inputs.py',
    f"subprocess.Popen(['sleep', '{2 * TIMEOUT}'], stdin=fifo)\n"
    + ('time.sleep(60)' if hangs else STEPS),
  )
  time_limit = TIME_LIMIT if hangs else TIMEOUT
  status, _ = run('--rounds=1', '--inputs', time_limit=time_limit)
  assert status == (1 if hangs else 0)
  suite.wait_until_all_end()


@pytest.mark.parametrize(
  ('code', 'flags', 'is_run', 'failure'),
  [
    ("""print('{"bfloat16": true}')""", [], True, None),
    ("""print('{"bfloat16": false}')""", [], False, None),
    ("""print('{"bfloat16": false}')""", ['--all'], True, None),
    ("raise ImportError('No suite')", [], None, 'ImportError: No suite'),
    ("raise ImportError('No suite')", ['--all'], True, None),
    ("print('rubbish')", [], None, "printed no figures, but 'rubbish'"),
  ],
  ids=['yes', 'no', 'no, all', 'failure', 'failure, all', 'rubbish'],
)
def test_bfloat16_is_run_where_it_is_faster(
  suite, run, code, flags, is_run, failure
):
  suite.write('benchmarks/precision.py', code)
  status, lines = run('--rounds=1', '--only=Keras, ', *flags)
  assert status == (1 if failure else 0)
  message = 'Skipping bfloat16, which is not faster here.'
  assert (message in lines) == (is_run is False)
  assert (f'precision.py failed: {failure}' in lines) == bool(failure)
  assert lines.count(f'{KERAS}: warmed up') == (1 if is_run else 0)
  assert lines.count('Keras, float32: warmed up') == 1


def test_precision_is_asked_for_once_and_only_if_it_matters(suite, run):
  run('--rounds=2', names=['Keras, '])
  assert len(suite.runs('benchmarks/precision.py')) == 1
  run('--rounds=1', '--inputs')
  assert len(suite.runs('benchmarks/precision.py')) == 1


def test_an_unfinished_round_does_not_replace_an_earlier_entry(suite, run):
  names = ['PyTorch, float32', 'product, float32']
  assert run('--rounds=1', names=names)[0] == 0
  before = suite.results()
  suite.write(
    'benchmarks/matmul.py',
    'os.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)',
  )
  status, lines = run('--rounds=2', names=names)
  assert status == 130
  assert 'Interrupted. The figures so far:' in lines
  assert int(row(lines, 'PyTorch, float32, no input')[1]) > 0
  assert suite.results() == before


def test_a_damaged_file_of_figures_is_named(suite, run):
  assert run('--rounds=1', names=['product, float32'])[0] == 0
  suite.damage_results()
  status, lines = run()
  assert 'bench.json is damaged: ' in status
  assert len(lines) == 1


RUN = """
import runpy, sys
sys.argv[:] = sys.argv[1:]
sys.path[0] = sys.argv.pop(0)
import turns
turns.NUM_SLICES, turns.SLICE_SECS = 1, 0.1
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.parametrize('number', ['SIGINT', 'SIGTERM', 'SIGKILL'])
def test_figures_survive_an_interruption(suite, popen, number):
  """PyTorch's second of four contestants hangs in the second round."""
  suite.write(
    'benchmarks/torch_peer.py',
    'is_last = len(open(__file__ + ".runs").readlines()) == 6\n'
    'while is_last and os.getppid() == bench:\n'
    f'  time.sleep(0.05)\n{STEPS}',
  )
  process = popen(
    [sys.executable, '-c', RUN, os.path.dirname(suite.bench), suite.bench],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  wait_until(lambda: len(suite.runs('benchmarks/torch_peer.py')) == 6)
  process.send_signal(signal.Signals[number])
  output, errors = process.communicate(timeout=TIMEOUT)
  suite.wait_until_all_end()

  results = suite.results()
  assert len(results['rounds']) == 21 and results['failures'] == {}
  (figures,) = results['rounds'][KERAS]
  assert figures['examples_per_sec'] > 0
  assert 'Traceback' not in errors
  if number == 'SIGKILL':
    return
  assert process.returncode == 130
  lines = output.splitlines()
  assert 'Interrupted. The figures so far:' in lines
  assert row(lines, KERAS)[1] == f'{figures["examples_per_sec"]:.0f}'
  assert suite.has_chart()


def test_keras_normalizes_in_bfloat16():
  """TensorFlow has no bfloat16 kernel for LRN on CPUs."""
  code = """
import numpy as np, keras, keras_peer
x = np.random.RandomState(1).normal(0, 50, [2, 3, 3, 12]).astype('float32')
wanted = keras_peer.norm()(x).numpy()
keras.mixed_precision.set_global_policy('mixed_bfloat16')
y = keras_peer.norm()(x)
assert y.dtype == 'bfloat16', y.dtype
np.testing.assert_allclose(y.numpy().astype('float32'), wanted, rtol=0.02)
assert np.abs(wanted / x).min() < 0.9  # it does normalize
"""
  subprocess.run(
    [sys.executable, '-c', code],
    cwd=os.path.join(ROOT, 'benchmarks'),
    check=True,
    timeout=TIMEOUT,
  )


X86 = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
flags\t\t: fpu sse2 avx avx512f avx2 avx512_bf16 avx512_vnni
bugs\t\t: spectre_v1

processor\t: 1
model name\t: another
flags\t\t: amx_bf16
"""
ARM = """\
processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd aes asimdhp sve i8mm bf16
CPU implementer\t: 0x41
"""


@pytest.mark.parametrize(
  ('cpuinfo', 'cores', 'wanted'),
  [
    (
      X86,
      2,
      'AMD EPYC, family 25, model 17, 2 cores (avx2, avx512f, avx512_bf16)',
    ),
    (ARM, 64, 'aarch64, 64 cores (asimd, asimdhp, bf16, sve)'),
    ('model name : Atom\nflags : sse2 bf', 1, 'Atom, 1 core'),
    (None, 8, 'aarch64, 8 cores'),
  ],
  ids=['x86', 'ARM', 'no flags', 'no file'],
)
def test_describes_the_processor(tmp_path, monkeypatch, cpuinfo, cores, wanted):
  monkeypatch.setattr(platform, 'processor', lambda: '')
  monkeypatch.setattr(platform, 'machine', lambda: 'aarch64')
  monkeypatch.setattr(os, 'cpu_count', lambda: cores)
  path = tmp_path / 'cpuinfo'
  if cpuinfo:
    path.write_text(cpuinfo)
  assert processor.describe(str(path)) == wanted


def test_describes_the_processor_as_the_platform_does(tmp_path, monkeypatch):
  monkeypatch.setattr(platform, 'processor', lambda: 'Apple M2')
  description = processor.describe(str(tmp_path / 'cpuinfo'))
  assert description.startswith('Apple M2, ')
