"""Pictures of an evaluation, and a page that shows them without TensorBoard."""

import base64
import contextlib
import html
import io
import os

import numpy as np
from matplotlib.figure import Figure

from cifar10_suite import dataset, files, scores
from cifar10_suite.errors import UserError

WRONG_IMAGES = 25  # that the picture of them has room for

_DPI = 100
_TITLE = '<title>CIFAR-10: step'  # how that of each page begins


def draw_confusion_matrix(matrix: list[list[int]]) -> bytes:
  """Returns a PNG of the counts of each pair of true and predicted class.

  Args:
    matrix: [10][10], images by true class (row) and predicted one (column).
  """
  counts = np.array(matrix)
  shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  figure = Figure(figsize=(7, 6.4), dpi=_DPI, layout='constrained')
  axes = figure.subplots()
  axes.imshow(shares, cmap='Blues', vmin=0, vmax=1)
  for (row, column), count in np.ndenumerate(counts):
    colour = 'white' if shares[row, column] > 0.5 else 'black'
    axes.text(column, row, count, ha='center', va='center', color=colour)
  classes = range(len(dataset.CLASS_NAMES))
  axes.set_xticks(classes, dataset.CLASS_NAMES, rotation=45, ha='right')
  axes.set_yticks(classes, dataset.CLASS_NAMES)
  axes.set_xlabel('predicted class')
  axes.set_ylabel('true class')
  return _png(figure)


def draw_wrong_images(
  images: np.ndarray,
  labels: np.ndarray,
  predictions: np.ndarray,
  probabilities: np.ndarray,
) -> bytes:
  """Returns a PNG of images with their true and predicted classes.

  There is room for WRONG_IMAGES of them.

  Args:
    images: uint8 [n, 32, 32, 3].
    labels: integers [n], the true classes.
    predictions: integers [n], the predicted ones.
    probabilities: float [n], of the predicted ones.
  """
  names = dataset.CLASS_NAMES
  figure = Figure(figsize=(8, 9), dpi=_DPI, layout='constrained')
  for axes in figure.subplots(5, 5).flat:
    axes.axis('off')
  for axes, image, label, prediction, probability in zip(
    figure.axes, images, labels, predictions, probabilities, strict=False
  ):
    axes.imshow(image, interpolation='nearest')
    axes.set_title(
      f'{names[label]},\ntaken for {names[prediction]}\n{probability:.2%}',
      fontsize=9,
    )
  return _png(figure)


def draw_learning_curve(records: list[scores.Record]) -> bytes:
  """Returns a PNG of precision by step, with its 95% interval."""
  steps = [record['step'] for record in records]
  low, high = np.transpose([record['interval'] for record in records])
  figure = Figure(figsize=(8, 4), dpi=_DPI, layout='constrained')
  axes = figure.subplots()
  axes.fill_between(steps, low, high, alpha=0.3, label='95% interval')
  axes.plot(
    steps, [record['precision'] for record in records], '.-', label='precision'
  )
  axes.set_xlabel('step')
  axes.set_ylabel(scores.PRECISION_TAG.lower())
  axes.grid(alpha=0.3)
  axes.legend(loc='lower right')
  return _png(figure)


def write_page(
  path: str,
  records: list[scores.Record],
  record: scores.Record,
  wrong_images: bytes,
) -> None:
  """Writes an HTML page that needs no other file.

  Args:
    path: where to.
    records: of the whole curve, by step.
    record: the one to show in full.
    wrong_images: a PNG from `draw_wrong_images`.
  """
  low, high = record['interval']
  rows = '\n'.join(
    f'<tr><td>{html.escape(name)}<td>{_percent(accuracy)}'
    for name, accuracy in record['class_accuracy'].items()
  )
  page = f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
{_TITLE} {record['step']}</title>
<style>
  body {{ font-family: sans-serif; max-width: 52em; margin: 2em auto }}
  img {{ max-width: 100% }}
  td {{ padding: 0 1em }}
</style>
<h1>CIFAR-10 at step {record['step']}</h1>
<p>Precision @ 1 is <strong>{_percent(record['precision'])}</strong>:
{record['right']} of {record['num_examples']} images
({html.escape(record['eval_data'])}) are right. The 95% interval is
{_percent(low)} to {_percent(high)}; the loss is {record['loss']:.3f}.
<h2>Learning curve</h2>
{_image('learning curve', draw_learning_curve(records))}
<h2>Confusion matrix</h2>
{_image('confusion matrix', draw_confusion_matrix(record['confusion_matrix']))}
<h2>Accuracy of each class</h2>
<table>
{rows}
</table>
<h2>Most confidently wrong</h2>
{_image('wrong images', wrong_images)}
</html>
"""
  files.write_whole(path, page.encode())


def refuse_to_overwrite(path: str) -> None:
  """Ends the program if a page would be written over something else.

  Raises:
    UserError: it would.
  """
  if not os.path.exists(path):
    return
  with contextlib.suppress(OSError), open(path, 'rb') as file:
    if _TITLE.encode() in file.read(1000):
      return
  raise UserError(f'{path} is not a report. Name another file with --report.')


def _png(figure: Figure) -> bytes:
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png')
  return buffer.getvalue()


def _image(what: str, png: bytes) -> str:
  data = base64.b64encode(png).decode()
  return f'<img alt="{what}" src="data:image/png;base64,{data}">'


def _percent(fraction: float | None) -> str:
  return 'no images' if fraction is None else f'{fraction:.1%}'
