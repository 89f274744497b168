"""Classify pictures.

  python cifar10_predict.py PICTURE... [--top_k 3] [--json]

Each PICTURE is a file, a folder or a glob pattern. By default, the latest
checkpoint is used. To export a model, or to use an exported one:

  python cifar10_predict.py --export_dir DIR
  python cifar10_predict.py --saved_model DIR PICTURE...
"""

import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable

from cifar10_suite import cli

cli.quiet_tensorflow()

import numpy as np
import tensorflow.compat.v1 as tf

import cifar10
from cifar10_suite import (
  checkpoints,
  dataset,
  optimizers,
  pictures,
  runs,
  views,
)
from cifar10_suite.errors import UserError
from cifar10_suite.pictures import SIZE

_HERE = os.path.dirname(os.path.abspath(__file__))

cli.define_checkpoint_flags(os.path.join(_HERE, 'cifar10_train'))
tf.app.flags.DEFINE_string(
  'saved_model', None, 'Directory of an exported model to use.'
)
tf.app.flags.DEFINE_integer(
  'top_k', 3, 'Number of classes to show.', lower_bound=1
)
tf.app.flags.DEFINE_boolean(
  'recursive', False, 'Look into the sub-folders of folders, too.'
)
tf.app.flags.DEFINE_boolean('json', False, 'Print one JSON line per picture.')
tf.app.flags.DEFINE_string(
  'export_dir', None, 'New directory to export the model to; then exit.'
)
FLAGS = tf.app.flags.FLAGS

# Maps pictures, uint8 [n, 32, 32, 3], to probabilities, float32 [n, classes].
Network = Callable[[np.ndarray], np.ndarray]

_CLASS_NAMES = 'all_class_names'  # tensor in exported models


def main(arguments: list[str]) -> None:
  if FLAGS.export_dir:
    if arguments:
      raise UserError(
        f'--export_dir exports a model and takes no pictures: {arguments[0]}. '
        'Classify them with another command.'
      )
    export(FLAGS.checkpoint_dir, FLAGS.export_dir, int(FLAGS.num_views))
    return
  if not arguments:
    raise UserError('Name a picture, a folder or a pattern. See --help.')
  if FLAGS.saved_model:
    network, names = load_saved_model(FLAGS.saved_model)
  else:
    network, names = load_checkpoint(FLAGS.checkpoint_dir, int(FLAGS.num_views))
  failed = False
  found, skipped = pictures.find(arguments, FLAGS.recursive)
  for paths, images, problems in pictures.batches(found):
    for problem in problems:
      failed = True
      print(problem, file=sys.stderr)
    if paths:
      for path, probabilities in zip(paths, network(images), strict=True):
        print(describe(path, probabilities, names, FLAGS.top_k, FLAGS.json))
  if skipped:
    some = ', '.join(map(os.path.basename, skipped[:3]))
    print(
      f'Skipped files that are not pictures: {some}'
      + (f' and {len(skipped) - 3} more' if len(skipped) > 3 else ''),
      file=sys.stderr,
    )
  sys.exit(1 if failed else 0)


def describe(
  path: str,
  probabilities: np.ndarray,
  class_names: tuple[str, ...],
  top_k: int,
  as_json: bool,
) -> str:
  """Return the output for one picture.

  Args:
    path: path of the picture.
    probabilities: float [classes].
    class_names: name of each class.
    top_k: number of most likely classes to show.
    as_json: whether to format the output as one line of JSON.
  """
  top = np.argsort(-probabilities, kind='stable')[:top_k]
  names = [class_names[k] for k in top]
  if as_json:
    classes = [
      {'id': int(k), 'name': name, 'probability': float(probabilities[k])}
      for k, name in zip(top, names, strict=True)
    ]
    return json.dumps({'picture': path, 'classes': classes})
  width = max(10, *map(len, names))
  lines = [
    f'  {name:<{width}} {probabilities[k]:6.1%}'
    for k, name in zip(top, names, strict=True)
  ]
  return '\n'.join([path, *lines])


def predict(images: tf.Tensor, num_views: int, num_classes: int) -> tf.Tensor:
  """Build the prediction network.

  Args:
    images: uint8 [n, 32, 32, 3].
    num_views: number of windows per image to average over: 1, 2 or 10.
    num_classes: number of classes.

  Returns:
    Probabilities, float32 [n, num_classes].
  """
  windows = views.cut(images, cifar10.IMAGE_SIZE, num_views)
  logits = cifar10.inference(
    tf.image.per_image_standardization(windows), num_classes=num_classes
  )
  return tf.exp(views.average(logits, num_views))


def restore(checkpoint_dir: str) -> tuple[tf.Session, str]:
  """Restore the moving averages of the latest checkpoint.

  Args:
    checkpoint_dir: directory of the checkpoints, or path of one of them.

  Returns:
    session: a session with the variables.
    checkpoint: path and step of the checkpoint, for messages.

  Raises:
    CheckpointError: if there is no checkpoint, or it does not match the graph.
  """
  variables = optimizers.variables_to_restore()
  found = checkpoints.newest_good(checkpoint_dir, variables)
  if found is None:
    raise checkpoints.CheckpointError(
      f'No checkpoint file found in {cli.short_path(checkpoint_dir)}. '
      'Train first: python cifar10_train.py'
    )
  path, step = found
  session = tf.Session()
  tf.train.Saver(variables).restore(session, path)
  return session, f'{cli.short_path(path)} (step {step})'


def load_checkpoint(
  checkpoint_dir: str, num_views: int
) -> tuple[Network, tuple[str, ...]]:
  """Load network and class names from a checkpoint, as `restore` does.

  Raises:
    CheckpointError: if there is no usable checkpoint.
  """
  names = runs.class_names(checkpoints.directory_of(checkpoint_dir))
  with tf.Graph().as_default():
    images = tf.placeholder(tf.uint8, [None, SIZE, SIZE, 3])
    probabilities = predict(images, num_views, len(names))
    session, checkpoint = restore(checkpoint_dir)
  # Not among the results, which programs may read.
  print(f'Using {checkpoint}.', file=sys.stderr)
  return lambda batch: session.run(probabilities, {images: batch}), names


def load_saved_model(directory: str) -> tuple[Network, tuple[str, ...]]:
  """Load network and class names of an exported model.

  Raises:
    UserError: if the directory contains no exported model.
  """
  if not tf.saved_model.contains_saved_model(directory):
    raise UserError(f'There is no exported model in {directory}.')
  session = tf.Session(graph=tf.Graph())
  model = tf.saved_model.loader.load(
    session, [tf.saved_model.tag_constants.SERVING], directory
  )
  signature = model.signature_def['serving_default']
  images = signature.inputs['images'].name
  probabilities = signature.outputs['probabilities'].name
  try:
    names = session.run(f'{_CLASS_NAMES}:0')
    class_names = tuple(name.decode() for name in names)
  except (KeyError, ValueError):  # exported by an earlier version
    class_names = tuple(dataset.CLASS_NAMES)
  return lambda batch: session.run(probabilities, {images: batch}), class_names


def export(checkpoint_dir: str, export_dir: str, num_views: int) -> None:
  """Export the latest checkpoint as a SavedModel.

  The signature 'serving_default' takes `images`, uint8 [n, 32, 32, 3]; the
  signature 'encoded' takes `encoded`, n strings with the contents of PNG or
  JPEG files. Both return `class_ids` (int64 [n]), `class_names` (string [n])
  and `probabilities` (float32 [n, classes]).

  Args:
    checkpoint_dir: directory of the checkpoints, or path of one of them.
    export_dir: directory to create.
    num_views: number of windows per picture to average over: 1, 2 or 10.

  Raises:
    CheckpointError: if there is no usable checkpoint.
    UserError: if `export_dir` already exists or cannot be created.
  """
  if os.path.exists(export_dir):
    raise UserError(
      f'--export_dir {export_dir} already exists: name a new directory.'
    )
  temporary = f'{export_dir.rstrip("/")}.{secrets.token_hex(4)}.tmp'
  class_names = runs.class_names(checkpoints.directory_of(checkpoint_dir))
  with tf.Graph().as_default():
    names = tf.constant(class_names, name=_CLASS_NAMES)
    images = tf.placeholder(tf.uint8, [None, SIZE, SIZE, 3], 'images')
    encoded = tf.placeholder(tf.string, [None], 'encoded')
    decoded = tf.map_fn(_decode, encoded, tf.uint8)
    signatures = {
      'serving_default': _signature('images', images, images, num_views, names),
      'encoded': _signature('encoded', encoded, decoded, num_views, names),
    }
    try:
      session, _ = restore(checkpoint_dir)
      with session:
        builder = tf.saved_model.Builder(temporary)
        builder.add_meta_graph_and_variables(
          session, [tf.saved_model.tag_constants.SERVING], signatures
        )
        builder.save()
      os.replace(temporary, export_dir)
    except (OSError, tf.errors.OpError) as error:
      raise UserError(
        f'Cannot write to --export_dir {export_dir}: {error}'
      ) from error
    finally:
      shutil.rmtree(temporary, ignore_errors=True)
  print(f'Exported to {cli.short_path(export_dir)}.')


def _decode(encoded: tf.Tensor) -> tf.Tensor:
  """Decode the contents of a picture file into uint8 [32, 32, 3].

  Crops and resizes like `pictures.read_picture`.
  """
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
  name: str,
  argument: tf.Tensor,
  images: tf.Tensor,
  num_views: int,
  class_names: tf.Tensor,
) -> object:
  """Return the signature of a prediction with input `argument`."""
  with tf.variable_scope(tf.get_variable_scope(), reuse=tf.AUTO_REUSE):
    probabilities = predict(images, num_views, class_names.shape[0])
  ids = tf.argmax(probabilities, axis=1)
  return tf.saved_model.predict_signature_def(
    {name: argument},
    {
      'class_ids': ids,
      'class_names': tf.gather(class_names, ids),
      'probabilities': probabilities,
    },
  )


if __name__ == '__main__':
  cli.run(main, takes_arguments=True)
