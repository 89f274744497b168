"""Functions that XLA compiles.

TensorFlow runs a chain of small operations one by one, and each reads and
writes all of its data in memory. XLA compiles the chain into one kernel.
"""

import functools
from collections.abc import Callable

import tensorflow.compat.v1 as tf

from cifar10_suite import measurement

_MIN_SIZE = 100000  # elements of the largest tensor


def compiled(function: Callable) -> Callable:
  """Decorate a function of tensors so that XLA compiles it, where it can.

  Otherwise, TensorFlow runs its operations one by one, with the same results up
  to rounding. Random operations do not belong in the function: XLA ignores
  their seeds.
  """
  kernel = tf.function(function, jit_compile=True, autograph=False)

  @functools.wraps(function)
  def call(*arguments: object) -> object:
    tensors = [value for value in arguments if tf.is_tensor(value)]
    return (kernel if can_compile(*tensors) else function)(*arguments)

  return call


def can_compile(*tensors: tf.Tensor) -> bool:
  """Return whether XLA can compile a function of these tensors, and should.

  XLA compiles for fixed shapes, so all must be known. It takes a tenth of a
  second, which small tensors do not repay. On GPUs, TensorFlow's own kernels
  serve well, and XLA may lack a part of its toolchain.
  """
  on_cpu = not tf.config.get_visible_devices('GPU') or all(
    'CPU' in tensor.device.upper() for tensor in tensors
  )
  sizes = [tensor.shape.num_elements() for tensor in tensors]
  return (
    on_cpu and None not in sizes and max(sizes) >= _MIN_SIZE and _is_available()
  )


def cast(x: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
  """Cast float32 like `tf.cast`, but faster within a compiled function.

  XLA's own cast to bfloat16 tests each number for NaN. This one adds half a
  unit of the last place to the bits, or a little less so that ties go to even,
  and drops their lower half. It keeps infinity, and all NaNs that result from
  arithmetic.
  """
  if dtype != tf.bfloat16:
    return tf.cast(x, dtype)
  bits = tf.bitcast(x, tf.int32)
  last_place = tf.bitwise.bitwise_and(tf.bitwise.right_shift(bits, 16), 1)
  upper_half = tf.bitwise.right_shift(bits + 0x7FFF + last_place, 16)
  return tf.bitcast(tf.cast(upper_half, tf.int16), dtype)


@functools.cache
def _is_available() -> bool:
  """Return whether this build of TensorFlow can compile for the CPU."""
  function = tf.function(tf.negative, jit_compile=True, autograph=False)
  (seconds,) = measurement.seconds(lambda: [function(tf.ones([1])).op])
  return seconds < float('inf')
