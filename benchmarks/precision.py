"""Asks the suite whether TensorFlow is faster in bfloat16 on this machine."""

import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

import console  # noqa: F401  first: it keeps TensorFlow's chatter off

# isort: split
import tensorflow.compat.v1 as tf

import cifar10_precision

print(json.dumps({'bfloat16': bool(cifar10_precision.is_fast(tf.bfloat16))}))
