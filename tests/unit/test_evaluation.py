"""Test which checkpoints are scored, and when."""

import dataclasses
import os
import types

import pytest
import tensorflow.compat.v1 as tf

import cifar10_eval
from cifar10_suite import checkpoints, dataset, evaluation, runs
from cifar10_suite.errors import UserError
from cifar10_suite.recipes import TUTORIAL

NAMES = ('ant', 'bee')


def settings_of(directory, **changes):
  return evaluation.EvalSettings(
    **{
      'checkpoint_dir': str(directory),
      'eval_dir': str(directory),
      'batches_dir': f'{directory}/missing',
      'eval_data': 'test',
      'num_examples': None,
      'num_views': 1,
      'batch_size': 1,
      'dtype': tf.float32,
      'device': 'auto',
      'report': None,
      'run_once': False,
      'all_checkpoints': False,
      'until_trained': False,
      'eval_interval_secs': 300,
      'timeout_secs': None,
      **changes,
    }
  )


@pytest.fixture
def now(monkeypatch):
  """The time in seconds, as the only item of a list; sleeping advances it."""
  now = [0]
  clock = types.SimpleNamespace(
    monotonic=lambda: now[0],
    sleep=lambda seconds: now.__setitem__(0, now[0] + seconds),
  )
  monkeypatch.setattr(evaluation, 'time', clock)
  monkeypatch.setattr(
    checkpoints,
    'newest_good',
    lambda directory, variables: (checkpoints.latest(directory), 0),
  )
  return now


def start_run(directory, hold_out=0, **changes):
  recipe = dataclasses.replace(TUTORIAL, **changes)
  runs.record_start(
    str(directory),
    NAMES,
    None,
    {**runs.describe(recipe, tf.float32), 'hold_out': hold_out},
  )


def test_waits_after_each_score(tmp_path, now, monkeypatch):
  monkeypatch.setattr(  # each tenth second brings a checkpoint
    checkpoints, 'latest', lambda directory: f'model.ckpt-{now[0] // 10:.0f}'
  )
  times = []
  for _ in evaluation.checkpoints_to_score(settings_of(tmp_path), {}, None):
    times.append(now[0])
    now[0] += 5  # the evaluation
    if len(times) == 3:
      break
  assert times[0] == 0
  assert 305 <= times[1] < 315 and 610 <= times[2] < 630


def test_scores_a_run_that_starts_over(tmp_path, now, monkeypatch):
  path = tmp_path / 'model.ckpt-500'
  index = tmp_path / 'model.ckpt-500.index'
  index.write_text('of the first run')
  monkeypatch.setattr(checkpoints, 'latest', lambda directory: str(path))
  settings = settings_of(tmp_path, timeout_secs=1000)
  found = evaluation.checkpoints_to_score(settings, {}, None)
  assert next(found) == str(path)
  index.write_text('of the second run')
  assert next(found) == str(path)
  assert next(found, None) is None
  assert now[0] == pytest.approx(300 + 1000, abs=5)


def test_scores_a_run_of_the_same_seed_that_starts_over(
  tmp_path, now, monkeypatch
):
  (tmp_path / 'model.ckpt-0.index').touch()
  path = str(tmp_path / 'model.ckpt-0')
  monkeypatch.setattr(checkpoints, 'latest', lambda directory: path)
  monkeypatch.setattr(runs, 'started', lambda run: str(now[0] > 400))
  settings = settings_of(tmp_path, timeout_secs=1000)
  found = list(evaluation.checkpoints_to_score(settings, {}, None))
  assert found == [path, path]


def test_an_unknown_last_step_is_named(tmp_path, now, monkeypatch, capsys):
  (tmp_path / 'model.ckpt-5.index').touch()
  path = str(tmp_path / 'model.ckpt-5')
  monkeypatch.setattr(checkpoints, 'latest', lambda directory: path)
  settings = settings_of(tmp_path, until_trained=True, timeout_secs=9)
  assert list(evaluation.checkpoints_to_score(settings, {}, None)) == [path]
  assert 'has no run.json: the last step of' in capsys.readouterr().out
  start_run(tmp_path)
  assert list(evaluation.checkpoints_to_score(settings, {}, None)) == [path]
  assert 'run.json' not in capsys.readouterr().out


def test_an_unknown_last_step_is_named_when_a_run_appears(
  tmp_path, now, monkeypatch, capsys
):
  path = str(tmp_path / 'model.ckpt-5')
  monkeypatch.setattr(
    checkpoints, 'latest', lambda directory: path if now[0] > 3 else None
  )
  monkeypatch.setattr(
    checkpoints, 'newest_good', lambda directory, variables: None
  )
  settings = settings_of(tmp_path, until_trained=True, timeout_secs=9)
  assert list(evaluation.checkpoints_to_score(settings, {}, None)) == [path]
  output = capsys.readouterr().out
  assert output.count('has no run.json: the last step of') == 1


class TestUntilTrained:
  @pytest.fixture
  def found(self, tmp_path, now, monkeypatch):
    """Checkpoints to score; all have a score, and step 5 is the last one."""
    start_run(tmp_path, max_steps=5)
    self.directory = tmp_path
    self.latest = 5
    monkeypatch.setattr(checkpoints, 'latest', self.path)
    scores = types.SimpleNamespace(find=str)
    settings = settings_of(tmp_path, until_trained=True, timeout_secs=100)
    return evaluation.checkpoints_to_score(settings, {}, scores)

  def path(self, directory=None):
    return str(self.directory / f'model.ckpt-{self.latest}')

  def test_a_finished_run_ends_soon(self, found, now, capsys):
    assert list(found) == [self.path()]
    assert now[0] <= 20
    waiting, end = capsys.readouterr().out.splitlines()
    assert waiting.endswith('Waiting in case training continues.')
    assert end.endswith('model.ckpt-5 is the last step.')

  def test_the_trainer_may_start_later(self, found, now, monkeypatch):
    sleep = evaluation.time.sleep

    def sleep_until_it_resumes(seconds):
      sleep(seconds)
      if now[0] == 7:
        start_run(self.directory, max_steps=6)
      elif now[0] == 30:
        self.latest = 6

    monkeypatch.setattr(evaluation.time, 'sleep', sleep_until_it_resumes)
    assert [path[-1] for path in found] == ['5', '6']
    assert now[0] < 40

  def test_a_run_that_was_watched_ends_at_once(self, found, now):
    self.latest = 4
    assert next(found).endswith('-4')
    now[0] += 100
    self.latest = 5
    assert next(found).endswith('-5')
    now[0] += 2
    assert next(found, None) is None
    assert now[0] == 102


def test_held_out_images_wait_for_a_run(tmp_path, now, monkeypatch, capsys):
  sleep = evaluation.time.sleep

  def sleep_until_it_starts(seconds):
    sleep(seconds)
    if now[0] == 7:
      start_run(tmp_path, hold_out=40)

  start_run(tmp_path, hold_out=0)  # an earlier one
  monkeypatch.setattr(evaluation.time, 'sleep', sleep_until_it_starts)
  settings = settings_of(tmp_path, timeout_secs=5)
  with pytest.raises(UserError, match='has no run that holds out'):
    cifar10_eval.held_out(settings)
  assert capsys.readouterr().out.startswith('Waiting for a run in ')
  with pytest.raises(UserError, match='has no run that holds out'):
    cifar10_eval.held_out(settings_of(tmp_path, run_once=True))
  assert now[0] < 7
  assert cifar10_eval.held_out(settings_of(tmp_path)) == 40


@pytest.mark.parametrize(
  ('expected', 'message'),
  [
    (50, 'has started over with --hold_out=40, not 50. Start the evaluation'),
    (40, 'Failed to find file: .*missing/test_batch.bin'),
  ],
)
def test_what_changed_meanwhile_is_named(tmp_path, expected, message):
  start_run(tmp_path, hold_out=40)
  checkpoint = tmp_path / 'model.ckpt-5'
  for end in ('index', 'data-00000-of-00001'):
    (tmp_path / f'model.ckpt-5.{end}').write_text('x')
  network = types.SimpleNamespace(hold_out=expected)
  scores = types.SimpleNamespace(find=lambda digest: None)
  with pytest.raises(UserError, match=message):
    cifar10_eval.score(
      settings_of(tmp_path), str(checkpoint), network, scores, NAMES
    )


def test_a_removed_directory_is_named(tmp_path):
  (tmp_path / 'model.ckpt-5.index').write_text('x')
  settings = settings_of(tmp_path, eval_dir=f'{tmp_path}/gone')
  scores = types.SimpleNamespace(find=lambda digest: None)
  with pytest.raises(UserError, match='Cannot write to .*gone: No such file'):
    cifar10_eval.score(
      settings, str(tmp_path / 'model.ckpt-5'), None, scores, NAMES
    )


@pytest.mark.parametrize(
  ('eval_data', 'hold_out', 'wanted'),
  [('test', 0, 10001), ('train_eval', 0, 10000), ('held_out', 11000, 11000)],
)
def test_scores_at_most_10000_images_of_training(
  tmp_path, eval_data, hold_out, wanted
):
  for name, count in (('data_batch_1.bin', 12000), ('test_batch.bin', 10001)):
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, count * dataset.RECORD_BYTES)  # sparse
  settings = settings_of(
    tmp_path, batches_dir=str(tmp_path), eval_data=eval_data
  )
  assert cifar10_eval.number_to_score(settings, hold_out) == wanted
