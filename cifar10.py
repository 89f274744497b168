"""The CIFAR-10 network: batches -> logits -> loss -> update.

The model of TensorFlow's CIFAR-10 tutorial, to the letter: two convolutions
with pooling and local response normalization, two fully connected layers and a
linear one; gradient descent with a stepwise learning rate; moving averages of
all variables, which evaluation reads.

Compute happens in the type of the images that `inference` is given (float32,
float16 or bfloat16); variables, logits and loss are float32 always.
"""

import os
import re

import numpy as np
import tensorflow.compat.v1 as tf

import cifar10_input
import download

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
INITIAL_LEARNING_RATE = 0.1

_LOSS_SCALE = 1024.0  # of gradients in float16

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
    return tf.bfloat16
  return tf.float16 if FLAGS.use_fp16 else tf.float32


def distorted_inputs() -> tuple[tf.Tensor, tf.Tensor]:
  """Makes batches for training, as the flags say.

  Returns:
    images: [batch_size, 24, 24, 3], in the compute type.
    labels: int32 [batch_size].
  """
  images, labels = cifar10_input.distorted_inputs(
    os.path.join(FLAGS.data_dir, download.BATCHES_DIR), FLAGS.batch_size
  )
  return tf.cast(images, compute_type()), labels


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


def inference(images: tf.Tensor) -> tf.Tensor:
  """Builds the network.

  Args:
    images: [batch, 24, 24, 3], float32, float16 or bfloat16; the batch size
      need not be known.

  Returns:
    The logits, float32 [batch, 10].
  """
  with tf.variable_scope('conv1'):
    conv1 = _convolution(images, channels=64, bias=0.0)
  pool1 = _max_pool(conv1, name='pool1')
  norm1 = local_response_normalization(pool1, name='norm1')

  with tf.variable_scope('conv2'):
    conv2 = _convolution(norm1, channels=64, bias=0.1)
  norm2 = local_response_normalization(conv2, name='norm2')
  pool2 = _max_pool(norm2, name='pool2')

  height, width, depth = pool2.shape.as_list()[1:]
  flat = tf.reshape(pool2, [-1, height * width * depth])
  with tf.variable_scope('local3'):
    local3 = tf.nn.relu(_dense(flat, 384, stddev=0.04, bias=0.1, wd=0.004))
    _activation_summary(local3)
  with tf.variable_scope('local4'):
    local4 = tf.nn.relu(_dense(local3, 192, stddev=0.04, bias=0.1, wd=0.004))
    _activation_summary(local4)
  with tf.variable_scope('softmax_linear'):
    logits = _dense(
      _leave_compute_type(local4),
      NUM_CLASSES,
      stddev=1 / 192.0,
      bias=0.0,
      wd=None,
    )
    _activation_summary(logits)
  return logits


def loss(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
  """Adds the cross entropy to the collection 'losses' and sums that up.

  Args:
    logits: float32 [batch, 10].
    labels: integers [batch], in 0..9.

  Returns:
    The total loss, float32 []: the batch's mean cross entropy and the weight
    decays.
  """
  cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(
    labels=labels, logits=logits, name='cross_entropy_per_example'
  )
  tf.add_to_collection(
    'losses', tf.reduce_mean(cross_entropy, name='cross_entropy')
  )
  return tf.add_n(tf.get_collection('losses'), name='total_loss')


def train(total_loss: tf.Tensor, global_step: tf.Variable) -> tf.Operation:
  """Builds one step of training, for batches of `--batch_size`.

  Args:
    total_loss: float32 [], from `loss`.
    global_step: integer [], counts the steps.

  Returns:
    The operation that updates the variables, then their moving averages.
  """
  rate = learning_rate(global_step, FLAGS.batch_size)
  optimizer = tf.train.GradientDescentOptimizer(rate)
  gradients = optimizer.compute_gradients(total_loss)
  with tf.control_dependencies([average_losses(total_loss)]):
    return apply_gradients(optimizer, gradients, global_step)


def average_losses(total_loss: tf.Tensor) -> tf.Operation:
  """Summarizes each loss and its moving average (decay 0.9).

  The averages start at the first losses, and again so when training resumes:
  they are not part of a checkpoint, nor of any collection of variables.

  Args:
    total_loss: float32 [].

  Returns:
    The operation that updates the averages.
  """
  losses = [*tf.get_collection('losses'), total_loss]
  values = tf.stack(losses)
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
  for value, average in zip(losses, tf.unstack(update), strict=True):
    tag = re.sub(f'{TOWER_NAME}_[0-9]*/', '', value.op.name)
    _scalar_summary(f'{tag} (raw)', value)
    _scalar_summary(tag, average)
  return update.op


def learning_rate(
  global_step: tf.Variable, examples_per_step: int
) -> tf.Tensor:
  """Returns the step's learning rate, float32 [], and summarizes it.

  0.1 * 0.1^floor(global_step / decay_steps), where decay_steps takes 350
  epochs.

  Args:
    global_step: integer [], number of the step.
    examples_per_step: number of images that each step takes.
  """
  steps_per_epoch = NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN / examples_per_step
  rate = tf.train.exponential_decay(
    INITIAL_LEARNING_RATE,
    global_step,
    decay_steps=int(steps_per_epoch * NUM_EPOCHS_PER_DECAY),
    decay_rate=LEARNING_RATE_DECAY_FACTOR,
    staircase=True,
  )
  _scalar_summary('learning_rate', rate)
  return rate


def apply_gradients(
  optimizer: tf.train.Optimizer,
  gradients: list[tuple[tf.Tensor, tf.Variable]],
  global_step: tf.Variable,
) -> tf.Operation:
  """Lets the optimizer update the variables; then averages them.

  The average of a variable is `d * average + (1 - d) * variable`, where
  d = min(0.9999, (1 + step) / (10 + step)) and variable and step are those
  after the update.

  Args:
    optimizer: what updates.
    gradients: (gradient, variable) pairs, from `compute_gradients`.
    global_step: integer [], grows by one.

  Returns:
    The operation that does all of this.
  """
  for gradient, variable in gradients:
    _histogram_summary(variable.op.name, variable)
    if gradient is not None:
      _histogram_summary(f'{variable.op.name}/gradients', gradient)
  with tf.control_dependencies([optimizer.apply_gradients(gradients)]):
    # The sum is used, not global_step: graph optimization may merge two reads
    # of one of TF1's reference variables, across what lies between them.
    step = tf.assign_add(global_step, 1)
    averages = tf.train.ExponentialMovingAverage(
      MOVING_AVERAGE_DECAY, num_updates=step
    )
    return averages.apply(tf.trainable_variables())


def local_response_normalization(x: tf.Tensor, name: str) -> tf.Tensor:
  """Damps each activation by its neighbours in depth, as `tf.nn.lrn` does.

  y = x / s^0.75 with s = 1 + (0.001 / 9) * (sum of x^2 over the channel and the
  four on each side), from Krizhevsky, Sutskever and Hinton, "ImageNet
  Classification with Deep Convolutional Neural Networks" (2012), section 3.3.

  `tf.nn.lrn` raises each element to a power and finds each sum in a loop. Here
  the sums of all channels are one product with a band matrix of zeros and ones,
  and the power is made of two reciprocal square roots.

  Args:
    x: [batch, height, width, channels], float32, float16 or bfloat16; the sums
      are made in float32.
    name: the name scope.

  Returns:
    y, of the shape and type of x.
  """
  radius, bias, alpha = 4, 1.0, 0.001 / 9.0  # and beta = 0.75
  channels = x.shape.as_list()[-1]
  positions = np.arange(channels)
  band = np.abs(positions - positions[:, np.newaxis]) <= radius

  @tf.custom_gradient
  def normalize(x):
    def sum_neighbours(values):
      rows = tf.reshape(values, [-1, channels])
      rows = tf.matmul(rows, band.astype(np.float32))
      return tf.reshape(rows, tf.shape(values))

    x32 = tf.cast(x, tf.float32)
    root = tf.math.rsqrt(bias + alpha * sum_neighbours(tf.square(x32)))
    scale = root * tf.sqrt(root)  # s^-0.75

    def gradient(dy):
      # dx = scale * dy - 2 * 0.75 * alpha * x * sums of (dy * x * scale / s)
      scaled = tf.cast(dy, tf.float32) * scale
      sums = sum_neighbours(scaled * x32 * tf.square(root))
      return tf.cast(scaled - 1.5 * alpha * x32 * sums, x.dtype)

    return tf.cast(x32 * scale, x.dtype), gradient

  with tf.name_scope(name):
    return normalize(x)


def _convolution(x: tf.Tensor, channels: int, bias: float) -> tf.Tensor:
  """Convolves with 5x5 kernels and rectifies, in the open variable scope."""
  shape = [5, 5, x.shape.as_list()[-1], channels]
  kernel = _variable_with_weight_decay('weights', shape, stddev=0.05, wd=None)
  biases = _variable('biases', [channels], tf.constant_initializer(bias))
  x = tf.nn.conv2d(
    x, _enter_compute_type(kernel, x.dtype), strides=1, padding='SAME'
  )
  x = tf.nn.relu(tf.nn.bias_add(x, _enter_compute_type(biases, x.dtype)))
  _activation_summary(x)
  return x


def _dense(
  x: tf.Tensor, units: int, stddev: float, bias: float, wd: float | None
) -> tf.Tensor:
  """Multiplies [batch, n] with weights [n, units] and adds biases."""
  shape = [x.shape.as_list()[-1], units]
  weights = _variable_with_weight_decay('weights', shape, stddev, wd)
  biases = _variable('biases', [units], tf.constant_initializer(bias))
  x = tf.matmul(x, _enter_compute_type(weights, x.dtype))
  return tf.nn.bias_add(x, _enter_compute_type(biases, x.dtype))


def _max_pool(x: tf.Tensor, name: str) -> tf.Tensor:
  return tf.nn.max_pool2d(x, ksize=3, strides=2, padding='SAME', name=name)


def _variable(
  name: str, shape: list[int], initializer: tf.keras.initializers.Initializer
) -> tf.Variable:
  """Gets a float32 variable; among several towers, on the CPU."""
  in_tower = re.search(
    f'{TOWER_NAME}_[0-9]+', tf.get_default_graph().get_name_scope()
  )
  with tf.device('/cpu:0' if in_tower else None):
    return tf.get_variable(
      name, shape, tf.float32, initializer, use_resource=True
    )


def _variable_with_weight_decay(
  name: str, shape: list[int], stddev: float, wd: float | None
) -> tf.Variable:
  """Gets a variable that starts truncated-normal and may decay.

  Args:
    name: the variable's name.
    shape: its shape.
    stddev: standard deviation of its initial values before truncation.
    wd: None, or how much of its l2_loss goes into the collection 'losses'.
  """
  variable = _variable(
    name, shape, tf.truncated_normal_initializer(stddev=stddev)
  )
  if wd is not None:
    weight_decay = tf.multiply(tf.nn.l2_loss(variable), wd, name='weight_loss')
    tf.add_to_collection('losses', weight_decay)
  return variable


def _enter_compute_type(variable: tf.Variable, dtype: tf.DType) -> tf.Tensor:
  """Casts a float32 variable to `dtype`; see `_leave_compute_type`."""

  @tf.custom_gradient
  def cast(value):
    def gradient(dy):
      return tf.cast(dy, tf.float32) / _LOSS_SCALE

    return tf.cast(value, dtype), gradient

  value = tf.convert_to_tensor(variable)
  return cast(value) if dtype == tf.float16 else tf.cast(value, dtype)


def _leave_compute_type(x: tf.Tensor) -> tf.Tensor:
  """Casts activations to float32.

  Small gradients vanish in float16. So between here, where they come in, and
  `_enter_compute_type`, where they go out to the variables, they are
  _LOSS_SCALE times as large (Micikevicius et al., "Mixed Precision Training",
  2018, section 3.2). No caller has to know.
  """

  @tf.custom_gradient
  def cast(value):
    def gradient(dy):
      return tf.cast(dy * _LOSS_SCALE, value.dtype)

    return tf.cast(value, tf.float32), gradient

  return cast(x) if x.dtype == tf.float16 else tf.cast(x, tf.float32)


def _activation_summary(x: tf.Tensor) -> None:
  """Summarizes a layer's activations and how many of them are zero."""
  layer = tf.get_variable_scope().name
  _histogram_summary(f'{layer}/activations', x)
  _scalar_summary(f'{layer}/sparsity', tf.nn.zero_fraction(x))


def _histogram_summary(tag: str, values: tf.Tensor) -> None:
  with tf.device('/cpu:0'):
    summary = tf.raw_ops.HistogramSummary(tag=_unused_tag(tag), values=values)
  tf.add_to_collection(tf.GraphKeys.SUMMARIES, summary)


def _scalar_summary(tag: str, value: tf.Tensor) -> None:
  with tf.device('/cpu:0'):
    summary = tf.raw_ops.ScalarSummary(tags=_unused_tag(tag), values=value)
  tf.add_to_collection(tf.GraphKeys.SUMMARIES, summary)


def _unused_tag(tag: str) -> str:
  """Appends '_1', '_2', ... to a tag that the graph has already.

  `tf.summary` makes tags out of operations' names: they would carry the tower's
  prefix, and a variable's histogram would be called 'conv1/weights_1'. Hence
  the plain operations, and this.
  """
  tags = tf.get_collection_ref('summary_tags')
  tags.append(tag)
  repeats = tags.count(tag) - 1
  return f'{tag}_{repeats}' if repeats else tag
