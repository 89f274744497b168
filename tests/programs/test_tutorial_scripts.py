"""Test that scripts for the tutorial's modules run on ours unchanged."""

import os
import subprocess
import sys

import pytest
import tensorflow.compat.v1 as tf
from support.data import TINY_BATCH
from support.programs import ROOT

# TensorFlow's default behaviour, and that of TF1.
PRELUDES = {
  'v2': '',
  'v1': 'import tensorflow.compat.v1 as tf; tf.disable_v2_behavior(); ',
}


def run_script(name, *arguments, prelude=''):
  """Run a script as a process, after `prelude`; return its output."""
  path = os.path.join(ROOT, 'tests', 'tutorial_scripts', name)
  code = f'import runpy; {prelude}runpy.run_path({path!r}, run_name="__main__")'
  return run_code(code, *arguments)


def run_code(code, *arguments):
  result = subprocess.run(
    [sys.executable, '-c', code, *arguments],
    env={**os.environ, 'PYTHONPATH': ROOT},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=120,
  )
  assert result.returncode == 0, result.stdout
  return result.stdout


_NOTEBOOK = """
import tensorflow as tf, cifar10, cifar10_input
calls = [
  lambda: cifar10.distorted_inputs(),
  lambda: cifar10_input.inputs(True, '.', 1),
  lambda: cifar10.inference(tf.zeros([1, 24, 24, 3])),
]
for call in calls:
  try:
    call()
  except RuntimeError as error:
    assert 'Call tf.compat.v1.disable_v2_behavior()' in str(error)
  else:
    raise AssertionError
with tf.Graph().as_default():
  images, labels = cifar10.distorted_inputs()
  print(images.shape, cifar10.inference(images).shape)
"""


def test_another_programs_command_line(data_dir):
  """As in a notebook; its cells execute eagerly."""
  flags = ['-f', 'kernel.json', '--matplotlib=inline', f'--data_dir={data_dir}']
  assert '(128, 24, 24, 3) (128, 10)' in run_code(_NOTEBOOK, *flags)


@pytest.mark.parametrize('behaviour', PRELUDES)
def test_own_training_and_evaluation_loops(data_dir, tmp_path, behaviour):
  output = run_script(
    'train.py',
    f'--data_dir={data_dir}',
    f'--train_dir={tmp_path}',
    TINY_BATCH,
    prelude=PRELUDES[behaviour],
  )
  assert 'step 4, loss = ' in output
  assert 'precision @ 1 = ' in output
  names = {name for name, _ in tf.train.list_variables(str(tmp_path))}
  assert len(names) == 21
  assert 'local3/weights/ExponentialMovingAverage' in names


def test_reading_records_until_the_end(batches_dir):
  path = os.path.join(batches_dir, 'test_batch.bin')
  assert '100 records' in run_script('read_records.py', path)


@pytest.mark.parametrize(
  'behaviour', ['v2', pytest.param('v1', marks=pytest.mark.faults)]
)
def test_two_towers(data_dir, tmp_path, behaviour):
  output = run_script(
    'two_towers.py',
    f'--data_dir={data_dir}',
    f'--train_dir={tmp_path}',
    TINY_BATCH,
    prelude=PRELUDES[behaviour],
  )
  assert 'step 2, loss = ' in output
  # The tower's summaries include its activations, without its prefix.
  assert ' conv1/activations_1 ' in output
  names = {name for name, _ in tf.train.list_variables(str(tmp_path))}
  assert len(names) == 21
