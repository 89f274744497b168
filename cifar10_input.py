"""Reads CIFAR-10 into batches of images and labels.

  file -> records -> example queue -> (distorted) batch

Files are read many records at a time, and a whole batch is distorted at once,
each image by its own random numbers. The queues hold raw uint8 records, which
are a quarter of the size of float pictures.

A record is 3,073 bytes: the label, then the red, the green and the blue plane
of the image, each 32x32 pixels in row order.
"""

import dataclasses

import tensorflow.compat.v1 as tf

from cifar10_suite import dataset, views
from cifar10_suite.recipes import TUTORIAL

# The network sees crops of this height and width, 8 to 32 pixels.
IMAGE_SIZE = 24

NUM_CLASSES = 10
NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = 50000
NUM_EXAMPLES_PER_EPOCH_FOR_EVAL = 10000

# How far training distorts, unless it is told otherwise.
CONTRAST = TUTORIAL.contrast  # bounds of the factor
CROP_MARGIN = TUTORIAL.crop_margin[0]  # how far off the centre: anywhere

_RECORDS_PER_READ = 200
# Shuffling draws from at least this part of an epoch.
_MIN_FRACTION_OF_EXAMPLES_IN_QUEUE = 0.4
_READY_BATCHES = 4  # enough for a step never to wait for its input


@dataclasses.dataclass
class CIFAR10Record:
  """One example, as `read_cifar10` gives it.

  Attributes:
    height, width, depth: 32, 32 and 3.
    key: string [], `<filename>:<record number>`.
    label: int32 [1], in 0..9.
    uint8image: uint8 [32, 32, 3].
  """

  height: int
  width: int
  depth: int
  key: tf.Tensor
  label: tf.Tensor
  uint8image: tf.Tensor


def read_cifar10(filename_queue: tf.QueueBase) -> CIFAR10Record:
  """Reads the next record of the files that a queue names.

  Args:
    filename_queue: a queue of strings, the names of the files to read.

  Returns:
    A `CIFAR10Record`. Evaluating its tensors raises `OutOfRangeError` when the
    queue is closed and empty, `InvalidArgumentError` for a label above 9.
  """
  with tf.device('/cpu:0'):
    key, value = _reader().read(filename_queue)
    record = _decode(key[tf.newaxis], value[tf.newaxis])
    images, labels = _images_and_labels(record)
  return CIFAR10Record(
    dataset.HEIGHT, dataset.WIDTH, dataset.DEPTH, key, labels, images[0]
  )


def distorted_inputs(
  data_dir: str, batch_size: int
) -> tuple[tf.Tensor, tf.Tensor]:
  """Makes endless shuffled batches of distorted training images.

  Args:
    data_dir: directory of the files `data_batch_1.bin` ... `data_batch_5.bin`.
    batch_size: number of images per batch.

  Returns:
    images: float32 [batch_size, 24, 24, 3], standardized.
    labels: int32 [batch_size], in 0..9.

  Raises:
    DataError: a file is not there or is not whole (it is a ValueError).
  """
  (batch,) = distorted_batches(data_dir, batch_size, count=1)
  return batch


def distorted_batches(
  data_dir: str,
  batch_size: int,
  count: int,
  contrast: tuple[float, float] = CONTRAST,
  crop_margin: float | tf.Tensor = CROP_MARGIN,
) -> list[tuple[tf.Tensor, tf.Tensor]]:
  """Makes several batches a step out of one pipeline.

  Args:
    data_dir, batch_size: as for `distorted_inputs`.
    count: number of batches.
    contrast, crop_margin: as for `distort`.

  Returns:
    As many pairs of images and labels, as of `distorted_inputs`.

  Raises:
    DataError: as `distorted_inputs` does.
  """
  _check_image_size()
  filenames = dataset.data_files(data_dir, dataset.TRAINING_FILES)
  for name in filenames:
    tf.add_to_collection(dataset.DATA_FILES, name)
  min_queue_examples = int(
    NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN * _MIN_FRACTION_OF_EXAMPLES_IN_QUEUE
  )
  print(
    f'Filling queue with {min_queue_examples} CIFAR images before starting to '
    'train.'
  )
  with tf.device('/cpu:0'), tf.name_scope('input/'):
    filename_queue = tf.train.string_input_producer(filenames)
    # A reader for each file: shuffling mixes the files from the first batch on.
    records = tf.concat([_read_many(filename_queue) for _ in filenames], axis=0)
    batch = tf.train.shuffle_batch(
      [records],
      batch_size,
      capacity=min_queue_examples + 3 * batch_size,
      min_after_dequeue=min_queue_examples,
      enqueue_many=True,
    )
    images, labels = _images_and_labels(batch)
    queue = _ready_batches(distort(images, contrast, crop_margin), labels)
    batches = [queue.dequeue() for _ in range(count)]
  _image_summary(batches[0][0])
  return batches


def inputs(
  eval_data: bool,
  data_dir: str,
  batch_size: int,
  num_epochs: int | None = None,
  num_views: int = 1,
) -> tuple[tf.Tensor, tf.Tensor]:
  """Makes batches of undistorted images, in the order of the files.

  Args:
    eval_data: the test file if true, the training files if false.
    data_dir: directory of the files `test_batch.bin`, `data_batch_1.bin` ...
    batch_size: number of images per batch.
    num_epochs: None for batches without end. Otherwise each image comes this
      many times, the last batch may be smaller, then `OutOfRangeError` is
      raised; this counts in a local variable, which is to be initialized.
    num_views: number of windows of each image, as in `views.cut`.

  Returns:
    images: float32 [batch_size * num_views, 24, 24, 3], standardized.
    labels: int32 [batch_size], in 0..9.
    With `num_epochs`, the static batch size is unknown.

  Raises:
    DataError: a file is not there or is not whole (it is a ValueError).
  """
  _check_image_size()
  filenames = dataset.evaluation_files(eval_data, data_dir)
  with tf.device('/cpu:0'), tf.name_scope('input/'):
    filename_queue = tf.train.string_input_producer(
      filenames, num_epochs=num_epochs, shuffle=False
    )
    batch = tf.train.batch(
      [_read_many(filename_queue)],
      batch_size,
      capacity=_READY_BATCHES * batch_size,
      enqueue_many=True,
      allow_smaller_final_batch=num_epochs is not None,
    )
    images, labels = _images_and_labels(batch)
    images = tf.image.per_image_standardization(
      views.cut(images, IMAGE_SIZE, num_views)
    )
  _image_summary(images)
  return images, labels


def distort(
  images: tf.Tensor,
  contrast: tuple[float, float] = CONTRAST,
  crop_margin: float | tf.Tensor = CROP_MARGIN,
) -> tf.Tensor:
  """Crops, flips, brightens, contrasts and standardizes, at random.

  Args:
    images: uint8 [n, 32, 32, 3].
    contrast: bounds of the factor that scales the contrast.
    crop_margin: how far off the centre a crop may lie, a number or float32 []
      from 0 (nowhere but in the centre) to 1 (anywhere in the image). Where
      that ends within a pixel, the crops farthest off are rarer.

  Returns:
    float32 [n, 24, 24, 3]; each image is distorted independently.
  """
  images = random_crop_and_flip(images, crop_margin)
  images = random_brightness(images, max_delta=63)
  lower, upper = contrast
  images = random_contrast(images, lower=lower, upper=upper)
  return tf.image.per_image_standardization(images)


def random_crop_and_flip(
  images: tf.Tensor, margin: float | tf.Tensor = CROP_MARGIN
) -> tf.Tensor:
  """Cuts a random 24x24 window from each image, mirrored for every second one.

  Args:
    images: [n, height, width, channels].
    margin: as `crop_margin` of `distort`.

  Returns:
    float32 [n, 24, 24, channels], the very pixel values of the windows.
  """
  count = tf.shape(images)[0]
  height, width = images.shape.as_list()[1:3]
  top, bottom = _random_ends(count, height, margin)
  left, right = _random_ends(count, width, margin)
  mirrored = tf.random.uniform([count]) < 0.5
  # From right to left, boxes mirror.
  boxes = tf.stack(
    [
      top,
      tf.where(mirrored, right, left),
      bottom,
      tf.where(mirrored, left, right),
    ],
    axis=1,
  )
  return tf.image.crop_and_resize(
    images,
    boxes,
    box_indices=tf.range(count),
    crop_size=[IMAGE_SIZE, IMAGE_SIZE],
    method='nearest',
  )


def random_brightness(images: tf.Tensor, max_delta: float) -> tf.Tensor:
  """Adds to each image one number, uniform in [-max_delta, max_delta)."""
  return images + _random_per_image(images, -max_delta, max_delta)


def random_contrast(images: tf.Tensor, lower: float, upper: float) -> tf.Tensor:
  """Scales each image about its channels' means, by its own random factor.

  Args:
    images: float32 [n, height, width, channels].
    lower, upper: bounds of the uniformly distributed factor.

  Returns:
    (images - mean) * factor + mean, shaped as `images`; the mean is over
    height and width.
  """
  # Depth-major, where arithmetic with one number a channel is faster.
  planes = tf.transpose(images, [0, 3, 1, 2])
  means = tf.reduce_mean(planes, axis=[2, 3], keepdims=True)
  planes = (planes - means) * _random_per_image(planes, lower, upper) + means
  return tf.transpose(planes, [0, 2, 3, 1])


def _random_ends(
  count: tf.Tensor, length: int, margin: float | tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
  """Draws where crops begin and end along one axis, as `crop_and_resize` does.

  It counts from 0, the centre of the first pixel, to 1, that of the last one.
  """
  last = length - IMAGE_SIZE
  centre = last // 2
  before, after = margin * centre, margin * (last - centre)
  offsets = tf.random.uniform([count], -before - 0.5, after + 0.5)
  # Rounding may take a number at the very end of its interval beyond it.
  starts = tf.clip_by_value(centre + tf.round(offsets), 0, last)
  # A little inwards: a sample that rounding puts outside would be black.
  inwards = 0.001
  ends = starts + (IMAGE_SIZE - 1 - inwards)
  return (starts + inwards) / (length - 1), ends / (length - 1)


def _random_per_image(
  images: tf.Tensor, lower: float, upper: float
) -> tf.Tensor:
  return tf.random.uniform([tf.shape(images)[0], 1, 1, 1], lower, upper)


def _check_image_size() -> None:
  if not 8 <= IMAGE_SIZE <= dataset.HEIGHT:
    raise dataset.DataError(
      f'IMAGE_SIZE is {IMAGE_SIZE} in cifar10_input.py. It has to be from 8 to '
      f'{dataset.HEIGHT}: crops are cut out of images of '
      f'{dataset.HEIGHT}x{dataset.WIDTH} pixels.'
    )


def _reader() -> tf.FixedLengthRecordReader:
  return tf.FixedLengthRecordReader(record_bytes=dataset.RECORD_BYTES)


def _read_many(filename_queue: tf.QueueBase) -> tf.Tensor:
  """Reads uint8 [n, 3073], up to _RECORDS_PER_READ records of one file."""
  return _decode(*_reader().read_up_to(filename_queue, _RECORDS_PER_READ))


def _decode(keys: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
  """Turns n strings into uint8 [n, 3073], refusing labels above 9."""
  records = tf.decode_raw(values, tf.uint8)
  records.set_shape([keys.shape[0], dataset.RECORD_BYTES])
  labels = records[:, 0]
  wrong = labels >= NUM_CLASSES
  check = tf.debugging.Assert(
    tf.logical_not(tf.reduce_any(wrong)),
    [
      f'{dataset.BAD_LABEL}; <file>:<record> and label:',
      tf.boolean_mask(keys, wrong),
      tf.boolean_mask(labels, wrong),
    ],
  )
  with tf.control_dependencies([check]):
    return tf.identity(records)


def _images_and_labels(records: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  """Splits uint8 [n, 3073] into uint8 [n, 32, 32, 3] and int32 [n]."""
  labels = tf.cast(records[:, 0], tf.int32)
  planes = tf.reshape(
    records[:, 1:], [-1, dataset.DEPTH, dataset.HEIGHT, dataset.WIDTH]
  )
  images = tf.transpose(planes, [0, 2, 3, 1])
  images.set_shape(
    [records.shape[0], dataset.HEIGHT, dataset.WIDTH, dataset.DEPTH]
  )
  return images, labels


def _ready_batches(images: tf.Tensor, labels: tf.Tensor) -> tf.QueueBase:
  """Keeps a few batches ready, so that a step need not wait for the next."""
  queue = tf.FIFOQueue(
    _READY_BATCHES,
    dtypes=[images.dtype, labels.dtype],
    shapes=[images.shape, labels.shape],
    name='ready_batches',
  )
  enqueue = queue.enqueue([images, labels])
  tf.train.add_queue_runner(tf.train.QueueRunner(queue, [enqueue]))
  return queue


def _image_summary(images: tf.Tensor) -> None:
  with tf.device('/cpu:0'), tf.name_scope(None):
    tf.summary.image('images', images)
