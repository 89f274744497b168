"""Fast convolutions, pooling and matrix products.

The network's second convolution is computed in the frequency domain. Operations
in types for which TensorFlow has no fast kernels are computed in float32.
"""

import functools
from collections.abc import Callable

import numpy as np
import tensorflow.compat.v1 as tf

from cifar10_suite import precision


def convolution(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
  """Convolve with stride 1 and 'SAME' padding, like `tf.nn.conv2d`.

  On CPUs, images with many channels are convolved in the frequency domain,
  which takes fewer operations; in bfloat16, only if a measurement finds it
  faster. This rounds more often: in bfloat16, the error is 0.6% of the standard
  deviation of the results instead of 0.2%.

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
  if precision.is_fast(dtype):
    return operation(*tensors)
  wide = operation(*(tf.cast(tensor, tf.float32) for tensor in tensors))
  return tf.cast(wide, dtype)


def _convolution(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
  many = 16  # channels; with fewer, transforms cost more than they save
  if x.shape.as_list()[-1] >= many and frequencies_are_faster(x.dtype):
    with tf.name_scope('by_frequencies'):
      return _convolution_by_frequencies(x, kernel)
  return precision.direct_convolution(x, kernel)


@functools.cache
def frequencies_are_faster(dtype: tf.DType) -> bool:
  """Return whether convolution in the frequency domain is faster here.

  In float32, it was faster on all processors measured: AMD Zen 3 (AVX2), Zen 4,
  and Intel with AVX-512. In bfloat16, this depends on the processor.
  """
  if tf.config.list_physical_devices('GPU'):
    return False
  if dtype == tf.float32:
    return True
  direct, by_frequencies = (
    precision.seconds(
      functools.partial(precision.convolution_and_gradients, operation, dtype)
    )
    for operation in (
      precision.direct_convolution,
      _convolution_by_frequencies,
    )
  )
  return by_frequencies < direct


def _convolution_by_frequencies(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
  """Convolve in the frequency domain.

  By the convolution theorem, a convolution is a product of Fourier transforms,
  as in Mathieu, Henaff and LeCun, "Fast Training of Convolutional Networks
  through FFTs" (2013). For a 5x5 kernel on 12x12 pixels, this takes 23 * 23 =
  529 products per pair of channels instead of 5 * 5 * 12 * 12 = 3600. The
  transforms along height and width are products with small constant matrices,
  which all channels share.
  """
  height, width, channels = x.shape.as_list()[1:]
  size, _, _, outputs = kernel.shape.as_list()
  of_column, of_kernel_column, to_column = _frequencies(height, size)
  of_row, of_kernel_row, to_row = _frequencies(width, size)
  rows, columns = len(of_column), len(of_row)

  # [h, w, ...] -> [rows, columns, rest]
  def transform(
    first: np.ndarray, second: np.ndarray, values: tf.Tensor
  ) -> tf.Tensor:
    h, w = values.shape.as_list()[:2]
    first, second = (tf.cast(m, values.dtype) for m in (first, second))
    values = tf.matmul(first, tf.reshape(values, [h, -1]))
    return tf.matmul(second, tf.reshape(values, [first.shape[0], w, -1]))

  x = transform(of_column, of_row, tf.transpose(x, [1, 2, 0, 3]))
  kernel = transform(of_kernel_column, of_kernel_row, kernel)
  products = tf.matmul(
    tf.reshape(x, [rows * columns, -1, channels]),
    tf.reshape(kernel, [rows * columns, channels, outputs]),
  )
  y = transform(to_column, to_row, tf.reshape(products, [rows, columns, -1]))
  y = tf.reshape(y, [height, width, -1, outputs])
  return tf.transpose(y, [2, 0, 1, 3])


@functools.cache
def _frequencies(
  length: int, kernel_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Return transform matrices for convolution along one axis.

  With them, y = to_line @ ((of_line @ x) * (of_kernel @ kernel)). They are real
  discrete Fourier transforms of the padded line. The product of two complex
  numbers takes three real products (C. F. Gauss): of the real parts, of the
  imaginary parts, and of the sums of both.

  Args:
    length: number of pixels.
    kernel_size: length of the kernel, an odd number.

  Returns:
    of_line: float32 [n, length].
    of_kernel: float32 [n, kernel_size].
    to_line: float32 [length, n].
  """
  period = length + kernel_size - 1
  frequencies = np.arange(period // 2 + 1)
  waves = np.exp(-2j * np.pi / period * np.outer(frequencies, range(period)))
  is_real = frequencies * 2 % period == 0
  of_line = waves[:, :length]
  # As usual in networks, the kernel is centred and not mirrored.
  of_kernel = waves[:, np.arange(kernel_size) - kernel_size // 2].conj()
  to_line = np.where(is_real, 1, 2)[:, np.newaxis] / period * of_line.conj()
  needed = np.concatenate([np.full_like(is_real, True), ~is_real, ~is_real])

  def parts(z: np.ndarray) -> np.ndarray:
    return np.concatenate([z.real, z.imag, z.real + z.imag])

  # Combines the three products into z's real contribution.
  def combination(z: np.ndarray) -> np.ndarray:
    return np.concatenate([z.real + z.imag, z.imag - z.real, -z.imag])

  return (
    parts(of_line)[needed].astype(np.float32),
    parts(of_kernel)[needed].astype(np.float32),
    combination(to_line)[needed].T.astype(np.float32),
  )
