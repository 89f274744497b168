"""Models for use without this project: SavedModel, TFLite and ONNX.

Each format has a function that writes a network to a file or directory, and one
that loads it from there.
"""

import importlib
import json
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

from cifar10_suite import dataset
from cifar10_suite.errors import UserError
from cifar10_suite.pictures import SIZE

# Maps pictures, uint8 [n, 32, 32, 3], to probabilities, float32 [n, classes].
Network = Callable[[np.ndarray], np.ndarray]

_CLASS_NAMES = 'all_class_names'  # tensor in a SavedModel


class Model(NamedTuple):
  """A trained network to export.

  Attributes:
    predict: builds the network from pictures, uint8 [n, 32, 32, 3], to
      probabilities, float32 [n, classes]; only with operations that other
      runtimes know.
    restore: returns a session with the variables of the default graph.
    class_names: name of each class.
  """

  predict: Callable[[tf.Tensor], tf.Tensor]
  restore: Callable[[], tf.Session]
  class_names: tuple[str, ...]


def write_saved_model(model: Model, directory: str) -> None:
  """Write a SavedModel.

  The signature 'serving_default' takes `images`, uint8 [n, 32, 32, 3]; the
  signature 'encoded' takes `encoded`, n strings with the contents of PNG or
  JPEG files. Both return `class_ids` (int64 [n]), `class_names` (string [n])
  and `probabilities` (float32 [n, classes]).
  """
  with tf.Graph().as_default():
    names = tf.constant(model.class_names, name=_CLASS_NAMES)
    images = tf.placeholder(tf.uint8, [None, SIZE, SIZE, 3], 'images')
    encoded = tf.placeholder(tf.string, [None], 'encoded')
    decoded = tf.map_fn(_decode, encoded, tf.uint8)
    signatures = {
      'serving_default': _signature(model, 'images', images, images, names),
      'encoded': _signature(model, 'encoded', encoded, decoded, names),
    }
    with model.restore() as session:
      builder = tf.saved_model.Builder(directory)
      builder.add_meta_graph_and_variables(
        session, [tf.saved_model.tag_constants.SERVING], signatures
      )
      builder.save()


# AutoGraph would write its version to a temporary file, which would be left
# behind if the program is killed.
@tf.autograph.experimental.do_not_convert
def _decode(encoded: tf.Tensor) -> tf.Tensor:
  """Decode the contents of a picture file into uint8 [32, 32, 3].

  Crops and resizes like `pictures.read_picture`, but ignores transparency and
  EXIF rotation.
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
  model: Model,
  name: str,
  argument: tf.Tensor,
  images: tf.Tensor,
  class_names: tf.Tensor,
) -> object:
  """Return the signature of a prediction with input `argument`."""
  with tf.variable_scope(tf.get_variable_scope(), reuse=tf.AUTO_REUSE):
    probabilities = model.predict(images)
  ids = tf.argmax(probabilities, axis=1)
  return tf.saved_model.predict_signature_def(
    {name: argument},
    {
      'class_ids': ids,
      'class_names': tf.gather(class_names, ids),
      'probabilities': probabilities,
    },
  )


def load_saved_model(directory: str) -> tuple[Network, tuple[str, ...]]:
  """Load network and class names of a SavedModel.

  Raises:
    UserError: if the directory contains no model exported by this suite.
  """
  if not tf.saved_model.contains_saved_model(directory):
    raise UserError(f'There is no exported model in {directory}.')
  session = tf.Session(graph=tf.Graph())
  try:
    model = tf.saved_model.loader.load(
      session, [tf.saved_model.tag_constants.SERVING], directory
    )
    # Indexing would add what is missing.
    signature = dict(model.signature_def)['serving_default']
    images = dict(signature.inputs)['images'].name
    probabilities = dict(signature.outputs)['probabilities'].name
  # There is no such part or tag, or a file is missing or damaged.
  except (
    KeyError,
    RuntimeError,
    ValueError,
    OSError,
    tf.errors.OpError,
  ) as error:
    raise UserError(
      f'{directory} is not an export of this network, or damaged. Make one '
      'with --export_dir.'
    ) from error
  try:
    names = session.run(f'{_CLASS_NAMES}:0')
    class_names = tuple(name.decode() for name in names)
  except (KeyError, ValueError):  # exported by an earlier version
    class_names = tuple(dataset.CLASS_NAMES)
  return lambda batch: session.run(probabilities, {images: batch}), class_names


def write_tflite(model: Model, path: str, quantize: str | None) -> None:
  """Write a TFLite file from `images`, uint8 [n, 32, 32, 3], to probabilities.

  The class names are in `labels.txt`, one per line, which is attached to the
  file as a ZIP archive: the convention of TFLite's metadata.

  Args:
    model: the network.
    path: file to write.
    quantize: 'float16' or 'int8' to store the weights in this type; None for
      float32. With 'int8', convolutions and matrix products compute in it.
  """
  with tf.Graph().as_default():
    images, probabilities = _build(model)
    with model.restore() as session:
      converter = tf.lite.TFLiteConverter.from_session(
        session, [images], [probabilities]
      )
      if quantize:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
      if quantize == 'float16':
        converter.target_spec.supported_types = [tf.float16]
      content = converter.convert()
  with open(path, 'xb') as file:
    file.write(content)
  with zipfile.ZipFile(path, 'a') as archive:
    archive.writestr('labels.txt', ''.join(f'{n}\n' for n in model.class_names))


def load_tflite(path: str) -> Network:
  """Load the network of a TFLite file."""
  interpreter = tf.lite.Interpreter(path)
  (argument,) = interpreter.get_input_details()
  (result,) = interpreter.get_output_details()

  def network(images: np.ndarray) -> np.ndarray:
    interpreter.resize_tensor_input(argument['index'], images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(argument['index'], images)
    interpreter.invoke()
    return interpreter.get_tensor(result['index'])

  return network


def require_onnx() -> None:
  """Raise UserError if a package for ONNX is missing."""
  for name in ('tf2onnx', 'onnxruntime'):  # the second loads the file again
    try:
      importlib.import_module(name)
    except ImportError as error:
      raise UserError(
        f'--export_onnx needs another package ({error}). Install it: '
        '.venv/bin/pip install tf2onnx onnxruntime'
      ) from error


def write_onnx(model: Model, path: str) -> None:
  """Write an ONNX file from `images`, uint8 [n, 32, 32, 3], to `probabilities`.

  The class names are in its metadata: `class_names`, a list in JSON.

  Raises:
    UserError: as `require_onnx`.
  """
  require_onnx()
  import onnx  # comes with tf2onnx
  import tf2onnx

  with tf.Graph().as_default():
    images, probabilities = _build(model)
    with model.restore() as session:
      graph = tf.graph_util.convert_variables_to_constants(
        session, session.graph.as_graph_def(), [probabilities.op.name]
      )
  converted, _ = tf2onnx.convert.from_graph_def(
    graph,
    input_names=[images.name],
    output_names=[probabilities.name],
    tensors_to_rename={
      tensor.name: tensor.op.name for tensor in (images, probabilities)
    },
  )
  names = json.dumps(model.class_names, ensure_ascii=False)
  onnx.helper.set_model_props(converted, {'class_names': names})
  onnx.save(converted, path)


def load_onnx(path: str) -> Network:
  """Load the network of an ONNX file."""
  import onnxruntime

  session = onnxruntime.InferenceSession(path)
  return lambda images: session.run(None, {'images': images})[0]


def _build(model: Model) -> tuple[tf.Tensor, tf.Tensor]:
  """Build the network; return its pictures and probabilities."""
  images = tf.placeholder(tf.uint8, [None, SIZE, SIZE, 3], 'images')
  return images, tf.identity(model.predict(images), 'probabilities')
