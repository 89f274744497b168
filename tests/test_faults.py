"""Tests what machines and people do to a run: nothing may be lost.

`make faults` runs all of it; `make test` leaves out what is marked so.
"""

import glob
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from conftest import make_data_set
from programs import (
  ROOT,
  TIMEOUT,
  Program,
  rewrite_checkpoint,
  run,
  summaries,
)

import download


@pytest.fixture
def flags(data_dir, tmp_path):
  return [
    f'--data_dir={data_dir}',
    f'--train_dir={tmp_path}/train',
    '--batch_size=16',
    '--log_frequency=1',
  ]


def values_of(checkpoint):
  """Returns all that a checkpoint holds, by names; it must be whole."""
  reader = tf.train.load_checkpoint(checkpoint)
  return {
    name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()
  }


def resumed_from(lines):
  (line,) = (line for line in lines if line.startswith('Resuming from step '))
  return int(line.rpartition(' ')[2])


@pytest.mark.parametrize(
  'kills', [1, pytest.param(10, marks=pytest.mark.faults)]
)
def test_kills_lose_no_more_than_an_interval(flags, tmp_path, kills):
  """Killed at any moment, saving included, since it saves all the time."""
  train_dir = str(tmp_path / 'train')
  rng = np.random.RandomState(1)
  last_saved = 0
  for _ in range(kills):
    with Program(
      'cifar10_train.py', *flags, '--save_checkpoint_secs=1'
    ) as trainer:
      for _ in range(rng.randint(1, 60)):
        trainer.wait_for(', loss = ')
      trainer.send_signal(signal.SIGKILL)
      trainer.finish()
    latest = tf.train.latest_checkpoint(train_dir)  # its files are there
    step = int(values_of(latest)['global_step'])
    assert step >= last_saved
    last_saved = step
    assert summaries(train_dir)  # the event files can be read
  lines, errors = run('cifar10_train.py', *flags, f'--max_steps={step + 2}')
  assert errors == '' and resumed_from(lines) >= last_saved


@pytest.mark.parametrize(
  'kind',
  [
    'cut data',
    pytest.param('cut index', marks=pytest.mark.faults),
    pytest.param('no data', marks=pytest.mark.faults),
    pytest.param('flipped', marks=pytest.mark.faults),
  ],
)
def test_damaged_checkpoints_are_skipped(flags, tmp_path, kind):
  run('cifar10_train.py', *flags, '--max_steps=3')
  newest = f'{tmp_path}/train/model.ckpt-3'
  data, index = f'{newest}.data-00000-of-00001', f'{newest}.index'
  if kind == 'cut data':
    os.truncate(data, os.path.getsize(data) // 2)
  elif kind == 'cut index':
    os.truncate(index, os.path.getsize(index) // 2)
  elif kind == 'no data':
    os.remove(data)
  else:
    with open(data, 'r+b') as file:
      file.seek(os.path.getsize(data) // 2)
      file.write(b'flipped')
  lines, errors = run('cifar10_train.py', *flags, '--max_steps=5')
  assert errors == '' and 'Resuming from step 0' in lines
  assert any(
    line.startswith(f'Skipped: Cannot read {newest}: ') for line in lines
  )
  assert values_of(f'{tmp_path}/train/model.ckpt-5')['global_step'] == 5


@pytest.mark.faults
def test_a_lost_state_file_loses_nothing(flags, tmp_path):
  run('cifar10_train.py', *flags, '--max_steps=3')
  os.remove(tmp_path / 'train' / 'checkpoint')
  lines, _ = run('cifar10_train.py', *flags, '--max_steps=4')
  assert resumed_from(lines) == 3


def test_a_second_trainer_is_refused(flags, tmp_path):
  with Program('cifar10_train.py', *flags) as first:
    first.wait_for(': step 1, ')
    _, errors = run('cifar10_train.py', *flags, '--restart', status=1)
    host = re.escape(socket.gethostname())
    pattern = rf'.*{tmp_path}/train is in use by process \d+ on {host}\.\n'
    assert re.fullmatch(pattern, errors)
    first.wait_for(', loss = ')  # it goes on
    first.send_signal(signal.SIGKILL)
    first.finish()
  # The lock has died with it.
  lines, errors = run('cifar10_train.py', *flags, '--max_steps=3')
  assert errors == ''


@pytest.mark.faults
def test_two_signals_save_once(flags, tmp_path):
  with Program('cifar10_train.py', *flags) as trainer:
    trainer.wait_for(': step 2, ')
    trainer.send_signal(signal.SIGINT)
    trainer.send_signal(signal.SIGTERM)
    status, lines = trainer.finish()
    assert trainer.errors() == ''
  assert status in (130, 143)
  step = int(re.search(r'step (\d+) is saved', lines[-1])[1])
  path = tf.train.latest_checkpoint(f'{tmp_path}/train')
  assert values_of(path)['global_step'] == step


@pytest.mark.parametrize(
  'limit', [3_000_000, pytest.param(100_000, marks=pytest.mark.faults)]
)
def test_a_full_disk_leaves_the_last_checkpoint(flags, tmp_path, limit):
  run('cifar10_train.py', *flags, '--max_steps=3')
  path = tf.train.latest_checkpoint(f'{tmp_path}/train')
  before = values_of(path)
  result = subprocess.run(
    [sys.executable, os.path.join(ROOT, 'cifar10_train.py'), *flags],
    capture_output=True,
    text=True,
    timeout=TIMEOUT,
    preexec_fn=lambda: resource.setrlimit(
      resource.RLIMIT_FSIZE, (limit, limit)
    ),
  )
  assert result.returncode == 1
  assert result.stderr.startswith('Cannot write to ')
  assert len(result.stderr.splitlines()) == 1
  assert tf.train.latest_checkpoint(f'{tmp_path}/train') == path
  after = values_of(path)
  for name, value in before.items():
    np.testing.assert_array_equal(after[name], value)
  lines, errors = run('cifar10_train.py', *flags, '--max_steps=5', '--restart')
  assert errors == ''  # what the failure left is a trainer's own


def test_nan_among_the_summaries(flags, tmp_path):
  run('cifar10_train.py', *flags, '--max_steps=2')
  path = tf.train.latest_checkpoint(f'{tmp_path}/train')
  # Large, not infinite: it passes the check before the checkpoint.
  rewrite_checkpoint(
    path,
    path,
    lambda name, old: np.full_like(old, 1e30) if 'local3/w' in name else old,
  )
  before = values_of(path)
  _, errors = run(
    'cifar10_train.py',
    *flags,
    '--save_summaries_steps=1',
    '--log_frequency=100',
    status=1,
  )
  assert re.match(r'Training diverged: at step 2 ', errors)
  assert len(errors.splitlines()) == 1
  assert tf.train.latest_checkpoint(f'{tmp_path}/train') == path
  np.testing.assert_array_equal(
    values_of(path)['conv1/weights'], before['conv1/weights']
  )


def test_data_that_disappears(flags, tmp_path):
  data_dir = make_data_set(str(tmp_path / 'data'))
  flags = [*flags, f'--data_dir={data_dir}']
  with Program('cifar10_train.py', *flags) as trainer:
    trainer.wait_for(': step 2, ')
    shutil.rmtree(os.path.join(data_dir, download.BATCHES_DIR))
    status, _ = trainer.finish()
    errors = trainer.errors()
  assert status == 1
  assert re.match(r'Training stopped at step \d+: .*\.bin; No such', errors)
  assert len(errors.splitlines()) == 1
  values_of(tf.train.latest_checkpoint(f'{tmp_path}/train'))


def test_a_seed_gives_the_same_start(flags, tmp_path):
  starts = []
  for number in (0, 1):
    train_dir = f'{tmp_path}/{number}'
    run(
      'cifar10_train.py',
      *flags,
      f'--train_dir={train_dir}',
      '--seed=7',
      '--max_steps=1',
    )
    starts.append(values_of(f'{train_dir}/model.ckpt-0'))
  for name, value in starts[0].items():
    np.testing.assert_array_equal(value, starts[1][name])


@pytest.mark.faults
def test_restart_spares_what_is_not_a_trainers(flags, tmp_path):
  precious = tmp_path / 'precious'
  precious.mkdir()
  (precious / 'thesis.tex').write_text('years of work')
  (tmp_path / 'link').symlink_to(precious)
  for path in (str(precious), str(tmp_path / 'link'), '/'):
    _, errors = run(
      'cifar10_train.py', *flags, f'--train_dir={path}', '--restart', status=1
    )
    assert '--restart removed nothing' in errors
  assert (precious / 'thesis.tex').read_text() == 'years of work'
  assert glob.glob(f'{tmp_path}/precious/*') == [str(precious / 'thesis.tex')]
