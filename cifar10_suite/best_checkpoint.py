"""The best checkpoint of an evaluation, in best/ of its directory.

It is a copy, so it stays when the trainer removes old checkpoints. best.json
names it.
"""

import errno
import json
import os
from collections.abc import Mapping
from typing import Any, TypedDict

from cifar10_suite import checkpoints, files, ownership
from cifar10_suite.errors import UserError


class Best(TypedDict):
  """Content of best.json: part of the best checkpoint's `scores.Record`."""

  step: int
  precision: float
  checkpoint: str
  eval_data: str


def directory(eval_dir: str) -> str:
  """Return the directory of the best checkpoint."""
  return os.path.join(eval_dir, 'best')


def refuse_to_overwrite(eval_dir: str) -> None:
  """Refuse to replace files that are not ours.

  Raises:
    UserError: if there are such files, or if best.json is unreadable.
  """
  ownership.refuse_to_overwrite_best(
    directory(eval_dir), known=_load(eval_dir) is not None
  )


def keep_if_better(
  eval_dir: str, checkpoint: str, record: Mapping[str, Any]
) -> None:
  """Move a copy of a checkpoint to best/ if it is better than all before.

  Only the checkpoint named in best.json is removed; others are not ours.

  Args:
    eval_dir: directory of the evaluation.
    checkpoint: path of the copy.
    record: its `scores.Record`.

  Raises:
    UserError: if best.json is unreadable.
  """
  best, before = _best(record), _load(eval_dir)
  if before and before['precision'] >= best['precision']:
    return
  best_dir = directory(eval_dir)
  os.makedirs(best_dir, exist_ok=True)
  for source in checkpoints.files_with_run(checkpoint):
    _move(source, os.path.join(best_dir, os.path.basename(source)))
  checkpoints.write_state(best_dir, [checkpoint])
  if before and before['checkpoint'] != best['checkpoint']:
    for path in checkpoints.files_of(
      os.path.join(best_dir, before['checkpoint'])
    ):
      os.remove(path)
  files.write_whole(_file(eval_dir), json.dumps(best).encode())


def _move(source: str, target: str) -> None:
  """Move a file, also if best/ is a link to another file system."""
  try:
    os.replace(source, target)
  except OSError as error:
    if error.errno != errno.EXDEV:
      raise
    with open(source, 'rb') as file:
      files.write_whole(target, file.read())


def _load(eval_dir: str) -> Best | None:
  path = _file(eval_dir)
  if not os.path.exists(path):
    return None
  try:
    with open(path) as file:
      best = _best(json.load(file))
    best['precision'] += 0.0  # fails unless it is a number
    # A path could lead to another directory's checkpoint, which would be
    # removed instead.
    if os.path.basename(best['checkpoint']) != best['checkpoint']:
      raise ValueError
    return best
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f'{path} does not name a best checkpoint. Fix or remove it, or choose '
      'another --eval_dir.'
    ) from error


def _file(eval_dir: str) -> str:
  return os.path.join(directory(eval_dir), 'best.json')


def _best(record: Mapping[str, Any]) -> Best:
  """Return the part of a record that belongs in best.json."""
  return {
    'step': record['step'],
    'precision': record['precision'],
    'checkpoint': record['checkpoint'],
    'eval_data': record.get('eval_data', 'test'),  # missing in old files
  }
