"""Classify pictures.

  python cifar10_predict.py PICTURE... [--top_k 3] [--json]

Each PICTURE is a file, a folder or a glob pattern. By default, the latest
checkpoint in cifar10_train is used, or else the pretrained network. To export
a model, or to use an exported one:

  python cifar10_predict.py --export_dir DIR
  python cifar10_predict.py --saved_model DIR PICTURE...

Exports for other runtimes: --export_tflite FILE [--quantize int8], and
--export_onnx FILE.
"""

import contextlib
import json
import os
import sys

from cifar10_suite import loading

loading.load_tensorflow()

import numpy as np
import tensorflow.compat.v1 as tf

import cifar10
from cifar10_suite import (
  checkpoints,
  cli,
  commands,
  dataset,
  export_formats,
  exports,
  files,
  optimizers,
  pictures,
  runs,
  views,
)
from cifar10_suite.errors import UserError
from cifar10_suite.pictures import SIZE

_HERE = os.path.dirname(os.path.abspath(__file__))

cli.define_checkpoint_flags()
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
  'export_dir', None, 'New directory for a SavedModel; then exit.'
)
tf.app.flags.DEFINE_string(
  'export_tflite', None, 'New file for a TFLite model; then exit.'
)
tf.app.flags.DEFINE_enum(
  'quantize',
  None,
  ['float16', 'int8'],
  'Type of the weights in a TFLite model; float32 by default.',
)
tf.app.flags.DEFINE_string(
  'export_onnx', None, 'New file for an ONNX model; then exit.'
)
FLAGS = tf.app.flags.FLAGS

_PRETRAINED = os.path.join(_HERE, 'pretrained')
_NUM_COMPARED = 2000  # test images that exported models predict, too


def main(arguments: list[str]) -> None:
  targets = {
    f'--{name}': FLAGS[name].value
    for name in ('export_dir', 'export_tflite', 'export_onnx')
    if FLAGS[name].value
  }
  if FLAGS.quantize and '--export_tflite' not in targets:
    raise UserError('--quantize is for --export_tflite.')
  for name in ('checkpoint_dir', 'num_views', *targets):
    name = name.removeprefix('--')
    if FLAGS.saved_model and FLAGS[name].present:
      raise UserError(f'--saved_model does not go together with --{name}.')
  for directory in (FLAGS.export_dir, FLAGS.saved_model):
    if directory:
      files.refuse_pattern(directory, 'Rename the directory.')
  if targets:
    if arguments:
      raise UserError(
        f'{next(iter(targets))} exports a model and takes no pictures: '
        f'{arguments[0]}. Classify them with another command.'
      )
    export(checkpoint_dir(), int(FLAGS.num_views), targets, FLAGS.quantize)
    return
  if not arguments:
    raise UserError('Name a picture, a folder or a pattern. See --help.')
  if FLAGS.saved_model:
    network, names = export_formats.load_saved_model(FLAGS.saved_model)
  else:
    network, names, _ = load_checkpoint(checkpoint_dir(), int(FLAGS.num_views))
  found, skipped, problems = pictures.find(arguments, FLAGS.recursive)
  failed = bool(problems)
  for problem in problems:
    print(problem, file=sys.stderr)
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
      f'Skipped what is not a picture: {some}'
      + (f' and {len(skipped) - 3} more' if len(skipped) > 3 else ''),
      file=sys.stderr,
    )
  sys.exit(1 if failed else 0)


def checkpoint_dir() -> str:
  """Return `--checkpoint_dir`, or the directory of the pretrained network.

  The latter is the default if there is no checkpoint in the default directory.
  """
  directory = FLAGS.checkpoint_dir
  if (
    FLAGS['checkpoint_dir'].present
    or checkpoints.saved_in(directory)
    or checkpoints.latest(directory)  # whose name may be without a step
  ):
    return directory
  print(
    f'{commands.short_path(directory)} has no checkpoint: using the pretrained '
    'network.',
    file=sys.stderr,
  )
  return _PRETRAINED


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


def predict(
  images: tf.Tensor, num_views: int, num_classes: int, portable: bool = False
) -> tf.Tensor:
  """Build the prediction network.

  Args:
    images: uint8 [n, 32, 32, 3].
    num_views: number of windows per image to average over, as in `views.cut`.
    num_classes: number of classes.
    portable: as for `cifar10.inference`.

  Returns:
    Probabilities, float32 [n, num_classes].
  """
  windows = views.cut(images, cifar10.IMAGE_SIZE, num_views)
  logits = cifar10.inference(
    tf.image.per_image_standardization(windows),
    num_classes=num_classes,
    portable=portable,
  )
  return tf.exp(views.average(logits, num_views))


def restore(checkpoint_dir: str) -> tuple[tf.Session, str, int]:
  """Restore the moving averages of the latest checkpoint.

  Args:
    checkpoint_dir: directory of the checkpoints, or path of one of them.

  Returns:
    session: a session with the variables.
    path: path of the checkpoint.
    step: step of the checkpoint.

  Raises:
    CheckpointError: if there is no checkpoint, or it does not match the graph,
      or is deleted meanwhile.
  """
  variables = optimizers.variables_to_restore()
  # Not among the results, which programs may read.
  with contextlib.redirect_stdout(sys.stderr):
    found = checkpoints.newest_good(checkpoint_dir, variables)
  if found is None:
    raise checkpoints.CheckpointError(
      f'No checkpoint file found in {commands.short_path(checkpoint_dir)}. '
      f'Train first: {commands.of("cifar10_train.py")}'
    )
  path, step = found
  checkpoints.refuse_pattern(path)
  session = tf.Session()
  with checkpoints.reading(path):  # which may be deleted at any time
    tf.train.Saver(variables).restore(session, path)
  return session, path, step


def load_checkpoint(
  checkpoint_dir: str, num_views: int
) -> tuple[export_formats.Network, tuple[str, ...], str]:
  """Load a network from a checkpoint, as `restore` does.

  Returns:
    network: the network.
    class_names: name of each class.
    path: path of the checkpoint.

  Raises:
    CheckpointError: if there is no usable checkpoint.
  """
  names = runs.class_names(checkpoints.directory_of(checkpoint_dir))
  with tf.Graph().as_default():
    images = tf.placeholder(tf.uint8, [None, SIZE, SIZE, 3])
    probabilities = predict(images, num_views, len(names))
    session, path, step = restore(checkpoint_dir)
  print(f'Using {commands.short_path(path)} (step {step}).', file=sys.stderr)
  return lambda batch: session.run(probabilities, {images: batch}), names, path


def export(
  checkpoint_dir: str,
  num_views: int,
  targets: dict[str, str],
  quantize: str | None,
) -> None:
  """Export the latest checkpoint in one or more formats.

  Args:
    checkpoint_dir: directory of the checkpoints, or path of one of them.
    num_views: number of windows per picture, as in `views.cut`.
    targets: the path to create, by flag: '--export_dir', '--export_tflite' or
      '--export_onnx'.
    quantize: type of the weights in TFLite.

  Raises:
    CheckpointError: if there is no usable checkpoint.
    UserError: if a path already exists or cannot be created, if there are no
      test images to compare with, or if a model differs from the checkpoint.
  """
  for flag, path in targets.items():
    exports.refuse_existing(flag, path)
  if '--export_onnx' in targets:
    export_formats.require_onnx()
  network, names, checkpoint = load_checkpoint(checkpoint_dir, num_views)
  reference = predict_test_images(network, checkpoints.directory_of(checkpoint))
  model = export_formats.Model(
    lambda images: predict(images, num_views, len(names), portable=True),
    lambda: restore(checkpoint)[0],
    names,
  )
  formats = {
    '--export_dir': (
      lambda path: export_formats.write_saved_model(model, path),
      lambda path: export_formats.load_saved_model(path)[0],
    ),
    '--export_tflite': (
      lambda path: export_formats.write_tflite(model, path, quantize),
      export_formats.load_tflite,
    ),
    '--export_onnx': (
      lambda path: export_formats.write_onnx(model, path),
      export_formats.load_onnx,
    ),
  }
  for flag, path in targets.items():
    write, load = formats[flag]
    is_quantized = flag == '--export_tflite' and quantize is not None
    with loading.discarded_stderr():  # the converters log there
      comparison = exports.export(
        flag, path, write, load, reference, is_quantized
      )
    print(f'Exported to {commands.short_path(path)}: {comparison}.')


def predict_test_images(
  network: export_formats.Network, run_dir: str
) -> exports.Reference:
  """Predict the first test images of the data set in `--data_dir`.

  Args:
    network: the network.
    run_dir: directory of the run that trained it.

  Raises:
    UserError: if there are none, or if they are of other classes.
  """
  batches_dir = os.path.join(FLAGS.data_dir, dataset.BATCHES_DIR)
  runs.refuse_download_for_other_classes(run_dir, batches_dir)
  cifar10.maybe_download_and_extract()
  class_names = dataset.class_names(batches_dir)
  runs.refuse_other_classes(run_dir, class_names)
  paths = dataset.evaluation_files(True, batches_dir)
  labels = dataset.read_labels(paths, class_names)[:_NUM_COMPARED]
  images = dataset.read_images(True, batches_dir, np.arange(len(labels)))
  return exports.Reference(images, labels, exports.in_batches(network, images))


if __name__ == '__main__':
  cli.run(main, takes_arguments=True)
