"""Synchronous training by all-reduce, without parameter servers.

Each worker holds a copy of all variables. Each step averages the gradients of
all workers in a ring: of n workers, each sends 2 (n - 1) / n times the size of
the gradients, always less than twice (Patarasuk and Yuan, "Bandwidth optimal
all-reduce algorithms for clusters of workstations", 2009). All then make the
same update.

The ring breaks when a worker is lost. All others then start over: each replaces
its process with a new one, which waits for the others and resumes from the
chief's last checkpoint. An error that may have another reason ends a task if it
repeats at the same step.
"""

import collections
import itertools
import os
import sys
import time

import tensorflow.compat.v1 as tf

from cifar10_suite.cluster import MEASURED, Cluster
from cifar10_suite.commands import same_command
from cifar10_suite.errors import UserError, first_line
from cifar10_suite.tf_config import Addresses, Task
from cifar10_suite.updates import Gradients

_LARGE = 1 << 18  # elements from which a gradient is sent by itself
_STOP_SECS = 10  # after a signal, for the chief to stop first
_RESTARTS = 'CIFAR10_RESTARTS'  # environment variable: '<step>:<count>'
_MAX_RESTARTS = 10  # because of errors at the same step, if they may repeat
_LOST_WORKER = (
  tf.errors.AbortedError,
  tf.errors.CancelledError,
  tf.errors.DeadlineExceededError,
  tf.errors.UnavailableError,
)
_MAY_BE_LOST_WORKER = (
  tf.errors.FailedPreconditionError,
  tf.errors.InternalError,
  tf.errors.UnknownError,
)


class AllReduce(Cluster):
  """Worker with the same variables as all others, and the mean gradients."""

  def __init__(self, task: Task, addresses: Addresses, bfloat16: bool = False):
    """Initialize the worker.

    Args:
      task: the task of this process.
      addresses: addresses of all tasks.
      bfloat16: whether to send gradients in bfloat16.
    """
    super().__init__(task, addresses)
    self.device = task.device
    self._bfloat16 = bfloat16
    self._instances = itertools.count(1)
    self._processes: dict[str, str] = {}
    self._has_begun = False
    self._stop_time: float | None = None

  def join(
    self, config: tf.ConfigProto, settings: dict[str, object], timeout_secs: int
  ) -> None:
    if config.inter_op_parallelism_threads:
      # One more than alone, to send gradients during the backward pass.
      config.inter_op_parallelism_threads += 1
    config.experimental.collective_group_leader = self.workers[0].device
    super().join(config, settings, timeout_secs)

  def _has_met(self) -> bool:
    """Return whether all workers agree on which processes take part.

    The chief refuses workers whose settings differ from its own.
    """
    own = self._content['process']
    processes = self._content.setdefault('processes', {str(self.task): own})
    refused = self._content.setdefault('refused', {})
    present = {task: it for task, it in self.statuses.items() if it}
    for task, status in present.items():
      if reason := status.get('refused', {}).get(own):
        raise UserError(f'{task} refuses {self.task}: {reason}')
      process = status['process']
      difference = _difference(status['settings'], self._content['settings'])
      if not self.is_chief or not difference:
        processes[str(task)] = process
      elif process not in refused:
        print(f'Refused {task}: {difference}')
        refused[process] = difference
    self.publish()
    agree = [it.get('processes') == processes for it in present.values()]
    if sum(agree) == len(self.workers) - 1:
      self._processes = processes
    return bool(self._processes)

  def _report(self) -> None:
    super()._report()
    for task, status in self.statuses.items():
      known = self._processes.get(str(task))
      if status and known and status['process'] != known:
        self._start_over(f'{task} has restarted')

  def recover(self, error: tf.errors.OpError, step: int) -> None:
    if isinstance(error, _MAY_BE_LOST_WORKER):
      last, _, count = os.environ.get(_RESTARTS, '').partition(':')
      restarts = int(count) if last == str(step) else 0
      if restarts == _MAX_RESTARTS:
        print(f'Started over {restarts} times at step {step} without progress.')
        return
      os.environ[_RESTARTS] = f'{step}:{restarts + 1}'
    elif not isinstance(error, _LOST_WORKER):
      return
    self._start_over(f'{type(error).__name__}: {first_line(error.message)}')

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

    Small gradients are packed into one buffer, together with a fingerprint of
    the variables. Large ones are sent as soon as they are computed, while the
    backward pass continues.
    """
    with tf.device(f'{self.device}/cpu:0'), tf.name_scope('all_reduce'):
      # A row for each worker; the others add zeros to it.
      row = tf.one_hot(self.number, len(self.workers))[:, tf.newaxis]
      prints = row * _fingerprint([variable for _, variable in gradients])
      values = [prints, *(gradient for gradient, _ in gradients)]
      means: list[tf.Tensor | None] = [None] * len(values)
      small = []
      with tf.control_dependencies([prints]):  # before the variables change
        for k, value in enumerate(values):
          if value is None:
            continue
          if value.shape.num_elements() >= _LARGE:
            means[k] = self._mean(value)
          else:
            small.append(k)
        packed = tf.concat([tf.reshape(values[k], [-1]) for k in small], axis=0)
        sizes = [values[k].shape.num_elements() for k in small]
        parts = tf.split(self._mean(packed), sizes)
      for k, part in zip(small, parts, strict=True):
        means[k] = tf.reshape(part, values[k].shape)
    self._fingerprints, *means = means
    return [(m, v) for m, (_, v) in zip(means, gradients, strict=True)]

  def _mean(self, value: tf.Tensor) -> tf.Tensor:
    sent = tf.cast(value, tf.bfloat16) if self._bfloat16 else value
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

  def begin(self) -> None:
    """Prepare the start of all workers with the chief's variables.

    These are the sums if all other workers send zeros.
    """
    operations = []
    with tf.device(f'{self.device}/cpu:0'), tf.name_scope('broadcast'):
      for variable in tf.global_variables():
        value = variable.read_value()
        sent = value if self.is_chief else tf.zeros_like(value)
        operations.append(variable.assign(self._all_reduce(sent, 'Id')))
    self._broadcast = tf.group(*operations)

  def after_create_session(
    self, session: tf.Session, coord: tf.train.Coordinator
  ) -> None:
    if self._has_begun:  # TensorFlow has replaced a session that failed
      raise tf.errors.CancelledError(None, None, 'Lost contact with a worker')
    self._has_begun = True
    session.run(self._broadcast)

  def before_run(
    self, run_context: tf.train.SessionRunContext
  ) -> tf.train.SessionRunArgs:
    return tf.train.SessionRunArgs(self._fingerprints)

  def after_run(
    self,
    run_context: tf.train.SessionRunContext,
    run_values: tf.train.SessionRunValues,
  ) -> None:
    """Compare the variables before this step.

    Raises:
      UserError: if they are not the same on all workers. It names those outside
        the majority, or all workers if there is no majority.
    """
    prints = [tuple(row) for row in run_values.results]
    (most, count), *rest = collections.Counter(prints).most_common()
    if not rest:
      return
    has_majority = count > len(prints) / 2
    names = [
      str(worker)
      for worker, row in zip(self.workers, prints, strict=True)
      if row != most or not has_majority
    ]
    others = ' from those of the others' if has_majority else ''
    machine = 'that machine' if len(names) == 1 else 'these machines'
    raise UserError(
      f'Training stopped: the variables of {" and ".join(names)} differ'
      f'{others}. Check the memory of {machine}, or use machines of one type. '
      f'{same_command().capitalize()} resumes from the last save.'
    )


def _fingerprint(variables: list[tf.Variable]) -> tf.Tensor:
  """Return a fingerprint of variables, float32 [8].

  The numbers are whole, from 0 to 255, so that bfloat16 can represent them.
  """
  prints = [tf.fingerprint(tf.reshape(it, [1, -1])) for it in variables]
  return tf.cast(tf.fingerprint(tf.reshape(prints, [1, -1]))[0], tf.float32)


def _difference(settings: dict, own: dict) -> str:
  """Describe the first difference from this task's settings, or return ''."""
  for key in {**own, **settings}:
    if settings.get(key) != own.get(key):
      remedy = 'Start all workers with the same version, flags and data set.'
      if key in MEASURED:
        remedy = (
          'Each worker measures what is faster. Start all with --nouse_bf16.'
        )
      there, here = settings.get(key, 'missing'), own.get(key, 'missing')
      return f'{key} is {there}, not {here}. {remedy}'
  return ''
