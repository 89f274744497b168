"""Measure the speed of matrix products, an upper bound for any network."""

import os
import statistics
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

from cifar10_suite import loading

loading.load_tensorflow()

import tensorflow.compat.v1 as tf
from timing import report

from cifar10_suite import processor

SIZE = 4096


def main(dtype):
  tf.disable_v2_behavior()
  processor.use_threads(processor.usable_cores())
  numbers = tf.cast(tf.random.normal([SIZE, SIZE]), dtype)
  a = tf.get_variable('a', initializer=numbers)
  product = tf.matmul(a, a).op
  with tf.train.MonitoredSession() as session:
    seconds = []
    for _ in range(10):
      start = time.perf_counter()
      session.run(product)
      seconds.append(time.perf_counter() - start)
  report(gflop_per_sec=2 * SIZE**3 / statistics.median(seconds) / 1e9)


if __name__ == '__main__':
  main(sys.argv[1])
