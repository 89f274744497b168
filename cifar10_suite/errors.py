"""Errors that the user can correct."""


class UserError(Exception):
  """Error that the user can correct, shown without a traceback.

  The message names the cause and the remedy.
  """
