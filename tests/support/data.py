"""A tiny artificial data set."""

import os

import numpy as np

from cifar10_suite import dataset


def random_images(count, seed=0):
  """Return uint8 [count, 32, 32, 3]."""
  shape = [count, 32, 32, 3]
  return np.random.RandomState(seed).randint(0, 256, shape, np.uint8)


def write_records(path, labels, images):
  """Write labels [n] and images [n, 32, 32, 3] to a data file."""
  planes = np.transpose(images, [0, 3, 1, 2]).reshape(len(labels), 3072)
  records = np.column_stack([labels, planes]).astype(np.uint8)
  records.tofile(path)


def write_class_names(batches_dir, names=tuple(dataset.CLASS_NAMES)):
  path = os.path.join(batches_dir, dataset.CLASS_NAMES_FILE)
  with open(path, 'w', encoding='utf-8') as file:
    file.writelines(f'{name}\n' for name in names)


def make_data_set(data_dir, records_per_file=100):
  """Write six data files with one noisy picture per class."""
  rng = np.random.RandomState(seed=1)
  batches_dir = os.path.join(data_dir, dataset.BATCHES_DIR)
  os.makedirs(batches_dir)
  # Coarse patterns look similar in all crops.
  pictures = rng.randint(0, 256, [10, 4, 4, 3]).repeat(8, 1).repeat(8, 2)
  write_class_names(batches_dir)
  for name in dataset.FILE_SHA256:
    labels = rng.randint(0, 10, [records_per_file])
    noise = rng.randint(-20, 21, [records_per_file, 32, 32, 3])
    images = np.clip(pictures[labels] + noise, 0, 255)
    write_records(os.path.join(batches_dir, name), labels, images)
  return data_dir


# With the tutorial's learning rate, small batches occasionally diverge.
SMALL_RATE = '--learning_rate=0.01'

# For tests of anything but the training itself. Two images are too few for XLA
# to compile their layers, which takes a third of a program's time.
TINY_BATCH = '--batch_size=2'

# Without it, the recipes fast and long measure compute types for a second.
IN_FLOAT32 = '--nouse_bf16'
