"""Handling of the signals that ask a program to stop."""

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def handled(handler: Callable[[int], object]) -> Iterator[None]:
  """Call `handler` with the number of each signal to stop that arrives.

  These are SIGINT, SIGTERM and, if the program would not ignore it, SIGHUP,
  which the end of a terminal sends.
  """
  previous = {
    number: signal.signal(number, lambda number, _: handler(number))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if signal.getsignal(number) is not signal.SIG_IGN
  }
  try:
    yield
  finally:
    for number, before in previous.items():
      signal.signal(number, before)
