"""Test the benchmark runner with fake contestants."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from support.programs import ROOT, TIMEOUT, load, wait_until

from cifar10_suite import processor

TIME_LIMIT = 5  # seconds, for contestants that hang

# Fakes of the suite's programs and of each contestant.
PROGRAMS = {
  'download.py': '',
  'cifar10_eval.py': '',
  'cifar10_train.py': """
    import datetime
    print('Recipe tutorial, in float32')
    for step, rate in (0, 10.5), (100, 200.5), (200, 300), (300, 600):
      print(
        f'{datetime.datetime.now()}: step {step}, loss = 4.67 '
        f'({rate} examples/sec; 0.320 sec/batch)'
      )
    """,
  'benchmarks/precision.py': """print('{"bfloat16": true}')""",
  'benchmarks/matmul.py': """print('{"gflop_per_sec": 7}')""",
  'benchmarks/tutorial.py': """print('{"examples_per_sec": 25}')""",
  'benchmarks/inputs.py': """print('{"examples_per_sec": 9000}')""",
  'benchmarks/step_alone.py': """print('{"examples_per_sec": 60}')""",
  'benchmarks/keras_peer.py': """print('{"examples_per_sec": 30}')""",
  'benchmarks/torch_peer.py': """print('{"examples_per_sec": 40}')""",
}
KERAS = 'Keras, bfloat16'
PACKAGE = ['cifar10_suite/__init__.py', 'cifar10_suite/processor.py']


class Suite:
  """A copy of the benchmark with fake programs."""

  def __init__(self, root):
    self._root = root
    for name in ('benchmarks', 'cifar10_suite', '.venv/bin'):
      os.makedirs(root / name)
    (root / '.venv/bin/python').symlink_to(sys.executable)
    for name in (
      'benchmarks/bench.py',
      'cifar10_suite/processor.py',
      'cifar10_suite/__init__.py',
    ):
      shutil.copy(os.path.join(ROOT, name), root / name)
    for name, code in PROGRAMS.items():
      self.write(name, code)

  @property
  def bench(self):
    return str(self._root / 'benchmarks/bench.py')

  def write(self, name, code):
    """Write a fake program that records each of its runs in a file."""
    (self._root / name).write_text(
      'import os, signal, subprocess, sys, time\n'
      f'with open({str(self._root / name)!r} + ".runs", "a") as file:\n'
      '  print(os.getpid(), *sys.argv[1:], file=file)\n' + textwrap.dedent(code)
    )

  def runs(self, name):
    """Return the process id and the arguments of each run of a program."""
    try:
      with open(self._root / f'{name}.runs') as file:
        return [line.split() for line in file]
    except FileNotFoundError:
      return []

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
def run(suite, monkeypatch, capsys):
  """A function that runs the benchmark; returns its exit status and lines.

  Only contestants whose name contains one of `names` are included.
  """

  def run_bench(*flags, names=('',), time_limit=TIMEOUT):
    monkeypatch.setattr(sys, 'argv', ['bench.py', *flags])
    monkeypatch.setattr(sys, 'path', [*sys.path])
    bench = load(suite.bench)
    bench._TIME_LIMIT = time_limit
    bench.CONTESTANTS = {
      name: contestant
      for name, contestant in bench.CONTESTANTS.items()
      if any(part in name for part in names)
    }
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
  status, lines = run('--rounds=2')
  assert status == 0
  assert lines[0] == f'On {processor.describe()}'
  names = [line.split(': ')[0] for line in lines if line.startswith('round ')]
  assert len(names) == 2 * 21 and len(set(names)) == len(names)

  rate, times_tutorial, gflop, peak_mib, _ = row(lines, KERAS)[1:]
  assert (rate, times_tutorial, gflop) == ('30', '1.20', '3')
  assert int(peak_mib) > 1
  results = suite.results()
  assert results['failures'] == {}
  assert results['python'] == platform.python_version()
  assert len(results['rounds']) == 21
  keras = results['rounds'][KERAS]
  assert [figures['examples_per_sec'] for figures in keras] == [30, 30]
  (trained, _) = results['rounds']['this suite, float32']
  assert trained['examples_per_sec'] == pytest.approx(400)
  assert 0 < trained['startup_secs'] < TIMEOUT
  assert suite.has_chart()


CRASH = """
  def check():
    raise ValueError('Found no kernel\\nfor LRN | T in [DT_FLOAT]\\n')
  print('{"examples_per_sec": 30}', flush=True)
  check()
"""


@pytest.mark.parametrize(
  ('code', 'failure'),
  [
    (CRASH, 'for LRN | T in [DT_FLOAT]'),
    ('sys.exit(3)', 'exit status 3'),
    ('', "printed no figures, but ''"),
    ("print('rubbish')", "printed no figures, but 'rubbish'"),
    ("print('[1]')", "printed no figures, but '[1]'"),
    (
      """print('{"examples_per_sec": null}')""",
      """printed no figures, but '{"examples_per_sec": null}'""",
    ),
    ('os.kill(os.getpid(), signal.SIGKILL)', 'killed by SIGKILL'),
    (
      """
      print('warming up', file=sys.stderr, flush=True)
      time.sleep(60)
      """,
      f'not done after {TIME_LIMIT} s; warming up',
    ),
  ],
  ids=[
    'crash',
    'status',
    'silence',
    'rubbish',
    'no object',
    'no number',
    'killed',
    'hang',
  ],
)
def test_a_failure_costs_the_others_nothing(suite, run, code, failure):
  code = textwrap.indent(textwrap.dedent(code), '  ')
  suite.write(
    'benchmarks/keras_peer.py',
    f'if sys.argv[1] == "bf16":\n  pass\n{code}\n'
    'else:\n'
    """  print('{"examples_per_sec": 30}')""",
  )
  status, lines = run(
    '--rounds=2',
    names=['Keras, ', 'PyTorch, bfloat16'],
    time_limit=TIME_LIMIT if 'not done' in failure else TIMEOUT,
  )
  assert status == 1
  rounds = [line for line in lines if line.startswith('round ')]
  assert len(rounds) == 3 + 2  # the failed one is not repeated
  assert f'round 1, {KERAS}: failed: {failure}' in rounds
  assert [
    arguments[1] for arguments in suite.runs('benchmarks/keras_peer.py')
  ] == ['float32', 'bf16', 'float32']

  escaped = failure.replace('|', r'\|')
  assert row(lines, KERAS)[1:] == ['', '', '', '', f'failed: {escaped}']
  assert row(lines, 'Keras, float32')[1] == '30'
  assert row(lines, 'PyTorch, bfloat16, no input')[1] == '40'
  results = suite.results()
  assert results['failures'] == {KERAS: failure}
  assert len(results['rounds']) == 2 and KERAS not in results['rounds']
  assert {len(figures) for figures in results['rounds'].values()} == {2}
  assert suite.has_chart()


def test_a_later_failure_keeps_earlier_figures(suite, run):
  suite.write(
    'benchmarks/tutorial.py',
    """
    if os.path.exists('once'):
      sys.exit('Out of memory')
    open('once', 'w').close()
    print('{"examples_per_sec": 25, "cpu_us_per_example": 5}')
    """.replace("'once'", repr(suite.bench + '.once')),
  )
  status, lines = run('--rounds=3', names=['tutorial', 'Keras'])
  assert status == 1
  name = "the tutorial's way"
  cells = row(lines, name)
  assert cells[1] == '25'
  assert cells[-1] == 'cpu_us_per_example 5; failed: Out of memory'
  assert len(suite.results()['rounds'][name]) == 1
  assert suite.results()['failures'] == {name: 'Out of memory'}


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
      'printed no steps',
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
  status, lines = run('--rounds=1', names=['this suite', 'its ev', 'Keras'])
  assert status == 1
  results = suite.results()
  assert results['failures'] == dict.fromkeys(failed, failure)
  assert len(results['rounds']) == 7 - len(failed)
  for name in failed:
    assert row(lines, name)[-1] == f'failed: {failure}'


def test_other_processors_keep_their_entries(suite, run):
  os.makedirs(os.path.dirname(suite.bench) + '/../results')
  other = {'date': '2026-01-01', 'rounds': {'Keras': [{'peak_mib': 1}]}}
  with open(os.path.dirname(suite.bench) + '/../results/bench.json', 'w') as f:
    json.dump({'Other processor': other}, f)
  status, _ = run('--rounds=1', names=['Keras'])
  assert status == 0
  assert suite.all_results()['Other processor'] == other
  assert len(suite.results()['rounds']) == 4
  assert suite.has_chart()


def test_a_missing_interpreter_is_a_failure(suite, run, monkeypatch, tmp_path):
  monkeypatch.setattr(sys, 'executable', str(tmp_path / 'no_python'))
  status, lines = run('--rounds=1', names=['PyTorch', 'Keras'])
  assert status == 1
  failures = suite.results()['failures']
  assert len(failures) == 4 and all('PyTorch' in name for name in failures)
  assert 'no_python' in row(lines, 'PyTorch, float32, no input')[-1]


def test_a_talkative_contestant_is_not_blocked(suite, run):
  suite.write(
    'benchmarks/inputs.py',
    """
    print('x' * 1000000, file=sys.stderr)
    print('x' * 1000000)
    print('{"examples_per_sec": 9000}')
    """,
  )
  status, lines = run('--rounds=1', '--inputs')
  assert status == 0
  assert row(lines, 'its input alone')[1] == '9000'


@pytest.mark.parametrize('ends', [True, False], ids=['ends', 'hangs'])
def test_nothing_that_a_contestant_started_remains(suite, run, tmp_path, ends):
  fifo = tmp_path / 'fifo'
  os.mkfifo(fifo)
  suite.write(
    'benchmarks/inputs.py',
    f"""
    fifo = os.open({str(fifo)!r}, os.O_RDWR)
    subprocess.Popen(['sleep', '{2 * TIMEOUT}'], stdin=fifo)
    print('{{"examples_per_sec": 9000}}', flush=True)
    time.sleep(0 if {ends} else 60)
    """,
  )
  time_limit = TIMEOUT if ends else TIME_LIMIT
  status, _ = run('--rounds=1', '--inputs', time_limit=time_limit)
  assert status == (0 if ends else 1)
  reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
  deadline = time.monotonic() + TIMEOUT
  while True:
    try:
      # At the end of the file, no process has it open for writing.
      assert os.read(reader, 1) == b''
      break
    except BlockingIOError:
      assert time.monotonic() < deadline
      time.sleep(0.01)
  os.close(reader)


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
  status, lines = run('--rounds=2', '--only=Keras', *flags)
  assert status == (1 if failure else 0)
  message = 'Skipping bfloat16, which is not faster here.'
  assert (message in lines) == (is_run is False)
  assert (f'precision.py failed: {failure}' in lines) == bool(failure)
  assert any(f'round 1, {KERAS}: ' in line for line in lines) == bool(is_run)
  assert any('round 2, Keras, float32: ' in line for line in lines)


def test_precision_is_asked_for_once_and_only_if_it_matters(suite, run):
  run('--rounds=2', names=['Keras'])
  assert len(suite.runs('benchmarks/precision.py')) == 1
  run('--inputs')
  assert len(suite.runs('benchmarks/precision.py')) == 1


def test_an_unfinished_round_does_not_replace_an_earlier_entry(suite, run):
  assert run('--rounds=1')[0] == 0
  before = suite.results()
  suite.write(
    'benchmarks/torch_peer.py',
    """
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
    """,
  )
  suite.write('benchmarks/matmul.py', """print('{"gflop_per_sec": 8}')""")
  status, lines = run('--rounds=2')
  assert status == 130
  assert 'Interrupted. The figures so far:' in lines
  assert suite.results() == before


def test_a_damaged_file_of_figures_is_named(suite, run):
  assert run('--rounds=1')[0] == 0
  suite.damage_results()
  status, lines = run()
  assert 'bench.json is damaged: ' in status
  assert len(lines) == 1


@pytest.mark.parametrize('number', ['SIGINT', 'SIGTERM', 'SIGKILL'])
def test_figures_survive_an_interruption(suite, popen, number):
  suite.write(
    'benchmarks/torch_peer.py',
    """
    parent = os.getppid()
    while os.getppid() == parent:
      time.sleep(0.05)
    """,
  )
  process = popen(
    [sys.executable, suite.bench],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  lines = []
  for line in process.stdout:
    lines.append(line.rstrip())
    if KERAS in line:
      break
  wait_until(lambda: suite.runs('benchmarks/torch_peer.py'))
  process.send_signal(signal.Signals[number])
  output, errors = process.communicate(timeout=TIMEOUT)
  lines += output.splitlines()

  results = suite.results()
  assert len(results['rounds']) == 17 and results['failures'] == {}
  assert results['rounds'][KERAS][0]['examples_per_sec'] == 30
  assert 'Traceback' not in errors
  if number == 'SIGKILL':
    return
  assert process.returncode == 130
  assert 'Interrupted. The figures so far:' in lines
  assert row(lines, KERAS)[1] == '30'
  assert not any(line.startswith('| PyTorch') for line in lines)
  assert suite.has_chart()
  ((pid, *_),) = suite.runs('benchmarks/torch_peer.py')
  with pytest.raises(ProcessLookupError):
    os.kill(int(pid), 0)


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
