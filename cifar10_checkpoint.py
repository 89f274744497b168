"""Checkpoints on disk, and the directory in which a trainer keeps its own."""

import contextlib
import glob
import hashlib
import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterator

import tensorflow.compat.v1 as tf

from cifar10_optimizers import MuonOptimizer

LOCK = '.lock'  # the file in a directory that one process has for itself

# What a trainer writes; a restart removes nothing else.
_OWN_FILES = re.compile(
  r'checkpoint|graph\.pbtxt|\.lock|events\.out\.tfevents\..*'
  r'|model\.ckpt-\d+\.(index|meta|data-\d+-of-\d+)'
  r'|(checkpoint|graph\.pbtxt)\.tmp.*|model\.ckpt-\d+(_temp|\..*tempstate).*'
)


class CheckpointError(Exception):
  """A checkpoint cannot be used; the message names it and tells why."""


class OtherNetworkError(CheckpointError):
  """A checkpoint can be read, but is not of the network that it is for."""


def saved_in(directory: str) -> list[str]:
  """Returns the paths of a directory's checkpoints, by their steps."""
  pattern = os.path.join(glob.escape(directory), 'model.ckpt-*.index')
  steps = {}
  for path in glob.glob(pattern):
    if match := re.search(r'-(\d+)\.index$', path):
      steps[path.removesuffix('.index')] = int(match[1])
  return sorted(steps, key=steps.get)


def latest(directory: str) -> str | None:
  """Returns the path of the checkpoint that a directory names as its latest."""
  state = tf.train.get_checkpoint_state(directory)
  return state.model_checkpoint_path if state else None


def newest_good(
  directory: str, variables: dict[str, tf.Variable]
) -> tuple[str, int] | None:
  """Finds the newest checkpoint that can be read, and says which cannot.

  Args:
    directory: where to look.
    variables: by the names that they are to have in the checkpoint.

  Returns:
    Its path and its global step; None if there is no checkpoint at all.

  Raises:
    CheckpointError: none can be read.
    OtherNetworkError: the newest one that can is of another network.
  """
  paths = saved_in(directory)
  named = latest(directory)
  if named is not None and named not in paths:
    paths.append(named)
  for path in reversed(paths):
    try:
      return path, check(path, variables)
    except OtherNetworkError:
      raise
    except CheckpointError as error:
      print(f'Skipped: {error}')
  if paths:
    raise CheckpointError(f'No checkpoint in {directory} can be read.')
  return None


def check(path: str, variables: dict[str, tf.Variable]) -> int:
  """Compares a checkpoint with a network.

  Args:
    path: the checkpoint's path, such as 'cifar10_train/model.ckpt-100'.
    variables: by the names that they are to have in the checkpoint.

  Returns:
    The global step of the checkpoint.

  Raises:
    CheckpointError: it cannot be read, all of these variables of it.
    OtherNetworkError: one is missing, or of another shape or type.
  """
  try:
    reader = tf.train.load_checkpoint(path)
    step = int(reader.get_tensor('global_step'))
    values = {
      name: reader.get_tensor(name)
      for name in variables
      if reader.has_tensor(name)
    }
  except (tf.errors.OpError, LookupError, ValueError) as error:
    raise _unreadable(path, error) from error
  for name, variable in variables.items():
    here = f'{variable.dtype.base_dtype.name} {variable.shape.as_list()}'
    there = 'missing'
    if name in values:
      there = f'{values[name].dtype.name} {list(values[name].shape)}'
    if here != there:
      raise OtherNetworkError(
        f'{path} is not of this network: {name} is {there} there, {here} here.'
      )
  return step


def digest(path: str) -> str:
  """Returns what tells a checkpoint from any other.

  That is the sha256 of its index, which holds a checksum of each variable.

  Raises:
    CheckpointError: the index cannot be read.
  """
  try:
    with open(f'{path}.index', 'rb') as file:
      return hashlib.sha256(file.read()).hexdigest()
  except OSError as error:
    raise _unreadable(path, error) from error


@contextlib.contextmanager
def copied(path: str, directory: str) -> Iterator[str]:
  """Yields the path of a copy, made in `directory` and removed at the end.

  Training may delete its checkpoints at any time. A copy is whole if the
  original, after it was made, still is.

  Raises:
    CheckpointError: a file cannot be read, or is gone.
  """
  folder = os.path.join(directory, 'scoring')
  shutil.rmtree(folder, ignore_errors=True)  # left by one that was killed
  os.makedirs(folder)
  try:
    for name in glob.glob(f'{glob.escape(path)}.*'):
      try:
        shutil.copy2(name, folder)
      except OSError as error:
        raise _unreadable(path, error) from error
    yield os.path.join(folder, os.path.basename(path))
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def find_start(train_dir: str) -> int:
  """Returns the step from which to go on, and says so if it is not the first.

  That is the step of the newest checkpoint that can be read, and the directory
  names it as its latest afterwards: the session restores that one.
  """
  variables = {variable.op.name: variable for variable in tf.global_variables()}
  _refuse_other_recipe(train_dir, set(variables))
  try:
    found = newest_good(train_dir, variables)
  except CheckpointError as error:
    sys.exit(
      f'{error} Choose another --train_dir, or begin afresh with --restart.'
    )
  if found is None:
    return 0
  path, step = found
  if path != latest(train_dir):
    older = itertools.takewhile(
      lambda other: other != path, saved_in(train_dir)
    )
    tf.train.update_checkpoint_state(
      train_dir,
      os.path.basename(path),
      [os.path.basename(other) for other in (*older, path)],
    )
  print(f'Resuming from step {step}')
  return step


def _refuse_other_recipe(train_dir: str, names: set[str]) -> None:
  """Ends the program if the latest checkpoint is of another optimizer."""
  path = latest(train_dir)
  if path is None:
    return
  try:
    there = {name for name, _ in tf.train.list_variables(path)}
  except (tf.errors.OpError, ValueError):
    return  # it cannot be read, and will not be
  slots = {n for n in names | there if n.endswith(f'/{MuonOptimizer.NAME}')}
  if slots & names != slots & there:
    sys.exit(
      f'{path} was trained with another --recipe: it '
      f'{"has" if slots & there else "lacks"} momenta. Go on with that one, '
      'choose another --train_dir, or begin afresh with --restart.'
    )


def refuse_to_remove_others(train_dir: str) -> None:
  """Ends the program if a directory holds what training did not write."""
  others = [
    name for name in os.listdir(train_dir) if not _OWN_FILES.fullmatch(name)
  ]
  if others:
    sys.exit(
      f'--restart removed nothing: {train_dir} also holds '
      f'{", ".join(sorted(others)[:5])}, not written by training. Move that '
      'away, or choose another --train_dir.'
    )


def remove_earlier_run(train_dir: str) -> None:
  """Removes what a trainer wrote, or nothing if anything else is there."""
  refuse_to_remove_others(train_dir)
  for name in os.listdir(train_dir):
    path = os.path.join(train_dir, name)
    if name == LOCK:  # ours, now
      continue
    if os.path.isdir(path):
      shutil.rmtree(path)
    else:
      os.remove(path)


def step_of(checkpoint: str) -> int:
  return int(tf.train.load_variable(checkpoint, 'global_step'))


def _unreadable(path: str, error: Exception) -> CheckpointError:
  reason = getattr(error, 'message', None) or str(error) or repr(error)
  return CheckpointError(f'Cannot read {path}: {reason.splitlines()[0]}')
