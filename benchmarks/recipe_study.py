"""Ablation study of the recipe `fast`: change one part at a time.

  python benchmarks/recipe_study.py --epochs 6 --seeds 1 2 3

The study does not use the test images. Training uses the first 45,000 training
images; the last 5,000, at the end of `data_batch_5.bin`, are held out for
scoring. Each run adds a line to results/recipes.jsonl; completed runs are not
repeated.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

import cifar10_suite
from cifar10_suite import dataset, recipes

HERE = os.path.dirname(os.path.abspath(__file__))
RESULTS = os.path.join(HERE, '..', 'results', 'recipes.jsonl')
TRAINED_ON, HELD_OUT = 45000, 5000

CHANGES = {
  'fast': {},
  "Nesterov momentum for Muon, rate 0.025, the tutorial's weight decay": {
    'optimizer': 'nesterov',
    'learning_rate': 0.025,
    'weight_decay': 0.004,
    'activation_scale': 1.0,
  },
  'activations as they are': {'activation_scale': 1.0},
  'a constant learning rate': {'linear': False},
  'no weight decay': {'decoupled_weight_decay': 0.0},
  'labels as they are': {'label_smoothing': 0.0},
  'random first filters': {'whitened': False},
  'crops from anywhere, always': {'crop_margin': (1, 1)},
  "the tutorial's contrast": {'contrast': (0.2, 1.8)},
}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--epochs', type=float, default=6)
  parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3])
  parser.add_argument(
    '--changes', nargs='+', choices=CHANGES, default=list(CHANGES)
  )
  parser.add_argument('--data_dir', default=dataset.DEFAULT_DATA_DIR)
  args = parser.parse_args()
  version = {'version': cifar10_suite.__version__}  # of the recipe
  runs = [run for run in read_runs() if version.items() <= run.items()]
  with tempfile.TemporaryDirectory() as directory:
    for seed in args.seeds:
      for name in args.changes:
        key = {'change': name, 'epochs': args.epochs, 'seed': seed, **version}
        if any(key.items() <= run.items() for run in runs):
          continue
        recipe = dataclasses.replace(recipes.FAST, **CHANGES[name])
        steps = round(args.epochs * TRAINED_ON / recipe.batch_size)
        recipe = dataclasses.replace(recipe, max_steps=steps)
        run = key | train_and_score(directory, recipe, seed, args.data_dir)
        runs.append(run)
        print(json.dumps(run), flush=True)
        with open(RESULTS, 'a') as file:
          file.write(json.dumps(run) + '\n')
  print(table([run for run in runs if run['epochs'] == args.epochs]))


def read_runs():
  with contextlib.suppress(FileNotFoundError), open(RESULTS) as file:
    return [json.loads(line) for line in file]
  return []


def train_and_score(directory, recipe, seed, data_dir):
  """Train and return seconds, steps, and precision with 1 and 10 views."""
  data = f'--data_dir={data_dir}'
  start = time.time()
  program(
    [__file__, '--train', json.dumps(dataclasses.asdict(recipe)), data],
    f'--train_dir={directory}/train',
    f'--seed={seed}',
    f'--hold_out={HELD_OUT}',
    '--restart',
  )
  seconds = round(time.time() - start)
  scores = {'seconds': seconds, 'steps': recipe.max_steps}
  for views in (1, 10):
    eval_dir = tempfile.mkdtemp(dir=directory)
    program(
      [os.path.join(HERE, '..', 'cifar10_eval.py'), data],
      f'--checkpoint_dir={directory}/train',
      f'--eval_dir={eval_dir}',
      '--eval_data=held_out',
      f'--num_views={views}',
      '--run_once',
    )
    with open(os.path.join(eval_dir, 'metrics.jsonl')) as file:
      scores[f'views_{views}'] = json.loads(file.readline())['precision']
  return scores


def program(command, *flags):
  """Run a Python program; show its output and exit if it fails."""
  done = subprocess.run(
    [sys.executable, *command, *flags], capture_output=True, text=True
  )
  if done.returncode:
    sys.exit(f'{done.stdout}{done.stderr}')


def train(recipe, flags):
  """Run the training program in this process, with another recipe."""
  from cifar10_suite import cli, loading

  loading.load_tensorflow()
  import cifar10_train

  sys.argv[1:] = flags
  recipe = recipes.Recipe(**json.loads(recipe))
  cli.run(functools.partial(cifar10_train.main, recipe))


def table(runs):
  """Return a Markdown table of means and standard deviations over seeds."""
  lines = [
    '| | runs | one view | ten views | steps | seconds |',
    '|---|--:|--:|--:|--:|--:|',
  ]
  for name in CHANGES:
    own = [run for run in runs if run['change'] == name]
    if own:
      views = [spread([run[f'views_{n}'] for run in own]) for n in (1, 10)]
      seconds = statistics.median(run['seconds'] for run in own)
      lines.append(
        f'| {name} | {len(own)} | {views[0]} | {views[1]} | {own[0]["steps"]} '
        f'| {seconds:.0f} |'
      )
  return '\n'.join(lines)


def spread(precisions, decimals=1):
  """Return mean and standard deviation as text, in percent."""
  mean = f'{statistics.mean(precisions):.{decimals}%}'
  if len(precisions) == 1:
    return mean
  return f'{mean} ± {statistics.stdev(precisions) * 100:.{decimals}f}'


if __name__ == '__main__':
  if sys.argv[1:2] == ['--train']:
    train(sys.argv[2], sys.argv[3:])
  else:
    main()
