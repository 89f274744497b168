"""Multiple views of an image, and averages of their predictions."""

import math

import tensorflow.compat.v1 as tf


def cut(images: tf.Tensor, size: int, num_views: int) -> tf.Tensor:
  """Cut windows out of each image.

  Args:
    images: [n, height, width, channels].
    size: height and width of a window.
    num_views: 1 for the centre; 2 for the centre and its mirror image; 10 for
      the centre, the four corners, and the mirror images of these five.

  Returns:
    [n * num_views, size, size, channels]; windows of the same image are
    adjacent.
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
  """Average the probabilities over the views of each image.

  Args:
    logits: float32 [batch * num_views, classes]; views of the same image are
      adjacent.
    num_views: number of views per image.

  Returns:
    Natural logarithms of the averages, float32 [batch, classes].
  """
  views = tf.reshape(
    tf.nn.log_softmax(logits), [-1, num_views, logits.shape.as_list()[-1]]
  )
  return tf.reduce_logsumexp(views, axis=1) - math.log(num_views)
