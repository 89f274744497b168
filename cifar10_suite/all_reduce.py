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
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import tensorflow.compat.v1 as tf

from cifar10_suite.cluster import (
  FAREWELL_SECS,
  POLL_SECS,
  Cluster,
  Status,
  Task,
  TaskName,
  ignore_ends_of_sessions,
  in_background,
  start_server,
  watch,
)
from cifar10_suite.errors import UserError
from cifar10_suite.updates import Gradients

_LARGE = 1 << 18  # elements of a gradient that is not packed with others
_RECOVERY_SECS = 10  # for the loss of a worker to be noticed after an error
_SETTLE_SECS = 10  # for workers to complete an update


class AllReduce(Cluster):
  """A worker, as in `Cluster`, with variables equal to those of the others."""

  def __init__(self, task: Task, in_bfloat16: bool = False):
    """Initialize the worker.

    Args:
      task: the task of this process.
      in_bfloat16: whether to send gradients in bfloat16.
    """
    super().__init__(task)
    self.gradients_per_step = len(task.workers)
    self.initializes = True
    self.device = task.device
    self._in_bfloat16 = in_bfloat16
    self._instances = itertools.count(1)
    self._others = [name for name in task.workers if name != task.name]
    self._processes: dict[str, str] = {}
    self._silent: list[TaskName] = []
    self._has_ended = False

  def join(
    self, config: tf.ConfigProto, settings: dict[str, object], timeout_secs: int
  ) -> None:
    config.device_filters.append(self.task.name.device)
    config.experimental.collective_group_leader = self.task.workers[0].device
    self.master = start_server(self.task, config).target
    self._status = Status(self.task.name, self.master)
    self._timeout_secs = timeout_secs
    # As the others read it.
    self._processes = self._gather(json.loads(json.dumps(settings)))
    in_background(self._watch)
    ignore_ends_of_sessions()

  def _gather(self, settings: dict[str, object]) -> dict[str, str]:
    """Wait until all workers are there, and agree on who they are.

    Returns:
      The process of each worker.
    """
    process = self._status.process
    processes = {str(self.task.name): process}
    refused: dict[str, str] = {}
    self._status.publish(settings=settings, ended=False)
    for statuses in self._look(self._others):
      for name, status in statuses.items():
        if not status:
          continue
        if reason := status.get('refused', {}).get(process):
          raise UserError(f'{name} refuses {self.task.name}: {reason}')
        difference = _difference(status['settings'], settings)
        if self.task.is_chief and difference:
          if status['process'] not in refused:
            print(f'Refused {name}: {difference}')
          refused[status['process']] = difference
        else:
          processes[str(name)] = status['process']
      self._status.publish(processes=processes, refused=refused)
      if len(processes) == len(self.task.workers) and all(
        status and status.get('processes') == processes
        for status in statuses.values()
      ):
        return processes
    raise AssertionError  # `watch` does not end

  def _look(
    self, needed: list[TaskName], others: list[TaskName] | None = None
  ) -> Iterator[dict[TaskName, dict | None]]:
    return watch(self.task, needed, self._timeout_secs, others, POLL_SECS)

  def _watch(self) -> None:
    """Start over if another worker has restarted."""
    for statuses in watch(self.task, self._others, self._timeout_secs):
      if self._has_ended:
        return
      for name, status in statuses.items():
        if status and status['process'] != self._processes[str(name)]:
          _start_over(f'{name} has restarted')
      self._silent = [name for name, it in statuses.items() if not it]

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

  def recover(self) -> None:
    deadline = time.monotonic() + _RECOVERY_SECS
    while time.monotonic() < deadline:
      if self._silent:
        _start_over(f'{self._silent[0]} is lost')
      time.sleep(POLL_SECS)

  def leave(self) -> None:
    """Wait until the chief has saved the last step and all know it."""
    self._has_ended = True
    self._status.publish(ended=True)
    deadline = time.monotonic() + FAREWELL_SECS
    if self.task.is_chief:
      for statuses in self._look([], self._others):
        if not any(statuses.values()) or time.monotonic() > deadline:
          return
    chief = self.task.workers[0]
    for statuses in self._look([chief]):
      status = statuses[chief]
      if status and status['process'] != self._processes[str(chief)]:
        _start_over(f'{chief} has restarted')
      if status and status['ended']:
        return


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
    if self._has_begun:  # TensorFlow tries again after the loss of a worker
      raise tf.errors.CancelledError(None, None, 'A worker is lost.')
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
    step = tf.train.get_global_step()
    self._names = [variable.op.name for variable in variables]
    self._looks = []
    with tf.Graph().as_default() as self._graph:
      for worker in self._cluster.task.workers:
        with tf.device(f'{worker.device}/cpu:0'):
          fingerprints = [
            tf.fingerprint(tf.reshape(_on_server(variable), [1, -1]))
            for variable in variables
          ]
          look = _on_server(step), tf.concat(fingerprints, axis=0)
        self._looks.append(look)

  def before_save(self, session: tf.Session, global_step_value: int) -> None:
    workers = self._cluster.task.workers
    config = tf.ConfigProto(device_filters=[it.device for it in workers])
    deadline = time.monotonic() + _SETTLE_SECS
    with tf.Session(self._cluster.master, self._graph, config) as session:
      while True:
        steps, (expected, *others) = zip(*session.run(self._looks), strict=True)
        different = [
          (worker, name)
          for worker, prints in zip(workers[1:], others, strict=True)
          for name, one, two in zip(self._names, prints, expected, strict=True)
          if (one != two).any()
        ]
        if not different:
          return
        # A worker may still be updating its variables.
        if len(set(steps)) == 1 and time.monotonic() > deadline:
          worker, name = different[0]
          raise UserError(
            f'Training stopped at step {global_step_value}: {name} differs '
            f'between {worker} and the chief. The last checkpoint is intact.'
          )
        time.sleep(POLL_SECS)


def _on_server(variable: tf.Variable) -> tf.Tensor:
  """Return the value of a variable with the same name on the current device."""
  dtype = variable.dtype.base_dtype
  handle = tf.raw_ops.VarHandleOp(
    dtype=dtype,
    shape=variable.shape,
    shared_name=variable.handle.op.get_attr('shared_name'),
  )
  return tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)


def _start_over(reason: str) -> NoReturn:
  """Replace this process by a new one, which resumes training."""
  print(f'Starting over: {reason}.', flush=True)
  os.execv(sys.executable, [sys.executable, *sys.argv, '--norestart'])


def _difference(settings: dict, chiefs: dict) -> str | None:
  """Return in which way a worker's settings differ from the chief's."""
  for key in {**chiefs, **settings}:
    own, expected = settings.get(key), chiefs.get(key)
    if own != expected:
      return f'its {key} is {own}, that of the chief is {expected}.'
  return None
