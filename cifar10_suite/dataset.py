"""Data sets in CIFAR-10's binary format: files, records and class names.

A record has 3,073 bytes: the label, then the red, green and blue planes of the
image, each with 32x32 pixels in row order.
"""

import contextlib
import dataclasses
import itertools
import os
import re

import numpy as np

from cifar10_suite import commands
from cifar10_suite.errors import UserError

HEIGHT, WIDTH, DEPTH = 32, 32, 3
RECORD_BYTES = 1 + HEIGHT * WIDTH * DEPTH

DATA_URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
BATCHES_DIR = 'cifar-10-batches-bin'
CLASS_NAMES_FILE = 'batches.meta.txt'
FILE_SHA256 = {
  'data_batch_1.bin': (
    'cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5'
  ),
  'data_batch_2.bin': (
    'a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed'
  ),
  'data_batch_3.bin': (
    'bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67'
  ),
  'data_batch_4.bin': (
    '014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48'
  ),
  'data_batch_5.bin': (
    '755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add'
  ),
  'test_batch.bin': (
    '8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b'
  ),
}
FILE_BYTES = 30_730_000
CLASS_NAMES = [
  'airplane', 'automobile', 'bird', 'cat', 'deer',
  'dog', 'frog', 'horse', 'ship', 'truck',
]  # fmt: skip
DEFAULT_DATA_DIR = os.path.join(
  os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'cifar10_data'
)

TEST_FILE = 'test_batch.bin'
MAX_CLASSES = 256  # a label is a byte

# Prefix of the error message for an invalid label.
BAD_LABEL = 'Damaged file: a label is above'

# Graph collection with the paths of the training files.
DATA_FILES = 'data_files'


class DataError(UserError, ValueError):
  """Missing or damaged data file."""


@dataclasses.dataclass(frozen=True)
class DataSet:
  """A data set, as `load` finds it.

  Attributes:
    class_names: name of each label.
    num_training_images: number of images to train on.
  """

  class_names: tuple[str, ...]
  num_training_images: int


CIFAR10 = DataSet(tuple(CLASS_NAMES), 50000)


def load(data_dir: str, hold_out: int = 0) -> DataSet:
  """Check the training files of a data set and describe it.

  Args:
    data_dir: directory of the folder `cifar-10-batches-bin`.
    hold_out: number of images at the end of the training files to leave out.

  Raises:
    DataError: if a file is missing or damaged, or if labels and class names do
      not agree, or if no training images are left.
  """
  batches_dir = os.path.join(data_dir, BATCHES_DIR)
  names = class_names(batches_dir)
  paths = evaluation_files(False, batches_dir)
  all_labels = read_labels(paths, names)
  if hold_out >= len(all_labels):
    raise DataError(
      f'--hold_out={hold_out} must be less than the number of training images, '
      f'{len(all_labels)}.'
    )
  labels = all_labels[: len(all_labels) - hold_out]
  counts = np.bincount(labels, minlength=len(names))
  if not counts.all():
    label = int(np.argmin(counts))
    if label in all_labels:
      problem = ' before those held out. Choose a smaller --hold_out.'
    elif all_labels.max() < label:
      problem = f'. Remove it from {CLASS_NAMES_FILE}, or add some.'
    else:  # without the name, later labels would be those of other classes
      problem = '. Add some, or make the data set again without this class.'
    raise DataError(
      f'{batches_dir} has no training images of class {names[label]!r}{problem}'
    )
  return DataSet(names, int(counts.sum()))


def class_names(batches_dir: str) -> tuple[str, ...]:
  """Return the names in the directory's `batches.meta.txt`, one per line.

  Raises:
    DataError: if the file cannot be read, or does not have 2 to 256 names.
  """
  path = os.path.join(batches_dir, CLASS_NAMES_FILE)
  try:
    # Some editors on Windows begin a text with a mark, which is not a name.
    with open(path, encoding='utf-8-sig') as file:
      names = [line.strip() for line in file if line.strip()]
  except FileNotFoundError as error:
    raise DataError(
      f'Failed to find file: {path}. Write the name of each class into it, one '
      'per line, in the order of the labels.'
    ) from error
  except OSError as error:
    raise DataError(f'Cannot read {path}: {error.strerror}.') from error
  except UnicodeDecodeError as error:
    raise DataError(f'Damaged file: {path} is not text in UTF-8.') from error
  if not 2 <= len(names) <= MAX_CLASSES or len(set(names)) < len(names):
    raise DataError(
      f'{path} must have 2 to {MAX_CLASSES} different names, one per line. It '
      f'has {len(names)}, of which {len(set(names))} differ.'
    )
  return tuple(names)


def read_labels(paths: list[str], names: tuple[str, ...]) -> np.ndarray:
  """Return the labels in some data files, uint8 [n], after checking them.

  Raises:
    DataError: if there is a label without a name.
  """
  labels = {
    path: np.array(np.memmap(path, np.uint8, 'r')[::RECORD_BYTES])
    for path in paths
  }
  together = np.concatenate(list(labels.values()))
  lowest, highest = together.min(), together.max()
  count = len(names)
  if highest < count:
    return together
  path = next(path for path, some in labels.items() if some.max() >= count)
  record = int(np.argmax(labels[path] >= count))
  problem = (
    f'{BAD_LABEL} {count - 1}; <file>:<record> and label: '
    f'[{path}:{record}] [{labels[path][record]}]'
  )
  if lowest == 1 and highest == count:
    raise DataError(
      f'{problem}. Labels must count from 0, not from 1: subtract 1 from each.'
    )
  raise DataError(
    f'{problem}. {CLASS_NAMES_FILE} next to it names {count} classes.'
  )


def data_files(batches_dir: str, names: list[str]) -> list[str]:
  """Return the paths of data files after checking their sizes.

  Args:
    batches_dir: directory of the data files.
    names: file names in that directory.

  Raises:
    DataError: if a file is missing, empty, or ends within a record.
  """
  paths = [os.path.join(batches_dir, name) for name in names]
  for path in paths:
    if not os.path.exists(path):
      problem = f'Failed to find file: {path}.'
    elif not (size := os.path.getsize(path)):
      problem = f'Empty file: {path}.'
    elif rest := size % RECORD_BYTES:
      problem = (
        f'Damaged file: {path} ends {rest} byte{"s" * (rest > 1)} into a '
        f'record of {RECORD_BYTES} bytes.'
      )
    else:
      continue
    raise DataError(f'{problem} {_remedy(batches_dir)}')
  return paths


def _remedy(batches_dir: str) -> str:
  """Say how to mend the data files in a directory."""
  with contextlib.suppress(DataError):
    if class_names(batches_dir) != CIFAR10.class_names:
      return (
        'Make the data set again, for example with cifar10_convert.py, or name '
        'another one with --data_dir.'
      )
  data_dir = os.path.dirname(os.path.normpath(batches_dir)) or '.'
  command = commands.of('download.py', '--data_dir', data_dir)
  return f'To fetch CIFAR-10: {command}'


def evaluation_files(eval_data: bool, batches_dir: str) -> list[str]:
  """Return the paths of the test file or of the training files.

  Training files are `data_batch_1.bin`, `data_batch_2.bin` and so on.

  Raises:
    DataError: if a file is missing or damaged.
  """
  if eval_data:
    return data_files(batches_dir, [TEST_FILE])
  numbers = training_file_numbers(batches_dir) or [1]
  missing = next(k for k in itertools.count(1) if k not in numbers)
  # If there are later ones, up to the missing one, which is an error.
  wanted = range(1, min(missing, max(numbers)) + 1)
  return data_files(
    batches_dir, [f'data_batch_{number}.bin' for number in wanted]
  )


def training_file_numbers(batches_dir: str) -> list[int]:
  """Return the numbers of the training files in a directory, sorted."""
  there = os.listdir(batches_dir) if os.path.isdir(batches_dir) else []
  return sorted(
    int(match[1])
    for name in there
    if (match := re.fullmatch(r'data_batch_([1-9]\d*)\.bin', name))
  )


def count_images(eval_data: bool, batches_dir: str) -> int:
  """Return the number of test images or of training images.

  Raises:
    DataError: if a file is missing or damaged.
  """
  paths = evaluation_files(eval_data, batches_dir)
  return sum(os.path.getsize(path) for path in paths) // RECORD_BYTES


def split(batches_dir: str, hold_out: int) -> tuple[list[str], str, int]:
  """Find where the held-out images begin.

  Args:
    batches_dir: directory of the data files.
    hold_out: number of images at the end of the training files; less than the
      number of images in them.

  Returns:
    paths: paths of the training files.
    path: the file in which the first held-out image is; '' if there is none.
    record: its record number in that file.
  """
  paths = evaluation_files(False, batches_dir)
  sizes = [os.path.getsize(path) // RECORD_BYTES for path in paths]
  left = sum(sizes) - hold_out
  for path, size in zip(paths, sizes, strict=True):
    if left < size:
      return paths, path, left
    left -= size
  return paths, '', 0


def read_images(
  eval_data: bool, batches_dir: str, positions: np.ndarray
) -> np.ndarray:
  """Read images at given positions.

  Args:
    eval_data: whether to read test images instead of training images.
    batches_dir: directory of the data files.
    positions: integers [n], positions of the images in the concatenated files.

  Returns:
    uint8 [n, 32, 32, 3].
  """
  batches = [
    np.memmap(path, np.uint8, 'r').reshape(-1, RECORD_BYTES)
    for path in evaluation_files(eval_data, batches_dir)
  ]
  starts = np.cumsum([0, *map(len, batches)])
  which = np.searchsorted(starts, positions, side='right') - 1
  records = [
    batches[k][position - starts[k]]
    for k, position in zip(which, positions, strict=True)
  ]
  planes = np.array(records, np.uint8).reshape(-1, RECORD_BYTES)[:, 1:]
  return planes.reshape(-1, DEPTH, HEIGHT, WIDTH).transpose(0, 2, 3, 1)


def listed(names: tuple[str, ...] | list[str]) -> str:
  """List the names in a message; of more than ten, only the first."""
  if len(names) <= 10:
    return ', '.join(names)
  return f'{", ".join(names[:3])}, ... ({len(names)} classes)'
