"""Queue runners that leave TensorFlow's threads to the training step."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import tensorflow.compat.v1 as tf

_NICENESS = 5  # a third of the processor time of a thread of normal priority


@contextlib.contextmanager
def on_own_threads() -> Iterator[None]:
  """Run each queue runner that this context adds on a separate Python thread.

  If a queue runner has several operations, it runs all of them each time, so
  that none gets ahead.
  """
  runners = tf.get_collection_ref(tf.GraphKeys.QUEUE_RUNNERS)
  count = len(runners)
  yield
  runners[count:] = [
    _OwnThreadQueueRunner(
      runner.queue,
      [tf.group(*runner.enqueue_ops)],
      runner.close_op,
      runner.cancel_op,
      runner.queue_closed_exception_types,
    )
    for runner in runners[count:]
  ]


class _OwnThreadQueueRunner(tf.train.QueueRunner):
  """Queue runner whose operations run on its own Python thread.

  When an operation has to wait, for example for a full queue, those that depend
  on it run on the thread that ends the wait. A `tf.train.QueueRunner` uses
  TensorFlow's threads, where a training step has to wait for its operations:
  with two cores, that costs 2% of the time. In a cluster, this one uses them,
  too, since TensorFlow then ignores the choice of threads.

  On Linux, the thread has a lower priority, since the step waits for each of
  its own threads, but not for the input, as long as batches are ready.
  """

  def create_threads(
    self, sess: tf.Session, *args: object, **kwargs: object
  ) -> list:
    """Create threads, like `tf.train.QueueRunner.create_threads`."""
    return super().create_threads(_CallingThreadSession(sess), *args, **kwargs)


class _CallingThreadSession:
  """The part of a session that a queue runner uses.

  Callables, which fill the queue, run on the thread that calls them. `run`,
  which closes the queue, is that of the session.
  """

  def __init__(self, session: tf.Session):
    self._session = session
    self.run = session.run

  def make_callable(self, operation: tf.Operation) -> Callable[[], None]:
    # A queue runner calls this on its thread. Elsewhere than on Linux, all
    # threads of the process would have a lower priority.
    if sys.platform == 'linux':
      os.nice(_NICENESS)
    call = self._session.make_callable(operation, accept_options=True)
    # -1 is the calling thread, instead of a pool of threads.
    return lambda: call(options=tf.RunOptions(inter_op_thread_pool=-1))

  # A queue runner starts only once per session, which it finds by equality.
  def __eq__(self, other: object) -> bool:
    return (
      isinstance(other, _CallingThreadSession)
      and self._session is other._session
    )

  def __hash__(self) -> int:
    return hash(self._session)
