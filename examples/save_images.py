"""Data lesson: the images of CIFAR-10, and their distortions.

  python examples/save_images.py [--num_images 30] [--format png]

This program reads records through a filename queue, one image per run, and
saves the first ones as cifar10_data/raw/0.jpg, 1.jpg, ... With --contact_sheet,
it also writes one picture of all of them; with --distorted, a picture that
compares images with their distorted versions.
"""

import io
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

from cifar10_suite import commands, loading

loading.load_tensorflow()

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.PngImagePlugin
import tensorflow.compat.v1 as tf

import cifar10  # for --data_dir  # noqa: F401
import cifar10_input
import download
from cifar10_suite import cli, dataset, files

tf.app.flags.declare_key_flag('data_dir')
tf.app.flags.DEFINE_string(
  'output_dir', None, 'Directory to write to; raw/ in --data_dir by default.'
)
tf.app.flags.DEFINE_integer(
  'num_images', 30, 'Number of images to save.', lower_bound=1
)
tf.app.flags.DEFINE_enum(
  'format', 'jpg', ['jpg', 'png'], 'File format; png is lossless.'
)
tf.app.flags.DEFINE_boolean(
  'contact_sheet', False, 'Also write contact_sheet.png.'
)
tf.app.flags.DEFINE_boolean('distorted', False, 'Also write distorted.png.')
FLAGS = tf.app.flags.FLAGS

_COLUMNS = 10  # in the contact sheet
_DISTORTIONS = 8  # per image
_ROWS_DISTORTED = 8  # images in distorted.png
_SCALE = 2  # pixels of a sheet per pixel of an image
_CAPTION = 14  # height in pixels
_MARK = 'examples/save_images.py'


def main() -> None:
  output_dir = FLAGS.output_dir or os.path.join(FLAGS.data_dir, 'raw')
  cli.prepare_dir('--output_dir', output_dir)
  download.maybe_download_and_extract(FLAGS.data_dir)
  names = dataset.class_names(os.path.join(FLAGS.data_dir, dataset.BATCHES_DIR))
  images, labels = read_images(FLAGS.data_dir, FLAGS.num_images, len(names))
  for number, image in enumerate(images):
    name = f'{number}.{FLAGS.format}'
    path = os.path.join(output_dir, name)
    save(path, PIL.Image.fromarray(image))
  print(f'Saved {len(images)} images in {commands.short_path(output_dir)}.')
  captions = [names[label] for label in labels]
  if FLAGS.contact_sheet:
    path = os.path.join(output_dir, 'contact_sheet.png')
    save_sheet(path, images, captions, _COLUMNS)
  if FLAGS.distorted:
    path = os.path.join(output_dir, 'distorted.png')
    save_distorted(path, images[:_ROWS_DISTORTED], captions)


def read_images(
  data_dir: str, num_images: int, num_classes: int
) -> tuple[list[np.ndarray], list[int]]:
  """Read the first `num_images` records of the training files.

  Returns:
    images: uint8 [32, 32, 3] each.
    labels: integers, from 0.
  """
  filenames = dataset.evaluation_files(
    False, os.path.join(data_dir, dataset.BATCHES_DIR)
  )
  images, labels = [], []
  with tf.Graph().as_default(), tf.Session() as session:
    # A reader takes file names from a queue, and reads records of each file.
    filename_queue = tf.train.string_input_producer(
      filenames, num_epochs=1, shuffle=False
    )
    record = cifar10_input.read_cifar10(filename_queue, num_classes=num_classes)
    session.run(tf.local_variables_initializer())  # the epoch counter
    coordinator = tf.train.Coordinator()
    threads = tf.train.start_queue_runners(session, coordinator)
    try:
      while len(images) < num_images:
        # Fetch both in one run, to get the image and label of the same record.
        image, label = session.run([record.uint8image, record.label])
        images.append(image)
        labels.append(int(label[0]))
    except tf.errors.OutOfRangeError:
      print(f'There are only {len(images)} images.')
    finally:
      coordinator.request_stop()
      coordinator.join(threads)
  return images, labels


def save(path: str, picture: PIL.Image.Image, is_sheet: bool = False) -> None:
  """Write a picture; sheets contain a mark and may be overwritten."""
  text = PIL.PngImagePlugin.PngInfo()
  if is_sheet:
    text.add_text('Software', _MARK)
  file = io.BytesIO()
  kind = os.path.splitext(path)[1].lstrip('.').replace('jpg', 'jpeg')
  picture.save(file, kind, quality=95, pnginfo=text)
  is_ours = (lambda old: _MARK.encode() in old) if is_sheet else None
  files.write_unless_taken(path, file.getvalue(), is_ours)


def save_distorted(
  path: str, images: list[np.ndarray], captions: list[str]
) -> None:
  """Write a sheet that shows images next to distorted versions."""
  with tf.Graph().as_default(), tf.Session() as session:
    planes = np.transpose(images, [0, 3, 1, 2])
    copies = np.repeat(planes, _DISTORTIONS, axis=0)
    distorted = session.run(cifar10_input.distort(tf.constant(copies)))
  # Inputs of the network have mean 0 and standard deviation 1. For display, map
  # two standard deviations on either side to 0..255.
  visible = np.uint8(np.clip(distorted * 64 + 128, 0, 255))
  cells, texts = [], []
  for number, image in enumerate(images):
    start = number * _DISTORTIONS
    cells += [image, *visible[start : start + _DISTORTIONS]]
    texts += [captions[number], *[''] * _DISTORTIONS]
  save_sheet(path, cells, texts, 1 + _DISTORTIONS)


def save_sheet(
  path: str, images: list[np.ndarray], captions: list[str], columns: int
) -> None:
  """Write a sheet of enlarged images with captions, `columns` per row."""
  width, height = 36 * _SCALE, 34 * _SCALE + _CAPTION
  rows = -(-len(images) // columns)
  sheet = PIL.Image.new('RGB', (columns * width, rows * height), 'white')
  draw = PIL.ImageDraw.Draw(sheet)
  for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
    row, column = divmod(number, columns)
    size = len(image) * _SCALE
    picture = PIL.Image.fromarray(image).resize(
      (size, size), PIL.Image.Resampling.NEAREST
    )
    centre = column * width + width // 2
    sheet.paste(picture, (centre - size // 2, row * height + 2 * _SCALE))
    draw.text((centre, (row + 1) * height - 4), caption, 'black', anchor='ms')
  save(path, sheet, is_sheet=True)
  print(f'Wrote {commands.short_path(path)}.')


if __name__ == '__main__':
  cli.run(main)
