"""Data sets in CIFAR-10's binary format: files, records and class names.

A record has 3,073 bytes: the label, then the red, green and blue planes of the
image, each with 32x32 pixels in row order.
"""

import os

import numpy as np

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

TRAINING_FILES = [f'data_batch_{i}.bin' for i in range(1, 6)]
TEST_FILES = ['test_batch.bin']

# Prefix of the error message for an invalid label.
BAD_LABEL = f'Damaged file: a label is above {len(CLASS_NAMES) - 1}'

# Graph collection with the paths of the training files.
DATA_FILES = 'data_files'


class DataError(UserError, ValueError):
  """Missing or damaged data file."""


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
        f'Damaged file: {path} ends {rest} bytes into a record of '
        f'{RECORD_BYTES} bytes.'
      )
    else:
      continue
    raise DataError(
      f'{problem} To fetch CIFAR-10: python download.py --data_dir '
      f'{os.path.dirname(os.path.normpath(batches_dir)) or "."}'
    )
  return paths


def evaluation_files(eval_data: bool, batches_dir: str) -> list[str]:
  """Return the paths of the test file or of the training files."""
  return data_files(batches_dir, TEST_FILES if eval_data else TRAINING_FILES)


def count_images(eval_data: bool, batches_dir: str) -> int:
  """Return the number of test images or of training images.

  Raises:
    DataError: if a file is missing or damaged.
  """
  paths = evaluation_files(eval_data, batches_dir)
  return sum(os.path.getsize(path) for path in paths) // RECORD_BYTES


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
  records = np.concatenate(
    [
      np.memmap(path, np.uint8, 'r').reshape(-1, RECORD_BYTES)
      for path in evaluation_files(eval_data, batches_dir)
    ]
  )
  planes = records[positions, 1:].reshape(-1, DEPTH, HEIGHT, WIDTH)
  return planes.transpose(0, 2, 3, 1)
