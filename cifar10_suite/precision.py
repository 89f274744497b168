"""Computing in float16 or bfloat16, over float32 variables.

Where TensorFlow is fast in these types, found by measuring; casts between the
variables' float32 and the compute type, with loss scaling for float16.
"""

import functools
import time
from collections.abc import Callable

import tensorflow.compat.v1 as tf

_MIN_SPEEDUP = 1.2  # over float32, for a type to be worth its rounding
_BATCH_SIZE = 8  # of what is measured
_RUNS = 5
_TOO_SLOW = 20  # times as long as float32: one run shows it

# The gradient of a function of one tensor, for `tf.custom_gradient`.
_Gradient = Callable[[tf.Tensor], tf.Tensor]


@functools.cache
def is_fast(dtype: tf.DType) -> bool:
  """Returns whether TensorFlow computes faster here in a type than in float32.

  A processor's flags do not tell: with avx512_fp16, TensorFlow's forward
  convolution in float16 is fast, but the gradient of its filter and the matrix
  products are loops over single numbers, a hundred times as slow as float32. So
  float16 counts as slow on processors. bfloat16 is measured, once a process,
  which takes some tenths of a second.

  Args:
    dtype: float32, float16 or bfloat16.
  """
  if dtype == tf.float32 or tf.config.list_physical_devices('GPU'):
    return True
  return dtype == tf.bfloat16 and speedup(dtype) > _MIN_SPEEDUP


def prefers_bfloat16() -> bool:
  """Returns whether a processor computes here, and in bfloat16 the fastest."""
  on_gpu = tf.config.list_physical_devices('GPU')
  return not on_gpu and is_fast(tf.bfloat16)


def speedup(dtype: tf.DType) -> float:
  """Returns how many times as fast as in float32 the network's kind of work is.

  That is a convolution and a matrix product of the network's sizes, with their
  gradients. It is 0 where TensorFlow has no kernel at all.
  """

  def build(dtype: tf.DType) -> Callable[[], list[tf.Operation]]:
    return lambda: [
      *convolution_and_gradients(_conv2d, dtype),
      *_with_gradients(tf.matmul, [[_BATCH_SIZE, 2304], [2304, 384]], dtype),
    ]

  wide = seconds(build(tf.float32))
  return wide / seconds(build(dtype), limit=_TOO_SLOW * wide)


def seconds(
  build: Callable[[], list[tf.Operation]], limit: float = float('inf')
) -> float:
  """Returns how long operations take on the processor, the best of a few runs.

  Args:
    build: adds the operations to the default graph.
    limit: seconds; after a run that took longer there is no other.

  Returns:
    Infinity where TensorFlow cannot run them.
  """
  # The first session of a process sets the number of threads for all others,
  # unless it has its own.
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


def convolution_and_gradients(
  operation: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], dtype: tf.DType
) -> list[tf.Operation]:
  """Builds a convolution like the network's second one, and its gradients."""
  shapes = [[_BATCH_SIZE, 12, 12, 64], [5, 5, 64, 64]]
  return _with_gradients(operation, shapes, dtype)


def _conv2d(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
  return tf.nn.conv2d(x, kernel, strides=1, padding='SAME')


def _with_gradients(
  operation: Callable[..., tf.Tensor], shapes: list[list[int]], dtype: tf.DType
) -> list[tf.Operation]:
  """Applies an operation to variables of some shapes; returns all to run."""
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


def enter_compute_type(variable: tf.Variable, dtype: tf.DType) -> tf.Tensor:
  """Casts a float32 variable to `dtype`; its gradient comes out unscaled.

  See `leave_compute_type`.
  """
  value = tf.convert_to_tensor(variable)
  if dtype != tf.float16:
    return tf.cast(value, dtype)
  scale = _loss_scale()

  @tf.custom_gradient
  def cast(value: tf.Tensor) -> tuple[tf.Tensor, _Gradient]:
    return tf.cast(value, dtype), lambda dy: tf.cast(dy, tf.float32) / scale

  return cast(value)


def leave_compute_type(x: tf.Tensor) -> tf.Tensor:
  """Casts activations to float32.

  Small gradients vanish in float16. So between here, where they come in, and
  `enter_compute_type`, where they go out to the variables, they are multiplied
  by a loss scale (Micikevicius et al., "Mixed Precision Training", 2018,
  section 3.2). No caller has to know, not even an optimizer.
  """
  if x.dtype != tf.float16:
    return tf.cast(x, tf.float32)
  scale = _loss_scale()

  @tf.custom_gradient
  def cast(x: tf.Tensor) -> tuple[tf.Tensor, _Gradient]:
    return tf.cast(x, tf.float32), lambda dy: tf.cast(dy * scale, x.dtype)

  return cast(x)


# The scale doubles after so many steps without an overflow, and is halved by
# each.
_INITIAL_LOSS_SCALE = 2.0**15
_STEPS_PER_GROWTH = 1000


def _loss_scale() -> tf.Tensor:
  """Returns the graph's loss scale, float32 [].

  It and the number of steps since it last changed make up a variable that is in
  no collection of variables: it starts by itself, and no checkpoint has it.
  """
  if not tf.get_collection('loss_scale'):
    with tf.control_dependencies(None), tf.device('/cpu:0'):
      initial = tf.constant([_INITIAL_LOSS_SCALE, 0.0])
      state = tf.Variable(
        initial,
        trainable=False,
        collections=[],
        use_resource=True,
        name='loss_scale',
      )
      current = tf.cond(
        tf.is_variable_initialized(state), state.read_value, lambda: initial
      )
    tf.get_collection_ref('loss_scale').extend([state, current])
  return tf.get_collection('loss_scale')[1][0]


def without_overflow(
  gradients: list[tuple[tf.Tensor | None, tf.Variable]],
) -> tuple[list[tuple[tf.Tensor | None, tf.Variable]], tf.Operation]:
  """Makes a step whose float16 gradients overflow change nothing.

  Args:
    gradients: (gradient, variable) pairs.

  Returns:
    The pairs, the gradients all zero if one of them is not finite, and the
    operation that adapts the loss scale. In other types, nothing changes.
  """
  if not tf.get_collection('loss_scale'):
    return gradients, tf.no_op()
  state, current = tf.get_collection('loss_scale')
  finite = tf.reduce_all(
    [
      tf.reduce_all(tf.math.is_finite(gradient))
      for gradient, _ in gradients
      if gradient is not None
    ]
  )
  scale, steps = current[0], current[1] + 1
  grows = steps >= _STEPS_PER_GROWTH
  good = tf.where(grows, [2 * scale, 0.0], [scale, steps])
  adapt = state.assign(tf.where(finite, good, [scale / 2, 0.0]))
  kept = [
    (None if g is None else tf.where_v2(finite, g, tf.zeros_like(g)), v)
    for g, v in gradients
  ]
  return kept, adapt.op
