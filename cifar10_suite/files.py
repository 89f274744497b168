"""Atomic writes that spare other people's files, and locks."""

import contextlib
import errno
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterator

import filelock

from cifar10_suite.errors import UserError

LOCK = '.lock'  # lock file of a directory that only one process may use
SCORES = 'metrics.jsonl'  # in --eval_dir: one line of JSON per score
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a full disk
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_LOCK_TEXT = re.compile(r'(process \d+ on .*)?')


def is_full(error: OSError) -> bool:
  """Return whether a disk or a quota is full, or a file reached its limit."""
  return error.errno in FULL


def refuse_pattern(
  path: str, remedy: str, error: type[UserError] = UserError
) -> None:
  """Refuse a path that TensorFlow would treat as a pattern.

  Args:
    path: the path, possibly after the flag that names it.
    remedy: last sentence of the message.
    error: type of the error.

  Raises:
    UserError: or `error`, if the path has a character of patterns.
  """
  if any(character in path for character in '*?[\\'):
    raise error(
      f'{path} has one of the characters * ? [ \\ in its name, which '
      f'TensorFlow treats as a pattern. {remedy}'
    )


def refuse_remote(arguments: list[str]) -> None:
  """Refuse addresses such as s3://bucket/run among command-line arguments.

  Raises:
    UserError: if there is one. Locks, atomic renames and the search for
      checkpoints need a local directory, or a mounted one.
  """
  for argument in arguments:
    value = re.sub(r'^--?\w+=', '', argument)
    if re.match(r'[A-Za-z][A-Za-z0-9+.-]*://', value):
      raise UserError(
        f'{value} is not a local path, which this suite needs. Mount the '
        'storage as a directory, or copy the files.'
      )


def refuse_unusable(flag: str, value: str) -> None:
  """Refuse the text of a flag if it is not UTF-8, or begins with ~.

  Raises:
    UserError: if TensorFlow could not use it, or if it would create a directory
      called ~, which is dangerous to remove.
  """
  if value.startswith('~'):
    raise UserError(
      f'{flag} {value}: the shell has not expanded ~. Write the whole path.'
    )
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'{flag} {value} is not UTF-8. Rename it, or choose another one.'
    ) from error


def write_whole(path: str, content: bytes) -> None:
  """Write a file atomically: write a temporary file and rename it."""
  beside = f'{path}.{secrets.token_hex(4)}.tmp'
  try:
    with errors_named(path), open(beside, 'xb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())  # or a power failure may leave an empty file
    os.replace(beside, path)
  finally:
    if os.path.exists(beside):
      os.remove(beside)


@contextlib.contextmanager
def errors_named(path: str) -> Iterator[None]:
  """Add a file's path to the errors of writing, which lack it."""
  try:
    yield
  except OSError as error:
    error.filename = error.filename or path
    raise


def write_unless_taken(
  path: str, content: bytes, is_ours: Callable[[bytes], bool] | None = None
) -> None:
  """Write a file unless that would overwrite someone else's.

  Args:
    path: path of the file.
    content: content of the file.
    is_ours: returns whether a program wrote a file of a given content, which
      may be overwritten; by default, only a file of equal content may be.

  Raises:
    UserError: if a different file exists, or one that cannot be read.
  """
  if os.path.lexists(path):
    old = content_of(path) if os.path.isfile(path) else None
    if old != content and not (is_ours and old is not None and is_ours(old)):
      raise UserError(
        f'{path} already exists and is not from this program. Move it, or '
        'choose another directory.'
      )
  write_whole(path, content)


@contextlib.contextmanager
def locked(path: str, waiting: str | None = None) -> Iterator[None]:
  """Hold a lock file, which the system releases even if the process crashes.

  Args:
    path: path of the lock file, created if missing.
    waiting: message to print before waiting for another process; None to fail
      immediately instead.

  Raises:
    filelock.Timeout: if another process holds the lock and `waiting` is None.
    UserError: if the file system has no locks, or if the lock would overwrite
      someone else's file.
  """
  if not is_lock(path):
    raise UserError(
      f'{path} is not a lock file of this suite. Move it, or choose another '
      'directory.'
    )
  # Without locks of the file system, a killed process would leave its lock.
  lock = filelock.FileLock(path, fallback_to_soft=False)
  try:
    try:
      lock.acquire(timeout=0)
    except filelock.Timeout:
      if waiting is None:
        raise
      print(waiting, flush=True)
      lock.acquire()
  except filelock.Timeout:  # an OSError, too
    raise
  except (OSError, NotImplementedError) as error:
    where = 'directory'
    if not isinstance(error, OSError) or error.errno in _NO_LOCKS:
      where += ' on a file system that supports locks'
    raise UserError(
      f'Cannot lock {path}: {error}. Choose another {where}.'
    ) from error
  try:
    yield
  finally:
    lock.release()


@contextlib.contextmanager
def locked_dir(flag: str, directory: str) -> Iterator[None]:
  """Hold a lock that reserves a directory for this process.

  Args:
    flag: flag that names the directory, for the error message.
    directory: path of the directory.

  Raises:
    UserError: if another process holds the lock, or if the lock would overwrite
      someone else's file.
  """
  path = os.path.join(directory, LOCK)
  try:
    with locked(path):
      try:
        with open(path, 'w') as file:
          file.write(f'process {os.getpid()} on {socket.gethostname()}')
      except OSError:
        os.truncate(path, 0)  # a part of the text would not count as ours
        raise
      yield
  except filelock.Timeout as error:
    with open(path) as file:
      holder = file.read() or 'another process'
    raise UserError(
      f'{flag} {directory} is in use by {holder}. Stop that first, or choose '
      'another directory.'
    ) from error


def is_lock(path: str) -> bool:
  """Return whether a path does not exist or is a lock file of this suite.

  Raises:
    UserError: if the file cannot be read.
  """
  if not os.path.lexists(path):
    return True
  if not os.path.isfile(path):
    return False
  text = content_of(path).decode(errors='replace')
  return _LOCK_TEXT.fullmatch(text) is not None


def content_of(path: str) -> bytes:
  """Return the content of a file.

  Raises:
    UserError: if the file cannot be read.
  """
  try:
    with open(path, 'rb') as file:
      return file.read()
  except OSError as error:
    raise UserError(
      f'Cannot read {path}: {error.strerror}. Choose another directory.'
    ) from error
