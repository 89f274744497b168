"""Errors that the user can mend."""


class UserError(Exception):
  """A mistake or a mishap; the message is all that the user sees.

  It names the offending thing and the remedy.
  """
