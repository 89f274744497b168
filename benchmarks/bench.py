"""Compare the speed of this suite with alternatives.

  make bench [ARGS='--rounds 5']
  make bench ARGS=--inputs

In each of several rounds, the contestants that train take turns every two
seconds, so that other load affects all of them alike; the others follow one by
one. The program prints a table of medians. After each round, it writes
results/bench.json, which has an entry for each kind of processor. Finally, it
draws the bar chart results/bench.png. With --only, --inputs or --startup, it
writes neither file.

If a contestant fails, the program prints the last line of its error output and
does not try it again. The others continue, and the exit status is 1.
"""

import argparse
import datetime
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from turns import ContestantError, Figures, Steps, alternate, run

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
# Millions of multiplications and additions per image of a training step, with
# direct convolutions; those in the frequency domain take fewer.
_MFLOP_PER_EXAMPLE = 105


def main() -> None:
  args = _parse_arguments()
  print(f'On {processor.describe()}', flush=True)
  _read_figures()  # if the file is damaged, this exits before all the work
  if subprocess.run([_SUITE_PYTHON, 'download.py'], cwd=_ROOT).returncode:
    sys.exit(1)
  failures: dict[str, str] = {}
  names = _without_slow_types(args.names, args.all, failures)
  rounds: dict[str, list[Figures]] = {name: [] for name in names}
  is_interrupted = False
  try:
    for number in range(1, args.rounds + 1):
      print(f'Round {number}', flush=True)
      _run_round(rounds, failures)
      if not args.only and any(rounds.values()):
        _write_figures(rounds, failures)
  except KeyboardInterrupt:
    is_interrupted = True
    print('Interrupted. The figures so far:', flush=True)
  medians = {name: _medians(results) for name, results in rounds.items()}
  print('\n' + _table(medians, failures), flush=True)
  if not args.only and _read_figures():
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
  names = [*contestants_in_turn(''), *CONTESTANTS_ALONE]
  args.names = [name for name in names if args.only in name]
  if not args.names:
    parser.error(f'--only matches none of: {", ".join(names)}')
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


def _run_round(
  rounds: dict[str, list[Figures]], failures: dict[str, str]
) -> None:
  """Run each contestant that has not failed; record its figures or failure."""
  with tempfile.TemporaryDirectory() as folder:
    programs = {
      name: program
      for name, program in contestants_in_turn(folder).items()
      if name in rounds and name not in failures
    }
    for name, figures in alternate(programs, failures).items():
      rounds[name].append(figures)
      print(f'{name}: {_show(figures)}', flush=True)
  for name, measure in CONTESTANTS_ALONE.items():
    if name in rounds and name not in failures:
      try:
        rounds[name].append(measure())
        print(f'{name}: {_show(rounds[name][-1])}', flush=True)
      except ContestantError as error:
        failures[name] = str(error)
        print(f'{name}: failed: {error}', flush=True)


def _is_fast_in_bfloat16() -> bool:
  """Return whether the suite finds bfloat16 faster on this machine.

  Raises:
    ContestantError: if its program fails.
  """
  figures, _ = _run_script('precision.py')
  return figures.get('bfloat16') is True


def _run_script(script: str, *arguments: str) -> tuple[dict, float]:
  """Run a script of this folder to completion.

  Returns:
    The JSON object of numbers in the last line of its output, and its peak
    resident memory in MiB.

  Raises:
    ContestantError: if it fails, or if the last line is something else.
  """
  command = [_SUITE_PYTHON, os.path.join(_HERE, script), *arguments]
  output, peak_mib = run(command)
  last_line = (output.strip().splitlines() or [''])[-1]
  try:
    figures = json.loads(last_line)
    if figures and all(math.isfinite(value) for value in figures.values()):
      return figures, peak_mib
  except (ValueError, AttributeError, TypeError):
    pass  # not JSON, not an object, not numbers
  raise ContestantError(f'printed no figures, but {last_line!r}')


def _multiply(dtype: str) -> Figures:
  figures, peak_mib = _run_script('matmul.py', dtype)
  return {**figures, 'peak_mib': peak_mib}


def _evaluate() -> Figures:
  """Time the evaluation of 10,000 images, minus that of one image."""
  with tempfile.TemporaryDirectory() as folder:
    run(
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
      _, peak_mib = run(
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


def contestants_in_turn(folder: str) -> dict[str, Steps]:
  """Return the contestants that take turns; some write to new directories.

  Args:
    folder: directory for these.
  """

  def train(name: str, *flags: str) -> list[str]:
    train_dir = os.path.join(folder, name)
    script = os.path.join(_ROOT, 'cifar10_train.py')
    return [
      _SUITE_PYTHON,
      script,
      f'--train_dir={train_dir}',
      '--log_frequency=10',
      '--max_steps=10000',  # only matters if this program is killed
      *flags,
    ]

  def suite(script: str, *arguments: str) -> list[str]:
    return [_SUITE_PYTHON, os.path.join(_HERE, script), *arguments]

  def keras(*arguments: str) -> list[str]:
    return suite('keras_peer.py', *arguments, _BATCHES_DIR)

  def torch(*arguments: str) -> list[str]:
    return [sys.executable, os.path.join(_HERE, 'torch_peer.py'), *arguments]

  return {
    'this suite, float32': Steps(train('float32')),
    'this suite, bfloat16': Steps(train('bfloat16', '--use_bf16')),
    'its step alone, float32': Steps(
      suite('step_alone.py', 'float32', 'tutorial')
    ),
    'its step alone, bfloat16': Steps(
      suite('step_alone.py', 'bfloat16', 'tutorial')
    ),
    'its input alone': Steps(suite('inputs.py', _BATCHES_DIR)),
    'recipe fast, float32': Steps(
      train('fast_float32', '--recipe=fast', '--nouse_bf16'), 256
    ),
    'recipe fast, bfloat16': Steps(
      train('fast_bfloat16', '--recipe=fast', '--use_bf16'), 256
    ),
    'its step alone, fast, float32': Steps(
      suite('step_alone.py', 'float32', 'fast'), 256
    ),
    'its step alone, fast, bfloat16': Steps(
      suite('step_alone.py', 'bfloat16', 'fast'), 256
    ),
    "the tutorial's way": Steps(
      suite('tutorial.py', _BATCHES_DIR, os.path.join(folder, 'way'))
    ),
    'Keras, float32': Steps(keras('float32', 'plain')),
    'Keras compiled, float32': Steps(keras('float32', 'compiled')),
    'Keras, bfloat16': Steps(keras('bf16', 'plain')),
    'Keras compiled, bfloat16': Steps(keras('bf16', 'compiled')),
    'PyTorch, float32, no input': Steps(torch('float32', 'eager')),
    'PyTorch compiled, float32, no input': Steps(torch('float32', 'compiled')),
    'PyTorch, bfloat16, no input': Steps(torch('bf16', 'eager')),
    'PyTorch compiled, bfloat16, no input': Steps(torch('bf16', 'compiled')),
  }


CONTESTANTS_ALONE: dict[str, Callable[[], Figures]] = {
  'its evaluation': _evaluate,
  'matrix product, float32': lambda: _multiply('float32'),
  'matrix product, bfloat16': lambda: _multiply('bfloat16'),
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
