"""Fast convolutions, pooling and matrix products.

On CPUs, convolutions of many channels are computed in the frequency domain.
Where TensorFlow is not faster in a type than in float32, operations compute in
float32 and round.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf

from cifar10_suite import frequencies, measurement

_Convolution = Callable[[list[tf.Tensor], tf.Tensor], list[tf.Tensor]]

_MIN_SPEEDUP = 1.2  # over float32, to justify the loss of precision
_TOO_SLOW = 2  # times the time in float32, for a few images: measure no more


def convolution(parts: list[tf.Tensor], kernel: tf.Tensor) -> list[tf.Tensor]:
  """Convolve with stride 1 and 'SAME' padding, like `tf.nn.conv2d`.

  On CPUs, images with many channels are convolved in the frequency domain,
  which takes fewer multiplications. In bfloat16, the error of results and
  gradients is 0.5% (by images) or 0.7% (by axes) of their standard deviation;
  that of `direct` is 0.2% for results and 1 to 2% for gradients.

  Args:
    parts: parts of a batch, float32, float16 or bfloat16 [images, height,
      width, channels].
    kernel: [size, size, channels, outputs], where size is odd; dtype of the
      parts.

  Returns:
    [images, height, width, outputs] for each part, in its dtype.
  """

  def convolve(kernel: tf.Tensor, *parts: tf.Tensor) -> list[tf.Tensor]:
    way = _fastest(parts[0].shape.as_list()[-1], kernel.dtype)
    return way(list(parts), kernel)

  return _in_a_fast_type(convolve, kernel, *parts)


def _fastest(channels: int, dtype: tf.DType) -> _Convolution:
  """Return the fastest convolution for a number of channels."""
  if _has_gpu():
    return direct
  if channels >= 16:  # with fewer, transforms cost more than they save
    return fastest_transforms(dtype)
  # With three channels, `by_neighbours` takes 1.2 times as long as `direct` in
  # float32; in bfloat16, 0.7 to 0.8 times with AMX, and as long without.
  return direct if dtype == tf.float32 else by_neighbours


def direct(parts: list[tf.Tensor], kernel: tf.Tensor) -> list[tf.Tensor]:
  """Convolve like `convolution`, by TensorFlow's own operation."""
  return [tf.nn.conv2d(x, kernel, strides=1, padding='SAME') for x in parts]


def by_neighbours(parts: list[tf.Tensor], kernel: tf.Tensor) -> list[tf.Tensor]:
  """Convolve like `direct`, with a gradient that suits AMX.

  AMX multiplies tiles of 16 rows. TensorFlow's gradient of the filters fills
  one row for each channel of the images: 3 of 16 for colours. Here, the
  horizontal neighbours of each pixel become channels first: 15 for 5x5 filters,
  which are then only one pixel wide.
  """
  size, _, channels, outputs = kernel.shape.as_list()
  # As filters, these copy each channel of each neighbour.
  copies = np.eye(size * channels).reshape(1, size, channels, -1)

  @tf.custom_gradient
  def convolve(x: tf.Tensor, kernel: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    def gradients(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
      same = {'strides': [1, 1, 1, 1], 'padding': 'SAME'}
      dx = tf.nn.conv2d_backprop_input(tf.shape(x), kernel, dy, **same)
      (neighbours,) = direct([x], tf.constant(copies, x.dtype))
      dcolumns = tf.nn.conv2d_backprop_filter(
        neighbours, [size, 1, size * channels, outputs], dy, **same
      )
      return dx, tf.reshape(dcolumns, kernel.shape)

    return direct([x], kernel)[0], gradients

  return [convolve(x, kernel) for x in parts]


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


def _in_a_fast_type(operation: Callable, *tensors: tf.Tensor) -> Any:
  """Run an operation in the dtype of its tensors, or emulate that in float32.

  If TensorFlow is not faster in the dtype, the operation and its gradient are
  computed in float32 and rounded to the dtype, as hardware for it would do.
  """
  dtype = tensors[0].dtype
  if is_fast(dtype):
    return operation(*tensors)
  wide = operation(*(tf.cast(tensor, tf.float32) for tensor in tensors))
  return tf.nest.map_structure(lambda result: tf.cast(result, dtype), wide)


@functools.cache
def is_fast(dtype: tf.DType) -> bool:
  """Return whether to compute in a type, rather than in float32 and round.

  Processor flags are not a reliable guide: with avx512_fp16, TensorFlow's
  forward convolution in float16 is fast, but its filter gradient and matrix
  products loop over single numbers, a hundred times slower than in float32.
  float16 therefore always counts as slow on CPUs. bfloat16 is measured at the
  first call, which takes some tenths of a second, and a second time if it seems
  slow: other load on the machine may have hidden that it is fast.

  Args:
    dtype: float32, float16 or bfloat16.
  """
  if dtype == tf.float32 or _has_gpu():
    return True
  if dtype != tf.bfloat16:
    return False
  if _seems_fast(dtype):
    return True
  _seconds.cache_clear()
  return _seems_fast(dtype)


def _seems_fast(dtype: tf.DType) -> bool:
  """Return whether a type is clearly faster than float32 in one measurement."""
  # With a few images, kernels that loop over single numbers already stand out.
  in_float32, in_dtype = measurement.seconds(
    *(
      functools.partial(_build, direct, it, batch_size=8)
      for it in (tf.float32, dtype)
    ),
    too_slow=_TOO_SLOW,
  )
  if in_dtype > _TOO_SLOW * in_float32:
    return False
  times = _seconds()
  in_float32, in_dtype = (
    times[fastest_transforms(it), it] + times[tf.matmul, it]
    for it in (tf.float32, dtype)
  )
  return in_float32 > _MIN_SPEEDUP * in_dtype


def prefers_bfloat16() -> bool:
  """Return whether training runs on a CPU that is fast in bfloat16."""
  return not _has_gpu() and is_fast(tf.bfloat16)


def _has_gpu() -> bool:
  return bool(tf.config.get_visible_devices('GPU'))


def fastest_transforms(dtype: tf.DType) -> _Convolution:
  """Return the convolution in the frequency domain to use on this CPU.

  In float32, transforms by axes were faster than `direct` on all processors
  measured (AMD Zen 3 and 4, Intel with AVX-512). Those by images take 1.4 to
  1.7 times as long. bfloat16 is measured: with AMX, transforms by images take
  0.8 times as long as those by axes, otherwise 1.7 times. Even with AMX,
  `direct` is at best as fast, and other users of the processor slow it by a
  factor of two or three.

  Args:
    dtype: float32 or bfloat16.
  """
  if dtype == tf.float32:
    return frequencies.by_axes
  ways = (frequencies.by_axes, frequencies.by_images)
  return min(ways, key=lambda way: _seconds()[way, dtype])


def num_parts(batch_size: int, num_threads: int) -> int:
  """Return the number of parts into which training should split a batch.

  On a CPU, threads that share an operation wait for each other at its end. Two
  halves of a batch give them another operation to run meanwhile. Numbers of
  threads other than two have not been measured.

  Args:
    batch_size: number of images.
    num_threads: number of threads for computing.
  """
  splits = num_threads == 2 and batch_size % 2 == 0 and not _has_gpu()
  return 2 if splits else 1


@functools.cache
def _seconds() -> dict[tuple[Callable, tf.DType], float]:
  """Return times of the network's largest operations, with their gradients."""
  contestants = [
    (frequencies.by_axes, tf.float32),
    (frequencies.by_axes, tf.bfloat16),
    (frequencies.by_images, tf.bfloat16),
    (tf.matmul, tf.float32),
    (tf.matmul, tf.bfloat16),
  ]
  times = measurement.seconds(
    *(functools.partial(_build, *it) for it in contestants)
  )
  return dict(zip(contestants, times, strict=True))


def _build(
  operation: Callable, dtype: tf.DType, batch_size: int = 128
) -> list[tf.Operation]:
  """Build the second convolution or the product of local3, with gradients."""
  if operation is tf.matmul:
    shapes = [[batch_size, 2304], [2304, 384]]
    return measurement.with_gradients(operation, shapes, dtype)
  shapes = [[batch_size, 12, 12, 64], [5, 5, 64, 64]]
  return measurement.with_gradients(
    lambda x, kernel: operation([x], kernel)[0], shapes, dtype
  )
