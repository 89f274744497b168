"""Summaries with exact tags, independent of the name scope."""

import itertools
import math

import tensorflow.compat.v1 as tf

# A histogram takes TensorFlow 50 ns per value; those of all variables and
# gradients would take as long as several steps.
_SAMPLE_SIZE = 20000


def histogram(tag: str, values: tf.Tensor) -> None:
  """Add a histogram summary with the given tag.

  It shows a sample of large tensors: about 20,000 values at equal distances.
  """
  size = values.shape.num_elements() or 0
  # A stride that is coprime to the size visits all rows and columns alike.
  stride = next(
    stride
    for stride in itertools.count(max(size // _SAMPLE_SIZE, 1))
    if math.gcd(stride, size) == 1 or not size
  )
  if stride > 1:
    values = tf.reshape(values, [-1])[::stride]
  with tf.device('/cpu:0'):
    summary = tf.raw_ops.HistogramSummary(tag=_unused_tag(tag), values=values)
  tf.add_to_collection(tf.GraphKeys.SUMMARIES, summary)


def scalar(tag: str, value: tf.Tensor) -> None:
  """Add a scalar summary with the given tag."""
  with tf.device('/cpu:0'):
    summary = tf.raw_ops.ScalarSummary(tags=_unused_tag(tag), values=value)
  tf.add_to_collection(tf.GraphKeys.SUMMARIES, summary)


def _unused_tag(tag: str) -> str:
  """Append '_1', '_2', ... to a tag that already exists in the graph.

  `tf.summary` derives tags from operation names, which would include the prefix
  of the tower and call a variable's histogram 'conv1/weights_1'. Therefore,
  this module creates the operations directly.
  """
  tags = tf.get_collection_ref('summary_tags')
  tags.append(tag)
  repeats = tags.count(tag) - 1
  return f'{tag}_{repeats}' if repeats else tag
