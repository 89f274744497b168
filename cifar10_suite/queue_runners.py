"""Queue runners that leave TensorFlow's threads to the training step."""

import functools
from collections.abc import Callable

import tensorflow.compat.v1 as tf

# TensorFlow's value for "on the calling thread".
_ON_CALLING_THREAD = tf.RunOptions(inter_op_thread_pool=-1)


class OwnThreadQueueRunner(tf.train.QueueRunner):
  """Queue runner whose operations run one by one on its own Python thread.

  Those of `tf.train.QueueRunner` run on TensorFlow's threads, where operations
  of the training step then have to wait: with two cores, that costs 2% of the
  time.
  """

  def create_threads(
    self, sess: tf.Session, *args: object, **kwargs: object
  ) -> list:
    """Create threads, like `tf.train.QueueRunner.create_threads`."""
    return super().create_threads(_CallingThreadSession(sess), *args, **kwargs)


class _CallingThreadSession:
  """What a queue runner needs of a session; callables run as said above."""

  def __init__(self, session: tf.Session):
    self._session = session
    self.run = session.run

  def make_callable(self, operation: tf.Operation) -> Callable[[], None]:
    call = self._session.make_callable(operation, accept_options=True)
    return functools.partial(call, options=_ON_CALLING_THREAD)


def use_own_threads() -> None:
  """Make all queue runners of the default graph run on their own threads."""
  runners = tf.get_collection_ref(tf.GraphKeys.QUEUE_RUNNERS)
  runners[:] = [
    OwnThreadQueueRunner(
      runner.queue,
      runner.enqueue_ops,
      runner.close_op,
      runner.cancel_op,
      runner.queue_closed_exception_types,
    )
    for runner in runners
  ]
