"""Sessions for training: their configuration, and signals while they run."""

import contextlib
import signal
from collections.abc import Iterator

import tensorflow.compat.v1 as tf


def session_config(log_device_placement: bool = False) -> tf.ConfigProto:
  """Return the configuration of a session for training.

  Args:
    log_device_placement: whether to log the device of each operation.
  """
  config = tf.ConfigProto(
    allow_soft_placement=True, log_device_placement=log_device_placement
  )
  config.gpu_options.allow_growth = True  # evaluation may share the GPU
  if not tf.config.list_physical_devices('GPU'):
    # One thread more than for a single chain of operations: it runs the input,
    # and Muon's update of a layer during the backward pass of earlier ones.
    config.inter_op_parallelism_threads = 2
  return config


@contextlib.contextmanager
def collected_signals(received: list[int]) -> Iterator[None]:
  """Collect SIGINT and SIGTERM, as they arrive, in a list."""
  received.clear()
  previous = {
    number: signal.signal(number, lambda number, _: received.append(number))
    for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
