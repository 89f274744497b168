"""Handling of the signals that ask a program to stop."""

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def handled(handler: Callable[[int], object]) -> Iterator[None]:
  """Call `handler` with the number of each SIGINT or SIGTERM that arrives."""
  previous = {
    number: signal.signal(number, lambda number, _: handler(number))
    for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield
  finally:
    for number, before in previous.items():
      signal.signal(number, before)
