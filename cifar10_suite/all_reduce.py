"""Synchronous training by all-reduce, without parameter servers.

Each worker has all variables. Each step averages the gradients of all workers
in a ring: whatever the number of workers n, each sends 2 (n - 1) / n times the
size of the gradients (Patarasuk and Yuan, "Bandwidth optimal all-reduce
algorithms for clusters of workstations", 2009). All then make the same update.

The ring breaks when a worker is lost. Then all others start over: each replaces
its process by a new one, which waits for the others and resumes from the
chief's last checkpoint.
"""

import itertools
import os
import sys
import time
from typing import NoReturn

import tensorflow.compat.v1 as tf

from cifar10_suite.cluster import POLL_SECS, Cluster, Statuses, Task, watch
from cifar10_suite.errors import UserError
from cifar10_suite.updates import Gradients

_LARGE = 1 << 18  # elements of a gradient that is not packed with others
_LOOKS = 50  # at the variables of other workers while they differ
_ERRORS_OF_CONNECTIONS = (
  tf.errors.AbortedError,
  tf.errors.CancelledError,
  tf.errors.DeadlineExceededError,
  tf.errors.FailedPreconditionError,
  tf.errors.InternalError,
  tf.errors.UnavailableError,
  tf.errors.UnknownError,
)


class AllReduce(Cluster):
  """A worker, as in `Cluster`, with variables equal to those of the others."""

  def __init__(self, task: Task, in_bfloat16: bool = False):
    """Initialize the worker.

    Args:
      task: the task of this process.
      in_bfloat16: whether to send gradients in bfloat16.
    """
    super().__init__(task)
    self.device = task.device
    self.gradients_per_step = len(task.workers)
    self.initializes = True
    self._needed = task.workers
    self._in_bfloat16 = in_bfloat16
    self._instances = itertools.count(1)

  def join(
    self, config: tf.ConfigProto, settings: dict[str, object], timeout_secs: int
  ) -> None:
    config.device_filters.append(self.device)
    config.experimental.collective_group_leader = self.task.workers[0].device
    super().join(config, settings, timeout_secs)

  def _meet(self, timeout_secs: int) -> None:
    """Wait until all workers are there and know each other's processes.

    The chief refuses workers whose settings differ from its own.
    """
    own = self._status.process
    self._processes = {str(self.task.name): own}
    refused: dict[str, str] = {}
    for statuses in watch(self.task, self._needed, timeout_secs):
      for name, status in statuses.items():
        if status is None:
          continue
        if reason := status.get('refused', {}).get(own):
          raise UserError(f'{name} refuses {self.task.name}: {reason}')
        process = status['process']
        reason = self._status.difference(status) if self.task.is_chief else ''
        if not reason:
          self._processes[str(name)] = process
        elif process not in refused:
          print(f'Refused {name}: {reason}')
          refused[process] = reason
      self._status.publish(processes=self._processes, refused=refused)
      if len(self._processes) == len(self.task.workers) and all(
        status and status.get('processes') == self._processes
        for status in statuses.values()
      ):
        return

  def _notice(self, statuses: Statuses) -> None:
    for name, status in statuses.items():
      if status and status['process'] != self._processes[str(name)]:
        start_over(f'{name} has restarted')

  def recover(self, error: tf.errors.OpError) -> None:
    if isinstance(error, _ERRORS_OF_CONNECTIONS):
      start_over('the connection to another worker is lost')

  def average(self, gradients: Gradients) -> Gradients:
    """Return the mean gradients of all workers.

    Small gradients share one buffer. Those of the large matrices are sent at
    once, during the rest of the backward pass.
    """
    with tf.device(f'{self.device}/cpu:0'), tf.name_scope('all_reduce'):
      means = {
        k: self._mean(gradient)
        for k, (gradient, _) in enumerate(gradients)
        if gradient is not None and gradient.shape.num_elements() >= _LARGE
      }
      small = {
        k: gradient
        for k, (gradient, _) in enumerate(gradients)
        if gradient is not None and k not in means
      }
      packed = tf.concat([tf.reshape(it, [-1]) for it in small.values()], 0)
      sizes = [gradient.shape.num_elements() for gradient in small.values()]
      parts = tf.split(self._mean(packed), sizes)
      for (k, gradient), part in zip(small.items(), parts, strict=True):
        means[k] = tf.reshape(part, gradient.shape)
    return [(means.get(k), v) for k, (_, v) in enumerate(gradients)]

  def _mean(self, value: tf.Tensor) -> tf.Tensor:
    sent = tf.cast(value, tf.bfloat16) if self._in_bfloat16 else value
    mean = tf.raw_ops.CollectiveReduce(
      input=sent,
      merge_op='Add',
      final_op='Div',
      subdiv_offsets=[0],
      communication_hint='ring',
      **self._collective(),
    )
    return tf.cast(mean, value.dtype)

  def _collective(self) -> dict[str, int]:
    """Return the arguments that identify a collective operation."""
    return {
      'group_size': len(self.task.workers),
      'group_key': 1,
      'instance_key': next(self._instances),
    }

  def broadcast(self) -> tf.Operation:
    """Return an operation that sets all variables to the chief's values."""
    operations = []
    with tf.device(f'{self.device}/cpu:0'), tf.name_scope('broadcast'):
      for variable in tf.global_variables():
        shape = variable.shape
        if self.task.is_chief:
          operation = tf.raw_ops.CollectiveBcastSend(
            input=variable.read_value(), shape=shape, **self._collective()
          )
        else:
          value = tf.raw_ops.CollectiveBcastRecv(
            T=variable.dtype.base_dtype, shape=shape, **self._collective()
          )
          operation = variable.assign(value)
        operations.append(operation)
    return tf.group(*operations)

  def hooks(self) -> list[tf.train.SessionRunHook]:
    return [_StartAlike(self)]

  def listeners(self) -> list[tf.train.CheckpointSaverListener]:
    return [_CompareVariables(self)]


class _StartAlike(tf.train.SessionRunHook):
  """Hook that gives all workers the variables of the chief."""

  def __init__(self, cluster: AllReduce):
    self._cluster = cluster
    self._has_begun = False

  def begin(self) -> None:
    self._broadcast = self._cluster.broadcast()

  def after_create_session(
    self, session: tf.Session, coord: tf.train.Coordinator
  ) -> None:
    if self._has_begun:  # TensorFlow has replaced a session that failed
      start_over('the connection to another worker is lost')
    self._has_begun = True
    session.run(self._broadcast)


class _CompareVariables(tf.train.CheckpointSaverListener):
  """Listener that saves only if all workers have the same variables.

  The chief reads fingerprints of the variables from the workers' servers, while
  the workers wait for its next gradients.
  """

  def __init__(self, cluster: AllReduce):
    self._cluster = cluster

  def begin(self) -> None:
    variables = tf.global_variables()
    self._prints = []
    with tf.Graph().as_default() as self._graph:
      for worker in self._cluster.task.workers:
        with tf.device(worker.device):
          prints = [
            tf.fingerprint(tf.reshape(_on_server(variable), [1, -1]))
            for variable in variables
          ]
          self._prints.append(tf.concat(prints, axis=0))

  def before_save(self, session: tf.Session, global_step_value: int) -> None:
    chief, *workers = self._cluster.task.workers
    filters = [name.device for name in [chief, *workers]]
    config = tf.ConfigProto(device_filters=filters)
    with tf.Session(self._cluster.master, self._graph, config) as remote:
      for _ in range(_LOOKS):
        expected, *others = remote.run(self._prints)
        different = [
          worker
          for worker, prints in zip(workers, others, strict=True)
          if (prints != expected).any()
        ]
        if not different:
          return
        time.sleep(POLL_SECS)  # a worker may still be updating its variables
    raise UserError(
      f'Training stopped at step {global_step_value}: the variables of '
      f'{different[0]} differ from those of {chief}. The last checkpoint is '
      'intact.'
    )


def _on_server(variable: tf.Variable) -> tf.Tensor:
  """Return the value of a variable with the same name on the current device."""
  dtype = variable.dtype.base_dtype
  handle = tf.raw_ops.VarHandleOp(
    dtype=dtype,
    shape=variable.shape,
    shared_name=variable.handle.op.get_attr('shared_name'),
  )
  return tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)


def start_over(reason: str) -> NoReturn:
  """Replace this process by a new one, which resumes training."""
  print(f'Starting over: {reason}.', flush=True)
  os.execv(sys.executable, [sys.executable, *sys.argv, '--norestart'])
