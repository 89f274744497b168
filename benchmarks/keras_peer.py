"""Measure Keras 3 and tf.data: same network, distortions and update."""

import os
import sys

import keras
import tensorflow as tf
from keras import layers
from timing import BATCH_SIZE, Progress


def distort(record):
  record = tf.io.decode_raw(record, tf.uint8)
  image = tf.transpose(tf.reshape(record[1:], [3, 32, 32]), [1, 2, 0])
  image = tf.image.random_crop(tf.cast(image, tf.float32), [24, 24, 3])
  image = tf.image.random_flip_left_right(image)
  image = tf.image.random_brightness(image, max_delta=63)
  image = tf.image.random_contrast(image, lower=0.2, upper=1.8)
  return tf.image.per_image_standardization(image), record[0]


def data_set(batches_dir):
  filenames = [
    os.path.join(batches_dir, f'data_batch_{i}.bin') for i in range(1, 6)
  ]
  records = tf.data.FixedLengthRecordDataset(filenames, 3073)
  records = records.repeat().shuffle(20000)
  examples = records.map(distort, num_parallel_calls=tf.data.AUTOTUNE)
  return examples.batch(BATCH_SIZE, drop_remainder=True).prefetch(4)


def local_response_normalization(x):
  # TensorFlow has no bfloat16 kernel for this on CPUs.
  norm = tf.nn.local_response_normalization(
    tf.cast(x, tf.float32), 4, 1.0, 0.001 / 9.0, 0.75
  )
  return tf.cast(norm, x.dtype)  # the layer's compute dtype


def norm():
  return layers.Lambda(local_response_normalization)


def convolution(bias):
  return layers.Conv2D(
    64,
    5,
    padding='same',
    activation='relu',
    kernel_initializer=keras.initializers.TruncatedNormal(stddev=0.05),
    bias_initializer=keras.initializers.Constant(bias),
  )


def dense(units, activation, stddev, bias, wd):
  return layers.Dense(
    units,
    activation,
    kernel_initializer=keras.initializers.TruncatedNormal(stddev=stddev),
    bias_initializer=keras.initializers.Constant(bias),
    kernel_regularizer=keras.regularizers.L2(wd / 2) if wd else None,
    dtype=None if wd else 'float32',
  )


class Report(keras.callbacks.Callback):
  """Callback that reports the progress."""

  def __init__(self):
    super().__init__()
    self._progress = Progress()

  def on_train_batch_end(self, batch, logs=None):
    self._progress.add_step()


def main(precision, mode, batches_dir):
  if precision == 'bf16':
    keras.mixed_precision.set_global_policy('mixed_bfloat16')
  model = keras.Sequential(
    [
      layers.Input([24, 24, 3]),
      convolution(0.0),
      layers.MaxPooling2D(3, 2, padding='same'),
      norm(),
      convolution(0.1),
      norm(),
      layers.MaxPooling2D(3, 2, padding='same'),
      layers.Flatten(),
      dense(384, 'relu', 0.04, 0.1, 0.004),
      dense(192, 'relu', 0.04, 0.1, 0.004),
      dense(10, None, 1 / 192, 0.0, None),
    ]
  )
  model.compile(
    keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9999),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    jit_compile=mode == 'compiled',
  )
  model.fit(
    data_set(batches_dir),
    steps_per_epoch=100000,
    callbacks=[Report()],
    verbose=0,
  )


if __name__ == '__main__':
  main(*sys.argv[1:])
