"""Times this suite beside what its users could run instead.

  make bench [ARGS='--rounds 5']
  make bench ARGS=--inputs

Everything runs in turn, several rounds of it, each contestant in a process of
its own, and medians are compared. Prints a table; writes results/bench.json and
the bar chart results/bench.png.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

_HERE = os.path.dirname(os.path.abspath(__file__))
_ROOT = os.path.dirname(_HERE)
_RESULTS = os.path.join(_ROOT, 'results')
_BATCHES_DIR = os.path.join(_ROOT, 'cifar10_data', 'cifar-10-batches-bin')
# The suite and Keras run in the suite's environment, PyTorch in this one.
_SUITE_PYTHON = os.path.join(_ROOT, '.venv', 'bin', 'python')
_STEPS = 201  # of the training program: the last hundred is what counts
# Multiplications and additions of a training step as the network is defined;
# the suite's convolution by frequencies takes fewer.
_MFLOP_PER_EXAMPLE = 105
_LINE = re.compile(r': step (\d+), .*\(([\d.]+) examples/sec;')

Figures = dict[str, float]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument(
    '--only', default='', help='a part of the names of those to run'
  )
  for flag, name in (('--inputs', 'input alone'), ('--startup', 'this suite')):
    parser.add_argument(
      flag,
      dest='only',
      action='store_const',
      const=name,
      help=f"short for --only '{name}'",
    )
  args = parser.parse_args()
  subprocess.run([_SUITE_PYTHON, 'download.py'], cwd=_ROOT, check=True)
  rounds = {name: [] for name in CONTESTANTS if args.only in name}
  if not _is_fast_in_bfloat16():
    print('No bfloat16: this processor has no fast path for it.')
    rounds = {name: r for name, r in rounds.items() if 'bfloat16' not in name}
  for number in range(args.rounds):
    for name, results in rounds.items():
      results.append(CONTESTANTS[name]())
      print(f'round {number + 1}, {name}: {_show(results[-1])}', flush=True)
  medians = {name: _medians(results) for name, results in rounds.items()}
  print('\n' + _table(medians))
  if not args.only:
    _write_results(medians, rounds)


def _child(python: str, script: str, *arguments: str) -> Figures:
  """Runs a contestant; returns the figures that it prints, and its memory."""
  process = subprocess.Popen(
    [python, os.path.join(_HERE, script), *arguments],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    env={**os.environ, 'TF_CPP_MIN_LOG_LEVEL': '3'},
    text=True,
  )
  output = process.stdout.read()
  figures = json.loads(output.splitlines()[-1])
  return {**figures, 'peak_mib': _peak_mib(process)}


def _peak_mib(process: subprocess.Popen) -> float:
  """Waits for a process and returns its peak resident memory."""
  _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    sys.exit(f'{process.args} failed with status {process.returncode}')
  return usage.ru_maxrss / 1024


def _train(*flags: str) -> Figures:
  """Times the training program, from the command to its end."""
  with tempfile.TemporaryDirectory() as train_dir:
    start = time.perf_counter()
    process = subprocess.Popen(
      [
        _SUITE_PYTHON,
        os.path.join(_ROOT, 'cifar10_train.py'),
        f'--train_dir={train_dir}',
        f'--max_steps={_STEPS}',
        *flags,
      ],
      stdout=subprocess.PIPE,
      text=True,
    )
    rate, startup = None, None
    for line in process.stdout:
      if match := _LINE.search(line):
        startup = startup or time.perf_counter() - start
        rate = float(match[2])
    return {
      'examples_per_sec': rate,
      'startup_secs': startup,
      'peak_mib': _peak_mib(process),
    }


def _evaluate() -> Figures:
  """Times the evaluation program on 10,000 images, less that on one image."""
  with tempfile.TemporaryDirectory() as folder:
    checkpoint_dir = f'--train_dir={folder}/train'
    command = [_SUITE_PYTHON, os.path.join(_ROOT, 'cifar10_train.py')]
    subprocess.run(
      [*command, checkpoint_dir, '--max_steps=1'],
      check=True,
      stdout=subprocess.DEVNULL,
    )
    seconds = []
    for num_examples in (1, 10000):
      start = time.perf_counter()
      process = subprocess.Popen(
        [
          _SUITE_PYTHON,
          os.path.join(_ROOT, 'cifar10_eval.py'),
          '--run_once',
          f'--checkpoint_dir={folder}/train',
          f'--eval_dir={folder}/eval_{num_examples}',
          f'--num_examples={num_examples}',
        ],
        stdout=subprocess.DEVNULL,
      )
      peak_mib = _peak_mib(process)
      seconds.append(time.perf_counter() - start)
  return {'eval_secs': seconds[1] - seconds[0], 'peak_mib': peak_mib}


def _suite(script: str, *arguments: str) -> Callable[[], Figures]:
  return lambda: _child(_SUITE_PYTHON, script, *arguments)


def _torch(*arguments: str) -> Callable[[], Figures]:
  return lambda: _child(sys.executable, 'torch_peer.py', *arguments)


def _tutorial() -> Figures:
  with tempfile.TemporaryDirectory() as train_dir:
    return _child(_SUITE_PYTHON, 'tutorial.py', _BATCHES_DIR, train_dir)


CONTESTANTS: dict[str, Callable[[], Figures]] = {
  'matrix product, float32': _suite('matmul.py', 'float32'),
  'matrix product, bfloat16': _suite('matmul.py', 'bfloat16'),
  'this suite, float32': _train,
  'this suite, bfloat16': lambda: _train('--use_bf16'),
  'its step alone, float32': _suite('step_alone.py', 'float32'),
  'its step alone, bfloat16': _suite('step_alone.py', 'bfloat16'),
  'its input alone': _suite('inputs.py', _BATCHES_DIR),
  'its evaluation': _evaluate,
  "the tutorial's way": _tutorial,
  'Keras, float32': _suite('keras_peer.py', 'float32', _BATCHES_DIR),
  'Keras, bfloat16': _suite('keras_peer.py', 'bf16', _BATCHES_DIR),
  'PyTorch, float32, no input': _torch('float32', 'eager'),
  'PyTorch compiled, float32, no input': _torch('float32', 'compiled'),
  'PyTorch, bfloat16, no input': _torch('bf16', 'eager'),
  'PyTorch compiled, bfloat16, no input': _torch('bf16', 'compiled'),
}


def _medians(results: list[Figures]) -> Figures:
  return {
    key: statistics.median(result[key] for result in results)
    for key in results[0]
  }


def _show(figures: Figures) -> str:
  return ', '.join(f'{key} {value:.4g}' for key, value in figures.items())


def _table(medians: dict[str, Figures]) -> str:
  """Returns the medians as a Markdown table, rates also as ratios."""
  baseline = medians.get("the tutorial's way", {}).get('examples_per_sec')
  lines = [
    '| | examples/sec | x tutorial | GFLOP/s | peak MiB | other |',
    '|---|--:|--:|--:|--:|---|',
  ]
  for name, figures in medians.items():
    rate = figures.get('examples_per_sec')
    gflop = figures.get('gflop_per_sec')
    is_training = rate and 'input alone' not in name
    if is_training:
      gflop = rate * _MFLOP_PER_EXAMPLE / 1000
    other = {
      key: value
      for key, value in figures.items()
      if key not in ('examples_per_sec', 'gflop_per_sec', 'peak_mib')
    }
    cells = [
      name,
      f'{rate:.0f}' if rate else '',
      f'{rate / baseline:.2f}' if is_training and baseline else '',
      f'{gflop:.0f}' if gflop else '',
      f'{figures["peak_mib"]:.0f}',
      _show(other),
    ]
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def _write_results(
  medians: dict[str, Figures], rounds: dict[str, list[Figures]]
) -> None:
  import matplotlib.pyplot as plt  # only here, so that --only needs no more

  os.makedirs(_RESULTS, exist_ok=True)
  machine = {
    'processor': _processor(),
    'cores': os.cpu_count(),
    'python': platform.python_version(),
  }
  with open(os.path.join(_RESULTS, 'bench.json'), 'w') as file:
    json.dump({'machine': machine, 'rounds': rounds}, file, indent=1)
  bars = {
    name: figures['examples_per_sec']
    for name, figures in medians.items()
    if 'examples_per_sec' in figures and 'alone' not in name
  }
  figure, axes = plt.subplots(figsize=(8, 4))
  bar = axes.barh(list(bars), list(bars.values()), color='tab:orange')
  axes.bar_label(bar, fmt='%.0f', padding=3)
  axes.invert_yaxis()
  axes.set_xlabel(f'training examples/sec on {machine["processor"]}')
  axes.spines[['top', 'right']].set_visible(False)
  figure.tight_layout()
  figure.savefig(os.path.join(_RESULTS, 'bench.png'), dpi=120)


def _is_fast_in_bfloat16() -> bool:
  with open('/proc/cpuinfo') as file:
    return not {'avx512_bf16', 'amx_bf16'}.isdisjoint(file.read().split())


def _processor() -> str:
  with open('/proc/cpuinfo') as file:
    for line in file:
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.machine()


if __name__ == '__main__':
  main()
