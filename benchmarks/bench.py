"""Compare the speed of this suite with alternatives.

  make bench [ARGS='--rounds 5']
  make bench ARGS=--inputs

The contestants run in turn, each in a separate process, for several rounds. The
program prints a table of medians. After each contestant, so that an
interruption loses nothing, it writes results/bench.json, which has an entry for
each kind of processor; it keeps an earlier entry until the first round is
complete. Finally, it draws the bar chart results/bench.png. With --only,
--inputs or --startup, it writes neither file.

If a contestant fails, the program prints the last line of its error output and
does not try it again. The others continue, and the exit status is 1.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

_HERE = os.path.dirname(os.path.abspath(__file__))
_ROOT = os.path.dirname(_HERE)
sys.path.insert(0, _ROOT)

# The only import from the suite, because this environment has no TensorFlow.
from cifar10_suite import processor  # noqa: E402

_RESULTS = os.path.join(_ROOT, 'results')
_FIGURES = os.path.join(_RESULTS, 'bench.json')
_BATCHES_DIR = os.path.join(_ROOT, 'cifar10_data', 'cifar-10-batches-bin')
# Python of the suite and Keras; PyTorch runs in this program's environment.
_SUITE_PYTHON = os.path.join(_ROOT, '.venv', 'bin', 'python')
_STEPS = 301  # of the training program; the last two hundred are measured
_TIME_LIMIT = 300  # seconds after which a process counts as hung
# Millions of multiplications and additions per image of a training step, with
# direct convolutions; those in the frequency domain take fewer.
_MFLOP_PER_EXAMPLE = 105
_LINE = re.compile(
  r'(?P<time>[\d-]+ [\d:.]+): step \d+, .*\((?P<rate>[\d.]+) examples/sec;'
)

Figures = dict[str, float]


class ContestantError(Exception):
  """Failure of a contestant; the message gives the reason in one line."""


def main() -> None:
  args = _parse_arguments()
  print(f'On {processor.describe()}', flush=True)
  is_known = processor.describe() in _read_figures()
  if subprocess.run([_SUITE_PYTHON, 'download.py'], cwd=_ROOT).returncode:
    sys.exit(1)
  failures: dict[str, str] = {}
  names = _without_slow_types(args.names, args.all, failures)
  rounds: dict[str, list[Figures]] = {name: [] for name in names}
  is_interrupted = False
  try:
    for number in range(args.rounds):
      for name in names:
        if name not in failures:
          outcome = _compete(name, rounds, failures)
          if not args.only and (number > 0 or not is_known):
            _write_figures(rounds, failures)
          print(f'round {number + 1}, {name}: {outcome}', flush=True)
      if not args.only:
        _write_figures(rounds, failures)
  except KeyboardInterrupt:
    is_interrupted = True
    print('Interrupted. The figures so far:', flush=True)
  medians = {name: _medians(results) for name, results in rounds.items()}
  print('\n' + _table(medians, failures), flush=True)
  if not args.only and any(medians.values()):
    _draw_chart()
  if is_interrupted:
    sys.exit(130)
  if failures:
    sys.exit(1)


def _parse_arguments() -> argparse.Namespace:
  """Return the arguments, and as `names` the contestants that they select."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument(
    '--only', default='', help='run contestants whose name contains this'
  )
  for flag, name in (('--inputs', 'input alone'), ('--startup', 'this suite')):
    parser.add_argument(
      flag,
      dest='only',
      action='store_const',
      const=name,
      help=f"short for --only '{name}'",
    )
  parser.add_argument(
    '--all',
    action='store_true',
    help='run bfloat16 even if TensorFlow is not faster in it',
  )
  args = parser.parse_args()
  args.names = [name for name in CONTESTANTS if args.only in name]
  if not args.names:
    parser.error(f'--only matches none of: {", ".join(CONTESTANTS)}')
  return args


def _without_slow_types(
  names: list[str], wants_all: bool, failures: dict[str, str]
) -> list[str]:
  """Return the contestants without those in bfloat16, where it is not faster.

  If that cannot be found out, it is recorded as a failure of each of these.
  """
  in_bfloat16 = [name for name in names if 'bfloat16' in name]
  if wants_all or not in_bfloat16:
    return names
  try:
    if _is_fast_in_bfloat16():
      return names
  except ContestantError as error:
    print(f'precision.py failed: {error}', flush=True)
    failures.update(dict.fromkeys(in_bfloat16, f'precision.py: {error}'))
    return names
  print('Skipping bfloat16, which is not faster here.', flush=True)
  return [name for name in names if name not in in_bfloat16]


def _compete(
  name: str, rounds: dict[str, list[Figures]], failures: dict[str, str]
) -> str:
  """Run a contestant; record and describe its figures or failure."""
  try:
    figures = CONTESTANTS[name]()
  except ContestantError as error:
    failures[name] = str(error)
    return f'failed: {error}'
  rounds[name].append(figures)
  return _show(figures)


def _is_fast_in_bfloat16() -> bool:
  """Return whether the suite finds bfloat16 faster on this machine.

  Raises:
    ContestantError: if its program fails.
  """
  output, _ = _run([_SUITE_PYTHON, os.path.join(_HERE, 'precision.py')])
  return _last_json(output).get('bfloat16') is True


def _run(command: list[str]) -> tuple[str, float]:
  """Run a program to completion.

  The output goes to temporary files, since a full pipe would block the program.
  The program runs in a new session, so that its child processes can be killed,
  too.

  Returns:
    The standard output and the peak resident memory in MiB.

  Raises:
    ContestantError: if the program does not start, exceeds _TIME_LIMIT, is
      killed, or exits with a non-zero status.
  """
  with (
    tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') as output,
    tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') as errors,
  ):
    try:
      process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        env={**os.environ, 'TF_CPP_MIN_LOG_LEVEL': '3'},
        start_new_session=True,
      )
    except OSError as error:
      raise ContestantError(f'{error}') from None
    try:
      peak_mib = _wait(process)
    finally:
      _kill(process)
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines()]
    last_line = next((line for line in reversed(lines) if line), '')
    if peak_mib is None:
      reason = f'not done after {_TIME_LIMIT} s'
    elif process.returncode < 0:
      reason = f'killed by {signal.Signals(-process.returncode).name}'
    elif process.returncode:
      raise ContestantError(last_line or f'exit status {process.returncode}')
    else:
      output.seek(0)
      return output.read(), peak_mib
    raise ContestantError(f'{reason}; {last_line}' if last_line else reason)


def _wait(process: subprocess.Popen) -> float | None:
  """Return a process's peak memory in MiB, or None after the time limit."""
  deadline = time.monotonic() + _TIME_LIMIT
  while time.monotonic() < deadline:
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if pid:
      process.returncode = os.waitstatus_to_exitcode(status)
      return usage.ru_maxrss / 1024
    time.sleep(0.005)
  return None


def _kill(process: subprocess.Popen) -> None:
  """Kill the remaining processes of a process's session."""
  # If no process is left, macOS raises PermissionError.
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def _last_json(output: str) -> dict:
  """Return the JSON object of numbers in the last line of the output.

  Raises:
    ContestantError: if the last line is something else.
  """
  last_line = (output.strip().splitlines() or [''])[-1]
  try:
    figures = json.loads(last_line)
    if figures and all(math.isfinite(value) for value in figures.values()):
      return figures
  except (ValueError, AttributeError, TypeError):
    pass  # not JSON, not an object, not numbers
  raise ContestantError(f'printed no figures, but {last_line!r}')


def _child(python: str, script: str, *arguments: str) -> Figures:
  """Run a script; return its figures and its peak memory."""
  output, peak_mib = _run([python, os.path.join(_HERE, script), *arguments])
  return {**_last_json(output), 'peak_mib': peak_mib}


def _train(*flags: str) -> Figures:
  """Measure throughput, startup time and memory of the training program."""
  with tempfile.TemporaryDirectory() as train_dir:
    start = datetime.datetime.now()
    output, peak_mib = _run(
      [
        _SUITE_PYTHON,
        os.path.join(_ROOT, 'cifar10_train.py'),
        f'--train_dir={train_dir}',
        f'--max_steps={_STEPS}',
        *flags,
      ]
    )
  lines = [line for line in map(_LINE.match, output.splitlines()) if line]
  rates = [float(line['rate']) for line in lines[2:]]  # of 100 steps each
  if not rates:
    raise ContestantError('printed no steps')
  first = datetime.datetime.fromisoformat(lines[0]['time'])
  return {
    'examples_per_sec': statistics.harmonic_mean(rates),
    'startup_secs': (first - start).total_seconds(),
    'peak_mib': peak_mib,
  }


def _evaluate() -> Figures:
  """Time the evaluation of 10,000 images, minus that of one image."""
  with tempfile.TemporaryDirectory() as folder:
    _run(
      [
        _SUITE_PYTHON,
        os.path.join(_ROOT, 'cifar10_train.py'),
        f'--train_dir={folder}/train',
        '--max_steps=1',
      ]
    )
    seconds = []
    for num_examples in (1, 10000):
      start = time.perf_counter()
      _, peak_mib = _run(
        [
          _SUITE_PYTHON,
          os.path.join(_ROOT, 'cifar10_eval.py'),
          '--run_once',
          f'--checkpoint_dir={folder}/train',
          f'--eval_dir={folder}/eval_{num_examples}',
          f'--num_examples={num_examples}',
        ]
      )
      seconds.append(time.perf_counter() - start)
  return {'eval_secs': seconds[1] - seconds[0], 'peak_mib': peak_mib}


def _suite(script: str, *arguments: str) -> Callable[[], Figures]:
  return lambda: _child(_SUITE_PYTHON, script, *arguments)


def _torch(*arguments: str) -> Callable[[], Figures]:
  return lambda: _child(sys.executable, 'torch_peer.py', *arguments)


def _tutorial() -> Figures:
  with tempfile.TemporaryDirectory() as train_dir:
    return _child(_SUITE_PYTHON, 'tutorial.py', _BATCHES_DIR, train_dir)


def _keras(*arguments: str) -> Callable[[], Figures]:
  return _suite('keras_peer.py', *arguments, _BATCHES_DIR)


CONTESTANTS: dict[str, Callable[[], Figures]] = {
  'matrix product, float32': _suite('matmul.py', 'float32'),
  'matrix product, bfloat16': _suite('matmul.py', 'bfloat16'),
  'this suite, float32': _train,
  'this suite, bfloat16': lambda: _train('--use_bf16'),
  'its step alone, float32': _suite('step_alone.py', 'float32', 'tutorial'),
  'its step alone, bfloat16': _suite('step_alone.py', 'bfloat16', 'tutorial'),
  'its input alone': _suite('inputs.py', _BATCHES_DIR),
  'its evaluation': _evaluate,
  'recipe fast, float32': lambda: _train('--recipe=fast', '--nouse_bf16'),
  'recipe fast, bfloat16': lambda: _train('--recipe=fast', '--use_bf16'),
  'its step alone, fast, float32': _suite('step_alone.py', 'float32', 'fast'),
  'its step alone, fast, bfloat16': _suite('step_alone.py', 'bfloat16', 'fast'),
  "the tutorial's way": _tutorial,
  'Keras, float32': _keras('float32', 'plain'),
  'Keras compiled, float32': _keras('float32', 'compiled'),
  'Keras, bfloat16': _keras('bf16', 'plain'),
  'Keras compiled, bfloat16': _keras('bf16', 'compiled'),
  'PyTorch, float32, no input': _torch('float32', 'eager'),
  'PyTorch compiled, float32, no input': _torch('float32', 'compiled'),
  'PyTorch, bfloat16, no input': _torch('bf16', 'eager'),
  'PyTorch compiled, bfloat16, no input': _torch('bf16', 'compiled'),
}


def _medians(results: list[Figures]) -> Figures:
  return {
    key: statistics.median(result[key] for result in results)
    for key in (results[0] if results else {})
  }


def _show(figures: Figures) -> str:
  return ', '.join(f'{key} {value:.4g}' for key, value in figures.items())


def _table(medians: dict[str, Figures], failures: dict[str, str]) -> str:
  """Return the medians as a Markdown table, with ratios to the tutorial."""
  baseline = medians.get("the tutorial's way", {}).get('examples_per_sec')
  lines = [
    '| | examples/sec | x tutorial | GFLOP/s | peak MiB | other |',
    '|---|--:|--:|--:|--:|---|',
  ]
  for name, figures in medians.items():
    if not figures and name not in failures:
      continue  # interrupted before its turn
    rate = figures.get('examples_per_sec')
    gflop = figures.get('gflop_per_sec')
    peak_mib = figures.get('peak_mib')
    is_training = rate and 'input alone' not in name
    if is_training:
      gflop = rate * _MFLOP_PER_EXAMPLE / 1000
    other = {
      key: value
      for key, value in figures.items()
      if key not in ('examples_per_sec', 'gflop_per_sec', 'peak_mib')
    }
    notes = [_show(other)] if other else []
    if name in failures:
      notes.append('failed: ' + failures[name].replace('|', r'\|'))
    cells = [
      name,
      f'{rate:.0f}' if rate else '',
      f'{rate / baseline:.2f}' if is_training and baseline else '',
      f'{gflop:.0f}' if gflop else '',
      f'{peak_mib:.0f}' if peak_mib else '',
      '; '.join(notes),
    ]
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def _write_figures(
  rounds: dict[str, list[Figures]], failures: dict[str, str]
) -> None:
  """Write this kind of processor's entry of results/bench.json, atomically."""
  os.makedirs(_RESULTS, exist_ok=True)
  contents = _read_figures()
  contents[processor.describe()] = {
    'date': datetime.date.today().isoformat(),
    'python': platform.python_version(),
    'rounds': {name: results for name, results in rounds.items() if results},
    'failures': failures,
  }
  with open(f'{_FIGURES}.tmp', 'w') as file:
    json.dump(contents, file, indent=1)
  os.replace(f'{_FIGURES}.tmp', _FIGURES)


def _read_figures() -> dict[str, dict]:
  """Return the entries of results/bench.json by processor."""
  try:
    with open(_FIGURES) as file:
      return json.load(file)
  except FileNotFoundError:
    return {}
  except ValueError as error:
    sys.exit(f'{_FIGURES} is damaged: {error}. Restore it.')


def _draw_chart() -> None:
  """Draw results/bench.png: the training rates on each kind of processor."""
  import matplotlib.pyplot as plt  # imported here: not needed with --only

  entries = _read_figures()
  figure, panels = plt.subplots(
    len(entries), figsize=(8, 3.5 * len(entries)), squeeze=False
  )
  for axes, (name, entry) in zip(panels[:, 0], entries.items(), strict=True):
    medians = {
      contestant: _medians(results).get('examples_per_sec')
      for contestant, results in entry['rounds'].items()
      if 'alone' not in contestant
    }
    bars = {key: value for key, value in medians.items() if value}
    bar = axes.barh(list(bars), list(bars.values()), color='tab:orange')
    axes.bar_label(bar, fmt='%.0f', padding=3)
    axes.invert_yaxis()
    axes.spines[['top', 'right']].set_visible(False)
    title = f'{name}, {entry["date"]}'
    axes.set_title(title, fontsize='small', loc='right')
  panels[-1, 0].set_xlabel('training examples/sec')
  figure.tight_layout()
  figure.savefig(os.path.join(_RESULTS, 'bench.png'), dpi=120)
  plt.close(figure)


if __name__ == '__main__':
  # `kill` is handled like Ctrl-C.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    main()
  except KeyboardInterrupt:  # before the first contestant
    sys.exit(130)
