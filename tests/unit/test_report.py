"""Test the report, its figures and what it reads of a run."""

import html.parser
import io
import itertools
import os
import re

import numpy as np
import PIL.Image
import pytest
import tensorflow.compat.v1 as tf

from cifar10_suite import figures, metrics, report, runs
from cifar10_suite.errors import UserError
from cifar10_suite.recipes import FAST

LINKS = ('href', 'src')
NASTY = [
  '<i>a & "b"</i>',
  'costs $5_ and $^',
  'a name as long as a sentence is',
  '猫',
]


class Text(html.parser.HTMLParser):
  """The text of a page, the names of its elements, and its links."""

  def __init__(self, page):
    super().__init__()
    self.text, self.tags, self.links = '', [], []
    self.feed(page)

  def handle_data(self, data):
    self.text += data

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.links += [
      value for name, value in attributes if name.split(':')[-1] in LINKS
    ]


def make_record(names, step=7, count=500):
  """Return the record of random predictions, and some errors."""
  rng = np.random.RandomState(step)
  labels = rng.randint(len(names), size=count)
  logits = rng.normal(size=[count, len(names)])
  logits[np.arange(count), labels] += 2
  log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  measures = metrics.measure(labels, log_probabilities, tuple(names))
  record = {**measures, 'step': step, 'eval_data': 'test', 'num_views': 1}
  image = rng.randint(256, size=[32, 32, 3]).astype(np.uint8)
  return record, [figures.WrongImage(image, names[0], names[1], 0.9)] * 25


def write(path, train_dir, names):
  record, wrong = make_record(names)
  first, _ = make_record(names, step=0)
  report.write_page(str(path), str(train_dir), [first, record], record, wrong)
  return path.read_text(encoding='utf-8')


@pytest.mark.parametrize('count', [2, 4, 10, 100])
@pytest.mark.filterwarnings('error')  # of a figure whose parts do not fit
def test_a_report_shows_each_class_as_it_is_called(tmp_path, count):
  names = (NASTY + [f'class {k}' for k in range(4, count)])[:count]
  page = Text(write(tmp_path / 'report.html', tmp_path, names))
  for name in names:
    assert name in page.text
  assert 'i' not in page.tags
  assert page.tags.count('svg') == 3
  assert page.tags.count('img') == 25
  assert 'evaluation' in page.text and 'training' not in page.text
  assert 'reproduce' not in page.text  # there is no run.json


def test_a_report_describes_the_run(tmp_path, monkeypatch):
  for step in (None, 100):
    monkeypatch.setattr(
      'sys.argv', ['/x/cifar10_train.py', f'--train_dir=<i>{step or 0}']
    )
    description = runs.describe(FAST, tf.float32)
    runs.record_start(str(tmp_path), ('a', 'b'), step, description)
  write_losses(tmp_path, 1, {1: 2.0})
  monkeypatch.setattr('sys.argv', ['cifar10_eval.py', '--eval_dir=a&b'])
  page = Text(write(tmp_path / 'report.html', tmp_path, ['a', 'b']))
  for part in (
    "# From step 0:\npython cifar10_train.py '--train_dir=<i>0'",
    "# From step 100:\npython cifar10_train.py '--train_dir=<i>100'",
    "python cifar10_eval.py '--eval_dir=a&b'",
    tf.__version__,
    description['processor'],
    'learning rate0.015',
    '0.7 to 1.3',
  ):
    assert part in page.text
  assert 'i' not in page.tags
  assert 'training' in page.text  # in the legend of the losses


def test_a_report_needs_no_other_file_and_suits_light_and_dark(tmp_path):
  page = write(tmp_path / 'report.html', tmp_path, ['a', 'b'])
  links = Text(page).links
  assert links and all(link[0] == '#' or link[:5] == 'data:' for link in links)
  assert 'color-scheme: light dark' in page and '<meta name="viewport"' in page
  assert page.count('<svg fill="currentColor"') == 3
  # Nothing has a colour that only one of the two backgrounds suits.
  assert not re.search(r'(fill|stroke): (#000000|#ffffff|black|white)', page)


def test_a_pipe_is_not_a_report(tmp_path):
  path = tmp_path / 'report.html'
  os.mkfifo(path)
  with pytest.raises(UserError, match='is not a report'):
    report.refuse_to_overwrite(str(path))


def write_losses(directory, number, losses):
  """Write an event file, the given one, with losses by step."""
  path = f'{directory}/events.out.tfevents.{number}.host'
  with tf.io.TFRecordWriter(path) as writer:
    for step, loss in losses.items():
      event = tf.Event(step=step)
      event.summary.value.add(tag='total_loss', simple_value=9)
      event.summary.value.add(tag='cross_entropy', simple_value=loss)
      writer.write(event.SerializeToString())
  return path


def test_training_loss_continues_where_training_resumed(tmp_path):
  assert runs.training_loss(str(tmp_path)) == []
  write_losses(tmp_path, 1, {1: 2.5, 101: 2.0, 201: 1.5})
  path = write_losses(tmp_path, 2, {101: 1.75, 202: 1.25, 301: 1.0})
  with open(path, 'r+b') as file:  # the trainer is writing
    file.truncate(file.seek(0, 2) - 5)
  assert runs.training_loss(str(tmp_path)) == [
    (1, 2.5),
    (101, 1.75),
    (202, 1.25),
  ]


def test_hyperparameters(tmp_path):
  assert runs.hyperparameters(runs.read(str(tmp_path))) == {}
  description = {**runs.describe(FAST, tf.float32), 'seed': None, 'towers': 2}
  runs.record_start(str(tmp_path), ('a', 'b'), None, description)
  values = runs.hyperparameters(runs.read(str(tmp_path)))
  assert values['recipe'] == 'fast' and values['learning_rate'] == 0.015
  assert values['towers'] == 2 and 'seed' not in values


def test_figures_for_tensorboard_are_pictures():
  record, wrong = make_record(NASTY)
  for figure in (
    figures.confusion_matrix(record['confusion_matrix'], NASTY),
    figures.wrong_images(wrong),
    figures.wrong_images([]),
  ):
    picture = PIL.Image.open(io.BytesIO(figures.png(figure)))
    assert picture.width > 300 and picture.getpixel((0, 0))[:3] == (255,) * 3


def test_texts_of_figures_do_not_overlap():
  names = ['white-cheeked honeyeater'] * 20
  matrix = np.full([20, 20], 1234).tolist()
  wrong = [
    figures.WrongImage(np.zeros([32, 32, 3], np.uint8), name, name, 0.9876)
    for name in [*names, 'cat', 'aquarium_fish', 'cat', *names[:2]]
  ]
  for figure, columns in (
    (figures.wrong_images(wrong), 5),
    (figures.confusion_matrix(matrix, names), 20),
  ):
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    for place, (left, right) in enumerate(itertools.pairwise(boxes), start=1):
      assert place % columns == 0 or left.x1 < right.x0, place
