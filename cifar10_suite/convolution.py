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
  through FFTs" (2013). For a 5x5 kernel on 12x12 pixels, this takes 7 * 14 * 3
  = 294 products per pair of channels instead of 5 * 5 * 12 * 12 = 3600. The
  transforms along height and width are products with small constant matrices,
  which all channels share.
  """
  height, width, channels = x.shape.as_list()[1:]
  size, _, _, outputs = kernel.shape.as_list()
  of_column, of_kernel_column, to_column = _of_columns(height, size)
  of_row, of_kernel_row, to_row = _of_rows(width, size)
  rows = len(of_column) // 2  # frequencies of columns
  columns = len(of_row)  # three for each frequency of rows

  def by(matrix: np.ndarray, values: tf.Tensor) -> tf.Tensor:
    return tf.matmul(tf.cast(matrix, values.dtype), values)

  def transform(
    column: np.ndarray, row: np.ndarray, values: tf.Tensor
  ) -> tf.Tensor:
    """Transform [h, w, n, channels] to [rows * columns, n, channels]."""
    h, w, n, depth = values.shape.as_list()
    values = by(column, tf.reshape(values, [h, -1]))
    # Real parts of a row, then imaginary parts.
    values = by(row, tf.reshape(values, [rows, 2 * w, -1]))
    return tf.reshape(values, [rows * columns, n or -1, depth])

  products = tf.matmul(
    transform(of_column, of_row, tf.transpose(x, [1, 2, 0, 3])),
    transform(of_kernel_column, of_kernel_row, kernel),
  )
  y = by(to_row, tf.reshape(products, [rows, columns, -1]))
  y = by(to_column, tf.reshape(y, [2 * rows, -1]))
  return tf.transpose(tf.reshape(y, [height, width, -1, outputs]), [2, 0, 1, 3])


# A product of two complex numbers takes three real products (C. F. Gauss): of
# the real parts, of the imaginary parts, and of the sums of both.
_TO_FACTORS = [[1, 0], [0, 1], [1, 1]]  # from real and imaginary part
_FROM_PRODUCTS = [[1, -1, 0], [-1, -1, 1]]  # to real and imaginary part


def _of_rows(
  length: int, kernel_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Return matrices to convolve rows of complex numbers.

  With them, y = to_row @ ((of_row @ x) * (of_kernel @ kernel)), where x, kernel
  and y are real parts followed by imaginary parts.

  Returns:
    of_row: float32 [3 * n, 2 * length].
    of_kernel: float32 [3 * n, 2 * kernel_size].
    to_row: float32 [2 * length, 3 * n].
  """
  of_row, of_kernel, to_row = _frequencies(length, kernel_size)

  def on_parts(z: np.ndarray) -> np.ndarray:
    return np.block([[z.real, -z.imag], [z.imag, z.real]])

  identity = np.eye(len(of_row))
  to_factors = np.kron(_TO_FACTORS, identity)
  from_products = np.kron(_FROM_PRODUCTS, identity)
  return (
    (to_factors @ on_parts(of_row)).astype(np.float32),
    (to_factors @ on_parts(of_kernel)).astype(np.float32),
    (on_parts(to_row) @ from_products).astype(np.float32),
  )


def _of_columns(
  length: int, kernel_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Return matrices to convolve columns of real numbers.

  They compute one frequency of each conjugate pair, as a real part followed by
  an imaginary part. Otherwise, they correspond to those of `_of_rows`.

  Returns:
    of_column: float32 [n, length].
    of_kernel: float32 [n, kernel_size].
    to_column: float32 [length, n].
  """
  of_column, of_kernel, to_column = _frequencies(length, kernel_size)
  half = len(of_column) // 2

  def parts(z: np.ndarray) -> np.ndarray:
    pairs = np.stack([z.real, z.imag], axis=1)
    return pairs[:half].reshape(2 * half, -1).astype(np.float32)

  # The real part of a sum over all frequencies is twice that over one of each
  # pair.
  return parts(of_column), parts(of_kernel), parts(2 * to_column.T.conj()).T


def _frequencies(
  length: int, kernel_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Return the transforms for convolution along one axis.

  They treat a line as one period of an infinite one that changes its sign from
  period to period. Then no frequency is real, so that all can be computed
  alike. Up to the period's length, the line is padded with zeros, fewer than
  the kernel needs to be wide: what reaches into the next period, and so wraps
  around, stays outside the first `length` results.

  Returns:
    of_line: complex [n, length], n even. Rows k and n - 1 - k are conjugates.
    of_kernel: complex [n, kernel_size].
    to_line: complex [length, n].
  """
  period = length + kernel_size // 2
  period += period % 2
  frequencies = np.arange(period) + 0.5
  waves = np.exp(-2j * np.pi / period * np.outer(frequencies, range(period)))
  of_line = waves[:, :length]
  # As usual in networks, the kernel is centred and not mirrored.
  centred = np.arange(kernel_size) - kernel_size // 2
  of_kernel = np.exp(2j * np.pi / period * np.outer(frequencies, centred))
  return of_line, of_kernel, of_line.T.conj() / period
