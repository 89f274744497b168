"""Fast convolutions, pooling and matrix products.

The network's second convolution is computed in the frequency domain. Operations
in types for which TensorFlow has no fast kernels are computed in float32.
"""

import functools
from collections.abc import Callable

import tensorflow.compat.v1 as tf

from cifar10_suite import frequencies, measurement

_MIN_SPEEDUP = 1.2  # over float32, to justify the loss of precision
_TOO_SLOW = 20  # times slower than float32: stop measuring after one run


def convolution(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
  """Convolve with stride 1 and 'SAME' padding, like `tf.nn.conv2d`.

  On CPUs, images with many channels are convolved in the frequency domain,
  which takes fewer operations; in bfloat16, only if a measurement finds it
  faster. This rounds more often: in bfloat16, the error is 0.7% of the standard
  deviation of the results instead of 0.3%.

  Args:
    x: float32, float16 or bfloat16 [batch, height, width, channels].
    kernel: [size, size, channels, outputs], where size is odd; dtype of `x`.

  Returns:
    [batch, height, width, outputs], in the dtype of `x`.
  """
  return _in_a_fast_type(_convolution, x, kernel)


def max_pool(x: tf.Tensor, name: str) -> tf.Tensor:
  """Apply 3x3 max pooling with stride 2, in the dtype of `x`."""
  return _in_a_fast_type(
    lambda x: tf.nn.max_pool2d(x, 3, strides=2, padding='SAME', name=name), x
  )


def matmul(x: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
  """Multiply [batch, n] by [n, units], in the dtype of both."""
  return _in_a_fast_type(tf.matmul, x, weights)


def _in_a_fast_type(
  operation: Callable[..., tf.Tensor], *tensors: tf.Tensor
) -> tf.Tensor:
  """Run an operation in the dtype of its tensors, or emulate that in float32.

  If TensorFlow has no fast kernels for the dtype, the operation and its
  gradient are computed in float32 and rounded to the dtype, as hardware for it
  would do.
  """
  dtype = tensors[0].dtype
  if is_fast(dtype):
    return operation(*tensors)
  wide = operation(*(tf.cast(tensor, tf.float32) for tensor in tensors))
  return tf.cast(wide, dtype)


def _convolution(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
  many = 16  # channels; with fewer, transforms cost more than they save
  if x.shape.as_list()[-1] >= many and frequencies_are_faster(x.dtype):
    return frequencies.convolution(x, kernel)
  return direct(x, kernel)


def direct(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
  """Convolve like `convolution`, by TensorFlow's own operation."""
  return tf.nn.conv2d(x, kernel, strides=1, padding='SAME')


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
  if dtype != tf.bfloat16:
    return False
  # A small batch tells kernels from loops over single numbers.
  small = 8
  wide = _seconds(direct, tf.float32, small)
  limit = _TOO_SLOW * wide
  if _seconds(direct, dtype, small, limit) > wide:
    return False
  wide = _fastest_seconds(tf.float32) + _product_seconds(tf.float32)
  short = _fastest_seconds(dtype) + _product_seconds(dtype)
  return wide / short > _MIN_SPEEDUP


def prefers_bfloat16() -> bool:
  """Return whether training runs on a CPU that is fast in bfloat16."""
  on_gpu = tf.config.list_physical_devices('GPU')
  return not on_gpu and is_fast(tf.bfloat16)


@functools.cache
def frequencies_are_faster(dtype: tf.DType) -> bool:
  """Return whether convolution in the frequency domain is faster here.

  In float32, it was faster on all processors measured: AMD Zen 3 (AVX2), Zen 4,
  and Intel with AVX-512. In bfloat16, this depends on the processor.
  """
  if tf.config.list_physical_devices('GPU'):
    return False
  return dtype == tf.float32 or (
    _seconds(frequencies.convolution, dtype) < _seconds(direct, dtype)
  )


def _fastest_seconds(dtype: tf.DType) -> float:
  if frequencies_are_faster(dtype):
    return _seconds(frequencies.convolution, dtype)
  return _seconds(direct, dtype)


_BATCH_SIZE = 128  # in measurements


@functools.cache
def _seconds(
  convolve: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
  dtype: tf.DType,
  batch_size: int = _BATCH_SIZE,
  limit: float = float('inf'),
) -> float:
  """Return the time of the second layer's convolution and its gradients."""
  shapes = [[batch_size, 12, 12, 64], [5, 5, 64, 64]]
  return measurement.seconds(
    lambda: measurement.with_gradients(convolve, shapes, dtype), limit
  )


def _product_seconds(dtype: tf.DType) -> float:
  shapes = [[_BATCH_SIZE, 2304], [2304, 384]]
  return measurement.seconds(
    lambda: measurement.with_gradients(tf.matmul, shapes, dtype)
  )
