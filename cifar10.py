"""The CIFAR-10 network: batches -> logits -> loss -> update.

This is the model of TensorFlow's CIFAR-10 tutorial: two convolutions with
pooling and local response normalization, two fully connected layers and a
linear output layer. By default, it is trained by gradient descent with a
stepwise learning rate, as in the tutorial; other recipes, which
`cifar10_suite/recipes.py` defines, differ. It is evaluated with moving averages
of all variables.

A tower is one of several copies of the network in a graph, each on a separate
device. Towers share all variables, and one step averages their gradients.

The dtype of the images (float32, float16 or bfloat16) is the compute type.
Variables, logits and loss are always float32.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

import cifar10_input
from cifar10_suite import (
  compatibility,
  convolution,
  dataset,
  lrn,
  optimizers,
  precision,
  schedules,
  summaries,
  updates,
)
from cifar10_suite.recipes import TUTORIAL, Recipe

tf.app.flags.DEFINE_integer(
  'batch_size', 128, 'Number of images per batch.', lower_bound=1
)
tf.app.flags.DEFINE_string(
  'data_dir',
  dataset.DEFAULT_DATA_DIR,
  'Directory of the data set; CIFAR-10 is downloaded if it is missing.',
)
tf.app.flags.DEFINE_boolean(
  'use_fp16', False, 'Compute in float16, with float32 variables.'
)
tf.app.flags.DEFINE_boolean(
  'use_bf16', False, 'Compute in bfloat16, with float32 variables.'
)
tf.app.flags.mark_bool_flags_as_mutual_exclusive(['use_fp16', 'use_bf16'])
FLAGS = tf.app.flags.FLAGS  # for scripts, as in the tutorial

IMAGE_SIZE = cifar10_input.IMAGE_SIZE
NUM_CLASSES = cifar10_input.NUM_CLASSES
NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = (
  cifar10_input.NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN
)
NUM_EXAMPLES_PER_EPOCH_FOR_EVAL = cifar10_input.NUM_EXAMPLES_PER_EPOCH_FOR_EVAL

MOVING_AVERAGE_DECAY = 0.9999  # moving averages of variables, for evaluation
NUM_EPOCHS_PER_DECAY = 350.0  # epochs between learning rate drops
LEARNING_RATE_DECAY_FACTOR = 0.1
INITIAL_LEARNING_RATE = TUTORIAL.learning_rate  # of `train` without a recipe
NUM_EPOCHS_OF_WARM_UP = 5.0  # for a learning rate scaled for several towers

# The tutorial defines these two here as well, and scripts expect them here.
TOWER_NAME = updates.TOWER_NAME
DATA_URL = dataset.DATA_URL


def maybe_download_and_extract() -> None:
  """Download CIFAR-10 to `--data_dir` unless it contains a data set.

  Raises:
    UserError: if CIFAR-10 cannot be downloaded or stored.
  """
  import download  # imported here: the model does not need the downloader

  download.maybe_download_and_extract(compatibility.known_flags().data_dir)


def compute_type() -> tf.DType:
  """Return the compute type selected by `--use_fp16` and `--use_bf16`.

  Print a line if it is slow here, which is measured the first time.
  """
  flags = compatibility.known_flags()
  dtype = tf.float16 if flags.use_fp16 else tf.float32
  dtype = tf.bfloat16 if flags.use_bf16 else dtype
  if not convolution.is_fast(dtype):
    print(f'{dtype.name} is slower than float32 on this processor.')
  return dtype


def distorted_inputs() -> tuple[tf.Tensor, tf.Tensor]:
  """Build training batches as specified by the flags.

  Returns:
    images: [batch_size, 24, 24, 3], in the compute type.
    labels: int32 [batch_size].
  """
  flags = compatibility.known_flags()
  batches_dir = os.path.join(flags.data_dir, dataset.BATCHES_DIR)
  images, labels = cifar10_input.distorted_inputs(batches_dir, flags.batch_size)
  return tf.cast(images, compute_type()), labels


def inputs(eval_data: bool) -> tuple[tf.Tensor, tf.Tensor]:
  """Build endless evaluation batches as specified by the flags.

  Args:
    eval_data: whether to read test images instead of training images.

  Returns:
    images: [batch_size, 24, 24, 3], in the compute type.
    labels: int32 [batch_size].
  """
  flags = compatibility.known_flags()
  batches_dir = os.path.join(flags.data_dir, dataset.BATCHES_DIR)
  images, labels = cifar10_input.inputs(
    bool(eval_data), batches_dir, flags.batch_size
  )
  return tf.cast(images, compute_type()), labels


def inference(
  images: tf.Tensor,
  *,
  is_training: bool = False,
  recipe: Recipe = TUTORIAL,
  first_filters: np.ndarray | None = None,
  num_classes: int | None = None,
  num_parts: int = 1,
  portable: bool = False,
) -> tf.Tensor:
  """Build the network from images to logits.

  Args:
    images: float32, float16 or bfloat16 [batch, 24, 24, 3]; the batch size may
      be unknown.
    is_training: whether to apply the recipe's dropout.
    recipe: the weight decay, the dropout and the initial activations.
    first_filters: float32 [5, 5, 3, 64], initial filters of the first
      convolution, before multiplication by the recipe's `activation_scale`;
      random by default.
    num_classes: number of classes; NUM_CLASSES by default.
    num_parts: number of equal parts of the batch, a divisor of its size. Each
      passes through the convolutions by itself, so that TensorFlow can work on
      several at a time. The results are the same, up to rounding.
    portable: whether to use only operations that the runtimes of exported
      models know, which may be slower here.

  Returns:
    The logits, float32 [batch, num_classes].

  Raises:
    RuntimeError: in eager execution.
  """
  compatibility.require_graph_mode()
  scale = recipe.activation_scale
  parts = [images] if num_parts == 1 else tf.split(images, num_parts)
  with tf.variable_scope('conv1'):
    filters = None if first_filters is None else scale * first_filters
    sums, biases = _convolution(
      parts, 64, stddev=0.05 * scale, bias=0.0, filters=filters
    )
    _activation_summary(tf.nn.relu(tf.nn.bias_add(_joined(sums), biases)))
    # Bias and ReLU are monotonic, so they commute with the maximum: pooling
    # first gives the same result for a quarter of the work. The summary shows
    # the activations before pooling, as in the tutorial; they are computed only
    # in steps that write summaries.
    pool1 = [convolution.max_pool(part, name='pool1') for part in sums]
  norm1 = [lrn.relu_and_normalize(it, biases, name='norm1') for it in pool1]

  with tf.variable_scope('conv2'):
    sums, biases = _convolution(
      norm1, 64, stddev=0.05, bias=0.1 * scale, portable=portable
    )
    _activation_summary(tf.nn.relu(tf.nn.bias_add(_joined(sums), biases)))
  norm2 = [lrn.relu_and_normalize(part, biases, name='norm2') for part in sums]
  pool2 = _joined([convolution.max_pool(it, name='pool2') for it in norm2])

  height, width, depth = pool2.shape.as_list()[1:]
  flat = tf.reshape(pool2, [-1, height * width * depth])
  if is_training and recipe.dropout:
    flat = tf.nn.dropout(flat, rate=recipe.dropout)
  wd = recipe.weight_decay
  with tf.variable_scope('local3'):
    local3 = tf.nn.relu(_dense(flat, 384, stddev=0.04 / scale, bias=0.1, wd=wd))
    _activation_summary(local3)
  with tf.variable_scope('local4'):
    local4 = tf.nn.relu(_dense(local3, 192, stddev=0.04, bias=0.1, wd=wd))
    _activation_summary(local4)
  with tf.variable_scope('softmax_linear'):
    wide = precision.leave_compute_type(local4)
    classes = num_classes or NUM_CLASSES
    logits = _dense(wide, classes, stddev=1 / 192.0, bias=0.0, wd=None)
    _activation_summary(logits)
  return logits


def loss(
  logits: tf.Tensor, labels: tf.Tensor, *, label_smoothing: float = 0.0
) -> tf.Tensor:
  """Add the cross entropy to the collection 'losses' and return the total.

  Args:
    logits: float32 [batch, num_classes].
    labels: numbers of any type [batch], less than `num_classes`; or a
      distribution over the classes for each image, float32 [batch,
      num_classes].
    label_smoothing: probability moved from the label to a uniform distribution
      over all classes.

  Returns:
    The total loss, float32 []: mean cross entropy of the batch plus weight
    decay. Within a tower's name scope, only the losses of that tower count.
  """
  labels = tf.convert_to_tensor(labels)
  if labels.dtype.is_floating and labels.shape.rank == 2:
    cross_entropy_of = tf.nn.softmax_cross_entropy_with_logits_v2
  else:
    cross_entropy_of = tf.nn.sparse_softmax_cross_entropy_with_logits
    labels = tf.cast(labels, tf.int64)
  cross_entropy = cross_entropy_of(
    labels=labels, logits=logits, name='cross_entropy_per_example'
  )
  if label_smoothing:
    # The cross entropy is linear in the target distribution, so this is the
    # cross entropy with the smoothed labels.
    uniform = -tf.reduce_mean(tf.nn.log_softmax(logits), axis=1)
    cross_entropy += label_smoothing * (uniform - cross_entropy)
  tf.add_to_collection(
    'losses', tf.reduce_mean(cross_entropy, name='cross_entropy')
  )
  losses = tf.get_collection('losses', updates.current_tower())
  return tf.add_n(losses, name='total_loss')


def train(
  total_loss: tf.Tensor,
  global_step: tf.Variable,
  *,
  recipe: Recipe | None = None,
  examples_per_step: int | None = None,
  dtype: tf.DType = tf.float32,
) -> tf.Operation:
  """Build one step of training, as in the tutorial.

  The programs of this suite call `train_towers`.

  Args:
    total_loss: float32 [], from `loss`.
    global_step: integer [], incremented by each step.
    recipe: the learning rate schedule and the optimizer; by default, TUTORIAL
      with INITIAL_LEARNING_RATE.
    examples_per_step: number of images per step; `--batch_size` by default.
    dtype: the compute type, for Muon's matrix products.

  Returns:
    An operation that updates the variables, then their moving averages.
  """
  _, train_op = train_towers(
    [total_loss],
    global_step,
    examples_per_step=examples_per_step
    or compatibility.known_flags().batch_size,
    recipe=recipe
    or dataclasses.replace(TUTORIAL, learning_rate=INITIAL_LEARNING_RATE),
    dtype=dtype,
    examples_per_epoch=NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN,
  )
  return train_op


def train_towers(
  total_losses: list[tf.Tensor],
  global_step: tf.Variable,
  *,
  examples_per_step: int,
  recipe: Recipe = TUTORIAL,
  dtype: tf.DType = tf.float32,
  examples_per_epoch: int = NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN,
  learning_rate_scale: float = 1.0,
  average_over_workers: Callable[
    [updates.Gradients], updates.Gradients
  ] = lambda gradients: gradients,
) -> tuple[tf.Tensor, tf.Operation]:
  """Build one step of training with the gradients of one or more towers.

  Args:
    total_losses: one float32 [] per tower, from `loss`. Each gradient is
      computed on the device of its loss.
    global_step: integer [], incremented by each step.
    examples_per_step: number of images per step, over all towers and workers.
    recipe: the learning rate schedule and the optimizer.
    dtype: the compute type, for Muon's matrix products.
    examples_per_epoch: number of training images.
    learning_rate_scale: factor of the learning rate, reached linearly over five
      epochs.
    average_over_workers: returns the mean gradients of all workers of a
      cluster, as (gradient, variable) pairs.

  Returns:
    loss: float32 [], the mean of the towers' total losses.
    train_op: an operation that updates the variables, then their averages.
  """
  with tf.device('/cpu:0'):
    rate = learning_rate(
      global_step,
      examples_per_step,
      examples_per_epoch=examples_per_epoch,
      scale=learning_rate_scale,
      recipe=recipe,
    )
  optimizer = optimizers.AveragingOptimizer(
    optimizers.of_recipe(
      rate, recipe, _step_scales(recipe.activation_scale), dtype
    ),
    MOVING_AVERAGE_DECAY,
  )
  return updates.update(
    optimizer, total_losses, global_step, average_over_workers
  )


def learning_rate(
  global_step: tf.Variable,
  examples_per_step: int,
  *,
  examples_per_epoch: int = NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN,
  scale: float = 1.0,
  recipe: Recipe = TUTORIAL,
) -> tf.Tensor:
  """Return the learning rate, float32 [], and add a summary of it.

  In recipes with a stepwise schedule, the rate drops by a factor of 10 every
  350 epochs. In recipes with a linear one, it is zero in the first step, rises
  linearly over the first 5% of the steps, and then falls linearly; it would be
  zero in the step after the last one.

  Args:
    global_step: integer [], the number of completed steps.
    examples_per_step: number of images per step.
    examples_per_epoch: number of training images.
    scale: factor of the rate, reached linearly over five epochs.
    recipe: the initial or peak learning rate, and the schedule.
  """
  steps_per_epoch = examples_per_epoch / examples_per_step
  # With a tiny data set, 350 epochs may have fewer images than one step.
  decay_steps = max(int(steps_per_epoch * NUM_EPOCHS_PER_DECAY), 1)
  rate = schedules.of_recipe(
    global_step, recipe, LEARNING_RATE_DECAY_FACTOR, decay_steps
  )
  if scale != 1:
    steps = NUM_EPOCHS_OF_WARM_UP * steps_per_epoch
    rate *= schedules.warm_up(global_step, scale, steps)
  summaries.scalar('learning_rate', rate)
  return rate


def _step_scales(scale: float) -> dict[str, float]:
  """Return the factors of Muon's steps for a recipe's `activation_scale` s.

  The scale makes the weights of conv1 and the biases of both convolutions s
  times as large, and the weights of local3 1 / s times. For the same relative
  change, steps must scale likewise. Muon's steps of weights do not depend on
  the size of gradients: their factors are s (conv1) and 1 / s (local3). Its
  steps of biases are proportional to gradients, which are 1 / s times as large:
  for steps s times as large, their factor is s^2.
  """
  return {
    'conv1/weights': scale,
    'conv1/biases': scale**2,
    'conv2/biases': scale**2,
    'local3/weights': 1 / scale,
  }


def _convolution(
  parts: list[tf.Tensor],
  channels: int,
  stddev: float,
  bias: float,
  filters: np.ndarray | None = None,
  portable: bool = False,
) -> tuple[list[tf.Tensor], tf.Tensor]:
  """Convolve with 5x5 filters; return the sums and, separately, the biases.

  `lrn.relu_and_normalize` adds the biases. The parts of the batch share all
  variables.
  """
  initializer = tf.truncated_normal_initializer(stddev=stddev)
  if filters is not None:
    initializer = tf.constant_initializer(filters)
  dtype = parts[0].dtype
  shape = [5, 5, parts[0].shape.as_list()[-1], channels]
  kernel = _variable('weights', shape, initializer)
  biases = _variable('biases', [channels], tf.constant_initializer(bias))
  kernel = precision.enter_compute_type(kernel, dtype)
  biases = precision.enter_compute_type(biases, dtype)
  convolve = convolution.direct if portable else convolution.convolution
  return convolve(parts, kernel), biases


def _joined(parts: list[tf.Tensor]) -> tf.Tensor:
  """Return the whole batch."""
  return parts[0] if len(parts) == 1 else tf.concat(parts, axis=0)


def _dense(
  x: tf.Tensor, units: int, stddev: float, bias: float, wd: float | None
) -> tf.Tensor:
  """Apply a fully connected layer, without activation, to x [batch, n].

  The weight decay, `wd` times the L2 loss of the weights, is added to the
  collection 'losses'.
  """
  shape = [x.shape.as_list()[-1], units]
  initializer = tf.truncated_normal_initializer(stddev=stddev)
  weights = _variable('weights', shape, initializer)
  if wd:
    weight_decay = tf.multiply(tf.nn.l2_loss(weights), wd, name='weight_loss')
    tf.add_to_collection('losses', weight_decay)
  biases = _variable('biases', [units], tf.constant_initializer(bias))
  weights = precision.enter_compute_type(weights, x.dtype)
  biases = precision.enter_compute_type(biases, x.dtype)
  return tf.nn.bias_add(convolution.matmul(x, weights), biases)


def _variable(
  name: str, shape: Sequence[int], initializer: Callable[..., tf.Tensor]
) -> tf.Tensor:
  """Get the value of a float32 variable, which towers place on the CPU.

  All consumers share one read, because each read in a cluster is a network
  transfer.
  """
  in_tower = updates.current_tower() != ''
  with tf.device('/cpu:0') if in_tower else contextlib.nullcontext():
    variable = tf.get_variable(
      name, shape, tf.float32, initializer, use_resource=True
    )
  return tf.convert_to_tensor(variable)


def _activation_summary(x: tf.Tensor) -> None:
  """Add summaries of a layer's activations and their sparsity."""
  layer = tf.get_variable_scope().name
  summaries.histogram(f'{layer}/activations', x)
  summaries.scalar(f'{layer}/sparsity', tf.nn.zero_fraction(x))
