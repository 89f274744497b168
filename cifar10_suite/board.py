"""TensorBoard, adapted: python -m cifar10_suite.board --logdir DIR.

The flags are those with which `tensorboard` serves. The differences are:

- It starts quickly and quietly, because it does not import TensorFlow.
- The first page shows precision and losses first.
- `--logdir_spec train:a,eval:b` shows runs 'train' and 'eval', not 'train/.'.
"""

import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import threading
import types
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any

_FIRST = ('Precision @ 1', 'cross_entropy', 'total_loss', 'learning_rate')


def main() -> None:
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: sys.exit(128 + number))
  with tempfile.TemporaryDirectory() as links:
    print(f'TensorBoard is at {_start(links)} (Ctrl-C stops it).', flush=True)
    threading.Event().wait()


def _start(links: str) -> str:
  """Start TensorBoard in a thread and return its address.

  Args:
    links: empty directory, for links to the directories of `--logdir_spec`.
  """
  # TensorBoard does without TensorFlow if it finds this module.
  sys.modules['tensorboard.compat.notf'] = types.ModuleType('notf')
  # The import takes a second, during which the signal handlers are needed.
  from tensorboard import program
  from tensorboard.plugins.base_plugin import FlagsError

  board = program.TensorBoard(
    server_class=lambda app, flags: (
      program.create_port_scanning_werkzeug_server(_pinned(app), flags)
    )
  )
  notes = io.StringIO()
  try:
    board.configure(sys.argv)
    if board.flags.logdir_spec:
      _link(board.flags.logdir_spec, links)
      board.flags.logdir, board.flags.logdir_spec = links, ''
    with contextlib.redirect_stderr(notes):  # leaves out its advice
      return board.launch()
  except FlagsError as error:
    sys.exit(str(error))
  except program.TensorBoardServerException as error:
    sys.exit(f'{error.msg}. Name another one with --port.')
  except SystemExit:
    print(notes.getvalue(), end='', file=sys.stderr)
    raise


def _link(spec: str, links: str) -> None:
  """Create links to the directories of a `--logdir_spec`, named like the runs.

  As for TensorBoard, a run without a name may be a path that contains colons.
  """
  for run in filter(None, spec.split(',')):
    name, colon, path = run.partition(':')
    if not colon or run.startswith('/'):
      name, path = '', run
    path = os.path.abspath(os.path.expanduser(path))
    name = (name or os.path.basename(path)).replace('/', '_')
    while os.path.lexists(os.path.join(links, name)):
      name += '_'
    os.symlink(path, os.path.join(links, name))


def _pinned(app: Callable) -> Callable:
  """Return a WSGI application whose first page has the main charts on top."""
  cards = [{'plugin': 'scalars', 'tag': tag} for tag in _FIRST]
  query = {'pinnedCards': json.dumps(cards), 'smoothing': 0}
  address = f'?{urllib.parse.urlencode(query, quote_via=urllib.parse.quote)}'

  def redirecting(
    environ: dict[str, Any], start_response: Callable
  ) -> Iterable[bytes]:
    if environ['PATH_INFO'] != '/' or environ['QUERY_STRING']:
      return app(environ, start_response)
    headers = [('Location', address), ('Content-Length', '0')]
    start_response('302 Found', headers)
    return []

  return redirecting


if __name__ == '__main__':
  main()
