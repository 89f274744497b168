"""Measure the suite's training step on a fixed batch, without input."""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

from cifar10_suite import loading

loading.load_tensorflow()

import tensorflow.compat.v1 as tf
from timing import run_steps

import cifar10
from cifar10_suite import convolution, large_pages, processor, sessions
from cifar10_suite.recipes import RECIPES


def main(dtype, recipe_name):
  recipe = RECIPES[recipe_name]
  count = recipe.batch_size
  tf.disable_v2_behavior()
  tf.app.flags.FLAGS(sys.argv[:1])
  processor.use_threads(processor.usable_cores())
  images = tf.get_local_variable(
    'images',
    initializer=tf.random.normal([count, 24, 24, 3]),
    use_resource=True,
  )
  labels = tf.get_local_variable(
    'labels',
    initializer=tf.random.uniform([count], maxval=10, dtype=tf.int32),
    use_resource=True,
  )
  logits = cifar10.inference(
    tf.cast(images, dtype),
    is_training=True,
    recipe=recipe,
    num_parts=convolution.num_parts(count, processor.usable_cores()),
  )
  loss = cifar10.loss(logits, labels, label_smoothing=recipe.label_smoothing)
  train_op = cifar10.train(
    loss,
    tf.train.get_or_create_global_step(),
    recipe=recipe,
    examples_per_step=count,
    dtype=tf.as_dtype(dtype),
  )
  with tf.train.MonitoredSession(
    tf.train.ChiefSessionCreator(config=sessions.session_config()),
    hooks=[large_pages.UseLargePages()],
  ) as session:
    run_steps(lambda: session.run(train_op), count)


if __name__ == '__main__':
  main(*sys.argv[1:])
