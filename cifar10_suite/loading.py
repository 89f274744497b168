"""Start of a program: missing packages, its output, TensorFlow's import."""

import contextlib
import errno
import gc
import importlib.util
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

# What all programs import, besides what `require` is told.
_BY_ALL = ('numpy', 'PIL', 'six', 'tqdm', 'filelock')


def require(*modules: str) -> None:
  """Exit with a line that names missing packages; call this before imports.

  Args:
    modules: modules that the program needs besides those that all need.
  """
  _open_closed_output()
  missing = [
    name for name in modules + _BY_ALL if importlib.util.find_spec(name) is None
  ]
  if missing:
    sys.exit(
      f'{sys.executable} lacks {", ".join(missing)}. Install all packages with '
      f'"{sys.executable} -m pip install -r requirements.txt", or use '
      '.venv/bin/python, for which "make train" installs them.'
    )


def prepare_output() -> None:
  """Print lines at once in pipes, too, and names that are not UTF-8 escaped."""
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(line_buffering=True, errors='backslashreplace')


def discard_output(error: OSError) -> None:
  """Discard further output if nobody reads it any more.

  Args:
    error: error of printing.

  Raises:
    OSError: `error`, unless the reader of a pipe, such as 'head', has ended, or
      the terminal.
  """
  if error.errno not in (errno.EPIPE, errno.EIO):
    raise error
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_output() -> None:
  """Let a program run that was started with closed output (`>&-`)."""
  for number, name in ((1, 'stdout'), (2, 'stderr')):
    if getattr(sys, name) is None:
      null = os.open(os.devnull, os.O_RDWR)
      os.dup2(null, number)
      setattr(sys, name, os.fdopen(number, 'w'))


def load_tensorflow() -> None:
  """Import TensorFlow without its log messages; call this before other imports.

  Errors are still raised as exceptions. To see the messages of the C++ runtime,
  set TF_CPP_MIN_LOG_LEVEL=0 in the environment. Ctrl-C during the import, which
  takes seconds, ends a program of this suite at once.
  """
  require('tensorflow', 'absl', 'scipy', 'matplotlib')
  # TensorFlow logs the placement of operations at the lowest level.
  wants_placement = any(
    argument.lstrip('-').startswith('log_device_placement')
    for argument in sys.argv
  )
  level = '0' if wants_placement else '3'
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', level)
  # oneDNN kernels are off by default on older processors.
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')
  # Without a GPU, the import and the first listing of devices print messages
  # that no setting suppresses.
  with (
    _announced(),
    _objects_kept(),
    _keras_left_out(),
    discarded_stderr(),
  ):
    import tensorflow.compat.v1 as tf

    tf.config.list_physical_devices()
  tf.logging.set_verbosity(tf.logging.ERROR)  # hides deprecation of queues


@contextlib.contextmanager
def _announced() -> Iterator[None]:
  """Say on a terminal what takes time, and react to Ctrl-C meanwhile.

  Only for the programs of this suite: others may import them as modules.
  """
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  if os.path.dirname(os.path.abspath(sys.argv[0])) != root:
    yield
    return

  stderr = os.dup(2)  # which `discarded_stderr` replaces

  def stop(*_: object) -> NoReturn:
    os.write(stderr, b'Stopped by SIGINT.\n')
    os._exit(130)  # an exception could get lost in an import

  previous = signal.signal(signal.SIGINT, stop)
  is_terminal = sys.stderr.isatty()
  if is_terminal:
    print('Loading TensorFlow ...', end='\r', file=sys.stderr, flush=True)
  yield
  if is_terminal:
    print('\x1b[K', end='', file=sys.stderr, flush=True)  # clears the line
  signal.signal(signal.SIGINT, previous)
  os.close(stderr)


@contextlib.contextmanager
def _objects_kept() -> Iterator[None]:
  """Exclude the modules imported meanwhile from garbage collection.

  They stay to the end. Visiting their objects again and again, while more are
  imported, while the graph is built and when the program ends, would take more
  than a second.
  """
  gc.disable()
  try:
    yield
  finally:
    gc.freeze()
    gc.enable()


@contextlib.contextmanager
def _keras_left_out() -> Iterator[None]:
  """Keep TensorFlow from importing Keras, which takes a second.

  TensorFlow then looks for an older Keras, and ignores that it is missing.
  Afterwards, `tf.keras` is imported as usual when it is first used.
  """
  name = 'TF_USE_LEGACY_KERAS'
  if name in os.environ:
    yield
    return
  os.environ[name] = '1'
  try:
    yield
  finally:
    del os.environ[name]


@contextlib.contextmanager
def discarded_stderr() -> Iterator[None]:
  """Discard output to file descriptor 2, including that of C++ code."""
  saved = os.dup(2)
  with open(os.devnull, 'wb') as null:
    os.dup2(null.fileno(), 2)
  try:
    yield
  finally:
    os.dup2(saved, 2)
    os.close(saved)
