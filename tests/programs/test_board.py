"""Test TensorBoard as `make tensorboard` starts it."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
import tensorflow.compat.v1 as tf
from support.programs import ROOT, TIMEOUT, wait_until
from tensorboard.plugins.hparams import summary as hparams


@pytest.fixture
def start(popen):
  """A function that starts TensorBoard with flags."""

  def start(*flags, **streams):
    command = [sys.executable, '-m', 'cifar10_suite.board', *flags]
    return popen(command, cwd=ROOT, text=True, **streams)

  return start


def write(directory, *values, hyperparameters=None):
  """Write an event file with (tag, value) pairs."""
  summary = tf.Summary()
  for tag, value in values:
    summary.value.add(tag=tag, simple_value=value)
  if hyperparameters:
    summary.MergeFrom(hparams.session_start_pb(hyperparameters))
  with tf.Graph().as_default(), tf.summary.FileWriter(directory) as writer:
    writer.add_summary(summary, 1)


def answer(url, question=None):
  """Return the answer to a GET request or, with a question, a POST request."""
  data = json.dumps(question).encode() if question else None
  request = urllib.request.Request(
    url, data, {'Content-Type': 'application/json'}
  )
  with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
    return json.load(response)


@pytest.mark.slow
def test_runs_can_be_compared(start, tmp_path):
  write(str(tmp_path / 'trainer'), ('cross_entropy', 2.0))
  places = f'train:{tmp_path}/trainer,eval:{tmp_path}/evaluator'
  # Without a name; with a slash in it.
  places += f',{tmp_path}/trainer,a/b:{tmp_path}/trainer'
  process = start(
    f'--logdir_spec={places}',
    '--port=0',
    '--reload_interval=1',
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  url = re.search('http:[^ ]*/', process.stdout.readline())[0]
  # The evaluator starts later.
  write(
    str(tmp_path / 'evaluator'),
    ('cross_entropy', 1.0),
    ('Precision @ 1', 0.5),
    hyperparameters={'learning_rate': 0.25},
  )
  runs = f'{url}data/runs'
  names = {'train', 'eval', 'trainer', 'a_b'}
  wait_until(lambda: set(answer(runs)) == names, pause=0.1)
  tags = answer(f'{url}data/plugin/scalars/tags')
  assert 'cross_entropy' in tags['train'] and 'cross_entropy' in tags['eval']

  question = {'experimentName': '', 'startIndex': 0, 'sliceSize': 9}
  question['colParams'] = [{'metric': {'tag': 'Precision @ 1', 'group': ''}}]
  question['allowedStatuses'] = ['STATUS_UNKNOWN']
  groups = answer(f'{url}data/plugin/hparams/session_groups', question)
  (group,) = groups['sessionGroups']
  assert group['name'] == 'eval'
  assert group['hparams'] == {'learning_rate': 0.25}
  values = {it['name']['tag']: it['value'] for it in group['metricValues']}
  assert values['Precision @ 1'] == 0.5

  with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
    assert 'pinnedCards' in response.url
    assert '<title>TensorBoard' in response.read().decode()
  process.send_signal(signal.SIGINT)
  assert process.communicate(timeout=TIMEOUT) == ('', '')
  assert process.returncode == 130


@pytest.mark.slow
def test_a_port_in_use_is_an_error(start, tmp_path):
  with socket.create_server(('localhost', 0)) as server:
    port = server.getsockname()[1]
    process = start(
      f'--logdir={tmp_path}', f'--port={port}', stderr=subprocess.PIPE
    )
    _, errors = process.communicate(timeout=TIMEOUT)
  assert process.returncode == 1
  assert str(port) in errors and '--port' in errors
  assert errors.count('\n') == 1
