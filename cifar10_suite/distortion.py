"""Distortion of training images, for given random numbers."""

import numpy as np
import tensorflow.compat.v1 as tf

from cifar10_suite import dataset, xla

NUM_RANDOM = 6  # random numbers per image


def apply(
  pixels: tf.Tensor,
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
    pixels: uint8 [n, channels, height, width], or the bytes of records, [n,
      1 + channels * height * width], whose labels are skipped.
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
  # In a single function, XLA would cut each pixel out again for each sum.
  planes = _crop_and_flip(pixels, numbers[:, :3], size, crop_margin)
  return _adjust_and_standardize(
    planes, numbers[:, 3:], max_brightness, saturation, contrast, dtype
  )


def planes_in(records: tf.Tensor) -> tf.Tensor:
  """Return the images, uint8 [n, 3, 32, 32], in records, uint8 [n, 3073]."""
  shape = [dataset.DEPTH, dataset.HEIGHT, dataset.WIDTH]
  return tf.reshape(records[:, 1:], [-1, *shape])


@xla.compiled
def _crop_and_flip(
  pixels: tf.Tensor, numbers: tf.Tensor, size: int, margin: tf.Tensor
) -> tf.Tensor:
  """Cut a square out of each image, and mirror some of them.

  Returns:
    uint8 [n, channels, size, size].
  """
  if pixels.shape.rank == 2:
    pixels = planes_in(pixels)
  _, _, height, width = pixels.shape.as_list()
  top, left, flip = tf.unstack(numbers, axis=1)
  window = tf.range(size)
  rows = _starts(top, height, size, margin) + window
  columns = _starts(left, width, size, margin) + tf.where_v2(
    flip[:, tf.newaxis] < 0.5, size - 1 - window, window
  )
  planes = tf.gather(pixels, rows, axis=2, batch_dims=1)
  return tf.gather(planes, columns, axis=3, batch_dims=1)


def _starts(
  numbers: tf.Tensor, length: int, size: int, margin: tf.Tensor
) -> tf.Tensor:
  """Return the starts of crops along one axis, int32 [n, 1]."""
  last = length - size
  centre = last // 2
  before, after = margin * centre, margin * (last - centre)
  offsets = _between((-before - 0.5, after + 0.5), numbers)
  # Rounding may exceed the bounds at the ends of the interval.
  starts = tf.clip_by_value(centre + tf.round(offsets), 0, last)
  return tf.cast(starts, tf.int32)[:, tf.newaxis]


def _between(
  bounds: tuple[float | tf.Tensor, float | tf.Tensor], numbers: tf.Tensor
) -> tf.Tensor:
  """Map numbers from 0 to 1 to the interval between bounds."""
  low, high = bounds
  return low + (high - low) * numbers


def _saturate(planes: tf.Tensor, saturation: tf.Tensor) -> tf.Tensor:
  planes = tf.cast(planes, tf.float32)
  greys = tf.reduce_mean(planes, axis=1, keepdims=True)
  return (planes - greys) * saturation + greys


@xla.compiled
def _adjust_and_standardize(
  planes: tf.Tensor,
  numbers: tf.Tensor,
  max_brightness: float,
  saturation: tuple[float, float] | None,
  contrast: tuple[float, float],
  dtype: tf.DType,
) -> tf.Tensor:
  """Adjust colours and standardize, in one pass over the pixels.

  The moments of the result follow from those of the channels before.

  Returns:
    [n, height, width, channels].
  """
  brightness_at, saturation_at, contrast_at = (
    it[:, tf.newaxis, tf.newaxis, tf.newaxis]
    for it in tf.unstack(numbers, axis=1)
  )
  if saturation:
    planes = _saturate(planes, _between(saturation, saturation_at))
  brightness = _between((-max_brightness, max_brightness), brightness_at)
  factor = _between(contrast, contrast_at)
  means, variances = _moments(planes)
  means += brightness
  # Contrast does not change the means of the channels, nor that of the image.
  mean = tf.reduce_mean(means, axis=1, keepdims=True)
  variance = tf.reduce_mean(
    variances * factor**2 + (means - mean) ** 2, axis=1, keepdims=True
  )
  size = np.prod(planes.shape.as_list()[1:])
  planes = tf.cast(planes, tf.float32) + brightness
  planes = (planes - means) * factor + means - mean
  planes /= tf.maximum(tf.sqrt(variance), size**-0.5)
  return xla.cast(tf.transpose(planes, [0, 2, 3, 1]), dtype)


def _moments(planes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  """Return means and variances over planes [n, channels, height, width].

  Both are float32 [n, channels, 1, 1].
  """
  if planes.dtype != tf.uint8:
    return tf.nn.moments(planes, [2, 3], keepdims=True)
  # Sums of whole numbers are faster, and exact.
  pixels = tf.cast(planes, tf.int32)
  sums, squares = _sum(pixels), _sum(pixels * pixels)
  size = np.prod(planes.shape.as_list()[2:])
  # If both terms were rounded before the subtraction, the variance of a plain
  # image could be negative.
  variances = (squares * size - sums**2) / size**2
  return tf.cast(sums / size, tf.float32), tf.cast(variances, tf.float32)


def _sum(planes: tf.Tensor) -> tf.Tensor:
  """Return sums over planes, float64 [n, channels, 1, 1].

  Columns first: XLA adds rows with vector instructions, but not the numbers of
  a row. The cast keeps XLA from merging the two sums.
  """
  columns = tf.reduce_sum(planes, axis=2, keepdims=True)
  return tf.reduce_sum(tf.cast(columns, tf.float64), axis=3, keepdims=True)
