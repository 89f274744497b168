"""Session hooks for training: progress, checks and error messages."""

import contextlib
import datetime
import math
import re
import signal
import sys
import time
from typing import NoReturn

import tensorflow.compat.v1 as tf
from tqdm import tqdm

from cifar10_suite import dataset, loading
from cifar10_suite.commands import same_command
from cifar10_suite.errors import UserError, first_line

_SAVES = 20  # checkpoints per run, unless it is short
_SAVE_PAUSE = 100  # pause after a save, in durations of that save
_MIN_SAVE_PAUSE_SECS = 15
_WRITERS = ('SaveV2', 'MergeV2Checkpoints')  # operations
_DISK_FULL_ERRORS = (
  tf.errors.ResourceExhaustedError,
  tf.errors.OutOfRangeError,
)


class LogHook(tf.train.SessionRunHook):
  """Hook that prints a line every few steps and, on a terminal, a progress bar.

  Attributes:
    start: step from which this process trains.
    step: number of completed steps.
  """

  def __init__(
    self,
    loss: tf.Tensor,
    examples_per_step: int,
    start: int,
    max_steps: int,
    log_frequency: int,
    counts_steps: bool,
  ):
    """Initialize the hook.

    Args:
      loss: float32 []; printed, and training stops if it is not finite.
      examples_per_step: number of images per step, over all towers and workers.
      start: step from which this process trains, as far as it knows.
      max_steps: step at which training ends.
      log_frequency: steps between lines.
      counts_steps: whether the hook counts the steps itself. With parameter
        servers, it must read the global step, which all workers increment.
    """
    self._loss = loss
    self._examples_per_step = examples_per_step
    self._next = self.start = self.step = start
    self._max_steps = max_steps
    self._log_frequency = log_frequency
    self._counts_steps = counts_steps
    self._has_bar = False
    self._bar: tqdm  # created with the first session

  def begin(self) -> None:
    self._global_step = tf.train.get_global_step()

  def after_create_session(
    self, session: tf.Session, coord: tf.train.Coordinator
  ) -> None:
    self.step = int(session.run(self._global_step))
    if self.step >= self._max_steps:  # other workers have finished
      coord.request_stop()
    if self._has_bar:  # a parameter server was lost
      self._bar.close()
      print(f'Resuming from step {self.step}')
    else:  # only now, a worker knows the step of the chief
      self.start = self.step
    self._has_bar = True
    self._bar = tqdm(
      initial=self.step,
      total=self._max_steps,
      unit='step',
      dynamic_ncols=True,
      # Only on a terminal, and not into the lines of `... | tee log`.
      disable=None if sys.stdout.isatty() else True,
    )
    self._log_from_here()

  def before_run(
    self, run_context: tf.train.SessionRunContext
  ) -> tf.train.SessionRunArgs:
    fetches = {}
    if not self._counts_steps:
      fetches['step'] = self._global_step
    if self.step >= self._next:
      fetches['loss'] = self._loss
    return tf.train.SessionRunArgs(fetches)

  def after_run(
    self,
    run_context: tf.train.SessionRunContext,
    run_values: tf.train.SessionRunValues,
  ) -> None:
    # A step's number is that of the steps that were completed before it.
    step = run_values.results.get('step', self.step)
    self._bar.update(step + 1 - self.step)
    is_back = step + 1 < self.step
    self.step = step + 1
    try:
      if is_back:  # the chief has restored a checkpoint
        self._log_from_here()
        tqdm.write(f'Going back to step {self.step}')
      # With parameter servers, two runs may read the same global step.
      elif 'loss' in run_values.results and step >= self._next:
        self._next = step - step % self._log_frequency + self._log_frequency
        self._log(step, run_values.results['loss'])
    except OSError as error:
      loading.discard_output(error)
      signal.raise_signal(signal.SIGTERM)  # save, and stop

  def _log_from_here(self) -> None:
    """Let the next line cover the steps from now on."""
    self._next = self._last_step = self.step
    self._last_time = time.perf_counter()

  def _log(self, step: int, loss: float) -> None:
    """Print the loss before the update of `step`, and the throughput."""
    if not math.isfinite(loss):
      _stop_at_nan(f'the loss is {loss}', step)
    now = time.perf_counter()
    sec_per_batch = (now - self._last_time) / (self.step - self._last_step)
    examples_per_sec = self._examples_per_step / sec_per_batch
    self._last_step, self._last_time = self.step, now
    tqdm.write(
      f'{datetime.datetime.now()}: step {step}, loss = {loss:.2f} '
      f'({examples_per_sec:.1f} examples/sec; {sec_per_batch:.3f} sec/batch)'
    )
    self._bar.set_postfix_str(
      f'loss {loss:.2f}, {examples_per_sec:.0f} examples/sec'
    )

  def end(self, session: tf.Session) -> None:
    if not self._counts_steps:  # other workers may have continued
      with contextlib.suppress(tf.errors.OpError):  # or finished
        self.step = int(session.run(self._global_step))
    self.close()

  def close(self) -> None:
    """Remove the progress bar, so that a message begins on a new line."""
    if self._has_bar:
      self._bar.close()


class SaveCheckpoints(tf.train.CheckpointSaverHook):
  """Hook that saves by time, and often enough to see a curve.

  It saves the first and the last step, whenever `save_secs` have passed, and
  after each twentieth of the steps; the latter not within 15 seconds of the
  last save, nor within 100 times its duration, so that they take at most 1% of
  the time.
  """

  def __init__(
    self,
    train_dir: str,
    save_secs: float,
    max_steps: int,
    scaffold: tf.train.Scaffold,
    listeners: list[tf.train.CheckpointSaverListener],
  ):
    """Initialize the hook.

    Args:
      train_dir: directory for the checkpoints.
      save_secs: maximum number of seconds between checkpoints.
      max_steps: step at which training ends.
      scaffold: holds the saver.
      listeners: called before and after each save.
    """
    super().__init__(
      train_dir, save_secs=save_secs, scaffold=scaffold, listeners=listeners
    )
    self._timer = _SaveTimer(save_secs, max(max_steps // _SAVES, 1))
    # The hook asks the timer twice: first about this number of steps after the
    # last known one and, if a save is due then, about the global step, which it
    # has to read. With the default, a million, it would read it in every step.
    self._set_steps_per_run(1)

  def after_run(
    self,
    run_context: tf.train.SessionRunContext,
    run_values: tf.train.SessionRunValues,
  ) -> None:
    last, begin = self._timer.last_triggered_step(), time.monotonic()
    super().after_run(run_context, run_values)
    if self._timer.last_triggered_step() != last:  # it has saved
      self._timer.rest(_SAVE_PAUSE * (time.monotonic() - begin))


class _SaveTimer(tf.train.SecondOrStepTimer):
  """Timer that triggers after `secs`, or after `steps` and a pause.

  If the system's clock is set back, TensorFlow's own timer does not trigger
  until the clock has caught up. This one does not depend on that clock.
  """

  def __init__(self, secs: float, steps: int):
    super().__init__(every_secs=secs)
    self._secs = secs
    self._steps = steps
    self.rest(0)

  def rest(self, secs: float) -> None:
    """Do not trigger because of steps for some seconds."""
    self._next_time = time.monotonic() + max(secs, _MIN_SAVE_PAUSE_SECS)

  def should_trigger_for_step(self, step: int) -> bool:
    last, now = self.last_triggered_step(), time.monotonic()
    if last is None:
      return True
    return step != last and (
      now >= self._last_time + self._secs
      or (step >= last + self._steps and now >= self._next_time)
    )

  def update_last_triggered_step(
    self, step: int
  ) -> tuple[float | None, int | None]:
    self._last_time = time.monotonic()
    return super().update_last_triggered_step(step)


class RefuseToSaveNan(tf.train.CheckpointSaverListener):
  """Listener that stops training instead of saving non-finite variables."""

  def begin(self) -> None:
    self._all_finite = tf.reduce_all(
      [
        tf.reduce_all(tf.math.is_finite(variable))
        for variable in tf.global_variables()
        if variable.dtype.is_floating
      ]
    )

  def before_save(self, session: tf.Session, global_step_value: int) -> None:
    if not session.run(self._all_finite):
      _stop_at_nan('a variable is not finite', global_step_value)


class WatchDataFiles(tf.train.CheckpointSaverListener):
  """Listener that stops training if the size of a data file has changed.

  Readers silently ignore the missing part of a truncated file.
  """

  def begin(self) -> None:
    self._sizes = self._look()

  def before_save(self, session: tf.Session, global_step_value: int) -> None:
    for path, size in self._look().items():
      if size != self._sizes[path]:
        raise UserError(
          f'Training stopped at step {global_step_value}: {path} has {size} '
          f'bytes now, {self._sizes[path]} before. Restore the file; '
          f'{same_command()} then resumes from the last checkpoint.'
        )

  def _look(self) -> dict[str, int]:
    return {
      path: tf.gfile.Stat(path).length
      for path in tf.get_collection(dataset.DATA_FILES)
    }


def explain(error: tf.errors.OpError, step: int, where: str) -> NoReturn:
  """Convert an error that the user can correct to UserError, or reraise it.

  Args:
    error: the error that ended the session.
    step: number of completed steps.
    where: directory of the checkpoints, for the message.

  Raises:
    UserError: if a value is not finite, writing failed, memory is exhausted, or
      a data file is gone.
    tf.errors.OpError: `error`, in other cases.
  """
  if ' histogram for: ' in error.message.lower():  # NaN or infinity
    _stop_at_nan('a summarized value is not finite', step)
  what = first_line(error.message)
  if is_write_error(error):
    reason = re.search(r'; (.*)', what)
    is_full = not isinstance(error, tf.errors.PermissionDeniedError)
    remedy = 'Free some space' if is_full else 'Make it writable'
    raise UserError(
      f'Cannot write to {where}: {reason[1] if reason else what}. '
      f'Training stopped at step {step}. {remedy}; {same_command()} then '
      'resumes from the last checkpoint.'
    )
  if isinstance(error, tf.errors.ResourceExhaustedError):
    raise UserError(
      f'Training stopped at step {step}: {what}. Choose a smaller --batch_size.'
    )
  # Errors of queue runners have no node_def.
  if isinstance(error, tf.errors.NotFoundError) and error.node_def is None:
    raise UserError(
      f'Training stopped at step {step}: {what}. Restore the '
      f'file; {same_command()} then resumes from the last checkpoint.'
    )
  raise error


def is_write_error(error: tf.errors.OpError) -> bool:
  """Return whether writing failed: a full disk, a size limit, no permission.

  The same error types occur for exhausted memory, closed queues and unreadable
  files, but not in operations that save.
  """
  if error.node_def is not None and error.node_def.op in _WRITERS:
    types = (*_DISK_FULL_ERRORS, tf.errors.PermissionDeniedError)
    return isinstance(error, types)
  # Errors in writing event files or the state file have no node. Those of queue
  # runners have none either, but these end quietly when input is exhausted.
  return error.node_def is None and isinstance(error, _DISK_FULL_ERRORS)


def _stop_at_nan(what: str, step: int) -> NoReturn:
  raise UserError(
    f'Training diverged at step {step}: {what}. The last checkpoint is intact; '
    'resume with a lower --learning_rate.'
  )
