"""One update of the variables, with the gradients of one or more towers."""

import contextlib
import re

import tensorflow.compat.v1 as tf

from cifar10_suite import precision, summaries

# The operations of tower k of several are named 'tower_<k>/...'. Summaries
# leave that prefix out.
TOWER_NAME = 'tower'

Gradients = list[tuple[tf.Tensor | None, tf.Variable]]


def update(
  optimizer: tf.train.Optimizer,
  total_losses: list[tf.Tensor],
  global_step: tf.Variable,
) -> tuple[tf.Tensor, tf.Operation]:
  """Builds one step of training.

  With several towers, gradients are computed on the device of their loss, and
  averaged on the CPU, where the variables are.

  Args:
    optimizer: updates the variables, and whatever follows from them.
    total_losses: float32 [] each, from `cifar10.loss`, one of each tower.
    global_step: integer [], grows by one.

  Returns:
    loss: float32 [], the mean of the towers' total losses.
    train_op: the operation that does the step.
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
      optimizer, gradients, global_step, after=average_losses(losses)
    )
  _, mean_total_loss = losses[-1]
  return mean_total_loss, train_op


def average_gradients(towers: list[Gradients]) -> Gradients:
  """Averages each variable's gradient over the towers.

  Args:
    towers: (gradient, variable) pairs of each tower, of the same variables in
      the same order. None counts as zero.

  Returns:
    One list of such pairs. A gradient is None only if it is None in all towers.
  """
  averages = []
  for pairs in zip(*towers, strict=True):
    gradients = [gradient for gradient, _ in pairs if gradient is not None]
    mean = tf.add_n(gradients) / len(pairs) if gradients else None
    averages.append((mean, pairs[0][1]))
  return averages


def make_global_step() -> tf.Variable:
  """Returns the global step, int64 [], a resource as the variables are."""
  with tf.variable_scope(tf.get_variable_scope(), use_resource=True):
    return tf.train.get_or_create_global_step()


def mean_losses(total_losses: list[tf.Tensor]) -> list[tuple[str, tf.Tensor]]:
  """Returns the losses that make up the totals, and the total as the last one.

  Args:
    total_losses: float32 [] each, from `loss`, one of each tower.

  Returns:
    (name, loss) pairs; names leave out the towers' prefixes, and losses are
    means over the towers.
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


def average_losses(losses: list[tuple[str, tf.Tensor]]) -> tf.Operation:
  """Summarizes each loss and its moving average (decay 0.9).

  The averages start at the first losses, also when training resumes: they are
  not part of a checkpoint, nor of any collection of variables.

  Args:
    losses: pairs of a summary's tag and a loss, float32 [].

  Returns:
    The operation that updates the averages.
  """
  values = tf.stack([value for _, value in losses])
  with tf.colocate_with(values):  # each worker of a cluster has its own
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
  after: tf.Operation,
) -> tf.Operation:
  """Summarizes variables and gradients, and lets the optimizer update.

  Args:
    optimizer: does the update.
    gradients: (gradient, variable) pairs, from `compute_gradients`.
    global_step: integer [], grows by one.
    after: the operation to run before the update.

  Returns:
    The operation that does the update, and what follows it.
  """
  for gradient, variable in gradients:
    summaries.histogram(variable.op.name, variable)
    if gradient is not None:
      summaries.histogram(f'{variable.op.name}/gradients', gradient)
  gradients, adapt_loss_scale = precision.without_overflow(gradients)
  # The gradients wait, not the optimizer: in a cluster it also builds what the
  # chief does for all, which must not run this worker's network once more.
  with tf.control_dependencies([after]):
    gradients = [(g if g is None else tf.identity(g), v) for g, v in gradients]
  update = optimizer.apply_gradients(gradients, global_step)
  return tf.group(update, adapt_loss_scale)


def current_tower() -> str:
  """Returns the name scope of the tower being built ('tower_0/'), or ''."""
  return _tower_in(tf.get_default_graph().get_name_scope())


def _tower_in(name: str) -> str:
  """Returns the beginning of a name that is a tower's ('tower_0/'), or ''."""
  match = re.match(f'(.*/)?{TOWER_NAME}_[0-9]+(?=/|$)', name)
  return f'{match[0]}/' if match else ''
