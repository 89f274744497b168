"""Train the CIFAR-10 network on several GPUs of one machine.

  python cifar10_multi_gpu_train.py --num_gpus 2

Each GPU runs a tower: a copy of the network that shares all variables and
processes a separate batch. Each step averages the gradients of all towers and
updates once. The training loop, flags and checkpoints are those of
cifar10_train.py.

Without GPUs, the towers run on the CPU, so the program works on any machine.
"""

import functools

from cifar10_suite import loading

loading.load_tensorflow()

import tensorflow.compat.v1 as tf

import cifar10
import cifar10_train
from cifar10_suite import cli, sessions, updates
from cifar10_suite.cluster import ALONE, Cluster
from cifar10_suite.errors import UserError
from cifar10_suite.recipes import RECIPES
from cifar10_suite.train_settings import TrainSettings

tf.app.flags.DEFINE_integer(
  'num_gpus', 1, 'Number of GPUs; 0 disables GPUs.', lower_bound=0
)
tf.app.flags.DEFINE_boolean(
  'scale_learning_rate',
  False,
  'Multiply the learning rate by the number of towers (of all workers; with '
  'parameter servers, of one), rising linearly over the first five epochs.',
)
tf.app.flags.adopt_module_key_flags(cifar10_train)
FLAGS = tf.app.flags.FLAGS


average_gradients = updates.average_gradients  # as in the tutorial


def main() -> None:
  # First, because the compute type of the settings depends on the devices.
  devices, config = tower_devices(FLAGS.num_gpus, FLAGS.log_device_placement)
  settings = cifar10_train.settings_from_flags(RECIPES[FLAGS.recipe])
  cifar10_train.run(
    functools.partial(build_graph, devices=devices),
    settings,
    config,
    num_towers=len(devices),
    num_gpus=sum('gpu' in device for device in devices),
  )


def tower_devices(
  num_gpus: int, log_device_placement: bool = False
) -> tuple[list[str], tf.ConfigProto]:
  """Return the device of each tower and the session configuration.

  Args:
    num_gpus: number of GPUs to use. If it is 0, or the machine has no GPU, the
      devices are logical CPU devices other than '/cpu:0'.
    log_device_placement: whether to log the device of each operation.

  Raises:
    UserError: if the machine has GPUs, but fewer than `num_gpus`.
  """
  there = len(tf.config.list_physical_devices('GPU'))
  if not num_gpus:
    tf.config.set_visible_devices([], 'GPU')  # nor consider them elsewhere
  config = sessions.session_config(log_device_placement)
  if num_gpus and there:
    if num_gpus > there:
      raise UserError(
        f'--num_gpus={num_gpus} exceeds the number of available GPUs: {there}.'
      )
    return [f'/gpu:{k}' for k in range(num_gpus)], config
  towers = max(num_gpus, 1)
  noun = 'tower' if towers == 1 else 'towers'
  print(f'Without GPUs: {towers} {noun} on the processor.')
  config.device_count['CPU'] = 1 + towers
  config.device_count['GPU'] = 0
  return [f'/cpu:{1 + k}' for k in range(towers)], config


def build_graph(
  settings: TrainSettings, cluster: Cluster, *, devices: list[str]
) -> tuple[tf.Tensor, tf.Operation]:
  """Build the input pipeline and a training step on several devices."""
  batches = cifar10_train.distorted_batches(settings, len(devices))
  return train_towers(settings, devices, batches, cluster)


def train_towers(
  settings: TrainSettings,
  devices: list[str],
  batches: list[tuple[tf.Tensor, tf.Tensor]],
  cluster: Cluster = ALONE,
) -> tuple[tf.Tensor, tf.Operation]:
  """Build a training step with one tower per device.

  Args:
    settings: settings from the flags.
    devices: device of each tower.
    batches: (images, labels) pair of each tower: images [batch_size, 24, 24, 3]
      and labels, integers [batch_size].
    cluster: the tasks that train together.

  Returns:
    loss: float32 [], the mean of the towers' total losses.
    train_op: the operation that runs the step.
  """
  losses = []
  for k, (device, (images, labels)) in enumerate(
    zip(devices, batches, strict=True)
  ):
    summaries = tf.get_collection(tf.GraphKeys.SUMMARIES)
    with (
      tf.device(device),
      tf.name_scope(f'{cifar10.TOWER_NAME}_{k}'),
      tf.variable_scope(tf.get_variable_scope(), reuse=k > 0),
    ):
      losses.append(cifar10_train.build_loss(settings, images, labels))
    if k > 0:  # summarize the activations of the first tower only
      tf.get_collection_ref(tf.GraphKeys.SUMMARIES)[:] = summaries
  num_towers = len(devices) * cluster.workers_per_step
  return cifar10.train_towers(
    losses,
    updates.global_step(),
    examples_per_step=num_towers * settings.recipe.batch_size,
    examples_per_epoch=settings.data_set.num_training_images,
    recipe=settings.recipe,
    dtype=settings.dtype,
    learning_rate_scale=num_towers if settings.scale_learning_rate else 1.0,
    average_over_workers=cluster.average,
  )


if __name__ == '__main__':
  cli.run(main)
