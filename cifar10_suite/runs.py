"""`run.json` in a `--train_dir`: what a training run says of itself.

  {"program": "cifar10_suite",
   "class_names": ["airplane", ...],
   "starts": [{"step": 0, "command": "cifar10_train.py --max_steps=5000",
               "recipe": {"name": "tutorial", "batch_size": 128, ...}, ...}]}

The file is written when training starts; each resume appends to `starts`. If
training ends before `max_steps` by score, its start gets a `stopped_at`.
"""

import contextlib
import dataclasses
import datetime
import glob
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence

import numpy as np
import tensorflow.compat.v1 as tf

import cifar10_suite
from cifar10_suite import dataset, files, processor
from cifar10_suite.errors import UserError
from cifar10_suite.recipes import Recipe

NAME = 'run.json'
_PROGRAM = 'cifar10_suite'  # identifies the file as ours
# In each start and in its recipe, in all versions of the suite.
_KEYS = {'step', 'time', 'command', 'recipe', 'versions'}
_RECIPE_KEYS = {'name', 'max_steps'}


def describe(recipe: Recipe, dtype: tf.DType) -> dict[str, object]:
  """Describe the start of a run: what, how, where, and with which versions.

  Args:
    recipe: all hyperparameters.
    dtype: compute type.
  """
  return {
    'time': datetime.datetime.now().isoformat(timespec='seconds'),
    'command': command(),
    'recipe': dataclasses.asdict(recipe),
    'compute_type': dtype.name,
    'processor': processor.describe(),
    'gpus': len(tf.config.list_physical_devices('GPU')),
    'versions': {
      'cifar10_suite': cifar10_suite.__version__,
      'python': platform.python_version(),
      'tensorflow': tf.__version__,
      'numpy': np.__version__,
    },
  }


def command() -> str:
  """Return the command line of this program, without the directory."""
  return shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])


def record_start(
  train_dir: str,
  class_names: tuple[str, ...],
  step: int | None,
  description: dict[str, object],
) -> None:
  """Write run.json, or append to it if training resumes.

  Args:
    train_dir: directory of the run.
    class_names: classes of the data set.
    step: step at which training resumes; None for a new run.
    description: from `describe`, and more.
  """
  os.makedirs(train_dir, exist_ok=True)
  before = None if step is None else read(train_dir)
  starts = before['starts'] if before else []
  _write(train_dir, class_names, [*starts, {'step': step or 0, **description}])


def record_stop(train_dir: str, step: int) -> None:
  """Record that training has ended before its last step.

  Args:
    train_dir: directory of the run.
    step: step at which training has ended.
  """
  run = read(train_dir)
  if run:
    *earlier, start = run['starts']
    _write(
      train_dir, run['class_names'], [*earlier, {**start, 'stopped_at': step}]
    )


def _write(
  train_dir: str, class_names: Sequence[str], starts: list[dict]
) -> None:
  content = {
    'program': _PROGRAM,
    'class_names': list(class_names),
    'starts': starts,
  }
  files.write_whole(
    os.path.join(train_dir, NAME),
    json.dumps(content, indent=1, ensure_ascii=False).encode() + b'\n',
  )


def hyperparameters(run: dict | None) -> dict[str, object]:
  """Return the hyperparameters of a run's last start, by name.

  These are the recipe and, if known, seed, compute type, the number of workers
  and towers, and more.

  Args:
    run: content of its run.json, from `read`.
  """
  if not run:
    return {}
  start = run['starts'][-1]
  recipe = dict(start['recipe'])
  names = (
    'seed',
    'compute_type',
    'workers',
    'towers',
    'scale_learning_rate',
    'hold_out',
    'init_from',
  )
  values = {
    'recipe': recipe.pop('name'),
    **recipe,
    **{name: start.get(name) for name in names},
  }
  return {name: it for name, it in values.items() if it is not None}


def started(run: dict | None) -> str | None:
  """Return when a run, from `read`, started; None without run.json."""
  return run['starts'][0].get('time') if run else None


def hold_out(run: dict | None) -> int:
  """Return the number of held-out images of a run, from `read`."""
  return run['starts'][-1].get('hold_out', 0) if run else 0


def activation_scale(directory: str) -> float:
  """Return the `activation_scale` of the run in a directory.

  It is 1 for runs without run.json, and for those of versions before 1.2.
  """
  run = read(directory)
  return (
    run['starts'][-1]['recipe'].get('activation_scale', 1.0) if run else 1.0
  )


def changes(run: dict, start: dict[str, object]) -> list[str]:
  """Say how the hyperparameters of a start differ from those of the last one.

  Args:
    run: content of run.json, from `read`.
    start: the new start, as for `record_start`; its `max_steps`, `seed` and
      `init_from` may differ.

  Returns:
    Such as ['batch_size 64 (before: 128)']; of another recipe, only the name.
  """
  before = hyperparameters(run)
  now = hyperparameters(json.loads(json.dumps({'starts': [start]})))
  if before['recipe'] != now['recipe']:
    return [f'recipe {now["recipe"]} (before: {before["recipe"]})']
  return [
    f'{name} {value} (before: {before[name]})'
    for name, value in now.items()
    if name not in ('max_steps', 'seed', 'init_from')
    and before.get(name, value) != value
  ]


def last_step(run: dict) -> int:
  """Return the step at which a run, from `read`, ends or has ended."""
  start = run['starts'][-1]
  return start.get('stopped_at', start['recipe']['max_steps'])


def training_loss(train_dir: str) -> list[tuple[int, float]]:
  """Return the cross entropy of training from the event files, by step.

  Args:
    train_dir: directory of the run; without event files, the list is empty.
  """
  points: list[tuple[int, float]] = []
  pattern = os.path.join(glob.escape(train_dir), 'events.out.tfevents.*')
  for path in sorted(glob.glob(pattern)):
    with contextlib.suppress(tf.errors.OpError):  # incomplete
      for event in tf.train.summary_iterator(path):
        for value in event.summary.value:
          if value.tag == 'cross_entropy':
            # A resumed run repeats the steps since its last checkpoint.
            while points and points[-1][0] >= event.step:
              points.pop()
            points.append((event.step, value.simple_value))
  return points


def class_names(directory: str) -> tuple[str, ...]:
  """Return the classes of the run in a directory.

  Without run.json, as in the tutorial's directories, these are CIFAR-10's.
  """
  run = read(directory)
  return tuple(run['class_names'] if run else dataset.CLASS_NAMES)


def refuse_other_classes(
  directory: str,
  class_names: tuple[str, ...],
  remedy: str = 'Name the right one with --data_dir.',
) -> None:
  """Refuse a run of other classes.

  Args:
    directory: directory of the run; without run.json, nothing is refused.
    class_names: the expected classes.
    remedy: last sentence of the error message.

  Raises:
    UserError: if the run has other classes.
  """
  run = read(directory)
  if run and tuple(run['class_names']) != class_names:
    raise UserError(
      f'{directory} was trained on other classes: '
      f'{dataset.listed(run["class_names"])}. The data set has '
      f'{dataset.listed(class_names)}. {remedy}'
    )


def refuse_download_for_other_classes(directory: str, batches_dir: str) -> None:
  """Refuse a run of other classes than CIFAR-10's if that will be downloaded.

  Raises:
    UserError: if `batches_dir` is missing, and the run has other classes.
  """
  if not os.path.lexists(batches_dir):
    refuse_other_classes(directory, dataset.CIFAR10.class_names)


def is_ours(path: str) -> bool:
  """Return whether a file is a run.json of this suite."""
  try:
    return read(os.path.dirname(path)) is not None
  except UserError:
    return False


def read(directory: str) -> dict | None:
  """Return the content of a directory's run.json, or None if there is none.

  Raises:
    UserError: if the file is unreadable, not ours, or damaged.
  """
  path = os.path.join(directory, NAME)
  try:
    with open(path, encoding='utf-8') as file:
      run = json.load(file)
    if (
      run['program'] == _PROGRAM
      and len(run['class_names']) > 1
      and all(isinstance(name, str) for name in run['class_names'])
      and run['starts']
      and all(start.keys() >= _KEYS for start in run['starts'])
      and all(it['recipe'].keys() >= _RECIPE_KEYS for it in run['starts'])
    ):
      return run
  except FileNotFoundError:
    return None
  except OSError as error:
    raise UserError(f'Cannot read {path}: {error.strerror}.') from error
  except (ValueError, KeyError, TypeError, AttributeError):
    pass
  raise UserError(
    f'{path} does not describe a training run. Move it, or restore it.'
  )
