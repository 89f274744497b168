"""Program startup: shared flags and error messages."""

import os
import sys
import tempfile
from collections.abc import Callable

from absl import app, flags

from cifar10_suite import dataset, files, loading, usage
from cifar10_suite.commands import same_command
from cifar10_suite.errors import UserError, first_line

_ROOT = os.path.dirname(dataset.DEFAULT_DATA_DIR)
DEFAULT_TRAIN_DIR = os.path.join(_ROOT, 'cifar10_train')
DEFAULT_EVAL_DIR = os.path.join(_ROOT, 'cifar10_eval')

_REMOVED_FLAGS = dict.fromkeys(
  ['sync', 'nosync', 'backup_workers'],
  'In a cluster, updates are synchronous without parameter servers, '
  'asynchronous with them.',
)

# Names that other programs use.
_OTHER_NAMES = {
  'lr': '--learning_rate',
  'epochs': '--max_steps (with 128 images per step, an epoch is 391 steps)',
  'steps': '--max_steps',
  'bs': '--batch_size',
  'output_dir': '--train_dir',
  'train_dir': '--checkpoint_dir',
  'model_dir': '--train_dir or --checkpoint_dir',
  'gpus': '--num_gpus of cifar10_multi_gpu_train.py',
  'num_gpus': 'cifar10_multi_gpu_train.py --num_gpus',
}


# TensorFlow's reasons for not writing a file.
_FULL = [os.strerror(number) for number in files.FULL]


def run(main: Callable[..., None], takes_arguments: bool = False) -> None:
  """Parse the flags, run `main` in TF1's graph mode, and exit.

  A `UserError` exits with its message and status 1. Other errors keep their
  traceback.

  Args:
    main: main function of the program.
    takes_arguments: whether `main` takes a list of positional arguments;
      otherwise, they are an error.
  """
  import tensorflow.compat.v1 as tf

  _answer_early(sys.argv[1:])
  loading.prepare_output()
  tf.disable_v2_behavior()
  flags.FLAGS.set_gnu_getopt(True)  # flags may follow other arguments

  def checked_main(argv: list[str]) -> None:
    if len(argv) > 1 and not takes_arguments:
      sys.exit(f'Unexpected argument: {argv[1]} (flags begin with --)')
    try:
      _refuse_values()
      files.refuse_remote(sys.argv[1:])
      main(*([argv[1:]] if takes_arguments else []))
    except UserError as error:
      sys.exit(f'{error}')
    except tf.errors.InvalidArgumentError as error:
      # This assertion is our own; TensorFlow has no specific code for it.
      if dataset.BAD_LABEL not in error.message:
        raise
      what = first_line(error.message)
      sys.exit(what.removeprefix('assertion failed: '))
    except BrokenPipeError as error:
      loading.discard_output(error)
      sys.exit(1)
    except OSError as error:
      if not files.is_full(error):
        raise
      sys.exit(
        _what_is_full(error.filename2 or error.filename, f'{error.strerror}')
      )
    except (
      tf.errors.ResourceExhaustedError,
      tf.errors.OutOfRangeError,
    ) as error:
      path, _, reason = first_line(error.message).partition('; ')
      if reason not in _FULL:
        raise
      sys.exit(_what_is_full(path, reason))
    except KeyboardInterrupt:
      print('Stopped by SIGINT.', file=sys.stderr)  # not among results
      sys.exit(130)

  app.run(checked_main)


def _refuse_values() -> None:
  """Refuse values of flags that TensorFlow could not use.

  Raises:
    UserError: if there is a large number, text that is not UTF-8, or a ~ that
      the shell did not expand.
  """
  for name, value in flags.FLAGS.flag_values_dict().items():
    bits = 63 if name == 'seed' else 31
    if isinstance(value, int) and abs(value) >= 1 << bits:
      raise UserError(f'--{name} {value} is too large: at most 2^{bits} - 1.')
    if isinstance(value, str):
      files.refuse_unusable(f'--{name}', value)


def _what_is_full(path: str | None, reason: str) -> str:
  return (
    f'Cannot write to {path or "a file"}: {reason}. Free some space; '
    f'{same_command()} then continues.'
  )


def _answer_early(arguments: list[str]) -> None:
  """Print help, or what to use instead of a flag that does not exist."""
  for argument in arguments:
    if not argument.startswith('-'):
      continue
    name = argument.lstrip('-').partition('=')[0]
    if name in ('h', 'help'):
      print(usage.text())
      sys.exit(0)
    if name in flags.FLAGS:
      continue
    if name in _REMOVED_FLAGS:
      sys.exit(f'Remove --{name}: it no longer exists. {_REMOVED_FLAGS[name]}')
    if name in _OTHER_NAMES:
      sys.exit(f'Unknown flag --{name}. Did you mean {_OTHER_NAMES[name]}?')


def define_checkpoint_flags() -> None:
  """Define the flags shared by programs that read checkpoints.

  Repeated calls have no further effect.
  """
  if 'checkpoint_dir' not in flags.FLAGS:
    flags.DEFINE_string(
      'checkpoint_dir',
      DEFAULT_TRAIN_DIR,
      'Directory of checkpoints, or one of them; of a directory, the latest is '
      'used. An example of one is cifar10_train/model.ckpt-1000.',
    )
    flags.DEFINE_enum(
      'num_views',
      '1',
      ['1', '2', '10', '50'],
      'Views of each image to average over; 1 is the centre, 2 adds its mirror '
      'image, 10 and 50 are those of 5 and 25 places.',
    )
  for name in ('checkpoint_dir', 'num_views'):
    flags.declare_key_flag(name)


def define_threads_flag() -> None:
  """Define `--num_threads`; repeated calls have no further effect."""
  if 'num_threads' not in flags.FLAGS:
    flags.DEFINE_integer(
      'num_threads',
      None,
      'Threads that compute on the CPU; by default, one per core that the '
      'process may use; for evaluation, half as many, but at least two.',
      lower_bound=1,
    )
  flags.declare_key_flag('num_threads')


def define_eval_dir() -> None:
  """Define the flag for the directory of scores; repeated calls do nothing."""
  if 'eval_dir' not in flags.FLAGS:
    flags.DEFINE_string(
      'eval_dir',
      DEFAULT_EVAL_DIR,
      'Directory for scores and the best checkpoint; also for event files.',
    )
  flags.declare_key_flag('eval_dir')


def prepare_dir(flag: str, path: str) -> None:
  """Create a directory and check that it is writable.

  Args:
    flag: flag that names the directory, for the error message.
    path: path of the directory.

  Raises:
    UserError: if the directory cannot be created or is not writable, or if
      TensorFlow would treat its name as a pattern.
  """
  files.refuse_pattern(f'{flag} {path}', 'Choose another directory.')
  try:
    os.makedirs(path, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except OSError as error:
    raise UserError(
      f'Cannot write to {flag} {path}: {error.strerror}'
    ) from error
