"""Pictures to convert, a small CIFAR-100, and the resulting data sets."""

import io
import os
import tarfile

import numpy as np
import PIL.Image

from cifar10_suite import cifar100, dataset
from support.data import random_images


def write_pictures(folder, images):
  """Write images as 0.png, 1.png and so on; return their paths."""
  os.makedirs(folder)
  paths = [os.path.join(folder, f'{i}.png') for i in range(len(images))]
  for path, image in zip(paths, images, strict=True):
    PIL.Image.fromarray(image).save(path)
  return paths


def write_classes(root, sizes, seed=0):
  """Write random pictures; return the images of each class.

  Args:
    root: folder to create.
    sizes: number of pictures by the name of the class.
    seed: number that determines the images.
  """
  images = random_images(sum(sizes.values()), seed)
  found, start = {}, 0
  for name, size in sizes.items():
    found[name] = images[start : start + size]
    write_pictures(os.path.join(root, name), found[name])
    start += size
  return found


def read_data_set(data_dir):
  """Return the contents of the files of a data set, by name.

  Fails if there is anything else in `data_dir`.
  """
  assert os.listdir(data_dir) == [dataset.BATCHES_DIR]
  batches_dir = os.path.join(data_dir, dataset.BATCHES_DIR)
  contents = {}
  for name in os.listdir(batches_dir):
    with open(os.path.join(batches_dir, name), 'rb') as file:
      contents[name] = file.read()
  return contents


def parts(data_dir):
  """Return class names, training records and test records of a data set."""
  contents = read_data_set(data_dir)
  names = contents.pop('batches.meta.txt').decode().split('\n')
  assert names.pop() == ''
  test = contents.pop('test_batch.bin')
  training = [
    contents.pop(f'data_batch_{i}.bin') for i in range(1, len(contents) + 1)
  ]
  return names, *(
    np.frombuffer(content, np.uint8).reshape(-1, 3073)
    for content in (b''.join(training), test)
  )


def images_of(records):
  """Return the images of records, uint8 [n, 32, 32, 3]."""
  return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def as_set(images):
  """Return the images' bytes as a sorted list, to compare without order."""
  return sorted(image.tobytes() for image in images)


def make_cifar100(per_class=2, seed=0):
  """Return the files of a small CIFAR-100, by name.

  The training file has `per_class` records of each class; the test file has
  one.
  """
  rng = np.random.RandomState(seed)

  def records(count):
    fine = rng.permutation(np.repeat(np.arange(100), count))
    pixels = rng.randint(0, 256, [100 * count, 3072])
    return np.column_stack([fine // 5, fine, pixels]).astype(np.uint8).tobytes()

  return {
    'coarse_label_names.txt': ''.join(f'c{i}\n' for i in range(20)).encode(),
    'fine_label_names.txt': ''.join(f'f{i:02}\n' for i in range(100)).encode(),
    'test.bin': records(1),
    'train.bin': records(per_class),
  }


def write_archive(path, files, folder=cifar100.BINARY_DIR):
  """Write files to a .tar.gz; their names are relative to `folder`."""
  with tarfile.open(path, 'w:gz') as tar:
    for name, content in files.items():
      info = tarfile.TarInfo(os.path.normpath(f'{folder}/{name}'))
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
