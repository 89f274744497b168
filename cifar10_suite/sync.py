"""Synchronous updates with the mean gradient of several workers.

Each variable has a gradient accumulator on the same parameter server. Once it
holds the gradients of enough workers, the chief takes their mean, updates the
variable and sends the new step to all workers. Late gradients, of an earlier
step, are dropped.

`tf.train.SyncReplicasOptimizer` does the same with one queue for all workers.
There, other workers take the messages for a late worker and compute gradients
for a step that is over. With a backup worker, this wastes half of their time.
"""

from typing import TYPE_CHECKING

import tensorflow.compat.v1 as tf

from cifar10_suite.updates import Gradients

if TYPE_CHECKING:  # that module imports this one
  from cifar10_suite.cluster import Cluster, TaskName


class SyncOptimizer(tf.train.Optimizer):
  """Optimizer wrapper for synchronous updates.

  Attributes:
    begin: operation that sets a worker to the current step.
    begin_all: operation that sets the chief and the accumulators to the current
      step.
    tell: operation that sends the current step to the other workers.
    updates: queue runner of the chief, which waits for enough gradients, runs
      an update and sends the new step to all workers.
  """

  def __init__(
    self,
    optimizer: tf.train.Optimizer,
    workers: list['TaskName'],
    name: 'TaskName',
    device: str,
    gradients_per_step: int,
  ):
    """Initialize the wrapper.

    Args:
      optimizer: optimizer to wrap.
      workers: names of all workers.
      name: name of this worker.
      device: device of this worker, which holds its current step.
      gradients_per_step: number of gradients that an update waits for.
    """
    super().__init__(use_locking=False, name='Sync')
    self._optimizer = optimizer
    self._workers, self._worker = workers, name
    self._device = device
    self._gradients_per_step = gradients_per_step

  def compute_gradients(self, *args: object, **kwargs: object) -> Gradients:
    return self._optimizer.compute_gradients(*args, **kwargs)

  def apply_gradients(
    self,
    grads_and_vars: Gradients,
    global_step: tf.Variable,
    name: str | None = None,
  ) -> tf.Operation:
    """Send this worker's gradients and wait for the next step."""
    with tf.device(self._device):
      step = tf.Variable(
        0,
        trainable=False,
        collections=[tf.GraphKeys.LOCAL_VARIABLES],
        dtype=global_step.dtype.base_dtype,
        name='sync_step',
      )
    given, means, beginnings = self._accumulate(
      grads_and_vars, step, global_step
    )
    with tf.device(global_step.device):
      queues = {
        name: tf.FIFOQueue(
          -1, step.dtype.base_dtype, shapes=[()], shared_name=f'steps of {name}'
        )
        for name in self._workers
      }
      own = queues.pop(self._worker)
      update = self._optimizer.apply_gradients(means, global_step)
      with tf.control_dependencies([update]):
        new_step = global_step.read_value()
      others = [queue.enqueue(new_step) for queue in queues.values()]
      with tf.control_dependencies(others):  # last, as the chief may then exit
        tell_all = own.enqueue(new_step)
      # Queues stay open at the end, in case the chief is restarted.
      self.updates = tf.train.QueueRunner(
        own,
        [tell_all],
        close_op=tf.no_op(),
        cancel_op=tf.no_op(),
        queue_closed_exception_types=(
          tf.errors.OutOfRangeError,
          tf.errors.CancelledError,  # its session has ended
        ),
      )
      self.tell = tf.group(
        *[queue.enqueue(global_step) for queue in queues.values()]
      )
      # This order releases a lost worker's pending dequeue, and misses no step
      # that arrives in between.
      with tf.control_dependencies([own.enqueue(step.initial_value)]):
        left = own.dequeue_many(own.size())
      with tf.control_dependencies([left]):
        self.begin = tf.assign(step, global_step.read_value()).op
      self.begin_all = tf.group(self.begin, *beginnings)
      with tf.control_dependencies(given):
        # A late worker continues at the latest of the steps it missed.
        steps = own.dequeue_many(tf.maximum(own.size(), 1))
    return tf.assign(step, steps[-1]).op

  def _accumulate(
    self, grads_and_vars: Gradients, step: tf.Variable, global_step: tf.Variable
  ) -> tuple[list[tf.Operation], Gradients, list[tf.Operation]]:
    """Send gradients to accumulators next to the variables, and take means.

    Returns:
      The operations that send gradients, the (mean, variable) pairs, and the
      operations that set the accumulators to the current step.
    """
    given, means, beginnings = [], [], []
    for gradient, variable in grads_and_vars:
      if gradient is None:
        means.append((None, variable))
        continue
      with tf.device(variable.device):
        accumulator = tf.ConditionalAccumulator(
          gradient.dtype,
          variable.shape,
          shared_name=f'{variable.op.name}/gradients',
        )
        given.append(accumulator.apply_grad(gradient, step))
        mean = accumulator.take_grad(self._gradients_per_step)
        means.append((mean, variable))
        beginnings.append(accumulator.set_global_step(global_step))
    return given, means, beginnings


class SyncHook(tf.train.SessionRunHook):
  """Hook that starts a worker at the current step, and the chief's updates."""

  def __init__(self, optimizer: SyncOptimizer, cluster: 'Cluster'):
    """Initialize the hook.

    Args:
      optimizer: the worker's optimizer, after `apply_gradients`.
      cluster: the worker's cluster.
    """
    self._optimizer = optimizer
    self._cluster = cluster

  def after_create_session(
    self, session: tf.Session, coord: tf.train.Coordinator
  ) -> None:
    if not self._cluster.task.is_chief:
      session.run(self._optimizer.begin)
      return
    session.run(self._optimizer.begin_all)
    if self._cluster.has_begun:
      # The workers may wait for a step that the previous chief did not finish.
      session.run(self._optimizer.tell)
    self._optimizer.updates.create_threads(
      session, coord, daemon=True, start=True
    )
