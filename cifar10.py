"""The CIFAR-10 network: batches -> logits -> loss -> update.

The model of TensorFlow's CIFAR-10 tutorial, to the letter: two convolutions
with pooling and local response normalization, two fully connected layers and a
linear one; gradient descent with a stepwise learning rate; moving averages of
all variables, which evaluation reads.

Compute happens in the type of the images that `inference` is given (float32,
float16 or bfloat16); variables, logits and loss are float32 always.
"""

import contextlib
import functools
import math
import os
import re
from collections.abc import Callable

import numpy as np
import tensorflow.compat.v1 as tf

import cifar10_cluster
import cifar10_input
import cifar10_ops as ops
import cifar10_optimizers
import cifar10_precision
import download
from cifar10_recipes import TUTORIAL, Recipe

tf.app.flags.DEFINE_integer(
  'batch_size', 128, 'Number of images per batch.', lower_bound=1
)
tf.app.flags.DEFINE_string(
  'data_dir',
  download.DEFAULT_DATA_DIR,
  'Directory of the data set; it is fetched there if it is missing.',
)
tf.app.flags.DEFINE_boolean(
  'use_fp16', False, 'Compute in float16, with float32 variables.'
)
tf.app.flags.DEFINE_boolean(
  'use_bf16', False, 'Compute in bfloat16, with float32 variables.'
)
tf.app.flags.mark_bool_flags_as_mutual_exclusive(['use_fp16', 'use_bf16'])
FLAGS = tf.app.flags.FLAGS

IMAGE_SIZE = cifar10_input.IMAGE_SIZE
NUM_CLASSES = cifar10_input.NUM_CLASSES
NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = (
  cifar10_input.NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN
)
NUM_EXAMPLES_PER_EPOCH_FOR_EVAL = cifar10_input.NUM_EXAMPLES_PER_EPOCH_FOR_EVAL

MOVING_AVERAGE_DECAY = 0.9999  # of the variables, for evaluation
NUM_EPOCHS_PER_DECAY = 350.0  # epochs after which the learning rate drops
LEARNING_RATE_DECAY_FACTOR = 0.1  # what it is multiplied by then
INITIAL_LEARNING_RATE = TUTORIAL.learning_rate
PART_OF_STEPS_THAT_RISE = 0.05  # of those of a linear schedule
NUM_EPOCHS_OF_WARM_UP = 5.0  # until a scaled learning rate is reached

_IMAGES_IN_HISTOGRAM = 16

# Operations of the k-th of several towers are named 'tower_<k>/...'. Summaries
# leave that prefix out.
TOWER_NAME = 'tower'

DATA_URL = download.DATA_URL


def maybe_download_and_extract() -> None:
  """Fetches the data set into `--data_dir`, unless it is there.

  Raises:
    download.DownloadError: it cannot be had.
  """
  download.maybe_download_and_extract(FLAGS.data_dir)


def compute_type() -> tf.DType:
  """Returns the type that `--use_fp16` and `--use_bf16` ask for."""
  if FLAGS.use_bf16:
    dtype = tf.bfloat16
  else:
    dtype = tf.float16 if FLAGS.use_fp16 else tf.float32
  if not cifar10_precision.is_fast(dtype):
    print(
      f'This processor has no fast path for {dtype.name}: slower than float32.'
    )
  return dtype


def distorted_inputs(
  recipe: Recipe = TUTORIAL,
) -> tuple[tf.Tensor, tf.Tensor]:
  """Makes batches for training, as the flags say.

  Args:
    recipe: how far to distort.

  Returns:
    images: [batch_size, 24, 24, 3], in the compute type.
    labels: int32 [batch_size].
  """
  (batch,) = distorted_batches(1, recipe)
  return batch


def distorted_batches(
  count: int, recipe: Recipe = TUTORIAL
) -> list[tuple[tf.Tensor, tf.Tensor]]:
  """Makes several batches a step out of one pipeline, as the flags say.

  Args:
    count: number of batches.
    recipe: how far to distort.

  Returns:
    As many pairs of images and labels, as of `distorted_inputs`.
  """
  margin, last_margin = recipe.crop_margin
  if last_margin != margin:
    left = 1 - _progress(make_global_step(), recipe.max_steps)
    still_to_fall = tf.minimum(left / recipe.crop_margin_falls_in, 1)
    margin = last_margin + (margin - last_margin) * still_to_fall
  batches = cifar10_input.distorted_batches(
    os.path.join(FLAGS.data_dir, download.BATCHES_DIR),
    FLAGS.batch_size,
    count,
    recipe.contrast,
    margin,
  )
  dtype = compute_type()
  with tf.device('/cpu:0'):
    return [(tf.cast(images, dtype), labels) for images, labels in batches]


def inputs(eval_data: bool) -> tuple[tf.Tensor, tf.Tensor]:
  """Makes batches for evaluation, without end, as the flags say.

  Args:
    eval_data: the test images if true, the training images if false.

  Returns:
    images: [batch_size, 24, 24, 3], in the compute type.
    labels: int32 [batch_size].
  """
  images, labels = cifar10_input.inputs(
    bool(eval_data),
    os.path.join(FLAGS.data_dir, download.BATCHES_DIR),
    FLAGS.batch_size,
  )
  return tf.cast(images, compute_type()), labels


def inference(images: tf.Tensor, recipe: Recipe = TUTORIAL) -> tf.Tensor:
  """Builds the network.

  Args:
    images: [batch, 24, 24, 3], float32, float16 or bfloat16; the batch size
      need not be known.
    recipe: how the first filters start, how fast weights decay, and how much
      to drop out; the default's is the network that is scored.

  Returns:
    The logits, float32 [batch, 10].
  """
  filters = _whitening_filters(FLAGS.data_dir) if recipe.whitened else None
  with tf.variable_scope('conv1'):
    sums, biases = _convolution(images, channels=64, bias=0.0, filters=filters)
    _activation_summary(tf.nn.relu(tf.nn.bias_add(sums, biases)))
    # The maximum may come first, as neither changes the order of values: the
    # same result, for a quarter of the work.
    pool1 = tf.nn.relu(tf.nn.bias_add(ops.max_pool(sums, name='pool1'), biases))
  norm1 = ops.local_response_normalization(pool1, name='norm1')

  with tf.variable_scope('conv2'):
    sums, biases = _convolution(norm1, channels=64, bias=0.1)
    conv2 = tf.nn.relu(tf.nn.bias_add(sums, biases))
    _activation_summary(conv2)
  norm2 = ops.local_response_normalization(conv2, name='norm2')
  pool2 = ops.max_pool(norm2, name='pool2')

  height, width, depth = pool2.shape.as_list()[1:]
  flat = tf.reshape(pool2, [-1, height * width * depth])
  if recipe.dropout:
    flat = tf.nn.dropout(flat, rate=recipe.dropout)
  wd = recipe.weight_decay
  with tf.variable_scope('local3'):
    local3 = tf.nn.relu(_dense(flat, 384, stddev=0.04, bias=0.1, wd=wd))
    _activation_summary(local3)
  with tf.variable_scope('local4'):
    local4 = tf.nn.relu(_dense(local3, 192, stddev=0.04, bias=0.1, wd=wd))
    _activation_summary(local4)
  with tf.variable_scope('softmax_linear'):
    logits = _dense(
      cifar10_precision.leave_compute_type(local4),
      NUM_CLASSES,
      stddev=1 / 192.0,
      bias=0.0,
      wd=None,
    )
    _activation_summary(logits)
  return logits


def average_views(logits: tf.Tensor, num_views: int) -> tf.Tensor:
  """Averages the probabilities that the views of each image give.

  Args:
    logits: float32 [batch * num_views, 10], the views of an image in a row.
    num_views: number of views of each image.

  Returns:
    The averages' natural logarithms, float32 [batch, 10].
  """
  views = tf.reshape(tf.nn.log_softmax(logits), [-1, num_views, NUM_CLASSES])
  return tf.reduce_logsumexp(views, axis=1) - math.log(num_views)


def loss(
  logits: tf.Tensor, labels: tf.Tensor, recipe: Recipe = TUTORIAL
) -> tf.Tensor:
  """Adds the cross entropy to the collection 'losses' and sums that up.

  Args:
    logits: float32 [batch, 10].
    labels: integers [batch], in 0..9.
    recipe: how far to smooth the labels.

  Returns:
    The total loss, float32 []: the batch's mean cross entropy and the weight
    decays. Within a tower's name scope, only that tower's.
  """
  cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(
    labels=labels, logits=logits, name='cross_entropy_per_example'
  )
  if recipe.label_smoothing:
    # The cross entropy with a distribution is linear in it: a part is that of
    # all classes alike.
    alike = -tf.reduce_mean(tf.nn.log_softmax(logits), axis=1)
    cross_entropy += recipe.label_smoothing * (alike - cross_entropy)
  tf.add_to_collection(
    'losses', tf.reduce_mean(cross_entropy, name='cross_entropy')
  )
  return tf.add_n(
    tf.get_collection('losses', _tower_prefix()), name='total_loss'
  )


def train(
  total_loss: tf.Tensor,
  global_step: tf.Variable,
  cluster: cifar10_cluster.Cluster = cifar10_cluster.ALONE,
  recipe: Recipe = TUTORIAL,
) -> tf.Operation:
  """Builds one step of training, for batches of `--batch_size`.

  Args:
    total_loss: float32 [], from `loss`.
    global_step: integer [], counts the steps.
    cluster: the workers that train together.
    recipe: by which learning rate and optimizer.

  Returns:
    The operation that updates the variables, then their moving averages.
  """
  rate = learning_rate(
    global_step, cluster.gradients_per_step * FLAGS.batch_size, recipe=recipe
  )
  optimizer = cluster.synchronized(make_optimizer(rate, recipe))
  gradients = optimizer.compute_gradients(total_loss)
  averaged = average_losses(named_losses(total_loss))
  return apply_gradients(optimizer, gradients, global_step, after=averaged)


def make_global_step() -> tf.Variable:
  """Returns the global step, int64 [], a resource as the variables are."""
  with tf.variable_scope(tf.get_variable_scope(), use_resource=True):
    return tf.train.get_or_create_global_step()


def named_losses(total_loss: tf.Tensor) -> list[tuple[str, tf.Tensor]]:
  """Returns the losses that make up a total, and that last, with their names.

  The names leave out towers' prefixes.

  Args:
    total_loss: float32 [], from `loss`, in the same name scope.
  """
  losses = [*tf.get_collection('losses', _tower_prefix()), total_loss]
  return [
    (re.sub(f'{TOWER_NAME}_[0-9]*/', '', value.op.name), value)
    for value in losses
  ]


def average_losses(losses: list[tuple[str, tf.Tensor]]) -> tf.Operation:
  """Summarizes each loss and its moving average (decay 0.9).

  The averages start at the first losses, and again so when training resumes:
  they are not part of a checkpoint, nor of any collection of variables.

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
    ops.scalar_summary(f'{tag} (raw)', value)
    ops.scalar_summary(tag, average)
  return update.op


def learning_rate(
  global_step: tf.Variable,
  examples_per_step: int,
  scale: float = 1.0,
  recipe: Recipe = TUTORIAL,
) -> tf.Tensor:
  """Returns the step's learning rate, float32 [], and summarizes it.

  0.1 * 0.1^floor(global_step / decay_steps), where decay_steps takes 350
  epochs; or, as other recipes have it, a linear rise in the first part of the
  steps, then a linear fall to zero at the last. Times a scale that is reached
  linearly within five epochs, as in Goyal et al., "Accurate, Large Minibatch
  SGD: Training ImageNet in 1 Hour" (2017), section 2.2.

  Args:
    global_step: integer [], number of the step.
    examples_per_step: number of images that each step takes.
    scale: what the rate is multiplied by, after the warm-up.
    recipe: tells the highest rate, and how it falls.
  """
  steps_per_epoch = NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN / examples_per_step
  if recipe.linear:
    rate = recipe.learning_rate * _triangle(global_step, recipe.max_steps)
  else:
    rate = tf.train.exponential_decay(
      recipe.learning_rate,
      global_step,
      decay_steps=int(steps_per_epoch * NUM_EPOCHS_PER_DECAY),
      decay_rate=LEARNING_RATE_DECAY_FACTOR,
      staircase=True,
    )
  if scale != 1:
    warm_up_steps = NUM_EPOCHS_OF_WARM_UP * steps_per_epoch
    rate *= 1 + (scale - 1) * _progress(global_step, warm_up_steps)
  ops.scalar_summary('learning_rate', rate)
  return rate


def _triangle(global_step: tf.Variable, steps: int) -> tf.Tensor:
  """Rises from 0 to 1 and falls to 0 again, at the given number of steps."""
  progress = _progress(global_step, steps)
  rising = progress / PART_OF_STEPS_THAT_RISE
  falling = (1 - progress) / (1 - PART_OF_STEPS_THAT_RISE)
  return tf.minimum(rising, falling)


def _progress(global_step: tf.Variable, steps: float) -> tf.Tensor:
  """Returns which part of the steps is done, float32 [], 1 at most."""
  return tf.minimum(tf.cast(global_step, tf.float32) / steps, 1)


def make_optimizer(
  rate: tf.Tensor, recipe: Recipe = TUTORIAL
) -> tf.train.Optimizer:
  """Returns an optimizer that averages the variables after each update.

  Args:
    rate: float32 [], the learning rate.
    recipe: tells which optimizer does the update.
  """
  if recipe.optimizer == 'descent':
    optimizer = tf.train.GradientDescentOptimizer(rate)
  elif recipe.optimizer == 'nesterov':
    optimizer = tf.train.MomentumOptimizer(
      rate, recipe.momentum, use_nesterov=True
    )
  else:
    optimizer = cifar10_optimizers.MuonOptimizer(
      rate, recipe.momentum, recipe.decoupled_weight_decay
    )
  return cifar10_optimizers.AveragingOptimizer(optimizer, MOVING_AVERAGE_DECAY)


def apply_gradients(
  optimizer: tf.train.Optimizer,
  gradients: list[tuple[tf.Tensor, tf.Variable]],
  global_step: tf.Variable,
  after: tf.Operation,
) -> tf.Operation:
  """Summarizes variables and gradients, and lets the optimizer update.

  Args:
    optimizer: from `make_optimizer`, or one that wraps such a one.
    gradients: (gradient, variable) pairs, from `compute_gradients`.
    global_step: integer [], grows by one.
    after: what is to be done before the update.

  Returns:
    The operation that does the update, and what follows it.
  """
  for gradient, variable in gradients:
    ops.histogram_summary(variable.op.name, variable)
    if gradient is not None:
      ops.histogram_summary(f'{variable.op.name}/gradients', gradient)
  gradients, adapt_loss_scale = cifar10_precision.without_overflow(gradients)
  # The gradients wait, not the optimizer: in a cluster it also builds what the
  # chief does for all, which is not to run this worker's network once more.
  with tf.control_dependencies([after]):
    gradients = [(g if g is None else tf.identity(g), v) for g, v in gradients]
  update = optimizer.apply_gradients(gradients, global_step)
  return tf.group(update, adapt_loss_scale)


def variables_to_restore() -> dict[str, tf.Variable]:
  """Returns what evaluation reads from a checkpoint, by the names there.

  Those are the variables' moving averages, and other saved variables.
  """
  averages = tf.train.ExponentialMovingAverage(MOVING_AVERAGE_DECAY)
  return averages.variables_to_restore()


@functools.cache
def _whitening_filters(data_dir: str) -> np.ndarray:
  """Returns 64 filters, float32 [5, 5, 3, 64], made once for all towers."""
  batches_dir = os.path.join(data_dir, download.BATCHES_DIR)
  return cifar10_input.whitening_filters(batches_dir, size=5, count=64)


def _convolution(
  x: tf.Tensor, channels: int, bias: float, filters: np.ndarray | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
  """Convolves with 5x5 kernels; returns the sums, and the biases to add.

  The kernels start as the filters that are given, or at random.
  """
  if filters is None:
    shape = [5, 5, x.shape.as_list()[-1], channels]
    kernel = _variable_with_weight_decay('weights', shape, stddev=0.05, wd=None)
  else:
    kernel = _variable(
      'weights', filters.shape, tf.constant_initializer(filters)
    )
  biases = _variable('biases', [channels], tf.constant_initializer(bias))
  kernel = cifar10_precision.enter_compute_type(kernel, x.dtype)
  biases = cifar10_precision.enter_compute_type(biases, x.dtype)
  return ops.convolution(x, kernel), biases


def _dense(
  x: tf.Tensor, units: int, stddev: float, bias: float, wd: float | None
) -> tf.Tensor:
  """Multiplies [batch, n] with weights [n, units] and adds biases."""
  shape = [x.shape.as_list()[-1], units]
  weights = _variable_with_weight_decay('weights', shape, stddev, wd)
  biases = _variable('biases', [units], tf.constant_initializer(bias))
  x = ops.matmul(x, cifar10_precision.enter_compute_type(weights, x.dtype))
  return tf.nn.bias_add(
    x, cifar10_precision.enter_compute_type(biases, x.dtype)
  )


def _tower_prefix() -> str:
  """Returns the name scope of the tower being built ('tower_0/'), or ''."""
  scope = tf.get_default_graph().get_name_scope()
  match = re.match(f'(.*/)?{TOWER_NAME}_[0-9]+(?=/|$)', scope)
  return f'{match[0]}/' if match else ''


def _variable(
  name: str, shape: list[int], initializer: Callable[..., tf.Tensor]
) -> tf.Tensor:
  """Gets a float32 variable, among several towers on the CPU; reads it once.

  What uses the value shares that read: in a cluster, it crosses the network.
  """
  with tf.device('/cpu:0') if _tower_prefix() else contextlib.nullcontext():
    variable = tf.get_variable(
      name, shape, tf.float32, initializer, use_resource=True
    )
  return tf.convert_to_tensor(variable)


def _variable_with_weight_decay(
  name: str, shape: list[int], stddev: float, wd: float | None
) -> tf.Tensor:
  """Gets a variable that starts truncated-normal and may decay.

  Args:
    name: the variable's name.
    shape: its shape.
    stddev: standard deviation of its initial values before truncation.
    wd: None or 0, or how much of its l2_loss goes into the collection 'losses'.

  Returns:
    The variable's value.
  """
  value = _variable(name, shape, tf.truncated_normal_initializer(stddev=stddev))
  if wd:
    weight_decay = tf.multiply(tf.nn.l2_loss(value), wd, name='weight_loss')
    tf.add_to_collection('losses', weight_decay)
  return value


def _activation_summary(x: tf.Tensor) -> None:
  """Summarizes a layer's activations and how many of them are zero.

  A histogram looks at every value in turn, so that of the activations takes
  only the first images of the batch.
  """
  layer = tf.get_variable_scope().name
  ops.histogram_summary(f'{layer}/activations', x[:_IMAGES_IN_HISTOGRAM])
  ops.scalar_summary(f'{layer}/sparsity', tf.nn.zero_fraction(x))
