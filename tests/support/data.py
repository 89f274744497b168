"""A tiny made-up data set."""

import os

import numpy as np

from cifar10_suite import dataset


def write_records(path, labels, images):
  """Writes labels [n] and images [n, 32, 32, 3] as a data file."""
  planes = np.transpose(images, [0, 3, 1, 2]).reshape(len(labels), 3072)
  records = np.column_stack([labels, planes]).astype(np.uint8)
  records.tofile(path)


def make_data_set(data_dir, records_per_file=100):
  """Writes six data files whose classes differ in their picture."""
  rng = np.random.RandomState(seed=1)
  batches_dir = os.path.join(data_dir, dataset.BATCHES_DIR)
  os.makedirs(batches_dir)
  # Coarse ones: they look much the same wherever they are cropped.
  pictures = rng.randint(0, 256, [10, 4, 4, 3]).repeat(8, 1).repeat(8, 2)
  for name in dataset.FILE_SHA256:
    labels = rng.randint(0, 10, [records_per_file])
    noise = rng.randint(-20, 21, [records_per_file, 32, 32, 3])
    images = np.clip(pictures[labels] + noise, 0, 255)
    write_records(os.path.join(batches_dir, name), labels, images)
  return data_dir


# At the tutorial's rate, small batches of these pictures diverge now and then.
SMALL_RATE = '--learning_rate=0.01'
