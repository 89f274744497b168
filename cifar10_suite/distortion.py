"""Parts of the random distortion of training images."""

import numpy as np
import tensorflow.compat.v1 as tf

from cifar10_suite import xla


def random_offsets(
  count: int | tf.Tensor, length: int, size: int, margin: float | tf.Tensor
) -> tf.Tensor:
  """Draw the starts of crops along one axis.

  Args:
    count: number of crops, an int or int32 [].
    length: length of the image along the axis.
    size: length of a crop.
    margin: maximum offset from the centre, a number or float32 [] from 0 (none)
      to 1 (up to the edge).

  Returns:
    int32 [count].
  """
  last = length - size
  centre = last // 2
  before, after = margin * centre, margin * (last - centre)
  offsets = tf.random.uniform([count], -before - 0.5, after + 0.5)
  # Rounding may exceed the bounds at the ends of the interval.
  starts = tf.clip_by_value(centre + tf.round(offsets), 0, last)
  return tf.cast(starts, tf.int32)


@xla.compiled
def apply(
  planes: tf.Tensor,
  tops: tf.Tensor,
  lefts: tf.Tensor,
  flips: tf.Tensor,
  brightness: tf.Tensor,
  saturation: tf.Tensor | None,
  contrast: tf.Tensor,
  size: int,
  dtype: tf.DType,
) -> tf.Tensor:
  """Crop and flip images, adjust their colours, and standardize them.

  Args:
    planes: uint8 [n, channels, height, width].
    tops, lefts: int32 [n], first rows and columns of the crops.
    flips: bool [n], whether to mirror.
    brightness: float32 [n, 1, 1, 1], added to the image.
    saturation: float32 [n, 1, 1, 1], factor of the saturation: the deviations
      of channels from the mean of their pixel; None for 1.
    contrast: float32 [n, 1, 1, 1], factor of the contrast: the deviations of
      pixels from the mean of their channel.
    size: height and width of the crops.
    dtype: type of the result.

  Returns:
    [n, size, size, channels]: as from `tf.image.per_image_standardization`, of
    mean 0 and standard deviation 1, unless the image is almost plain.
  """
  planes = _crop_and_flip(planes, tops, lefts, flips, size)
  if saturation is not None:
    planes = _saturate(planes, saturation)
  planes = _adjust_and_standardize(planes, brightness, contrast)
  return tf.cast(tf.transpose(planes, [0, 2, 3, 1]), dtype)


def _crop_and_flip(
  planes: tf.Tensor,
  tops: tf.Tensor,
  lefts: tf.Tensor,
  flips: tf.Tensor,
  size: int,
) -> tf.Tensor:
  """Cut a square out of each image, and mirror some of them."""
  window = tf.range(size)
  rows = tops[:, tf.newaxis] + window
  columns = lefts[:, tf.newaxis] + tf.where_v2(
    flips[:, tf.newaxis], size - 1 - window, window
  )
  planes = tf.gather(planes, rows, axis=2, batch_dims=1)
  return tf.gather(planes, columns, axis=3, batch_dims=1)


def _saturate(planes: tf.Tensor, saturation: tf.Tensor) -> tf.Tensor:
  planes = tf.cast(planes, tf.float32)
  greys = tf.reduce_mean(planes, axis=1, keepdims=True)
  return (planes - greys) * saturation + greys


def _adjust_and_standardize(
  planes: tf.Tensor, brightness: tf.Tensor, contrast: tf.Tensor
) -> tf.Tensor:
  """Adjust brightness and contrast, and standardize, in one pass over pixels.

  The moments of the result follow from those of the channels before.
  """
  means, variances = _moments(planes)
  planes = tf.cast(planes, tf.float32) + brightness
  means += brightness
  # Contrast does not change the means of the channels, nor that of the image.
  mean = tf.reduce_mean(means, axis=1, keepdims=True)
  planes = (planes - means) * contrast + means - mean
  variance = tf.reduce_mean(
    variances * contrast**2 + (means - mean) ** 2, axis=1, keepdims=True
  )
  size = np.prod(planes.shape.as_list()[1:])
  return planes / tf.maximum(tf.sqrt(variance), size**-0.5)


def _moments(planes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  """Return means and variances over planes [n, channels, height, width].

  Both are float32 [n, channels, 1, 1].
  """
  if planes.dtype != tf.uint8:
    return tf.nn.moments(planes, [2, 3], keepdims=True)
  # Sums of whole numbers are faster, and exact.
  pixels = tf.cast(planes, tf.int32)
  size = np.prod(planes.shape.as_list()[2:])
  sums = tf.reduce_sum(pixels, [2, 3], keepdims=True)
  squares = tf.reduce_sum(pixels * pixels, [2, 3], keepdims=True)
  means = tf.cast(sums, tf.float64) / size
  variances = tf.cast(squares, tf.float64) / size - means**2
  return tf.cast(means, tf.float32), tf.cast(variances, tf.float32)
