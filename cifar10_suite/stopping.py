"""Stopping training by the scores of an evaluator that runs beside it."""

import contextlib
import json
import os
import time

import tensorflow.compat.v1 as tf
from tqdm import tqdm

from cifar10_suite import checkpoints, files
from cifar10_suite.errors import UserError

_LOOK_SECS = 1  # between two looks at the scores
_USED = ('digest', 'step', 'precision')  # of a `scores.Record`


class StopByScore(tf.train.CheckpointSaverListener):
  """Listener that says when to stop, by the scores of this run's checkpoints.

  Scores of other checkpoints, such as those of an earlier run, and of other
  images do not count.

  Attributes:
    reason: why to stop training, one sentence; '' to continue.
  """

  def __init__(
    self,
    train_dir: str,
    eval_dir: str,
    eval_data: str,
    precision: float | None,
    patience: int | None,
  ):
    """Initialize the listener.

    Args:
      train_dir: directory of the checkpoints; those that are there count.
      eval_dir: directory of the scores.
      eval_data: images whose scores count, 'test' or 'held_out'.
      precision: precision at which to stop, or None.
      patience: number of scores without a new best after which to stop, or
        None.

    Raises:
      UserError: if there are unreadable scores.
    """
    self.reason = ''
    self._train_dir = train_dir
    self._path = os.path.join(eval_dir, files.SCORES)
    self._eval_data = eval_data
    self._precision = precision
    self._patience = patience
    self._begin = time.monotonic()
    # Seconds from the start of this process to each save, by digest; None for
    # checkpoints that were there before.
    self._saved: dict[str, float | None] = {}
    for path in checkpoints.saved_in(train_dir):
      with contextlib.suppress(checkpoints.CheckpointError):
        self._saved[checkpoints.digest(path)] = None
    self._next_look = self._begin
    self._seen: tuple[int, int] | None = None  # size and time of the file
    self._is_told = False  # that the scores cannot be read
    try:
      self._scores()
    except OSError as error:
      raise UserError(
        f'Cannot read {self._path}: {error.strerror}. Choose the --eval_dir of '
        'the evaluator.'
      ) from error

  def after_save(self, session: tf.Session, global_step_value: int) -> None:
    path = os.path.join(self._train_dir, f'model.ckpt-{global_step_value}')
    seconds = time.monotonic() - self._begin
    self._saved.setdefault(checkpoints.digest(path), seconds)
    self._seen = None

  def stops(self) -> bool:
    """Return whether to stop; look for new scores at most once per second."""
    now = time.monotonic()
    if now >= self._next_look and not self.reason:
      self._next_look = now + _LOOK_SECS
      try:
        self._look()
      except OSError as error:
        if not self._is_told:
          tqdm.write(
            f'Cannot read {self._path}: {error.strerror}. Training continues.'
          )
        self._is_told = True
    return bool(self.reason)

  def _look(self) -> None:
    with contextlib.suppress(FileNotFoundError):  # nothing is scored yet
      status = os.stat(self._path)
      seen = status.st_size, status.st_mtime_ns
      if seen != self._seen:
        self.reason = self._find_reason()
        self._seen = seen

  def _find_reason(self) -> str:
    scores = self._scores()
    if not scores:
      return ''
    if self._precision is not None:
      for score in scores:
        if score['precision'] >= self._precision:
          seconds = self._saved[score['digest']]
          when = '' if seconds is None else f', after {seconds:.0f} s'
          return (
            f'Stopped by --stop_at_precision {self._precision:g}: precision '
            f'{score["precision"]:.3f} at step {score["step"]}{when}.'
          )
    best = max(scores, key=lambda score: score['precision'])
    later = len(scores) - 1 - scores.index(best)
    if self._patience is not None and later >= self._patience:
      return (
        f'Stopped by --patience {self._patience}: the best precision is '
        f'{best["precision"]:.3f} at step {best["step"]}, {later} scores ago.'
      )
    return ''

  def _scores(self) -> list[dict]:
    """Return the scores that count, one for each checkpoint, sorted by step."""
    scores = {}
    # An editor may have put a byte order mark before the first line.
    with (
      contextlib.suppress(FileNotFoundError),
      open(self._path, encoding='utf-8-sig', errors='replace') as file,
    ):
      for line in file:
        # The last line may be incomplete.
        with contextlib.suppress(ValueError, KeyError, TypeError):
          score = json.loads(line)
          if (
            score['digest'] in self._saved
            and score['eval_data'] == self._eval_data
          ):
            scores[score['digest']] = {name: score[name] for name in _USED}
    return sorted(scores.values(), key=lambda score: score['step'])
