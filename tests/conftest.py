"""A tiny made-up data set, and TensorFlow as the programs use it."""

import os
import signal

import console  # first: it keeps TensorFlow's chatter off the console  # noqa: F401

# isort: split
import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import cifar10_processor
import download

# A shell's background job ignores SIGINT, and so would the programs started by
# the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

tf.disable_v2_behavior()
tf.app.flags.FLAGS.mark_as_parsed()  # at their defaults


def write_records(path, labels, images):
  """Writes labels [n] and images [n, 32, 32, 3] as a data file."""
  planes = np.transpose(images, [0, 3, 1, 2]).reshape(len(labels), 3072)
  records = np.column_stack([labels, planes]).astype(np.uint8)
  records.tofile(path)


def make_data_set(data_dir, records_per_file=100):
  """Writes six data files whose classes differ in their picture."""
  rng = np.random.RandomState(seed=1)
  batches_dir = os.path.join(data_dir, download.BATCHES_DIR)
  os.makedirs(batches_dir)
  # Coarse ones: they look much the same wherever they are cropped.
  pictures = rng.randint(0, 256, [10, 4, 4, 3]).repeat(8, 1).repeat(8, 2)
  for name in download.FILE_SHA256:
    labels = rng.randint(0, 10, [records_per_file])
    noise = rng.randint(-20, 21, [records_per_file, 32, 32, 3])
    images = np.clip(pictures[labels] + noise, 0, 255)
    write_records(os.path.join(batches_dir, name), labels, images)
  return data_dir


# At the tutorial's rate, small batches of these pictures diverge now and then.
SMALL_RATE = '--learning_rate=0.01'


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
  """The `--data_dir` of a made-up data set of 6 x 100 images."""
  return make_data_set(str(tmp_path_factory.mktemp('data')))


@pytest.fixture(scope='session')
def batches_dir(data_dir):
  """The directory of its data files."""
  return os.path.join(data_dir, download.BATCHES_DIR)


@pytest.fixture
def record_fault(record_property):
  """A function that notes a fault, how often it was tried, what was lost."""

  def record(name, times=1, lost=0, unit='s'):
    record_property('fault', (name, times, lost, unit))

  return record


def pytest_report_header():
  """Names the processor and the version of TensorFlow."""
  return [
    f'processor: {cifar10_processor.describe()}',
    f'TensorFlow {tf.__version__}',
  ]


def pytest_terminal_summary(terminalreporter):
  """Shows the faults that were tried."""
  faults = {}
  for report in terminalreporter.getreports('passed'):
    for key, value in report.user_properties:
      if key == 'fault':
        name, times, lost, unit = value
        before = faults.get(name, (0, 0, unit))
        faults[name] = (before[0] + times, max(before[1], lost), unit)
  if faults:
    terminalreporter.section('faults: times tried, training lost at most')
  for name, (times, lost, unit) in sorted(faults.items()):
    terminalreporter.write_line(f'{name:50}{times:6}{lost:6.3g} {unit}')


@pytest.fixture
def eval_flags(data_dir, tmp_path):
  """Makes the evaluator score what a trainer put into `tmp_path`/train."""
  return [
    f'--data_dir={data_dir}',
    f'--checkpoint_dir={tmp_path}/train',
    f'--eval_dir={tmp_path}/eval',
    '--num_examples=100',
    '--batch_size=32',
  ]


@pytest.fixture
def graph():
  """A fresh default graph with a fixed seed."""
  with tf.Graph().as_default() as graph:
    tf.set_random_seed(1)
    yield graph
