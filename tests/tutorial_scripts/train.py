"""Custom training and evaluation loops, in the tutorial's style."""

import math

import numpy as np
import tensorflow.compat.v1 as tf

import cifar10

FLAGS = tf.app.flags.FLAGS

tf.app.flags.DEFINE_string('train_dir', '/tmp/cifar10_train', 'Directory.')
tf.app.flags.DEFINE_string('eval_dir', '/tmp/cifar10_eval', 'Directory.')
tf.app.flags.DEFINE_integer('max_steps', 5, 'Number of batches.')
tf.app.flags.DEFINE_integer('num_examples', 100, 'Number of examples.')
tf.app.flags.DEFINE_boolean('log_device_placement', False, 'Log placement.')


def train():
  with tf.Graph().as_default():
    global_step = tf.Variable(0, trainable=False, name='global_step')
    images, labels = cifar10.distorted_inputs()
    logits = cifar10.inference(images)
    loss = cifar10.loss(logits, labels)
    train_op = cifar10.train(loss, global_step)
    saver = tf.train.Saver(tf.global_variables())
    summary_op = tf.summary.merge_all()
    sess = tf.Session(
      config=tf.ConfigProto(log_device_placement=FLAGS.log_device_placement)
    )
    sess.run(tf.global_variables_initializer())
    coord = tf.train.Coordinator()
    threads = tf.train.start_queue_runners(sess=sess, coord=coord)
    writer = tf.summary.FileWriter(FLAGS.train_dir, sess.graph)
    for step in range(FLAGS.max_steps):
      _, loss_value = sess.run([train_op, loss])
      assert not np.isnan(loss_value), 'Model diverged with loss = NaN'
      print('step %d, loss = %.2f' % (step, loss_value))
    writer.add_summary(sess.run(summary_op), FLAGS.max_steps)
    saver.save(sess, FLAGS.train_dir + '/model.ckpt', global_step=step)
    coord.request_stop()
    coord.join(threads)


def evaluate():
  with tf.Graph().as_default():
    images, labels = cifar10.inputs(eval_data=True)
    logits = cifar10.inference(images)
    top_k_op = tf.nn.in_top_k(logits, labels, 1)
    variable_averages = tf.train.ExponentialMovingAverage(
      cifar10.MOVING_AVERAGE_DECAY
    )
    saver = tf.train.Saver(variable_averages.variables_to_restore())
    with tf.Session() as sess:
      ckpt = tf.train.get_checkpoint_state(FLAGS.train_dir)
      saver.restore(sess, ckpt.model_checkpoint_path)
      coord = tf.train.Coordinator()
      threads = []
      for qr in tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS):
        threads.extend(
          qr.create_threads(sess, coord=coord, daemon=True, start=True)
        )
      num_iter = int(math.ceil(FLAGS.num_examples / FLAGS.batch_size))
      true_count = 0
      for _ in range(num_iter):
        true_count += np.sum(sess.run([top_k_op]))
      print('precision @ 1 = %.3f' % (true_count / num_iter / FLAGS.batch_size))
      coord.request_stop()
      coord.join(threads, stop_grace_period_secs=10)


def main(argv=None):
  cifar10.maybe_download_and_extract()
  train()
  evaluate()


if __name__ == '__main__':
  tf.app.run()
