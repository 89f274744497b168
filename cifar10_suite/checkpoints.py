"""Checkpoint files: finding, checking, copying and resuming from them."""

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

import numpy as np
import tensorflow.compat.v1 as tf

from cifar10_suite import files, runs
from cifar10_suite.errors import UserError
from cifar10_suite.optimizers import MuonOptimizer

_STATE = 'checkpoint'  # state file: lists a directory's checkpoints
_PART = re.compile(r'\.(index|meta|data-\d+-of-\d+)$')  # file extensions
_COPY = '.scoring-'  # prefix of directories with copies


class CheckpointError(UserError):
  """Unusable checkpoint; the message names it and the reason."""


class OtherNetworkError(CheckpointError):
  """Readable checkpoint of a different network."""


def saved_in(directory: str) -> list[str]:
  """Return the paths of a directory's checkpoints, sorted by step."""
  pattern = os.path.join(glob.escape(directory), 'model.ckpt-*.index')
  paths = [path.removesuffix('.index') for path in glob.glob(pattern)]
  return sorted(
    (path for path in paths if re.search(r'-\d+$', path)), key=step_in_name
  )


def named(path: str) -> str | None:
  """Return the checkpoint that a path names, or None for a directory.

  Args:
    path: a directory, or the path of a checkpoint such as
      'cifar10_train/model.ckpt-100', or of one of its files.

  Raises:
    CheckpointError: if the path names a checkpoint that does not exist, or
      another file.
  """
  if os.path.isdir(path):
    return None
  given, path = path, _PART.sub('', path)
  if os.path.isfile(f'{path}.index'):
    return path
  directory, name = os.path.split(path)
  if not re.fullmatch(r'model\.ckpt-\d+', name):
    if os.path.isfile(given):
      raise CheckpointError(
        f'{given} is not a checkpoint. Name the directory of a run, or a '
        'checkpoint such as cifar10_train/model.ckpt-1000.'
      )
    return None
  steps = [f'{step_in_name(other)}' for other in saved_in(directory)]
  there = f'It has steps {", ".join(steps[-5:])}.' if steps else 'It has none.'
  raise CheckpointError(
    f'There is no checkpoint {name} in {directory or "."}. {there}'
  )


def directory_of(path: str) -> str:
  """Return the directory that a path names, or that of its checkpoint."""
  checkpoint = named(path)
  return os.path.dirname(checkpoint) or '.' if checkpoint else path


def files_of(checkpoint: str) -> list[str]:
  """Return the paths of the files that make up a checkpoint."""
  return [
    path
    for path in glob.glob(f'{glob.escape(checkpoint)}.*')
    if _PART.fullmatch(path.removeprefix(checkpoint))
  ]


def files_with_run(checkpoint: str) -> list[str]:
  """Return the paths of a checkpoint's files and of the run.json beside it."""
  run = os.path.join(os.path.dirname(checkpoint), runs.NAME)
  return files_of(checkpoint) + ([run] if os.path.exists(run) else [])


def names_in(checkpoint: str) -> set[str] | None:
  """Return the names of a checkpoint's variables; None if it is unreadable."""
  try:
    return {name for name, _ in tf.train.list_variables(checkpoint)}
  except (tf.errors.OpError, ValueError):
    return None


def latest(directory: str) -> str | None:
  """Return the path of the latest checkpoint according to the state file.

  Only the file name counts, and is looked up in `directory`: the path in the
  state file is outdated if the directory was copied or moved.
  """
  recorded = _named_by_state(directory)
  if recorded is None:
    return None
  path = os.path.join(directory, os.path.basename(recorded))
  return path if os.path.exists(f'{path}.index') else None


def _named_by_state(directory: str) -> str | None:
  """Return the latest checkpoint, exactly as the state file names it."""
  try:
    state = tf.train.get_checkpoint_state(directory)
  except (tf.errors.OpError, ValueError):  # empty, or not text
    return None
  return state.model_checkpoint_path if state else None


def step_in_name(path: str) -> float:
  """Return the step in a checkpoint's name, or infinity if it has none."""
  match = re.search(r'-(\d+)$', path)
  return int(match[1]) if match else math.inf


def ends_run(path: str) -> bool:
  """Return whether a checkpoint is of the step at which its training ends.

  Without run.json, as in the tutorial's directories, this is unknown.
  """
  run = runs.read(os.path.dirname(path))
  return run is not None and step_in_name(path) >= runs.last_step(run)


def newest_good(
  directory: str, variables: dict[str, tf.Variable]
) -> tuple[str, int] | None:
  """Find the newest readable checkpoint, and report those it skips.

  Args:
    directory: directory to search, or the path of the checkpoint to use.
    variables: the variables to restore, by checkpoint name.

  Returns:
    The path and global step of the checkpoint; None if there are no
    checkpoints.

  Raises:
    CheckpointError: if no checkpoint is readable.
    OtherNetworkError: if the newest readable one is of a different network.
  """
  if path := named(directory):
    return path, check(path, variables)
  refuse_pattern(directory)
  paths = saved_in(directory)
  newest = latest(directory)
  if newest is not None and newest not in paths:
    paths.append(newest)
  for path in sorted(paths, key=step_in_name, reverse=True):
    try:
      return path, check(path, variables)
    except OtherNetworkError:
      raise
    except CheckpointError as error:
      print(f'Skipped: {error}')
  if paths:
    raise CheckpointError(f'No checkpoint in {directory} can be read.')
  return None


def refuse_pattern(path: str) -> None:
  """Refuse a path that TensorFlow would treat as a pattern.

  Raises:
    CheckpointError: if it has a character of patterns.
  """
  files.refuse_pattern(path, 'Rename the directory.', CheckpointError)


def check(path: str, variables: dict[str, tf.Variable]) -> int:
  """Check that a checkpoint is readable and matches the network.

  Args:
    path: path of the checkpoint, such as 'cifar10_train/model.ckpt-100'.
    variables: the variables to restore, by checkpoint name.

  Returns:
    The global step of the checkpoint; without one, that in its name.

  Raises:
    CheckpointError: if the checkpoint, or one of the variables, is unreadable,
      or if a variable is not finite.
    OtherNetworkError: if a variable is missing or has a different shape or
      dtype.
  """
  with reading(path):
    reader = tf.train.load_checkpoint(path)
    # The tutorial's first version did not name it.
    step = step_in_name(path)
    if step == math.inf or reader.has_tensor('global_step'):
      step = int(reader.get_tensor('global_step'))
    values = {
      name: reader.get_tensor(name)
      for name in variables
      if reader.has_tensor(name)
    }
  for name, variable in variables.items():
    here = f'{variable.dtype.base_dtype.name} {variable.shape.as_list()}'
    there = 'missing'
    if name in values:
      there = f'{values[name].dtype.name} {list(values[name].shape)}'
    if here != there:
      raise OtherNetworkError(
        f'{path} does not match this network: {name} is {there} in the '
        f'checkpoint, {here} in the network.'
      )
  refuse_not_finite(path, values)
  return int(step)


def refuse_not_finite(path: str, values: dict[str, np.ndarray]) -> None:
  """Refuse a checkpoint of a training that diverged, as others may save one.

  Args:
    path: path of the checkpoint.
    values: the values of its variables, by name.

  Raises:
    CheckpointError: if one is NaN or infinite.
  """
  for name, value in values.items():
    if not np.isfinite(value).all():
      raise CheckpointError(
        f'{path} is of a training that diverged: {name} is not finite.'
      )


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
  """Raise CheckpointError for what TensorFlow raises if it cannot read."""
  try:
    yield
  except (tf.errors.OpError, LookupError, ValueError) as error:
    raise _unreadable(path, error) from error


def digest(path: str) -> str:
  """Return a digest that identifies the contents of a checkpoint.

  This is the sha256 of the index, which has a checksum of each variable.

  Raises:
    CheckpointError: if the index is unreadable.
  """
  try:
    with open(f'{path}.index', 'rb') as file:
      return hashlib.sha256(file.read()).hexdigest()
  except OSError as error:
    raise _unreadable(path, error) from error


@contextlib.contextmanager
def copied(path: str, directory: str) -> Iterator[str]:
  """Yield the path of a temporary copy of a checkpoint in `directory`.

  The run.json next to it is copied, too.

  The trainer may delete a checkpoint at any time. If the original is still
  complete after copying, so is the copy.

  Raises:
    CheckpointError: if a file is unreadable or was deleted.
    UserError: if `directory` is not writable, or was deleted.
  """
  for left in glob.glob(os.path.join(glob.escape(directory), f'{_COPY}*')):
    if all(
      _PART.search(name) or name == runs.NAME for name in os.listdir(left)
    ):
      shutil.rmtree(left, ignore_errors=True)  # left by a killed process
  try:
    temporary = tempfile.TemporaryDirectory(prefix=_COPY, dir=directory)
  except OSError as error:
    if files.is_full(error):
      raise
    raise UserError(
      f'Cannot write to {directory}: {error.strerror}. If it was removed, '
      'start the evaluation again.'
    ) from error
  with temporary as folder:
    for name in files_with_run(path):
      try:
        shutil.copy2(name, folder)
      except OSError as error:
        if files.is_full(error):  # which is not the checkpoint's fault
          raise
        raise _unreadable(path, error) from error
    yield os.path.join(folder, os.path.basename(path))


def find_start(train_dir: str, keep: int, max_steps: int) -> int | None:
  """Prepare a directory for resuming; return the step to start from.

  This is the step of the newest readable checkpoint; None without checkpoints.
  The state file is rewritten to name that checkpoint as the latest, and none
  outside of the directory: the session restores the latest checkpoint, and its
  saver deletes only checkpoints that the state file names.

  Args:
    train_dir: directory of the checkpoints.
    keep: number of newest checkpoints to keep; 0 keeps all, as does a run that
      has reached its last step.
    max_steps: the last step.

  Raises:
    UserError: if there are checkpoints, but no usable one.
  """
  variables = {variable.op.name: variable for variable in tf.global_variables()}
  _refuse_other_recipe(train_dir, set(variables))
  try:
    found = newest_good(train_dir, variables)
  except CheckpointError as error:
    raise UserError(
      f'{error} Choose another --train_dir, or start over with --restart.'
    ) from error
  if found is None:
    if gone := _named_by_state(train_dir):
      print(f'{train_dir} has no checkpoint; its state file names {gone}.')
      os.remove(os.path.join(train_dir, _STATE))
    return None
  path, step = found
  own = [
    other
    for other in saved_in(train_dir)
    if step_in_name(other) < step
    and set(variables) <= (names_in(other) or set())
  ]
  surplus = own[: max(len(own) + 1 - keep, 0)]
  if not keep or step >= max_steps:
    surplus = []
  for name in itertools.chain(*map(files_of, surplus)):
    os.remove(name)
  if surplus:
    number = f'{len(surplus)} older checkpoint{"s" * (len(surplus) > 1)}'
    print(f'Deleted {number}, to keep --keep_checkpoint_max={keep}.')
  write_state(train_dir, [*own[len(surplus) :], path])
  return step


def write_state(directory: str, checkpoints: list[str]) -> None:
  """Write a state file that names checkpoints relative to its directory.

  Args:
    directory: directory of the checkpoints.
    checkpoints: paths or names of the checkpoints, the latest one last.
  """
  names = [os.path.basename(path) for path in checkpoints]
  # If the directory is relative, TensorFlow resolves the names against the
  # working directory.
  tf.train.update_checkpoint_state(os.path.abspath(directory), names[-1], names)


def _refuse_other_recipe(train_dir: str, names: set[str]) -> None:
  """Refuse to resume if the newest checkpoint used a different optimizer."""
  for path in [*reversed(saved_in(train_dir)), latest(train_dir)]:
    there = names_in(path) if path else None
    if there is not None:
      break
  else:
    return  # none is readable
  slots = {n for n in names | there if n.endswith(f'/{MuonOptimizer.NAME}')}
  if slots & names != slots & there:
    run = runs.read(train_dir)
    recipe = f', {run["starts"][-1]["recipe"]["name"]}' if run else ''
    raise UserError(
      f'{path} was trained with another --recipe{recipe}: it '
      f'{"has" if slots & there else "lacks"} momenta. Use that recipe, '
      'choose another --train_dir (with make, RUN=NAME), or start over with '
      '--restart.'
    )


def step_of(checkpoint: str) -> int:
  """Return the global step in a checkpoint."""
  return int(tf.train.load_variable(checkpoint, 'global_step'))


def _unreadable(path: str, error: Exception) -> CheckpointError:
  reason = getattr(error, 'message', None) or str(error) or repr(error)
  return CheckpointError(f'Cannot read {path}: {reason.splitlines()[0]}')
