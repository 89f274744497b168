"""Trains the CIFAR-10 network on several GPUs of one machine.

  python cifar10_multi_gpu_train.py --num_gpus 2

Each GPU has a tower: the whole network, over the same variables, and a batch of
its own. Each step averages the gradients of all towers and updates once. The
loop, the flags and the checkpoints are those of cifar10_train.py.

Without GPUs, the towers run on the processor, so that all of this can be tried
on any machine.
"""

import functools
import sys

import console  # first: it keeps TensorFlow's chatter off the console

# isort: split
import tensorflow.compat.v1 as tf

import cifar10
import cifar10_cluster
import cifar10_train
from cifar10_recipes import TUTORIAL, Recipe

tf.app.flags.DEFINE_integer(
  'num_gpus', 1, 'Number of GPUs; 0 keeps off them.', lower_bound=0
)
tf.app.flags.DEFINE_boolean(
  'scale_learning_rate',
  False,
  'Multiply the learning rate by the number of towers, within five epochs.',
)
tf.app.flags.adopt_module_key_flags(cifar10_train)
FLAGS = tf.app.flags.FLAGS


def main() -> None:
  recipe = cifar10_train.adopt_recipe()
  devices, config = tower_devices(FLAGS.num_gpus, FLAGS.log_device_placement)
  cifar10_train.train(
    functools.partial(build_graph, devices, recipe),
    len(devices) * FLAGS.batch_size,
    config,
  )


def tower_devices(
  num_gpus: int, log_device_placement: bool = False
) -> tuple[list[str], tf.ConfigProto]:
  """Returns a device for each tower, and the session's configuration.

  Args:
    num_gpus: number of GPUs to use. If it is 0, or the machine has none, the
      devices are logical ones of the processor, beside '/cpu:0'.
    log_device_placement: whether TensorFlow is to log where it runs each
      operation.

  Raises:
    SystemExit: the machine has GPUs, but fewer.
  """
  config = cifar10_train.session_config(log_device_placement)
  there = len(tf.config.list_physical_devices('GPU'))
  if num_gpus and there:
    if num_gpus > there:
      sys.exit(
        f'--num_gpus={num_gpus} asks for more GPUs than there are: {there}.'
      )
    return [f'/gpu:{k}' for k in range(num_gpus)], config
  towers = max(num_gpus, 1)
  noun = 'tower' if towers == 1 else 'towers'
  print(f'Without GPUs: {towers} {noun} on the processor.')
  config.device_count['CPU'] = 1 + towers
  config.device_count['GPU'] = 0
  return [f'/cpu:{1 + k}' for k in range(towers)], config


def build_graph(
  devices: list[str], recipe: Recipe, cluster: cifar10_cluster.Cluster
) -> tuple[tf.Tensor, tf.Operation]:
  """Builds training on several devices, as the flags say.

  Args:
    devices: one for each tower.
    recipe: how to train.
    cluster: the workers that train together.

  Returns:
    loss: float32 [], the mean of the towers' total losses.
    train_op: the operation that does a step.
  """
  return train_towers(
    devices,
    cifar10.distorted_batches(len(devices), recipe),
    FLAGS.batch_size,
    FLAGS.scale_learning_rate,
    cluster,
    recipe,
  )


def train_towers(
  devices: list[str],
  batches: list[tuple[tf.Tensor, tf.Tensor]],
  batch_size: int,
  scale_learning_rate: bool = False,
  cluster: cifar10_cluster.Cluster = cifar10_cluster.ALONE,
  recipe: Recipe = TUTORIAL,
) -> tuple[tf.Tensor, tf.Operation]:
  """Builds a step of training that each device does a part of.

  Args:
    devices: one for each tower.
    batches: images, [batch_size, 24, 24, 3], and labels, integers [batch_size],
      of each tower.
    batch_size: number of images of each tower.
    scale_learning_rate: whether to multiply the learning rate by the number of
      towers, those of all workers.
    cluster: the workers that train together.
    recipe: how to train.

  Returns:
    loss: float32 [], the mean of the towers' total losses.
    train_op: the operation that does the step.
  """
  with tf.device('/cpu:0'):
    global_step = cifar10.make_global_step()
    towers = len(devices) * cluster.gradients_per_step
    learning_rate = cifar10.learning_rate(
      global_step,
      examples_per_step=towers * batch_size,
      scale=towers if scale_learning_rate else 1,
      recipe=recipe,
    )
  optimizer = cluster.synchronized(
    cifar10.make_optimizer(learning_rate, recipe)
  )

  losses, gradients = [], []
  for k, (device, (images, labels)) in enumerate(
    zip(devices, batches, strict=True)
  ):
    summaries = tf.get_collection(tf.GraphKeys.SUMMARIES)
    with (
      tf.device(device),
      tf.name_scope(f'{cifar10.TOWER_NAME}_{k}'),
      tf.variable_scope(tf.get_variable_scope(), reuse=k > 0),
    ):
      logits = cifar10.inference(images, recipe)
      total_loss = cifar10.loss(logits, labels, recipe)
      losses.append(cifar10.named_losses(total_loss))
      gradients.append(optimizer.compute_gradients(total_loss))
    if k > 0:  # the first tower's activations stand for all
      tf.get_collection_ref(tf.GraphKeys.SUMMARIES)[:] = summaries

  with tf.device('/cpu:0'):
    mean_losses = [
      (same[0][0], tf.add_n([value for _, value in same]) / len(same))
      for same in zip(*losses, strict=True)
    ]
    train_op = cifar10.apply_gradients(
      optimizer,
      average_gradients(gradients),
      global_step,
      after=cifar10.average_losses(mean_losses),
    )
  _, mean_total_loss = mean_losses[-1]
  return mean_total_loss, train_op


def average_gradients(
  tower_gradients: list[list[tuple[tf.Tensor | None, tf.Variable]]],
) -> list[tuple[tf.Tensor | None, tf.Variable]]:
  """Averages each variable's gradient over the towers.

  Args:
    tower_gradients: (gradient, variable) pairs of each tower, of the same
      variables in the same order. None counts as zero.

  Returns:
    One list of such pairs. A gradient is None only if it is None in all towers.
  """
  averages = []
  for pairs in zip(*tower_gradients, strict=True):
    gradients = [gradient for gradient, _ in pairs if gradient is not None]
    mean = tf.add_n(gradients) / len(pairs) if gradients else None
    averages.append((mean, pairs[0][1]))
  return averages


if __name__ == '__main__':
  console.run(main)
