"""Convolution in the frequency domain."""

from collections.abc import Callable

import numpy as np
import tensorflow.compat.v1 as tf

_Product = Callable[[tf.Tensor], tf.Tensor]


def by_axes(parts: list[tf.Tensor], kernel: tf.Tensor) -> list[tf.Tensor]:
  """Convolve with stride 1 and 'SAME' padding, in few multiplications.

  By the convolution theorem, a convolution is a product of Fourier transforms,
  as in Mathieu, Henaff and LeCun, "Fast Training of Convolutional Networks
  through FFTs" (2013). For a 5x5 kernel on 12x12 pixels, this takes 294
  products per pair of input and output channel instead of 5 * 5 * 12 * 12 =
  3600: three for each of 7 x 14 frequencies of columns and rows. The transforms
  along height and width are products with small constant matrices, which all
  channels share.

  Args:
    parts: parts of a batch, float32 or bfloat16 [images, height, width,
      channels]; only the number of images may differ or be unknown.
    kernel: [size, size, channels, outputs], where size is odd; dtype of the
      parts.

  Returns:
    [images, height, width, outputs] for each part, in its dtype. The error of
    results and gradients is 3e-7 of their standard deviation in float32, and
    7e-3 in bfloat16.
  """
  height, width, _ = parts[0].shape.as_list()[1:]
  size, _, _, outputs = kernel.shape.as_list()
  column_matrices = _of_columns(height, size)
  row_matrices = _of_rows(width, size)
  num_frequencies = len(column_matrices[0]) // 2  # of columns
  num_factors = len(row_matrices[0])  # of rows: three for each frequency

  def transform(
    on_columns: _Product, on_rows: _Product, values: tf.Tensor
  ) -> tf.Tensor:
    """Transform [h, w, m, d] to [num_frequencies * num_factors, m, d]."""
    h, w, m, d = values.shape.as_list()
    values = on_columns(tf.reshape(values, [h, -1]))
    # For each frequency of columns, the real parts of a row, then its imaginary
    # parts.
    values = on_rows(tf.reshape(values, [num_frequencies, 2 * w, -1]))
    return tf.reshape(values, [num_frequencies * num_factors, m or -1, d])

  def convolve(x: tf.Tensor) -> tf.Tensor:
    x_factors = transform(of_column, of_row, _transposed(x, [1, 2, 0, 3]))
    products = tf.matmul(x_factors, kernel_factors)
    y = to_row(tf.reshape(products, [num_frequencies, num_factors, -1]))
    y = to_column(tf.reshape(y, [2 * num_frequencies, -1]))
    y = tf.reshape(y, [height, width, -1, outputs])
    return _transposed(y, [2, 0, 1, 3])

  with tf.name_scope('by_frequencies'):
    of_column, of_kernel_column, to_column = _products(
      column_matrices, kernel.dtype
    )
    of_row, of_kernel_row, to_row = _products(row_matrices, kernel.dtype)
    kernel_factors = transform(of_kernel_column, of_kernel_row, kernel)
    return [convolve(x) for x in parts]


def by_images(parts: list[tf.Tensor], kernel: tf.Tensor) -> list[tf.Tensor]:
  """Convolve like `by_axes`, in few passes over memory.

  One product transforms height and width together, and a complex product takes
  four real ones, not three. These are more multiplications, which are cheap
  where a processor has instructions for matrices.

  Args:
    parts: as for `by_axes`.
    kernel: as for `by_axes`.

  Returns:
    [images, height, width, outputs] for each part, in its dtype. The error of
    results and gradients is 4e-7 of their standard deviation in float32, and
    5e-3 in bfloat16.
  """
  height, width, channels = parts[0].shape.as_list()[1:]
  size, _, _, outputs = kernel.shape.as_list()
  matrices = _of_images(height, width, size)
  num_frequencies = len(matrices[0]) // 2

  def transform_kernel() -> tf.Tensor:
    """Return the matrices that multiply real and imaginary parts."""
    values = of_kernel(tf.reshape(kernel, [size * size, -1]))
    values = tf.reshape(values, [num_frequencies, 2, 2, channels, outputs])
    values = _transposed(values, [0, 1, 3, 2, 4])
    return tf.reshape(values, [num_frequencies, 2 * channels, 2 * outputs])

  def convolve(x: tf.Tensor) -> tf.Tensor:
    values = of_image(tf.reshape(x, [-1, height * width, channels]))
    # For each frequency, the real parts of all channels, then their imaginary
    # parts.
    values = tf.reshape(values, [-1, num_frequencies, 2 * channels])
    products = tf.matmul(_transposed(values, [1, 0, 2]), kernel_matrices)
    y = _transposed(products, [1, 0, 2])
    y = to_image(tf.reshape(y, [-1, 2 * num_frequencies, outputs]))
    return tf.reshape(y, [-1, height, width, outputs])

  with tf.name_scope('by_frequencies'):
    of_image, of_kernel, to_image = _products(matrices, kernel.dtype)
    kernel_matrices = transform_kernel()
    return [convolve(x) for x in parts]


def _transposed(x: tf.Tensor, axes: list[int]) -> tf.Tensor:
  """Permute axes like `tf.transpose`, but faster; the last one stays the last.

  `tf.transpose` moves one number at a time, and takes as long for two bytes as
  for eight. Here, it moves groups of adjacent numbers as integers of eight
  bytes, if the length of the last axis is a multiple of two (float32) or four
  (bfloat16).
  """

  def permute(x: tf.Tensor, axes: list[int]) -> tf.Tensor:
    *before, length = (-1 if n is None else n for n in x.shape.as_list())
    group = 8 // x.dtype.size
    if length % group:
      return tf.transpose(x, axes)
    words = tf.reshape(x, [*before, length // group, group])
    words = tf.transpose(tf.bitcast(words, tf.int64), axes)
    shape = [[*before, length][axis] for axis in axes]
    return tf.reshape(tf.bitcast(words, x.dtype), shape)

  @tf.custom_gradient  # since tf.bitcast has none
  def apply(x: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    return permute(x, axes), lambda dy: permute(dy, np.argsort(axes).tolist())

  return apply(x)


def _products(
  matrices: tuple[np.ndarray, ...], dtype: tf.DType
) -> list[_Product]:
  """Return functions that multiply tensors of a dtype by constant matrices.

  For a matrix [m, n], the function multiplies [..., n, k] from the left. All
  calls share two constants: the matrix and, for the gradient, its transpose,
  which `tf.matmul` would compute in each step. That slows the product on AMX.
  """

  def product(matrix: np.ndarray) -> _Product:
    constant = tf.constant(matrix, dtype)
    transposed = tf.constant(matrix.T, dtype)

    @tf.custom_gradient
    def multiply(x: tf.Tensor) -> tuple[tf.Tensor, Callable]:
      return tf.matmul(constant, x), lambda dy: tf.matmul(transposed, dy)

    return multiply

  return [product(matrix) for matrix in matrices]


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
  of_row, of_kernel, to_row = _transforms(length, kernel_size)

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

  With them, y = to_column @ ((of_column @ x) * (of_kernel @ kernel)), with
  the product of complex numbers. Rows of the transforms alternate: the real
  part of a frequency, then its imaginary part. There is one frequency of each
  conjugate pair.

  Returns:
    of_column: float32 [2 * n, length].
    of_kernel: float32 [2 * n, kernel_size].
    to_column: float32 [length, 2 * n].
  """
  of_column, of_kernel, to_column = _transforms(length, kernel_size)
  half = len(of_column) // 2
  return (
    _parts(of_column[:half]),
    _parts(of_kernel[:half]),
    _real_sums(to_column[:, :half]),
  )


def _of_images(
  height: int, width: int, kernel_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Return matrices to convolve images of real numbers.

  With them, y = to_image @ ((of_image @ x) * (of_kernel @ kernel)), where x,
  kernel and y are flat, and * multiplies each pair of real and imaginary part
  by a matrix of 2 x 2.

  Returns:
    of_image: float32 [2 * n, height * width].
    of_kernel: float32 [4 * n, kernel_size * kernel_size].
    to_image: float32 [height * width, 2 * n].
  """
  of_column, of_kernel_column, to_column = _transforms(height, kernel_size)
  of_row, of_kernel_row, to_row = _transforms(width, kernel_size)
  half = len(of_column) // 2  # one frequency of each conjugate pair
  factors = np.kron(of_kernel_column[:half], of_kernel_row)
  # For the real and for the imaginary part of x: (a + ib) z = az + b(iz).
  factors = np.stack([factors, 1j * factors], axis=1)
  return (
    _parts(np.kron(of_column[:half], of_row)),
    _parts(factors.reshape(-1, kernel_size**2)),
    _real_sums(np.kron(to_column[:, :half], to_row)),
  )


def _parts(z: np.ndarray) -> np.ndarray:
  """Return a complex [n, k] as float32 [2 * n, k] with alternating parts."""
  parts = np.stack([z.real, z.imag], axis=1)
  return parts.reshape(2 * len(z), -1).astype(np.float32)


def _real_sums(z: np.ndarray) -> np.ndarray:
  """Return a real matrix for sums of z @ w and its conjugate.

  Args:
    z: complex [k, n].

  Returns:
    float32 [k, 2 * n]. Its product with the alternating parts of w is
    2 (Re z @ Re w - Im z @ Im w).
  """
  return 2 * _parts(z.T.conj()).T


def _transforms(
  length: int, kernel_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Return the transforms for convolution along one axis.

  They treat a line as periodic, except that each repetition changes its sign.
  With an even period, all frequencies then come in conjugate pairs, and none is
  real, which would be a special case. Zeros pad the line to an even length, by
  at least half the kernel's width: as the line repeats, one padding serves both
  of its ends.

  Returns:
    of_line: complex [n, length], n even. Rows k and n - 1 - k are conjugates.
    of_kernel: complex [n, kernel_size].
    to_line: complex [length, n].
  """
  padded = length + kernel_size // 2
  padded += padded % 2
  frequencies = np.arange(padded) + 0.5
  of_line = np.exp(-2j * np.pi / padded * np.outer(frequencies, range(length)))
  # As usual in networks, the kernel is centred and not mirrored; hence the sign
  # of its exponents.
  centred = np.arange(kernel_size) - kernel_size // 2
  of_kernel = np.exp(2j * np.pi / padded * np.outer(frequencies, centred))
  return of_line, of_kernel, of_line.T.conj() / padded
