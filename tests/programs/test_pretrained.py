"""Test the trained network in pretrained/."""

import dataclasses
import glob
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from support.data import IN_FLOAT32
from support.programs import ROOT, rewrite_checkpoint, run

from cifar10_suite import dataset, runs
from cifar10_suite.recipes import LONG

DIRECTORY = os.path.join(ROOT, 'pretrained')
STEP = LONG.max_steps


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
  """A copy of the programs, without any training."""
  copy = tmp_path_factory.mktemp('clone')
  for path in glob.glob(f'{ROOT}/*.py'):
    shutil.copy(path, copy)
  for name in ('cifar10_suite', 'pretrained'):
    shutil.copytree(f'{ROOT}/{name}', copy / name)
  return copy


def test_files_are_whole_and_small():
  with open(f'{DIRECTORY}/SHA256SUMS') as file:
    expected = dict(reversed(line.split()) for line in file)
  assert len(expected) == 2
  for name, digest in expected.items():
    with open(f'{DIRECTORY}/{name}', 'rb') as file:
      assert hashlib.sha256(file.read()).hexdigest() == digest
  size = sum(os.path.getsize(path) for path in glob.glob(f'{DIRECTORY}/*'))
  assert size < 4.5e6


def test_describes_itself():
  run_json = runs.read(DIRECTORY)
  assert run_json['class_names'] == dataset.CLASS_NAMES
  (start,) = run_json['starts']
  assert start['recipe'] == json.loads(json.dumps(dataclasses.asdict(LONG)))
  path = f'{DIRECTORY}/model.ckpt-{STEP}'
  assert tf.train.load_variable(path, 'global_step') == STEP
  with open(f'{DIRECTORY}/README.md') as file:
    card = file.read()
  assert os.path.basename(path) in card and start['command'] in card
  assert all(f'| {name} |' in card for name in dataset.CLASS_NAMES)
  assert '/' not in start['command'] and ROOT not in card


def test_predicts_without_training(clone):
  pictures = sorted(glob.glob(f'{ROOT}/examples/samples/*.jpg'))
  assert pictures
  lines, errors = run(f'{clone}/cifar10_predict.py', '--json', *pictures)
  assert [json.loads(line)['picture'] for line in lines] == pictures
  assert errors.splitlines() == [
    f'{clone}/cifar10_train has no checkpoint: using the pretrained network.',
    f'Using {clone}/pretrained/model.ckpt-{STEP} (step {STEP}).',
  ]
  named = f'--checkpoint_dir={clone}/pretrained'
  same, errors = run(f'{clone}/cifar10_predict.py', named, '--json', *pictures)
  assert same == lines and len(errors.splitlines()) == 1


def test_is_not_used_beside_a_checkpoint_without_a_number(clone):
  """Scripts may save one."""
  train_dir = clone / 'cifar10_train'
  train_dir.mkdir()
  rewrite_checkpoint(
    f'{DIRECTORY}/model.ckpt-{STEP}',
    f'{train_dir}/model.ckpt',
    lambda name, old: np.array(7) if name == 'global_step' else old,
  )
  picture = f'{ROOT}/examples/samples/cat.jpg'
  _, errors = run(f'{clone}/cifar10_predict.py', picture)
  assert errors == f'Using {train_dir}/model.ckpt (step 7).\n'
  shutil.rmtree(train_dir)


def test_is_scored_and_trained_further(clone, data_dir, tmp_path):
  source = f'{clone}/pretrained'
  lines, errors = run(
    f'{clone}/cifar10_eval.py',
    f'--data_dir={data_dir}',
    f'--checkpoint_dir={source}',
    f'--eval_dir={tmp_path}/eval',
    '--run_once',
  )
  assert errors == '' and f'  step {STEP}: ' in lines[-1]
  flags = [f'--data_dir={data_dir}', f'--train_dir={tmp_path}/train']
  flags += [
    f'--init_from={source}',
    '--batch_size=64',
    '--max_steps=2',
    IN_FLOAT32,
  ]
  lines, errors = run(f'{clone}/cifar10_train.py', *flags, '--recipe=fast')
  assert errors == ''
  assert any(
    line.endswith('conv1, conv2, local3, local4, softmax_linear')
    for line in lines
  )
  average = 'conv1/weights/ExponentialMovingAverage'
  before = tf.train.load_variable(source, average)
  after = tf.train.load_variable(f'{tmp_path}/train', average)
  np.testing.assert_allclose(after, before, atol=0.02 * np.abs(before).max())
