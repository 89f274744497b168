"""Writing files whole and over no one else's, and locks."""

import contextlib
import os
import re
import secrets
import socket
from collections.abc import Iterator

import filelock

from cifar10_suite.errors import UserError

LOCK = '.lock'  # the file in a directory that one process has for itself
_LOCK_TEXT = re.compile(r'(process \d+ on .*)?')


def is_pattern(path: str) -> bool:
  """Returns whether TensorFlow takes a checkpoint's path for a pattern."""
  return any(character in path for character in '*?[\\')


def write_whole(path: str, content: bytes) -> None:
  """Writes a file beside its place and moves it there: never half of it."""
  beside = f'{path}.{secrets.token_hex(4)}.tmp'
  try:
    with open(beside, 'xb') as file:
      file.write(content)
    os.replace(beside, path)
  finally:
    if os.path.exists(beside):
      os.remove(beside)


def write_unless_taken(path: str, content: bytes, mark: bytes = b'') -> None:
  """Writes a file, but not over one of somebody else.

  Args:
    path: where to.
    content: the file's.
    mark: what a file contains that may be written over; without one, only a
      file of the same content may.

  Raises:
    UserError: there is another file already.
  """
  if os.path.lexists(path):
    old = None
    if os.path.isfile(path):
      with open(path, 'rb') as file:
        old = file.read()
    if old != content and not (mark and old and mark in old):
      raise UserError(
        f'{path} is there already, and is not of this program. Move it away, '
        'or choose another place.'
      )
  write_whole(path, content)


@contextlib.contextmanager
def locked(path: str, waiting: str | None = None) -> Iterator[None]:
  """Holds a lock file. The system frees it when the process ends, however.

  Args:
    path: the file, made if it is missing.
    waiting: what to print before waiting for another process; None to give up
      at once.

  Raises:
    filelock.Timeout: another process has it, and `waiting` is None.
    UserError: the file system has no locks, or the lock would write over a file
      of somebody else.
  """
  if not is_lock(path):
    raise UserError(
      f'{path} is not a lock of this suite. Move it away, or choose another '
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
  except (OSError, NotImplementedError) as error:
    if isinstance(error, filelock.Timeout):
      raise
    raise UserError(
      f'Cannot lock {path}: {error}. Choose a directory on a file system that '
      'has locks.'
    ) from error
  try:
    yield
  finally:
    lock.release()


@contextlib.contextmanager
def locked_dir(flag: str, directory: str) -> Iterator[None]:
  """Keeps a directory for this process alone.

  Args:
    flag: the flag that names the directory, for the message.
    directory: the directory.

  Raises:
    UserError: another process has it, or the lock would write over a file of
      somebody else.
  """
  path = os.path.join(directory, LOCK)
  try:
    with locked(path):
      with open(path, 'w') as file:
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
      yield
  except filelock.Timeout as error:
    with open(path) as file:
      holder = file.read() or 'another process'
    raise UserError(f'{flag} {directory} is in use by {holder}.') from error


def is_lock(path: str) -> bool:
  """Returns whether a path is free for a lock, or is a lock of this suite."""
  if not os.path.lexists(path):
    return True
  if not os.path.isfile(path):
    return False
  with open(path, errors='replace') as file:
    return _LOCK_TEXT.fullmatch(file.read()) is not None
