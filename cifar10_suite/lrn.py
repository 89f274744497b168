"""Local response normalization, faster than TensorFlow's own."""

from collections.abc import Callable

import numpy as np
import tensorflow.compat.v1 as tf


def local_response_normalization(x: tf.Tensor, name: str) -> tf.Tensor:
  """Normalize each activation by those of adjacent channels, like `tf.nn.lrn`.

  y = x / s^0.75 with s = 1 + (0.001 / 9) * (sum of x^2 over the channel and
  four channels on each side), from Krizhevsky, Sutskever and Hinton, "ImageNet
  Classification with Deep Convolutional Neural Networks" (2012), section 3.3.

  `tf.nn.lrn` computes each sum in a loop, and a power per element. Here, one
  product with a band matrix computes the sums of all channels, and square roots
  and reciprocals replace the power. The gradient reuses both.

  Args:
    x: float32, float16 or bfloat16 [batch, height, width, channels]; sums are
      computed in float32.
    name: name scope of the operations.

  Returns:
    y, in the shape and dtype of `x`.
  """
  radius, bias, alpha = 4, 1.0, 0.001 / 9.0  # and beta = 0.75
  channels = x.shape.as_list()[-1]
  positions = np.arange(channels)
  near = np.abs(positions - positions[:, np.newaxis]) <= radius
  biases = np.full([channels], bias, np.float32)

  def sum_neighbours(values: tf.Tensor, factor: float) -> tf.Tensor:
    rows = tf.reshape(values, [-1, channels])
    return tf.matmul(rows, (factor * near).astype(np.float32))

  @tf.custom_gradient
  def normalize(
    x: tf.Tensor,
  ) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
    x32 = tf.cast(x, tf.float32)
    s = tf.nn.bias_add(sum_neighbours(tf.square(x32), alpha), biases)
    s = tf.reshape(s, tf.shape(x))
    root = tf.math.rsqrt(s)
    scale = root * tf.sqrt(root)  # s^-0.75
    y = x32 * scale

    def gradient(dy: tf.Tensor) -> tf.Tensor:
      # dx = dy * scale - x * 2 * 0.75 * alpha * sums of (dy * y / s)
      dy = tf.cast(dy, tf.float32)
      sums = sum_neighbours(dy * y / s, 2 * 0.75 * alpha)
      dx = dy * scale - x32 * tf.reshape(sums, tf.shape(x))
      return tf.cast(dx, x.dtype)

    return tf.cast(y, x.dtype), gradient

  with tf.name_scope(name):
    return normalize(x)
