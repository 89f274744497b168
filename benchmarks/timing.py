"""Shared output of the contestants, which bench.py reads."""

import json
import os
import sys
import time
from collections.abc import Callable

BATCH_SIZE = 128
_INTERVAL = 0.1  # seconds between reports of progress


def report(**figures: float) -> None:
  """Print figures in one line."""
  print(json.dumps(figures), flush=True)


class Progress:
  """Reports how many examples have been used, at most ten times a second."""

  def __init__(self, batch_size: int = BATCH_SIZE):
    self._parent = int(os.environ.get('BENCH_PID', os.getppid()))
    self._batch_size = batch_size
    self._examples = 0
    self._next = 0.0

  def add_step(self) -> None:
    """Count one more step; if bench.py is gone, exit."""
    self._examples += self._batch_size
    now = time.time()
    if now < self._next:
      return
    self._next = now + _INTERVAL
    report(time=now, examples=self._examples, cpu_secs=time.process_time())
    if os.getppid() != self._parent:
      sys.exit(1)


def run_steps(
  run_step: Callable[[], object], batch_size: int = BATCH_SIZE
) -> None:
  """Run steps and report the progress, until bench.py ends the process.

  Args:
    run_step: runs one step and waits for its completion.
    batch_size: number of examples per step.
  """
  progress = Progress(batch_size)
  while True:
    run_step()
    progress.add_step()
