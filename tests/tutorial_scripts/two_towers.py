"""Train two towers that share their variables, in the tutorial's style."""

import re

import tensorflow.compat.v1 as tf

import cifar10

FLAGS = tf.app.flags.FLAGS

tf.app.flags.DEFINE_string('train_dir', '/tmp/cifar10_train', 'Directory.')
tf.app.flags.DEFINE_integer('max_steps', 3, 'Number of batches.')
tf.app.flags.DEFINE_integer('num_gpus', 2, 'Number of towers.')
tf.app.flags.DEFINE_boolean('log_device_placement', False, 'Log placement.')


def tower_loss(scope):
  images, labels = cifar10.distorted_inputs()
  logits = cifar10.inference(images)
  _ = cifar10.loss(logits, labels)
  losses = tf.get_collection('losses', scope)
  assert len(losses) == 3, losses
  total_loss = tf.add_n(losses, name='total_loss')
  for loss in losses + [total_loss]:
    loss_name = re.sub('%s_[0-9]*/' % cifar10.TOWER_NAME, '', loss.op.name)
    tf.summary.scalar(loss_name, loss)
  return total_loss


def average_gradients(tower_grads):
  average_grads = []
  for grad_and_vars in zip(*tower_grads):
    grads = [tf.expand_dims(grad, 0) for grad, _ in grad_and_vars]
    grad = tf.reduce_mean(tf.concat(axis=0, values=grads), 0)
    average_grads.append((grad, grad_and_vars[0][1]))
  return average_grads


def train():
  with tf.Graph().as_default(), tf.device('/cpu:0'):
    global_step = tf.get_variable(
      'global_step',
      [],
      initializer=tf.constant_initializer(0),
      trainable=False,
    )
    num_batches_per_epoch = (
      cifar10.NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN / FLAGS.batch_size
    )
    lr = tf.train.exponential_decay(
      cifar10.INITIAL_LEARNING_RATE,
      global_step,
      int(num_batches_per_epoch * cifar10.NUM_EPOCHS_PER_DECAY),
      cifar10.LEARNING_RATE_DECAY_FACTOR,
      staircase=True,
    )
    opt = tf.train.GradientDescentOptimizer(lr)
    tower_grads = []
    with tf.variable_scope(tf.get_variable_scope()):
      for i in range(FLAGS.num_gpus):
        with (
          tf.device('/gpu:%d' % i),
          tf.name_scope('%s_%d' % (cifar10.TOWER_NAME, i)) as scope,
        ):
          loss = tower_loss(scope)
          tf.get_variable_scope().reuse_variables()
          summaries = tf.get_collection(tf.GraphKeys.SUMMARIES, scope)
          tower_grads.append(opt.compute_gradients(loss))
    apply_gradient_op = opt.apply_gradients(
      average_gradients(tower_grads), global_step=global_step
    )
    variable_averages = tf.train.ExponentialMovingAverage(
      cifar10.MOVING_AVERAGE_DECAY, global_step
    )
    averages_op = variable_averages.apply(tf.trainable_variables())
    train_op = tf.group(apply_gradient_op, averages_op)
    saver = tf.train.Saver(tf.global_variables())
    summary_op = tf.summary.merge(summaries)
    everything_op = tf.summary.merge_all()
    sess = tf.Session(
      config=tf.ConfigProto(
        allow_soft_placement=True,
        log_device_placement=FLAGS.log_device_placement,
      )
    )
    sess.run(tf.global_variables_initializer())
    tf.train.start_queue_runners(sess=sess)
    for step in range(FLAGS.max_steps):
      _, loss_value = sess.run([train_op, loss])
      print('step %d, loss = %.2f' % (step, loss_value))
    sess.run(everything_op)
    summary = tf.Summary.FromString(sess.run(summary_op))
    print('summaries: %s' % ' '.join(value.tag for value in summary.value))
    saver.save(sess, FLAGS.train_dir + '/model.ckpt', global_step=step)


def main(argv=None):
  cifar10.maybe_download_and_extract()
  train()


if __name__ == '__main__':
  tf.app.run()
