"""Train and score several seeds, one after another.

  python examples/seeds.py --seeds 5 --dir runs/fast [flags of cifar10_train.py]

Seed 1 is in runs/fast/seed-1/train and runs/fast/seed-1/eval, and so on. After
an interruption, the same command skips finished seeds and resumes the other.
"""

import argparse
import contextlib
import json
import os
import shlex
import statistics
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

from cifar10_suite import loading

loading.load_tensorflow()

from cifar10_suite import files, runs, subprograms
from cifar10_suite.commands import same_command
from cifar10_suite.errors import UserError

# Flags of the programs that differ between seeds.
_OWN_FLAGS = ('--seed', '--train_dir', '--eval_dir', '--checkpoint_dir')

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main() -> None:
  parser = argparse.ArgumentParser(
    description='Train and score seeds 1 to N; other flags go to the trainer.',
    allow_abbrev=False,
  )
  parser.add_argument('--seeds', type=int, default=3, help='number of seeds')
  parser.add_argument(
    '--dir',
    default=os.path.join(_ROOT, 'runs', 'seeds'),
    help='directory for the results',
  )
  parser.add_argument('--data_dir', help='directory of the data set')
  arguments, flags = parser.parse_known_args()
  if arguments.seeds < 1:
    parser.error('--seeds must be at least 1')
  for flag in flags:
    if flag.partition('=')[0] in _OWN_FLAGS:
      parser.error(f'{flag} differs between seeds; use --seeds and --dir')
  if arguments.data_dir:
    flags.append(f'--data_dir={arguments.data_dir}')
  try:
    records = [
      train_and_score(seed, arguments, flags)
      for seed in range(1, arguments.seeds + 1)
    ]
  except UserError as error:  # a run.json that is damaged
    sys.exit(str(error))
  print(summary(records))


def train_and_score(
  seed: int, arguments: argparse.Namespace, flags: list[str]
) -> dict:
  """Train and score a seed unless that is done; return its record.

  Args:
    seed: number of the seed.
    arguments: dir and data_dir, from the command line.
    flags: flags of the trainer.
  """
  where = os.path.join(arguments.dir, f'seed-{seed}')
  train_dir, eval_dir = f'{where}/train', f'{where}/eval'
  command = ['cifar10_train.py', *flags]
  command += [f'--seed={seed}', f'--train_dir={train_dir}']
  run = runs.read(train_dir)
  if run and run['starts'][-1]['command'] != shlex.join(command):
    sys.exit(
      f'{train_dir} was trained by another command, '
      f'{run["starts"][-1]["command"]}. Choose another --dir.'
    )
  if record := find_record(train_dir, eval_dir):
    print(f'Seed {seed} is finished: {where}', flush=True)
    return record
  print(f'Seed {seed} of {arguments.seeds}: {where}', flush=True)
  evaluation = ['cifar10_eval.py', '--run_once']
  evaluation += [f'--checkpoint_dir={train_dir}', f'--eval_dir={eval_dir}']
  if arguments.data_dir:
    evaluation.append(f'--data_dir={arguments.data_dir}')
  for program, *its_flags in (command, evaluation):
    if status := subprograms.run(program, its_flags):
      if status > 128:  # by a signal
        again = same_command().capitalize()
        print(f'Stopped in seed {seed}. {again} continues.')
      sys.exit(status)
  record = find_record(train_dir, eval_dir)
  if not record:
    sys.exit(f'{eval_dir} has no score of the last step.')
  return record


def find_record(train_dir: str, eval_dir: str) -> dict | None:
  """Return the score of the last step of a run, or None if there is none.

  Args:
    train_dir: directory of the run.
    eval_dir: directory of its scores.
  """
  path = os.path.join(eval_dir, files.SCORES)
  run_json = runs.read(train_dir)
  if not run_json or not os.path.exists(path):
    return None
  records = []
  with open(path, errors='replace') as file:
    for line in file:
      with contextlib.suppress(ValueError):  # an incomplete line at the end
        records.append(json.loads(line))
  last = runs.last_step(run_json)
  found = [record for record in records if record['step'] >= last]
  return found[-1] if found else None


def summary(records: list[dict]) -> str:
  """Return lines with the mean, the standard deviation and each precision."""
  precisions = [record['precision'] for record in records]
  count = len(precisions)
  deviation = ''
  if count > 1:
    deviation = f', standard deviation {statistics.stdev(precisions):.4f}'
  return '\n'.join(
    [
      f'Precision of {count} {"seed" if count == 1 else "seeds"}: '
      f'mean {statistics.mean(precisions):.4f}{deviation}',
      *(
        f'  seed {seed}: {record["precision"]:.4f} at step {record["step"]}'
        for seed, record in enumerate(records, start=1)
      ),
    ]
  )


if __name__ == '__main__':
  main()
