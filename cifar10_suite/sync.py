"""Synchronous updates: one with the mean of several workers' gradients.

Each variable has an accumulator of gradients beside it, on its parameter
server. When it holds those of enough workers, the chief takes their mean,
updates, and tells all workers the new step. A gradient that comes later, of a
step that is over, is dropped.

`tf.train.SyncReplicasOptimizer` does the same with one queue for all workers.
There, what is meant for a late one is taken by the others, who then compute
gradients of a step that is over: with a backup worker, half of their time.
"""

from typing import TYPE_CHECKING

import tensorflow.compat.v1 as tf

from cifar10_suite.updates import Gradients

if TYPE_CHECKING:  # that module imports this one
  from cifar10_suite.cluster import Cluster, TaskName


class SyncOptimizer(tf.train.Optimizer):
  """Lets another optimizer update once with several workers' gradients.

  Attributes:
    begin: the operation with which a worker enters the present step.
    begin_all: the one with which the chief does, and the accumulators.
    tell: tells the other workers to go on at the present step.
    updates: the chief's queue runner: it waits for enough gradients, updates
      once, and tells all workers the new step.
  """

  def __init__(
    self,
    optimizer: tf.train.Optimizer,
    workers: list['TaskName'],
    name: 'TaskName',
    device: str,
    gradients_per_step: int,
  ):
    """Describes the workers.

    Args:
      optimizer: the one that updates.
      workers: the names of all.
      name: this worker's.
      device: this worker's, for the step at which it is.
      gradients_per_step: how many an update waits for.
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
    """Gives this worker's gradients, and waits for the next step."""
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
      with tf.control_dependencies(others):  # this one last: it may then end
        tell_all = own.enqueue(new_step)
      # Queues stay open at the end, for a chief that is started again.
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
      # In this order: one that vanished and still waits here goes away, and a
      # step that comes in between is not missed.
      with tf.control_dependencies([own.enqueue(step.initial_value)]):
        left = own.dequeue_many(own.size())
      with tf.control_dependencies([left]):
        self.begin = tf.assign(step, global_step.read_value()).op
      self.begin_all = tf.group(self.begin, *beginnings)
      with tf.control_dependencies(given):
        # A worker that was late goes on at the newest of the steps it missed.
        steps = own.dequeue_many(tf.maximum(own.size(), 1))
    return tf.assign(step, steps[-1]).op

  def _accumulate(
    self, grads_and_vars: Gradients, step: tf.Variable, global_step: tf.Variable
  ) -> tuple[list[tf.Operation], Gradients, list[tf.Operation]]:
    """Gives gradients to accumulators beside the variables, and takes means.

    Returns:
      The operations that give; (mean, variable) pairs; the operations that set
      the accumulators to the present step.
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
  """Lets a worker begin at the present step; the chief, update for all."""

  def __init__(self, optimizer: SyncOptimizer, cluster: 'Cluster'):
    """Takes a worker's optimizer, after `apply_gradients`, and its cluster."""
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
      # The others may wait for a step that the last chief did not finish.
      session.run(self._optimizer.tell)
    self._optimizer.updates.create_threads(
      session, coord, daemon=True, start=True
    )
