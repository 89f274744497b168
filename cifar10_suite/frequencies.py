"""Convolution in the frequency domain."""

import numpy as np
import tensorflow.compat.v1 as tf


def convolution(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
  """Convolve with stride 1 and 'SAME' padding.

  By the convolution theorem, a convolution is a product of Fourier transforms,
  as in Mathieu, Henaff and LeCun, "Fast Training of Convolutional Networks
  through FFTs" (2013). For a 5x5 kernel on 12x12 pixels, this takes 294
  products per pair of channels instead of 5 * 5 * 12 * 12 = 3600: three for
  each of 7 x 14 frequencies of columns and rows. The transforms along height
  and width are products with small constant matrices, which all channels share.

  Args:
    x: float32 or bfloat16 [batch, height, width, channels]; only the batch size
      may be unknown.
    kernel: [size, size, channels, outputs], where size is odd; dtype of `x`.

  Returns:
    [batch, height, width, outputs], in the dtype of `x`. Errors are 3e-7 of the
    standard deviation in float32, and 7e-3 in bfloat16.
  """
  with tf.name_scope('by_frequencies'):
    return _convolution(x, kernel)


def _convolution(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
  height, width, _ = x.shape.as_list()[1:]
  size, _, _, outputs = kernel.shape.as_list()
  of_column, of_kernel_column, to_column = _of_columns(height, size)
  of_row, of_kernel_row, to_row = _of_rows(width, size)
  column_frequencies = len(of_column) // 2
  row_factors = len(of_row)  # three for each frequency of rows

  def by(matrix: np.ndarray, values: tf.Tensor) -> tf.Tensor:
    return tf.matmul(tf.cast(matrix, values.dtype), values)

  def transform(
    column: np.ndarray, row: np.ndarray, values: tf.Tensor
  ) -> tf.Tensor:
    """Transform [h, w, n, channels] to factors [..., n, channels]."""
    h, w, n, depth = values.shape.as_list()
    values = by(column, tf.reshape(values, [h, -1]))
    # Real parts of a row, then imaginary parts.
    values = by(row, tf.reshape(values, [column_frequencies, 2 * w, -1]))
    shape = [column_frequencies * row_factors, n or -1, depth]
    return tf.reshape(values, shape)

  products = tf.matmul(
    transform(of_column, of_row, tf.transpose(x, [1, 2, 0, 3])),
    transform(of_kernel_column, of_kernel_row, kernel),
  )
  shape = [column_frequencies, row_factors, -1]
  y = by(to_row, tf.reshape(products, shape))
  y = by(to_column, tf.reshape(y, [2 * column_frequencies, -1]))
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
  period to period. All coefficients then come in conjugate pairs, if the period
  is even, and are computed alike. Up to the period's length, the line is padded
  with zeros. Half the kernel's width is enough: both ends of the line share
  these zeros.

  Returns:
    of_line: complex [n, length], n even. Rows k and n - 1 - k are conjugates.
    of_kernel: complex [n, kernel_size].
    to_line: complex [length, n].
  """
  period = length + kernel_size // 2
  period += period % 2  # even
  frequencies = np.arange(period) + 0.5
  waves = np.exp(-2j * np.pi / period * np.outer(frequencies, range(period)))
  of_line = waves[:, :length]
  # As usual in networks, the kernel is centred and not mirrored.
  centred = np.arange(kernel_size) - kernel_size // 2
  of_kernel = np.exp(2j * np.pi / period * np.outer(frequencies, centred))
  return of_line, of_kernel, of_line.T.conj() / period
