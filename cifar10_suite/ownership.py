"""Identification of the files that this suite's programs wrote.

Other TensorFlow programs use the same file names. Therefore, names alone do not
identify a file as ours, and files that are not provably ours are neither
removed nor overwritten.
"""

import os
import re
import shutil
import stat

from cifar10_suite import checkpoints, runs
from cifar10_suite.errors import UserError
from cifar10_suite.files import LOCK, content_of, is_lock
from cifar10_suite.profiling import TRACE

_VARIABLE = 'local3/weights'  # occurs in every file of this network
_CHECKPOINT = r'model\.ckpt-\d+'
_PART = re.compile(rf'({_CHECKPOINT})\.(index|meta|data-\d+-of-\d+)')
_NAMES = re.compile(
  r'checkpoint|graph\.pbtxt|run\.json|\.lock|events\.out\.tfevents\..*'
  rf'|{_PART.pattern}'
  rf'|(checkpoint|graph\.pbtxt|{_CHECKPOINT}\.meta)\.tmp[0-9a-f]{{32}}'
  r'|run\.json\.[0-9a-f]{8}\.tmp'
  rf'|{_CHECKPOINT}\.(.*\.)?tempstate\d+'
)
_FOLDER = re.compile(f'{_CHECKPOINT}_temp')
_IN_FOLDER = re.compile(r'part-\d+-of-\d+\..*')
_PROFILE = re.compile(
  r'profile/[\d_]+/'
  rf'(([^/]+\.xplane\.pb|{TRACE})(\.[0-9a-f]{{8}}\.tmp)?'
  # Files in which a viewer of the profile keeps what it has computed.
  r'|cache_version\.txt|[^/]+\.(\w+\.)?SSTABLE|[^/]+\.op_stats\w*\.pb)'
)
_EMPTY_EVENTS = 100  # bytes; such an event file contains only a header


def refuse_to_overwrite(train_dir: str) -> None:
  """Refuse to train if that would overwrite someone else's files.

  These are files with fixed names, and unreadable ones with the name of a
  checkpoint. Other networks' checkpoints are refused when training resumes.

  Raises:
    UserError: if training would overwrite such a file.
  """
  graph = os.path.join(train_dir, 'graph.pbtxt')
  state = os.path.join(train_dir, 'checkpoint')
  graph_is_ours = bool(_is_ours(graph))
  begun = graph_is_ours or any(
    re.fullmatch(rf'{_CHECKPOINT}\.index', name)
    for name in os.listdir(train_dir)
  )
  run = os.path.join(train_dir, runs.NAME)
  for path, is_ours in (
    (graph, graph_is_ours),
    (state, begun),
    (run, _is_ours(run)),
  ):
    if _has_content(path) and not (is_ours and os.path.isfile(path)):
      raise UserError(
        f'{path} is not from this network, and training would overwrite it. '
        'Move it, or choose another --train_dir.'
      )
  parts: dict[str, list[str]] = {}  # by checkpoint
  for name in os.listdir(train_dir):
    if match := _PART.fullmatch(name):
      checkpoint = os.path.join(train_dir, match[1])
      parts.setdefault(checkpoint, []).append(os.path.join(train_dir, name))
  _refuse_others(
    [
      path
      for checkpoint, paths in parts.items()
      if checkpoints.names_in(checkpoint) is None
      for path in paths
    ],
    'training may overwrite it. Move it, or choose another --train_dir.',
    known=graph_is_ours
    or any(map(_is_our_checkpoint, checkpoints.saved_in(train_dir))),
  )


def refuse_to_overwrite_best(best_dir: str, known: bool) -> None:
  """Refuse to keep the best checkpoint if that may overwrite other files.

  Args:
    best_dir: directory of the best checkpoint; it may be missing.
    known: whether it has the best.json of an evaluation.

  Raises:
    UserError: if there is such a file, or a file in place of the directory.
  """
  if os.path.lexists(best_dir) and not os.path.isdir(best_dir):
    raise UserError(
      f'{best_dir} is not a directory. Move it, or choose another --eval_dir.'
    )
  names = os.listdir(best_dir) if os.path.isdir(best_dir) else []
  _refuse_others(
    [
      os.path.join(best_dir, name)
      for name in names
      if name in ('checkpoint', runs.NAME) or _PART.fullmatch(name)
    ],
    'evaluation may overwrite it. Move it, or choose another --eval_dir.',
    known,
  )


def _refuse_others(paths: list[str], consequence: str, known: bool) -> None:
  """Refuse files that are not ours.

  Args:
    paths: paths of files with names of ours.
    consequence: end of the error message.
    known: as for `_others`.
  """
  if others := _others(paths, known):
    raise UserError(f'{others[0]} is not from this network, and {consequence}')


def _others(paths: list[str], known: bool = False) -> list[str]:
  """Return the paths of files that are not ours, sorted.

  Args:
    paths: paths of files and folders.
    known: whether files of unknown origin count as ours; they do, too, if
      another one is provably ours.
  """
  verdicts = {path: _is_ours(path) for path in sorted(paths)}
  known = known or True in verdicts.values()
  return [
    path
    for path, is_ours in verdicts.items()
    if is_ours is False or (is_ours is None and not known)
  ]


def refuse_to_remove_others(train_dir: str) -> None:
  """Refuse a directory with files that training did not write.

  A file of unknown origin counts as ours if the directory contains a file that
  is provably ours.

  Raises:
    UserError: if the directory contains other files.
  """
  paths = [os.path.join(train_dir, name) for name in os.listdir(train_dir)]
  lock = os.path.join(train_dir, LOCK)
  others = [
    os.path.basename(path)
    for path in _others(paths)
    if path != lock or _is_ours(lock) is False
  ]
  if others:
    raise UserError(
      f'--restart removed nothing: {train_dir} also contains '
      f'{", ".join(others[:5])}, not written by training. Move these files, or '
      'choose another --train_dir.'
    )


def remove_earlier_run(train_dir: str) -> None:
  """Remove a trainer's files, or raise UserError if there are others."""
  refuse_to_remove_others(train_dir)
  paths = [
    os.path.join(train_dir, name)
    for name in os.listdir(train_dir)
    if name != LOCK  # held by this process
  ]
  # Files that identify the others last, in case the process is killed.
  for path in sorted(paths, key=lambda path: _is_ours(path) is True):
    if os.path.isdir(path):
      shutil.rmtree(path)
    else:
      os.remove(path)


def _is_ours(path: str) -> bool | None:
  """Return whether a trainer of this network wrote a file.

  Returns:
    None if this is unknown: the file is missing, empty or damaged, or does not
    depend on the network.
  """
  name = os.path.basename(path)
  if os.path.isdir(path) and not os.path.islink(path):
    left_by_killed_save = _FOLDER.fullmatch(name) and all(
      _IN_FOLDER.fullmatch(inner) for inner in os.listdir(path)
    )
    return None if left_by_killed_save or _is_profile(path) else False
  if not os.path.lexists(path):
    return None
  if not _NAMES.fullmatch(name) or not stat.S_ISREG(os.lstat(path).st_mode):
    return False
  if name == LOCK:
    return None if is_lock(path) else False
  if not _has_content(path):
    return None
  if name == runs.NAME:
    return runs.is_ours(path)
  if name == 'graph.pbtxt' or name.startswith('events.'):
    content = content_of(path)
    # A full disk may have truncated the graph.
    is_cut = _VARIABLE.encode() not in content and b'data_batch_' in content
    return None if is_cut else _VARIABLE.encode() in content
  if match := re.match(_CHECKPOINT, name):
    return _is_our_checkpoint(os.path.join(os.path.dirname(path), match[0]))
  return None


def _is_profile(path: str) -> bool:
  """Return whether a directory contains only files like those of a profile.

  Only our profiles contain a trace, which is written first.
  """
  return os.path.basename(path) == 'plugins' and all(
    any(other.startswith(TRACE) for other in names)
    and _PROFILE.fullmatch(os.path.relpath(os.path.join(folder, name), path))
    for folder, _, names in os.walk(path)
    for name in names
  )


def _is_our_checkpoint(prefix: str) -> bool | None:
  if os.path.isfile(f'{prefix}.meta') and _has_content(f'{prefix}.meta'):
    return _VARIABLE.encode() in content_of(f'{prefix}.meta')
  names = checkpoints.names_in(prefix)
  return None if names is None else _VARIABLE in names


def _has_content(path: str) -> bool:
  """Return whether a path has content that could be lost."""
  if not os.path.exists(path):
    return os.path.lexists(path)  # a link to a missing file
  is_event_file = os.path.basename(path).startswith('events.')
  least = _EMPTY_EVENTS if is_event_file else 0
  return os.path.isdir(path) or os.path.getsize(path) > least
