"""Settings of an evaluation, and the checkpoints that it scores."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterator

import tensorflow.compat.v1 as tf

from cifar10_suite import checkpoints, commands, runs
from cifar10_suite.errors import UserError
from cifar10_suite.scores import Scores

_POLL_SECS = 1
# Enough for a trainer that is started at the same time to begin its run.
_START_SECS = 10


@dataclasses.dataclass(frozen=True)
class EvalSettings:
  """Settings of the evaluation program, from its flags.

  Attributes:
    checkpoint_dir: directory of the checkpoints, or path of one of them.
    eval_dir: directory for scores and event files.
    batches_dir: directory of the data files.
    eval_data: images to score: 'test', 'train_eval' or 'held_out'.
    num_examples: number of images to score; None for the default.
    num_views: number of windows per image, as in `views.cut`.
    batch_size: number of images per batch.
    dtype: compute type.
    device: 'cpu' to disable GPUs, or 'auto'.
    report: path of a report to write after each score, or None.
    run_once: whether to score only the latest checkpoint.
    all_checkpoints: whether to score all checkpoints, oldest first.
    until_trained: whether to end with the last step of training.
    eval_interval_secs: seconds from a score to the next look for a checkpoint.
    timeout_secs: seconds without a new checkpoint after which to end, or None.
  """

  checkpoint_dir: str
  eval_dir: str
  batches_dir: str
  eval_data: str
  num_examples: int | None
  num_views: int
  batch_size: int
  dtype: tf.DType
  device: str
  report: str | None
  run_once: bool
  all_checkpoints: bool
  until_trained: bool
  eval_interval_secs: int
  timeout_secs: int | None

  @property
  def waits(self) -> bool:
    """Whether to wait for new checkpoints."""
    return not (self.run_once or self.all_checkpoints)

  @property
  def is_test(self) -> bool:
    """Whether the images are those of the test file."""
    return self.eval_data == 'test'


def checkpoints_to_score(
  settings: EvalSettings, variables: dict[str, tf.Variable], scores: Scores
) -> Iterator[str]:
  """Yield the paths of the checkpoints that the settings select.

  Without `run_once` or `all_checkpoints`, these are the newest usable
  checkpoint, then each new one. If `checkpoint_dir` names a checkpoint, it is
  the only one.

  Args:
    settings: the directory and which of its checkpoints to score.
    variables: the variables to restore, by checkpoint name.
    scores: existing scores, to which the caller adds those of the checkpoints.

  Raises:
    CheckpointError: with `run_once`, if all checkpoints are unusable; in any
      case, if `checkpoint_dir` names a checkpoint that does not exist.
  """
  begin = time.monotonic()
  directory = settings.checkpoint_dir
  if named := checkpoints.named(directory):
    yield named
    return
  # Before scoring, so that a checkpoint that is saved meanwhile counts as new.
  seen = _identity(checkpoints.latest(directory))
  if settings.all_checkpoints:
    found = checkpoints.saved_in(directory)
  else:
    found = _newest_good(settings, variables)
  if not found and not checkpoints.saved_in(directory):
    print(f'No checkpoint file found in {commands.short_path(directory)}')
  yield from found
  if settings.waits:
    yield from _later_checkpoints(settings, seen, scores, begin)


def _identity(checkpoint: str | None) -> tuple[str | None, ...]:
  """Return the path of a checkpoint, its digest and the start of its run.

  The path alone does not identify it: a run that starts over may save another
  checkpoint under the same name or, with the same seed, even an equal one. What
  is unknown is None.
  """
  if checkpoint is None:
    return None, None, None
  started = runs.started(runs.read(os.path.dirname(checkpoint)))
  with contextlib.suppress(checkpoints.CheckpointError):
    return checkpoint, checkpoints.digest(checkpoint), started
  return checkpoint, None, started


def wait_for_held_out(settings: EvalSettings) -> int:
  """Return how many images the run in `checkpoint_dir` holds out.

  It may start later, if the settings wait: at first, the directory may be empty
  or contain an earlier run, which the trainer is about to delete.

  Returns:
    The number; 0 if there is no such run, after `timeout_secs` if that is set.
  """
  directory = checkpoints.directory_of(settings.checkpoint_dir)
  deadline = time.monotonic() + (settings.timeout_secs or math.inf)
  is_told = False
  while not (count := runs.hold_out(runs.read(directory))):
    if not settings.waits or time.monotonic() > deadline:
      break
    if not is_told:
      where = commands.short_path(directory)
      print(f'Waiting for a run in {where} that holds out images.')
      is_told = True
    time.sleep(_POLL_SECS)
  return count


def refuse_other_data(
  run_dir: str,
  run: dict | None,
  hold_out: int,
  class_names: tuple[str, ...],
) -> None:
  """Refuse a run that was trained on other data than the evaluation expects.

  Args:
    run_dir: directory of the run.
    run: content of its run.json, if there is one.
    hold_out: number of held-out images that are evaluated; 0 for other images.
    class_names: the classes of the data set.

  Raises:
    UserError: if it was trained on other classes, or on the held-out images.
  """
  runs.refuse_other_classes(run_dir, class_names)
  if hold_out and runs.hold_out(run) != hold_out:
    raise UserError(
      f'The run in {run_dir} has started over with '
      f'--hold_out={runs.hold_out(run)}, not {hold_out}. Start the evaluation '
      'again.'
    )


def _newest_good(
  settings: EvalSettings, variables: dict[str, tf.Variable]
) -> list[str]:
  try:
    found = checkpoints.newest_good(settings.checkpoint_dir, variables)
  except checkpoints.CheckpointError as error:
    if settings.run_once:
      raise
    print(f'Skipped: {error}')
    return []
  return [found[0]] if found else []


def _later_checkpoints(
  settings: EvalSettings,
  seen: tuple[str | None, ...],
  scores: Scores,
  begin: float,
) -> Iterator[str]:
  """Yield new checkpoints until the settings end this.

  Args:
    settings: the directory to watch, how often and for how long.
    seen: identity of its latest checkpoint so far, from `_identity`.
    scores: scores of the checkpoints.
    begin: monotonic time in seconds at which this program began to look.
  """
  # `tf.train.checkpoints_iterator` would follow the paths in the state file,
  # which lead out of a directory that was copied.
  directory = settings.checkpoint_dir
  where = commands.short_path(directory)
  last_time = time.monotonic()  # of a new checkpoint, or of its score
  next_time = last_time  # of a check
  if seen[0]:
    next_time += settings.eval_interval_secs
  told: set[str] = set()

  def tell(line: str) -> None:
    if line not in told:
      print(line)
      told.add(line)

  while True:
    latest = checkpoints.latest(directory)
    is_final = (
      settings.until_trained and latest and checkpoints.ends_run(latest)
    )
    now = time.monotonic()
    identity = _identity(latest)
    is_new = latest is not None and identity != seen
    if latest and is_new and (is_final or now >= next_time):
      seen = identity
      yield latest
      last_time = time.monotonic()
      next_time = last_time + settings.eval_interval_secs
      continue
    if latest and is_final and not is_new and _is_scored(latest, scores):
      name = commands.short_path(latest)
      if now >= begin + _START_SECS:
        print(f'Evaluation ends: {name} is the last step.')
        return
      tell(f'{name} is the last step. Waiting in case training continues.')
    elif not is_new and now > last_time + (settings.timeout_secs or math.inf):
      print(
        f'Evaluation ends: no new checkpoint in {where} for '
        f'{settings.timeout_secs} s.'
      )
      return
    else:
      tell(f'Waiting for a checkpoint in {where}.')
    if settings.until_trained and latest and not runs.read(directory):
      tell(f'{where} has no run.json: the last step of training is unknown.')
    time.sleep(_POLL_SECS)


def _is_scored(checkpoint: str, scores: Scores) -> bool:
  """Return whether a checkpoint has a score; False if it is unreadable."""
  with contextlib.suppress(checkpoints.CheckpointError):
    return scores.find(checkpoint) is not None
  return False
