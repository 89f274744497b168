"""Read CIFAR-10 into batches of images and labels.

  file -> records -> example queue -> distorted batches -> ready batches

Each read returns many records, and several batches are distorted at once, with
independent random numbers for each image. The example queue holds the raw bytes
of records, which take a quarter of the memory of float32 images.

A record has 3,073 bytes: the label, then the red, green and blue planes of the
image, each with 32x32 pixels in row order.
"""

import dataclasses

import tensorflow.compat.v1 as tf

from cifar10_suite import (
  compatibility,
  dataset,
  distortion,
  queue_runners,
  views,
)
from cifar10_suite.recipes import TUTORIAL

# Height and width of the network's input in pixels, from 8 to 32.
IMAGE_SIZE = 24

NUM_CLASSES = 10
NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = 50000
NUM_EXAMPLES_PER_EPOCH_FOR_EVAL = 10000

# Default strength of the distortions.
MAX_BRIGHTNESS = 63  # bound of the random number that is added
CONTRAST = TUTORIAL.contrast  # bounds of the random factor
CROP_MARGIN = TUTORIAL.crop_margin[0]  # 1: crops from anywhere in the image

_RECORDS_PER_READ = 200
_MAX_READERS = 5  # each reads a different file
# Shuffling draws from at least this fraction of an epoch.
_MIN_FRACTION_OF_EXAMPLES_IN_QUEUE = 0.4
_BATCHES_PER_RUN = 4  # distorted at once, which costs less
_READY_BATCHES = 2 * _BATCHES_PER_RUN  # keep steps from waiting for input


@dataclasses.dataclass
class CIFAR10Record:
  """Image and label of one record, from `read_cifar10`.

  Attributes:
    height, width, depth: 32, 32 and 3.
    key: string [], `<filename>:<record number>`.
    label: int32 [1], from 0.
    uint8image: uint8 [32, 32, 3].
  """

  height: int
  width: int
  depth: int
  key: tf.Tensor
  label: tf.Tensor
  uint8image: tf.Tensor


def read_cifar10(
  filename_queue: tf.QueueBase, *, num_classes: int | None = None
) -> CIFAR10Record:
  """Read the next record from the files in a filename queue.

  Args:
    filename_queue: queue of strings with the names of the files to read.
    num_classes: number of classes, NUM_CLASSES by default; higher labels are an
      error.

  Returns:
    A `CIFAR10Record`. Evaluating its tensors raises `OutOfRangeError` if the
    queue is closed and empty, and `InvalidArgumentError` at an unknown label.
  """
  with tf.device('/cpu:0'):
    key, value = _reader().read(filename_queue)
    record = _check_labels(key[tf.newaxis], value[tf.newaxis], num_classes)
    images, labels = _images_and_labels(record)
  return CIFAR10Record(
    dataset.HEIGHT, dataset.WIDTH, dataset.DEPTH, key, labels, images[0]
  )


def distorted_inputs(
  data_dir: str, batch_size: int
) -> tuple[tf.Tensor, tf.Tensor]:
  """Build endless shuffled batches of distorted training images.

  Args:
    data_dir: directory with the files `data_batch_1.bin` to `data_batch_5.bin`.
    batch_size: number of images per batch.

  Returns:
    images: float32 [batch_size, 24, 24, 3], standardized.
    labels: int32 [batch_size], in 0..9.

  Raises:
    DataError: if a file is missing or damaged (a subclass of ValueError).
  """
  (batch,) = distorted_batches(data_dir, batch_size, count=1)
  return batch


def distorted_batches(
  data_dir: str,
  batch_size: int,
  count: int,
  *,
  contrast: tuple[float, float] = CONTRAST,
  crop_margin: float | tf.Tensor = CROP_MARGIN,
  dtype: tf.DType = tf.float32,
  num_classes: int | None = None,
  num_examples: int | None = None,
  hold_out: int = 0,
  saturation: tuple[float, float] | None = None,
) -> list[tuple[tf.Tensor, tf.Tensor]]:
  """Build several training batches per step from one input pipeline.

  Args:
    data_dir, batch_size: as for `distorted_inputs`.
    count: number of batches per step.
    contrast, crop_margin, dtype, saturation: as for `distort`.
    num_classes: number of classes, NUM_CLASSES by default; higher labels are an
      error.
    num_examples: number of training images, by default
      NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN; shuffling draws from 40% of them.
    hold_out: number of images at the end of the training files to leave out.

  Returns:
    A list of `count` (images, labels) pairs, as from `distorted_inputs`, with
    images in the given dtype.

  Raises:
    DataError: as for `distorted_inputs`.
  """
  compatibility.require_graph_mode()
  _check_image_size()
  # Held out: the records of split_file from split_record on, and later files.
  filenames, split_file, split_record = dataset.split(data_dir, hold_out)
  if split_file:
    place = filenames.index(split_file)
    filenames = filenames[: place + 1 if split_record else place]
  bounds = (0, split_record or None)
  for name in filenames:
    tf.add_to_collection(dataset.DATA_FILES, name)
  min_queue_examples = int(
    (num_examples or NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN)
    * _MIN_FRACTION_OF_EXAMPLES_IN_QUEUE
  )
  print(
    f'Filling queue with {min_queue_examples} CIFAR images before starting to '
    'train.'
  )
  with (
    tf.device('/cpu:0'),
    tf.name_scope('input/'),
    queue_runners.on_own_threads(),
  ):
    filename_queue = tf.train.string_input_producer(filenames)
    # Several readers, so that even the first batch mixes files. They take
    # turns, since faster ones would get ahead.
    readers = range(min(len(filenames), _MAX_READERS))
    records = tf.train.shuffle_batch_join(
      [
        [_read_many(filename_queue, num_classes, split_file, bounds)]
        for _ in readers
      ],
      # More than fit into the queue, but a run takes them as they come.
      _BATCHES_PER_RUN * batch_size,
      capacity=min_queue_examples + 3 * batch_size,
      min_after_dequeue=min_queue_examples,
      enqueue_many=True,
      name='shuffle_batch',
    )
    decoded, labels = _decode(records)
    images = distort(decoded, contrast, crop_margin, dtype, saturation)
    queue = _ready_batches(images, labels, batch_size)
    batches = [queue.dequeue() for _ in range(count)]
  _image_summary(batches[0][0])
  return batches


def inputs(
  eval_data: bool,
  data_dir: str,
  batch_size: int,
  *,
  num_epochs: int | None = None,
  num_views: int = 1,
  num_classes: int | None = None,
  hold_out: int = 0,
) -> tuple[tf.Tensor, tf.Tensor]:
  """Build batches of undistorted images, in file order.

  Args:
    eval_data: whether to read the test file instead of the training files.
    data_dir: directory with the files `test_batch.bin`, `data_batch_1.bin` ...
    batch_size: number of images per batch.
    num_epochs: number of passes over the images; None for endless batches.
      After the last pass, whose final batch may be smaller, reading raises
      `OutOfRangeError`. Passes are counted in a local variable, which the
      caller must initialize.
    num_views: number of windows per image, as in `views.cut`.
    num_classes: number of classes, NUM_CLASSES by default; higher labels are an
      error.
    hold_out: if not 0, read this number of images from the end of the training
      files instead, whatever `eval_data` says.

  Returns:
    images: float32 [batch_size * num_views, 24, 24, 3], standardized.
    labels: int32 [batch_size], less than `num_classes`.
    With `num_epochs`, the static batch size is unknown.

  Raises:
    DataError: if a file is missing or damaged (a subclass of ValueError).
  """
  compatibility.require_graph_mode()
  _check_image_size()
  split_file, split_record = '', 0
  if hold_out:
    filenames, split_file, split_record = dataset.split(data_dir, hold_out)
    filenames = filenames[filenames.index(split_file) :]
  else:
    filenames = dataset.evaluation_files(eval_data, data_dir)
  bounds = (split_record, None)
  with tf.device('/cpu:0'), tf.name_scope('input/'):
    filename_queue = tf.train.string_input_producer(
      filenames, num_epochs=num_epochs, shuffle=False
    )
    batch = tf.train.batch(
      [_read_many(filename_queue, num_classes, split_file, bounds)],
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
  pixels: tf.Tensor,
  contrast: tuple[float, float] = CONTRAST,
  crop_margin: float | tf.Tensor = CROP_MARGIN,
  dtype: tf.DType = tf.float32,
  saturation: tuple[float, float] | None = None,
) -> tf.Tensor:
  """Apply a random crop, flip, brightness, contrast; standardize the images.

  Args:
    pixels: uint8 [n, 3, 32, 32], depth-major as in the files, or the bytes of
      records, [n, 3073], whose labels are skipped.
    contrast: bounds of the random contrast factor.
    crop_margin: maximum offset of a crop, a number or float32 [] from 0 (centre
      only) to 1 (anywhere in the image). If the margin is not a whole number of
      pixels, the outermost crops are less frequent.
    dtype: type of the result.
    saturation: bounds of a random saturation factor, applied before contrast;
      None leaves the saturation as it is.

  Returns:
    [n, 24, 24, 3]; the distortions of the images are independent.
  """
  count = pixels.shape.as_list()[0]
  count = tf.shape(pixels)[0] if count is None else count
  return distortion.apply(
    pixels,
    tf.random.uniform([count, distortion.NUM_RANDOM]),
    IMAGE_SIZE,
    # A copy on the CPU: with a GPU, XLA compiles only if all tensors are there.
    tf.identity(tf.cast(crop_margin, tf.float32)),
    MAX_BRIGHTNESS,
    saturation,
    contrast,
    dtype,
  )


def _check_image_size() -> None:
  if not 8 <= IMAGE_SIZE <= dataset.HEIGHT:
    raise dataset.DataError(
      f'IMAGE_SIZE is {IMAGE_SIZE} in cifar10_input.py. It must be from 8 to '
      f'{dataset.HEIGHT}: crops are cut out of images of '
      f'{dataset.HEIGHT}x{dataset.WIDTH} pixels.'
    )


def _reader() -> tf.FixedLengthRecordReader:
  return tf.FixedLengthRecordReader(record_bytes=dataset.RECORD_BYTES)


def _read_many(
  filename_queue: tf.QueueBase,
  num_classes: int | None,
  path: str = '',
  bounds: tuple[int, int | None] = (0, None),
) -> tf.Tensor:
  """Read up to _RECORDS_PER_READ records as strings [n].

  Args:
    filename_queue: queue of the names of the files to read.
    num_classes: number of classes, NUM_CLASSES by default; higher labels are an
      error.
    path: a file of which only some records are wanted.
    bounds: the first of these records, and the one after the last; None is the
      end of the file.
  """
  keys, records = _reader().read_up_to(filename_queue, _RECORDS_PER_READ)
  if path and bounds != (0, None):
    # A key is '<filename>:<record number>'.
    elsewhere = tf.not_equal(tf.strings.regex_replace(keys, r':\d+$', ''), path)
    number = tf.strings.to_number(
      tf.strings.regex_replace(keys, '^.*:', ''), tf.int64
    )
    first, end = bounds
    wanted = number >= first
    if end is not None:
      wanted &= number < end
    kept = tf.where(elsewhere | wanted)
    keys, records = tf.gather_nd(keys, kept), tf.gather_nd(records, kept)
  return _check_labels(keys, records, num_classes)


def _check_labels(
  keys: tf.Tensor, records: tf.Tensor, num_classes: int | None
) -> tf.Tensor:
  """Return records, strings [n]; running it fails at an unknown label."""
  num_classes = num_classes or NUM_CLASSES
  first_bytes = tf.strings.substr(records, 0, 1)
  labels = tf.reshape(tf.decode_raw(first_bytes, tf.uint8), [-1])
  # As int32, since num_classes may be 256.
  wrong = tf.where(tf.cast(labels, tf.int32) >= num_classes)
  check = tf.debugging.Assert(
    tf.equal(tf.size(wrong), 0),
    [
      f'{dataset.BAD_LABEL} {num_classes - 1}; <file>:<record> and label:',
      tf.gather_nd(keys, wrong),
      tf.gather_nd(labels, wrong),
    ],
  )
  with tf.control_dependencies([check]):
    return tf.identity(records)


def _decode(records: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  """Return the bytes of records, uint8 [n, 3073], and labels, int32 [n]."""
  decoded = tf.decode_raw(records, tf.uint8)
  decoded.set_shape([records.shape[0], dataset.RECORD_BYTES])
  return decoded, tf.cast(decoded[:, 0], tf.int32)


def _images_and_labels(records: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  """Decode records, strings [n], into images [n, 32, 32, 3] and labels."""
  decoded, labels = _decode(records)
  planes = distortion.planes_in(decoded)
  return tf.transpose(planes, [0, 2, 3, 1]), labels


def _ready_batches(
  images: tf.Tensor, labels: tf.Tensor, batch_size: int
) -> tf.QueueBase:
  """Return a queue of ready batches, so that steps do not wait for input.

  Args:
    images: [n, height, width, channels]; n is a multiple of `batch_size`.
    labels: int32 [n].
    batch_size: number of images per batch.
  """
  queue = tf.FIFOQueue(
    _READY_BATCHES,
    dtypes=[images.dtype, labels.dtype],
    shapes=[[batch_size, *images.shape[1:]], [batch_size]],
    name='ready_batches',
  )
  enqueue = queue.enqueue_many(
    [
      tf.reshape(images, [-1, batch_size, *images.shape[1:]]),
      tf.reshape(labels, [-1, batch_size]),
    ]
  )
  tf.train.add_queue_runner(tf.train.QueueRunner(queue, [enqueue]))
  return queue


def _image_summary(images: tf.Tensor) -> None:
  with tf.device('/cpu:0'), tf.name_scope(None):
    tf.summary.image('images', tf.cast(images, tf.float32))
