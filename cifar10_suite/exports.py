"""Export of a model to a new file or directory, compared with its checkpoint.

`export_formats` has the formats.
"""

import os
import secrets
import shutil
import signal
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import numpy as np
import tensorflow.compat.v1 as tf

from cifar10_suite import stop_signals
from cifar10_suite.errors import UserError, first_line
from cifar10_suite.export_formats import Network

_BATCH_SIZE = 100
_TOLERANCE = 1e-3  # of probabilities, without quantization
_MAX_LOST = 0.01  # of the images, with quantization


class Reference(NamedTuple):
  """What an exported model is compared with.

  Attributes:
    images: uint8 [n, 32, 32, 3].
    labels: integers [n].
    probabilities: float32 [n, classes], by the checkpoint.
  """

  images: np.ndarray
  labels: np.ndarray
  probabilities: np.ndarray


def refuse_existing(flag: str, path: str) -> None:
  """Raise UserError if a path that a flag names exists already."""
  if os.path.lexists(path):
    raise UserError(f'{flag} {path} already exists: choose a new name.')


def export(
  flag: str,
  path: str,
  write: Callable[[str], None],
  load: Callable[[str], Network],
  reference: Reference,
  is_quantized: bool = False,
) -> str:
  """Write a model, compare it with the checkpoint, and put it in place.

  Args:
    flag: flag that names the path, for error messages.
    path: file or directory to create.
    write: writes the model to a path.
    load: loads it from there.
    reference: pictures, and the predictions of the checkpoint.
    is_quantized: whether the model may differ, and only the precision counts.

  Returns:
    A line about the comparison.

  Raises:
    UserError: if the path exists or cannot be written, or if the model's
      predictions are not those of the checkpoint.
  """
  path = path.rstrip('/')
  temporary = f'{path}.{secrets.token_hex(4)}.tmp'
  try:
    with stop_signals.handled(_stop):
      os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
      write(temporary)
      comparison = _compare(flag, load(temporary), reference, is_quantized)
      refuse_existing(flag, path)
      os.replace(temporary, path)
  except (OSError, tf.errors.OpError) as error:
    reason = first_line(f'{error}')
    raise UserError(f'Cannot write to {flag} {path}: {reason}') from error
  finally:
    if os.path.isdir(temporary):
      shutil.rmtree(temporary)
    elif os.path.exists(temporary):
      os.remove(temporary)
  return comparison


def _stop(number: int) -> NoReturn:
  """End the program by an exception, so that unfinished files are removed."""
  if number == signal.SIGINT:
    raise KeyboardInterrupt
  raise SystemExit(128 + number)


def _compare(
  flag: str, network: Network, reference: Reference, is_quantized: bool
) -> str:
  """Describe the difference of a model from the checkpoint.

  Raises:
    UserError: if it is too large.
  """
  probabilities = in_batches(network, reference.images)
  difference = np.abs(probabilities - reference.probabilities).max()
  before, after = (  # numbers of images
    np.count_nonzero(np.argmax(values, axis=1) == reference.labels)
    for values in (reference.probabilities, probabilities)
  )
  count = len(reference.labels)
  comparison = (
    f'precision {after / count:.4f} on {count} test images (checkpoint '
    f'{before / count:.4f}), probabilities within {difference:.1e}'
  )
  if is_quantized:
    is_good = before - after <= max(1, _MAX_LOST * count)
  else:
    is_good = difference <= _TOLERANCE
  if not (is_good and np.isfinite(difference)):
    raise UserError(
      f'{flag}: the model was not kept, because it differs too much from the '
      f'checkpoint: {comparison}.'
    )
  return comparison


def in_batches(network: Network, images: np.ndarray) -> np.ndarray:
  """Return the predictions for any number of pictures."""
  starts = range(0, len(images), _BATCH_SIZE)
  return np.concatenate([network(images[k : k + _BATCH_SIZE]) for k in starts])
