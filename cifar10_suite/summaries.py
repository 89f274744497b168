"""Summaries whose tags are exactly as given, whatever the name scope."""

import tensorflow.compat.v1 as tf


def histogram(tag: str, values: tf.Tensor) -> None:
  """Adds a histogram to the summaries, with this tag."""
  with tf.device('/cpu:0'):
    summary = tf.raw_ops.HistogramSummary(tag=_unused_tag(tag), values=values)
  tf.add_to_collection(tf.GraphKeys.SUMMARIES, summary)


def scalar(tag: str, value: tf.Tensor) -> None:
  """Adds a scalar to the summaries, with this tag."""
  with tf.device('/cpu:0'):
    summary = tf.raw_ops.ScalarSummary(tags=_unused_tag(tag), values=value)
  tf.add_to_collection(tf.GraphKeys.SUMMARIES, summary)


def _unused_tag(tag: str) -> str:
  """Appends '_1', '_2', ... to a tag that the graph has already.

  `tf.summary` makes tags out of operations' names: they would carry the tower's
  prefix, and a variable's histogram would be called 'conv1/weights_1'. Hence
  the plain operations, and this.
  """
  tags = tf.get_collection_ref('summary_tags')
  tags.append(tag)
  repeats = tags.count(tag) - 1
  return f'{tag}_{repeats}' if repeats else tag
