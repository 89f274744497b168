"""How sessions for training run: their threads, and signals meanwhile."""

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
    # Run one operation at a time on all cores, which then share their caches.
    config.inter_op_parallelism_threads = 1
  return config


def step_options() -> tf.RunOptions | None:
  """Return the options for running a training step.

  Without a GPU, the calling thread runs the operations of the step, so that
  those of the input run at the same time in the session's thread.
  """
  if tf.config.list_physical_devices('GPU'):
    return None
  return tf.RunOptions(inter_op_thread_pool=-1)


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
