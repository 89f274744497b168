"""The training loop, for one or more towers and machines."""

import contextlib
import time
from collections.abc import Callable

import tensorflow.compat.v1 as tf

from cifar10_suite import (
  checkpoints,
  commands,
  ending,
  fetches,
  hooks,
  large_pages,
  profiling,
  runs,
  sessions,
  stopping,
)
from cifar10_suite.cluster import ALONE, Cluster
from cifar10_suite.errors import UserError
from cifar10_suite.train_settings import TrainSettings

_NO_PROFILE = contextlib.nullcontext()


def run_training(
  loss: tf.Tensor,
  train_op: tf.Operation,
  settings: TrainSettings,
  *,
  num_towers: int = 1,
  config: tf.ConfigProto | None = None,
  cluster: Cluster = ALONE,
  init_fn: Callable[[tf.train.Scaffold, tf.Session], None] | None = None,
) -> None:
  """Train the default graph up to the last step.

  Training resumes from the newest checkpoint in `train_dir`. After SIGINT,
  SIGTERM or SIGHUP, it completes and saves the current step, then exits.

  Args:
    loss: float32 []; printed, and training stops if it is not finite.
    train_op: operation that runs one step and increments the global step.
    settings: directories, intervals and number of steps.
    num_towers: number of batches that this process handles per step.
    config: configuration of the session; `session_config()` by default.
    cluster: workers that train together; only the chief uses `train_dir`.
    init_fn: called after the initialization of the variables, unless training
      resumes.

  Raises:
    UserError: if training cannot continue.
    SystemExit: after a signal, with status 128 plus the number of the signal.
  """
  begin = time.monotonic()
  max_steps = settings.recipe.max_steps
  start = _start(settings, cluster, num_towers) if cluster.is_chief else 0
  # In a cluster, the chief continues even if no step is left: the workers see
  # that only after it has restored the variables.
  if start >= max_steps and cluster.is_alone:
    return

  log_hook = hooks.LogHook(
    loss,
    num_towers * settings.recipe.batch_size * cluster.workers_per_step,
    start,
    max_steps,
    settings.log_frequency,
    counts_steps=not cluster.servers,
  )
  watch = _watch_scores(settings)
  profiler = None
  if settings.profile_steps and cluster.is_chief:
    profiler = profiling.StepProfiler(
      settings.train_dir, *settings.profile_steps
    )
  config = config or sessions.session_config()
  try:
    with (
      sessions.collected_signals(cluster.signals, cluster.is_chief),
      _session(settings, log_hook, watch, config, cluster, init_fn) as session,
    ):
      while not (
        session.should_stop() or cluster.stops() or (watch and watch.stops())
      ):
        with profiler.step(log_hook.step) if profiler else _NO_PROFILE:
          session.run(train_op)
      if profiler:
        profiler.stop()
    # Leaving the session has saved the last step.
  except tf.errors.OpError as error:
    # After a signal in a cluster, errors are expected, and ignored: a task may
    # stop while another one waits for it. That cannot explain a failed write.
    is_expected = cluster.signals and not cluster.is_alone
    if not is_expected or hooks.is_write_error(error):
      cluster.recover(error, log_hook.step)
      where = commands.short_path(settings.train_dir)
      hooks.explain(error, log_hook.step, where)
  finally:
    log_hook.close()

  seconds = time.monotonic() - begin
  ending.report(settings, cluster, watch, log_hook, seconds)
  cluster.leave()


def _start(settings: TrainSettings, cluster: Cluster, num_towers: int) -> int:
  """Return the step from which the chief starts, and record the start.

  If no step is left to train, print that instead, and record no start.

  Raises:
    UserError: as `_find_start`.
  """
  saved_step = _find_start(settings)
  start = saved_step or 0
  if start < settings.recipe.max_steps:
    _record_start(settings, saved_step, num_towers, len(cluster.workers))
    return start
  where = commands.short_path(settings.train_dir)
  print(
    f'{where} is already at step {start}: nothing left to train. To continue, '
    'raise --max_steps.'
  )
  run = runs.read(settings.train_dir)
  if run and runs.last_step(run) > start:
    runs.record_stop(settings.train_dir, start)  # for --until_trained
  return start


def _find_start(settings: TrainSettings) -> int | None:
  """Prepare the directory; return the step to resume from, None for a new run.

  Raises:
    UserError: if the run in the directory has other classes or another number
      of held-out images, or no usable checkpoint.
  """
  remedy = 'Choose another --train_dir, or start over with --restart.'
  runs.refuse_other_classes(
    settings.train_dir, settings.data_set.class_names, remedy
  )
  run = runs.read(settings.train_dir)
  before = runs.hold_out(run)
  if checkpoints.saved_in(settings.train_dir) and before != settings.hold_out:
    if not run:
      raise UserError(
        f'{settings.train_dir} has no run.json, so it may have been trained on '
        f'the images that --hold_out={settings.hold_out} leaves out. {remedy}'
      )
    raise UserError(
      f'{settings.train_dir} was trained with --hold_out={before}, not '
      f'{settings.hold_out}. {remedy}'
    )
  return checkpoints.find_start(
    settings.train_dir,
    settings.keep_checkpoint_max,
    settings.recipe.max_steps,
  )


def _record_start(
  settings: TrainSettings,
  saved_step: int | None,
  num_towers: int,
  num_workers: int,
) -> None:
  """Record a start in run.json; say from where a run resumes, if it does."""
  entry = {
    **runs.describe(settings.recipe, settings.dtype),
    'hold_out': settings.hold_out,
    'init_from': settings.init_from,
    'seed': settings.seed,
    'workers': num_workers,
    'towers': num_towers,
    'scale_learning_rate': settings.scale_learning_rate,
  }
  if saved_step is not None:
    print(f'Resuming from step {saved_step}')
    if source := settings.init_from:
      print(f'--init_from {source} has no effect: training resumes.')
    entry['init_from'] = None
    if before := runs.read(settings.train_dir):
      entry['init_from'] = before['starts'][-1].get('init_from')
      if changes := runs.changes(before, entry):
        print(f'Changed since the last start: {", ".join(changes)}.')
  runs.record_start(
    settings.train_dir, settings.data_set.class_names, saved_step, entry
  )


def _watch_scores(settings: TrainSettings) -> stopping.StopByScore | None:
  """Return the listener that stops training by score; None without one.

  Also print the command of the evaluator whose scores it reads.
  """
  if not settings.stops_by_score:
    return None
  watch = stopping.StopByScore(
    settings.train_dir,
    settings.eval_dir,
    'held_out' if settings.hold_out else 'test',
    settings.stop_at_precision,
    settings.patience,
  )
  where = commands.short_path(settings.eval_dir)
  command = ending.scoring_command(
    settings, '--until_trained', '--eval_interval_secs=30'
  )
  print(
    f'Training may stop by the scores in {where}. Beside it, run: {command}'
  )
  return watch


def _session(
  settings: TrainSettings,
  log_hook: hooks.LogHook,
  watch: stopping.StopByScore | None,
  config: tf.ConfigProto,
  cluster: Cluster,
  init_fn: Callable[[tf.train.Scaffold, tf.Session], None] | None,
) -> tf.train.MonitoredSession:
  """Return a session that restores, saves, writes summaries and logs."""
  with tf.device(cluster.device):
    saver = tf.train.Saver(
      max_to_keep=settings.keep_checkpoint_max, save_relative_paths=True
    )
  scaffold = tf.train.Scaffold(saver=saver, init_fn=init_fn)
  session_hooks = [
    fetches.LookUpOnce(),
    large_pages.UseLargePages(),
    cluster,
    tf.train.StopAtStepHook(last_step=settings.recipe.max_steps),
    log_hook,
  ]
  if cluster.is_chief:
    # Last, so that the log hook checks the loss before a checkpoint is written.
    session_hooks.append(
      hooks.SaveCheckpoints(
        settings.train_dir,
        settings.save_checkpoint_secs,
        settings.recipe.max_steps,
        scaffold=scaffold,
        listeners=[
          hooks.RefuseToSaveNan(),
          hooks.WatchDataFiles(),
          *([watch] if watch else []),
        ],
      )
    )
  return tf.train.MonitoredTrainingSession(
    master=cluster.master,
    is_chief=cluster.initializes,
    checkpoint_dir=settings.train_dir if cluster.is_chief else None,
    scaffold=scaffold,
    hooks=session_hooks,
    config=config,
    save_checkpoint_secs=None,  # done by the hook above
    save_checkpoint_steps=None,
    save_summaries_steps=settings.save_summaries_steps,
    # Time for threads to end before the session closes.
    stop_grace_period_secs=120 if cluster.is_alone else 2,
  )
