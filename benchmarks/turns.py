"""Run contestants as processes: one to its end, or several that take turns.

On a shared machine, the load changes from minute to minute. Contestants that
are to be compared therefore take turns every two seconds, so that the load
affects all of them alike.
"""

import contextlib
import datetime
import json
import math
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

TIME_LIMIT = 300  # seconds after which a process counts as hung
NUM_SLICES = 5
SLICE_SECS = 2.0
_WARM_UP_STEPS = 20
_LINE = re.compile(r'(?P<time>[\d-]+ [\d:.]+): step (?P<step>\d+), ')

Figures = dict[str, float]


class ContestantError(Exception):
  """Failure of a contestant; the message gives the reason in one line."""


class Steps(NamedTuple):
  """A program that runs steps until it is killed, and reports its progress.

  Attributes:
    command: the program and its arguments. It prints the lines of
      `timing.Progress` or those of the training program.
    batch_size: number of examples per step.
  """

  command: list[str]
  batch_size: int = 128


def run(command: list[str]) -> tuple[str, float]:
  """Run a program to completion.

  Returns:
    The standard output and the peak resident memory in MiB.

  Raises:
    ContestantError: if the program does not start, exceeds TIME_LIMIT, is
      killed, or exits with a non-zero status.
  """
  process = _Process(command)
  try:
    process.run_until(process.has_ended)
    if process.status:
      raise process.failure()
    return process.output(), process.peak_mib
  finally:
    process.kill()


def alternate(
  programs: dict[str, Steps], failures: dict[str, str]
) -> dict[str, Figures]:
  """Measure programs that take turns; all of them are in memory at once.

  First, each starts and warms up, while those before it are stopped.

  Args:
    programs: by the contestant's name.
    failures: receives the reason of each failure, by name. The other programs
      continue.

  Returns:
    By name, throughput in the slices, seconds from the start to the first
    report, peak resident memory in MiB and, if the program reports it,
    processor time per example.
  """
  processes: dict[str, _Process] = {}
  figures: dict[str, Figures] = {}
  try:
    for turn in range(1 + NUM_SLICES):
      for name, (command, batch_size) in programs.items():
        if name in failures:
          continue
        try:
          if turn == 0:
            processes[name] = _Process(command)
            _warm_up(processes[name], batch_size)
            print(f'{name}: warmed up', flush=True)
          else:
            _run_slice(processes[name])
          if turn == NUM_SLICES:
            figures[name] = _figures(processes[name], batch_size)
        except ContestantError as error:
          failures[name] = str(error)
          print(f'{name}: failed: {error}', flush=True)
  finally:
    for process in processes.values():
      process.kill()
  return figures


class _Process:
  """A process in a separate group, with its output in temporary files.

  The group lets its child processes be stopped and killed, too. With a pipe for
  the output, the process would wait once the pipe is full. It stays in this
  program's session: if this program is killed, the system sends SIGHUP to the
  stopped processes of the session, which would otherwise never end.

  Attributes:
    start: time of the start, in seconds since the epoch.
    slices: start and end of each slice of time in which it ran.
    status: the exit status; None while it has not ended.
    peak_mib: peak resident memory; NaN while it has not ended.
  """

  def __init__(self, command: list[str]):
    """Start a program; raise ContestantError if that fails."""
    self.slices: list[tuple[float, float]] = []
    self.status: int | None = None
    self.peak_mib = math.nan
    self._is_killed = False
    self._output = tempfile.TemporaryFile()  # noqa: SIM115
    self._errors = tempfile.TemporaryFile()  # noqa: SIM115
    self.start = time.time()
    try:
      self._process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=self._output,
        stderr=self._errors,
        env={
          **os.environ,
          'BENCH_PID': str(os.getpid()),
          'TF_CPP_MIN_LOG_LEVEL': '3',
          'TF_FORCE_GPU_ALLOW_GROWTH': 'true',
          'PYTHONUNBUFFERED': '1',
        },
        preexec_fn=os.setpgrp,
      )
    except OSError as error:
      raise ContestantError(f'{error}') from None

  def output(self) -> str:
    """Return what the process has printed so far."""
    return _read(self._output)

  def has_ended(self) -> bool:
    self._wait(os.WNOHANG)
    return self.status is not None

  def run_until(self, condition: Callable[[], bool]) -> None:
    """Wait for a condition; raise ContestantError after TIME_LIMIT."""
    deadline = time.monotonic() + TIME_LIMIT
    while not condition():
      if time.monotonic() > deadline:
        raise self.failure(f'not done after {TIME_LIMIT} s')
      time.sleep(0.01)

  def send(self, number: signal.Signals) -> None:
    """Send a signal to the process and its children, if any are left."""
    # If none is left, macOS raises PermissionError.
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(self._process.pid, number)

  def kill(self) -> None:
    """Kill the process, if it has not ended, and its children."""
    if not self._is_killed:  # afterwards, its number may be used again
      self.send(signal.SIGKILL)
      self._is_killed = True
      self._wait()

  def failure(self, reason: str = '') -> ContestantError:
    """Kill the process; return its failure, with its last line of errors.

    Args:
      reason: for a process that has not ended by itself.
    """
    status = self.status
    self.kill()
    lines = [line.strip() for line in _read(self._errors).splitlines()]
    last_line = next((line for line in reversed(lines) if line), '')
    if status == 0:
      reason = 'ended too soon'
    elif status is not None and status < 0:
      reason = f'killed by {signal.Signals(-status).name}'
    elif status is not None:
      return ContestantError(last_line or f'exit status {status}')
    return ContestantError(f'{reason}; {last_line}' if last_line else reason)

  def _wait(self, options: int = 0) -> None:
    """Record the end of the process, if it has ended."""
    if self.status is None:
      pid, status, usage = os.wait4(self._process.pid, options)
      if pid:
        self.status = os.waitstatus_to_exitcode(status)
        self._process.returncode = self.status
        self.peak_mib = usage.ru_maxrss / 1024


def _read(file) -> str:
  """Return the contents of a file, whose offset the process uses."""
  size = os.fstat(file.fileno()).st_size
  return os.pread(file.fileno(), size, 0).decode(errors='replace')


class _Report(NamedTuple):
  time: float  # seconds since the epoch
  examples: int  # used up to then
  cpu_secs: float = math.nan  # processor time up to then


def _reports(process: _Process, batch_size: int) -> list[_Report]:
  """Return the progress that a process has reported so far."""
  reports = []
  for line in process.output().splitlines():
    if match := _LINE.match(line):
      moment = datetime.datetime.fromisoformat(match['time'])
      examples = int(match['step']) * batch_size
      reports.append(_Report(moment.timestamp(), examples))
    elif line.startswith('{'):
      with contextlib.suppress(ValueError, TypeError):  # perhaps incomplete
        reports.append(_Report(**json.loads(line)))
  return reports


def _warm_up(process: _Process, batch_size: int) -> None:
  """Run a process until it has done enough steps, then stop it."""

  def is_warm() -> bool:
    reports = _reports(process, batch_size)
    return bool(reports) and (
      reports[-1].examples >= reports[0].examples + _WARM_UP_STEPS * batch_size
    )

  process.run_until(lambda: process.has_ended() or is_warm())
  if process.has_ended():
    raise process.failure()
  process.send(signal.SIGSTOP)


def _run_slice(process: _Process) -> None:
  """Let a stopped process run for some seconds."""
  start = time.time()
  process.send(signal.SIGCONT)
  time.sleep(SLICE_SECS)
  process.send(signal.SIGSTOP)
  process.slices.append((start, time.time()))
  if process.has_ended():
    raise process.failure()


def _figures(process: _Process, batch_size: int) -> Figures:
  """Kill a process and return its figures."""
  process.kill()
  reports = _reports(process, batch_size)
  measured = [it for it in reports if it.time >= process.slices[0][0]]
  if len(measured) < 2:
    raise ContestantError('reported less than twice in its slices')
  first, last = measured[0], measured[-1]
  seconds = sum(
    max(min(end, last.time) - max(start, first.time), 0)
    for start, end in process.slices
  )
  examples = last.examples - first.examples
  figures = {
    'examples_per_sec': examples / seconds,
    'startup_secs': reports[0].time - process.start,
    'peak_mib': process.peak_mib,
  }
  if math.isfinite(last.cpu_secs):
    cpu_secs = last.cpu_secs - first.cpu_secs
    figures['cpu_us_per_example'] = cpu_secs / examples * 1e6
  return figures
