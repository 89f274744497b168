"""The one training loop, for one tower, several towers and several machines."""

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Iterator

import tensorflow.compat.v1 as tf

from cifar10_suite import checkpoints, cli, hooks
from cifar10_suite.cluster import ALONE, Cluster
from cifar10_suite.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  """What the flags of a training program say.

  Attributes:
    recipe: the hyperparameters, batch size and number of steps included.
    train_dir: directory for checkpoints and event files.
    data_dir: directory of the data set.
    dtype: the compute type.
    log_frequency: steps between two lines on the console.
    save_checkpoint_secs: seconds between two checkpoints.
    save_summaries_steps: steps between two summaries.
    keep_checkpoint_max: number of checkpoints to keep, or 0 for all.
    seed: of everything random, or None.
    restart: whether to remove an earlier run from `train_dir` first.
    cluster_timeout_secs: seconds of silence after which a task of the cluster
      is given up.
  """

  recipe: Recipe
  train_dir: str
  data_dir: str = ''
  dtype: tf.DType = tf.float32
  log_frequency: int = 100
  save_checkpoint_secs: int = 600
  save_summaries_steps: int = 100
  keep_checkpoint_max: int = 5
  seed: int | None = None
  restart: bool = False
  cluster_timeout_secs: int = 600


def run_training(
  loss: tf.Tensor,
  train_op: tf.Operation,
  settings: TrainSettings,
  *,
  examples_per_step: int,
  config: tf.ConfigProto | None = None,
  cluster: Cluster = ALONE,
) -> None:
  """Trains the default graph up to the last step.

  Training resumes from what `train_dir` has. SIGINT and SIGTERM end it after
  the step in progress, which is saved.

  Args:
    loss: float32 [], printed and watched: training stops when it is not finite.
    train_op: does one step and counts it in the global step.
    settings: where, how often and how long.
    examples_per_step: number of images that a step takes.
    config: of the session; by default, `session_config()`.
    cluster: the workers that train together; only the chief uses `train_dir`.

  Raises:
    UserError: training cannot go on.
    SystemExit: status 130 or 143 after a signal.
  """
  where = cli.short_path(settings.train_dir)
  is_chief = cluster.task.is_chief
  start, max_steps = 0, settings.recipe.max_steps
  if is_chief:
    start = checkpoints.find_start(
      settings.train_dir, settings.keep_checkpoint_max
    )
  if start >= max_steps:
    print(f'{where} is at step {start} already: nothing left to train.')
    if cluster.task.is_alone:
      return

  log_hook = hooks.LogHook(
    loss,
    examples_per_step,
    start,
    max_steps,
    settings.log_frequency,
    counts=cluster.task.is_alone,
  )
  try:
    with (
      _collected_signals() as signals,
      _session(
        settings, log_hook, config or session_config(), cluster
      ) as session,
    ):
      while not session.should_stop() and not signals:
        session.run(train_op)
  except tf.errors.OpError as error:
    hooks.explain(error, log_hook.step, where)

  step = log_hook.step
  if is_chief:
    latest = tf.train.latest_checkpoint(settings.train_dir)
    step = checkpoints.step_of(latest)
  if signals:
    name = signal.Signals(signals[0]).name
    saved = f'is saved in {where}' if is_chief else 'is left to the others'
    print(
      f'Stopped by {name}: step {step} {saved}. The same command goes on from '
      'there.'
    )
    sys.exit(128 + signals[0])
  saved = f', which is saved in {where}' if is_chief else ''
  print(f'Trained to step {step}{saved}.')
  cluster.leave()


def _session(
  settings: TrainSettings,
  log_hook: hooks.LogHook,
  config: tf.ConfigProto,
  cluster: Cluster,
) -> tf.train.MonitoredSession:
  """Returns the session that restores, saves, summarizes and prints."""
  with tf.device(cluster.device):
    saver = tf.train.Saver(
      max_to_keep=settings.keep_checkpoint_max, save_relative_paths=True
    )
  scaffold = cluster.scaffold(config, saver=saver)
  session_hooks = [
    tf.train.StopAtStepHook(last_step=settings.recipe.max_steps),
    log_hook,
    *cluster.hooks(),
  ]
  if cluster.task.is_chief:
    # The last one, so that a checkpoint is written after the checks.
    session_hooks.append(
      tf.train.CheckpointSaverHook(
        settings.train_dir,
        save_secs=settings.save_checkpoint_secs,
        scaffold=scaffold,
        listeners=[hooks.RefuseToSaveNan(), hooks.WatchDataFiles()],
      )
    )
  return tf.train.MonitoredTrainingSession(
    master=cluster.master,
    is_chief=cluster.task.is_chief,
    checkpoint_dir=settings.train_dir,
    scaffold=scaffold,
    hooks=session_hooks,
    config=config,
    save_checkpoint_secs=None,  # the hook above does that
    save_checkpoint_steps=None,
    save_summaries_steps=settings.save_summaries_steps,
    # The chief's thread that applies gradients ends with its session only.
    stop_grace_period_secs=120 if cluster.task.is_alone else 2,
  )


def session_config(log_device_placement: bool = False) -> tf.ConfigProto:
  """Returns the configuration of a session for training.

  Args:
    log_device_placement: whether to log the device of each operation.
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
  received: list[int] = []
  previous = {
    number: signal.signal(number, lambda number, _: received.append(number))
    for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield received
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
