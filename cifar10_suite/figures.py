"""Figures of an evaluation: PNG for TensorBoard, SVG for the report."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cifar10_suite import scores

WRONG_IMAGES = 25  # maximum number of images in `wrong_images`
MAX_NUMBERED = 20  # classes; with more, numbers in the matrix would not fit

_DPI = 100
# Black and white text and lines are equally readable on and next to these.
_BLUE, _ORANGE = '#227bb8', '#c05a00'
_BLUES = LinearSegmentedColormap.from_list('blues', [f'{_BLUE}00', _BLUE])


@contextlib.contextmanager
def _style() -> Iterator[None]:
  """Set the style of figures, of their parts and of their files."""
  # Class names are not formulas. Browsers choose the font of SVG.
  settings = {'text.parse_math': False, 'svg.fonttype': 'none'}
  with matplotlib.rc_context(settings), warnings.catch_warnings():
    # In PNG, letters that the font lacks, such as Chinese ones, are boxes.
    warnings.filterwarnings('ignore', 'Glyph .* missing from')
    yield


class WrongImage(NamedTuple):
  """An image with a wrong prediction.

  Attributes:
    image: uint8 [32, 32, 3].
    label: name of the true class.
    prediction: name of the predicted class.
    probability: probability of the predicted class.
  """

  image: np.ndarray
  label: str
  prediction: str
  probability: float


@_style()
def confusion_matrix(
  matrix: list[list[int]], class_names: Sequence[str]
) -> Figure:
  """Draw a confusion matrix.

  Args:
    matrix: number of images by true class (row) and predicted class (column).
    class_names: name of each class.
  """
  counts = np.array(matrix)
  shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  count = len(class_names)
  ticks = range(count), [_short(name) for name in class_names]
  # Ten classes fill 7 inches; names of many need a ninth of an inch each.
  side = (
    7 * max(min(count, 10) / 10, 0.6)
    if count <= MAX_NUMBERED
    else 2 + count / 9
  )
  figure = Figure(figsize=(side, 0.92 * side), dpi=_DPI, layout='constrained')
  axes = figure.subplots()
  axes.imshow(shares, cmap=_BLUES, vmin=0, vmax=1)
  if count <= MAX_NUMBERED:
    # Long names leave two thirds of the width to the cells. Digits are 0.64
    # times as wide as the font is high.
    cell = 72 * side * 2 / 3 / count
    size = min(10, cell / 0.64 / (len(str(counts.max())) + 0.5))
    for (row, column), number in np.ndenumerate(counts):
      axes.text(column, row, number, ha='center', va='center', fontsize=size)
    axes.set_xticks(*ticks, rotation=45, ha='right')
    axes.set_yticks(*ticks)
  else:
    axes.set_xticks(*ticks, rotation=90, fontsize=6)
    axes.set_yticks(*ticks, fontsize=6)
  axes.set_xlabel('predicted class')
  axes.set_ylabel('true class')
  return figure


@_style()
def wrong_images(wrong: list[WrongImage]) -> Figure:
  """Draw up to WRONG_IMAGES images with their true and predicted classes."""
  figure = Figure(figsize=(8, 9), dpi=_DPI)
  # Matplotlib takes a second to lay out 25 axes, so all images share these.
  axes = figure.add_axes((0, 0, 1, 1))
  axes.axis('off')
  for place, it in enumerate(wrong[:WRONG_IMAGES]):
    row, column = divmod(place, 5)
    left, top = column + 0.12, row + 0.3
    extent = (left, left + 0.76, top + 0.68, top)
    axes.imshow(it.image, interpolation='nearest', extent=extent)
    axes.text(
      column + 0.5,
      top - 0.04,
      f'{_short(it.label)},\ntaken for {_short(it.prediction, 13)}\n'
      f'{it.probability:.2%}',
      fontsize=9,
      ha='center',
    )
  axes.set(xlim=(0, 5), ylim=(5, 0), aspect='auto')
  return figure


@_style()
def precision_curve(records: list[scores.Record]) -> Figure:
  """Draw precision over steps, with 95% intervals."""
  steps = [record['step'] for record in records]
  low, high = np.transpose([record['interval'] for record in records])
  figure = _curves()
  (axes,) = figure.axes
  axes.fill_between(
    steps, low, high, color=_BLUE, alpha=0.3, lw=0, label='95% interval'
  )
  axes.plot(
    steps,
    [record['precision'] for record in records],
    '.-',
    color=_BLUE,
    label='precision',
  )
  axes.set_title(scores.PRECISION_TAG)
  axes.legend(loc='lower right', framealpha=0)
  return figure


@_style()
def loss_curves(
  records: list[scores.Record], training: list[tuple[int, float]]
) -> Figure:
  """Draw the cross entropy of evaluation and training over steps.

  Args:
    records: records of the evaluation.
    training: (step, loss) pairs of the training; may be empty.
  """
  figure = _curves()
  (axes,) = figure.axes
  if training:
    every = -(-len(training) // 500)  # more points would not be visible
    axes.plot(
      *zip(*training[::every], strict=True), color=_ORANGE, label='training'
    )
  axes.plot(
    [record['step'] for record in records],
    [record['loss'] for record in records],
    '.-',
    color=_BLUE,
    label='evaluation',
  )
  axes.set_title('Cross entropy')
  axes.legend(loc='upper right', framealpha=0)
  return figure


def _short(name: str, length: int = 20) -> str:
  """Shorten a name that would not leave enough room for the figure."""
  return name if len(name) <= length else f'{name[: length - 1]}…'


def _curves() -> Figure:
  figure = Figure(figsize=(4.6, 3.2), dpi=_DPI, layout='constrained')
  axes = figure.subplots()
  axes.set_xlabel('step')
  axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
  axes.grid(alpha=0.3)
  return figure


@_style()
def png(figure: Figure) -> bytes:
  """Return a figure as PNG."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png')
  return buffer.getvalue()


@_style()
def svg(figure: Figure) -> str:
  """Return a figure as an SVG element for an HTML page.

  It is transparent, and has the colour of the text around it instead of black,
  so that it suits light and dark pages.
  """
  buffer = io.StringIO()
  nothing = dict.fromkeys(['Creator', 'Date', 'Format', 'Type'])
  figure.savefig(buffer, format='svg', transparent=True, metadata=nothing)
  code = buffer.getvalue()
  code = code[code.index('<svg') :].replace('#000000', 'currentColor')
  return code.replace('<svg', '<svg fill="currentColor"', 1)
