"""Test scores and the files in an evaluation directory."""

import errno
import itertools
import json
import math
import os
import shutil

import numpy as np
import pytest
import scipy.special
import tensorflow.compat.v1 as tf
from support.network_by_hand import write_network_by_hand
from support.programs import rewrite_checkpoint, summaries
from tensorboard.backend.event_processing.event_accumulator import (
  EventAccumulator,
)

import cifar10
import cifar10_input
from cifar10_suite import checkpoints, dataset, metrics, runs, scores, views
from cifar10_suite.errors import UserError
from cifar10_suite.recipes import TUTORIAL


def test_measure():
  rng = np.random.RandomState(1)
  logits = rng.normal(size=[60, 10])
  log_probabilities = scipy.special.log_softmax(logits, axis=1)
  labels = np.where(np.arange(60) % 3, np.argmax(logits, axis=1), 5)
  labels[labels == 9] = 0
  measures = metrics.measure(
    labels, log_probabilities, tuple(dataset.CLASS_NAMES)
  )
  right = np.sum(np.argmax(logits, axis=1) == labels)
  # Wilson's interval: all p with |p - right / n| <= z standard errors.
  p, n, z = right / 60, 60, 1.959964
  centre = (p + z * z / (2 * n)) / (1 + z * z / n)
  half = z / (1 + z * z / n)
  half *= math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  assert measures['interval'] == pytest.approx(
    [centre - half, centre + half], abs=1e-6
  )
  assert measures['precision'] == right / 60
  assert measures['loss'] == pytest.approx(
    -np.mean(log_probabilities[np.arange(60), labels])
  )
  assert measures['class_accuracy']['truck'] is None
  assert np.sum(measures['confusion_matrix']) == 60
  wrong = metrics.most_confidently_wrong(labels, log_probabilities, 5)
  sureness = np.max(log_probabilities, axis=1)
  is_wrong = np.argmax(logits, axis=1) != labels
  assert sorted(sureness[is_wrong], reverse=True)[:5] == list(sureness[wrong])
  assert is_wrong[wrong].all()


@pytest.mark.parametrize('num_views', [1, 2, 10, 50])
def test_views_are_averaged(graph, batches_dir, num_views):
  images, labels = cifar10_input.inputs(
    True, batches_dir, 7, num_views=num_views
  )
  logits = cifar10.inference(images)
  average = views.average(logits, num_views)
  with tf.train.MonitoredSession() as session:
    images, labels, logits, average = session.run(
      [images, labels, logits, average]
    )
  records = np.fromfile(os.path.join(batches_dir, 'test_batch.bin'), np.uint8)
  records = records.reshape(-1, 3073)[:7]
  pictures = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  corners = [(4, 4), (2, 2), (2, 6), (6, 2), (6, 6)][: max(1, num_views // 2)]
  if num_views == 50:
    corners = list(itertools.product(range(0, 9, 2), repeat=2))
  expected = []
  for picture in pictures.astype(float):
    windows = [picture[y : y + 24, x : x + 24] for y, x in corners]
    if num_views > 1:
      windows += [window[:, ::-1] for window in windows]
    expected += [(w - w.mean()) / w.std() for w in windows]
  np.testing.assert_allclose(images, expected, atol=1e-4)
  assert list(labels) == list(records[:, 0])
  probabilities = scipy.special.softmax(logits, axis=1)
  np.testing.assert_allclose(
    np.exp(average),
    probabilities.reshape(7, num_views, 10).mean(axis=1),
    rtol=1e-5,
  )


@pytest.mark.parametrize('eval_data', [True, False])
def test_reads_single_images(batches_dir, eval_data):
  positions = np.array([3, 99, 3])
  if not eval_data:
    positions = np.array([499, 0, 100])
  name = 'test_batch.bin' if eval_data else 'data_batch_5.bin'
  records = np.fromfile(os.path.join(batches_dir, name), np.uint8)
  records = records.reshape(-1, 3073)
  images = dataset.read_images(eval_data, batches_dir, positions)
  expected = records[positions[0] % 100, 1:].reshape(3, 32, 32)
  np.testing.assert_array_equal(images[0], expected.transpose(1, 2, 0))
  assert images.shape == (3, 32, 32, 3)
  count = dataset.count_images(eval_data, batches_dir)
  assert count == (100 if eval_data else 500)


NAMES = ('cat', 'dog')
MEASURES = metrics.measure(
  np.array([0, 1]), np.log([[0.5, 0.5], [0.4, 0.6]]), NAMES
)


def make_scores(tmp_path, class_names=NAMES, **settings):
  return scores.Scores(str(tmp_path), settings, class_names)


def add_score(scores, tmp_path, step, *, is_latest=True, precision=0.5):
  path = tmp_path / f'model.ckpt-{step}'
  digest = f'{step}, {len(scores.records)}'
  (tmp_path / f'model.ckpt-{step}.index').write_text(digest)
  record = scores.make_record(
    str(path),
    step,
    is_latest,
    runs.started(runs.read(str(tmp_path))),
    {**MEASURES, 'precision': precision},
  )
  scores.add(
    record,
    str(path),
    tf.Summary(
      value=[tf.Summary.Value(tag='Precision @ 1', simple_value=precision)]
    ),
    tf.Graph(),
  )
  return record


def last_curve(scores):
  """Return the steps of the last record's run."""
  return [record['step'] for record in scores.curve(scores.records[-1])]


def start_run(tmp_path, start):
  """Write run.json as if a run had started at a time."""
  description = {**runs.describe(TUTORIAL, tf.float32), 'time': start}
  runs.record_start(str(tmp_path), NAMES, None, description)


class TestScores:
  def test_a_run_begun_afresh_hides_the_earlier_one(self, tmp_path):
    scores = make_scores(tmp_path)
    for step in (0, 10, 20, 5, 15):
      add_score(scores, tmp_path, step)
    assert last_curve(scores) == [5, 15]
    # Older checkpoints of the same run are inserted by step.
    add_score(scores, tmp_path, 7, is_latest=False)
    assert last_curve(scores) == [5, 7, 15]
    assert last_curve(make_scores(tmp_path)) == [5, 7, 15]
    accumulator = EventAccumulator(str(tmp_path)).Reload()
    shown = [event.step for event in accumulator.Scalars('Precision @ 1')]
    assert shown == [0, 5, 15]

  def test_a_step_of_an_earlier_run_may_come_again(self, tmp_path):
    add_score(make_scores(tmp_path), tmp_path, 10)
    os.remove(tmp_path / 'metrics.jsonl')  # killed before it wrote the record
    scores = make_scores(tmp_path)
    for step in (10, 20, 10):
      add_score(scores, tmp_path, step)
    accumulator = EventAccumulator(str(tmp_path)).Reload()
    shown = [event.step for event in accumulator.Scalars('Precision @ 1')]
    assert shown[-1] == 10

  def test_a_run_is_another_if_it_started_at_another_time(self, tmp_path):
    scores = make_scores(tmp_path)
    for start, step in (('a', 10), ('a', 20), ('b', 30), ('b', 40)):
      start_run(tmp_path, start)
      add_score(scores, tmp_path, step)
    assert last_curve(scores) == [30, 40]

  def test_equal_checkpoints_of_two_runs_have_two_scores(self, tmp_path):
    scores = make_scores(tmp_path)
    start_run(tmp_path, 'a')
    checkpoint = str(tmp_path / 'model.ckpt-0')
    record = add_score(scores, tmp_path, 0)
    shutil.copytree(tmp_path / 'best', tmp_path, dirs_exist_ok=True)
    assert scores.find(checkpoint) is record
    start_run(tmp_path, 'b')
    assert scores.find(checkpoint) is None
    os.remove(tmp_path / 'run.json')  # unknown
    assert scores.find(checkpoint) is record

  def test_a_run_continues_after_another_or_from_an_earlier_step(
    self, tmp_path
  ):
    scores = make_scores(tmp_path)
    for start, step in (
      *[('a', 10), ('a', 20), ('b', 10), ('a', 30), ('a', 40)],
      ('a', 35),  # from an earlier step
    ):
      start_run(tmp_path, start)
      add_score(scores, tmp_path, step)
    assert last_curve(scores) == [10, 20, 30, 35]

  def test_each_run_has_its_curve(self, tmp_path):
    scores = make_scores(tmp_path)
    for start, step in (('a', 10), ('b', 10), ('b', 20), ('a', 30), ('c', 40)):
      start_run(tmp_path, start)
      add_score(scores, tmp_path, step)
    for record, steps in zip(
      scores.records,
      [[10, 30], [10, 20], [10, 20], [10, 30], [40]],
      strict=True,
    ):
      assert [r['step'] for r in scores.curve(record)] == steps

  @pytest.mark.parametrize('name', ['metrics.jsonl', 'best'])
  @pytest.mark.parametrize('right', [os.R_OK, os.W_OK])
  def test_files_without_permission_are_named(
    self, tmp_path, monkeypatch, name, right
  ):
    add_score(make_scores(tmp_path), tmp_path, 10)
    monkeypatch.setattr(
      os,
      'access',
      lambda path, mode: os.path.basename(path) != name or not mode & right,
    )
    with pytest.raises(UserError, match=f'Cannot read and write .*{name}'):
      make_scores(tmp_path)

  def test_killed_before_the_line_was_written(self, tmp_path):
    scores = make_scores(tmp_path)
    add_score(scores, tmp_path, 10)
    add_score(scores, tmp_path, 20)
    path = tmp_path / 'metrics.jsonl'
    whole = path.read_text()
    for end in (-20, whole.rindex('}', 0, -5) + 1):
      path.write_text(whole[:end])
      scores = make_scores(tmp_path)
      assert [r['step'] for r in scores.records] == [10]
    path.write_bytes(whole[:-20].encode() + b'\xff\xff')  # by a damaged disk
    scores = make_scores(tmp_path)
    assert path.read_text() == whole[: whole.index('\n') + 1]
    add_score(scores, tmp_path, 20)
    points = [step for step, _, _ in summaries(str(tmp_path))]
    assert points == [10, 20]
    assert len(path.read_text().splitlines()) == 2

  def test_other_settings_are_refused(self, tmp_path):
    add_score(make_scores(tmp_path, num_views=1), tmp_path, 10)
    with pytest.raises(UserError, match='--num_views=1, not of --num_views=2'):
      make_scores(tmp_path, num_views=2)

  def test_damaged_lines_are_named(self, tmp_path):
    add_score(make_scores(tmp_path), tmp_path, 10)
    path = tmp_path / 'metrics.jsonl'
    score = path.read_text()
    # Foreign records and text without a newline are not incomplete lines.
    for line in (
      'nonsense\n',
      '{"run": 0}\n',
      '[1]\n',
      'my notes',
      '{"st}',
      '{"step": 1, "loss": 2.0}',
      '{"step": 1, "lo',
      score.replace('0.5', '"0.5"', 1),
      score.replace('"step": 10', '"step": null'),
    ):
      path.write_text(score + line)
      with pytest.raises(UserError, match=r'metrics.jsonl, line 2'):
        make_scores(tmp_path)
      assert path.read_text() == score + line

  def test_a_last_line_without_its_end_is_kept(self, tmp_path):
    add_score(make_scores(tmp_path), tmp_path, 10)
    path = tmp_path / 'metrics.jsonl'
    path.write_text(path.read_text().rstrip())
    scores = make_scores(tmp_path)
    assert [r['step'] for r in scores.records] == [10]
    add_score(scores, tmp_path, 20)
    path.write_text(path.read_text().rstrip())  # during the evaluation
    add_score(scores, tmp_path, 30)
    assert [r['step'] for r in make_scores(tmp_path).records] == [10, 20, 30]

  def test_scores_of_other_classes_are_refused(self, tmp_path):
    add_score(make_scores(tmp_path), tmp_path, 10)
    with pytest.raises(UserError, match='other classes: cat, dog'):
      make_scores(tmp_path, class_names=('cat', 'bird'))

  @pytest.mark.parametrize('name', ['model.ckpt-10.index', 'checkpoint'])
  def test_files_of_others_in_place_of_the_best_are_refused(
    self, tmp_path, name
  ):
    (tmp_path / 'best').mkdir()
    (tmp_path / 'best' / name).write_text('mine')
    with pytest.raises(UserError, match=f'{name} is not from this network'):
      make_scores(tmp_path)

  def test_places_of_others_are_refused(self, tmp_path):
    (tmp_path / 'best').write_text('mine')
    with pytest.raises(UserError, match='best is not a directory'):
      make_scores(tmp_path)
    (tmp_path / 'metrics.jsonl').mkdir()
    with pytest.raises(UserError, match=r'metrics.jsonl is not a file'):
      make_scores(tmp_path)

  @pytest.mark.parametrize(
    ('key', 'value'),
    [
      ('precision', '0.5'),
      ('checkpoint', 10),
      ('checkpoint', '../model.ckpt-10'),
      ('checkpoint', '/runs/model.ckpt-10'),
    ],
  )
  def test_a_best_that_is_none_is_refused(self, tmp_path, key, value):
    add_score(make_scores(tmp_path), tmp_path, 10)
    path = tmp_path / 'best' / 'best.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=r'best.json does not name'):
      make_scores(tmp_path)

  def test_best_of_the_same_step_is_replaced_by_a_better_one(self, tmp_path):
    scores = make_scores(tmp_path)
    for precision in (0.5, 0.4, 0.6, 0.6):
      add_score(scores, tmp_path, 10, precision=precision)
    best = tmp_path / 'best'
    assert json.loads((best / 'best.json').read_text())['precision'] == 0.6
    assert (best / 'model.ckpt-10.index').read_text() == '10, 2'
    add_score(scores, tmp_path, 20, precision=0.7)
    assert sorted(os.listdir(best)) == [
      'best.json',
      'checkpoint',
      'model.ckpt-20.index',
    ]
    assert tf.train.latest_checkpoint(str(best)) == str(best / 'model.ckpt-20')

  def test_the_best_may_be_on_another_file_system(self, tmp_path, monkeypatch):
    replace = os.replace

    def replace_in_directory(source, target):
      if os.path.dirname(source) != os.path.dirname(target):
        raise OSError(errno.EXDEV, 'Invalid cross-device link')
      replace(source, target)

    monkeypatch.setattr(os, 'replace', replace_in_directory)
    add_score(make_scores(tmp_path), tmp_path, 10)
    best = tmp_path / 'best'
    assert (best / 'model.ckpt-10.index').read_text() == '10, 0'
    assert tf.train.latest_checkpoint(str(best)) == str(best / 'model.ckpt-10')

  def test_a_worse_one_is_not_the_best_if_that_was_moved(self, tmp_path):
    scores = make_scores(tmp_path)
    add_score(scores, tmp_path, 10, precision=0.5)
    best = tmp_path / 'best'
    best.rename(tmp_path / 'moved')
    for step, precision in ((20, 0.4), (30, 0.5)):
      add_score(make_scores(tmp_path), tmp_path, step, precision=precision)
    assert not best.exists()
    add_score(make_scores(tmp_path), tmp_path, 40, precision=0.6)
    assert json.loads((best / 'best.json').read_text())['step'] == 40

  def test_what_others_put_beside_the_best_stays(self, tmp_path):
    scores = make_scores(tmp_path)
    best = tmp_path / 'best'
    best.mkdir()
    for name in ('model.ckpt-7.index', 'model.ckpt-10.notes', 'thesis.tex'):
      (best / name).write_text('mine')
    add_score(scores, tmp_path, 10, precision=0.5)
    add_score(scores, tmp_path, 20, precision=0.6)
    assert sorted(os.listdir(best)) == [
      'best.json',
      'checkpoint',
      'model.ckpt-10.notes',
      'model.ckpt-20.index',
      'model.ckpt-7.index',
      'thesis.tex',
    ]
    (best / 'best.json').write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r'best.json does not name'):
      make_scores(tmp_path)


def damage(kind, path):
  index, data = f'{path}.index', f'{path}.data-00000-of-00001'
  if kind == 'cut index':
    os.truncate(index, 100)
  elif kind == 'no data':
    os.remove(data)
  elif kind == 'cut data':
    os.truncate(data, 1000)
  elif kind == 'other bytes':
    with open(data, 'r+b') as file:
      file.seek(int(0.6 * os.path.getsize(data)))  # among the averages
      file.write(b'other')
  elif kind == 'other network':
    rewrite_checkpoint(
      path,
      path,
      lambda name, old: np.zeros([3, 3]) if name.startswith('conv1/w') else old,
    )
  elif kind == 'directory':
    os.remove(index)
    os.mkdir(index)


@pytest.mark.parametrize(
  'kind',
  ['cut index', 'no data', 'cut data', 'other bytes', 'other network']
  + ['directory'],
)
def test_unusable_checkpoints_are_named(graph, tmp_path, kind):
  path = write_network_by_hand(str(tmp_path), 3)
  cifar10.inference(tf.zeros([1, 24, 24, 3]))
  averages = tf.train.ExponentialMovingAverage(cifar10.MOVING_AVERAGE_DECAY)
  variables = averages.variables_to_restore()
  assert checkpoints.check(path, variables) == 3
  damage(kind, path)
  with pytest.raises(checkpoints.CheckpointError) as error:
    checkpoints.check(path, variables)
  message = str(error.value)
  assert path in message and '\n' not in message
  if kind == 'other network':
    assert 'conv1/weights/ExponentialMovingAverage is float64 [3, 3]' in message
