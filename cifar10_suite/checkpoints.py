"""Checkpoints on disk, and the directory in which a trainer keeps its own."""

import contextlib
import glob
import hashlib
import itertools
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator

import tensorflow.compat.v1 as tf

from cifar10_suite import files
from cifar10_suite.errors import UserError
from cifar10_suite.optimizers import MuonOptimizer

_STATE = 'checkpoint'  # the file that names a directory's checkpoints
_PART = re.compile(r'\.(index|meta|data-\d+-of-\d+)$')  # a file's extension
_COPY = '.scoring-'  # how the name of a copy's directory begins


class CheckpointError(UserError):
  """A checkpoint cannot be used; the message names it and says why."""


class OtherNetworkError(CheckpointError):
  """A checkpoint can be read, but is not of the network that it is for."""


def saved_in(directory: str) -> list[str]:
  """Returns the paths of a directory's checkpoints, by their steps."""
  pattern = os.path.join(glob.escape(directory), 'model.ckpt-*.index')
  paths = [path.removesuffix('.index') for path in glob.glob(pattern)]
  return sorted(
    (path for path in paths if re.search(r'-\d+$', path)), key=_step_in_name
  )


def files_of(checkpoint: str) -> list[str]:
  """Returns the paths of the files that make up a checkpoint."""
  return [
    path
    for path in glob.glob(f'{glob.escape(checkpoint)}.*')
    if _PART.fullmatch(path.removeprefix(checkpoint))
  ]


def latest(directory: str) -> str | None:
  """Returns the path of the checkpoint that a directory names as its latest.

  Only the name counts. Its place is this directory, wherever the state file
  says: that one may be a copy, or the directory may have been moved.
  """
  named = _named_by_state(directory)
  if named is None:
    return None
  path = os.path.join(directory, os.path.basename(named))
  return path if os.path.exists(f'{path}.index') else None


def _named_by_state(directory: str) -> str | None:
  """Returns what a directory's state file names as latest, word for word."""
  try:
    state = tf.train.get_checkpoint_state(directory)
  except (tf.errors.OpError, ValueError):  # empty, or not even text
    return None
  return state.model_checkpoint_path if state else None


def _step_in_name(path: str) -> float:
  """Returns the step at the end of a checkpoint's name, or infinity."""
  match = re.search(r'-(\d+)$', path)
  return int(match[1]) if match else math.inf


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
  if files.is_pattern(directory):
    raise CheckpointError(
      f'{directory} has one of the characters * ? [ \\ in its name, which '
      'TensorFlow takes for a pattern. Name the directory otherwise.'
    )
  paths = saved_in(directory)
  named = latest(directory)
  if named is not None and named not in paths:
    paths.append(named)
  for path in sorted(paths, key=_step_in_name, reverse=True):
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
  for left in glob.glob(os.path.join(glob.escape(directory), f'{_COPY}*')):
    if all(_PART.search(name) for name in os.listdir(left)):
      shutil.rmtree(left, ignore_errors=True)  # by one that was killed
  with tempfile.TemporaryDirectory(prefix=_COPY, dir=directory) as folder:
    for name in files_of(path):
      try:
        shutil.copy2(name, folder)
      except OSError as error:
        raise _unreadable(path, error) from error
    yield os.path.join(folder, os.path.basename(path))


def find_start(train_dir: str, keep: int) -> int:
  """Returns the step from which to resume, and says so if it is not the first.

  That is the step of the newest readable checkpoint. Afterwards the state file
  names it as the latest, and nothing outside of the directory: the session
  restores that one, and its saver deletes only what is named there.

  Args:
    train_dir: where training saves.
    keep: number of checkpoints to leave there, the newest ones; 0 for all.

  Raises:
    UserError: there are checkpoints, but none that can be used.
  """
  variables = {variable.op.name: variable for variable in tf.global_variables()}
  _refuse_other_recipe(train_dir, set(variables))
  try:
    found = newest_good(train_dir, variables)
  except CheckpointError as error:
    raise UserError(
      f'{error} Choose another --train_dir, or begin afresh with --restart.'
    ) from error
  if found is None:
    if named := _named_by_state(train_dir):
      print(f'{train_dir} names {named} as its latest, but has no checkpoint.')
      os.remove(os.path.join(train_dir, _STATE))
    return 0
  path, step = found
  own = [
    other
    for other in saved_in(train_dir)
    if _step_in_name(other) < step and _is_of_network(other, set(variables))
  ]
  surplus = own[: max(len(own) + 1 - keep, 0)] if keep else []
  for name in itertools.chain(*map(files_of, surplus)):
    os.remove(name)
  write_state(train_dir, [*own[len(surplus) :], path])
  print(f'Resuming from step {step}')
  return step


def write_state(directory: str, checkpoints: list[str]) -> None:
  """Names a directory's checkpoints, relative to it, in its state file.

  Args:
    directory: where they are.
    checkpoints: their paths or names, the latest one last.
  """
  names = [os.path.basename(path) for path in checkpoints]
  # Told of a relative directory, TensorFlow would take the names to be relative
  # to the working directory.
  tf.train.update_checkpoint_state(os.path.abspath(directory), names[-1], names)


def _is_of_network(path: str, variables: set[str]) -> bool:
  """Returns whether a checkpoint's index names all of the variables."""
  try:
    return variables <= {name for name, _ in tf.train.list_variables(path)}
  except (tf.errors.OpError, ValueError):
    return False


def _refuse_other_recipe(train_dir: str, names: set[str]) -> None:
  """Refuses to resume if the latest checkpoint is of another optimizer."""
  path = latest(train_dir)
  if path is None:
    return
  try:
    there = {name for name, _ in tf.train.list_variables(path)}
  except (tf.errors.OpError, ValueError):
    return  # it cannot be read, and will not be
  slots = {n for n in names | there if n.endswith(f'/{MuonOptimizer.NAME}')}
  if slots & names != slots & there:
    raise UserError(
      f'{path} was trained with another --recipe: it '
      f'{"has" if slots & there else "lacks"} momenta. Resume with that one, '
      'choose another --train_dir, or begin afresh with --restart.'
    )


def step_of(checkpoint: str) -> int:
  return int(tf.train.load_variable(checkpoint, 'global_step'))


def _unreadable(path: str, error: Exception) -> CheckpointError:
  reason = getattr(error, 'message', None) or str(error) or repr(error)
  return CheckpointError(f'Cannot read {path}: {reason.splitlines()[0]}')
