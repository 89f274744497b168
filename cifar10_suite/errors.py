"""Errors that the user can correct."""

import re

# TensorFlow's lines before the reason, in errors of a session. Before them, it
# says where each operation is defined, and ends that with "Node: '...'".
_HEADER = re.compile(
  r'|Graph execution error:|=+|.*From /job:\S+:|\d+ root error\(s\) found\.'
)


class UserError(Exception):
  """Error that the user can correct, shown without a traceback.

  The message names the cause and the remedy.
  """


def first_line(message: str) -> str:
  """Return the first line of an error's message, after TensorFlow's header."""
  lines = re.split(r"\nNode: '.*'\n", message)[-1].splitlines()
  line = next((it for it in lines if not _HEADER.fullmatch(it)), message)
  return re.sub(r'^ *\(\d+\) \w+: ', '', line)  # of several errors, the first
