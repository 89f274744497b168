"""New data sets in CIFAR-10's binary format: splitting, shuffling, writing."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np

from cifar10_suite.dataset import (
  BATCHES_DIR,
  CLASS_NAMES_FILE,
  MAX_CLASSES,
  TEST_FILE,
)
from cifar10_suite.errors import UserError

_RECORDS_PER_FILE = 10_000  # at most, in training files
_SCRATCH_PREFIX = '.cifar10-convert-'  # names directories of unfinished files


@dataclasses.dataclass
class Examples:
  """Images of known classes.

  Attributes:
    class_names: names of the classes.
    records: uint8 [n, 3073], the content of data files.
    sources: n descriptions of where the records come from, for messages.
    is_test: bool [n], whether a record is for testing, or None if undecided.
  """

  class_names: list[str]
  records: np.ndarray
  sources: Sequence[str]
  is_test: np.ndarray | None = None

  @functools.cached_property
  def groups(self) -> list[list[int]]:
    """Positions of the records in groups of equal images."""
    groups: dict[bytes, list[int]] = {}
    for position, record in enumerate(self.records):
      digest = hashlib.blake2b(record[1:].data, digest_size=16).digest()
      groups.setdefault(digest, []).append(position)
    return list(groups.values())


def check_class_names(names: list[str], where: str) -> None:
  """Check that a data set can have these class names.

  Args:
    names: names of the classes.
    where: what has these classes, for messages.

  Raises:
    UserError: if there are too few or too many, or if the file of class names,
      which has one name per line, cannot hold one of them.
  """
  if not 2 <= len(names) <= MAX_CLASSES:
    one = f' ({names[0]!r})' if len(names) == 1 else ''
    raise UserError(
      f'{where}: found {len(names)} class{"es" * (len(names) != 1)}{one}, but '
      f'a data set has 2 to {MAX_CLASSES}.'
    )
  for name in names:
    try:
      name.encode()
    except UnicodeEncodeError:
      problem = 'is not valid UTF-8'
    else:
      if not name.strip():
        problem = 'is empty'
      elif len(name.splitlines()) != 1:
        problem = 'has a line break'
      elif name != name.strip():
        problem = 'begins or ends with a space'
      else:
        continue
    raise UserError(f'{where}: the class name {name!r} {problem}. Rename it.')


def split(examples: Examples, test_fraction: float, seed: int) -> np.ndarray:
  """Choose the test images: a part of each class.

  Equal images are either all for testing or all for training.

  Args:
    examples: the images.
    test_fraction: fraction of each class to choose, rounded to whole images, at
      least one and not all.
    seed: number that determines the choice.

  Returns:
    bool [n], whether an image is for testing.

  Raises:
    UserError: if a class has fewer than two different images.
  """
  labels = examples.records[:, 0]
  num_classes = len(examples.class_names)
  sizes = np.bincount(labels, minlength=num_classes)
  for name, size in zip(examples.class_names, sizes.tolist(), strict=True):
    if size < 2:
      raise UserError(
        f'Class {name} has {size or "no"} readable picture{"s" * (size != 1)}, '
        'but it needs two: one for training and one for testing.'
      )
  # Unlike Generator, RandomState is the same in all versions of NumPy.
  order = np.random.RandomState(seed).permutation(len(examples.groups))
  groups = [examples.groups[index] for index in order]
  rounded = np.floor(test_fraction * sizes + 0.5).astype(int)
  chosen = np.zeros_like(sizes)  # number of test images per class
  test = list(_fill(groups, labels, np.clip(rounded, 1, sizes - 1), chosen))
  for label in np.flatnonzero(chosen == 0):  # each group was too large
    if chosen[label]:  # now
      continue
    own = sorted((it for it in groups if label in labels[it]), key=len)
    smallest = next(_fill(own, labels, sizes - 1, chosen), None)
    if smallest is None:
      raise UserError(
        f'Class {examples.class_names[label]} cannot be split: all its '
        f'{sizes[label]} pictures are the same, or the same as those of '
        'another class.'
      )
    test.append(smallest)
  is_test = np.zeros(len(labels), bool)
  is_test[np.concatenate(test)] = True
  return is_test


def _fill(
  groups: list[list[int]],
  labels: np.ndarray,
  limits: np.ndarray,
  chosen: np.ndarray,
) -> Iterator[list[int]]:
  """Choose groups of images as long as no class exceeds its limit.

  Args:
    groups: positions of images.
    labels: the class of each image.
    limits: largest number of chosen images per class.
    chosen: number of chosen images per class, which is updated.

  Yields:
    The chosen groups.
  """
  for group in groups:
    more = np.bincount(labels[group], minlength=len(limits))
    if np.all(chosen + more <= limits):
      chosen += more
      yield group


def check_parts(examples: Examples) -> None:
  """Check that each class has training images and test images.

  Raises:
    UserError: if not.
  """
  for part, chosen in (
    ('training', ~_decided(examples)),
    ('testing', _decided(examples)),
  ):
    sizes = np.bincount(
      examples.records[chosen, 0], minlength=len(examples.class_names)
    )
    for name, size in zip(examples.class_names, sizes, strict=True):
      if not size:
        raise UserError(f'Class {name} has no readable picture for {part}.')


def repeated(examples: Examples) -> list[tuple[str, str]]:
  """Return the sources of equal images in both parts: (test, training)."""
  is_test = _decided(examples)
  pairs = []
  for group in examples.groups:
    training = [position for position in group if not is_test[position]]
    if training:
      pairs += [
        (examples.sources[position], examples.sources[training[0]])
        for position in group
        if is_test[position]
      ]
  return pairs


def in_two_classes(examples: Examples) -> list[tuple[int, int]]:
  """Return the positions of equal images of different classes."""
  labels = examples.records[:, 0]
  return [
    (group[0], position)
    for group in examples.groups
    for position in group
    if labels[position] != labels[group[0]]
  ]


def check_destination(data_dir: str) -> None:
  """Check that `write` may and can write to a directory, which stays as it is.

  Raises:
    UserError: if the directory is not empty or not writable.
  """
  try:
    there = sorted(os.listdir(data_dir)) if os.path.lexists(data_dir) else []
    # A killed conversion may have left unfinished files.
    if names := [it for it in there if not it.startswith(_SCRATCH_PREFIX)]:
      raise UserError(
        f'--data_dir {data_dir} already contains {", ".join(names[:3])}'
        f'{", ..." * (len(names) > 3)}. Choose a new or empty directory.'
      )
    existing = os.path.abspath(data_dir)
    while not os.path.lexists(existing):
      existing = os.path.dirname(existing)
    with tempfile.TemporaryFile(dir=existing):
      pass
  except OSError as error:
    raise _cannot_write(data_dir, error) from error


def write(examples: Examples, data_dir: str, seed: int) -> dict[str, int]:
  """Write a data set to a new or empty directory, completely or not at all.

  Args:
    examples: the images, each for training or testing.
    data_dir: directory that will contain the directory of the data files.
    seed: number that determines the order of the records.

  Returns:
    The number of records in each data file.

  Raises:
    UserError: if the directory is not empty, or if writing fails.
  """
  rng = np.random.RandomState(seed)
  training = rng.permutation(np.flatnonzero(~_decided(examples)))
  num_files = -(-len(training) // _RECORDS_PER_FILE)
  parts = {
    f'data_batch_{number}.bin': positions
    for number, positions in enumerate(np.array_split(training, num_files), 1)
  }
  parts[TEST_FILE] = rng.permutation(np.flatnonzero(_decided(examples)))

  check_destination(data_dir)
  created = []  # deepest first
  folder = os.path.abspath(data_dir)
  while not os.path.lexists(folder):
    created.append(folder)
    folder = os.path.dirname(folder)
  try:
    os.makedirs(data_dir, exist_ok=True)
    with tempfile.TemporaryDirectory(
      prefix=_SCRATCH_PREFIX, dir=data_dir
    ) as scratch:
      new = os.path.join(scratch, BATCHES_DIR)
      os.mkdir(new)
      with open(os.path.join(new, CLASS_NAMES_FILE), 'wb') as file:
        file.writelines(f'{name}\n'.encode() for name in examples.class_names)
      for name, positions in parts.items():
        with open(os.path.join(new, name), 'wb') as file:
          file.write(examples.records[positions].data)
      os.rename(new, os.path.join(data_dir, BATCHES_DIR))
  except OSError as error:
    raise _cannot_write(data_dir, error) from error
  finally:
    for folder in created:
      with contextlib.suppress(OSError):  # not empty: the data set is in it
        os.rmdir(folder)
  return {name: len(positions) for name, positions in parts.items()}


def _decided(examples: Examples) -> np.ndarray:
  """Return `is_test`."""
  if examples.is_test is None:
    raise ValueError('The images have no split into training and testing.')
  return examples.is_test


def _cannot_write(data_dir: str, error: OSError) -> UserError:
  return UserError(
    f'Cannot write to --data_dir {data_dir}: {error.strerror or error}.'
  )
