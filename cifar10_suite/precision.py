"""Mixed precision: float16 or bfloat16 over float32 variables.

This module measures whether TensorFlow is fast in these types, and casts
between float32 variables and the compute type, with loss scaling for float16.
"""

import functools
import time
from collections.abc import Callable

import tensorflow.compat.v1 as tf

_MIN_SPEEDUP = 1.2  # over float32, to justify the loss of precision
_BATCH_SIZE = 8  # in measurements
_RUNS = 5
_TOO_SLOW = 20  # times slower than float32: stop measuring after one run

# Gradient of a function of one tensor, for `tf.custom_gradient`.
_Gradient = Callable[[tf.Tensor], tf.Tensor]


@functools.cache
def is_fast(dtype: tf.DType) -> bool:
  """Return whether TensorFlow is faster in a type than in float32 here.

  Processor flags are not a reliable guide: with avx512_fp16, TensorFlow's
  forward convolution in float16 is fast, but its filter gradient and matrix
  products loop over single numbers, a hundred times slower than in float32.
  float16 therefore always counts as slow on CPUs. bfloat16 is measured once per
  process, which takes some tenths of a second.

  Args:
    dtype: float32, float16 or bfloat16.
  """
  if dtype == tf.float32 or tf.config.list_physical_devices('GPU'):
    return True
  return dtype == tf.bfloat16 and speedup(dtype) > _MIN_SPEEDUP


def prefers_bfloat16() -> bool:
  """Return whether training runs on a CPU that is fast in bfloat16."""
  on_gpu = tf.config.list_physical_devices('GPU')
  return not on_gpu and is_fast(tf.bfloat16)


def speedup(dtype: tf.DType) -> float:
  """Return the speed of typical operations in a type relative to float32.

  These are a convolution and a matrix product of the network's sizes, with
  their gradients. The result is 0 if TensorFlow has no kernel for the type.
  """

  def build(dtype: tf.DType) -> Callable[[], list[tf.Operation]]:
    return lambda: [
      *convolution_and_gradients(direct_convolution, dtype),
      *_with_gradients(tf.matmul, [[_BATCH_SIZE, 2304], [2304, 384]], dtype),
    ]

  wide = seconds(build(tf.float32))
  return wide / seconds(build(dtype), limit=_TOO_SLOW * wide)


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


def convolution_and_gradients(
  operation: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], dtype: tf.DType
) -> list[tf.Operation]:
  """Build a convolution of the size of the second layer, and its gradients."""
  shapes = [[_BATCH_SIZE, 12, 12, 64], [5, 5, 64, 64]]
  return _with_gradients(operation, shapes, dtype)


def direct_convolution(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
  """Convolve with TensorFlow's own operation, at stride 1 with padding."""
  return tf.nn.conv2d(x, kernel, strides=1, padding='SAME')


def _with_gradients(
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


def enter_compute_type(variable: tf.Variable, dtype: tf.DType) -> tf.Tensor:
  """Cast a float32 variable to `dtype`, and unscale its gradient.

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
  """Cast activations to float32, and scale their gradient in float16.

  Small gradients vanish in float16. This function therefore multiplies the
  incoming gradient by a loss scale, which `enter_compute_type` removes on the
  way to the variables (Micikevicius et al., "Mixed Precision Training", 2018,
  section 3.2). Neither callers nor optimizers need to handle the scale.
  """
  if x.dtype != tf.float16:
    return tf.cast(x, tf.float32)
  scale = _loss_scale()

  @tf.custom_gradient
  def cast(x: tf.Tensor) -> tuple[tf.Tensor, _Gradient]:
    return tf.cast(x, tf.float32), lambda dy: tf.cast(dy * scale, x.dtype)

  return cast(x)


# The scale doubles after a number of steps without overflow, and each overflow
# halves it.
_INITIAL_LOSS_SCALE = 2.0**15
_STEPS_PER_GROWTH = 1000


def _loss_scale() -> tf.Tensor:
  """Return the graph's loss scale, float32 [].

  A variable holds the scale and the number of steps since its last change. It
  is in no collection, so that it needs no initialization and is not saved in
  checkpoints.
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
  """Set all float16 gradients to zero if one of them overflows.

  In other types, this has no effect.

  Args:
    gradients: (gradient, variable) pairs.

  Returns:
    The pairs, with all gradients zero if any of them is not finite, and the
    operation that adapts the loss scale.
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
