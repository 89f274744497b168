"""Use of the tutorial's modules from notebooks, tests and other programs."""

import sys

import tensorflow.compat.v1 as tf
from absl import flags


def known_flags() -> flags.FlagValues:
  """Return the flags, and parse the command line if nobody has done so.

  It may be that of another program, such as a notebook's kernel or a test
  runner: flags that are not defined are left alone.
  """
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(sys.argv, known_only=True)
  return flags.FLAGS


def require_graph_mode() -> None:
  """Raise RuntimeError where eager execution would break TF1's queues."""
  if tf.executing_eagerly():
    raise RuntimeError(
      "The network needs TensorFlow 1's graph mode. Call "
      'tf.compat.v1.disable_v2_behavior() at the start of the program, or '
      'build it under "with tf.Graph().as_default():".'
    )
