"""Multiple views of an image, and averages of their predictions."""

import math

import tensorflow.compat.v1 as tf


def cut(images: tf.Tensor, size: int, num_views: int) -> tf.Tensor:
  """Cut windows out of each image.

  The places of the windows form a grid of five by five from corner to corner.

  Args:
    images: [n, height, width, channels].
    size: height and width of a window.
    num_views: 1 for the centre; 2 for the centre and its mirror image; 10 for
      the centre, the four places diagonally next to it, and the mirror images
      of these five; 50 for all 25 places and their mirror images.

  Returns:
    [n * num_views, size, size, channels]; windows of the same image are
    adjacent.
  """
  height, width, depth = images.shape.as_list()[1:]
  places = [(2, 2)]
  if num_views == 10:
    places += [(1, 1), (1, 3), (3, 1), (3, 3)]
  if num_views == 50:
    places = [(row, column) for row in range(5) for column in range(5)]
  windows = []
  for row, column in places:
    top, left = row * (height - size) // 4, column * (width - size) // 4
    windows.append(images[:, top : top + size, left : left + size])
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
