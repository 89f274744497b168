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

FAREWELL_SECS = 15  # grace period for unresponsive tasks at the end
POLL_SECS = 0.2  # between two looks at the others while waiting for them
_TYPES = ('chief', 'worker', 'ps', 'evaluator')
_ANSWER_SECS = 2  # for a task to answer
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
  """The workers that train together; in this base class, one process alone.

  Attributes:
    task: the task of this process, a worker or the chief.
    gradients_per_step: number of workers whose gradients a step averages.
    initializes: whether this process initializes variables.
    device: TensorFlow device or device function for the graph, or None.
    master: target of the session; '' for this process.
  """

  gradients_per_step = 1
  master = ''

  def __init__(self, task: Task):
    self.task = task
    self.initializes = task.is_chief
    self.device: str | Callable[[tf.Operation], str] | None = None

  def join(
    self, config: tf.ConfigProto, settings: dict[str, object], timeout_secs: int
  ) -> None:
    """Start this worker's server and wait for the tasks that it needs.

    Args:
      config: session configuration, which this changes for the cluster.
      settings: what all workers must have in common.
      timeout_secs: seconds without response after which to give up on a task.

    Raises:
      UserError: if a task is missing, or has other settings.
    """

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

  def recover(self) -> None:
    """Start over if an error occurred because another worker was lost."""

  def leave(self) -> None:
    """Tell the other tasks that this worker has finished."""


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

  'process' identifies the process, so that others notice a restart.
  """

  def __init__(self, name: TaskName, target: str):
    """Connect to a task's server, without waiting for it.

    Args:
      name: name of the task.
      target: gRPC target of its server.
    """
    self._target = target
    self._filters = [name.device]
    with tf.Graph().as_default(), tf.device(f'{name.device}/cpu:0'):
      self._variable = tf.get_variable(
        'status', initializer='', use_resource=True
      )
    self._content: dict = {'process': secrets.token_hex(8)}
    self._connect()

  def _connect(self) -> None:
    self._session = tf.Session(
      self._target,
      self._variable.graph,
      tf.ConfigProto(
        device_filters=self._filters,
        operation_timeout_in_ms=1000 * _ANSWER_SECS,
      ),
    )

  def publish(self, **changes: object) -> None:
    """Change entries of this task's own status."""
    self._content.update(changes)
    self._variable.load(json.dumps(self._content), self._session)

  @property
  def process(self) -> str:
    return self._content['process']

  def read(self) -> dict | None:
    """Return the status of another task, or None if it does not answer."""
    if not _listens(self._target):  # TensorFlow would wait
      return None
    options = tf.RunOptions(timeout_in_ms=1000 * _ANSWER_SECS)
    try:
      return json.loads(self._session.run(self._variable, options=options))
    except (tf.errors.DeadlineExceededError, tf.errors.UnavailableError):
      return None
    except tf.errors.OpError:  # of an earlier process, or not yet published
      self._connect()
      return None


def _listens(target: str) -> bool:
  host, _, port = target.removeprefix('grpc://').rpartition(':')
  try:
    socket.create_connection((host, int(port)), _ANSWER_SECS).close()
    return True
  except OSError:
    return False


def watch(
  task: Task,
  needed: list[TaskName],
  timeout_secs: float,
  others: list[TaskName] | None = None,
  poll_secs: float = 1,
) -> Iterator[dict[TaskName, dict | None]]:
  """Read the statuses of tasks repeatedly, and report silent ones.

  Args:
    task: the task of this process.
    needed: names of the tasks that this one cannot continue without.
    timeout_secs: seconds without response after which to give up on those.
    others: names of tasks that may be silent.
    poll_secs: seconds between two readings.

  Yields:
    The status of each task, None if it does not respond.

  Raises:
    UserError: if a needed task has not responded for longer.
  """
  sources = {
    name: Status(name, f'grpc://{task.address(name)}')
    for name in [*needed, *(others or [])]
  }
  since = {name: time.monotonic() for name in needed}
  missed: set[TaskName] = set()
  while True:
    statuses = {name: source.read() for name, source in sources.items()}
    now = time.monotonic()
    for name in needed:
      where = f'{name} at {task.address(name)}'
      if statuses[name] is not None:
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
    time.sleep(poll_secs)


def in_background(look: Callable[[], None]) -> None:
  """Run a function that watches others in a thread.

  If it raises UserError, the process exits: the main thread may be blocked in
  TensorFlow, which waits indefinitely.
  """

  def run() -> None:
    try:
      look()
    except UserError as reason:
      print(reason, file=sys.stderr, flush=True)
      os._exit(1)

  threading.Thread(target=run, daemon=True).start()


def ignore_ends_of_sessions() -> None:
  """Suppress thread errors that the main thread raises, too."""

  def ignore(failure: threading.ExceptHookArgs) -> None:
    if not issubclass(failure.exc_type, tf.errors.OpError):
      threading.__excepthook__(failure)

  tf.logging.set_verbosity(tf.logging.FATAL)  # `watch` reports missing tasks
  threading.excepthook = ignore
