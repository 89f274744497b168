"""Fixtures, and the same setup of TensorFlow as in the programs."""

import contextlib
import importlib
import os
import signal
import subprocess

from cifar10_suite import loading

loading.load_tensorflow()

import pytest
import tensorflow.compat.v1 as tf
from support.data import make_data_set
from support.programs import ROOT

from cifar10_suite import dataset, processor

# Background jobs of a shell ignore SIGINT, those of nohup SIGHUP, and the
# programs started by the tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

tf.disable_v2_behavior()
tf.app.flags.FLAGS.mark_as_parsed()  # flags keep their defaults


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
  """The `--data_dir` of an artificial data set of 6 x 100 images."""
  return make_data_set(str(tmp_path_factory.mktemp('data')))


@pytest.fixture(scope='session')
def batches_dir(data_dir):
  """The directory of the data files in `data_dir`."""
  return os.path.join(data_dir, dataset.BATCHES_DIR)


@pytest.fixture
def turns(monkeypatch):
  """The benchmark's module of this name, with a single slice."""
  monkeypatch.syspath_prepend(os.path.join(ROOT, 'benchmarks'))
  module = importlib.import_module('turns')
  monkeypatch.setattr(module, 'NUM_SLICES', 1)
  return module


@pytest.fixture
def popen():
  """A function like `subprocess.Popen`; processes end with the test."""
  with contextlib.ExitStack() as stack:

    def start(*arguments, **options):
      process = stack.enter_context(subprocess.Popen(*arguments, **options))
      stack.callback(process.kill)
      return process

    yield start


@pytest.fixture
def record_fault(record_property):
  """A function that records a fault, its count and the loss of training."""

  def record(name, times=1, lost=0, unit='s'):
    record_property('fault', (name, times, lost, unit))

  return record


def pytest_report_header():
  """Report the processor and the version of TensorFlow."""
  return [
    f'processor: {processor.describe()}',
    f'TensorFlow {tf.__version__}',
  ]


def pytest_terminal_summary(terminalreporter):
  """Print a table of all injected faults."""
  faults = {}
  for report in terminalreporter.getreports('passed'):
    for key, value in report.user_properties:
      if key == 'fault':
        name, times, lost, unit = value
        before = faults.get(name, (0, 0, unit))
        faults[name] = (before[0] + times, max(before[1], lost), unit)
  if faults:
    terminalreporter.section('faults: count, maximum loss of training')
  for name, (times, lost, unit) in sorted(faults.items()):
    terminalreporter.write_line(f'{name:50}{times:6}{lost:6.3g} {unit}')


@pytest.fixture
def eval_flags(data_dir, tmp_path):
  """Flags to evaluate the checkpoints in `tmp_path`/train."""
  return [
    f'--data_dir={data_dir}',
    f'--checkpoint_dir={tmp_path}/train',
    f'--eval_dir={tmp_path}/eval',
    '--num_examples=100',
    '--batch_size=32',
  ]


@pytest.fixture
def graph():
  """A new default graph with a fixed seed."""
  with tf.Graph().as_default() as graph:
    tf.set_random_seed(1)
    yield graph


@pytest.fixture
def log_level():
  """Undo the global effect of joining a cluster after the test."""
  level = tf.logging.get_verbosity()
  yield
  tf.logging.set_verbosity(level)
