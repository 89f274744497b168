"""Commands and paths in messages, as the user would type them."""

import os
import shlex
import shutil
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def of(program: str, *arguments: str) -> str:
  """Return a command that runs a program of the suite.

  It names the running Python, and the program as seen from the working
  directory.

  Args:
    program: file name of the program, such as 'cifar10_train.py'.
    arguments: its arguments, not quoted.
  """
  is_python = shutil.which('python') == sys.executable
  python = 'python' if is_python else short_path(sys.executable)
  if os.sep not in python and not is_python:  # in the working directory
    python = os.path.join(os.curdir, python)
  path = short_path(os.path.join(_ROOT, program))
  return shlex.join([python, path, *arguments])


def same_command() -> str:
  """Return 'the same command', without what would delete the run."""
  names = {argument.lstrip('-').partition('=')[0] for argument in sys.argv[1:]}
  return f'the same command{" without --restart" * ("restart" in names)}'


def short_path(path: str) -> str:
  """Return a path for messages: relative if in the working directory."""
  try:
    relative = os.path.relpath(path)
  except (ValueError, FileNotFoundError):  # on another drive; deleted
    return path
  return path if relative.startswith(os.pardir) else relative
