"""Read every record with `read_cifar10`, in the tutorial's style."""

import sys

import tensorflow.compat.v1 as tf

import cifar10_input

with tf.Graph().as_default():
  queue = tf.FIFOQueue(99, [tf.string], shapes=())
  result = cifar10_input.read_cifar10(queue)
  with tf.Session() as sess:
    queue.enqueue([sys.argv[1]]).run()
    queue.close().run()
    count = 0
    try:
      while True:
        key, label, image = sess.run(
          [result.key, result.label, result.uint8image]
        )
        assert label.shape == (1,)
        assert image.shape == (result.height, result.width, result.depth)
        assert key.decode() == '%s:%d' % (sys.argv[1], count)
        count += 1
    except tf.errors.OutOfRangeError:
      print('%d records' % count)
