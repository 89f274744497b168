"""Test which scores end training."""

import json

import pytest

import cifar10_train
from cifar10_suite import stopping
from cifar10_suite.errors import UserError
from cifar10_suite.recipes import TUTORIAL
from cifar10_suite.train_settings import TrainSettings


class Run:
  """A run whose checkpoints are index files, and their scores."""

  def __init__(self, tmp_path, monkeypatch):
    self.clock = 0.0
    monkeypatch.setattr(stopping.time, 'monotonic', lambda: self.clock)
    self._dir = tmp_path
    self._digests = {}

  def watch(self, precision=None, patience=None, eval_data='test'):
    self._watch = stopping.StopByScore(
      str(self._dir), str(self._dir), eval_data, precision, patience
    )
    return self._watch

  def save(self, step, content):
    path = self._dir / f'model.ckpt-{step}'
    path.with_name(f'{path.name}.index').write_text(content)
    self._watch.after_save(None, step)
    self._digests[step] = stopping.checkpoints.digest(str(path))

  def score(self, step, precision, eval_data='test', end='\n'):
    record = {'digest': self._digests[step], 'step': step}
    record |= {'precision': precision, 'eval_data': eval_data}
    with open(self._dir / 'metrics.jsonl', 'a') as file:
      file.write(json.dumps(record) + end)

  def stops(self):
    self.clock += 1
    return self._watch.stops()


@pytest.fixture
def run(tmp_path, monkeypatch):
  return Run(tmp_path, monkeypatch)


def test_stops_at_a_precision_of_this_run(run, tmp_path):
  run.watch()
  run.save(100, 'of an earlier run')
  run.score(100, 0.99)
  (tmp_path / 'model.ckpt-100.index').unlink()  # as --restart does
  watch = run.watch(precision=0.86)
  run.save(100, 'of this run')
  assert not run.stops()
  run.clock = 60.0
  run.save(200, 'better')
  run.score(100, 0.859)
  assert not run.stops()
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('[1]\n{"digest"\n')
  run.score(200, 0.86)
  assert run.stops()
  assert watch.reason == (
    'Stopped by --stop_at_precision 0.86: precision 0.860 at step 200, after '
    '60 s.'
  )
  # It still counts after a restart.
  watch = run.watch(precision=0.86)
  assert run.stops() and watch.reason.endswith('at step 200.')


def test_stops_when_the_best_is_some_scores_ago(run):
  watch = run.watch(patience=2)
  precisions = [0.1, 0.5, 0.5, 0.6, 0.6, 0.5]
  for step, precision in enumerate(precisions):
    assert not run.stops()
    run.save(step, f'{step}')
    run.score(step, precision)
  assert run.stops()
  assert watch.reason == (
    'Stopped by --patience 2: the best precision is 0.600 at step 3, 2 scores '
    'ago.'
  )


def test_two_scores_of_equal_checkpoints_count_once(run):
  run.watch(patience=1)
  run.save(0, 'of the same seed')
  run.score(0, 0.1)
  run.score(0, 0.1)
  assert not run.stops()


@pytest.mark.parametrize('counts', ['test', 'held_out'])
def test_scores_of_other_images_do_not_count(run, counts):
  run.watch(precision=0.5, eval_data=counts)
  run.save(1, 'one')
  for images in {'train_eval', 'held_out', 'test'} - {counts}:
    run.score(1, 0.9, images)
  run.score(1, 0.4, counts)
  assert not run.stops()
  run.save(2, 'two')
  run.score(2, 0.5, counts)
  assert run.stops()


def test_looks_at_most_once_per_second(run):
  watch = run.watch(precision=0.5)
  run.save(1, 'one')
  assert not watch.stops()
  run.score(1, 0.9)
  assert not watch.stops()
  run.clock += 1
  assert watch.stops()


def test_a_byte_order_mark_does_not_hide_the_first_score(run, tmp_path):
  run.watch(precision=0.5)
  run.save(1, 'one')
  run.score(1, 0.9)
  scores = tmp_path / 'metrics.jsonl'
  scores.write_text(scores.read_text(), encoding='utf-8-sig')
  assert run.stops()


def test_scores_that_cannot_be_read_at_the_start_are_an_error(tmp_path):
  (tmp_path / 'eval').touch()
  with pytest.raises(UserError, match=f'Cannot read {tmp_path}/eval/'):
    stopping.StopByScore(str(tmp_path), f'{tmp_path}/eval', 'test', 0.5, None)


def test_scores_that_cannot_be_read_later_do_not_end_training(
  run, tmp_path, capsys
):
  run.watch(precision=0.5)
  run.save(1, 'one')
  scores = tmp_path / 'metrics.jsonl'
  scores.mkdir()
  assert not run.stops() and not run.stops()
  assert capsys.readouterr().out == (
    f'Cannot read {scores}: Is a directory. Training continues.\n'
  )
  scores.rmdir()
  run.score(1, 0.9)
  assert run.stops()


@pytest.mark.parametrize('flag', [{'stop_at_precision': 0.5}, {'patience': 3}])
def test_is_refused_in_a_cluster(tmp_path, monkeypatch, flag):
  addresses = {'chief': ['localhost:1'], 'worker': ['localhost:2']}
  monkeypatch.setenv(
    'TF_CONFIG',
    json.dumps({'cluster': addresses, 'task': {'type': 'worker', 'index': 0}}),
  )
  settings = TrainSettings(TUTORIAL, str(tmp_path), **flag)
  with pytest.raises(UserError, match='not work in a cluster'):
    cifar10_train.run(None, settings, None)
