"""Queue runners that leave TensorFlow's threads to the training step."""

import contextlib
from collections.abc import Callable, Iterator

import tensorflow.compat.v1 as tf


@contextlib.contextmanager
def on_own_threads() -> Iterator[None]:
  """Make queue runners that are added in this context use their own threads."""
  runners = tf.get_collection_ref(tf.GraphKeys.QUEUE_RUNNERS)
  count = len(runners)
  yield
  runners[count:] = [
    _OwnThreadQueueRunner(
      runner.queue,
      runner.enqueue_ops,
      runner.close_op,
      runner.cancel_op,
      runner.queue_closed_exception_types,
    )
    for runner in runners[count:]
  ]


class _OwnThreadQueueRunner(tf.train.QueueRunner):
  """Queue runner whose operations start on its own Python thread.

  After an operation that waits for something, such as a file, they continue on
  the thread that ends the wait. Operations of `tf.train.QueueRunner` run on
  TensorFlow's threads, where those of the training step then have to wait: with
  two cores, that costs 2% of the time. In a session of a cluster, TensorFlow
  makes no difference between the two.
  """

  def create_threads(
    self, sess: tf.Session, *args: object, **kwargs: object
  ) -> list:
    """Create threads, like `tf.train.QueueRunner.create_threads`."""
    return super().create_threads(_CallingThreadSession(sess), *args, **kwargs)


class _CallingThreadSession:
  """What a queue runner needs of a session.

  Callables run their operations on the thread that calls them.
  """

  def __init__(self, session: tf.Session):
    self._session = session
    self.run = session.run

  def make_callable(self, operation: tf.Operation) -> Callable[[], None]:
    call = self._session.make_callable(operation, accept_options=True)
    return lambda: call(options=tf.RunOptions(inter_op_thread_pool=-1))

  # A queue runner starts only once per session.
  def __eq__(self, other: object) -> bool:
    return (
      isinstance(other, _CallingThreadSession)
      and self._session is other._session
    )

  def __hash__(self) -> int:
    return hash(self._session)
