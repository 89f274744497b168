"""HTML report of an evaluation and of the run that it is about."""

import base64
import contextlib
import html
import io
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np
import PIL.Image

from cifar10_suite import dataset, figures, files, runs, scores
from cifar10_suite.errors import UserError

_TITLE = '<title>CIFAR-10'
# Identifies reports.
_WHOLE_TITLE = re.compile(rf'{_TITLE}( suite)?: step \d+</title>'.encode())

# In a start of run.json.
_SHOWN_ELSEWHERE = ('time', 'step', 'command', 'recipe', 'versions')

# The browser chooses colours for light and dark pages. Whatever is wider than
# the page scrolls by itself.
_STYLE = """
  :root { color-scheme: light dark }
  body { font: 1rem/1.5 sans-serif; max-width: 54rem; margin: 2rem auto;
    padding: 0 1rem; overflow-wrap: anywhere }
  h1, h2, h3 { line-height: 1.2 }
  table { border-spacing: 0 }
  th { font-weight: normal; text-align: left }
  th, td { padding: 0 1rem 0 0; vertical-align: top }
  .number { text-align: right; padding: 0; font-variant-numeric: tabular-nums }
  .scroll { overflow-x: auto }
  .scroll th { white-space: nowrap }
  .side { display: grid; gap: 1rem 2rem;
    grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)) }
  .side svg { width: 100%; height: auto }
  .bars { width: 100%; table-layout: fixed }
  .bars th { width: 35% }
  @media (min-width: 40rem) { .few th { width: 10rem } }
  .bars .number { width: 5rem }
  .bar { background: #227bb8; height: 1em; margin-top: .25em }
  .many { columns: 18rem; column-gap: 2rem }
  pre { white-space: pre-wrap; padding: 1rem; background: #8882 }
  .wrong { display: grid; gap: 1rem; font-size: .85rem; line-height: 1.3;
    grid-template-columns: repeat(auto-fill, minmax(max(6rem, 17%), 1fr)) }
  figure { margin: 0 }
  .wrong img { width: 96px; height: 96px; image-rendering: pixelated }
"""


def write_page(
  path: str,
  train_dir: str,
  records: list[scores.Record],
  record: scores.Record,
  wrong: list[figures.WrongImage],
) -> None:
  """Write a report as a self-contained HTML page.

  Args:
    path: path of the page.
    train_dir: directory of the run, whose run.json and event files are shown if
      it has them.
    records: records of the learning curve, sorted by step.
    record: record to show in detail.
    wrong: the most confident errors.
  """
  names = list(record['class_accuracy'])
  is_cifar10 = names == dataset.CLASS_NAMES
  kind = '' if is_cifar10 else ' suite'
  heading = 'CIFAR-10' if is_cifar10 else f'{len(names)} classes'
  body = '\n'.join(
    [
      f'<h1>{heading} at step {record["step"]}</h1>',
      _summary(record),
      '<h2>Learning curves</h2>',
      _curves(records, runs.training_loss(train_dir)),
      '<h2>Accuracy of each class</h2>',
      _bars(record['class_accuracy']),
      '<h2>Confusion matrix</h2>',
      _confusion(record['confusion_matrix'], names),
      '<h2>Most confidently wrong</h2>',
      _wrong(wrong),
      _run(runs.read(train_dir)),
    ]
  )
  page = f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
{_TITLE}{kind}: step {record['step']}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_STYLE}</style>
{body}
</html>
"""
  files.write_whole(path, page.encode())


def refuse_to_overwrite(path: str) -> None:
  """Refuse to overwrite a file that is not a report.

  Raises:
    UserError: if `path` is such a file.
  """
  if not os.path.exists(path):
    return
  if os.path.isfile(path):  # reading a pipe would wait for a writer
    with contextlib.suppress(OSError), open(path, 'rb') as file:
      if _WHOLE_TITLE.search(file.read(1000)):
        return
  raise UserError(f'{path} is not a report. Name another file with --report.')


def _summary(record: scores.Record) -> str:
  low, high = record['interval']
  at_5 = record.get('precision_at_5')  # missing in old records
  top_5 = '' if at_5 is None else f'\nPrecision @ 5 is {_percent(at_5)}.'
  return f"""
<p>Precision @ 1 is <strong>{_percent(record['precision'])}</strong>:
{record['right']} of {record['num_examples']} images
({html.escape(record['eval_data'])}) are right. The 95% interval is
{_percent(low)} to {_percent(high)}; the loss is {record['loss']:.3f}.{top_5}"""


def _curves(
  records: list[scores.Record], training: list[tuple[int, float]]
) -> str:
  note = (
    '<p>The loss of training is that of distorted images, averaged over recent '
    'steps, and includes any label smoothing, dropout and mixup.'
  )
  return f"""<div class=side>
{figures.svg(figures.precision_curve(records))}
{figures.svg(figures.loss_curves(records, training))}
</div>{note if training else ''}"""


def _bars(class_accuracy: dict[str, float | None]) -> str:
  rows = '\n'.join(
    f'<tr><th>{html.escape(name)}'
    f'<td><div class=bar style="width:{100 * (accuracy or 0):.1f}%"></div>'
    f'<td class=number>{_percent(accuracy)}'
    for name, accuracy in class_accuracy.items()
  )
  are_many = len(class_accuracy) > figures.MAX_NUMBERED
  return f"""<div class={'many' if are_many else 'few'}><table class=bars>
{rows}
</table></div>"""


def _confusion(matrix: list[list[int]], names: list[str]) -> str:
  figure = figures.svg(figures.confusion_matrix(matrix, names))
  code = f'<div class=scroll>{figure}</div>'
  if len(names) > figures.MAX_NUMBERED:
    code += f'<h3>Most often confused</h3>{_most_often_confused(matrix, names)}'
  return code


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
      rows.append(
        (
          class_names[true],
          f'taken for {class_names[predicted]}',
          f'{counts[true, predicted]} times',
        )
      )
  return _table(rows)


def _wrong(wrong: list[figures.WrongImage]) -> str:
  if not wrong:
    return '<p>None.'
  pictures = []
  for it in wrong:
    buffer = io.BytesIO()
    PIL.Image.fromarray(it.image).save(buffer, 'PNG')
    data = base64.b64encode(buffer.getvalue()).decode()
    pictures.append(
      f'<figure><img alt="" src="data:image/png;base64,{data}"><figcaption>'
      f'{html.escape(it.label)}, taken for {html.escape(it.prediction)}: '
      f'{it.probability:.2%}</figcaption></figure>'
    )
  return f'<div class=wrong>{"".join(pictures)}</div>'


def _run(run: dict | None) -> str:
  """Return what run.json says, and the commands of the run."""
  if not run:
    return ''
  start = run['starts'][-1]
  facts = {
    'started': run['starts'][0]['time'],
    **{key: it for key, it in start.items() if key not in _SHOWN_ELSEWHERE},
    **start['versions'],
  }
  commands = '\n'.join(
    f'# From step {start["step"]}:\npython {start["command"]}'
    for start in run['starts']
  )
  return f"""<h2>The run</h2>
<div class=side>
<div class=scroll><h3>Training</h3>{_table(_facts(facts))}</div>
<div class=scroll><h3>Recipe</h3>{_table(_facts(start['recipe']))}</div>
</div>
<h2>How to reproduce it</h2>
<pre>{html.escape(commands)}
# Evaluation:
python {html.escape(runs.command())}</pre>
<p>Runs of the same command are similar, but not identical, even with the same
<code>--seed</code>."""


def _facts(values: dict[str, object]) -> Iterable[tuple[str, str]]:
  """Return names and values as text, without those that are not set."""
  for name, value in values.items():
    if isinstance(value, bool):
      value = 'yes' if value else 'no'
    elif isinstance(value, list):
      value = ' to '.join(map(str, value))
    if value is not None:
      yield name.replace('_', ' '), str(value)


def _table(rows: Iterable[Sequence[str]]) -> str:
  """Return an HTML table; the first cell of each row is its heading."""
  lines = [
    f'<tr><th>{html.escape(first)}'
    + ''.join(f'<td>{html.escape(cell)}' for cell in more)
    for first, *more in rows
  ]
  return '<table>\n' + '\n'.join(lines) + '\n</table>'


def _percent(fraction: float | None) -> str:
  return 'no images' if fraction is None else f'{fraction:.1%}'
