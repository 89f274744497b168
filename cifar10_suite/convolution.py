"""Fast convolutions, pooling and matrix products.

The network's second convolution is computed in the frequency domain. Operations
in types for which TensorFlow has no fast kernels are computed in float32.
"""

import functools
from collections.abc import Callable

import tensorflow.compat.v1 as tf

from cifar10_suite import frequencies, measurement

_MIN_SPEEDUP = 1.2  # over float32, to justify the loss of precision
_MIN_SPEEDUP_OF_DIRECT = 1.25  # over frequencies, whose speed varies less
_TOO_SLOW = 2  # times as slow as float32, for a few images: measure no further


def convolution(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
  """Convolve with stride 1 and 'SAME' padding, like `tf.nn.conv2d`.

  On CPUs, images with many channels are convolved in the frequency domain,
  which takes fewer operations; in bfloat16, unless a measurement finds the
  direct way clearly faster. This rounds more often: in bfloat16, the error is
  0.7% of the standard deviation of the results instead of 0.3%.

  Args:
    x: float32, float16 or bfloat16 [batch, height, width, channels].
    kernel: [size, size, channels, outputs], where size is odd; dtype of `x`.

  Returns:
    [batch, height, width, outputs], in the dtype of `x`.
  """
  return _in_a_fast_type(_convolution, x, kernel)


def max_pool(x: tf.Tensor, name: str) -> tf.Tensor:
  """Apply 3x3 max pooling with stride 2 and 'SAME' padding.

  Args:
    x: float32, float16 or bfloat16 [batch, height, width, channels].
    name: name of the operation.
  """
  return _in_a_fast_type(
    lambda x: tf.nn.max_pool2d(x, 3, strides=2, padding='SAME', name=name), x
  )


def matmul(x: tf.Tensor, y: tf.Tensor, transpose_x: bool = False) -> tf.Tensor:
  """Multiply [m, n] (with `transpose_x`, [n, m]) by [n, k], in their dtype."""
  multiply = functools.partial(tf.matmul, transpose_a=transpose_x)
  return _in_a_fast_type(multiply, x, y)


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
  """Return whether to compute in a type, rather than in float32 and round.

  Processor flags are not a reliable guide: with avx512_fp16, TensorFlow's
  forward convolution in float16 is fast, but its filter gradient and matrix
  products loop over single numbers, a hundred times slower than in float32.
  float16 therefore always counts as slow on CPUs. bfloat16 is measured once per
  process, which takes some tenths of a second.

  Args:
    dtype: float32, float16 or bfloat16.
  """
  if dtype == tf.float32 or tf.config.get_visible_devices('GPU'):
    return True
  if dtype != tf.bfloat16:
    return False
  # With a few images, loops over single numbers already stand out.
  wide, short = measurement.seconds(
    *(functools.partial(_build, direct, it, 8) for it in (tf.float32, dtype)),
    too_slow=_TOO_SLOW,
  )
  if short > _TOO_SLOW * wide:
    return False
  times = _seconds()
  best = frequencies.convolution if frequencies_are_faster(dtype) else direct
  wide = (
    times[frequencies.convolution, tf.float32] + times[tf.matmul, tf.float32]
  )
  short = times[best, dtype] + times[tf.matmul, dtype]
  return wide > _MIN_SPEEDUP * short


def prefers_bfloat16() -> bool:
  """Return whether training runs on a CPU that is fast in bfloat16."""
  on_gpu = tf.config.get_visible_devices('GPU')
  return not on_gpu and is_fast(tf.bfloat16)


def frequencies_are_faster(dtype: tf.DType) -> bool:
  """Return whether convolution in the frequency domain is faster here.

  In float32, it was faster on all processors measured: AMD Zen 3 (AVX2), Zen 4,
  and Intel with AVX-512. In bfloat16, this depends on the processor. With AMX,
  both take the same time at best, but other users of the processor slow the
  direct way by a factor of two or three: it must be clearly faster.

  Args:
    dtype: float32 or bfloat16; on a GPU, any.
  """
  if tf.config.get_visible_devices('GPU'):
    return False
  if dtype == tf.float32:
    return True
  times = _seconds()
  limit = _MIN_SPEEDUP_OF_DIRECT * times[direct, dtype]
  return times[frequencies.convolution, dtype] < limit


def num_parts(batch_size: int, num_threads: int) -> int:
  """Return into how many parts training should split a batch.

  On a CPU, threads that share an operation wait for each other at its end. Two
  halves of a batch give them another operation to run meanwhile. Numbers of
  threads other than two have not been measured.

  Args:
    batch_size: number of images.
    num_threads: number of threads for computing.
  """
  on_gpu = tf.config.get_visible_devices('GPU')
  return 2 if num_threads == 2 and batch_size % 2 == 0 and not on_gpu else 1


_Operation = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


@functools.cache
def _seconds() -> dict[tuple[_Operation, tf.DType], float]:
  """Return times of the network's largest operations, with their gradients."""
  contestants = [
    (frequencies.convolution, tf.float32),
    (frequencies.convolution, tf.bfloat16),
    (direct, tf.bfloat16),
    (tf.matmul, tf.float32),
    (tf.matmul, tf.bfloat16),
  ]
  times = measurement.seconds(
    *(functools.partial(_build, *it, 128) for it in contestants)
  )
  return dict(zip(contestants, times, strict=True))


def _build(
  operation: _Operation, dtype: tf.DType, batch_size: int
) -> list[tf.Operation]:
  """Build the second convolution or the first product, with its gradients."""
  shapes = [[batch_size, 12, 12, 64], [5, 5, 64, 64]]
  if operation is tf.matmul:
    shapes = [[batch_size, 2304], [2304, 384]]
  return measurement.with_gradients(operation, shapes, dtype)
