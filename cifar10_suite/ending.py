"""What the trainer prints at the end, and the command that scores the run."""

import os
import signal
import sys

from cifar10_suite import (
  checkpoints,
  cli,
  commands,
  hooks,
  loading,
  runs,
  stopping,
)
from cifar10_suite.cluster import Cluster
from cifar10_suite.commands import same_command
from cifar10_suite.dataset import DEFAULT_DATA_DIR
from cifar10_suite.train_settings import TrainSettings


def report(
  settings: TrainSettings,
  cluster: Cluster,
  watch: stopping.StopByScore | None,
  log_hook: hooks.LogHook,
  seconds: float,
) -> None:
  """Print how training ended and what is next; exit if a signal ended it.

  Args:
    settings: directories and number of steps.
    cluster: workers that train together.
    watch: what may have ended training by score.
    log_hook: knows the first and the last step of this process.
    seconds: duration of training.

  Raises:
    SystemExit: with status 128 plus the number of the signal.
  """
  where = commands.short_path(settings.train_dir)
  max_steps = settings.recipe.max_steps
  step = log_hook.step
  saved, is_over = 'is not saved here', step >= max_steps
  if cluster.is_chief:
    latest = checkpoints.latest(settings.train_dir)
    last = checkpoints.step_of(latest) if latest else -1
    saved = f'is saved in {where}'
    if last < step:  # an error after a signal
      saved = 'is not saved' + (f', only step {last}' if latest else '')
    step, is_over = max(step, last), last >= max_steps
  is_stopped = bool(watch and watch.reason and not is_over)
  if cluster.signals and not (is_over or is_stopped):
    name = signal.Signals(cluster.signals[0]).name
    again = same_command().capitalize()
    try:
      print(
        f'Stopped by {name}: step {step} {saved}. {again} resumes training.'
      )
    except OSError as error:
      loading.discard_output(error)
    sys.exit(128 + cluster.signals[0])
  if watch and is_stopped:
    runs.record_stop(settings.train_dir, step)
    print(watch.reason)
  if log_hook.start < max_steps:
    saved = f', which {saved}' if cluster.is_chief else ''
    print(f'Trained to step {step}{saved}.')
    if cluster.is_alone:
      score = scoring_command(settings, '--run_once')
      print(f'It took {_duration(seconds)}. To score it: {score}')
  elif not cluster.is_chief:
    print('Training has ended.')


def scoring_command(settings: TrainSettings, *flags: str) -> str:
  """Return a command that scores checkpoints of the run, with these flags."""
  train_dir, eval_dir = os.path.abspath(settings.train_dir), settings.eval_dir
  is_default = eval_dir in ('', cli.DEFAULT_EVAL_DIR)
  if is_default and not settings.stops_by_score:
    # Scores of another run belong elsewhere: cifar10_train has cifar10_eval,
    # the default, and runs/1/train has runs/1/eval.
    base = train_dir.removesuffix('train')
    eval_dir = f'{train_dir}_eval' if base == train_dir else f'{base}eval'
  arguments = [*flags, '--checkpoint_dir', commands.short_path(train_dir)]
  if os.path.abspath(eval_dir) != cli.DEFAULT_EVAL_DIR:
    arguments += ['--eval_dir', commands.short_path(eval_dir)]
  if settings.data_dir != DEFAULT_DATA_DIR:
    arguments += ['--data_dir', commands.short_path(settings.data_dir)]
  if settings.hold_out:
    arguments += ['--eval_data', 'held_out']
  return commands.of('cifar10_eval.py', *arguments)


def _duration(seconds: float) -> str:
  """Return a duration for messages, such as '3 min 7 s'."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours} h {minutes} min'
  return f'{minutes} min {rest} s' if minutes else f'{rest} s'
