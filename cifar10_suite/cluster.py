"""Training together with the other tasks of a cluster.

All tasks run the same program; TF_CONFIG says which one each is, as described
in `tf_config`. The chief and the workers each have a copy of the network and an
input pipeline. The chief also restores, saves and writes summaries; without a
chief, the first worker takes its role. An "evaluator" scores the chief's
checkpoints. Without TF_CONFIG, a program runs alone.

The tasks watch each other: each publishes a status on its own server.

How workers combine their gradients depends on the cluster: with parameter
servers ("ps"), see `parameter_servers`; otherwise, see `all_reduce`.
"""

import atexit
import json
import math
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable

import tensorflow.compat.v1 as tf

from cifar10_suite.errors import UserError
from cifar10_suite.tf_config import Addresses, Task
from cifar10_suite.updates import Gradients

# Settings in common that each worker measures by itself.
MEASURED = ('compute type', 'kernels for bfloat16')

_POLL_SECS = 0.5  # between two looks at the other tasks
_ANSWER_SECS = 2  # for a task to answer
_FAREWELL_SECS = 15  # for the others to learn that training has finished
_SILENCE_SECS = 5  # until an unresponsive task is reported


class Cluster(tf.train.SessionRunHook):
  """The tasks that train together; without a cluster, this process alone.

  It is also a hook for the session of this task.

  Attributes:
    task: the task of this process.
    workers: the tasks that compute gradients, the chief first.
    servers: the parameter servers.
    is_alone: whether there is no cluster.
    is_chief: whether this task is the chief.
    device: TensorFlow device or device function for the graph, or None.
    workers_per_step: number of workers whose gradients a step averages: all, or
      one with parameter servers.
    initializes: whether this process initializes variables.
    master: session target; '' without a cluster.
    statuses: latest status of each other task; None if it did not answer.
    signals: signals that ask this process to stop, in order of arrival.
  """

  def __init__(self, task: Task, addresses: Addresses | None = None):
    """Initialize the cluster; `join` connects to it.

    Args:
      task: the task of this process.
      addresses: addresses of all tasks; none without a cluster.
    """
    self.task = task
    self._addresses = addresses or {}
    self.workers = self._tasks('chief') + self._tasks('worker') or [task]
    self.servers = self._tasks('ps')
    self.is_alone = not addresses
    self.is_chief = task == self.workers[0]
    self.device: str | Callable[[tf.Operation], str] | None = None
    self.workers_per_step = 1 if self.servers else len(self.workers)
    self.initializes = self.is_chief or not self.servers
    self.master = ''
    self.statuses: dict[Task, dict | None] = {}
    self.signals: list[int] = []
    self._needed = self.workers
    if self.servers:
      self._needed = [*self.servers, self.workers[0]]
    self._left = threading.Event()

  def _tasks(self, kind: str) -> list[Task]:
    return [Task(kind, k) for k in range(len(self._addresses.get(kind, [])))]

  @property
  def number(self) -> int:
    """Position of this task in `workers`."""
    return self.workers.index(self.task)

  def join(
    self, config: tf.ConfigProto, settings: dict[str, object], timeout_secs: int
  ) -> None:
    """Start this task's server and monitor the tasks that it needs.

    Args:
      config: session configuration, modified in place.
      settings: what all workers must have in common.
      timeout_secs: seconds without response after which to give up on a task.

    Raises:
      UserError: if the port of this task is not free, or if the chief refuses
        the settings. If a needed task does not respond, the process exits with
        status 1.
    """
    if self.is_alone:
      return
    config.device_filters.extend(['/job:ps', self.task.device])
    try:
      server = tf.train.Server(
        self._addresses, self.task.kind, self.task.index, config=config
      )
    except tf.errors.OpError as error:
      raise UserError(
        f'{self.task} cannot serve at {self._address(self.task)}: '
        f'{error.message}. Is its port in use?'
      ) from error
    self.master = server.target
    self._own = Status(self.task, self.master)
    self._content: dict = {'process': secrets.token_hex(8)}
    settings = {**settings, 'cluster': self._addresses}
    self.publish(ended=False, settings=json.loads(json.dumps(settings)))
    self._timeout_secs = timeout_secs
    self._thread = threading.Thread(target=self._monitor, daemon=True)
    self._thread.start()
    atexit.register(self._end)
    wait_until(lambda: self.has_ended or self._has_met())
    if self.has_ended and self.task in self.workers:  # it has come too late
      print('Training has ended.')
      sys.exit(0)
    # The monitor names missing tasks.
    tf.logging.set_verbosity(tf.logging.FATAL)

  @property
  def has_ended(self) -> bool:
    """Whether the task knows that the chief has finished."""
    return self._content['ended']

  def _address(self, task: Task) -> str:
    return self._addresses[task.kind][task.index]

  def publish(self, **changes: object) -> None:
    """Change entries of this task's status.

    All have 'process', which identifies the process, so that others notice a
    restart, and 'ended', which is `has_ended`.
    """
    self._content.update(changes)
    self._own.write(self._content)

  def _monitor(self) -> None:
    """Read the statuses of all other tasks; exit if a needed one is missing.

    Runs in a thread because the main thread may block in TensorFlow.
    """
    sources = {
      task: Status(task, f'grpc://{self._address(task)}', _ANSWER_SECS)
      for task in self.servers + self.workers
      if task != self.task
    }
    self._answers = dict.fromkeys(sources, time.monotonic())
    self._silent: set[Task] = set()
    try:
      while not self._left.wait(_POLL_SECS):
        self.statuses = {it: source.read() for it, source in sources.items()}
        if self.has_ended:
          continue  # only `leave` and `serve` still need the statuses
        if (self.statuses.get(self.workers[0]) or {}).get('ended'):
          self.publish(ended=True)
        else:
          self._report()
    except BaseException as error:
      is_ours = isinstance(error, UserError)
      text = str(error) if is_ours else traceback.format_exc()
      print(text, file=sys.stderr, flush=True)
      os._exit(1)

  def _report(self) -> None:
    """Report needed tasks that fall silent or answer again.

    Raises:
      UserError: if one has not answered for too long.
    """
    now = time.monotonic()
    for task, status in self.statuses.items():
      if status or task not in self._needed:
        self._answers[task] = now
    silences = {task: now - last for task, last in self._answers.items()}
    silent = {task for task, secs in silences.items() if secs > _SILENCE_SECS}
    for task in silent ^ self._silent:
      word = 'Waiting for' if task in silent else 'Found'
      print(f'{word} {task} at {self._address(task)}.', flush=True)
    self._silent = silent
    for task, secs in silences.items():
      if secs > self._timeout_secs:
        raise UserError(
          f'{self.task} gives up: {task} at {self._address(task)} has not '
          f'answered for {self._timeout_secs:g} s. After a restart, training '
          'resumes from the last checkpoint.'
        )

  def _end(self) -> None:
    """Stop the monitor: Python aborts at exit if a thread is in TensorFlow."""
    self._left.set()
    self._thread.join()

  def _has_met(self) -> bool:
    """Return whether the tasks that a session needs are there."""
    return True

  def stops(self) -> bool:
    """Return whether to stop before the next step because of a signal."""
    return bool(self.signals)

  def average(self, gradients: Gradients) -> Gradients:
    """Return the gradients to apply: averages over the workers."""
    return gradients

  def recover(self, error: tf.errors.OpError, step: int) -> None:
    """Start over, without returning, if an error is the loss of a worker.

    Args:
      error: the error that ended the session.
      step: number of completed steps.
    """

  def leave(self) -> None:
    """Wait until all tasks know that the chief has finished."""
    if self.is_alone:
      return
    if self.is_chief:
      self.publish(ended=True)
      wait_until(
        lambda: all(it and it['ended'] for it in self.statuses.values()),
        _FAREWELL_SECS,
      )
    else:
      wait_until(lambda: self.has_ended)
      time.sleep(2)  # until the chief has read it


ALONE = Cluster(Task())


class Status:
  """Status of a task: a JSON object in a variable on the task's server."""

  def __init__(self, task: Task, target: str, timeout_secs: int = 0):
    """Prepare access to a task's status, without waiting for its server.

    Args:
      task: the task.
      target: gRPC target of its server.
      timeout_secs: seconds after which reading fails; 0 waits indefinitely.
    """
    self._target = target
    self._timeout_secs = timeout_secs
    self._config = tf.ConfigProto(
      device_filters=[task.device], operation_timeout_in_ms=1000 * timeout_secs
    )
    with tf.Graph().as_default() as self._graph, tf.device(task.device):
      self._variable = tf.get_variable(
        'status', initializer='', use_resource=True
      )
    self._connect()

  def _connect(self) -> None:
    self._session = tf.Session(self._target, self._graph, self._config)

  def write(self, status: dict) -> None:
    self._variable.load(json.dumps(status), self._session)

  def read(self) -> dict | None:
    """Return the status, or None if the task does not answer."""
    host, _, port = self._target.removeprefix('grpc://').rpartition(':')
    options = tf.RunOptions(timeout_in_ms=1000 * self._timeout_secs)
    try:
      # TensorFlow would wait for a missing server.
      address = (host.strip('[]'), int(port))  # brackets are for IPv6
      socket.create_connection(address, self._timeout_secs).close()
      return json.loads(self._session.run(self._variable, options=options))
    except OSError:
      return None
    except tf.errors.OpError:
      # The session may be with an earlier process, or on another machine.
      self._connect()
      return None


def wait_until(
  condition: Callable[[], bool], timeout_secs: float = math.inf
) -> None:
  """Wait until a condition holds, but no longer than `timeout_secs`."""
  deadline = time.monotonic() + timeout_secs
  while not condition() and time.monotonic() < deadline:
    time.sleep(_POLL_SECS)
