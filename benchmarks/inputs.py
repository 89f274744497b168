"""Measure the suite's input pipeline alone."""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

from cifar10_suite import loading

loading.load_tensorflow()

import tensorflow.compat.v1 as tf
from timing import BATCH_SIZE, run_steps

import cifar10_input
from cifar10_suite import processor

tf.disable_v2_behavior()
processor.use_threads(processor.usable_cores())
_, labels = cifar10_input.distorted_inputs(sys.argv[1], BATCH_SIZE)
with tf.train.MonitoredSession() as session:
  run_steps(lambda: session.run(labels.op))
