"""Trains the CIFAR-10 network.

  python cifar10_train.py [--train_dir cifar10_train] [--max_steps 100000]

Checkpoints and summaries go to --train_dir. Started again, training goes on
from the last checkpoint there; cifar10_eval.py, beside it, scores each.
"""

import contextlib
import dataclasses
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator

import console  # first: it keeps TensorFlow's chatter off the console

# isort: split
import tensorflow.compat.v1 as tf

import cifar10
import cifar10_checkpoint
import cifar10_cluster
import cifar10_files
import cifar10_hooks
import cifar10_precision
from cifar10_recipes import RECIPES, Recipe

_HERE = os.path.dirname(os.path.abspath(__file__))

tf.app.flags.DEFINE_string(
  'train_dir',
  os.path.join(_HERE, 'cifar10_train'),
  'Directory for checkpoints and event files.',
)
tf.app.flags.DEFINE_integer(
  'max_steps', 100000, 'Step at which training ends.', lower_bound=1
)
tf.app.flags.DEFINE_enum(
  'recipe',
  'tutorial',
  list(RECIPES),
  'How to train: it sets what --batch_size, --learning_rate and --max_steps '
  'leave open, and more.',
)
tf.app.flags.DEFINE_float(
  'learning_rate',
  None,
  "The highest learning rate, in place of the recipe's.",
  lower_bound=0.0,
)
tf.app.flags.DEFINE_integer(
  'log_frequency', 100, 'Number of steps between two lines.', lower_bound=1
)
tf.app.flags.DEFINE_integer(
  'save_checkpoint_secs',
  600,
  'Seconds between two checkpoints; the first and the last step have theirs.',
  lower_bound=1,
)
tf.app.flags.DEFINE_integer(
  'keep_checkpoint_max',
  5,
  'Number of checkpoints to keep, the latest ones; 0 keeps all.',
  lower_bound=0,
)
tf.app.flags.DEFINE_integer(
  'save_summaries_steps', 100, 'Steps between two summaries.', lower_bound=1
)
tf.app.flags.DEFINE_integer(
  'seed', None, 'Seed of everything random; without one, each run differs.'
)
tf.app.flags.DEFINE_boolean(
  'sync', True, 'In a cluster, update once with the gradients of all workers.'
)
tf.app.flags.DEFINE_integer(
  'backup_workers',
  0,
  'In a cluster, number of workers that an update does without, the latest.',
  lower_bound=0,
)
tf.app.flags.DEFINE_integer(
  'cluster_timeout_secs',
  600,
  'In a cluster, seconds of silence after which a task is given up.',
  lower_bound=1,
)
tf.app.flags.DEFINE_boolean(
  'log_device_placement', False, 'Show on which device each operation runs.'
)
tf.app.flags.DEFINE_boolean(
  'restart', False, 'Begin afresh: remove the earlier run from --train_dir.'
)
tf.app.flags.adopt_module_key_flags(cifar10)
FLAGS = tf.app.flags.FLAGS


def main() -> None:
  recipe = adopt_recipe()
  train(
    functools.partial(build_graph, recipe),
    FLAGS.batch_size,
    session_config(FLAGS.log_device_placement),
  )


def adopt_recipe() -> Recipe:
  """Returns the recipe that `--recipe` names, with what other flags change.

  It becomes the default of these flags, and of `--use_bf16`.
  """
  recipe = RECIPES[FLAGS.recipe]
  numbers = {}
  for name in ('batch_size', 'learning_rate', 'max_steps'):
    FLAGS.set_default(name, getattr(recipe, name))
    numbers[name] = FLAGS[name].value
  if recipe.bfloat16 and not FLAGS.use_fp16:
    FLAGS.set_default('use_bf16', cifar10_precision.prefers_bfloat16())
  return dataclasses.replace(recipe, **numbers)


def build_graph(
  recipe: Recipe, cluster: cifar10_cluster.Cluster
) -> tuple[tf.Tensor, tf.Operation]:
  """Builds training, as the flags say; returns the loss and the step."""
  global_step = cifar10.make_global_step()
  images, labels = cifar10.distorted_inputs(recipe)
  loss = cifar10.loss(cifar10.inference(images, recipe), labels, recipe)
  return loss, cifar10.train(loss, global_step, cluster, recipe)


def train(
  build_graph: Callable[
    [cifar10_cluster.Cluster], tuple[tf.Tensor, tf.Operation]
  ],
  batch_size: int,
  config: tf.ConfigProto,
) -> None:
  """Trains as this module's flags say, what this or another program builds.

  Args:
    build_graph: given the cluster, adds to the default graph; returns the loss
      and the operation that does a step.
    batch_size: number of images of this process's part in a step.
    config: of the session.
  """
  task = cifar10_cluster.this_task()
  if task.type == 'evaluator':
    become_evaluator()
  if task.type == 'ps':
    cifar10_cluster.serve(task, FLAGS.cluster_timeout_secs)
    return
  if FLAGS.backup_workers >= len(task.workers):
    sys.exit(
      f'--backup_workers={FLAGS.backup_workers} leaves none of the '
      f'{len(task.workers)} workers.'
    )
  if task.is_chief:
    console.prepare_dir('--train_dir', FLAGS.train_dir)
    if FLAGS.restart:
      cifar10_files.refuse_to_remove_others(FLAGS.train_dir)
    else:
      cifar10_files.refuse_to_overwrite(FLAGS.train_dir)
  cifar10.maybe_download_and_extract()
  cluster = cifar10_cluster.Cluster(task, FLAGS.sync, FLAGS.backup_workers)
  with (
    console.locked_dir('--train_dir', FLAGS.train_dir)
    if task.is_chief
    else contextlib.nullcontext(),
    tf.Graph().as_default(),
  ):
    if FLAGS.seed is not None:
      tf.set_random_seed(FLAGS.seed + task.number)
    with tf.device(cluster.device_setter()):
      loss, train_op = build_graph(cluster)
    if FLAGS.restart and task.is_chief:
      cifar10_files.remove_earlier_run(FLAGS.train_dir)
    cluster.join(config, FLAGS.cluster_timeout_secs)
    run_training(
      loss,
      train_op,
      examples_per_step=batch_size * cluster.gradients_per_step,
      train_dir=FLAGS.train_dir,
      max_steps=FLAGS.max_steps,
      log_frequency=FLAGS.log_frequency,
      save_checkpoint_secs=FLAGS.save_checkpoint_secs,
      save_summaries_steps=FLAGS.save_summaries_steps,
      keep_checkpoint_max=FLAGS.keep_checkpoint_max,
      config=config,
      cluster=cluster,
    )


def become_evaluator() -> None:
  """Runs the evaluation program in this one's place."""
  flags = [
    FLAGS[name].serialize()
    for name in ('data_dir', 'use_fp16', 'use_bf16')
    if FLAGS[name].present
  ]
  program = os.path.join(_HERE, 'cifar10_eval.py')
  os.execv(
    sys.executable,
    [sys.executable, program, f'--checkpoint_dir={FLAGS.train_dir}', *flags],
  )


def run_training(
  loss: tf.Tensor,
  train_op: tf.Operation,
  examples_per_step: int,
  train_dir: str,
  max_steps: int,
  log_frequency: int,
  save_checkpoint_secs: int,
  save_summaries_steps: int,
  keep_checkpoint_max: int = 5,
  config: tf.ConfigProto | None = None,
  cluster: cifar10_cluster.Cluster = cifar10_cluster.ALONE,
) -> None:
  """Trains the default graph up to a step, going on from what `train_dir` has.

  SIGINT and SIGTERM end it after the step in progress, which is saved.

  Args:
    loss: float32 [], printed and watched: training stops when it is not finite.
    train_op: does one step and counts it in the global step.
    examples_per_step: number of images that a step takes.
    train_dir: directory for checkpoints and event files.
    max_steps: the global step to end at.
    log_frequency: steps between two lines on the console.
    save_checkpoint_secs: seconds between two checkpoints.
    save_summaries_steps: steps between two summaries.
    keep_checkpoint_max: number of checkpoints to keep, or 0 for all.
    config: of the session; by default, `session_config()`.
    cluster: the workers that train together; only the chief uses `train_dir`.

  Raises:
    SystemExit: status 130 or 143 after a signal, 1 if training cannot go on.
  """
  where = console.short_path(train_dir)
  task = cluster.task
  start = 0
  if task.is_chief:
    start = cifar10_checkpoint.find_start(train_dir, keep_checkpoint_max)
  if start >= max_steps:
    print(f'{where} is at step {start} already: nothing left to train.')
    if task.is_alone:
      return

  config = config or session_config()
  with tf.device(cluster.device):
    saver = tf.train.Saver(
      max_to_keep=keep_checkpoint_max, save_relative_paths=True
    )
  scaffold = cluster.scaffold(config, saver=saver)
  log_hook = cifar10_hooks.LogHook(
    loss, examples_per_step, start, max_steps, log_frequency, cluster
  )
  hooks = [
    tf.train.StopAtStepHook(last_step=max_steps),
    log_hook,
    *cluster.hooks(),
  ]
  if task.is_chief:
    # The last one, so that a checkpoint is written after the checks.
    hooks.append(
      tf.train.CheckpointSaverHook(
        train_dir,
        save_secs=save_checkpoint_secs,
        scaffold=scaffold,
        listeners=[
          cifar10_hooks.RefuseToSaveNan(),
          cifar10_hooks.WatchDataFiles(),
        ],
      )
    )
  try:
    with (
      _collected_signals() as signals,
      tf.train.MonitoredTrainingSession(
        master=cluster.master,
        is_chief=task.is_chief,
        checkpoint_dir=train_dir,
        scaffold=scaffold,
        hooks=hooks,
        config=config,
        save_checkpoint_secs=None,  # the hook above does that
        save_checkpoint_steps=None,
        save_summaries_steps=save_summaries_steps,
        # The chief's thread that applies gradients ends with its session only.
        stop_grace_period_secs=120 if task.is_alone else 2,
      ) as session,
    ):
      while not session.should_stop() and not signals:
        session.run(train_op)
  except tf.errors.OpError as error:
    cifar10_hooks.explain(error, log_hook.step, where)

  step = log_hook.step
  if task.is_chief:
    step = cifar10_checkpoint.step_of(tf.train.latest_checkpoint(train_dir))
  if signals:
    name = signal.Signals(signals[0]).name
    saved = f'is saved in {where}' if task.is_chief else 'is left to the others'
    print(
      f'Stopped by {name}: step {step} {saved}. The same command goes on from '
      'there.'
    )
    sys.exit(128 + signals[0])
  saved = f', which is saved in {where}' if task.is_chief else ''
  print(f'Trained to step {step}{saved}.')
  cluster.leave()


def session_config(log_device_placement: bool = False) -> tf.ConfigProto:
  """Returns how TensorFlow is to use the devices.

  Args:
    log_device_placement: whether it is to log where it runs each operation.
  """
  config = tf.ConfigProto(
    allow_soft_placement=True, log_device_placement=log_device_placement
  )
  config.gpu_options.allow_growth = True  # evaluation may share the GPU
  if not tf.config.list_physical_devices('GPU'):
    # One operation at a time has all cores: they share their caches better so.
    config.inter_op_parallelism_threads = 1
  return config


@contextlib.contextmanager
def _collected_signals() -> Iterator[list[int]]:
  """Yields a list to which SIGINT and SIGTERM are appended as they come."""
  received = []
  previous = {
    number: signal.signal(number, lambda number, _: received.append(number))
    for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield received
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


if __name__ == '__main__':
  console.run(main)
