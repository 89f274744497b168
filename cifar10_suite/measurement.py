"""How long TensorFlow takes for operations on this processor."""

import time
from collections.abc import Callable

import tensorflow.compat.v1 as tf

_RUNS = 4


def seconds(
  *builds: Callable[[], list[tf.Operation]], too_slow: float = float('inf')
) -> list[float]:
  """Return the best times of operations on the CPU in a few runs, in seconds.

  They run in turn, so that other load on the machine affects all of them.

  Args:
    *builds: functions that build the operations of a contestant in the default
      graph.
    too_slow: a contestant that takes more than this many times as long as the
      first one does not run again.

  Returns:
    A time per contestant; infinity if TensorFlow cannot run it.
  """
  config = tf.ConfigProto(
    # The first session of a process sets the number of threads for all others,
    # unless it has separate threads.
    use_per_session_threads=True,
    inter_op_parallelism_threads=1,
    device_count={'GPU': 0},
    # An operation that cannot run must not prevent the others from running.
    graph_options=tf.GraphOptions(place_pruned_graph=True),
  )
  with tf.Graph().as_default(), tf.device('/cpu:0'):
    contestants = []
    for build in builds:
      with tf.variable_scope(None, 'contestant'):  # has separate variables
        contestants.append(build())
    times: list[list[float]] = [[] for _ in builds]
    with tf.Session(config=config) as session:
      session.run(tf.global_variables_initializer())
      for operations in contestants:
        _seconds_of_run(session, operations)  # prepares the kernels
      for _ in range(_RUNS):
        for operations, own in zip(contestants, times, strict=True):
          if not own or min(own) <= too_slow * min(times[0]):
            own.append(_seconds_of_run(session, operations))
  return list(map(min, times))


def _seconds_of_run(
  session: tf.Session, operations: list[tf.Operation]
) -> float:
  start = time.perf_counter()
  try:
    session.run(operations)
  except tf.errors.OpError:
    return float('inf')
  return time.perf_counter() - start


def with_gradients(
  operation: Callable[..., tf.Tensor], shapes: list[list[int]], dtype: tf.DType
) -> list[tf.Operation]:
  """Build an operation on variables of given shapes, and its gradients."""
  arguments = [
    tf.cast(
      tf.get_variable(
        f'x_{"_".join(map(str, shape))}', shape, use_resource=True
      ),
      dtype,
    )
    for shape in shapes
  ]
  result = operation(*arguments)
  return [result.op, *(g.op for g in tf.gradients(result, arguments))]
