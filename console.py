"""The console belongs to the program.

A program imports this before anything that imports TensorFlow, whose start-up
chatter then stays away: errors still arrive, as exceptions, and the C++
runtime's messages come back with TF_CPP_MIN_LOG_LEVEL=0 in the environment.
`run` turns a user's mistake into one line and a non-zero exit status.
"""

import contextlib
import fcntl
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator

from absl import app

# TensorFlow logs where it places operations at the lowest level.
_asked_for_more = any(
  argument.lstrip('-').startswith('log_device_placement')
  for argument in sys.argv
)
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '0' if _asked_for_more else '3')
# oneDNN's convolutions; by default, older processors go without them.
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')


@contextlib.contextmanager
def _discarded_stderr() -> Iterator[None]:
  """Discards what is written to file descriptor 2, C++ code's too."""
  saved = os.dup(2)
  with open(os.devnull, 'wb') as null:
    os.dup2(null.fileno(), 2)
  try:
    yield
  finally:
    os.dup2(saved, 2)
    os.close(saved)


# On a machine without a GPU, the first import and the first look at the devices
# write some lines of which no setting knows.
with _discarded_stderr():
  import tensorflow.compat.v1 as tf

  tf.config.list_physical_devices()

# Deprecation notices of TF1's queues are nothing to the reader.
tf.logging.set_verbosity(tf.logging.ERROR)

import cifar10_checkpoint  # noqa: E402  (after TensorFlow's quiet import)
import cifar10_cluster  # noqa: E402
import cifar10_files  # noqa: E402
import cifar10_input  # noqa: E402
import download  # noqa: E402

# What a user can mend; the message says how.
_MISTAKES = (
  download.DownloadError,
  cifar10_input.DataError,
  cifar10_checkpoint.CheckpointError,
  cifar10_cluster.ClusterError,
)


def run(main: Callable[..., None], takes_arguments: bool = False) -> None:
  """Parses the flags, runs `main` in TF1's graph mode, and exits.

  With `takes_arguments`, `main` is given a list of what is not a flag;
  otherwise, such a thing is a mistake.

  Mistakes that a user can mend end in one message and exit status 1; anything
  else keeps its traceback.
  """
  sys.stdout.reconfigure(line_buffering=True)  # a pipe sees each line at once
  tf.disable_v2_behavior()
  tf.app.flags.FLAGS.set_gnu_getopt(True)  # flags may follow other arguments

  def checked_main(argv: list[str]) -> None:
    if len(argv) > 1 and not takes_arguments:
      sys.exit(f'Unexpected argument: {argv[1]} (flags begin with --)')
    try:
      main(*([argv[1:]] if takes_arguments else []))
    except _MISTAKES as error:
      sys.exit(f'{error}')
    except tf.errors.InvalidArgumentError as error:
      if cifar10_input.BAD_LABEL not in error.message:
        raise
      first_line = error.message.partition('\n')[0]
      sys.exit(first_line.removeprefix('assertion failed: '))
    except BrokenPipeError:  # the reader of a pipe, 'head' say, has enough
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      sys.exit(1)
    except KeyboardInterrupt:
      print('Stopped by SIGINT.')
      sys.exit(130)

  app.run(checked_main)


def prepare_dir(flag: str, path: str) -> None:
  """Makes a directory and sees that it can be written to.

  Args:
    flag: the flag that names the directory, for the message.
    path: the directory.

  Raises:
    SystemExit: it cannot be made or written to, or could not be read again.
  """
  if cifar10_files.is_pattern(path):
    sys.exit(
      f'{flag} {path} has one of the characters * ? [ \\ in its name, which '
      'TensorFlow takes for a pattern. Choose another directory.'
    )
  try:
    os.makedirs(path, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except OSError as error:
    sys.exit(f'Cannot write to {flag} {path}: {error.strerror}')


@contextlib.contextmanager
def locked_dir(flag: str, path: str) -> Iterator[None]:
  """Keeps a directory for this process alone.

  The lock ends with the process, however that ends.

  Args:
    flag: the flag that names the directory, for the message.
    path: the directory.

  Raises:
    SystemExit: another process has it, or the lock would write over a file of
      somebody else.
  """
  lock = os.path.join(path, cifar10_files.LOCK)
  if os.path.exists(lock) and not os.path.isfile(lock):
    sys.exit(f'{lock} is not a lock of this suite. Choose another {flag}.')
  with open(lock, 'a+', errors='replace') as file:
    file.seek(0)
    holder = file.read()
    if not cifar10_files.is_lock(holder):
      sys.exit(f'{lock} is not a lock of this suite. Choose another {flag}.')
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      sys.exit(f'{flag} {path} is in use by {holder or "another process"}.')
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}')
    file.flush()
    yield


def short_path(path: str) -> str:
  """Returns a path as it is shown: from the working directory, if in there."""
  relative = os.path.relpath(path)
  return path if relative.startswith(os.pardir) else relative
