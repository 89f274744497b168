"""Convert pictures to a data set in CIFAR-10's binary format.

  python cifar10_convert.py PICTURES --data_dir my_data

Each sub-folder of PICTURES is a class. Pictures are brought to 32x32 pixels as
cifar10_predict.py does. If PICTURES has the folders `train` and `test`, each
with the same classes, these are the two parts of the data set. Otherwise,
--test_fraction of each class is for testing.

PICTURES may also be the binary version of CIFAR-100: the archive
cifar-100-binary.tar.gz or the folder in it.

The data set is written completely or not at all.
"""

import argparse
import math
import os
import signal
import sys
import time

from cifar10_suite import loading

loading.require('absl')

import numpy as np
from tqdm import tqdm

from cifar10_suite import (
  cifar100,
  class_folders,
  commands,
  conversion,
  files,
  processor,
  stop_signals,
)
from cifar10_suite.commands import short_path
from cifar10_suite.conversion import Examples
from cifar10_suite.dataset import (
  BATCHES_DIR,
  CLASS_NAMES_FILE,
  TEST_FILE,
  listed,
)
from cifar10_suite.errors import UserError

_TEST_FRACTION = 0.2  # the default
_PATIENCE_SECS = 5  # after a signal, until another one ends the process
_UNEQUAL = 5  # ratio of class sizes from which on a warning is printed
_MAX_LINES = 20  # of warnings of a kind


def convert(
  source: str,
  data_dir: str,
  *,
  test_fraction: float | None = None,
  seed: int = 0,
  skip_unreadable: bool = False,
) -> None:
  """Convert pictures to a data set, and print what is in it.

  Args:
    source: path of a folder with a sub-folder for each class, or of CIFAR-100.
    data_dir: new or empty directory for the data set.
    test_fraction: fraction of each class that is for testing if `source` has no
      test part, 0.2 by default.
    seed: number that determines the choice of test images and the order.
    skip_unreadable: whether to leave out unreadable pictures; otherwise, they
      are an error.

  Raises:
    UserError: if nothing is written because something is wrong.
  """
  if test_fraction is not None and not 0 < test_fraction < 1:
    raise UserError(
      f'--test_fraction {test_fraction} is not between 0 and 1, exclusively.'
    )
  if not 0 <= seed < 1 << 32:
    raise UserError(f'--seed {seed} is not between 0 and {(1 << 32) - 1}.')
  if not os.path.exists(source):
    raise UserError(f'PICTURES {source} does not exist.')
  if not data_dir:
    raise UserError('--data_dir is empty. Name a new or empty directory.')
  inside = os.path.join(os.path.realpath(source), '')
  if os.path.realpath(data_dir).startswith(inside):
    raise UserError(
      f'--data_dir {data_dir} is inside PICTURES {source}. Choose another '
      'directory.'
    )
  conversion.check_destination(data_dir)

  official = cifar100.find(source)
  if official is not None:
    examples = cifar100.read(official)
  else:
    examples = _read_folders(source, skip_unreadable)
  _compare_names(examples.class_names)
  if examples.is_test is None:
    fraction = _TEST_FRACTION if test_fraction is None else test_fraction
    examples.is_test = conversion.split(examples, fraction, seed)
  else:
    if test_fraction is not None:
      _warn(f'--test_fraction has no effect: {source} has a test part.')
    conversion.check_parts(examples)
    _name_repeated(examples)
  _name_contradictions(examples)
  _compare_sizes(examples)
  counts = conversion.write(examples, data_dir, seed)
  print(_describe(examples, data_dir, counts))


def _read_folders(source: str, skip_unreadable: bool) -> Examples:
  """Read the pictures in folders of classes, and name the unreadable ones."""
  found = class_folders.find(source)
  if found.ignored:
    first, *more = found.ignored
    _warn(
      f"Ignored, because not a picture in a class's folder: {short_path(first)}"
      + (f' and {len(more):,} more' if more else '')
    )
  with tqdm(total=len(found.paths), unit=' pictures', disable=None) as bar:
    processes = processor.usable_cores()
    examples, problems = class_folders.read(found, processes, bar.update)
  for path, reason in problems:
    _warn(f'Cannot read {short_path(path)}: {reason}')
  if problems:
    unreadable = f'{len(problems):,} of {_count(len(found.paths), "picture")}'
    if not skip_unreadable:
      raise UserError(
        f'Cannot read {unreadable}; nothing was written. Add '
        '--skip_unreadable to leave them out.'
      )
    _warn(f'Left out {unreadable}.')
  return examples


def _compare_names(names: list[str]) -> None:
  """Warn about classes that may be meant to be one."""
  by_key: dict[str, str] = {}
  for name in names:
    first = by_key.setdefault(class_folders.composed(name).lower(), name)
    if first != name:
      is_case = first.lower() == name.lower()
      how = 'case' if is_case else 'the encoding of accents'
      _warn(f'The classes {first} and {name} differ only in {how}.')


def _name_repeated(examples: Examples) -> None:
  """Warn about images that are in both parts."""
  _warn_of_some(
    [
      f'The same picture is for testing and for training: {short_path(test)} '
      f'and {short_path(training)}'
      for test, training in conversion.repeated(examples)
    ]
  )


def _name_contradictions(examples: Examples) -> None:
  """Warn about images that are in two classes."""
  labels, names = examples.records[:, 0], examples.class_names
  _warn_of_some(
    [
      f'The same picture is in class {names[labels[first]]} and in class '
      f'{names[labels[second]]}: {short_path(examples.sources[first])} and '
      f'{short_path(examples.sources[second])}'
      for first, second in conversion.in_two_classes(examples)
    ]
  )


def _warn_of_some(messages: list[str]) -> None:
  """Print warnings of a kind, but not too many."""
  for message in messages[:_MAX_LINES]:
    _warn(message)
  if more := messages[_MAX_LINES:]:
    _warn(f'The same holds for {_count(len(more), "further picture")}.')


def _compare_sizes(examples: Examples) -> None:
  """Warn about classes of very different size."""
  sizes = np.bincount(examples.records[:, 0]).tolist()
  small, large = min(sizes), max(sizes)
  if large > _UNEQUAL * small:
    _warn(
      'The classes differ much in size: '
      f'{examples.class_names[sizes.index(large)]} has '
      f'{_count(large, "picture")}, '
      f'{examples.class_names[sizes.index(small)]} {small:,}.'
    )


def _describe(examples: Examples, data_dir: str, counts: dict[str, int]) -> str:
  """Return the final message."""
  *training, test = counts.values()
  files = list(counts)[: len(training)]
  where = files[0] if len(files) == 1 else f'{files[0]} to {files[-1]}'
  data = ['--data_dir', data_dir]
  train = commands.of('cifar10_train.py', *data, '--train_dir', 'my_train')
  evaluate = commands.of(
    'cifar10_eval.py', *data, '--checkpoint_dir', 'my_train'
  )
  return '\n'.join(
    [
      f'Wrote {len(examples.class_names)} classes to '
      f'{os.path.join(data_dir, BATCHES_DIR)}:',
      f'  {listed(examples.class_names)}',
      f'  {_count(sum(training), "picture")} for training in {where}',
      f'  {_count(test, "picture")} for testing in {TEST_FILE}',
      f'  the names of the classes in {CLASS_NAMES_FILE}',
      'Next:',
      f'  {train} --recipe fast',
      f'  {evaluate} --eval_dir my_eval --run_once',
    ]
  )


def _count(number: int, noun: str) -> str:
  return f'{number:,} {noun}{"s" * (number != 1)}'


def _warn(message: str) -> None:
  print(message, file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
  """Return the arguments of the command line, or exit if they are wrong."""
  parser = argparse.ArgumentParser(
    description="Convert pictures to a data set in CIFAR-10's binary format.",
    allow_abbrev=False,
  )
  parser.add_argument(
    'pictures',
    metavar='PICTURES',
    help='folder with a sub-folder of pictures for each class, or with train '
    "and test that have such sub-folders; or CIFAR-100's "
    'cifar-100-binary.tar.gz, or the folder in it',
  )
  parser.add_argument(
    '--data_dir',
    required=True,
    help='new or empty directory for the data set',
  )
  parser.add_argument(
    '--test_fraction',
    type=float,
    help='fraction of each class that is for testing, unless there are train '
    f'and test (default: {_TEST_FRACTION})',
  )
  parser.add_argument(
    '--seed',
    type=int,
    default=0,
    help='determines which pictures are for testing, and the order of the '
    'records (default: %(default)s)',
  )
  parser.add_argument(
    '--skip_unreadable',
    action='store_true',
    help='leave out pictures that cannot be read, instead of writing nothing',
  )
  return parser.parse_args()


def main() -> None:
  args = parse_arguments()
  loading.prepare_output()
  target = os.path.join(args.data_dir, BATCHES_DIR)
  existed = os.path.lexists(target)
  received: list[int] = []
  patience = math.inf  # monotonic time until which further signals do nothing

  def interrupt(number: int) -> None:
    nonlocal patience
    received.append(number)
    if len(received) == 1:
      patience = time.monotonic() + _PATIENCE_SECS
      raise KeyboardInterrupt
    if time.monotonic() > patience:  # removing files takes less
      os._exit(128 + number)

  try:
    with stop_signals.handled(interrupt):
      files.refuse_remote(sys.argv[1:])
      files.refuse_unusable('--data_dir', args.data_dir)
      convert(
        args.pictures,
        args.data_dir,
        test_fraction=args.test_fraction,
        seed=args.seed,
        skip_unreadable=args.skip_unreadable,
      )
  except UserError as error:
    sys.exit(f'{error}')
  except KeyboardInterrupt:
    if os.path.lexists(target) and not existed:
      _warn(f'Interrupted, but the data set in {args.data_dir} is complete.')
    else:
      _warn('Interrupted; nothing was written.')
    sys.exit(1 if received[0] == signal.SIGINT else 128 + received[0])
  except BrokenPipeError as error:
    loading.discard_output(error)
    sys.exit(1)


if __name__ == '__main__':
  main()
