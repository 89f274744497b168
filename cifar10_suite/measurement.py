"""How long TensorFlow takes for operations on this processor."""

import time
from collections.abc import Callable

import tensorflow.compat.v1 as tf

_RUNS = 4


def seconds(
  build: Callable[[], list[tf.Operation]], limit: float = float('inf')
) -> float:
  """Return the best time of operations on the CPU in a few runs, in seconds.

  Args:
    build: builds the operations in the default graph.
    limit: seconds; a run that takes longer is the last one.

  Returns:
    The time, or infinity if TensorFlow cannot run the operations.
  """
  # The first session of a process sets the number of threads for all others,
  # unless it has separate threads.
  config = tf.ConfigProto(
    use_per_session_threads=True,
    inter_op_parallelism_threads=1,
    device_count={'GPU': 0},
  )
  best = float('inf')
  with tf.Graph().as_default(), tf.device('/cpu:0'):
    operations = build()
    with tf.Session(config=config) as session:
      try:
        session.run(tf.global_variables_initializer())
        session.run(operations)  # prepares the kernels
        for _ in range(_RUNS):
          start = time.perf_counter()
          session.run(operations)
          best = min(best, time.perf_counter() - start)
          if best > limit:
            break
      except tf.errors.OpError:
        pass
  return best


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
