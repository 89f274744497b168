"""Sessions for training: their configuration, and signals while they run."""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator

import tensorflow.compat.v1 as tf

from cifar10_suite import stop_signals
from cifar10_suite.commands import same_command

_PATIENCE_SECS = 5  # after a signal, until another one ends the process


def session_config(log_device_placement: bool = False) -> tf.ConfigProto:
  """Return the configuration of a session for training.

  Args:
    log_device_placement: whether to log the device of each operation.
  """
  config = tf.ConfigProto(
    allow_soft_placement=True, log_device_placement=log_device_placement
  )
  config.gpu_options.allow_growth = True  # evaluation may share the GPU
  if not tf.config.get_visible_devices('GPU'):
    # One thread more than for a single chain of operations: it runs the other
    # half of a batch (see `convolution.num_parts`), or Muon's update of a layer
    # during the backward pass of earlier ones.
    config.inter_op_parallelism_threads = 2
    # TensorFlow would optimize the graph twice for each set of fetches. Once
    # gives steps of the same speed, and the first one sooner.
    config.graph_options.rewrite_options.meta_optimizer_iterations = 1
  return config


@contextlib.contextmanager
def collected_signals(
  received: list[int], saves: bool = True
) -> Iterator[None]:
  """Collect the numbers of SIGINT, SIGTERM and SIGHUP in a list, on arrival.

  The caller is expected to stop soon. Because it may be blocked in TensorFlow,
  which ignores signals, another signal at least five seconds later ends the
  process.

  Args:
    received: the list, which this empties first.
    saves: whether this process saves the step, for the message.
  """
  received.clear()
  with stop_signals.handled(received.append):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(
      target=_end_if_repeated, args=[reader, saves], daemon=True
    ).start()
    try:
      yield
    finally:
      signal.set_wakeup_fd(-1)
      os.close(writer)


def _end_if_repeated(reader: int, saves: bool) -> None:
  """End the process if a signal arrives long after the first one.

  Args:
    reader: file descriptor to read from: Python writes the number of each
      signal to the other end of this pipe.
    saves: whether this process saves the step.
  """
  with open(reader, 'rb', buffering=0) as pipe:
    number = pipe.read(1)
    deadline = time.monotonic() + _PATIENCE_SECS
    while number and (left := deadline - time.monotonic()) > 0:
      if select.select([pipe], [], [], left)[0]:
        number = pipe.read(1)  # nothing once the pipe is closed
    if not number:
      return
    again = f'Another {_name(number)} exits at once'
    if saves:
      print(f'Still completing the step. {again}, without saving.', flush=True)
    else:
      print(f'Still waiting for other tasks. {again}.', flush=True)
    number = pipe.read(1)
    if not number:
      return
    again = same_command().capitalize()
    print(
      f'Stopped by {_name(number)} during a step. {again} resumes from the '
      'last checkpoint.',
      flush=True,
    )
    os._exit(128 + number[0])


def _name(number: bytes) -> str:
  return signal.Signals(number[0]).name
