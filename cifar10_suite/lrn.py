"""Local response normalization, faster than TensorFlow's own."""

from collections.abc import Callable

import numpy as np
import tensorflow.compat.v1 as tf

from cifar10_suite import xla

_RADIUS, _BIAS, _ALPHA = 4, 1.0, 0.001 / 9.0  # and beta = 0.75

_WindowSums = Callable[[tf.Tensor], tf.Tensor]
_Cast = Callable[[tf.Tensor, tf.DType], tf.Tensor]


def relu_and_normalize(x: tf.Tensor, biases: tf.Tensor, name: str) -> tf.Tensor:
  """Add biases, apply ReLU, and normalize by adjacent channels.

  With r = max(x + biases, 0), the result is like that of `tf.nn.lrn`: y = r /
  s^0.75 with s = 1 + (0.001 / 9) * (sum of r^2 over the channel and four
  channels on each side), from Krizhevsky, Sutskever and Hinton, "ImageNet
  Classification with Deep Convolutional Neural Networks" (2012), section 3.3.

  `tf.nn.lrn` computes each sum in a loop, and a power per element. Here, square
  roots and reciprocals replace the power. On CPUs, XLA compiles the whole
  function into a few passes over memory. It also compiles the gradient, which
  takes s^-0.25 from the forward pass.

  Args:
    x: float32, float16 or bfloat16 [batch, height, width, channels]; sums are
      computed in float32.
    biases: [channels], in the dtype of `x`.
    name: name scope of the operations.

  Returns:
    y, in the shape and dtype of `x`.
  """
  if xla.can_compile(x):
    window_sums, cast = _sums_by_shifts, xla.cast
  else:
    window_sums, cast = _sums_by_product, tf.cast

  @tf.custom_gradient
  def apply(x: tf.Tensor, biases: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    y, root = _forward(x, biases, window_sums, cast)

    def gradients(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
      dx, wide = _backward(x, biases, root, dy, window_sums, cast)
      return dx, tf.cast(_sums_by_channel(wide), biases.dtype)

    return y, gradients

  with tf.name_scope(name):
    return apply(x, biases)


def _sums_by_channel(values: tf.Tensor) -> tf.Tensor:
  """Sum over all but the last axis, by a product with ones.

  If XLA compiled these sums, too, it would run the gradient on one thread only.
  """
  channels = values.shape.as_list()[-1]
  rows = tf.reshape(values, [-1, channels])
  ones = tf.ones([1, tf.shape(rows)[0]])
  return tf.reshape(tf.matmul(ones, rows), [channels])


def _sums_by_product(values: tf.Tensor) -> tf.Tensor:
  """Sum over the window of each channel, by a product with a band matrix."""
  channels = values.shape.as_list()[-1]
  positions = np.arange(channels)
  near = np.abs(positions - positions[:, np.newaxis]) <= _RADIUS
  rows = tf.reshape(values, [-1, channels])
  sums = tf.matmul(rows, near.astype(np.float32))
  return tf.reshape(sums, tf.shape(values))


def _sums_by_shifts(values: tf.Tensor) -> tf.Tensor:
  """Sum over the window of each channel, by nine shifted additions.

  This is the faster way once it is compiled.
  """
  channels = values.shape.as_list()[-1]
  margins = [[0, 0], [0, 0], [0, 0], [_RADIUS, _RADIUS]]
  padded = tf.pad(values, margins)
  return tf.add_n(
    [padded[..., i : i + channels] for i in range(2 * _RADIUS + 1)]
  )


@xla.compiled
def _forward(
  x: tf.Tensor, biases: tf.Tensor, window_sums: _WindowSums, cast: _Cast
) -> tuple[tf.Tensor, tf.Tensor]:
  """Return y and the root: s^-0.25, in float32."""
  r = _relu(x, biases)
  s = _BIAS + _ALPHA * window_sums(tf.square(r))
  root = tf.sqrt(tf.math.rsqrt(s))
  return cast(r * (root * root * root), x.dtype), root


@xla.compiled
def _backward(
  x: tf.Tensor,
  biases: tf.Tensor,
  root: tf.Tensor,
  dy: tf.Tensor,
  window_sums: _WindowSums,
  cast: _Cast,
) -> tuple[tf.Tensor, tf.Tensor]:
  """Return the gradient of x, in its dtype and in float32."""
  r = _relu(x, biases)
  dy = tf.cast(dy, tf.float32)
  square = root * root
  scale, reciprocal = square * root, square * square  # s^-0.75 and 1 / s
  # dr = dy * scale - r * 2 * 0.75 * alpha * sums of (dy * y / s)
  sums = window_sums(dy * r * scale * reciprocal)
  dr = dy * scale - (2 * 0.75 * _ALPHA) * r * sums
  dx = tf.where(r > 0, dr, tf.zeros_like(dr))
  return cast(dx, x.dtype), dx


def _relu(x: tf.Tensor, biases: tf.Tensor) -> tf.Tensor:
  return tf.nn.relu(tf.cast(x, tf.float32) + tf.cast(biases, tf.float32))
