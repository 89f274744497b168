"""Tasks of a cluster and their status messages.

All tasks run the same program. The environment variable TF_CONFIG, set by
training operators, lists their addresses and says which one this process is:

  {"cluster": {"chief": ["a:2222"], "worker": ["b:2222", "c:2222"]},
   "task": {"type": "worker", "index": 0}}

The chief and the workers each have a copy of the network and an input pipeline.
The chief also restores, saves and writes summaries; without a chief, the first
worker takes its role. An "evaluator" scores the chief's checkpoints. Without
TF_CONFIG, a program runs alone.

How workers combine their gradients depends on the cluster: with parameter
servers ("ps"), see `parameter_servers`; otherwise, see `all_reduce`.
"""

import atexit
import dataclasses
import json
import os
import re
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

if TYPE_CHECKING:
  from cifar10_suite.updates import Gradients

POLL_SECS = 0.2  # between two polls while waiting
_TYPES = ('chief', 'worker', 'ps', 'evaluator')
_ANSWER_SECS = 2  # for a task to answer
_FAREWELL_SECS = 15  # for the others to learn that training has finished
_SILENCE_SECS = 5  # until an unresponsive task is reported


class ClusterError(UserError):
  """Invalid TF_CONFIG or unusable port; the message gives the reason."""


@dataclasses.dataclass(frozen=True)
class TaskName:
  """Unique name of a task in its cluster, printed as 'worker 0'.

  Attributes:
    kind: 'chief', 'worker', 'ps' or 'evaluator'.
    index: index among the tasks of this kind.
  """

  kind: str
  index: int

  def __str__(self) -> str:
    return f'{self.kind} {self.index}'

  @property
  def device(self) -> str:
    """TensorFlow device name of the task's machine."""
    return f'/job:{self.kind}/replica:0/task:{self.index}'


@dataclasses.dataclass(frozen=True)
class Task:
  """Role of a process in a cluster.

  Attributes:
    type: 'chief', 'worker', 'ps' or 'evaluator'.
    index: index among the tasks of this type.
    addresses: 'host:port' of the tasks of each type; empty without a cluster.
  """

  type: str = 'chief'
  index: int = 0
  addresses: dict[str, list[str]] = dataclasses.field(default_factory=dict)

  @property
  def name(self) -> TaskName:
    return TaskName(self.type, self.index)

  @property
  def is_alone(self) -> bool:
    return not self.addresses

  @property
  def workers(self) -> list[TaskName]:
    """Names of the tasks that compute gradients, the chief first."""
    if self.is_alone:
      return [self.name]
    return [
      TaskName(kind, index)
      for kind in ('chief', 'worker')
      for index in range(len(self.addresses.get(kind, [])))
    ]

  @property
  def servers(self) -> list[TaskName]:
    """Names of the parameter servers."""
    count = len(self.addresses.get('ps', []))
    return [TaskName('ps', index) for index in range(count)]

  @property
  def is_chief(self) -> bool:
    return self.name == self.workers[0]

  @property
  def number(self) -> int:
    """Position of this task in `workers`."""
    return self.workers.index(self.name)

  @property
  def device(self) -> str | None:
    """TensorFlow device name of this machine; None without a cluster."""
    return None if self.is_alone else self.name.device

  def address(self, name: TaskName) -> str:
    return self.addresses[name.kind][name.index]


# Latest status of each task; None if it did not answer.
Statuses = dict[TaskName, dict | None]


def this_task() -> Task:
  """Return the task that TF_CONFIG assigns to this process.

  Raises:
    ClusterError: if TF_CONFIG is invalid.
  """
  text = os.environ.get('TF_CONFIG', '')
  if not text:
    return Task()
  try:
    config = json.loads(text)
    addresses = {
      'chief' if kind == 'master' else kind: list(some)
      for kind, some in config.get('cluster', {}).items()
    }
    task = dict(config.get('task', {}))
  except (ValueError, TypeError, AttributeError) as error:
    raise ClusterError(f'Invalid TF_CONFIG: {error}') from error
  kind = task.get('type', '')
  kind = 'chief' if kind == 'master' else kind
  if kind == 'evaluator':
    return Task(kind, 0, addresses)
  addresses.pop('evaluator', None)
  if sum(len(some) for some in addresses.values()) <= 1:
    return Task()
  index = _index(task)
  _check(kind, index, addresses)
  return Task(kind, index, addresses)


def _index(task: dict[str, object]) -> int:
  """Return a task's index; a default might give two tasks the same one."""
  for key in ('type', 'index'):
    if key not in task:
      raise ClusterError(f'Invalid TF_CONFIG: its "task" has no "{key}".')
  index = task['index']
  digits = f'{index}'
  if isinstance(index, bool) or not re.fullmatch(r'[0-9]+', digits):
    raise ClusterError(
      f'Invalid TF_CONFIG: index {index!r} is not a non-negative integer.'
    )
  return int(digits)


def _check(kind: str, index: int, addresses: dict[str, list[str]]) -> None:
  """Raise ClusterError if the cluster is invalid or lacks the task."""
  problem = None
  if unknown := sorted(set(addresses) - set(_TYPES)):
    problem = f'it has tasks of an unknown type, {unknown[0]!r}'
  elif len(addresses.get('chief', [])) > 1:
    problem = 'it has more than one chief'
  elif not (addresses.get('chief') or addresses.get('worker')):
    problem = 'it has no "chief" and no "worker"'
  elif not 0 <= index < len(addresses.get(kind, [])):
    problem = f'"task" is {kind} {index}, which "cluster" does not list'
  for address in sum(addresses.values(), []):
    host, _, port = str(address).rpartition(':')
    if not (host and port.isdigit()):
      problem = f'{address!r} is not an address such as "host:2222"'
  if problem:
    raise ClusterError(f'Invalid TF_CONFIG: {problem}.')


class Cluster:
  """The tasks that train together; without a cluster, this process alone.

  Attributes:
    task: the task of this process.
    device: TensorFlow device or device function for the graph, or None.
    gradients_per_step: number of workers whose gradients a step averages.
    initializes: whether this process initializes variables.
    master: session target; '' without a cluster.
    signals: signals that ask this process to stop, in order of arrival.
  """

  def __init__(self, task: Task):
    self.task = task
    self.device: str | Callable[[tf.Operation], str] | None = None
    self.gradients_per_step = 1
    self.initializes = task.is_chief
    self.master = ''
    self.signals: list[int] = []
    self._needed = [*task.servers, task.workers[0]]
    self._has_ended = False

  def join(
    self, config: tf.ConfigProto, settings: dict[str, object], timeout_secs: int
  ) -> None:
    """Start this task's server and monitor the tasks that it needs.

    Args:
      config: session configuration, modified in place.
      settings: what all workers must have in common.
      timeout_secs: seconds without response after which to give up on a task.

    Raises:
      UserError: if a task does not respond, or refuses the settings.
    """
    if self.task.is_alone:
      return
    self.master = start_server(self.task, config).target
    self._own = Status(self.task.name, self.master)
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
    chief = self.task.workers[0]
    try:
      for statuses in watch(self.task, self._needed, timeout_secs, 1):
        if self._has_ended:
          return
        if (statuses.get(chief) or {}).get('ended'):
          self._publish(ended=True)
          time.sleep(2)  # until the chief has read it
          return
        self._notice(statuses)
    except UserError as reason:
      print(reason, file=sys.stderr, flush=True)
      os._exit(1)
    except BaseException:
      traceback.print_exc()
      os._exit(1)

  def _end(self) -> None:
    """Stop the monitor: Python aborts at exit if a thread is in TensorFlow."""
    self._has_ended = True
    self._thread.join()

  def _meet(self, timeout_secs: int) -> None:
    """Wait for the tasks without which a session cannot be created."""

  def _notice(self, statuses: Statuses) -> None:
    """Handle the statuses of the needed tasks, about once per second."""

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
    if self.task.is_alone:
      return
    if not self.task.is_chief:
      self._thread.join()
      return
    self._has_ended = True
    self._publish(ended=True)
    unaware = {*self.task.workers[1:], *self.task.servers}
    deadline = time.monotonic() + _FAREWELL_SECS
    for statuses in read(self.task, list(unaware)):
      unaware -= {name for name, it in statuses.items() if it and it['ended']}
      if not unaware or time.monotonic() > deadline:
        return


ALONE = Cluster(Task())


def start_server(task: Task, config: tf.ConfigProto) -> tf.train.Server:
  """Start the gRPC server of a task.

  Raises:
    ClusterError: if its port is not free.
  """
  try:
    return tf.train.Server(
      tf.train.ClusterSpec(task.addresses), task.type, task.index, config=config
    )
  except tf.errors.OpError as error:
    raise ClusterError(
      f'{task.name} cannot serve at {task.address(task.name)}: '
      f'{error.message}. Is its port in use?'
    ) from error


class Status:
  """Status of a task: a JSON object in a variable on the task's server."""

  def __init__(self, name: TaskName, target: str, timeout_secs: int = 0):
    """Prepare access to a task's status, without waiting for its server.

    Args:
      name: name of the task.
      target: gRPC target of its server.
      timeout_secs: seconds after which reading fails; 0 waits indefinitely.
    """
    self._address = target.removeprefix('grpc://')
    self._timeout_secs = timeout_secs
    self._session_arguments = dict(
      target=target,
      graph=tf.Graph(),
      config=tf.ConfigProto(
        device_filters=[name.device],
        operation_timeout_in_ms=1000 * timeout_secs,
      ),
    )
    with self._session_arguments['graph'].as_default(), tf.device(name.device):
      self._variable = tf.get_variable(
        'status', initializer='', use_resource=True
      )
    self._session = tf.Session(**self._session_arguments)

  def write(self, status: dict) -> None:
    self._variable.load(json.dumps(status), self._session)

  def read(self) -> dict | None:
    """Return the status, or None if the task does not answer."""
    host, _, port = self._address.rpartition(':')
    options = tf.RunOptions(timeout_in_ms=1000 * self._timeout_secs)
    try:
      # TensorFlow would wait for a missing server.
      socket.create_connection((host, int(port)), self._timeout_secs).close()
      return json.loads(self._session.run(self._variable, options=options))
    except OSError:
      return None
    except tf.errors.OpError:
      # The session may be with an earlier process, or on another machine.
      self._session = tf.Session(**self._session_arguments)
      return None


def read(
  task: Task, names: list[TaskName], poll_secs: float = POLL_SECS
) -> Iterator[Statuses]:
  """Repeatedly yield the statuses of other tasks.

  Args:
    task: the task of this process.
    names: names of the tasks to read; this one is skipped.
    poll_secs: seconds between two readings.
  """
  sources = {
    name: Status(name, f'grpc://{task.address(name)}', _ANSWER_SECS)
    for name in names
    if name != task.name
  }
  while True:
    yield {name: source.read() for name, source in sources.items()}
    time.sleep(poll_secs)


def watch(
  task: Task,
  names: list[TaskName],
  timeout_secs: float,
  poll_secs: float = POLL_SECS,
) -> Iterator[Statuses]:
  """Read the statuses of other tasks as `read` does, and report silent ones.

  Args:
    task: the task of this process.
    names: names of the other tasks.
    timeout_secs: seconds without answer after which to give up on a task.
    poll_secs: seconds between two readings.

  Raises:
    UserError: if a task has not answered for `timeout_secs`.
  """
  since = {name: time.monotonic() for name in names}
  missed: set[TaskName] = set()
  for statuses in read(task, names, poll_secs):
    now = time.monotonic()
    for name, status in statuses.items():
      where = f'{name} at {task.address(name)}'
      if status is not None:
        since[name] = now
        if name in missed:
          missed.remove(name)
          print(f'Found {where}.', flush=True)
      elif now - since[name] > timeout_secs:
        raise UserError(
          f'{task.name} gives up: {where} has not answered for '
          f'{timeout_secs:g} s. After a restart, training resumes from the '
          'last checkpoint.'
        )
      elif now - since[name] > _SILENCE_SECS and name not in missed:
        missed.add(name)
        print(f'Waiting for {where}.', flush=True)
    yield statuses


def _hide_session_errors(failure: threading.ExceptHookArgs) -> None:
  if not issubclass(failure.exc_type, tf.errors.OpError):
    threading.__excepthook__(failure)
