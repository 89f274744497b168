"""Train the CIFAR-10 network.

  python cifar10_train.py [--train_dir cifar10_train] [--max_steps 100000]

Checkpoints and summaries go to --train_dir. After a restart, training resumes
from the newest readable checkpoint there. cifar10_eval.py scores the
checkpoints.
"""

import contextlib
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from cifar10_suite import loading

loading.load_tensorflow()

import numpy as np
import tensorflow.compat.v1 as tf

import cifar10
import cifar10_input
import download
from cifar10_suite import (
  all_reduce,
  checkpoints,
  cli,
  convolution,
  dataset,
  files,
  mixup,
  ownership,
  parameter_servers,
  processor,
  runs,
  schedules,
  sessions,
  starting,
  tf_config,
  training,
  updates,
  whitening,
)
from cifar10_suite.cluster import Cluster
from cifar10_suite.errors import UserError
from cifar10_suite.recipes import RECIPES, Recipe
from cifar10_suite.train_settings import TrainSettings

_HERE = os.path.dirname(os.path.abspath(__file__))

tf.app.flags.DEFINE_string(
  'train_dir',
  cli.DEFAULT_TRAIN_DIR,
  'Directory for checkpoints and event files.',
)
tf.app.flags.DEFINE_integer(
  'max_steps', 100000, 'Step at which training ends.', lower_bound=1
)
tf.app.flags.DEFINE_enum(
  'recipe',
  'tutorial',
  list(RECIPES),
  'Hyperparameters; --batch_size, --learning_rate and --max_steps override it.',
)
tf.app.flags.DEFINE_float(
  'learning_rate',
  None,
  "Initial or peak learning rate; overrides the recipe's.",
  lower_bound=0.0,
)
tf.app.flags.register_validator(
  'learning_rate',
  lambda value: value is None or math.isfinite(value),
  'must be a finite number',
)
tf.app.flags.DEFINE_integer(
  'log_frequency', 100, 'Steps between lines on the console.', lower_bound=1
)
tf.app.flags.DEFINE_integer(
  'save_checkpoint_secs',
  600,
  'Maximum seconds between checkpoints. Also saved: the first and last steps, '
  'and each twentieth of --max_steps if that is not too often.',
  lower_bound=1,
)
tf.app.flags.DEFINE_integer(
  'keep_checkpoint_max',
  5,
  'Number of latest checkpoints to keep; 0 keeps all.',
  lower_bound=0,
)
tf.app.flags.DEFINE_integer(
  'save_summaries_steps', 100, 'Steps between summaries.', lower_bound=1
)
tf.app.flags.DEFINE_integer(
  'hold_out',
  0,
  'Number of training images to leave out; the last ones of the files. '
  'cifar10_eval.py scores them with --eval_data=held_out.',
  lower_bound=0,
)
tf.app.flags.DEFINE_float(
  'stop_at_precision',
  None,
  'Stop once a checkpoint has this precision; a number from 0 to 1. The scores '
  'are those of cifar10_eval.py, running beside the trainer.',
)
tf.app.flags.register_validator(
  'stop_at_precision',
  lambda value: value is None or 0 < value <= 1,
  'must be greater than 0 and at most 1, such as 0.86',
)
tf.app.flags.DEFINE_integer(
  'patience',
  None,
  'Stop after this many scores without a new best; scores as for '
  '--stop_at_precision.',
  lower_bound=1,
)
cli.define_eval_dir()
tf.app.flags.DEFINE_string(
  'init_from',
  None,
  'Run directory or checkpoint to start from; its weights become the initial '
  'ones.',
)
tf.app.flags.DEFINE_integer(
  'seed', None, 'Random seed; by default, each run differs.'
)
tf.app.flags.DEFINE_boolean(
  'bfloat16_gradients',
  False,
  'In a cluster, average gradients in bfloat16; not with parameter servers.',
)
tf.app.flags.DEFINE_integer(
  'cluster_timeout_secs',
  600,
  'In a cluster, seconds to wait for a silent task.',
  lower_bound=1,
)
tf.app.flags.DEFINE_list(
  'profile_steps',
  None,
  'First and last step to profile, such as 100,110.',
)
tf.app.flags.register_validator(
  'profile_steps',
  lambda value: (
    value is None
    or (
      len(value) == 2
      and all(number.isdecimal() for number in value)
      and int(value[0]) <= int(value[1])
    )
  ),
  'must be two steps, such as 100,110',
)
tf.app.flags.DEFINE_boolean(
  'log_device_placement', False, 'Log the device of each operation.'
)
tf.app.flags.DEFINE_boolean(
  'restart', False, 'Delete the earlier run in --train_dir first.'
)
cli.define_threads_flag()
tf.app.flags.adopt_module_key_flags(cifar10)
FLAGS = tf.app.flags.FLAGS


# Builds training in the default graph for a worker of a cluster; a process that
# trains alone is the only worker. Returns the loss and the operation that runs
# a step.
GraphBuilder = Callable[
  [TrainSettings, Cluster], tuple[tf.Tensor, tf.Operation]
]


def main(recipe: Recipe | None = None) -> None:
  """Train with a recipe, by default the one that `--recipe` names."""
  settings = settings_from_flags(recipe or RECIPES[FLAGS.recipe])
  run(
    build_graph, settings, sessions.session_config(FLAGS.log_device_placement)
  )


def settings_from_flags(recipe: Recipe) -> TrainSettings:
  """Return the settings; flags that the user has set override the recipe.

  First, this sets the number of threads, on which measurements of compute types
  depend. If the recipe prefers bfloat16, the default of `--use_bf16` becomes
  true where that is fast on this CPU.

  Raises:
    UserError: if training ends before `--profile_steps`.
  """
  processor.use_threads(num_threads())
  changes = {
    name: FLAGS[name].value
    for name in ('batch_size', 'learning_rate', 'max_steps')
    if FLAGS[name].present
  }
  recipe = dataclasses.replace(recipe, **changes)
  if recipe.bfloat16 and not FLAGS.use_fp16 and not FLAGS['use_bf16'].present:
    # `cifar10.compute_type`, below, reads this flag.
    FLAGS.set_default('use_bf16', convolution.prefers_bfloat16())
  return TrainSettings(
    recipe=recipe,
    dtype=cifar10.compute_type(),
    profile_steps=profile_steps(recipe.max_steps),
    # Only cifar10_multi_gpu_train.py defines this flag.
    scale_learning_rate='scale_learning_rate' in FLAGS
    and FLAGS.scale_learning_rate,
    **{
      name: FLAGS[name].value
      for name in (
        'train_dir',
        'data_dir',
        'hold_out',
        'init_from',
        'log_frequency',
        'save_checkpoint_secs',
        'save_summaries_steps',
        'keep_checkpoint_max',
        'stop_at_precision',
        'patience',
        'eval_dir',
        'seed',
        'restart',
        'cluster_timeout_secs',
      )
    },
  )


def profile_steps(max_steps: int) -> tuple[int, int] | None:
  """Return the first and the last step to profile, or None.

  Raises:
    UserError: if training ends before the first one.
  """
  if not FLAGS.profile_steps:
    return None
  first, last = map(int, FLAGS.profile_steps)
  if first >= max_steps:
    raise UserError(
      f'--profile_steps {first},{last}: training ends before, with step '
      f'{max_steps - 1}. Name earlier steps, or raise --max_steps.'
    )
  return first, last


def num_threads() -> int:
  """Return the number of threads for computing on the CPU."""
  return FLAGS.num_threads or processor.usable_cores()


def build_graph(
  settings: TrainSettings, cluster: Cluster
) -> tuple[tf.Tensor, tf.Operation]:
  """Build the input pipeline and a training step on one device.

  Args:
    settings: settings from the flags.
    cluster: the tasks that train together; without a cluster, this process.

  Returns:
    loss: float32 [], the total loss.
    train_op: the operation that runs a step.
  """
  ((images, labels),) = distorted_batches(settings, 1)
  loss = build_loss(settings, images, labels)
  return cifar10.train_towers(
    [loss],
    updates.global_step(),
    examples_per_step=cluster.workers_per_step * settings.recipe.batch_size,
    examples_per_epoch=settings.data_set.num_training_images,
    recipe=settings.recipe,
    dtype=settings.dtype,
    average_over_workers=cluster.average,
  )


def distorted_batches(
  settings: TrainSettings, count: int
) -> list[tuple[tf.Tensor, tf.Tensor]]:
  """Build several training batches per step from one input pipeline.

  Args:
    settings: the data set, the compute type and the recipe's distortions.
    count: number of batches per step.

  Returns:
    A list of `count` (images, labels) pairs: images [batch_size, 24, 24, 3], in
    the compute type, and labels, int32 [batch_size].
  """
  recipe = settings.recipe
  return cifar10_input.distorted_batches(
    settings.batches_dir,
    recipe.batch_size,
    count,
    contrast=recipe.contrast,
    crop_margin=schedules.crop_margin(updates.global_step(), recipe),
    dtype=settings.dtype,
    num_classes=len(settings.data_set.class_names),
    num_examples=settings.data_set.num_training_images,
    hold_out=settings.hold_out,
    saturation=recipe.saturation,
  )


def build_loss(
  settings: TrainSettings, images: tf.Tensor, labels: tf.Tensor
) -> tf.Tensor:
  """Build the network for training and return the total loss, float32 []."""
  recipe = settings.recipe
  num_classes = len(settings.data_set.class_names)
  if recipe.mixup:
    images, labels = mixup.mixed(
      images,
      labels,
      num_classes,
      recipe.mixup,
      schedules.mixes(updates.global_step(), recipe),
    )
  filters = None
  if recipe.whitened:
    filters = first_filters(settings.batches_dir, settings.hold_out)
  logits = cifar10.inference(
    images,
    is_training=True,
    recipe=recipe,
    first_filters=filters,
    num_classes=num_classes,
    num_parts=convolution.num_parts(recipe.batch_size, num_threads()),
  )
  return cifar10.loss(logits, labels, label_smoothing=recipe.label_smoothing)


@functools.cache
def first_filters(batches_dir: str, hold_out: int) -> np.ndarray:
  """Return whitening filters, float32 [5, 5, 3, 64], cached for all towers."""
  return whitening.whitening_filters(
    batches_dir, cifar10.IMAGE_SIZE, size=5, count=64, hold_out=hold_out
  )


def run(
  builder: GraphBuilder,
  settings: TrainSettings,
  config: tf.ConfigProto,
  num_towers: int = 1,
  num_gpus: int | None = None,
) -> None:
  """Train on one machine, or run this process's task of a cluster.

  Args:
    builder: builds the training graph.
    settings: settings from the flags.
    config: configuration of the session.
    num_towers: number of batches that this process handles per step.
    num_gpus: number of GPUs that it uses; one by default, if there is one.
  """
  task, addresses = tf_config.from_environment()
  if task.kind == 'evaluator':
    become_evaluator(settings)
  cluster = cluster_of(task, addresses)
  if settings.stops_by_score and not cluster.is_alone:
    raise UserError(
      '--stop_at_precision and --patience do not work in a cluster. Remove '
      'them.'
    )
  if task.kind == 'ps':
    parameter_servers.serve(cluster, settings.cluster_timeout_secs)
    return
  with prepared(settings, cluster) as settings, tf.Graph().as_default():
    starting.announce(settings, num_gpus, num_threads())
    if settings.seed is not None:
      tf.set_random_seed(settings.seed + cluster.number)
    with tf.device(cluster.device):
      loss, train_op = builder(settings, cluster)
    sizes = [it.shape.num_elements() for it in tf.trainable_variables()]
    print(f'The network has {sum(sizes):,} parameters.')
    init_fn = None
    # A run that resumes does not need the source, which may be gone by now.
    is_new = settings.restart or not checkpoints.saved_in(settings.train_dir)
    if settings.init_from and cluster.is_chief and is_new:
      init_fn = starting.from_run(settings.init_from)
    cluster.join(
      config,
      starting.settings_in_common(
        settings, num_towers, FLAGS.bfloat16_gradients
      ),
      settings.cluster_timeout_secs,
    )
    # Only now: an unusable data file or a port in use must not cost the user
    # the earlier run.
    if settings.restart and cluster.is_chief:
      ownership.remove_earlier_run(settings.train_dir)
    training.run_training(
      loss,
      train_op,
      settings,
      num_towers=num_towers,
      config=config,
      cluster=cluster,
      init_fn=init_fn,
    )


@contextlib.contextmanager
def prepared(
  settings: TrainSettings, cluster: Cluster
) -> Iterator[TrainSettings]:
  """Prepare the data set and, on the chief, the directory of the run.

  Yields:
    The settings, with the data set and, on the chief, the activation scale of
    the network to start from. Meanwhile, the chief holds the lock of
    `train_dir`.

  Raises:
    UserError: if the data or the directory cannot be used.
  """
  train_dir = settings.train_dir
  if cluster.is_chief:
    # Before the download, which takes minutes.
    cli.prepare_dir('--train_dir', train_dir)
    if settings.restart:
      ownership.refuse_to_remove_others(train_dir)
    else:
      ownership.refuse_to_overwrite(train_dir)
      runs.refuse_download_for_other_classes(train_dir, settings.batches_dir)
  download.maybe_download_and_extract(settings.data_dir)
  data_set = dataset.load(settings.data_dir, settings.hold_out)
  settings = dataclasses.replace(settings, data_set=data_set)
  if not cluster.is_chief:
    yield settings
    return
  with files.locked_dir('--train_dir', train_dir):
    yield starting.with_activation_scale(settings, cluster.is_alone)


def cluster_of(task: tf_config.Task, addresses: tf_config.Addresses) -> Cluster:
  """Return the cluster as this task sees it.

  Raises:
    UserError: if a flag does not work in this cluster.
  """
  if 'ps' in addresses and FLAGS.bfloat16_gradients:
    raise UserError(
      '--bfloat16_gradients does not work with parameter servers. Remove it.'
    )
  if task.kind == 'ps' or not addresses:
    return Cluster(task, addresses)
  if 'ps' in addresses:
    return parameter_servers.ParameterServers(task, addresses)
  return all_reduce.AllReduce(task, addresses, FLAGS.bfloat16_gradients)


def become_evaluator(settings: TrainSettings) -> NoReturn:
  """Replace this process by the evaluation program.

  Training operators start the same program for all tasks of a cluster; this
  turns an "evaluator" into one.
  """
  flags = [
    FLAGS[name].serialize()
    for name in ('data_dir', 'eval_dir', 'num_threads', 'use_fp16', 'use_bf16')
    if FLAGS[name].present
  ]
  if FLAGS.hold_out:
    flags.append('--eval_data=held_out')
  starting.wait_for_chief(settings)
  program = os.path.join(_HERE, 'cifar10_eval.py')
  flags += [f'--checkpoint_dir={FLAGS.train_dir}', '--until_trained']
  os.execv(sys.executable, [sys.executable, program, *flags])


if __name__ == '__main__':
  cli.run(main)
