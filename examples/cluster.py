"""Train in a cluster of processes on one machine, as a demonstration.

  python examples/cluster.py --workers 2 [flags of cifar10_train.py]

Each task is a process with a separate log file, and finds the others through
TF_CONFIG, as on separate machines. The chief's output is also printed here.
Killed tasks are restarted; Ctrl-C stops all tasks.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TextIO

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_POLL_SECS = 0.2
_KILLED = (signal.SIGKILL, signal.SIGTERM)  # a task that they end starts again
_MAX_RESTARTS = 5  # of a task, within the following time
_RESTART_SECS = 60
_PATIENCE_SECS = 60  # grace period for tasks after the chief has finished
_SCORE_SECS = 300  # for the evaluator to score the last step


def main() -> None:
  parser = argparse.ArgumentParser(
    description='Train in a cluster on this machine; other flags go to the '
    'program.',
    allow_abbrev=False,
  )
  parser.add_argument(
    '--workers', type=int, default=2, help='workers, including the chief'
  )
  parser.add_argument(
    '--ps',
    type=int,
    default=0,
    help='parameter servers; without any, workers average their gradients',
  )
  parser.add_argument(
    '--evaluator', action='store_true', help='evaluate during training'
  )
  parser.add_argument(
    '--log_dir',
    default=os.path.join(_ROOT, 'cluster_logs'),
    help='directory for logs',
  )
  parser.add_argument(
    '--program', default='cifar10_train.py', help='program of each task'
  )
  arguments, flags = parser.parse_known_args()
  if arguments.workers + arguments.ps < 2 or arguments.workers < 1:
    parser.error('a cluster needs at least two tasks, one of them a worker')
  for number in (signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) is not signal.SIG_IGN:  # as with nohup
      signal.signal(number, lambda number, _: sys.exit(128 + number))
  command = [sys.executable, os.path.join(_ROOT, arguments.program), *flags]
  os.makedirs(arguments.log_dir, exist_ok=True)
  try:
    sys.exit(run(arguments, command))
  except KeyboardInterrupt:
    sys.exit(128 + signal.SIGINT)


def run(arguments: argparse.Namespace, command: list[str]) -> int:
  """Run a cluster until it finishes, and return its exit status.

  Args:
    arguments: workers, ps, evaluator and log_dir, from the command line.
    command: command of each task.
  """
  workers = [
    'chief 0',
    *(f'worker {k}' for k in range(arguments.workers - 1)),
  ]
  names = [*(f'ps {k}' for k in range(arguments.ps)), *workers]
  addresses = {}
  for name, port in zip(names, free_ports(len(names)), strict=True):
    addresses.setdefault(name.split()[0], []).append(f'localhost:{port}')
  if arguments.evaluator:
    names.append('evaluator 0')

  def start(name: str, *flags: str) -> subprocess.Popen:
    kind, index = name.split()
    task = {'type': kind, 'index': int(index)}
    config = json.dumps({'cluster': addresses, 'task': task})
    with open(log_path(arguments.log_dir, name), 'a') as log:
      process = subprocess.Popen(
        [*command, *flags],
        env={**os.environ, 'TF_CONFIG': config},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # keep Ctrl-C from tasks: servers exit last
      )
    if name in workers:
      share_cores(process, workers.index(name), len(workers))
    return process

  tasks: dict[str, subprocess.Popen] = {}
  with open(log_path(arguments.log_dir, 'chief 0'), 'a+') as lines:
    try:
      for name in names:
        tasks[name] = start(name)
      print(f'Logs are in {arguments.log_dir}: {", ".join(names)}.')
      return watch(tasks, start, lines, arguments.log_dir)
    finally:
      stop(tasks)
      sys.stdout.write(lines.read())


def watch(
  tasks: dict[str, subprocess.Popen],
  start: Callable[..., subprocess.Popen],
  lines: TextIO,
  log_dir: str,
) -> int:
  """Restart killed tasks and print the chief's log until the cluster finishes.

  Args:
    tasks: the tasks by name; changed when one is restarted.
    start: starts a task, given its name and more flags.
    lines: the chief's log.
    log_dir: directory of all logs.

  Returns:
    The exit status of a task that failed, or 0. Training continues if only the
    evaluator fails.
  """
  evaluation = 0  # exit status of an evaluator that has failed
  restarts: dict[str, list[float]] = {name: [] for name in tasks}
  while tasks['chief 0'].poll() != 0:
    sys.stdout.write(lines.read())
    sys.stdout.flush()
    for name, process in list(tasks.items()):
      if not (status := exit_status(process)):
        continue
      if status - 128 not in _KILLED:
        report(name, status, log_dir)
      elif may_restart(name, status - 128, restarts[name]):
        tasks[name] = start(name, '--norestart')
        continue
      if name != 'evaluator 0':
        return status
      evaluation = status
      del tasks[name]
    time.sleep(_POLL_SECS)
  sys.stdout.write(lines.read())
  wait_for_all(tasks)
  if evaluator := tasks.get('evaluator 0'):
    evaluation = wait_for_evaluator(evaluator, log_dir, _SCORE_SECS)
  return evaluation


def may_restart(name: str, number: int, times: list[float]) -> bool:
  """Print which signal killed a task, and return whether to restart it.

  Args:
    name: name of the task.
    number: number of the signal.
    times: when the task was restarted, in seconds of `time.monotonic`; this
      restart is added.
  """
  killed = f'{name}: {signal.Signals(number).name}'
  now = time.monotonic()
  times[:] = [it for it in times if now - it < _RESTART_SECS]
  if len(times) >= _MAX_RESTARTS:
    print(f'{killed}, after {len(times)} restarts in {_RESTART_SECS} s.')
    return False
  times.append(now)
  print(f'{killed}; restarted.')
  return True


def share_cores(process: subprocess.Popen, number: int, count: int) -> None:
  """Restrict a process to its share of the cores.

  Otherwise each process would start as many threads as there are cores, and
  the threads of all processes would compete. Does nothing if there are no equal
  shares, or the system cannot do it.

  Args:
    process: a process that has just started.
    number: number of the process, from 0.
    count: number of processes that share the cores.
  """
  if hasattr(os, 'sched_setaffinity'):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) % count == 0:
      with contextlib.suppress(OSError):  # it may have ended
        os.sched_setaffinity(process.pid, cores[number::count])


def free_ports(count: int) -> list[int]:
  """Return the numbers of unused ports."""
  with contextlib.ExitStack() as stack:
    sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
    for one in sockets:
      one.bind(('localhost', 0))
    return [one.getsockname()[1] for one in sockets]


def log_path(log_dir: str, name: str) -> str:
  return os.path.join(log_dir, f'{name.replace(" ", "-")}.log')


def exit_status(process: subprocess.Popen) -> int | None:
  """Return the exit status, 128 plus the number of a signal, or None."""
  status = process.poll()
  return 128 - status if status and status < 0 else status


def report(name: str, status: int, log_dir: str) -> None:
  """Print how a task has failed, and the end of its log."""
  print(f'{name} ended with status {status}:')
  with open(log_path(log_dir, name)) as log:
    print(*log.read().rstrip().split('\n')[-3:], sep='\n')


def wait_for_all(tasks: dict[str, subprocess.Popen]) -> None:
  """Wait for the tasks to finish after the chief, for a limited time."""
  deadline = time.monotonic() + _PATIENCE_SECS
  for name, process in tasks.items():
    if not name.startswith('evaluator'):
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(deadline - time.monotonic(), 0))


def wait_for_evaluator(
  process: subprocess.Popen, log_dir: str, timeout_secs: float
) -> int:
  """Wait for the last score, and return the exit status; 1 if it is missing."""
  if process.poll() is None:
    print(f'Waiting for the last score, {timeout_secs} s at most.', flush=True)
  try:
    process.wait(timeout_secs)
  except subprocess.TimeoutExpired:
    print('The last step has no score.')
    return 1
  if status := exit_status(process):
    report('evaluator 0', status, log_dir)
  return status


def stop(tasks: dict[str, subprocess.Popen]) -> None:
  """Stop running tasks, first the chief, which saves its last step.

  A second Ctrl-C stops all at once.
  """
  try:
    if chief := tasks.get('chief 0'):
      chief.terminate()
      with contextlib.suppress(subprocess.TimeoutExpired):
        chief.wait(_PATIENCE_SECS)
  finally:
    for process in tasks.values():
      process.kill()
      process.wait()


if __name__ == '__main__':
  main()
