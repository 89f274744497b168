"""Convolutions, pools and matrix products, as fast as TensorFlow can do them.

The second convolution of the network is computed by its frequencies. Types for
which TensorFlow has no fast kernels go by way of float32.
"""

import functools
from collections.abc import Callable

import numpy as np
import tensorflow.compat.v1 as tf

from cifar10_suite import precision


def convolution(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
  """Convolves at stride 1 into as many pixels, as `tf.nn.conv2d` does.

  On processors, images of many channels are convolved by their frequencies,
  which is less work; those in bfloat16 only where that was measured to be
  faster. It rounds more often: in bfloat16, to within 0.6% of the results'
  spread, not 0.2%.

  Args:
    x: [batch, height, width, channels], float32, float16 or bfloat16.
    kernel: [size, size, channels, outputs], of an odd size and x's type.

  Returns:
    [batch, height, width, outputs], of the type of x.
  """
  return _in_a_fast_type(_convolution, x, kernel)


def max_pool(x: tf.Tensor, name: str) -> tf.Tensor:
  """Pools windows of 3x3 pixels, two apart, in the type of x."""
  return _in_a_fast_type(
    lambda x: tf.nn.max_pool2d(x, 3, strides=2, padding='SAME', name=name), x
  )


def matmul(x: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
  """Multiplies [batch, n] with [n, units], in the type of both."""
  return _in_a_fast_type(tf.matmul, x, weights)


def _in_a_fast_type(
  operation: Callable[..., tf.Tensor], *tensors: tf.Tensor
) -> tf.Tensor:
  """Does an operation in the type of its tensors, or rounds to it.

  Where TensorFlow has no fast kernels for the type, the operation and its
  gradient are computed in float32, and their results rounded to the type, as
  hardware for it would.
  """
  dtype = tensors[0].dtype
  if precision.is_fast(dtype):
    return operation(*tensors)
  wide = operation(*(tf.cast(tensor, tf.float32) for tensor in tensors))
  return tf.cast(wide, dtype)


def _convolution(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
  many = 16  # channels; fewer are not worth the transforms
  if x.shape.as_list()[-1] >= many and frequencies_are_faster(x.dtype):
    with tf.name_scope('by_frequencies'):
      return _convolution_by_frequencies(x, kernel)
  return tf.nn.conv2d(x, kernel, strides=1, padding='SAME')


@functools.cache
def frequencies_are_faster(dtype: tf.DType) -> bool:
  """Returns whether a convolution by frequencies is the faster one here.

  In float32 it was on each processor that it was measured on: AMD Zen 3 (AVX2),
  Zen 4, and Intel with AVX-512. In bfloat16 it depends on the processor.
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
      lambda x, kernel: tf.nn.conv2d(x, kernel, strides=1, padding='SAME'),
      _convolution_by_frequencies,
    )
  )
  return by_frequencies < direct


def _convolution_by_frequencies(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
  """Convolves by transforms along height and width, and products between them.

  By the convolution theorem, a convolution multiplies frequencies, as in
  Mathieu, Henaff and LeCun, "Fast Training of Convolutional Networks through
  FFTs" (2013). A 5x5 kernel on 12x12 pixels takes 23 * 23 = 529 products for
  each pair of channels so, instead of 5 * 5 * 12 * 12 = 3600. The transforms
  are small products with constant matrices, which channels share.
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
  """Returns the matrices of a convolution along one axis by frequencies.

  With them, y = to_line @ ((of_line @ x) * (of_kernel @ kernel)). They are real
  discrete Fourier transforms of the padded line. The product of two complex
  numbers takes three real ones (C. F. Gauss): those of the real parts, of the
  imaginary parts, and of their sums.

  Args:
    length: number of pixels.
    kernel_size: odd.

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
  # Not mirrored, as networks have it, and about its middle.
  of_kernel = waves[:, np.arange(kernel_size) - kernel_size // 2].conj()
  to_line = np.where(is_real, 1, 2)[:, np.newaxis] / period * of_line.conj()
  needed = np.concatenate([np.full_like(is_real, True), ~is_real, ~is_real])

  def parts(z: np.ndarray) -> np.ndarray:
    return np.concatenate([z.real, z.imag, z.real + z.imag])

  # Of the three products, so that z's part comes out.
  def combination(z: np.ndarray) -> np.ndarray:
    return np.concatenate([z.real + z.imag, z.imag - z.real, -z.imag])

  return (
    parts(of_line)[needed].astype(np.float32),
    parts(of_kernel)[needed].astype(np.float32),
    combination(to_line)[needed].T.astype(np.float32),
  )
