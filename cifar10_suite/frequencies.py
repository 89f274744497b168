"""Convolution in the frequency domain."""

import functools
from collections.abc import Callable

import numpy as np
import tensorflow.compat.v1 as tf


def by_axes(parts: list[tf.Tensor], kernel: tf.Tensor) -> list[tf.Tensor]:
  """Convolve with stride 1 and 'SAME' padding, in few operations.

  By the convolution theorem, a convolution is a product of Fourier transforms,
  as in Mathieu, Henaff and LeCun, "Fast Training of Convolutional Networks
  through FFTs" (2013). For a 5x5 kernel on 12x12 pixels, this takes 294
  products per pair of channels instead of 5 * 5 * 12 * 12 = 3600: three for
  each of 7 x 14 frequencies of columns and rows. The transforms along height
  and width are products with small constant matrices, which all channels share.

  Args:
    parts: parts of a batch, float32 or bfloat16 [images, height, width,
      channels]; only the number of images may differ or be unknown.
    kernel: [size, size, channels, outputs], where size is odd; dtype of the
      parts.

  Returns:
    [images, height, width, outputs] for each part, in its dtype. Errors are
    3e-7 of the standard deviation in float32, and 7e-3 in bfloat16.
  """
  height, width, _ = parts[0].shape.as_list()[1:]
  size, _, _, outputs = kernel.shape.as_list()
  of_column, of_kernel_column, to_column = _of_columns(height, size)
  of_row, of_kernel_row, to_row = _of_rows(width, size)
  column_frequencies = len(of_column) // 2
  row_factors = len(of_row)  # three for each frequency of rows

  def transform(
    column: np.ndarray, row: np.ndarray, values: tf.Tensor
  ) -> tf.Tensor:
    """Transform [h, w, n, channels] to factors [..., n, channels]."""
    h, w, n, depth = values.shape.as_list()
    values = _product(column, tf.reshape(values, [h, -1]))
    # Real parts of a row, then imaginary parts.
    values = _product(row, tf.reshape(values, [column_frequencies, 2 * w, -1]))
    shape = [column_frequencies * row_factors, n or -1, depth]
    return tf.reshape(values, shape)

  def convolve(x: tf.Tensor) -> tf.Tensor:
    x_factors = transform(of_column, of_row, tf.transpose(x, [1, 2, 0, 3]))
    products = tf.matmul(x_factors, kernel_factors)
    shape = [column_frequencies, row_factors, -1]
    y = _product(to_row, tf.reshape(products, shape))
    y = _product(to_column, tf.reshape(y, [2 * column_frequencies, -1]))
    y = tf.reshape(y, [height, width, -1, outputs])
    return tf.transpose(y, [2, 0, 1, 3])

  with tf.name_scope('by_frequencies'):
    kernel_factors = transform(of_kernel_column, of_kernel_row, kernel)
    return [convolve(x) for x in parts]


def by_images(parts: list[tf.Tensor], kernel: tf.Tensor) -> list[tf.Tensor]:
  """Convolve like `by_axes`, in few passes over memory.

  One product transforms height and width together, and the products of
  transforms are those of complex numbers. This takes more operations, which are
  cheap where a processor has instructions for matrices.

  Args:
    parts: as for `by_axes`.
    kernel: as for `by_axes`.

  Returns:
    [images, height, width, outputs] for each part, in its dtype. Errors are
    4e-7 of the standard deviation in float32, and 5e-3 in bfloat16.
  """
  height, width, channels = parts[0].shape.as_list()[1:]
  size, _, _, outputs = kernel.shape.as_list()
  of_image, of_kernel, to_image = _of_images(height, width, size)
  frequencies = len(of_image) // 2

  def transform_kernel() -> tf.Tensor:
    """Return the matrices that multiply real and imaginary parts."""
    values = _product(of_kernel, tf.reshape(kernel, [size * size, -1]))
    values = tf.reshape(values, [frequencies, 2, 2, channels, outputs])
    values = tf.transpose(values, [0, 1, 3, 2, 4])
    return tf.reshape(values, [frequencies, 2 * channels, 2 * outputs])

  def convolve(x: tf.Tensor) -> tf.Tensor:
    values = _product(of_image, tf.reshape(x, [-1, height * width, channels]))
    # Each channel's real parts, then their imaginary parts.
    values = tf.reshape(values, [-1, frequencies, 2 * channels])
    products = tf.matmul(tf.transpose(values, [1, 0, 2]), kernel_matrices)
    y = tf.transpose(products, [1, 0, 2])
    y = _product(to_image, tf.reshape(y, [-1, 2 * frequencies, outputs]))
    return tf.reshape(y, [-1, height, width, outputs])

  with tf.name_scope('by_frequencies'):
    kernel_matrices = transform_kernel()
    return [convolve(x) for x in parts]


def _product(matrix: np.ndarray, values: tf.Tensor) -> tf.Tensor:
  """Multiply by a constant matrix, from the left.

  Its gradient is a product with another constant, while that of `tf.matmul`
  would transpose the matrix in every step.
  """

  def multiply(matrix: np.ndarray, values: tf.Tensor) -> tf.Tensor:
    constant = tf.constant(np.ascontiguousarray(matrix), values.dtype)
    return tf.matmul(constant, values)

  @tf.custom_gradient
  def product(values: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    return multiply(matrix, values), functools.partial(multiply, matrix.T)

  return product(values)


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


def _of_images(
  height: int, width: int, kernel_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Return matrices to convolve images of real numbers.

  With them, y = to_image @ ((of_image @ x) * (of_kernel @ kernel)), where *
  multiplies each row of [real part, imaginary part] by a matrix of 2 x 2.

  Returns:
    of_image: float32 [2 * n, height * width].
    of_kernel: float32 [4 * n, kernel_size * kernel_size].
    to_image: float32 [height * width, 2 * n].
  """
  of_column, of_kernel_column, to_column = _frequencies(height, kernel_size)
  of_row, of_kernel_row, to_row = _frequencies(width, kernel_size)
  half = len(of_column) // 2  # one frequency of each conjugate pair
  of_image = np.kron(of_column[:half], of_row)
  of_kernel = np.kron(of_kernel_column[:half], of_kernel_row)
  # The real part of a sum over all frequencies is twice that over one of each
  # pair.
  to_image = np.kron(2 * to_column[:, :half], to_row)

  def rows(*parts: np.ndarray) -> np.ndarray:
    matrix = np.stack(parts, axis=1).reshape(-1, parts[0].shape[1])
    return matrix.astype(np.float32)

  return (
    rows(of_image.real, of_image.imag),
    rows(of_kernel.real, of_kernel.imag, -of_kernel.imag, of_kernel.real),
    rows(to_image.real.T, -to_image.imag.T).T,
  )


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
