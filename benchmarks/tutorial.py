"""Measure the tutorial's approach: one example per read, TensorFlow's LRN.

This script was written from this suite's specification for comparison. Network,
distortions and update are the same; everything that the suite changed is done
as in the tutorial of 2016, such as reading with 16 threads.
"""

import os
import sys

import tensorflow.compat.v1 as tf
from timing import BATCH_SIZE, run_steps


def read_example(filenames):
  reader = tf.FixedLengthRecordReader(record_bytes=3073)
  _, value = reader.read(tf.train.string_input_producer(filenames))
  record = tf.decode_raw(value, tf.uint8)
  label = tf.reshape(tf.cast(record[0], tf.int32), [])
  image = tf.transpose(tf.reshape(record[1:3073], [3, 32, 32]), [1, 2, 0])
  return tf.cast(image, tf.float32), label


def distorted_batch(filenames):
  image, label = read_example(filenames)
  image = tf.image.random_crop(image, [24, 24, 3])
  image = tf.image.random_flip_left_right(image)
  image = tf.image.random_brightness(image, max_delta=63)
  image = tf.image.random_contrast(image, lower=0.2, upper=1.8)
  image = tf.image.per_image_standardization(image)
  images, labels = tf.train.shuffle_batch(
    [image, label],
    BATCH_SIZE,
    capacity=20000 + 3 * BATCH_SIZE,
    min_after_dequeue=20000,
    num_threads=16,
  )
  tf.summary.image('images', images)
  return images, labels


def variable(name, shape, initializer, wd=None):
  with tf.device('/cpu:0'):
    var = tf.get_variable(name, shape, initializer=initializer)
  if wd is not None:
    tf.add_to_collection('losses', wd * tf.nn.l2_loss(var))
  return var


def layer(name, x, shape, stddev, bias, combine, wd=None):
  with tf.variable_scope(name):
    weights = variable(
      'weights', shape, tf.truncated_normal_initializer(stddev=stddev), wd
    )
    biases = variable('biases', shape[-1:], tf.constant_initializer(bias))
    x = combine(x, weights) + biases
  if name != 'softmax_linear':
    x = tf.nn.relu(x)
  tf.summary.histogram(f'{name}/activations', x)
  tf.summary.scalar(f'{name}/sparsity', tf.nn.zero_fraction(x))
  return x


def convolve(x, kernel):
  return tf.nn.conv2d(x, kernel, [1, 1, 1, 1], padding='SAME')


def pool(x):
  return tf.nn.max_pool(x, [1, 3, 3, 1], [1, 2, 2, 1], padding='SAME')


def norm(x):
  return tf.nn.lrn(x, 4, bias=1.0, alpha=0.001 / 9.0, beta=0.75)


def inference(images):
  x = layer('conv1', images, [5, 5, 3, 64], 0.05, 0.0, convolve)
  x = norm(pool(x))
  x = layer('conv2', x, [5, 5, 64, 64], 0.05, 0.1, convolve)
  x = tf.reshape(pool(norm(x)), [BATCH_SIZE, 2304])
  x = layer('local3', x, [2304, 384], 0.04, 0.1, tf.matmul, wd=0.004)
  x = layer('local4', x, [384, 192], 0.04, 0.1, tf.matmul, wd=0.004)
  return layer('softmax_linear', x, [192, 10], 1 / 192, 0.0, tf.matmul)


def train(logits, labels):
  cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(
    labels=labels, logits=logits
  )
  tf.add_to_collection('losses', tf.reduce_mean(cross_entropy))
  losses = tf.get_collection('losses')
  total_loss = tf.add_n(losses)
  loss_averages = tf.train.ExponentialMovingAverage(0.9, name='avg')
  loss_averages_op = loss_averages.apply([*losses, total_loss])
  global_step = tf.train.get_or_create_global_step()
  rate = tf.train.exponential_decay(0.1, global_step, 136718, 0.1, True)
  with tf.control_dependencies([loss_averages_op]):
    optimizer = tf.train.GradientDescentOptimizer(rate)
    gradients = optimizer.compute_gradients(total_loss)
  for gradient, var in gradients:
    tf.summary.histogram(var.op.name, var)
    tf.summary.histogram(var.op.name + '/gradients', gradient)
  update = optimizer.apply_gradients(gradients, global_step)
  averages = tf.train.ExponentialMovingAverage(0.9999, global_step)
  with tf.control_dependencies([update]):
    return total_loss, averages.apply(tf.trainable_variables())


def main(batches_dir, train_dir):
  tf.disable_v2_behavior()
  filenames = [
    os.path.join(batches_dir, f'data_batch_{i}.bin') for i in range(1, 6)
  ]
  with tf.device('/cpu:0'):
    images, labels = distorted_batch(filenames)
  loss, train_op = train(inference(images), labels)
  with tf.train.MonitoredTrainingSession(
    checkpoint_dir=train_dir, hooks=[tf.train.NanTensorHook(loss)]
  ) as session:
    run_steps(lambda: session.run(train_op))


if __name__ == '__main__':
  main(*sys.argv[1:])
