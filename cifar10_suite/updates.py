"""Updates of the variables with the gradients of one or more towers.

A tower is one of several copies of the network in a graph, each on a separate
device. Towers share all variables. A network that is not built in the name
scope of a tower counts as a single copy.
"""

import contextlib
import re
from collections.abc import Callable

import tensorflow.compat.v1 as tf

from cifar10_suite import precision, summaries

# With several towers, the operations of tower k are named 'tower_<k>/...'. Tags
# of summaries omit this prefix.
TOWER_NAME = 'tower'

Gradients = list[tuple[tf.Tensor | None, tf.Variable]]


def update(
  optimizer: tf.train.Optimizer,
  total_losses: list[tf.Tensor],
  global_step: tf.Variable,
  average_over_workers: Callable[[Gradients], Gradients],
) -> tuple[tf.Tensor, tf.Operation]:
  """Build one step of training.

  With several towers, the gradients of each are computed on the device of its
  loss, and averaged on the CPU, where the variables are.

  Args:
    optimizer: updates the variables and their moving averages.
    total_losses: one float32 [] per tower, from `cifar10.loss`.
    global_step: integer [], incremented by each step.
    average_over_workers: returns the mean gradients of all workers of a
      cluster, as (gradient, variable) pairs.

  Returns:
    loss: float32 [], the mean of the towers' total losses.
    train_op: the operation that runs the step.
  """
  in_towers = _tower_in(total_losses[0].op.name) != ''
  if in_towers:
    towers = []
    for total_loss in total_losses:
      scope = _tower_in(total_loss.op.name)
      with tf.device(total_loss.device), tf.name_scope(scope):
        towers.append(optimizer.compute_gradients(total_loss))
    with tf.device('/cpu:0'):
      gradients = average_gradients(towers)
  else:
    (total_loss,) = total_losses
    gradients = optimizer.compute_gradients(total_loss)
  with tf.device('/cpu:0') if in_towers else contextlib.nullcontext():
    losses = mean_losses(total_losses)
    train_op = apply_gradients(
      optimizer,
      average_over_workers(gradients),
      global_step,
      run_before=summarize_losses(losses),
    )
  _, mean_total_loss = losses[-1]
  return mean_total_loss, train_op


def average_gradients(towers: list[Gradients]) -> Gradients:
  """Average each variable's gradient over the towers.

  Args:
    towers: (gradient, variable) pairs of each tower, with the same variables in
      the same order. A gradient of None counts as zero.

  Returns:
    (mean gradient, variable) pairs. A mean is None only if the gradients of all
    towers are None.
  """
  averages = []
  for pairs in zip(*towers, strict=True):
    gradients = [gradient for gradient, _ in pairs if gradient is not None]
    mean = tf.add_n(gradients) / len(pairs) if gradients else None
    averages.append((mean, pairs[0][1]))
  return averages


def global_step() -> tf.Variable:
  """Return the graph's global step, int64 [].

  The first call creates it on the CPU, as a resource variable.
  """
  with (
    tf.device('/cpu:0'),
    tf.variable_scope(tf.get_variable_scope(), use_resource=True),
  ):
    return tf.train.get_or_create_global_step()


def mean_losses(total_losses: list[tf.Tensor]) -> list[tuple[str, tf.Tensor]]:
  """Return the mean over the towers of each component and of the total loss.

  Args:
    total_losses: one float32 [] per tower, from `cifar10.loss`.

  Returns:
    (name, mean loss) pairs: the weight decays and the cross entropy, then the
    total loss. Names omit the prefix of the tower.
  """
  towers = []
  for total_loss in total_losses:
    prefix = _tower_in(total_loss.op.name)
    towers.append([*tf.get_collection('losses', prefix), total_loss])
  return [
    (
      re.sub(f'{TOWER_NAME}_[0-9]*/', '', same[0].op.name),
      same[0] if len(same) == 1 else tf.add_n(same) / len(same),
    )
    for same in zip(*towers, strict=True)
  ]


def summarize_losses(losses: list[tuple[str, tf.Tensor]]) -> tf.Operation:
  """Add summaries of each loss and its moving average over the steps.

  The averages (decay 0.9) start at the first loss, also when training resumes:
  they are in no collection of variables, and so in no checkpoint.

  Args:
    losses: (tag, loss) pairs; each loss is float32 [].

  Returns:
    The operation that updates the averages, to run in every step.
  """
  values = tf.stack([value for _, value in losses])
  # Next to the losses: in a cluster, each worker averages its own.
  with tf.colocate_with(values):
    averages = tf.Variable(
      tf.zeros([len(losses)]),
      trainable=False,
      collections=[],
      use_resource=True,
      name='loss_averages',
    )
  update = averages.assign(
    tf.cond(
      tf.is_variable_initialized(averages),
      lambda: 0.9 * averages.read_value() + 0.1 * values,
      lambda: values,
    )
  )
  for (tag, value), average in zip(losses, tf.unstack(update), strict=True):
    summaries.scalar(f'{tag} (raw)', value)
    summaries.scalar(tag, average)
  return update.op


def apply_gradients(
  optimizer: tf.train.Optimizer,
  gradients: Gradients,
  global_step: tf.Variable,
  *,
  run_before: tf.Operation,
) -> tf.Operation:
  """Build the update, with summaries of the variables and their gradients.

  Args:
    optimizer: optimizer that applies the gradients.
    gradients: (gradient, variable) pairs, from `compute_gradients`.
    global_step: integer [], incremented by each step.
    run_before: operation that runs before the gradients are applied.

  Returns:
    The operation that runs the update and adapts the loss scale.
  """
  # Before the summaries, because a histogram of infinity would end training.
  gradients, adapt_loss_scale = precision.without_overflow(gradients)
  for gradient, variable in gradients:
    summaries.histogram(variable.op.name, variable)
    if gradient is not None:
      summaries.histogram(f'{variable.op.name}/gradients', gradient)
  with tf.control_dependencies([run_before]):
    update = optimizer.apply_gradients(gradients, global_step)
  return tf.group(update, adapt_loss_scale)


def current_tower() -> str:
  """Return the name scope of the tower being built ('tower_0/'), or ''."""
  return _tower_in(tf.get_default_graph().get_name_scope())


def _tower_in(name: str) -> str:
  """Return the prefix of a name up to the tower ('tower_0/'), or ''."""
  match = re.match(f'(.*/)?{TOWER_NAME}_[0-9]+(?=/|$)', name)
  return f'{match[0]}/' if match else ''
