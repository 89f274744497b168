"""Distortion of training images, for given random numbers."""

import numpy as np
import tensorflow.compat.v1 as tf

from cifar10_suite import xla

NUM_RANDOM = 6  # random numbers per image


@xla.compiled
def apply(
  planes: tf.Tensor,
  numbers: tf.Tensor,
  size: int,
  crop_margin: tf.Tensor,
  max_brightness: float,
  saturation: tuple[float, float] | None,
  contrast: tuple[float, float],
  dtype: tf.DType,
) -> tf.Tensor:
  """Crop and flip images, adjust their colours, and standardize them.

  Brightness is added to the image. Saturation is a factor of the deviations of
  channels from the mean of their pixel, and contrast one of the deviations of
  pixels from the mean of their channel.

  Args:
    planes: uint8 [n, channels, height, width].
    numbers: float32 [n, NUM_RANDOM], from 0 to 1: where to cut along height and
      width, whether to mirror (below 0.5), then the places of brightness,
      saturation and contrast between their bounds.
    size: height and width of the crops.
    crop_margin: float32 [], maximum offset of a crop from the centre, from 0
      (none) to 1 (up to the edge).
    max_brightness: maximum absolute brightness.
    saturation: bounds; None for a factor of 1.
    contrast: bounds.
    dtype: type of the result.

  Returns:
    [n, size, size, channels]: as from `tf.image.per_image_standardization`, of
    mean 0 and standard deviation 1, unless the image is almost plain.
  """
  _, _, height, width = planes.shape.as_list()
  top, left, flip, *colours = tf.unstack(numbers, axis=1)
  brightness_at, saturation_at, contrast_at = (
    it[:, tf.newaxis, tf.newaxis, tf.newaxis] for it in colours
  )
  planes = _crop_and_flip(
    planes,
    _starts(top, height, size, crop_margin),
    _starts(left, width, size, crop_margin),
    flip < 0.5,
    size,
  )
  if saturation:
    planes = _saturate(planes, _between(saturation, saturation_at))
  planes = _adjust_and_standardize(
    planes,
    _between((-max_brightness, max_brightness), brightness_at),
    _between(contrast, contrast_at),
  )
  return tf.cast(tf.transpose(planes, [0, 2, 3, 1]), dtype)


def _starts(
  numbers: tf.Tensor, length: int, size: int, margin: tf.Tensor
) -> tf.Tensor:
  """Return the starts of crops along one axis, int32 [n]."""
  last = length - size
  centre = last // 2
  before, after = margin * centre, margin * (last - centre)
  offsets = _between((-before - 0.5, after + 0.5), numbers)
  # Rounding may exceed the bounds at the ends of the interval.
  starts = tf.clip_by_value(centre + tf.round(offsets), 0, last)
  return tf.cast(starts, tf.int32)


def _between(
  bounds: tuple[float | tf.Tensor, float | tf.Tensor], numbers: tf.Tensor
) -> tf.Tensor:
  """Map numbers from 0 to 1 to the interval between bounds."""
  low, high = bounds
  return low + (high - low) * numbers


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
  sums, squares = tf.cast(sums, tf.float64), tf.cast(squares, tf.float64)
  # Rounded before the subtraction, the variance of a plain image could be less
  # than zero, which has no square root.
  variances = (squares * size - sums**2) / size**2
  return tf.cast(sums / size, tf.float32), tf.cast(variances, tf.float32)
