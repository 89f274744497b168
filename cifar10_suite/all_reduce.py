"""Synchronous training by all-reduce, without parameter servers.

Each worker holds a copy of all variables. Each step averages the gradients of
all workers in a ring: of n workers, each sends 2 (n - 1) / n times the size of
the gradients, always less than twice (Patarasuk and Yuan, "Bandwidth optimal
all-reduce algorithms for clusters of workstations", 2009). All then make the
same update.

The ring breaks when a worker is lost. All others then start over: each replaces
its process with a new one, which waits for the others and resumes from the
chief's last checkpoint.
"""

import itertools
import json
import os
import sys
import time

import tensorflow.compat.v1 as tf

from cifar10_suite.cluster import POLL_SECS, Cluster, Statuses
from cifar10_suite.errors import UserError
from cifar10_suite.tf_config import Addresses, Task
from cifar10_suite.updates import Gradients

_LARGE = 1 << 18  # elements from which a gradient is sent by itself
_ATTEMPTS = 50  # to find equal variables, before a difference is an error
_COMPARE_SECS = 10  # for the workers to show their variables
_STOP_SECS = 10  # until a worker stops before the chief does
_CONNECTION_ERRORS = (
  tf.errors.AbortedError,
  tf.errors.CancelledError,
  tf.errors.DeadlineExceededError,
  tf.errors.FailedPreconditionError,
  tf.errors.InternalError,
  tf.errors.UnavailableError,
  tf.errors.UnknownError,
)


class AllReduce(Cluster):
  """Worker with the same variables as all others, and the mean gradients."""

  def __init__(
    self, task: Task, addresses: Addresses, in_bfloat16: bool = False
  ):
    """Initialize the worker.

    Args:
      task: the task of this process.
      addresses: addresses of all tasks.
      in_bfloat16: whether to send gradients in bfloat16.
    """
    super().__init__(task, addresses)
    self.device = task.device
    self.gradients_per_step = len(self.workers)
    self.initializes = True
    self._needed = self.workers
    self._in_bfloat16 = in_bfloat16
    self._instances = itertools.count(1)
    self._stop_time: float | None = None

  def join(
    self, config: tf.ConfigProto, settings: dict[str, object], timeout_secs: int
  ) -> None:
    config.device_filters.append(self.device)
    if config.inter_op_parallelism_threads:
      # One more than alone, to send gradients during the backward pass.
      config.inter_op_parallelism_threads += 1
    config.experimental.collective_group_leader = self.workers[0].device
    settings = {**settings, 'cluster': self._addresses}
    super().join(config, settings, timeout_secs)

  def _meet(self, timeout_secs: int) -> None:
    """Wait until all workers agree on which processes take part.

    The chief refuses workers whose settings differ from its own.
    """
    own = self._content['process']
    self._processes = {str(self.task): own}
    refused: dict[str, str] = {}
    for statuses in self.watch(self._needed, timeout_secs):
      for task, status in statuses.items():
        if status is None:
          continue
        if reason := status.get('refused', {}).get(own):
          raise UserError(f'{task} refuses {self.task}: {reason}')
        process, reason = status['process'], ''
        if self.is_chief:
          reason = _difference(status.get('settings', {}), self._content)
        if not reason:
          self._processes[str(task)] = process
        elif process not in refused:
          print(f'Refused {task}: {reason}')
          refused[process] = reason
      self._publish(processes=self._processes, refused=refused)
      if len(self._processes) == len(self.workers) and all(
        status and status.get('processes') == self._processes
        for status in statuses.values()
      ):
        return

  def _notice(self, statuses: Statuses) -> None:
    for task, status in statuses.items():
      if status and status['process'] != self._processes[str(task)]:
        self._start_over(f'{task} has restarted')

  def recover(self, error: tf.errors.OpError) -> None:
    if isinstance(error, _CONNECTION_ERRORS):
      self._start_over(error.message.partition('\n')[0])

  def _start_over(self, reason: str) -> None:
    """Replace this process with a new one, unless it is to stop."""
    if self.signals:
      return
    print(f'Starting over: {reason}.', flush=True)
    arguments = [it for it in sys.argv if it != '--norestart']
    os.execv(sys.executable, [sys.executable, *arguments, '--norestart'])

  def stops(self) -> bool:
    """Return whether to stop; workers let the chief stop and save first."""
    if not self.signals or self.is_chief:
      return bool(self.signals)
    self._stop_time = self._stop_time or time.monotonic() + _STOP_SECS
    return time.monotonic() > self._stop_time

  def average(self, gradients: Gradients) -> Gradients:
    """Return the mean gradients of all workers.

    Small gradients are packed into one buffer. Large ones are sent as soon as
    they are computed, while the backward pass continues.
    """
    with tf.device(f'{self.device}/cpu:0'), tf.name_scope('all_reduce'):
      means: list[tf.Tensor | None] = [None] * len(gradients)
      small = []
      for k, (gradient, _) in enumerate(gradients):
        if gradient is None:
          continue
        if gradient.shape.num_elements() >= _LARGE:
          means[k] = self._mean(gradient)
        else:
          small.append((k, gradient))
      packed = tf.concat([tf.reshape(it, [-1]) for _, it in small], axis=0)
      parts = tf.split(
        self._mean(packed), [it.shape.num_elements() for _, it in small]
      )
      for (k, gradient), part in zip(small, parts, strict=True):
        means[k] = tf.reshape(part, gradient.shape)
    return [(m, v) for m, (_, v) in zip(means, gradients, strict=True)]

  def _mean(self, value: tf.Tensor) -> tf.Tensor:
    sent = tf.cast(value, tf.bfloat16) if self._in_bfloat16 else value
    return tf.cast(self._all_reduce(sent, 'Div'), value.dtype)

  def _all_reduce(self, value: tf.Tensor, final_op: str) -> tf.Tensor:
    """Return the sum ('Id') or the mean ('Div') of the workers' values."""
    return tf.raw_ops.CollectiveReduce(
      input=value,
      group_size=len(self.workers),
      group_key=1,
      instance_key=next(self._instances),
      merge_op='Add',
      final_op=final_op,
      subdiv_offsets=[0, 0],  # two halves: one is sent while one is added
      communication_hint='ring',
    )

  def broadcast(self) -> tf.Operation:
    """Return an operation that sets all variables to the chief's values.

    These are the sums if all other workers send zeros.
    """
    operations = []
    with tf.device(f'{self.device}/cpu:0'), tf.name_scope('broadcast'):
      for variable in tf.global_variables():
        value = variable.read_value()
        sent = value if self.is_chief else tf.zeros_like(value)
        operations.append(variable.assign(self._all_reduce(sent, 'Id')))
    return tf.group(*operations)

  def hooks(self) -> list[tf.train.SessionRunHook]:
    return [_BroadcastVariables(self)]

  def listeners(self) -> list[tf.train.CheckpointSaverListener]:
    return [_CompareVariables(self)]


class _BroadcastVariables(tf.train.SessionRunHook):
  """Hook that initializes all workers with the chief's variables."""

  def __init__(self, cluster: AllReduce):
    self._cluster = cluster
    self._has_begun = False

  def begin(self) -> None:
    self._broadcast = self._cluster.broadcast()

  def after_create_session(
    self, session: tf.Session, coord: tf.train.Coordinator
  ) -> None:
    if self._has_begun:  # TensorFlow has replaced a session that failed
      raise tf.errors.CancelledError(None, None, 'Lost contact with a worker')
    self._has_begun = True
    session.run(self._broadcast)


class _CompareVariables(tf.train.CheckpointSaverListener):
  """Listener that prevents a save unless all workers have the same variables.

  The chief reads fingerprints of the variables from the workers' servers, while
  the workers wait for its next gradients.
  """

  def __init__(self, cluster: AllReduce):
    self._cluster = cluster

  def begin(self) -> None:
    variables = tf.global_variables()
    with tf.Graph().as_default() as self._graph:
      self._fingerprints = [
        tf.concat([_fingerprint(it, worker) for it in variables], axis=0)
        for worker in self._cluster.workers
      ]

  def before_save(self, session: tf.Session, global_step_value: int) -> None:
    config = tf.ConfigProto(operation_timeout_in_ms=1000 * _COMPARE_SECS)
    with tf.Session(self._cluster.master, self._graph, config) as remote:
      for _ in range(_ATTEMPTS):
        try:
          all_prints = remote.run(self._fingerprints)
        except tf.errors.OpError:
          return  # a worker is lost, and this save keeps what is there
        differ = [(prints != all_prints[0]).any() for prints in all_prints]
        if not any(differ):
          return
        time.sleep(POLL_SECS)  # a worker may still be updating its variables
    chief, *_ = self._cluster.workers
    different = self._cluster.workers[differ.index(True)]
    raise UserError(
      f'Training stopped at step {global_step_value}: the variables of '
      f'{different} differ from those of {chief}. Check the memory of that '
      'machine, or use machines of one type. The same command resumes from the '
      'last checkpoint.'
    )


def _fingerprint(variable: tf.Variable, worker: Task) -> tf.Tensor:
  """Return the fingerprint of a worker's variable, uint8 [1, 8]."""
  device = tf.DeviceSpec.from_string(variable.device)
  dtype = variable.dtype.base_dtype
  with tf.device(device.replace(job=worker.kind, task=worker.index)):
    handle = tf.raw_ops.VarHandleOp(
      dtype=dtype,
      shape=variable.shape,
      shared_name=variable.handle.op.get_attr('shared_name'),
    )
    value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)
    return tf.fingerprint(tf.reshape(value, [1, -1]))


def _difference(settings: dict, own: dict) -> str:
  """Describe the first difference from this task's settings, or return ''."""
  expected = json.loads(json.dumps(own['settings']))  # as others decode them
  for key in {**expected, **settings}:
    if settings.get(key) != expected.get(key):
      return (
        f'{key} is {settings.get(key)}, not {expected.get(key)}. Start all '
        'workers with the same version, flags and data set.'
      )
  return ''
