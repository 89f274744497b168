"""Errors that the user can correct."""

import sys


class UserError(Exception):
  """Error that the user can correct, shown without a traceback.

  The message names the cause and the remedy.
  """


def same_command() -> str:
  """Return 'the same command', without what would delete the run."""
  names = {argument.lstrip('-').partition('=')[0] for argument in sys.argv[1:]}
  return f'the same command{" without --restart" * ("restart" in names)}'
