"""Operations that the network needs and TensorFlow lacks.

A fast local response normalization and convolution; casts between the
variables' float32 and the compute type, with loss scaling for float16;
summaries tagged exactly.
"""

import functools

import numpy as np
import tensorflow.compat.v1 as tf


def local_response_normalization(x: tf.Tensor, name: str) -> tf.Tensor:
  """Damps each activation by its neighbours in depth, as `tf.nn.lrn` does.

  y = x / s^0.75 with s = 1 + (0.001 / 9) * (sum of x^2 over the channel and the
  four on each side), from Krizhevsky, Sutskever and Hinton, "ImageNet
  Classification with Deep Convolutional Neural Networks" (2012), section 3.3.

  `tf.nn.lrn` raises each element to a power and finds each sum in a loop. Here
  the sums of all channels are one product with a band matrix, and the power is
  made of reciprocal and square roots; the gradient uses both again.

  Args:
    x: [batch, height, width, channels], float32, float16 or bfloat16; the sums
      are made in float32.
    name: the name scope.

  Returns:
    y, of the shape and type of x.
  """
  radius, bias, alpha = 4, 1.0, 0.001 / 9.0  # and beta = 0.75
  channels = x.shape.as_list()[-1]
  positions = np.arange(channels)
  near = np.abs(positions - positions[:, np.newaxis]) <= radius
  biases = np.full([channels], bias, np.float32)

  def sum_neighbours(values, factor):
    rows = tf.reshape(values, [-1, channels])
    return tf.matmul(rows, (factor * near).astype(np.float32))

  @tf.custom_gradient
  def normalize(x):
    x32 = tf.cast(x, tf.float32)
    s = tf.nn.bias_add(sum_neighbours(tf.square(x32), alpha), biases)
    s = tf.reshape(s, tf.shape(x))
    root = tf.math.rsqrt(s)
    scale = root * tf.sqrt(root)  # s^-0.75
    y = x32 * scale

    def gradient(dy):
      # dx = dy * scale - x * 2 * 0.75 * alpha * sums of (dy * y / s)
      dy = tf.cast(dy, tf.float32)
      sums = sum_neighbours(dy * y / s, 2 * 0.75 * alpha)
      dx = dy * scale - x32 * tf.reshape(sums, tf.shape(x))
      return tf.cast(dx, x.dtype)

    return tf.cast(y, x.dtype), gradient

  with tf.name_scope(name):
    return normalize(x)


def convolution(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
  """Convolves at stride 1 into as many pixels, as `tf.nn.conv2d` does.

  On processors, two detours are faster. A type without a fast path is computed
  with in float32, and each sum is rounded to it, as hardware for it would. And
  images of many channels are convolved by their frequencies, which is less
  work; those in bfloat16 are not where the processor multiplies whole matrices
  of it. That rounds more often: in bfloat16, to within 0.6% of the results'
  spread, not 0.2%.

  Args:
    x: [batch, height, width, channels], float32, float16 or bfloat16.
    kernel: [size, size, channels, outputs], of an odd size and x's type.

  Returns:
    [batch, height, width, outputs], of the type of x.
  """
  if not has_fast_path(x.dtype):
    y = convolution(tf.cast(x, tf.float32), tf.cast(kernel, tf.float32))
    return tf.cast(y, x.dtype)
  many = 16  # channels; fewer are not worth the transforms
  if (
    x.dtype != tf.float16
    and x.shape.as_list()[-1] >= many
    and not tf.config.list_physical_devices('GPU')
    and not (x.dtype == tf.bfloat16 and 'amx_bf16' in _cpu_flags())
  ):
    with tf.name_scope('by_frequencies'):
      return _convolution_by_frequencies(x, kernel)
  return tf.nn.conv2d(x, kernel, strides=1, padding='SAME')


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

  def transform(first, second, values):  # [h, w, ...] -> [rows, columns, rest]
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

  def parts(z):
    return np.concatenate([z.real, z.imag, z.real + z.imag])

  def combination(z):  # of the three products, so that z's part comes out
    return np.concatenate([z.real + z.imag, z.imag - z.real, -z.imag])

  return (
    parts(of_line)[needed].astype(np.float32),
    parts(of_kernel)[needed].astype(np.float32),
    combination(to_line)[needed].T.astype(np.float32),
  )


def has_fast_path(dtype: tf.DType) -> bool:
  """Returns whether this machine computes in a type faster than in float32."""
  if dtype == tf.float32 or tf.config.list_physical_devices('GPU'):
    return True
  if dtype == tf.bfloat16:
    return not _cpu_flags().isdisjoint({'avx512_bf16', 'amx_bf16', 'bf16'})
  return not _cpu_flags().isdisjoint({'avx512_fp16', 'amx_fp16', 'asimdhp'})


def prefers_bfloat16() -> bool:
  """Returns whether a processor computes here, and in bfloat16 the fastest."""
  on_gpu = tf.config.list_physical_devices('GPU')
  return not on_gpu and has_fast_path(tf.bfloat16)


@functools.cache
def _cpu_flags() -> set[str]:
  with open('/proc/cpuinfo') as file:
    return set(file.read().split())


def enter_compute_type(variable: tf.Variable, dtype: tf.DType) -> tf.Tensor:
  """Casts a float32 variable to `dtype`; its gradient comes out unscaled.

  See `leave_compute_type`.
  """
  value = tf.convert_to_tensor(variable)
  if dtype != tf.float16:
    return tf.cast(value, dtype)
  scale = _loss_scale()

  @tf.custom_gradient
  def cast(value):
    return tf.cast(value, dtype), lambda dy: tf.cast(dy, tf.float32) / scale

  return cast(value)


def leave_compute_type(x: tf.Tensor) -> tf.Tensor:
  """Casts activations to float32.

  Small gradients vanish in float16. So between here, where they come in, and
  `enter_compute_type`, where they go out to the variables, they are multiplied
  by a loss scale (Micikevicius et al., "Mixed Precision Training", 2018,
  section 3.2). No caller has to know, not even an optimizer.
  """
  if x.dtype != tf.float16:
    return tf.cast(x, tf.float32)
  scale = _loss_scale()

  @tf.custom_gradient
  def cast(x):
    return tf.cast(x, tf.float32), lambda dy: tf.cast(dy * scale, x.dtype)

  return cast(x)


# The scale doubles after so many steps without an overflow, and is halved by
# each.
_INITIAL_LOSS_SCALE = 2.0**15
_STEPS_PER_GROWTH = 1000


def _loss_scale() -> tf.Tensor:
  """Returns the graph's loss scale, float32 [].

  It and the number of steps since it last changed make up a variable that is in
  no collection of variables: it starts by itself, and no checkpoint has it.
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
  gradients: list[tuple[tf.Tensor, tf.Variable]],
) -> tuple[list[tuple[tf.Tensor, tf.Variable]], tf.Operation]:
  """Makes a step whose float16 gradients overflow change nothing.

  Args:
    gradients: (gradient, variable) pairs.

  Returns:
    The pairs, the gradients all zero if one of them is not finite, and the
    operation that adapts the loss scale. In other types, nothing changes.
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


def histogram_summary(tag: str, values: tf.Tensor) -> None:
  """Adds a histogram to the summaries, tagged so whatever the name scope."""
  with tf.device('/cpu:0'):
    summary = tf.raw_ops.HistogramSummary(tag=_unused_tag(tag), values=values)
  tf.add_to_collection(tf.GraphKeys.SUMMARIES, summary)


def scalar_summary(tag: str, value: tf.Tensor) -> None:
  """Adds a scalar to the summaries, tagged so whatever the name scope."""
  with tf.device('/cpu:0'):
    summary = tf.raw_ops.ScalarSummary(tags=_unused_tag(tag), values=value)
  tf.add_to_collection(tf.GraphKeys.SUMMARIES, summary)


def _unused_tag(tag: str) -> str:
  """Appends '_1', '_2', ... to a tag that the graph has already.

  `tf.summary` makes tags out of operations' names: they would carry the tower's
  prefix, and a variable's histogram would be called 'conv1/weights_1'. Hence
  the plain operations, and this.
  """
  tags = tf.get_collection_ref('summary_tags')
  tags.append(tag)
  repeats = tags.count(tag) - 1
  return f'{tag}_{repeats}' if repeats else tag
