"""Test the programs with `--recipe`."""

import glob
import os
import re
import shutil

import pytest
from support.data import IN_FLOAT32, TINY_BATCH
from support.programs import ROOT, run, summaries

from cifar10_suite.recipes import FAST


def assert_falls(directory, highest, rise, last, first=0):
  """Check the learning rate summaries from step `first` to step `last`.

  TensorFlow's hook reads the global step while it is being incremented, and may
  write one step early or late, so that the exact steps vary.
  """
  rates = [
    (step - 1, value.simple_value)  # number of steps completed before
    for step, tag, value in summaries(directory)
    if tag == 'learning_rate' and step > first
  ]
  assert len(rates) >= (last - first) // 10 - 1
  for step, rate in rates:
    part = min(step / rise, (last - step) / (last - rise))
    assert rate == pytest.approx(highest * part, rel=1e-4)


@pytest.fixture
def flags(data_dir, tmp_path):
  return [
    f'--data_dir={data_dir}',
    f'--train_dir={tmp_path}/train',
    '--recipe=fast',
    IN_FLOAT32,
    TINY_BATCH,
    '--log_frequency=10',
    '--save_summaries_steps=10',
  ]


def test_trains_resumes_and_is_evaluated(flags, eval_flags, tmp_path):
  flags.remove(IN_FLOAT32)
  flags.append('--batch_size=64')
  run('cifar10_train.py', *flags, '--max_steps=40')
  assert_falls(tmp_path / 'train', FAST.learning_rate, rise=2, last=40)
  lines, errors = run(
    'cifar10_multi_gpu_train.py',
    *flags,
    '--max_steps=80',
    '--learning_rate=0.01',
  )
  assert errors == ''
  assert 'Resuming from step 40' in lines
  assert_falls(tmp_path / 'train', 0.01, rise=4, last=80, first=40)
  losses = re.findall(r'loss = ([\d.]+)', '\n'.join(lines))
  assert float(losses[0]) < 1.5
  lines, _ = run('cifar10_eval.py', *eval_flags, '--run_once')
  (precision,) = re.findall(r'precision @ 1 = ([\d.]+)', '\n'.join(lines))
  assert float(precision) > 0.8


@pytest.mark.faults
def test_long_trains(flags):
  lines, errors = run(
    'cifar10_multi_gpu_train.py', *flags, '--recipe=long', '--max_steps=2'
  )
  assert errors == '' and 'Trained to step 2' in lines[-2]


def test_recipes_do_not_go_on_from_each_other(flags, tmp_path):
  tutorial = [*flags, '--recipe=tutorial', '--max_steps=2']
  run('cifar10_train.py', *flags, '--max_steps=2')
  _, errors = run('cifar10_train.py', *tutorial, status=1)
  assert 'model.ckpt-2 was trained with another --recipe' in errors
  os.remove(tmp_path / 'train' / 'checkpoint')
  _, errors = run('cifar10_train.py', *tutorial, status=1)
  assert 'model.ckpt-2 was trained with another --recipe' in errors
  run('cifar10_train.py', *tutorial, '--restart')
  _, errors = run('cifar10_train.py', *flags, '--max_steps=4', status=1)
  assert 'model.ckpt-2 was trained with another --recipe' in errors
  assert 'Traceback' not in errors


def test_an_unknown_recipe_is_named(flags):
  _, errors = run('cifar10_train.py', *flags, '--recipe=slow', status=1)
  assert '--recipe=slow' in errors and 'tutorial|fast|long' in errors
  assert 'Traceback' not in errors


@pytest.mark.parametrize(
  'size', [9, pytest.param(32, marks=pytest.mark.faults)]
)
def test_another_image_size_trains_and_is_evaluated(
  flags, eval_flags, tmp_path, size
):
  """Readers of the tutorial edit the constant in the source."""
  copy = tmp_path / 'copy'
  copy.mkdir()
  for path in glob.glob(f'{ROOT}/*.py'):
    shutil.copy(path, copy)
  shutil.copytree(f'{ROOT}/cifar10_suite', copy / 'cifar10_suite')
  module = copy / 'cifar10_input.py'
  text = module.read_text()
  assert text.count('\nIMAGE_SIZE = 24\n') == 1
  module.write_text(text.replace('IMAGE_SIZE = 24', f'IMAGE_SIZE = {size}'))
  lines, errors = run(str(copy / 'cifar10_train.py'), *flags, '--max_steps=3')
  assert errors == '' and 'Trained to step 3' in lines[-2]
  lines, errors = run(
    str(copy / 'cifar10_eval.py'), *eval_flags, '--run_once', '--num_views=10'
  )
  assert errors == '' and 'step 3: ' in lines[-1]
  other = f'--eval_dir={tmp_path}/other'
  _, errors = run('cifar10_eval.py', *eval_flags, other, '--run_once', status=1)
  assert 'does not match this network: local3/weights' in errors
