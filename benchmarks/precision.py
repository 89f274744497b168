"""Print whether the suite finds TensorFlow faster in bfloat16 here."""

import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

from cifar10_suite import loading

loading.load_tensorflow()

import tensorflow.compat.v1 as tf

from cifar10_suite import convolution, processor

processor.use_threads(processor.usable_cores())
print(json.dumps({'bfloat16': bool(convolution.is_fast(tf.bfloat16))}))
