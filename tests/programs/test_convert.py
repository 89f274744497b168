"""Test the converter as a process."""

import contextlib
import fcntl
import os
import pty
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import PIL.Image
import pytest
from support.conversion import (
  as_set,
  images_of,
  make_cifar100,
  parts,
  read_data_set,
  write_archive,
  write_classes,
)
from support.programs import ROOT, TIMEOUT, wait_until

import cifar10_convert
from cifar10_suite import commands

MANY = 1000  # pictures that take far longer to read than a test waits


COMMAND = [sys.executable, os.path.join(ROOT, 'cifar10_convert.py')]


def run(*arguments, **options):
  """Run the program; return its status, its output and its errors."""
  result = subprocess.run(
    [*COMMAND, *arguments],
    capture_output=True,
    text=True,
    timeout=TIMEOUT,
    **options,
  )
  return result.returncode, result.stdout, result.stderr


@pytest.fixture
def source(tmp_path):
  return str(tmp_path / 'pictures')


@pytest.fixture
def data_dir(tmp_path):
  return str(tmp_path / 'my data')


def test_round_trip(tmp_path, source, data_dir):
  images = write_classes(source, {'ant': 100, 'bee': 50, 'cat': 75})
  flags = ['--data_dir', data_dir, '--test_fraction=0.1', '--seed=3']
  status, output, errors = run(source, *flags)
  assert (status, errors) == (0, '')
  assert output == (
    f'Wrote 3 classes to {data_dir}/cifar-10-batches-bin:\n'
    '  ant, bee, cat\n'
    '  202 pictures for training in data_batch_1.bin\n'
    '  23 pictures for testing in test_batch.bin\n'
    '  the names of the classes in batches.meta.txt\n'
    'Next:\n'
    f"  {commands.of('cifar10_train.py')} --data_dir '{data_dir}' "
    '--train_dir my_train --recipe fast\n'
    f"  {commands.of('cifar10_eval.py')} --data_dir '{data_dir}' "
    '--checkpoint_dir my_train --eval_dir my_eval --run_once\n'
  )
  names, training, test = parts(data_dir)
  assert names == ['ant', 'bee', 'cat']
  np.testing.assert_array_equal(np.bincount(test[:, 0]), [10, 5, 8])
  both = np.concatenate([training, test])
  for label, name in enumerate(names):
    of_class = both[both[:, 0] == label]
    assert as_set(images_of(of_class)) == as_set(images[name])
  again = str(tmp_path / 'again')
  cifar10_convert.convert(source, again, test_fraction=0.1, seed=3)
  assert read_data_set(again) == read_data_set(data_dir)


def test_cifar100(tmp_path, data_dir):
  files = make_cifar100()
  write_archive(tmp_path / 'cifar-100-binary.tar.gz', files)
  status, output, errors = run(
    'cifar-100-binary.tar.gz', '--data_dir', data_dir, cwd=tmp_path
  )
  assert (status, errors) == (0, '')
  assert 'Wrote 100 classes' in output and '200 pictures for train' in output
  for records, name in zip(
    parts(data_dir)[1:], ['train.bin', 'test.bin'], strict=True
  ):
    original = np.frombuffer(files[name], np.uint8).reshape(-1, 3074)
    assert as_set(records) == as_set(original[:, 1:])


def test_unreadable_pictures(tmp_path, source, data_dir):
  images = write_classes(source, {'a': 3, 'b': 4})
  for name in ('a/1.png', 'b/0.png'):
    with open(os.path.join(source, name), 'wb') as file:
      file.write(b'x')
  named = ''.join(
    f'Cannot read pictures/{name}: it is not a picture in a known format.\n'
    for name in ('a/1.png', 'b/0.png')
  )
  command = ['pictures', '--data_dir', data_dir]
  status, output, errors = run(*command, cwd=tmp_path)
  assert (status, output) == (1, '')
  assert errors == (
    f'{named}Cannot read 2 of 7 pictures; nothing was written. Add '
    '--skip_unreadable to leave them out.\n'
  )
  assert os.listdir(tmp_path) == ['pictures']
  status, _, errors = run(*command, '--skip_unreadable', cwd=tmp_path)
  assert status == 0
  assert errors == f'{named}Left out 2 of 7 pictures.\n'
  left = [images['a'][0], images['a'][2], *images['b'][1:]]
  assert as_set(images_of(np.concatenate(parts(data_dir)[1:]))) == as_set(left)


def make_missing(source):
  pass


def make_file(source):
  with open(source, 'w') as file:
    file.write('x')


def make_loose(source):
  write_classes(os.path.dirname(source), {os.path.basename(source): 2})


def make_one_class(source):
  write_classes(source, {'cat': 2})


def make_empty_class(source):
  write_classes(source, {'cat': 2, 'dog': 0})


def make_small_class(source):
  write_classes(source, {'cat': 2, 'dog': 1})


def make_line_break(source):
  write_classes(source, {'cat': 2, 'd\nog': 2})


def make_not_utf8(source):
  write_classes(source, {'cat': 2, os.fsdecode(b'd\xe9g'): 2})


def make_no_test(source):
  write_classes(f'{source}/train', {'cat': 2, 'dog': 2})
  write_classes(f'{source}/val', {'cat': 2, 'dog': 2})


def make_other_names_of_parts(source):
  write_classes(f'{source}/Train', {'cat': 2, 'dog': 2})
  write_classes(f'{source}/test_set', {'cat': 2, 'dog': 2})


def make_parts_in_classes(source):
  for name in ('cat', 'dog'):
    write_classes(f'{source}/{name}', {'train': 2, 'test': 2})


def make_cut_archive(source):
  write_archive(source, make_cifar100())
  os.truncate(source, os.path.getsize(source) // 2)


def make_pickles(source):
  write_archive(source, {'train': b'x', 'meta': b'x'}, 'cifar-100-python')


@pytest.mark.parametrize(
  'make, message',
  [
    (make_missing, 'PICTURES {} does not exist.'),
    (make_file, "{} is neither a folder of pictures nor CIFAR-100's archive"),
    (make_loose, '{} has no sub-folders. Put the pictures of each class into'),
    (make_one_class, "{}: found 1 class ('cat'), but a data set has 2 to 256."),
    (make_empty_class, 'Class dog has no pictures in {}/dog.'),
    (make_small_class, 'Class dog has 1 readable picture, but it needs two'),
    (make_line_break, "{}: the class name 'd\\nog' has a line break. Rename"),
    (
      make_not_utf8,
      "{}: the class name 'd\\udce9g' is not valid UTF-8. Rename",
    ),
    (make_no_test, '{} has train and val, but no test.'),
    (
      make_other_names_of_parts,
      'Train and test_set in {} have the same sub-folders. If these are',
    ),
    (
      make_parts_in_classes,
      'Each class in {} has the sub-folders train and test. Make these the',
    ),
    (
      make_cut_archive,
      "{} is not CIFAR-100's binary version, or it is",
    ),
    (
      make_pickles,
      '{} is a version for Python. Use the binary version',
    ),
  ],
  ids=lambda value: getattr(value, '__name__', '').removeprefix('make_'),
)
def test_mistakes_are_explained(tmp_path, source, data_dir, make, message):
  make(source)
  before = os.listdir(tmp_path)
  status, output, errors = run(source, '--data_dir', data_dir)
  assert (status, output) == (1, '')
  assert errors.startswith(message.format(source))
  assert errors.count('\n') == 1
  assert os.listdir(tmp_path) == before


def test_invalid_fraction(tmp_path, source, data_dir):
  write_classes(source, {'a': 2, 'b': 2})
  status, _, errors = run(source, '--data_dir', data_dir, '--test_fraction=2')
  assert status == 1
  assert errors == '--test_fraction 2.0 is not between 0 and 1, exclusively.\n'
  assert os.listdir(tmp_path) == ['pictures']


def test_what_a_killed_conversion_left_does_not_block(source, data_dir):
  write_classes(source, {'a': 2, 'b': 2})
  os.makedirs(f'{data_dir}/.cifar10-convert-x/cifar-10-batches-bin')
  status, _, errors = run(source, '--data_dir', data_dir)
  assert (status, errors) == (0, '')


@pytest.mark.parametrize('exists', [False, True])
def test_full_disk(tmp_path, source, data_dir, exists):
  def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))

  write_classes(source, {'a': 4, 'b': 4})
  if exists:
    os.mkdir(data_dir)
  before = os.listdir(tmp_path)
  command = [source, '--data_dir', data_dir]
  status, output, errors = run(*command, preexec_fn=limit)
  assert (status, output) == (1, '')
  assert errors == f'Cannot write to --data_dir {data_dir}: File too large.\n'
  assert os.listdir(tmp_path) == before
  assert not exists or os.listdir(data_dir) == []
  assert run(*command)[0] == 0


# The program receives a signal before or after the data set gets its name.
AT_THE_RENAME = """
import os, sys
when, number, *sys.argv[1:] = sys.argv[1:]
rename = os.rename
def signalled(old, new):
  if when == 'after':
    rename(old, new)
  os.kill(os.getpid(), int(number))
os.rename = signalled
import cifar10_convert
cifar10_convert.main()
"""


@pytest.mark.parametrize('when', ['before', 'after'])
@pytest.mark.parametrize(
  ('number', 'status'),
  [(signal.SIGINT, 1), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_signals_at_the_rename(
  tmp_path, source, data_dir, when, number, status
):
  write_classes(source, {'a': 4, 'b': 4})
  result = subprocess.run(
    [sys.executable, '-c', AT_THE_RENAME, when, f'{int(number)}', source]
    + [f'--data_dir={data_dir}'],
    env={**os.environ, 'PYTHONPATH': ROOT},
    capture_output=True,
    text=True,
    timeout=TIMEOUT,
  )
  assert (result.returncode, result.stdout) == (status, '')
  if when == 'before':
    assert result.stderr == 'Interrupted; nothing was written.\n'
    assert os.listdir(tmp_path) == ['pictures']
  else:
    assert result.stderr == (
      f'Interrupted, but the data set in {data_dir} is complete.\n'
    )
    assert len(read_data_set(data_dir)) == 3


needs_readers = pytest.mark.skipif(
  len(os.sched_getaffinity(0)) < 2, reason='one core: no further processes'
)


def status_of(pid):
  with open(f'/proc/{pid}/status') as file:
    return file.read()


class TestInterruption:
  """The program reads many pictures in two processes when something happens."""

  @pytest.fixture(autouse=True)
  def running(self, tmp_path, source, data_dir):
    """Start the program."""
    noise = np.random.RandomState(0).randint(0, 256, [500, 500, 3], np.uint8)
    for folder in ('a', 'b'):
      os.makedirs(f'{source}/{folder}')
      for number in range(MANY):
        os.symlink('../../noise.png', f'{source}/{folder}/{number}.png')
    PIL.Image.fromarray(noise).save(tmp_path / 'noise.png')
    self.terminal, terminal = pty.openpty()
    size = struct.pack('HHHH', 24, 80, 0, 0)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
    self.process = subprocess.Popen(
      [*COMMAND, source, '--data_dir', data_dir],
      stdout=subprocess.DEVNULL,
      stderr=terminal,
      start_new_session=True,
    )
    os.close(terminal)
    self.errors = ''
    yield
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.process.pid, signal.SIGKILL)
    self.process.wait()
    os.close(self.terminal)

  def wait_for_progress(self):
    """Wait until the progress bar advances."""
    while not re.search(rf' [1-9]\d*/{2 * MANY} ', self.errors):
      self.errors += os.read(self.terminal, 1000).decode()

  def finish(self):
    """Return the program's status after it and all its processes ended."""
    deadline = time.monotonic() + TIMEOUT
    with contextlib.suppress(OSError):  # the terminal has no other end
      while select.select([self.terminal], [], [], TIMEOUT)[0]:
        self.errors += os.read(self.terminal, 1000).decode()
        assert time.monotonic() < deadline
    self.process.wait(TIMEOUT)
    with pytest.raises(ProcessLookupError):
      while time.monotonic() < deadline:
        os.killpg(self.process.pid, 0)
        time.sleep(0.05)
    return self.process.returncode

  def workers(self):
    """Return the ids of the processes that read pictures."""
    pid = self.process.pid
    with open(f'/proc/{pid}/task/{pid}/children') as file:
      children = [int(child) for child in file.read().split()]
    found = []
    for child in children:
      # A process that ends may be gone before the file is opened or read.
      with (
        contextlib.suppress(FileNotFoundError, ProcessLookupError),
        open(f'/proc/{child}/cmdline') as file,
      ):
        if 'spawn_main' in file.read():
          found.append(child)
    return found

  @needs_readers
  @pytest.mark.parametrize('when', ['at any time', 'within a result'])
  def test_killed_reader(self, tmp_path, when):
    self.wait_for_progress()
    reader = self.workers()[-1]
    if when == 'within a result':
      os.kill(self.process.pid, signal.SIGSTOP)  # so that pipes become full
      wait_until(lambda: 'State:\tS' in status_of(reader))  # waits for its pipe
    os.kill(reader, signal.SIGKILL)
    os.kill(self.process.pid, signal.SIGCONT)
    assert self.finish() == 1
    assert 'A process that reads pictures was killed' in self.errors
    assert 'Traceback' not in self.errors
    assert sorted(os.listdir(tmp_path)) == ['noise.png', 'pictures']

  @pytest.mark.parametrize(
    'when', [pytest.param('early', marks=needs_readers), 'late']
  )
  def test_control_c(self, tmp_path, when):
    if when == 'late':
      self.wait_for_progress()
    else:  # while the readers start
      while not self.workers():
        assert self.process.poll() is None
        time.sleep(0.01)
    os.killpg(self.process.pid, signal.SIGINT)  # as a terminal does
    started = time.monotonic()
    assert self.finish() == 1
    assert time.monotonic() - started < TIMEOUT / 4
    assert self.errors.endswith('Interrupted; nothing was written.\r\n')
    assert 'Traceback' not in self.errors
    assert sorted(os.listdir(tmp_path)) == ['noise.png', 'pictures']

  @pytest.mark.parametrize(
    ('number', 'status'), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)]
  )
  @pytest.mark.parametrize('kill', [os.kill, os.killpg])
  def test_other_signals(self, tmp_path, number, status, kill):
    self.wait_for_progress()
    kill(self.process.pid, number)
    assert self.finish() == status
    assert self.errors.endswith('Interrupted; nothing was written.\r\n')
    assert 'Traceback' not in self.errors
    assert sorted(os.listdir(tmp_path)) == ['noise.png', 'pictures']

  def test_killed(self, tmp_path):
    self.wait_for_progress()
    self.process.kill()
    assert self.finish() == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == ['noise.png', 'pictures']
