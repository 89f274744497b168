"""Pictures in folders, one for each class."""

import collections
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import re
import signal
import threading
import unicodedata
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import numpy as np

from cifar10_suite import pictures, stop_signals
from cifar10_suite.conversion import Examples, check_class_names
from cifar10_suite.dataset import RECORD_BYTES
from cifar10_suite.errors import UserError
from cifar10_suite.pictures import list_folder

_TRAIN, _TEST = 'train', 'test'
# Words in the names of folders with the same classes as that for training.
_TRAINING = {'train', 'training'}
_OTHER_PARTS = {
  'dev', 'eval', 'evaluation', 'holdout', 'test', 'testing',
  'val', 'valid', 'validation',
}  # fmt: skip
_CHUNK = 8  # pictures that a process reads before Ctrl-C can stop it


@dataclasses.dataclass
class Pictures:
  """Paths of pictures with their classes.

  Attributes:
    class_names: names of the classes.
    paths: paths of the pictures.
    labels: the class of each picture.
    is_test: whether each picture is for testing, or None if undecided.
    ignored: paths of files and folders that are not used.
  """

  class_names: list[str]
  paths: list[str] = dataclasses.field(default_factory=list)
  labels: list[int] = dataclasses.field(default_factory=list)
  is_test: list[bool] | None = None
  ignored: list[str] = dataclasses.field(default_factory=list)


def find(root: str) -> Pictures:
  """Find the pictures in a folder that has a sub-folder for each class.

  Pictures are files with an extension known to Pillow, in a class's folder or
  its sub-folders. If there are `train` and `test`, each of these has a
  sub-folder for each class. Hidden files and folders do not count.

  Raises:
    UserError: if there are no such folders, or one has no pictures.
  """
  try:
    folders, others = list_folder(root)
    if _TRAIN in folders and _TEST in folders:
      found = _find_parts(root)
      found.ignored += [
        *others,
        *(os.path.join(root, x) for x in folders if x not in (_TRAIN, _TEST)),
      ]
      return found
    if not folders:
      raise UserError(
        f'{root} has no sub-folders. Put the pictures of each class into a '
        'sub-folder with the name of the class.'
      )
    if _TRAIN in folders and set(folders) - {_TRAIN} <= _OTHER_PARTS:
      raise UserError(
        f'{root} has {" and ".join(folders)}, but no {_TEST}. Name the folder '
        f'of test pictures {_TEST}.'
      )
    check_class_names(folders, root)
    _refuse_parts_as_classes(root, folders)
    _refuse_parts_of_classes(root, folders)
    found = Pictures(folders, ignored=others)
    _add_pictures(found, root, folders, [root])
    return found
  except OSError as error:
    raise UserError(
      f'Cannot read the folder {error.filename}: {error.strerror}.'
    ) from error


def _refuse_parts_as_classes(root: str, folders: list[str]) -> None:
  """Refuse folders such as `Train` and `test_set`, with classes in common."""
  train_like, other_parts = (
    [it for it in folders if words & set(re.findall('[a-z]+', it.lower()))]
    for words in (_TRAINING, _OTHER_PARTS)
  )
  for train, other in itertools.product(train_like, other_parts):
    folders_of, _ = list_folder(os.path.join(root, train))
    if set(folders_of) & set(list_folder(os.path.join(root, other))[0]):
      raise UserError(
        f'{train} and {other} in {root} have the same sub-folders. If these '
        f'are the classes, name the folders {_TRAIN} and {_TEST}.'
      )


def _refuse_parts_of_classes(root: str, folders: list[str]) -> None:
  """Refuse classes of which each has folders `train` and `test`."""
  parts = {_TRAIN, _TEST}
  if all(
    parts <= set(list_folder(os.path.join(root, it))[0]) for it in folders
  ):
    raise UserError(
      f'Each class in {root} has the sub-folders {_TRAIN} and {_TEST}. Make '
      f'these the outer folders: {_TRAIN}/{folders[0]}, {_TEST}/{folders[0]} '
      'and so on.'
    )


def read(
  found: Pictures, processes: int, advance: Callable[[int], object]
) -> tuple[Examples, list[tuple[str, str]]]:
  """Read pictures in several processes.

  Args:
    found: the pictures.
    processes: number of processes.
    advance: function that is told how many more pictures were processed.

  Returns:
    The images of the readable pictures, in order, and path and problem of each
    other picture.

  Raises:
    UserError: if a process is killed.
  """
  records = np.empty([len(found.paths), RECORD_BYTES], np.uint8)
  good: list[int] = []  # positions of the readable pictures
  problems = []
  position = 0
  with _readings(found.paths, processes) as readings:
    for planes, reasons in readings:
      start = len(good)
      for reason in reasons:
        if reason is None:
          good.append(position)
        else:
          problems.append((found.paths[position], reason))
        position += 1
      records[start : len(good), 1:] = planes
      advance(len(reasons))
  records = records[: len(good)]
  records[:, 0] = np.array(found.labels)[good]
  examples = Examples(
    found.class_names,
    records,
    [found.paths[position] for position in good],
    None if found.is_test is None else np.array(found.is_test)[good],
  )
  return examples, problems


def _find_parts(root: str) -> Pictures:
  """Find the pictures in `train` and `test`."""
  train, test = (os.path.join(root, part) for part in (_TRAIN, _TEST))
  names, others = list_folder(train)
  test_names, test_others = list_folder(test)
  names.sort(key=composed)
  test_names.sort(key=composed)
  counts, test_counts = (
    collections.Counter(map(composed, some)) for some in (names, test_names)
  )
  differences = [
    f'only {part} has {", ".join(map(repr, sorted(only)[:5]))}'
    f'{", ..." * (len(only) > 5)}'
    for part, only in (
      (_TRAIN, counts - test_counts),
      (_TEST, test_counts - counts),
    )
    if only
  ]
  if differences:
    raise UserError(
      f'{_TRAIN} and {_TEST} in {root} differ in their classes: '
      f'{"; ".join(differences)}.'
    )
  check_class_names(names, train)
  found = Pictures(names, ignored=others + test_others)
  _add_pictures(found, train, names, [root, train, test])
  num_training = len(found.paths)
  _add_pictures(found, test, test_names, [root, train, test])
  found.is_test = [i >= num_training for i in range(len(found.paths))]
  return found


def composed(name: str) -> str:
  """Return a name in the normal form NFC; macOS may write another one."""
  return unicodedata.normalize('NFC', name)


def _add_pictures(
  found: Pictures, root: str, folders: list[str], outer: list[str]
) -> None:
  """Add pictures to `found`.

  Args:
    found: the pictures of other parts.
    root: folder of the classes.
    folders: name of each class's folder.
    outer: folders with all classes; links to them are ignored.
  """
  real = tuple(map(os.path.realpath, outer))
  for label, name in enumerate(folders):
    folder = os.path.join(root, name)
    paths, ignored, errors = pictures.in_folder(folder, outer=real)
    if errors:
      raise errors[0]
    if not paths:
      such = f', only files such as {ignored[0]}' if ignored else ''
      raise UserError(f'Class {name} has no pictures in {folder}{such}.')
    found.paths += paths
    found.labels += [label] * len(paths)
    found.ignored += ignored


@contextlib.contextmanager
def _readings(
  paths: list[str], processes: int
) -> Iterator[Iterator[tuple[np.ndarray, list[str | None]]]]:
  """Yield an iterator over the results of `_read_chunk`, in order."""
  chunks = [paths[i : i + _CHUNK] for i in range(0, len(paths), _CHUNK)]
  processes = min(processes, len(chunks))
  if processes < 2:
    yield map(_read_chunk, chunks)
    return
  # Each process has a pipe of its own, which ends with the process, even in the
  # middle of a result. An executor's processes share one, and it would wait.
  readers: list[tuple[BaseProcess, Connection]] = []
  with _delayed_signals():  # apart, because this then unblocks SIGINT
    resource_tracker.ensure_running()
  try:
    with _delayed_signals():
      for i in range(processes):
        readers.append(_start_reader(chunks[i::processes]))
    yield (_receive(readers[i % processes][1]) for i in range(len(chunks)))
  finally:
    for process, _ in readers:
      process.terminate()
      process.join()


def _start_reader(chunks: list[list[str]]) -> tuple[BaseProcess, Connection]:
  """Start a process that reads chunks; return it, and where results arrive."""
  # TensorFlow and other libraries with threads do not survive a fork.
  context = multiprocessing.get_context('spawn')
  results, sender = context.Pipe(duplex=False)
  process = context.Process(target=_read_chunks, args=[chunks, sender])
  process.start()
  sender.close()  # now, only the process has it
  return process, results


def _read_chunks(chunks: list[list[str]], sender: Connection) -> None:
  """Send the results of `_read_chunk`, in a process of its own."""
  _end_with_parent()
  with contextlib.suppress(BrokenPipeError):  # the parent has ended
    for chunk in chunks:
      sender.send(_read_chunk(chunk))


def _receive(results: Connection) -> tuple[np.ndarray, list[str | None]]:
  try:
    return results.recv()
  except (EOFError, OSError) as error:  # at the end or within a result
    raise UserError(
      'A process that reads pictures was killed, perhaps for lack of memory.'
    ) from error


@contextlib.contextmanager
def _delayed_signals() -> Iterator[None]:
  """Delay signals to stop until the end of the block, which starts processes.

  Ctrl-C and the end of a terminal reach all its processes. The others inherit
  the mask, and this process tells them to end. The mask does not cover the
  threads of libraries, which may receive the signal for this process.
  """
  received: list[int] = []
  with stop_signals.handled(received.append):
    mask = signal.pthread_sigmask(
      signal.SIG_BLOCK, [signal.SIGINT, signal.SIGHUP]
    )
    try:
      yield
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, mask)
  if received:
    signal.raise_signal(received[0])


def _end_with_parent() -> None:
  """End this process when its parent is killed."""

  def wait() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
      parent.join()
      os._exit(1)

  threading.Thread(target=wait, daemon=True).start()


def _read_chunk(paths: list[str]) -> tuple[np.ndarray, list[str | None]]:
  """Read pictures.

  Returns:
    planes: uint8 [n, 3072], the readable pictures as in records.
    reasons: for each path, why it cannot be read, or None.
  """
  planes = []
  reasons: list[str | None] = []
  for path in paths:
    try:
      planes.append(pictures.read_picture(path).transpose(2, 0, 1).ravel())
      reasons.append(None)
    except pictures.PictureError as error:
      reasons.append(f'{error}')
  return np.array(planes, np.uint8).reshape(-1, RECORD_BYTES - 1), reasons
