"""CIFAR-10's data files on disk: their state, and how to replace them."""

import enum
import glob
import hashlib
import itertools
import os
import re
import shutil
import tempfile
from typing import IO

from cifar10_suite import cifar100, commands, dataset
from cifar10_suite.errors import UserError

CHUNK_BYTES = 1 << 20
_SCRATCH_PREFIX = '.cifar10-download-'  # names directories of unfinished files


class DownloadError(UserError):
  """Failure to download or store CIFAR-10; the message suggests a remedy."""


class State(enum.Enum):
  """State of a data file."""

  RIGHT = enum.auto()  # CIFAR-10's file
  MISSING = enum.auto()
  OTHER = enum.auto()  # whole records, but not CIFAR-10's: the user's own data
  DAMAGED = enum.auto()  # anything else


def inspect(batches_dir: str) -> dict[str, State]:
  """Return the state of each data file by name.

  Besides CIFAR-10's files, these are training files of higher numbers.
  """
  states = {
    name: _state(os.path.join(batches_dir, name), digest)
    for name, digest in dataset.FILE_SHA256.items()
  }
  for number in dataset.training_file_numbers(batches_dir):
    states.setdefault(f'data_batch_{number}.bin', State.OTHER)
  return states


def _state(path: str, right_digest: str) -> State:
  if not os.path.lexists(path):
    return State.MISSING
  digest = sha256(path)
  if digest == right_digest:
    return State.RIGHT
  size = os.path.getsize(path) if digest else 0
  if size > 0 and size % dataset.RECORD_BYTES == 0:
    return State.OTHER
  return State.DAMAGED


def refuse_inner_directory(data_dir: str) -> None:
  """Refuse a `--data_dir` that has the data files in it, not in a folder.

  Raises:
    DownloadError: if it has; another copy would go to a folder beside them.
  """
  inner = os.path.join(data_dir, dataset.BATCHES_DIR)
  if os.path.lexists(inner):
    return
  there = [
    name
    for name in dataset.FILE_SHA256
    if os.path.lexists(os.path.join(data_dir, name))
  ]
  if not there:
    return
  path = os.path.abspath(data_dir)
  if os.path.basename(path) == dataset.BATCHES_DIR:
    remedy = f'--data_dir is the directory above: {os.path.dirname(path)}'
  else:
    remedy = f'--data_dir is a directory with these files in {inner}'
  raise DownloadError(f'{data_dir} has {there[0]} in it, but {remedy}')


def refuse_other_formats(batches_dir: str, states: dict[str, State]) -> None:
  """Refuse files of another format, and what is left of another data set.

  Args:
    batches_dir: directory of the data files.
    states: their states, from `inspect`.

  Raises:
    DownloadError: if there is such a file; the message says what to do.
  """
  names = os.path.join(batches_dir, dataset.CLASS_NAMES_FILE)
  is_other = os.path.lexists(names) and not has_class_names(batches_dir)
  all_missing = set(states.values()) == {State.MISSING}
  for name, state in states.items():
    path = os.path.join(batches_dir, name)
    if is_other and (all_missing or state is State.DAMAGED):
      problem = 'missing' if all_missing else 'damaged'
      data_dir = os.path.dirname(batches_dir) or '.'
      download = commands.of('download.py', '--data_dir', data_dir, '--repair')
      raise DownloadError(
        f"{path} is {problem}, and {names} does not have CIFAR-10's classes. "
        'If this is a data set of yours, make it again, for example with '
        f'cifar10_convert.py. To get CIFAR-10 here: {download}'
      )
    if state is not State.DAMAGED or not os.path.isfile(path):
      continue
    with open(path, 'rb') as file:
      is_pickle = re.match(rb'\x80[\x02-\x05]', file.read(2))
    if is_pickle:
      raise DownloadError(
        f'{path} is a pickle of the Python version. The binary version is '
        'needed: move this file away, and run this again.'
      )
    if cifar100.is_data_file(path):
      convert = commands.of(
        'cifar10_convert.py', 'cifar-100-binary.tar.gz', '--data_dir', 'my_data'
      )
      raise DownloadError(
        f"{path} has CIFAR-100's records of 3,074 bytes. Move it away, and "
        f'convert the archive: {convert}'
      )


def sha256(path: str) -> str | None:
  """Return the hexadecimal sha256 of a file, or None if it is not a file."""
  if not os.path.isfile(path):
    return None
  digest = hashlib.sha256()
  with open(path, 'rb') as file:
    while chunk := file.read(CHUNK_BYTES):
      digest.update(chunk)
  return digest.hexdigest()


def write(batches_dir: str, name: str, content: IO[bytes]) -> None:
  """Write a data file atomically after verifying its digest.

  Args:
    batches_dir: directory of the data files.
    name: name of the file.
    content: its content.

  Raises:
    DownloadError: if that is not the content of CIFAR-10's file.
  """
  with scratch_directory(batches_dir) as scratch:
    new = os.path.join(scratch, name)
    with open(new, 'wb') as file:
      shutil.copyfileobj(content, file, CHUNK_BYTES)
    if sha256(new) != dataset.FILE_SHA256[name]:
      raise DownloadError(
        f'{name}: its sha256 is not {dataset.FILE_SHA256[name]}'
      )
    put_in_place(new, os.path.join(batches_dir, name))


def wants_class_names(
  batches_dir: str, states: dict[str, State], repair: bool
) -> bool:
  """Return whether to write CIFAR-10's class names.

  They are written if they are missing beside CIFAR-10's files or, with
  `repair`, if they differ.
  """
  if repair:
    return not has_class_names(batches_dir)
  path = os.path.join(batches_dir, dataset.CLASS_NAMES_FILE)
  return State.OTHER not in states.values() and not os.path.lexists(path)


def write_class_names(batches_dir: str) -> None:
  """Write CIFAR-10's class names."""
  final = os.path.join(batches_dir, dataset.CLASS_NAMES_FILE)
  with scratch_directory(batches_dir) as scratch:
    new = os.path.join(scratch, dataset.CLASS_NAMES_FILE)
    with open(new, 'w', encoding='ascii') as file:
      file.writelines(f'{name}\n' for name in dataset.CLASS_NAMES)
    put_in_place(new, final)


def has_class_names(batches_dir: str) -> bool:
  """Return whether the class names are CIFAR-10's, ignoring white space."""
  path = os.path.join(batches_dir, dataset.CLASS_NAMES_FILE)
  if not os.path.isfile(path):
    return False
  with open(path, 'rb') as file:
    names = file.read().decode('utf-8-sig', 'replace').split()
  return names == dataset.CLASS_NAMES


def scratch_directory(batches_dir: str) -> tempfile.TemporaryDirectory:
  """Create a directory for unfinished files on the data's file system."""
  return tempfile.TemporaryDirectory(prefix=_SCRATCH_PREFIX, dir=batches_dir)


def remove_leftovers(batches_dir: str) -> None:
  """Remove the scratch directories of killed runs."""
  pattern = os.path.join(glob.escape(batches_dir), f'{_SCRATCH_PREFIX}*')
  for directory in glob.glob(pattern):
    shutil.rmtree(directory, ignore_errors=True)


def put_in_place(new: str, final: str) -> None:
  """Rename a finished file, `new`, to `final`.

  An existing file is kept under a `.bak` name. If the file system supports hard
  links, it also stays at `final` until the new file replaces it.
  """
  if not os.path.lexists(final):
    os.rename(new, final)
    return
  kept = _backup_of(final)
  try:
    os.link(final, kept, follow_symlinks=False)
  except OSError:  # a directory, or a file system without hard links
    os.rename(final, kept)
  os.replace(new, final)
  print(f'Replaced {final}; the old file is kept as {kept}.')


def set_aside(path: str) -> None:
  """Rename a file to a `.bak` name."""
  kept = _backup_of(path)
  os.rename(path, kept)
  print(f'{path} is not part of CIFAR-10; it is kept as {kept}.')


def _backup_of(path: str) -> str:
  """Return the first unused `.bak` name for a file."""
  names = (f'{path}.bak{k if k > 1 else ""}' for k in itertools.count(1))
  return next(name for name in names if not os.path.lexists(name))
