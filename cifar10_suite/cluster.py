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
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import tensorflow.compat.v1 as tf

from cifar10_suite.errors import UserError
from cifar10_suite.tf_config import Addresses, ClusterError, Task

if TYPE_CHECKING:
  from cifar10_suite.updates import Gradients

POLL_SECS = 0.2  # between two polls while waiting
_ANSWER_SECS = 2  # for a task to answer
_FAREWELL_SECS = 15  # for the others to learn that training has finished
_SILENCE_SECS = 5  # until an unresponsive task is reported


# Latest status of each task; None if it did not answer.
Statuses = dict[Task, dict | None]


class Cluster:
  """The tasks that train together; without a cluster, this process alone.

  Attributes:
    task: the task of this process.
    workers: the tasks that compute gradients, the chief first.
    servers: the parameter servers.
    is_alone: whether there is no cluster.
    is_chief: whether this task is the chief.
    device: TensorFlow device or device function for the graph, or None.
    gradients_per_step: number of workers whose gradients a step averages.
    initializes: whether this process initializes variables.
    master: session target; '' without a cluster.
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
    self.gradients_per_step = 1
    self.initializes = self.is_chief
    self.master = ''
    self.signals: list[int] = []
    self._needed = [*self.servers, self.workers[0]]
    self._has_ended = False

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
      ClusterError: if the port of this task is not free.
      UserError: if a task does not respond, or refuses the settings.
    """
    if self.is_alone:
      return
    spec = tf.train.ClusterSpec(self._addresses)
    try:
      server = tf.train.Server(
        spec, self.task.kind, self.task.index, config=config
      )
    except tf.errors.OpError as error:
      raise ClusterError(
        f'{self.task} cannot serve at {self._address(self.task)}: '
        f'{error.message}. Is its port in use?'
      ) from error
    self.master = server.target
    self._own = Status(self.task, self.master)
    self._content: dict = {'process': secrets.token_hex(8)}
    self._publish(ended=False, settings=settings)
    self._meet(timeout_secs)
    self._thread = threading.Thread(
      target=self._monitor, args=[timeout_secs], daemon=True
    )
    self._thread.start()
    atexit.register(self._end)
    # The main thread raises the same errors, and `watch` names missing tasks.
    tf.logging.set_verbosity(tf.logging.FATAL)
    threading.excepthook = _hide_session_errors

  def _address(self, task: Task) -> str:
    return self._addresses[task.kind][task.index]

  def _publish(self, **changes: object) -> None:
    """Change entries of this task's status.

    All have 'process', which identifies the process, so that others notice a
    restart, and 'ended', whether the task knows that the chief has finished.
    """
    self._content.update(changes)
    self._own.write(self._content)

  def _monitor(self, timeout_secs: int) -> None:
    """Watch the tasks that this one needs, and exit if one is missing.

    Runs in a thread because the main thread may block in TensorFlow.
    """
    try:
      for statuses in self.watch(self._needed, timeout_secs, poll_secs=1):
        if self._has_ended:
          return
        if (statuses.get(self.workers[0]) or {}).get('ended'):
          self._publish(ended=True)
          time.sleep(2)  # until the chief has read it
          return
        self._notice(statuses)
    except BaseException as error:
      is_expected = isinstance(error, UserError)
      print(
        error if is_expected else traceback.format_exc(),
        file=sys.stderr,
        flush=True,
      )
      os._exit(1)

  def _end(self) -> None:
    """Stop the monitor: Python aborts at exit if a thread is in TensorFlow."""
    self._has_ended = True
    self._thread.join()

  def _meet(self, timeout_secs: int) -> None:
    """Wait for the tasks without which a session cannot be created."""

  def _notice(self, statuses: Statuses) -> None:
    """Handle the statuses of the needed tasks, about once per second."""

  def read(
    self, tasks: list[Task], poll_secs: float = POLL_SECS
  ) -> Iterator[Statuses]:
    """Repeatedly yield the statuses of other tasks.

    Args:
      tasks: the tasks to read; this one is skipped.
      poll_secs: seconds between two readings.
    """
    sources = {
      task: Status(task, f'grpc://{self._address(task)}', _ANSWER_SECS)
      for task in tasks
      if task != self.task
    }
    while True:
      yield {task: source.read() for task, source in sources.items()}
      time.sleep(poll_secs)

  def watch(
    self, tasks: list[Task], timeout_secs: float, poll_secs: float = POLL_SECS
  ) -> Iterator[Statuses]:
    """Read the statuses of other tasks as `read` does, and report silent ones.

    Args:
      tasks: the tasks to read; this one is skipped.
      timeout_secs: seconds without answer after which to give up on a task.
      poll_secs: seconds between two readings.

    Raises:
      UserError: if a task has not answered for `timeout_secs`.
    """
    since = dict.fromkeys(tasks, time.monotonic())
    missed: set[Task] = set()
    for statuses in self.read(tasks, poll_secs):
      now = time.monotonic()
      for task, status in statuses.items():
        where = f'{task} at {self._address(task)}'
        if status is not None:
          since[task] = now
          if task in missed:
            missed.remove(task)
            print(f'Found {where}.', flush=True)
        elif now - since[task] > timeout_secs:
          raise UserError(
            f'{self.task} gives up: {where} has not answered for '
            f'{timeout_secs:g} s. After a restart, training resumes from the '
            'last checkpoint.'
          )
        elif now - since[task] > _SILENCE_SECS and task not in missed:
          missed.add(task)
          print(f'Waiting for {where}.', flush=True)
      yield statuses

  def stops(self) -> bool:
    """Return whether to stop before the next step because of a signal."""
    return bool(self.signals)

  def average(self, gradients: 'Gradients') -> 'Gradients':
    """Return the gradients to apply: averages over the workers."""
    return gradients

  def scaffold(
    self, config: tf.ConfigProto, **parts: object
  ) -> tf.train.Scaffold:
    """Return a scaffold, made of `parts`, for a session with `config`."""
    return tf.train.Scaffold(**parts)

  def hooks(self) -> list[tf.train.SessionRunHook]:
    """Return the hooks for this worker's session."""
    return []

  def listeners(self) -> list[tf.train.CheckpointSaverListener]:
    """Return the listeners of the chief's saver."""
    return []

  def recover(self, error: tf.errors.OpError) -> None:
    """Start over if the loss of another worker caused an error."""

  def leave(self) -> None:
    """Wait until all tasks know that the chief has finished."""
    if self.is_alone:
      return
    if not self.is_chief:
      self._thread.join()
      return
    self._has_ended = True
    self._publish(ended=True)
    unaware = {*self.workers[1:], *self.servers}
    deadline = time.monotonic() + _FAREWELL_SECS
    for statuses in self.read(list(unaware)):
      unaware -= {task for task, it in statuses.items() if it and it['ended']}
      if not unaware or time.monotonic() > deadline:
        return


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
      socket.create_connection((host, int(port)), self._timeout_secs).close()
      return json.loads(self._session.run(self._variable, options=options))
    except OSError:
      return None
    except tf.errors.OpError:
      # The session may be with an earlier process, or on another machine.
      self._connect()
      return None


def _hide_session_errors(failure: threading.ExceptHookArgs) -> None:
  if not issubclass(failure.exc_type, tf.errors.OpError):
    threading.__excepthook__(failure)
