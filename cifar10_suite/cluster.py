"""Distributed training on TensorFlow's own runtime.

Each machine runs the same program. The environment variable TF_CONFIG, which
training operators set, specifies all addresses and the task of this machine:

  {"cluster": {"ps": ["a:2222"], "chief": ["b:2222"], "worker": ["c:2222"]},
   "task": {"type": "worker", "index": 0}}

Parameter servers ("ps") hold the variables. The chief and the workers each have
a copy of the network and an input pipeline, and send gradients. The chief also
restores, saves and writes summaries. An "evaluator" scores the chief's
checkpoints. Without a chief, the first worker takes its role. Without
TF_CONFIG, a program runs alone.
"""

import dataclasses
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import tensorflow.compat.v1 as tf

from cifar10_suite.errors import UserError
from cifar10_suite.sync import SyncHook, SyncOptimizer

_TYPES = ('chief', 'worker', 'ps', 'evaluator')
_POLL_SECS = 1
_SILENCE_SECS = 5  # until an unresponsive task is reported
_FAREWELL_SECS = 15  # grace period for unresponsive tasks at the end


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
  elif not addresses.get('ps'):
    problem = 'it has no "ps", the servers that hold the variables'
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
  """Cluster as seen by a worker; without a cluster, it has no effect.

  Attributes:
    task: the task of this process.
    gradients_per_step: number of workers whose gradients a step averages.
    master: target of the session; '' for this process.
    has_begun: whether variables existed before this worker's session.
  """

  def __init__(self, task: Task, sync: bool = True, backup_workers: int = 0):
    """Initialize the cluster; `join` connects to it.

    Args:
      task: the task of this process, a worker or the chief.
      sync: whether a step averages the gradients of several workers.
      backup_workers: number of slowest workers that a step may ignore.
    """
    self.task = task
    self.gradients_per_step = len(task.workers) - backup_workers if sync else 1
    self._is_sync = sync and not task.is_alone
    self._synchronizer: SyncOptimizer | None = None
    self.master = ''
    self.has_begun = False

  def join(self, config: tf.ConfigProto, timeout_secs: float) -> None:
    """Start this worker's server and monitor the tasks that it needs.

    Args:
      config: session configuration; its device filters are set to exclude the
        devices of other workers.
      timeout_secs: seconds without response after which to give up on a task.
    """
    if self.task.is_alone:
      return
    self.master = start_server(self.task, config).target
    config.device_filters.extend(['/job:ps', self.device])
    keep_watch(self, timeout_secs)
    tf.logging.set_verbosity(tf.logging.FATAL)  # `watch` reports missing tasks
    threading.excepthook = _ignore_ends_of_sessions

  def device_setter(self) -> Callable[[tf.Operation], str] | None:
    """Return a device function that places variables on parameter servers."""
    if self.task.is_alone:
      return None
    return tf.train.replica_device_setter(
      worker_device=self.device,
      cluster=tf.train.ClusterSpec(self.task.addresses),
      ps_strategy=balanced(len(self.task.servers)),
    )

  @property
  def device(self) -> str | None:
    """TensorFlow device name of this machine; None without a cluster."""
    if self.task.is_alone:
      return None
    return _device(self.task.name)

  def scaffold(
    self, config: tf.ConfigProto, **parts: object
  ) -> tf.train.Scaffold:
    """Return a scaffold for this worker's session.

    Args:
      config: configuration of the session.
      **parts: arguments of the scaffold.
    """
    if self.task.is_alone:
      return tf.train.Scaffold(**parts)
    return _Scaffold(self, config, parts)

  def synchronized(self, optimizer: tf.train.Optimizer) -> tf.train.Optimizer:
    """Wrap an optimizer for synchronous updates, if they are enabled."""
    if not self._is_sync:
      return optimizer
    self._synchronizer = SyncOptimizer(
      optimizer,
      self.task.workers,
      self.task.name,
      _device(self.task.name),
      self.gradients_per_step,
    )
    return self._synchronizer

  def hooks(self) -> list[tf.train.SessionRunHook]:
    """Return the hooks for this worker's session."""
    if self._synchronizer is None:
      return []
    return [SyncHook(self._synchronizer, self)]

  def needed(self) -> list[TaskName]:
    """Return the names of the tasks that this one cannot continue without."""
    task = self.task
    needs_all = self.gradients_per_step == len(task.workers)
    workers = task.workers if needs_all else task.workers[:1]
    return [name for name in task.servers + workers if name != task.name]

  def leave(self) -> None:
    """Notify the parameter servers that this worker has finished."""
    if self.task.is_alone:
      return
    for name in self.task.servers:
      config = tf.ConfigProto(
        device_filters=[_device(name), self.device],
        operation_timeout_in_ms=1000 * _FAREWELL_SECS,
      )
      with tf.Graph().as_default():
        ended = _ended_queue(name).enqueue(str(self.task.name))
        try:
          with tf.Session(self.master, config=config) as session:
            session.run(ended)
        except tf.errors.OpError:
          print(f'Cannot notify {name} of the end of training.')


ALONE = Cluster(Task())


class _Scaffold(tf.train.Scaffold):
  """Scaffold that waits for parameter servers and variables.

  TensorFlow finalizes it for each session: the first one and those created
  after the loss of a server.
  """

  def __init__(
    self, cluster: Cluster, config: tf.ConfigProto, parts: dict[str, object]
  ):
    super().__init__(**parts)
    self._cluster = cluster
    self._session_config = config

  def finalize(self) -> tf.train.Scaffold:
    super().finalize()
    missing = self._missing_variables()
    self._cluster.has_begun = missing < len(tf.global_variables())
    while missing and not self._cluster.task.is_chief:
      time.sleep(_POLL_SECS)  # TensorFlow would check only every 30 s
      missing = self._missing_variables()
    return self

  def _missing_variables(self) -> int:
    """Return the number of uninitialized variables, once servers respond."""
    while True:
      try:
        with tf.Session(
          self._cluster.master, config=self._session_config
        ) as session:
          return session.run(self.ready_for_local_init_op).size
      except tf.errors.OpError:  # a server is down, which `watch` reports
        time.sleep(_POLL_SECS)


def _ignore_ends_of_sessions(failure: threading.ExceptHookArgs) -> None:
  """Suppress thread errors that the main thread raises, too."""
  if not issubclass(failure.exc_type, tf.errors.OpError):
    threading.__excepthook__(failure)


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


def balanced(count: int) -> Callable[[tf.Operation], int]:
  """Return a strategy that places variables on the server with the least data.

  Args:
    count: number of parameter servers.
  """
  loads = [0] * count

  def choose(op: tf.Operation) -> int:
    shape = tf.TensorShape(op.get_attr('shape'))
    server = loads.index(min(loads))
    loads[server] += shape.num_elements() * op.get_attr('dtype').size
    return server

  return choose


def serve(task: Task, timeout_secs: float) -> None:
  """Run a parameter server until the chief and the workers have finished.

  After the chief has finished, the server waits for the workers for at most
  `timeout_secs`, and gives up earlier if none of them has responded for
  `_FAREWELL_SECS`. It then stays until they have exited, for at most
  `_FAREWELL_SECS`, so that the last one still gets its response.

  Raises:
    UserError: if the chief has not responded for `timeout_secs`.
  """
  server = start_server(task, tf.ConfigProto())
  chief = task.workers[0]
  config = tf.ConfigProto(device_filters=[_device(task.name)])
  watched = watch(task, [chief], timeout_secs)
  missing = set(task.workers)
  with tf.Graph().as_default():
    ended = _ended_queue(task.name)
    # `dequeue` with a timeout may lose the element it has taken.
    names = ended.dequeue_many(ended.size())
    with tf.Session(server.target, config=config) as session:
      while missing:
        now = time.monotonic()
        if chief in missing:
          next(watched)
          seen, deadline = now, now + timeout_secs
        elif _any_answers(task, missing):
          seen = now
        if now > min(seen + _FAREWELL_SECS, deadline):
          break
        time.sleep(_POLL_SECS)
        heard = {name.decode() for name in session.run(names)}
        missing = {name for name in missing if str(name) not in heard}
  deadline = time.monotonic() + _FAREWELL_SECS
  while _any_answers(task, task.workers) and time.monotonic() < deadline:
    time.sleep(_POLL_SECS)
  print('Training has ended.')


def watch(
  task: Task, names: list[TaskName], timeout_secs: float
) -> Iterator[None]:
  """Check at each `next` which tasks respond, and report changes.

  Args:
    task: the task of this process.
    names: names of the tasks to check.
    timeout_secs: seconds without response after which to give up on a task.

  Raises:
    UserError: if a task has not responded for longer.
  """
  since = {name: time.monotonic() for name in names}
  missed: set[TaskName] = set()
  while True:
    for name in names:
      now, where = time.monotonic(), f'{name} at {task.address(name)}'
      if _answers(task.address(name)):
        since[name] = now
        if name in missed:
          missed.remove(name)
          print(f'Found {where}.')
      elif now - since[name] > timeout_secs:
        raise UserError(
          f'{where} has not answered for {timeout_secs:g} s: {task.name} gives '
          'up. After a restart, training resumes from its last checkpoint.'
        )
      elif now - since[name] > _SILENCE_SECS and name not in missed:
        missed.add(name)
        print(f'Waiting for {where}.')
    yield


def keep_watch(cluster: Cluster, timeout_secs: float) -> None:
  """Monitor the tasks that a worker needs, in a background thread.

  TensorFlow waits for them indefinitely. Therefore, the process exits if a task
  has not responded for `timeout_secs`.
  """

  def look() -> None:
    try:
      for _ in watch(cluster.task, cluster.needed(), timeout_secs):
        time.sleep(_POLL_SECS)
    except UserError as reason:
      print(reason, file=sys.stderr, flush=True)
      os._exit(1)  # the main thread is blocked in TensorFlow

  threading.Thread(target=look, daemon=True).start()


def _answers(address: str) -> bool:
  host, _, port = address.rpartition(':')
  try:
    socket.create_connection((host, int(port)), timeout=_POLL_SECS).close()
    return True
  except OSError:
    return False


def _any_answers(task: Task, names: Iterable[TaskName]) -> bool:
  return any(_answers(task.address(name)) for name in names)


def _device(name: TaskName) -> str:
  """Return the TensorFlow device name of a task's machine."""
  return f'/job:{name.kind}/task:{name.index}'


def _ended_queue(server: TaskName) -> tf.QueueBase:
  """Return the queue on a server that collects names of finished workers."""
  with tf.device(f'{_device(server)}/cpu:0'):
    return tf.FIFOQueue(-1, tf.string, shapes=[()], shared_name='ended')
