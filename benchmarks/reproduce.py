"""Make the results again: train, score, draw the curves, print the table.

  python benchmarks/reproduce.py [--row fast] [--dir runs/reproduce]

After an interruption, the same command continues. Each finished run adds an
entry to results/runs.json and its scores to results/<recipe>/seed<n>.jsonl.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys

import curves
from recipe_study import spread

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import cifar10_suite
from cifar10_suite import files, subprograms

RUNS = os.path.join(curves.RESULTS, 'runs.json')
SEEDS = {'fast': 5, 'long': 3, 'tutorial': 1}  # number of runs per recipe
FLAGS = ['--save_checkpoint_secs', '300', '--keep_checkpoint_max', '0']


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--row', choices=list(SEEDS), help='only this recipe')
  parser.add_argument('--dir', default=os.path.join(ROOT, 'runs', 'reproduce'))
  args = parser.parse_args()
  for recipe in [args.row] if args.row else SEEDS:
    for seed in range(1, SEEDS[recipe] + 1):
      where = os.path.join(args.dir, f'{recipe}-{seed}')
      if os.path.exists(f'{where}/recorded'):
        print(f'{where} is finished.')
        continue
      record(recipe, seed, train_and_score(where, recipe, seed))
      with open(f'{where}/recorded', 'w'):
        pass
  curves.main()
  print(table())


def train_and_score(where, recipe, seed):
  """Train a run and score its checkpoints; return its entry of runs.json.

  The programs skip what they have finished before.
  """
  train_dir = f'{where}/train'
  os.makedirs(where, exist_ok=True)
  flags = ['--recipe', recipe, '--seed', str(seed), *FLAGS]
  with open(f'{where}/log', 'a+', buffering=1) as log:
    run('cifar10_train.py', [*flags, f'--train_dir={train_dir}'], log)
    log.seek(0)
    lines = log.read()
  of_run = f'--checkpoint_dir={train_dir}'
  which = '--all_checkpoints' if seed == 1 else '--run_once'  # for the curve
  run('cifar10_eval.py', [which, of_run, f'--eval_dir={where}/1'])
  ten_views = ['--num_views=10', '--run_once', f'--eval_dir={where}/10']
  run('cifar10_eval.py', [of_run, *ten_views])
  copy = f'{recipe}/seed{seed}.jsonl'
  os.makedirs(os.path.join(curves.RESULTS, recipe), exist_ok=True)
  shutil.copy(f'{where}/1/metrics.jsonl', os.path.join(curves.RESULTS, copy))
  with open(f'{train_dir}/run.json') as file:
    start = json.load(file)['starts'][-1]
  versions = start['versions']
  return {
    'name': f'--recipe {recipe}',
    'seed': seed,
    'command': f'python cifar10_train.py {" ".join(flags)}',
    'commit': commit(),
    'machine': f'{start["processor"]}, {start["compute_type"]}',
    'versions': f'Python {versions["python"]}, TensorFlow '
    f'{versions["tensorflow"]}',
    'seconds': seconds(lines),
    'examples_per_sec': round(
      statistics.median(map(float, re.findall(r'\(([\d.]+) examp', lines)))
    ),
    'batch_size': start['recipe']['batch_size'],
    'steps': start['recipe']['max_steps'],
    'precision': last(f'{where}/1')['precision'],
    'precision_ten_views': last(f'{where}/10')['precision'],
    'metrics': copy,
  }


def run(program, flags, log=None):
  """Run a program; exit if it fails or is stopped."""
  if status := subprograms.run(program, flags, log):
    print(f'{program} failed or was stopped. The same command continues.')
    sys.exit(status)


def commit():
  """Return the commit, with '-dirty' if files other than results differ.

  Without Git, this is the version of the suite.
  """
  try:
    name = git('rev-parse', '--short', 'HEAD')
    changed = git('status', '--porcelain', '--', '.', ':!results')
  except (OSError, subprocess.CalledProcessError):
    return f'version {cifar10_suite.__version__}'
  return f'{name}-dirty' if changed else name


def git(*arguments):
  command = ['git', '-C', ROOT, *arguments]
  return subprocess.check_output(
    command, stderr=subprocess.DEVNULL, text=True
  ).strip()


def seconds(lines):
  """Return how long training took, or None if it was interrupted."""
  units = {'h': 3600, 'min': 60, 's': 1}
  # Once it has ended, a repeated command says again that it resumes.
  match = re.match(r'(.*?)It took (.*?)\.', lines, re.DOTALL)
  if not match or 'Resuming from step' in match[1]:
    return None
  parts = re.findall(r'(\d+) (\w+)', match[2])
  return sum(int(number) * units[unit] for number, unit in parts)


def last(eval_dir):
  """Return the score of the last step."""
  with open(f'{eval_dir}/metrics.jsonl') as file:
    return max(map(json.loads, file), key=lambda record: record['step'])


def record(recipe, seed, entry):
  """Put the entry of a run into runs.json, in place of an earlier one."""
  with open(RUNS) as file:
    entries = json.load(file)
  same = {'name': f'--recipe {recipe}', 'seed': seed}
  entries = [it for it in entries if not same.items() <= it.items()]
  text = json.dumps([*entries, entry], indent=2) + '\n'
  files.write_whole(RUNS, text.encode())


def table():
  """Return a Markdown table of runs.json, with a row per recipe."""
  with open(RUNS) as file:
    entries = [entry for entry in json.load(file) if 'precision' in entry]
  lines = [
    '| recipe | seeds | steps | time | one view | ten views |',
    '|---|--:|--:|--:|--:|--:|',
  ]
  for name in dict.fromkeys(entry['name'] for entry in entries):
    own = [entry for entry in entries if entry['name'] == name]
    times = [entry['seconds'] for entry in own if entry['seconds']]
    time = f'{statistics.median(times) / 60:.1f} min' if times else ''
    lines.append(
      f'| `{name.split()[-1]}` | {len(own)} | {own[0]["steps"]:,} | {time} | '
      f'{spread([entry["precision"] for entry in own], 2)} | '
      f'{spread([entry["precision_ten_views"] for entry in own], 2)} |'
    )
  return '\n'.join(lines)


if __name__ == '__main__':
  main()
