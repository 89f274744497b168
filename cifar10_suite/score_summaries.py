"""Summaries of a score for TensorBoard."""

import io

import PIL.Image
import tensorflow.compat.v1 as tf
from tensorboard.plugins.hparams import summary as hparams

from cifar10_suite import figures
from cifar10_suite.scores import PRECISION_TAG, Record


def summarize(
  record: Record,
  wrong: list[figures.WrongImage],
  first_batch: bytes,
  hyperparameters: dict[str, object],
) -> tf.Summary:
  """Return the TensorBoard summary of a score.

  Args:
    record: the score.
    wrong: the most confident errors.
    first_batch: serialized `tf.Summary` to extend.
    hyperparameters: those of the run, for the HPARAMS tab; may be empty.
  """
  summary = tf.Summary.FromString(first_batch)
  if hyperparameters:
    # The event writer keeps the description only with the first score.
    summary.MergeFrom(hparams.session_start_pb(hyperparameters))
  scalars = {
    PRECISION_TAG: record['precision'],
    'cross_entropy': record['loss'],  # in a chart with that of training
    **{
      f'accuracy/{name}': accuracy
      for name, accuracy in record['class_accuracy'].items()
      if accuracy is not None
    },
  }
  if 'precision_at_5' in record:
    scalars['Precision @ 5'] = record['precision_at_5']
  for tag, value in scalars.items():
    summary.value.add(tag=tag, simple_value=value)
  pictures = {
    'confusion_matrix': figures.confusion_matrix(
      record['confusion_matrix'], list(record['class_accuracy'])
    ),
    'wrong_images': figures.wrong_images(wrong),
  }
  for tag, figure in pictures.items():
    png = figures.png(figure)
    width, height = PIL.Image.open(io.BytesIO(png)).size
    summary.value.add(tag=tag).image.CopyFrom(
      tf.Summary.Image(
        width=width, height=height, colorspace=4, encoded_image_string=png
      )
    )
  return summary
