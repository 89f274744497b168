"""Shared timing and output of the contestants."""

import json
import os
import time
from collections.abc import Callable

BATCH_SIZE = 128
WARM_UP_STEPS = 10
SECONDS = 10


def report(**figures: float) -> None:
  """Print figures for bench.py to read."""
  print(json.dumps(figures), flush=True)


def report_steps(
  run_step: Callable[[], object], batch_size: int = BATCH_SIZE
) -> None:
  """Run a step repeatedly and report its throughput.

  Args:
    run_step: runs one step and waits for its completion.
    batch_size: number of examples per step.
  """
  for _ in range(WARM_UP_STEPS):
    run_step()
  steps, start, cpu_start = 0, time.perf_counter(), sum(os.times()[:2])
  while time.perf_counter() - start < SECONDS:
    run_step()
    steps += 1
  seconds = time.perf_counter() - start
  examples = steps * batch_size
  report(
    examples_per_sec=examples / seconds,
    cpu_us_per_example=(sum(os.times()[:2]) - cpu_start) / examples * 1e6,
  )
