"""Mixed precision: float16 or bfloat16 over float32 variables.

This module casts between float32 variables and the compute type, with loss
scaling for float16.
"""

from collections.abc import Callable

import tensorflow.compat.v1 as tf

# Gradient of a function of one tensor, for `tf.custom_gradient`.
_Gradient = Callable[[tf.Tensor], tf.Tensor]


def enter_compute_type(value: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
  """Cast a variable's value, float32, to `dtype`, and unscale its gradient.

  See `leave_compute_type`.
  """
  if dtype != tf.float16:
    return tf.cast(value, dtype)
  scale = _loss_scale()

  @tf.custom_gradient
  def cast(value: tf.Tensor) -> tuple[tf.Tensor, _Gradient]:
    return tf.cast(value, dtype), lambda dy: tf.cast(dy, tf.float32) / scale

  return cast(value)


def leave_compute_type(x: tf.Tensor) -> tf.Tensor:
  """Cast activations to float32; for float16, also scale their gradient.

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
  is in no collection of variables, and so is neither initialized with them nor
  saved. Until its first assignment, the scale is the initial one.
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
  """With float16, set all gradients to zero if one of them overflows.

  In other types, this has no effect. The variables still change by momentum and
  by a weight decay that is not part of the loss.

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
  bad = [tf.maximum(scale / 2, 1.0), 0.0]
  adapt = state.assign(tf.where(finite, good, bad))
  kept = [
    (None if g is None else tf.where_v2(finite, g, tf.zeros_like(g)), v)
    for g, v in gradients
  ]
  return kept, adapt.op
