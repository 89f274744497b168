"""Says what is in a picture.

  python cifar10_predict.py PICTURE... [--top_k 3] [--json]

Pictures are files, folders or patterns. The network is that of the latest
checkpoint, or an exported one:

  python cifar10_predict.py --export_dir DIR
  python cifar10_predict.py --saved_model DIR PICTURE...
"""

import contextlib
import glob
import itertools
import json
import os
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator

import console  # first: it keeps TensorFlow's chatter off the console

# isort: split
import numpy as np
import PIL.Image
import PIL.ImageOps
import tensorflow.compat.v1 as tf

import cifar10
import cifar10_checkpoint
import cifar10_input
import download

_HERE = os.path.dirname(os.path.abspath(__file__))

tf.app.flags.DEFINE_string(
  'checkpoint_dir',
  os.path.join(_HERE, 'cifar10_train'),
  'Directory whose latest checkpoint to use.',
)
tf.app.flags.DEFINE_string(
  'saved_model', None, 'Directory of an exported model to use instead.'
)
tf.app.flags.DEFINE_integer(
  'top_k', 3, 'Number of classes to show.', lower_bound=1, upper_bound=10
)
tf.app.flags.DEFINE_boolean('json', False, 'Print a line of JSON a picture.')
tf.app.flags.DEFINE_enum(
  'num_views',
  '1',
  ['1', '2', '10'],
  'Windows of each picture to average over, as in evaluation.',
)
tf.app.flags.DEFINE_string(
  'export_dir', None, 'Export the network into this new directory, and end.'
)
FLAGS = tf.app.flags.FLAGS

SIZE = 32  # height and width that pictures are brought to
_MAX_PIXELS = 50_000_000  # of a picture; a larger one takes too much memory
_BATCH_SIZE = 128

# From pictures, uint8 [n, 32, 32, 3], to probabilities, float32 [n, 10].
Network = Callable[[np.ndarray], np.ndarray]


class PictureError(Exception):
  """A picture cannot be read; the message tells why."""


def main(arguments: list[str]) -> None:
  if FLAGS.export_dir:
    export(FLAGS.checkpoint_dir, FLAGS.export_dir, int(FLAGS.num_views))
    return
  if not arguments:
    sys.exit('Name a picture, a folder or a pattern. See --help.')
  if FLAGS.saved_model:
    network = load_saved_model(FLAGS.saved_model)
  else:
    network = load_checkpoint(FLAGS.checkpoint_dir, int(FLAGS.num_views))
  failed = False
  for paths, pictures, problems in batches(find_pictures(arguments)):
    for problem in problems:
      failed = True
      print(problem, file=sys.stderr)
    if paths:
      for path, probabilities in zip(paths, network(pictures), strict=True):
        print(describe(path, probabilities, FLAGS.top_k, FLAGS.json))
  sys.exit(1 if failed else 0)


def find_pictures(arguments: list[str]) -> Iterator[str]:
  """Yields the files that arguments stand for: files, folders, patterns.

  Of a folder, those that have the name of a format that Pillow reads.
  """
  extensions = PIL.Image.registered_extensions()
  for argument in arguments:
    if os.path.isdir(argument):
      names = sorted(os.listdir(argument))
      found = [
        os.path.join(argument, name)
        for name in names
        if os.path.splitext(name)[1].lower() in extensions
      ]
      yield from found or [argument]
    elif os.path.exists(argument):
      yield argument
    else:
      yield from sorted(glob.glob(argument)) or [argument]


def batches(
  paths: Iterator[str],
) -> Iterator[tuple[list[str], np.ndarray, list[str]]]:
  """Yields paths, pictures and problems, of some files at a time.

  Yields:
    paths: of the files that could be read.
    pictures: uint8 [n, 32, 32, 3], theirs.
    problems: a line for each other file.
  """
  paths = iter(paths)
  while some := list(itertools.islice(paths, _BATCH_SIZE)):
    good, pictures, problems = [], [], []
    for path in some:
      try:
        pictures.append(read_picture(path))
        good.append(path)
      except PictureError as error:
        problems.append(f'Cannot read {path}: {error}')
    yield good, np.array(pictures), problems


def read_picture(path: str) -> np.ndarray:
  """Reads a picture of any format, mode and size that Pillow knows.

  It is turned as its camera says, laid on white where it is transparent, and
  its central square is resized with antialiasing.

  Returns:
    uint8 [32, 32, 3]. A picture of 32 x 32 pixels keeps them as they are.

  Raises:
    PictureError: it cannot be read.
  """
  if os.path.isdir(path):
    raise PictureError('there are no pictures in this folder.')
  try:
    with _quiet_decoders(), PIL.Image.open(path) as image:
      if image.width * image.height > _MAX_PIXELS:
        raise PIL.Image.DecompressionBombError
      image.draft('RGB', (4 * SIZE, 4 * SIZE))  # reads a large JPEG smaller
      PIL.ImageOps.exif_transpose(image, in_place=True)
      if image.mode.startswith('I'):  # 16 bits
        image = PIL.Image.fromarray(np.uint8(np.array(image) // 256))
      mode = 'RGBA' if image.has_transparency_data else 'RGB'
      layer = PIL.ImageOps.fit(
        image.convert(mode), (SIZE, SIZE), PIL.Image.Resampling.LANCZOS
      ).convert('RGBA')
    white = PIL.Image.new('RGBA', layer.size, 'white')
    return np.array(PIL.Image.alpha_composite(white, layer).convert('RGB'))
  except (FileNotFoundError, PermissionError) as error:
    raise PictureError(f'{error.strerror}.') from error
  except PIL.UnidentifiedImageError as error:
    raise PictureError('it is no picture of a known format.') from error
  except (
    PIL.Image.DecompressionBombError,
    PIL.Image.DecompressionBombWarning,
  ) as error:
    raise PictureError(
      f'it has more than {_MAX_PIXELS // 10**6} million pixels.'
    ) from error
  except Exception as error:  # a damaged file makes decoders raise anything
    raise PictureError(f'it is damaged ({error}).') from error


@contextlib.contextmanager
def _quiet_decoders() -> Iterator[None]:
  """Leaves out their warnings; one of size is as good as an error."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    warnings.simplefilter('error', PIL.Image.DecompressionBombWarning)
    yield


def describe(
  path: str, probabilities: np.ndarray, top_k: int, as_json: bool
) -> str:
  """Returns what to print of a picture.

  Args:
    path: the picture's.
    probabilities: float [10].
    top_k: number of classes, the likeliest ones.
    as_json: whether to put it into a line of JSON.
  """
  top = np.argsort(-probabilities, kind='stable')[:top_k]
  names = [download.CLASS_NAMES[k] for k in top]
  if as_json:
    classes = [
      {'id': int(k), 'name': name, 'probability': float(probabilities[k])}
      for k, name in zip(top, names, strict=True)
    ]
    return json.dumps({'picture': path, 'classes': classes})
  lines = [
    f'  {name:<10} {probabilities[k]:6.1%}'
    for k, name in zip(top, names, strict=True)
  ]
  return '\n'.join([path, *lines])


def predict(images: tf.Tensor, num_views: int) -> tf.Tensor:
  """Builds the network for pictures.

  Args:
    images: uint8 [n, 32, 32, 3].
    num_views: windows of each to average over: 1, 2 or 10.

  Returns:
    Probabilities, float32 [n, 10].
  """
  views = cifar10_input.views(images, num_views)
  logits = cifar10.inference(tf.image.per_image_standardization(views))
  return tf.exp(cifar10.average_views(logits, num_views))


def restore(checkpoint_dir: str) -> tf.Session:
  """Returns a session with the averages of the latest checkpoint.

  Raises:
    CheckpointError: there is none, or it is not of the network in the graph.
  """
  variables = cifar10.variables_to_restore()
  found = cifar10_checkpoint.newest_good(checkpoint_dir, variables)
  if found is None:
    raise cifar10_checkpoint.CheckpointError(
      f'No checkpoint file found in {console.short_path(checkpoint_dir)}. '
      'Train first: python cifar10_train.py'
    )
  session = tf.Session()
  tf.train.Saver(variables).restore(session, found[0])
  return session


def load_checkpoint(checkpoint_dir: str, num_views: int) -> Network:
  """Returns the network of a directory's latest checkpoint.

  Raises:
    CheckpointError: there is none, or it cannot be used.
  """
  with tf.Graph().as_default():
    images = tf.placeholder(tf.uint8, [None, SIZE, SIZE, 3])
    probabilities = predict(images, num_views)
    session = restore(checkpoint_dir)
  return lambda pictures: session.run(probabilities, {images: pictures})


def load_saved_model(directory: str) -> Network:
  """Returns the network of an exported model.

  Raises:
    SystemExit: there is none in the directory.
  """
  if not tf.saved_model.contains_saved_model(directory):
    sys.exit(f'There is no exported model in {directory}.')
  session = tf.Session(graph=tf.Graph())
  model = tf.saved_model.loader.load(
    session, [tf.saved_model.tag_constants.SERVING], directory
  )
  signature = model.signature_def['serving_default']
  images = signature.inputs['images'].name
  probabilities = signature.outputs['probabilities'].name
  return lambda pictures: session.run(probabilities, {images: pictures})


def export(checkpoint_dir: str, export_dir: str, num_views: int) -> None:
  """Writes a SavedModel of a directory's latest checkpoint.

  Its signatures return of each picture `class_ids` (int64), `class_names`
  (string) and `probabilities` (float32 [10]). 'serving_default' takes `images`,
  uint8 [n, 32, 32, 3]; 'encoded' takes `encoded`, n strings, each a whole file
  in PNG or JPEG format.

  Args:
    checkpoint_dir: where the checkpoint is.
    export_dir: a directory that is not there yet.
    num_views: windows of each picture to average over: 1, 2 or 10.

  Raises:
    CheckpointError: there is no checkpoint, or it cannot be used.
    SystemExit: `export_dir` is there already, or cannot be made.
  """
  if os.path.exists(export_dir):
    sys.exit(f'--export_dir {export_dir} exists already: name a new directory.')
  temporary = f'{export_dir.rstrip("/")}.{secrets.token_hex(4)}.tmp'
  with tf.Graph().as_default():
    images = tf.placeholder(tf.uint8, [None, SIZE, SIZE, 3], 'images')
    encoded = tf.placeholder(tf.string, [None], 'encoded')
    decoded = tf.map_fn(_decode, encoded, tf.uint8)
    signatures = {
      'serving_default': _signature('images', images, images, num_views),
      'encoded': _signature('encoded', encoded, decoded, num_views),
    }
    try:
      with restore(checkpoint_dir) as session:
        builder = tf.saved_model.Builder(temporary)
        builder.add_meta_graph_and_variables(
          session, [tf.saved_model.tag_constants.SERVING], signatures
        )
        builder.save()
      os.replace(temporary, export_dir)
    except (OSError, tf.errors.OpError) as error:
      sys.exit(f'Cannot write to --export_dir {export_dir}: {error}')
    finally:
      shutil.rmtree(temporary, ignore_errors=True)
  print(f'Exported to {console.short_path(export_dir)}.')


def _decode(encoded: tf.Tensor) -> tf.Tensor:
  """Decodes a file's bytes into uint8 [32, 32, 3], as `read_picture` does."""
  image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
  shape = tf.shape(image)
  side = tf.minimum(shape[0], shape[1])
  top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
  square = image[top : top + side, left : left + side]
  resized = tf.compat.v2.image.resize(
    square, [SIZE, SIZE], method='lanczos3', antialias=True
  )
  return tf.saturate_cast(tf.round(resized), tf.uint8)


def _signature(
  name: str, argument: tf.Tensor, images: tf.Tensor, num_views: int
) -> object:
  """Returns the signature of a function from `argument` to predictions."""
  with tf.variable_scope(tf.get_variable_scope(), reuse=tf.AUTO_REUSE):
    probabilities = predict(images, num_views)
  ids = tf.argmax(probabilities, axis=1)
  return tf.saved_model.predict_signature_def(
    {name: argument},
    {
      'class_ids': ids,
      'class_names': tf.gather(tf.constant(download.CLASS_NAMES), ids),
      'probabilities': probabilities,
    },
  )


if __name__ == '__main__':
  console.run(main, takes_arguments=True)
