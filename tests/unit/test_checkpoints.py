"""Test how checkpoints are named."""

import pytest

from cifar10_suite import checkpoints


@pytest.fixture
def train_dir(tmp_path):
  for step in (0, 90, 100):
    (tmp_path / f'model.ckpt-{step}.index').touch()
  return tmp_path


@pytest.mark.parametrize('end', ['', '.index', '.meta', '.data-00000-of-00001'])
def test_a_checkpoint_may_be_named(train_dir, monkeypatch, end):
  path = f'{train_dir}/model.ckpt-90'
  assert checkpoints.named(path + end) == path
  assert checkpoints.directory_of(path + end) == str(train_dir)
  monkeypatch.chdir(train_dir)
  assert checkpoints.named(f'model.ckpt-0{end}') == 'model.ckpt-0'
  assert checkpoints.directory_of(f'model.ckpt-0{end}') == '.'


@pytest.mark.parametrize('name', ['', 'run_of_tomorrow', 'model.ckpt-7'])
def test_directories_are_not_checkpoints(train_dir, name):
  (train_dir / 'model.ckpt-7').mkdir()
  path = f'{train_dir}/{name}'
  assert checkpoints.named(path) is None
  assert checkpoints.directory_of(path) == path


def test_a_missing_checkpoint_is_named_with_those_that_exist(train_dir):
  with pytest.raises(checkpoints.CheckpointError) as error:
    checkpoints.named(f'{train_dir}/model.ckpt-99')
  assert str(error.value) == (
    f'There is no checkpoint model.ckpt-99 in {train_dir}. It has steps 0, 90, '
    '100.'
  )
  with pytest.raises(checkpoints.CheckpointError, match=r'It has none\.'):
    checkpoints.named('nowhere/model.ckpt-99.index')
  (train_dir / 'model.ckpt-1234567.index').touch()
  with pytest.raises(checkpoints.CheckpointError, match=r' 100, 1234567\.'):
    checkpoints.named(f'{train_dir}/model.ckpt-99')


def test_another_file_is_not_a_checkpoint(train_dir):
  (train_dir / 'checkpoint').touch()
  path = f'{train_dir}/checkpoint'
  with pytest.raises(checkpoints.CheckpointError, match=f'{path} is not a'):
    checkpoints.directory_of(path)
