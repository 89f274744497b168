"""Several views of an image, and the average of what a network sees in them."""

import math

import tensorflow.compat.v1 as tf


def cut(images: tf.Tensor, size: int, num_views: int) -> tf.Tensor:
  """Cuts windows out of each image.

  Args:
    images: [n, height, width, channels].
    size: height and width of a window.
    num_views: 1 for the centre; 2 for it and its mirror image; 10 for it, the
      four corners, and the mirror images of these five.

  Returns:
    [n * num_views, size, size, channels], the windows of an image in a row.
  """
  height, width, depth = images.shape.as_list()[1:]
  down, right = height - size, width - size
  corners = [(down // 2, right // 2)]
  if num_views == 10:
    corners += [(0, 0), (0, right), (down, 0), (down, right)]
  windows = [
    images[:, top : top + size, left : left + size] for top, left in corners
  ]
  if num_views > 1:
    windows += [window[:, :, ::-1] for window in windows]
  return tf.reshape(tf.stack(windows, axis=1), [-1, size, size, depth])


def average(logits: tf.Tensor, num_views: int) -> tf.Tensor:
  """Averages the probabilities over the views of each image.

  Args:
    logits: float32 [batch * num_views, classes], those of an image in a row.
    num_views: number of views of each image.

  Returns:
    The natural logarithms of the averages, float32 [batch, classes].
  """
  views = tf.reshape(
    tf.nn.log_softmax(logits), [-1, num_views, logits.shape.as_list()[-1]]
  )
  return tf.reduce_logsumexp(views, axis=1) - math.log(num_views)
