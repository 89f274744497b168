"""Checkpoints on disk: which there are, and whether they fit a network."""

import contextlib
import glob
import hashlib
import os
import re
import shutil
from collections.abc import Iterator

import tensorflow.compat.v1 as tf


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


def _unreadable(path: str, error: Exception) -> CheckpointError:
  reason = getattr(error, 'message', None) or str(error) or repr(error)
  return CheckpointError(f'Cannot read {path}: {reason.splitlines()[0]}')
