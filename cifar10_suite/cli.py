"""Starting a program: a quiet TensorFlow, flags, and what its user sees."""

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator

from absl import app, flags

from cifar10_suite import dataset, files
from cifar10_suite.errors import UserError


def quiet_tensorflow() -> None:
  """Keeps TensorFlow's chatter off the console; call it before its import.

  Errors still arrive, as exceptions. The messages of the C++ runtime come back
  with TF_CPP_MIN_LOG_LEVEL=0 in the environment.
  """
  # TensorFlow logs the placement of operations at the lowest level.
  wants_placement = any(
    argument.lstrip('-').startswith('log_device_placement')
    for argument in sys.argv
  )
  level = '0' if wants_placement else '3'
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', level)
  # oneDNN's kernels; by default, older processors do without them.
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')
  # Without a GPU, the import and the first look at the devices write lines that
  # no setting turns off.
  with _discarded_stderr():
    import tensorflow.compat.v1 as tf

    tf.config.list_physical_devices()
  tf.logging.set_verbosity(tf.logging.ERROR)  # queues are deprecated, and used


def run(main: Callable[..., None], takes_arguments: bool = False) -> None:
  """Parses the flags, runs `main` in TF1's graph mode, and exits.

  A `UserError` ends the program with its message and status 1; any other error
  keeps its traceback.

  Args:
    main: the program.
    takes_arguments: whether `main` takes a list of the arguments that are no
      flags; otherwise, such an argument is a mistake.
  """
  import tensorflow.compat.v1 as tf

  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(line_buffering=True)  # a pipe sees each line at once
  tf.disable_v2_behavior()
  flags.FLAGS.set_gnu_getopt(True)  # flags may follow other arguments

  def checked_main(argv: list[str]) -> None:
    if len(argv) > 1 and not takes_arguments:
      sys.exit(f'Unexpected argument: {argv[1]} (flags begin with --)')
    try:
      main(*([argv[1:]] if takes_arguments else []))
    except UserError as error:
      sys.exit(f'{error}')
    except tf.errors.InvalidArgumentError as error:
      # The message of our own assertion; TensorFlow has no other code for it.
      if dataset.BAD_LABEL not in error.message:
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


def define_checkpoint_flags(checkpoint_dir: str) -> None:
  """Defines the flags of all programs that read checkpoints, once.

  Args:
    checkpoint_dir: the default of `--checkpoint_dir`.
  """
  if 'checkpoint_dir' not in flags.FLAGS:
    flags.DEFINE_string(
      'checkpoint_dir',
      checkpoint_dir,
      'Directory of the checkpoints.',
    )
    flags.DEFINE_enum(
      'num_views',
      '1',
      ['1', '2', '10'],
      'Views of each image to average over: 1 is its centre, 2 adds its mirror '
      'image, 10 are centre, corners and their mirror images.',
    )
  for name in ('checkpoint_dir', 'num_views'):
    flags.declare_key_flag(name)


def prepare_dir(flag: str, path: str) -> None:
  """Makes a directory and checks that it can be written to.

  Args:
    flag: the flag that names the directory, for the message.
    path: the directory.

  Raises:
    UserError: it cannot be made or written to, or could not be read again.
  """
  if files.is_pattern(path):
    raise UserError(
      f'{flag} {path} has one of the characters * ? [ \\ in its name, which '
      'TensorFlow takes for a pattern. Choose another directory.'
    )
  try:
    os.makedirs(path, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except OSError as error:
    raise UserError(
      f'Cannot write to {flag} {path}: {error.strerror}'
    ) from error


def short_path(path: str) -> str:
  """Returns a path as it is shown: relative if in the working directory."""
  try:
    relative = os.path.relpath(path)
  except ValueError:  # on another drive
    return path
  return path if relative.startswith(os.pardir) else relative


@contextlib.contextmanager
def _discarded_stderr() -> Iterator[None]:
  """Discards what is written to file descriptor 2, by C++ code too."""
  saved = os.dup(2)
  with open(os.devnull, 'wb') as null:
    os.dup2(null.fileno(), 2)
  try:
    yield
  finally:
    os.dup2(saved, 2)
    os.close(saved)
