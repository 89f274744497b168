"""Scores of checkpoints and the files in an evaluation directory.

  metrics.jsonl   one line of JSON per scored checkpoint
  event files     the same and more, for TensorBoard
  best/           a copy of the best checkpoint so far, and best.json

A run is one training from its first step. If training starts over, a new run
begins with the same steps; the scores of the earlier run are kept.
"""

import contextlib
import glob
import json
import os
import re
import time
from collections.abc import Mapping
from typing import NoReturn, TypedDict

import tensorflow.compat.v1 as tf

from cifar10_suite import best_checkpoint, checkpoints, dataset, files, runs
from cifar10_suite.errors import UserError
from cifar10_suite.metrics import Measures

PRECISION_TAG = 'Precision @ 1'
_BEGINNING = b'{"step": 0, "wall_time": '  # of a record of step 0


class Settings(TypedDict):
  """Evaluation flags that must be equal for scores to be comparable."""

  eval_data: str
  num_examples: int
  num_views: int


class Record(Measures):
  """Score of a checkpoint, a line of metrics.jsonl.

  Attributes:
    step: global step of the checkpoint.
    wall_time: time of evaluation, in seconds since the epoch.
    checkpoint: name of the checkpoint.
    digest: digest from `checkpoints.digest`.
    run: number of the training run, from 0.
    started: time at which that run started, from its run.json, in ISO format;
      None without run.json.
    eval_data, num_views: as in `Settings`.
  """

  step: int
  wall_time: float
  checkpoint: str
  digest: str
  run: int
  started: str | None
  eval_data: str
  num_views: int


_NEEDED = {'step', 'digest', 'run'} | Measures.__required_keys__
_NUMBERS = ('step', 'run', 'right', 'num_examples', 'precision', 'loss')


class Scores:
  """Scores in an evaluation directory.

  Attributes:
    records: the records in metrics.jsonl, in order.
  """

  def __init__(
    self, eval_dir: str, settings: Settings, class_names: tuple[str, ...]
  ):
    """Read existing scores.

    Args:
      eval_dir: path of the directory.
      settings: settings of the evaluation, stored in each record.
      class_names: name of each class.

    Raises:
      UserError: if scores are unreadable, have different settings or are of
        other classes, or if a file that is not ours would be overwritten.
    """
    self._eval_dir = eval_dir
    self._settings = settings
    self._class_names = class_names
    self._path = os.path.join(eval_dir, files.SCORES)
    # Fail now rather than after an evaluation.
    for path in (self._path, best_checkpoint.directory(eval_dir)):
      mode = os.R_OK | os.W_OK | (os.X_OK if os.path.isdir(path) else 0)
      if os.path.exists(path) and not os.access(path, mode):
        raise UserError(
          f'Cannot read and write {path}: no permission. Choose another '
          '--eval_dir.'
        )
    self.records = self._load()
    best_checkpoint.refuse_to_overwrite(eval_dir)
    self._step_without_record = self._find_step_without_record()
    self._writer = tf.summary.FileWriter(eval_dir)  # creates no file yet

  def find(self, checkpoint: str) -> Record | None:
    """Return the record of a checkpoint, or None if it has no score.

    The start of the run must be the same, too, where it is known: runs of the
    same seed may begin with equal checkpoints.

    Raises:
      CheckpointError: if the checkpoint is unreadable.
    """
    digest = checkpoints.digest(checkpoint)
    started = runs.started(runs.read(os.path.dirname(checkpoint)))
    for record in self.records:
      if record['digest'] == digest and _may_be_same(started, record):
        return record
    return None

  def curve(self, record: Record) -> list[Record]:
    """Return the records of a record's run, sorted by step.

    If a run was scored in turn with another one, or went back to an earlier
    step, it has several numbers. Scores before the last one's first step count,
    too.
    """
    started = record.get('started')
    same = [
      r
      for r in self.records
      if r['run'] == record['run'] or (started and r.get('started') == started)
    ]
    number = max(r['run'] for r in same)
    first = min(r['step'] for r in same if r['run'] == number)
    by_step = {
      r['step']: r for r in same if r['run'] == number or r['step'] < first
    }
    return [by_step[step] for step in sorted(by_step)]

  def make_record(
    self,
    checkpoint: str,
    step: int,
    is_latest: bool,
    started: str | None,
    measures: Measures,
  ) -> Record:
    """Create the record of a checkpoint for `add`.

    Args:
      checkpoint: path of the checkpoint or of a copy.
      step: global step of the checkpoint.
      is_latest: whether this is the newest checkpoint. If so, a step lower than
        an earlier one means that training has started over, even if the run
        has no run.json.
      started: time at which the run started, from `runs.started`, or None.
      measures: results of `metrics.measure`.
    """
    return {
      'step': step,
      'wall_time': time.time(),
      'checkpoint': os.path.basename(checkpoint),
      'digest': checkpoints.digest(checkpoint),
      'run': self._run(step, is_latest, started),
      'started': started,
      **self._settings,
      **measures,
    }

  def add(
    self, record: Record, checkpoint: str, summary: tf.Summary, graph: tf.Graph
  ) -> None:
    """Write a score.

    The line in metrics.jsonl is written last, so that no score is recorded
    twice if the process is killed. TensorBoard curves only move forward: they
    omit a checkpoint that is older than the last one.

    Args:
      record: record from `make_record`.
      checkpoint: path of a copy of the checkpoint, which is moved to best/ if
        it is the best so far.
      summary: summary for TensorBoard.
      graph: graph for TensorBoard, written with the first score.
    """
    step = record['step']
    earlier = self._steps(record['run'])
    if not self.records:
      self._writer.add_graph(graph)
    elif not earlier:
      # Makes TensorBoard hide the earlier run from this step on.
      start = tf.SessionLog(status=tf.SessionLog.START)
      self._writer.add_session_log(start, step)
    if step > max(earlier, default=-1) and step != self._step_without_record:
      self._writer.add_summary(summary, step)
      self._writer.flush()
    # best/ may have been moved away; a worse checkpoint is not the best.
    before = max((r['precision'] for r in self.records), default=-1.0)
    if record['precision'] > before:
      best_checkpoint.keep_if_better(self._eval_dir, checkpoint, record)
    with files.errors_named(self._path), open(self._path, 'a+b') as file:
      # An editor may have removed the end of the last line meanwhile.
      file.seek(max(file.tell() - 1, 0))
      end = b'' if file.read() in (b'', b'\n') else b'\n'
      file.write(end + json.dumps(record).encode() + b'\n')
    self.records.append(record)
    self._step_without_record = None

  def _load(self) -> list[Record]:
    if not os.path.lexists(self._path):
      return []
    if not os.path.isfile(self._path):
      raise UserError(
        f'{self._path} is not a file. Move it, or choose another --eval_dir.'
      )
    with open(self._path, 'rb') as file:
      *lines, part = file.read().split(b'\n')
    records = [
      self._parse(line, number) for number, line in enumerate(lines, start=1)
    ]
    if part:
      records += self._mend_end(part, len(lines) + 1)
    return records

  def _mend_end(self, part: bytes, number: int) -> list[Record]:
    """Complete or remove a last line without newline; return its record.

    An editor may have removed the newline. An incomplete record, which a killed
    evaluation left, is removed; the list is then empty.

    Raises:
      UserError: if the line is neither.
    """
    with contextlib.suppress(ValueError):
      json.loads(part)
      record = self._parse(part, number)
      with open(self._path, 'a') as file:
        file.write('\n')
      return [record]
    beginning = re.sub(rb'\d+', b'0', part, count=1)[: len(_BEGINNING)]
    if not _BEGINNING.startswith(beginning):
      self._refuse_line(number)
    os.truncate(self._path, os.path.getsize(self._path) - len(part))
    return []

  def _parse(self, line: bytes, number: int) -> Record:
    try:
      record = json.loads(line)
      settings = {key: record[key] for key in self._settings}
      if not record.keys() >= _NEEDED:
        raise KeyError
      names = tuple(record['class_accuracy'])
      # Fails unless all are numbers.
      sum([*(record[key] for key in _NUMBERS), *record['interval']])
    except (ValueError, KeyError, TypeError, AttributeError):
      self._refuse_line(number)
    if settings != self._settings:
      raise UserError(
        f'{self._eval_dir} holds scores of {_flags(settings)}, not of '
        f'{_flags(self._settings)}. Choose another --eval_dir.'
      )
    if names != self._class_names:
      raise UserError(
        f'{self._eval_dir} holds scores of other classes: '
        f'{dataset.listed(names)}. Choose another --eval_dir.'
      )
    return record

  def _refuse_line(self, number: int) -> NoReturn:
    raise UserError(
      f'{self._path}, line {number} is not a score. Fix or remove it, or '
      'choose another --eval_dir.'
    )

  def _find_step_without_record(self) -> int | None:
    """Return the step of a score with events but no record, if any.

    This happens if the evaluation is killed between writing the two.
    """
    steps = []
    pattern = os.path.join(glob.escape(self._eval_dir), 'events.out.tfevents.*')
    for path in sorted(glob.glob(pattern)):
      with contextlib.suppress(tf.errors.OpError):  # incomplete
        for event in tf.train.summary_iterator(path):
          if any(value.tag == PRECISION_TAG for value in event.summary.value):
            steps.append(event.step)
    if steps and steps[-1] not in self._steps(self._last_run()):
      return steps[-1]
    return None

  def _last_run(self) -> int:
    return self.records[-1]['run'] if self.records else 0

  def _steps(self, run: int) -> set[int]:
    return {record['step'] for record in self.records if record['run'] == run}

  def _run(self, step: int, is_latest: bool, started: str | None) -> int:
    """Return the number of a checkpoint's run; arguments as `make_record`."""
    if not self.records:
      return 0
    run = self._last_run()
    steps = self._steps(run)
    is_another = (
      not _may_be_same(started, self.records[-1])
      or step in steps
      or (is_latest and step < max(steps))
    )
    return run + 1 if is_another else run


def _may_be_same(started: str | None, record: Record) -> bool:
  """Return whether a run with this start, if known, may be that of a record."""
  other = record.get('started')
  return None in (started, other) or started == other


def _flags(settings: Mapping[str, object]) -> str:
  return ' '.join(f'--{key}={value}' for key, value in settings.items())
