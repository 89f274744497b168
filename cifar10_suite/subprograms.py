"""Runs a program of the suite from another program."""

import os
import signal
import subprocess
import sys
from typing import TextIO

from cifar10_suite import stop_signals

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run(program: str, flags: list[str], log: TextIO | None = None) -> int:
  """Run a program until it ends, also after SIGINT and SIGTERM.

  The program receives the same signals, so that it can save its work.

  Args:
    program: file name of the program, such as 'cifar10_train.py'.
    flags: its arguments.
    log: file that receives a copy of its output.

  Returns:
    The exit status of the program; 128 plus the number of the signal if a
    signal killed it, or arrived while it ended by itself.
  """
  received: list[int] = []
  process = subprocess.Popen(
    [sys.executable, os.path.join(_ROOT, program), *flags],
    stdout=subprocess.PIPE if log else None,
    text=True,
  )

  def forward(number: int) -> None:
    received.append(number)
    if number != signal.SIGINT:  # a terminal sends Ctrl-C to all processes
      process.send_signal(number)

  with stop_signals.handled(forward):
    if log and process.stdout:
      for line in process.stdout:
        print(line, end='', flush=True)
        log.write(line)
    status = process.wait()
  if status < 0:  # killed by a signal
    return 128 - status
  return status or (128 + received[0] if received else 0)
