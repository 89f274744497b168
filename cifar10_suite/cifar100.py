"""CIFAR-100, from the binary version of its official archive.

A record has 3,074 bytes: the coarse label, the fine label and the image. Of
the labels, only the fine one is used.
"""

import gzip
import os
import tarfile
import zlib

import numpy as np

from cifar10_suite import commands
from cifar10_suite.conversion import Examples, check_class_names
from cifar10_suite.dataset import BATCHES_DIR, RECORD_BYTES
from cifar10_suite.errors import UserError

BINARY_DIR = 'cifar-100-binary'
_TRAINING_FILE, _TEST_FILE = 'train.bin', 'test.bin'
_CLASS_NAMES_FILE = 'fine_label_names.txt'
_FILES = (_TRAINING_FILE, _TEST_FILE, _CLASS_NAMES_FILE)
_RECORD_BYTES = 1 + RECORD_BYTES
_COARSE_CLASSES, _FINE_CLASSES = 20, 100

# Folders of versions for Python, with the files that identify them.
_PICKLES = {
  'cifar-10-batches-py': ['batches.meta', 'data_batch_1'],
  'cifar-100-python': ['meta', 'train'],
}


def find(path: str) -> str | None:
  """Return where to read CIFAR-100 if a path is its archive or has its files.

  Args:
    path: path of a file or folder.

  Returns:
    `path`, if it is a file or has the data files; its sub-folder with the data
    files, if there is one; None for other folders.

  Raises:
    UserError: if the path is a folder of CIFAR-10 or of pickled data.
  """
  if os.path.isfile(path):
    return path
  for name, files in _PICKLES.items():
    for folder in (path, os.path.join(path, name)):
      if all(os.path.isfile(os.path.join(folder, file)) for file in files):
        raise _pickled(folder)
  for folder in (path, os.path.join(path, BATCHES_DIR)):
    if os.path.isfile(os.path.join(folder, 'data_batch_1.bin')):
      raise _converted(folder)
  for folder in (path, os.path.join(path, BINARY_DIR)):
    if any(os.path.isfile(os.path.join(folder, file)) for file in _FILES):
      return folder
  return None


def read(path: str) -> Examples:
  """Read CIFAR-100.

  Args:
    path: path of the archive or of the folder that was extracted from it.

  Returns:
    The images with their fine labels and CIFAR-100's split.

  Raises:
    UserError: if the path is something else, or damaged.
  """
  files = _read_archive(path) if os.path.isfile(path) else _read_folder(path)
  for name in _FILES:
    if name not in files:
      raise _damaged(path, f'there is no {name}')
  lines = files[_CLASS_NAMES_FILE].decode(errors='replace').splitlines()
  class_names = [line for line in lines if line]
  if len(set(class_names)) != _FINE_CLASSES:
    raise _damaged(
      path,
      f'{_CLASS_NAMES_FILE} has {len(set(class_names))} instead of '
      f'{_FINE_CLASSES} names',
    )
  check_class_names(class_names, path)
  parts = {
    name: _records(path, name, files.pop(name))
    for name in (_TRAINING_FILE, _TEST_FILE)
  }
  return Examples(
    class_names,
    np.concatenate([records[:, 1:] for records in parts.values()]),
    [
      f'{name}, record {number}'
      for name, records in parts.items()
      for number in range(len(records))
    ],
    np.repeat([False, True], [len(records) for records in parts.values()]),
  )


def is_data_file(path: str) -> bool:
  """Return whether a file consists of CIFAR-100's records."""
  size = os.path.getsize(path)
  if size == 0 or size % _RECORD_BYTES:
    return False
  records = np.memmap(path, np.uint8, 'r').reshape(-1, _RECORD_BYTES)
  return not _has_wrong_labels(records).any()


def _has_wrong_labels(records: np.ndarray) -> np.ndarray:
  """Return whether each of n records has an impossible label, bool [n]."""
  return (records[:, 0] >= _COARSE_CLASSES) | (records[:, 1] >= _FINE_CLASSES)


def _records(path: str, name: str, content: bytes) -> np.ndarray:
  """Return the records of a file, uint8 [n, 3074], after checking them."""
  if not content:
    raise _damaged(path, f'{name} is empty')
  if rest := len(content) % _RECORD_BYTES:
    raise _damaged(
      path, f'{name} ends {rest} bytes into a record of {_RECORD_BYTES} bytes'
    )
  records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD_BYTES)
  wrong = _has_wrong_labels(records)
  if wrong.any():
    coarse, fine = records[wrong.argmax(), :2]
    raise _damaged(
      path,
      f'record {wrong.argmax()} of {name} has the labels {coarse} and {fine}',
    )
  return records


def _read_folder(folder: str) -> dict[str, bytes]:
  """Return the contents of the files in a folder."""
  contents = {}
  for name in _FILES:
    path = os.path.join(folder, name)
    if os.path.exists(path):
      try:
        with open(path, 'rb') as file:
          contents[name] = file.read()
      except OSError as error:
        raise UserError(f'Cannot read {path}: {error.strerror}.') from error
  return contents


def _read_archive(path: str) -> dict[str, bytes]:
  """Return the contents of the files in an archive."""
  contents = {}
  try:
    with gzip.open(path) as stream:
      if not stream.peek(1):
        raise gzip.BadGzipFile
      with tarfile.open(fileobj=stream, mode='r:') as tar:
        for member in tar:
          folder, _, name = member.name.removeprefix('./').partition('/')
          if folder in _PICKLES:
            raise _pickled(path)
          if folder == BATCHES_DIR:
            raise _converted(path)
          if (
            folder == BINARY_DIR
            and name in _FILES
            and member.isfile()
            and (file := tar.extractfile(member))
          ):
            contents[name] = file.read()
      while stream.read(1 << 20):  # at its end is the checksum
        pass
  except gzip.BadGzipFile as error:
    if contents:  # wrong checksum
      raise _damaged(path, f'{error}') from error
    raise UserError(
      f"{path} is neither a folder of pictures nor CIFAR-100's archive, "
      'cifar-100-binary.tar.gz.'
    ) from error
  except (tarfile.TarError, EOFError, zlib.error) as error:
    raise _damaged(path, f'{error}') from error
  except OSError as error:
    raise UserError(f'Cannot read {path}: {error.strerror}.') from error
  return contents


def _damaged(path: str, what: str) -> UserError:
  return UserError(
    f"{path} is not CIFAR-100's binary version, or it is damaged: {what}."
  )


def _pickled(path: str) -> UserError:
  return UserError(
    f'{path} is a version for Python. Use the binary version instead: '
    'cifar-100-binary.tar.gz for CIFAR-100. To fetch CIFAR-10: '
    + commands.of('download.py')
  )


def _converted(path: str) -> UserError:
  return UserError(
    f"{path} is already in CIFAR-10's binary format and needs no conversion. "
    f'To fetch CIFAR-10: {commands.of("download.py")}'
  )
