"""Mixup: training on mixtures of two images and of their labels."""

import tensorflow.compat.v1 as tf

from cifar10_suite import xla


def mixed(
  images: tf.Tensor,
  labels: tf.Tensor,
  num_classes: int,
  concentration: float,
  is_active: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
  """Mix each image with the one before it in the batch, and their labels.

  Image i becomes w * images[i] + (1 - w) * images[i - 1], where w is the larger
  of v and 1 - v, and v is drawn from Beta(concentration, concentration) for
  each image. From Zhang, Cisse, Dauphin and Lopez-Paz, "mixup: Beyond Empirical
  Risk Minimization" (2018).

  Args:
    images: float32, float16 or bfloat16 [n, height, width, channels].
    labels: integers [n], less than `num_classes`.
    num_classes: number of classes.
    concentration: positive; the smaller it is, the closer most weights are
      to 1.
    is_active: bool []; if it is false, all weights are 1.

  Returns:
    images: in the shape and dtype of `images`.
    distributions: float32 [n, num_classes], for `cifar10.loss`.
  """
  count = tf.shape(images)[0]
  # A gamma variable over the sum of two has a beta distribution.
  parts = tf.random.gamma([count, 2], concentration)
  drawn = tf.math.divide_no_nan(parts[:, 0], tf.reduce_sum(parts, axis=1))
  weights = tf.maximum(drawn, 1 - drawn)
  weights = tf.where_v2(is_active, weights, tf.ones_like(weights))
  distributions = _mix(tf.one_hot(labels, num_classes), weights[:, tf.newaxis])
  return _mix(images, tf.reshape(weights, [-1, 1, 1, 1])), distributions


@xla.compiled
def _mix(values: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
  """Average each row with the one before it; the first one with the last."""
  wide = tf.cast(values, tf.float32)
  others = tf.roll(wide, shift=1, axis=0)
  return tf.cast(others + weights * (wide - others), values.dtype)
