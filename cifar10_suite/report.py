"""Figures of an evaluation, and an HTML report that shows them."""

import base64
import contextlib
import html
import io
import os
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from cifar10_suite import dataset, files, scores
from cifar10_suite.errors import UserError

WRONG_IMAGES = 25  # maximum number of images in `draw_wrong_images`

_DPI = 100
_TITLE = '<title>CIFAR-10'  # identifies reports
_MAX_NUMBERED = 20  # classes; with more, numbers in the matrix would not fit


def draw_confusion_matrix(
  matrix: list[list[int]], class_names: Sequence[str]
) -> bytes:
  """Return a PNG of a confusion matrix.

  Args:
    matrix: number of images by true class (row) and predicted class (column).
    class_names: name of each class.
  """
  counts = np.array(matrix)
  shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  count = len(class_names)
  # Ten classes fill 7 inches; names of many need a ninth of an inch each.
  side = (
    7 * max(min(count, 10) / 10, 0.6)
    if count <= _MAX_NUMBERED
    else 2 + count / 9
  )
  figure = Figure(figsize=(side, 0.92 * side), dpi=_DPI, layout='constrained')
  axes = figure.subplots()
  axes.imshow(shares, cmap='Blues', vmin=0, vmax=1)
  if count <= _MAX_NUMBERED:
    for (row, column), number in np.ndenumerate(counts):
      colour = 'white' if shares[row, column] > 0.5 else 'black'
      axes.text(column, row, number, ha='center', va='center', color=colour)
    axes.set_xticks(range(count), class_names, rotation=45, ha='right')
    axes.set_yticks(range(count), class_names)
  else:
    axes.set_xticks(range(count), class_names, rotation=90, fontsize=6)
    axes.set_yticks(range(count), class_names, fontsize=6)
  axes.set_xlabel('predicted class')
  axes.set_ylabel('true class')
  return _png(figure)


def draw_wrong_images(
  images: np.ndarray,
  labels: np.ndarray,
  predictions: np.ndarray,
  probabilities: np.ndarray,
  class_names: Sequence[str],
) -> bytes:
  """Return a PNG of images with their true and predicted classes.

  Args:
    images: uint8 [n, 32, 32, 3]; the first WRONG_IMAGES are shown.
    labels: integers [n], the true classes.
    predictions: integers [n], the predicted classes.
    probabilities: float [n], probabilities of the predicted classes.
    class_names: name of each class.
  """
  figure = Figure(figsize=(8, 9), dpi=_DPI, layout='constrained')
  for axes in figure.subplots(5, 5).flat:
    axes.axis('off')
  for axes, image, label, prediction, probability in zip(
    figure.axes, images, labels, predictions, probabilities, strict=False
  ):
    axes.imshow(image, interpolation='nearest')
    axes.set_title(
      f'{class_names[label]},\ntaken for {class_names[prediction]}\n'
      f'{probability:.2%}',
      fontsize=9,
    )
  return _png(figure)


def draw_learning_curve(records: list[scores.Record]) -> bytes:
  """Return a PNG of precision over steps, with 95% intervals."""
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
  """Write a report as a self-contained HTML page.

  Args:
    path: path of the page.
    records: records of the learning curve, sorted by step.
    record: record to show in detail.
    wrong_images: PNG from `draw_wrong_images`.
  """
  low, high = record['interval']
  rows = '\n'.join(
    f'<tr><td>{html.escape(name)}<td>{_percent(accuracy)}'
    for name, accuracy in record['class_accuracy'].items()
  )
  names = list(record['class_accuracy'])
  is_cifar10 = names == dataset.CLASS_NAMES
  kind = '' if is_cifar10 else ' suite'
  heading = 'CIFAR-10' if is_cifar10 else f'{len(names)} classes'
  at_5 = record.get('precision_at_5')  # missing in old records
  top_5 = '' if at_5 is None else f'\nPrecision @ 5 is {_percent(at_5)}.'
  are_many = len(names) > _MAX_NUMBERED
  matrix = _image(
    'confusion matrix',
    draw_confusion_matrix(record['confusion_matrix'], names),
  )
  if are_many:
    pairs = _most_often_confused(record['confusion_matrix'], names)
    matrix = (
      f'<div class=large>{matrix}</div>\n<h2>Most often confused</h2>{pairs}'
    )
  is_perfect = record['right'] == record['num_examples']
  wrong = '<p>None.' if is_perfect else _image('wrong images', wrong_images)
  page = f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
{_TITLE}{kind}: step {record['step']}</title>
<style>
  body {{ font-family: sans-serif; max-width: 52em; margin: 2em auto }}
  img {{ max-width: 100% }}
  td {{ padding: 0 1em }}
  .many {{ columns: 15em }}
  .large {{ overflow: auto }}
  .large img {{ max-width: none }}
</style>
<h1>{heading} at step {record['step']}</h1>
<p>Precision @ 1 is <strong>{_percent(record['precision'])}</strong>:
{record['right']} of {record['num_examples']} images
({html.escape(record['eval_data'])}) are right. The 95% interval is
{_percent(low)} to {_percent(high)}; the loss is {record['loss']:.3f}.{top_5}
<h2>Learning curve</h2>
{_image('learning curve', draw_learning_curve(records))}
<h2>Confusion matrix</h2>
{matrix}
<h2>Accuracy of each class</h2>
<div{' class=many' if are_many else ''}><table>
{rows}
</table></div>
<h2>Most confidently wrong</h2>
{wrong}
</html>
"""
  files.write_whole(path, page.encode())


def _most_often_confused(
  matrix: list[list[int]], class_names: Sequence[str]
) -> str:
  """Return an HTML table of the ten most frequent kinds of errors."""
  counts = np.array(matrix)
  np.fill_diagonal(counts, 0)
  rows = []
  for flat in np.argsort(-counts, axis=None, kind='stable')[:10]:
    true, predicted = np.unravel_index(flat, counts.shape)
    if counts[true, predicted]:
      cells = class_names[true], f'taken for {class_names[predicted]}'
      rows.append(
        f'<tr><td>{html.escape(cells[0])}<td>{html.escape(cells[1])}'
        f'<td>{counts[true, predicted]} times'
      )
  return '<table>\n' + '\n'.join(rows) + '\n</table>'


def refuse_to_overwrite(path: str) -> None:
  """Refuse to overwrite a file that is not a report.

  Raises:
    UserError: if `path` is such a file.
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
