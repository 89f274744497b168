"""Tasks of a cluster, and what they tell each other.

Each machine runs the same program. The environment variable TF_CONFIG, which
training operators set, specifies all addresses and the task of this machine:

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
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import tensorflow.compat.v1 as tf

from cifar10_suite.errors import UserError

if TYPE_CHECKING:
  from cifar10_suite.updates import Gradients

POLL_SECS = 0.2  # between two looks at tasks to wait for
_TYPES = ('chief', 'worker', 'ps', 'evaluator')
_ANSWER_SECS = 2  # for a task to answer
_FAREWELL_SECS = 15  # for other tasks to hear of the end
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


# What each task says; None if it does not answer.
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
      f"Invalid TF_CONFIG: index {index!r} is not a task's number."
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
    problem = f'the cluster has no {kind} {index}, which "task" specifies'
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
    master: target of the session; '' for this process.
  """

  def __init__(self, task: Task):
    self.task = task
    self.device: str | Callable[[tf.Operation], str] | None = None
    self.gradients_per_step = 1
    self.initializes = task.is_chief
    self.master = ''
    self._needed = [*task.servers, task.workers[0]]
    self._has_ended = False

  def join(
    self, config: tf.ConfigProto, settings: dict[str, object], timeout_secs: int
  ) -> None:
    """Start this task's server and monitor the tasks that it needs.

    Args:
      config: session configuration, which this changes for the cluster.
      settings: what all workers must have in common.
      timeout_secs: seconds without response after which to give up on a task.

    Raises:
      UserError: if a task is missing, or has other settings.
    """
    if self.task.is_alone:
      return
    self.master = start_server(self.task, config).target
    self._status = Status(self.task.name, self.master)
    self._status.publish(settings=settings, ended=False)
    self._meet(timeout_secs)

    thread = threading.Thread(
      target=self._monitor, args=[timeout_secs], daemon=True
    )
    thread.start()
    atexit.register(self._end, thread)
    # The main thread raises errors, and `watch` reports missing tasks.
    tf.logging.set_verbosity(tf.logging.FATAL)
    threading.excepthook = _ignore_ends_of_sessions

  def _monitor(self, timeout_secs: int) -> None:
    """Watch the tasks that this one needs, and exit if one is missing.

    This is a thread: the main thread may wait in TensorFlow indefinitely.
    """
    try:
      for statuses in watch(self.task, self._needed, timeout_secs, 1):
        if self._has_ended:
          return
        self._notice(statuses)
    except UserError as reason:
      print(reason, file=sys.stderr, flush=True)
      os._exit(1)

  def _end(self, thread: threading.Thread) -> None:
    """End a thread: Python aborts if it exits during a TensorFlow call."""
    self._has_ended = True
    thread.join()

  def _meet(self, timeout_secs: int) -> None:
    """Wait for the tasks without which a session cannot be created."""

  def _notice(self, statuses: Statuses) -> None:
    """React to what the needed tasks say, about once per second."""

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
    """Start over if an error means that another worker is lost."""

  def leave(self) -> None:
    """Wait until all tasks know that the chief has finished."""
    if self.task.is_alone:
      return
    chief, *workers = self.task.workers
    if self.task.name == chief:
      self._has_ended = True
      self._status.publish(ended=True)
      deadline = time.monotonic() + _FAREWELL_SECS
      for statuses in read(self.task, [*workers, *self.task.servers]):
        heard = all(not it or it['ended'] for it in statuses.values())
        if heard or time.monotonic() > deadline:
          return
    for statuses in read(self.task, [chief]):
      if (status := statuses[chief]) and status['ended']:
        self._has_ended = True
        self._status.publish(ended=True)
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
  """Status of a task: a JSON object in a variable on the task's server.

  'process' identifies the process, so that others notice a restart. 'ended' is
  true once the task knows that the chief has finished.
  """

  def __init__(self, name: TaskName, target: str):
    """Connect to a task's server, without waiting for it.

    Args:
      name: name of the task.
      target: gRPC target of its server.
    """
    self._target = target
    self._config = tf.ConfigProto(
      device_filters=[name.device], operation_timeout_in_ms=1000 * _ANSWER_SECS
    )
    with tf.Graph().as_default() as self._graph, tf.device(name.device):
      self._variable = tf.get_variable(
        'status', initializer='', use_resource=True
      )
    self._content: dict = {'process': secrets.token_hex(8)}
    self._session = tf.Session(target, self._graph, self._config)

  def publish(self, **changes: object) -> None:
    """Change entries of this task's own status."""
    self._content.update(changes)
    self._variable.load(json.dumps(self._content), self._session)

  @property
  def process(self) -> str:
    return self._content['process']

  def difference(self, other: dict) -> str:
    """Return how another worker's settings differ from this task's, or ''."""
    own = json.loads(json.dumps(self._content['settings']))  # as sent
    there = other.get('settings', {})
    for key in {**own, **there}:
      if there.get(key) != own.get(key):
        return f'its {key} is {there.get(key)}, not {own.get(key)}.'
    return ''

  def read(self) -> dict | None:
    """Return the status of another task, or None if it does not answer."""
    host, _, port = self._target.removeprefix('grpc://').rpartition(':')
    options = tf.RunOptions(timeout_in_ms=1000 * _ANSWER_SECS)
    try:
      # TensorFlow would wait for a server that is not there.
      socket.create_connection((host, int(port)), _ANSWER_SECS).close()
      return json.loads(self._session.run(self._variable, options=options))
    except (OSError, tf.errors.DeadlineExceededError):
      return None
    except tf.errors.OpError:  # of an earlier process, or not yet published
      self._session = tf.Session(self._target, self._graph, self._config)
      return None


def read(
  task: Task, names: list[TaskName], poll_secs: float = POLL_SECS
) -> Iterator[Statuses]:
  """Yield the statuses of other tasks, None if they do not answer, for ever.

  Args:
    task: the task of this process.
    names: names of the other tasks.
    poll_secs: seconds between two readings.
  """
  sources = {
    name: Status(name, f'grpc://{task.address(name)}')
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
    UserError: if a task has not answered for longer.
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
          f'{where} has not answered for {timeout_secs:g} s: {task.name} gives '
          'up. After a restart, training resumes from its last checkpoint.'
        )
      elif now - since[name] > _SILENCE_SECS and name not in missed:
        missed.add(name)
        print(f'Waiting for {where}.', flush=True)
    yield statuses


def _ignore_ends_of_sessions(failure: threading.ExceptHookArgs) -> None:
  if not issubclass(failure.exc_type, tf.errors.OpError):
    threading.__excepthook__(failure)
