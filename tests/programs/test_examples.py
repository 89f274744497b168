"""Test the queue and data lessons, and the cluster of processes."""

import argparse
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from support.data import make_data_set, random_images, write_records
from support.programs import ROOT, load, run

from cifar10_suite import dataset


def read(path):
  with open(path, 'rb') as file:
    return file.read()


@pytest.mark.parametrize(
  ('flags', 'epochs'), [([], 5), (['--num_epochs=2'], 2)]
)
def test_queue_demo(tmp_path, flags, epochs):
  flag = f'--output_dir={tmp_path}'
  lines, errors = run('examples/queue_demo.py', flag, *flags)
  assert errors == ''
  assert 'OutOfRangeError' in lines[-1] and len(lines) == 3 * epochs + 1
  count = 3 * epochs
  assert len(os.listdir(tmp_path)) == count
  for number in range(count):
    original = f'{ROOT}/examples/pictures/{"ABC"[number % 3]}.jpg'
    assert read(tmp_path / f'test_{number + 1}.jpg') == read(original)


def test_queue_demo_shuffles_within_epochs(tmp_path):
  run(
    'examples/queue_demo.py',
    f'--output_dir={tmp_path}',
    '--shuffle',
    '--num_epochs=10',
  )
  # Written over by the next lesson, but not by another program's pictures.
  run('examples/queue_demo.py', f'--output_dir={tmp_path}', '--num_epochs=1')
  assert read(tmp_path / 'test_1.jpg') == read(
    f'{ROOT}/examples/pictures/A.jpg'
  )
  run(
    'examples/queue_demo.py',
    f'--output_dir={tmp_path}',
    '--shuffle',
    '--num_epochs=10',
  )
  originals = [read(f'{ROOT}/examples/pictures/{name}.jpg') for name in 'ABC']
  order = [
    originals.index(read(tmp_path / f'test_{number}.jpg'))
    for number in range(1, 31)
  ]
  assert all(
    sorted(order[start : start + 3]) == [0, 1, 2] for start in range(0, 30, 3)
  )
  assert order != 10 * [0, 1, 2]


def test_save_images(data_dir, batches_dir, tmp_path):
  lines, errors = run(
    'examples/save_images.py',
    f'--data_dir={data_dir}',
    f'--output_dir={tmp_path}',
    '--format=png',
    '--contact_sheet',
    '--distorted',
  )
  assert errors == ''
  expected = dataset.read_images(False, batches_dir, np.arange(30))
  for number, image in enumerate(expected):
    with PIL.Image.open(tmp_path / f'{number}.png') as picture:
      np.testing.assert_array_equal(picture, image)
  assert sorted(os.listdir(tmp_path)) == sorted(
    ['contact_sheet.png', 'distorted.png', *(f'{k}.png' for k in range(30))]
  )
  for name, columns, rows in (('contact_sheet', 10, 3), ('distorted', 9, 8)):
    with PIL.Image.open(tmp_path / f'{name}.png') as sheet:
      assert sheet.size == (columns * 72, rows * 82)


def test_save_images_says_when_there_are_fewer(data_dir, tmp_path):
  flag = f'--output_dir={tmp_path}'
  lines, _ = run(
    'examples/save_images.py',
    f'--data_dir={data_dir}',
    flag,
    '--num_images=501',
  )
  assert 'There are only 500 images.' in lines
  assert len(os.listdir(tmp_path)) == 500
  with PIL.Image.open(tmp_path / '499.jpg') as picture:
    assert picture.size == (32, 32)


def test_save_images_of_many_classes(tmp_path):
  batches_dir = tmp_path / dataset.BATCHES_DIR
  batches_dir.mkdir()
  names = [f'class {k}' for k in range(20)]
  (batches_dir / 'batches.meta.txt').write_text('\n'.join(names) + '\n')
  for name in ('data_batch_1.bin', 'test_batch.bin'):
    write_records(batches_dir / name, np.arange(20), random_images(20, seed=1))
  lines, errors = run(
    'examples/save_images.py',
    f'--data_dir={tmp_path}',
    '--num_images=20',
    '--contact_sheet',
  )
  assert errors == '' and any('Saved 20 images' in line for line in lines)


def test_save_images_names_a_bad_label(tmp_path):
  data_dir = make_data_set(str(tmp_path))
  path = os.path.join(data_dir, dataset.BATCHES_DIR, 'data_batch_1.bin')
  with open(path, 'r+b') as file:
    file.seek(3073 * 4)
    file.write(bytes([200]))
  flags = [f'--data_dir={data_dir}', f'--output_dir={tmp_path}/pictures']
  _, errors = run('examples/save_images.py', *flags, status=1)
  assert errors.startswith('[Damaged file: a label is above 9')
  assert errors.endswith(f'[{path}:4] [200]\n'), errors


# A program for the tasks of a cluster. The chief ends with the other task.
_TASK = """
import json, os, pathlib, signal, sys, time
kind = json.loads(os.environ['TF_CONFIG'])['task']['type']
is_restarted = '--norestart' in sys.argv
ended = pathlib.Path('{ended}')
if kind == 'chief':
  deadline = time.monotonic() + 60
  while not ended.exists() and time.monotonic() < deadline:
    time.sleep(0.01)
  sys.exit(not ended.exists())
{other}
ended.touch()
"""


def run_cluster(tmp_path, other, evaluator=False):
  """Run a cluster whose chief waits for the end of one other task.

  Args:
    tmp_path: directory for logs.
    other: program of the other task.
    evaluator: whether the other task is an evaluator, not a worker.
  """
  program = _TASK.format(ended=tmp_path / 'ended', other=other)
  return load('examples/cluster.py').run(
    argparse.Namespace(
      workers=2 - evaluator,
      ps=0,
      evaluator=evaluator,
      log_dir=str(tmp_path),
    ),
    [sys.executable, '-c', program],
  )


@pytest.mark.parametrize(
  'ending', ['os.kill(os.getpid(), 9)', 'os.kill(os.getpid(), 15)', 'exit(143)']
)
def test_a_killed_task_of_a_cluster_is_restarted(tmp_path, ending):
  other = f'if not is_restarted: {ending}'
  assert run_cluster(tmp_path, other) == 0


@pytest.mark.parametrize(
  ('ending', 'status'), [('os.kill(os.getpid(), 11)', 139), ('exit(3)', 3)]
)
def test_a_task_of_a_cluster_that_fails_ends_it(tmp_path, ending, status):
  assert run_cluster(tmp_path, ending) == status


def test_a_task_of_a_cluster_is_not_restarted_forever(tmp_path, capfd):
  assert run_cluster(tmp_path, 'os.kill(os.getpid(), 9)') == 137
  lines = capfd.readouterr().out.splitlines()
  assert lines.count('worker 0: SIGKILL; restarted.') == 5
  assert lines[-1] == 'worker 0: SIGKILL, after 5 restarts in 60 s.'


def test_an_evaluator_that_fails_does_not_end_training(tmp_path, capfd):
  other = 'ended.touch(); print("No such directory", flush=True); exit(3)'
  assert run_cluster(tmp_path, other, evaluator=True) == 3
  lines = capfd.readouterr().out.splitlines()
  assert lines[-2:] == ['evaluator 0 ended with status 3:', 'No such directory']


def test_a_cluster_waits_for_the_last_score(tmp_path, capfd):
  other = 'ended.touch(); time.sleep(1); print("Scored.")'
  assert run_cluster(tmp_path, other, evaluator=True) == 0
  assert (tmp_path / 'evaluator-0.log').read_text() == 'Scored.\n'
  assert 'Waiting for the last score, 300 s at most.' in capfd.readouterr().out


def test_a_cluster_does_not_wait_forever_for_the_last_score(capfd):
  module = load('examples/cluster.py')
  with subprocess.Popen(
    [sys.executable, '-c', 'input()'], stdin=subprocess.PIPE
  ) as process:
    assert module.wait_for_evaluator(process, '', 0.1) == 1
    process.kill()
  assert 'The last step has no score.' in capfd.readouterr().out


class Task:
  """A task of a cluster whose end is awaited in vain."""

  def __init__(self, has_patience):
    self.has_patience = has_patience
    self.calls = []

  def __getattr__(self, name):
    return lambda *arguments: self.calls.append(name)

  def wait(self, timeout=None):
    if timeout and not self.has_patience:
      raise KeyboardInterrupt  # the second Ctrl-C
    self.calls.append('wait')


def test_a_second_control_c_leaves_no_task_of_a_cluster():
  module = load('examples/cluster.py')
  tasks = {'chief 0': Task(False), 'worker 0': Task(True)}
  with pytest.raises(KeyboardInterrupt):
    module.stop(tasks)
  assert tasks['chief 0'].calls == ['terminate', 'kill', 'wait']
  assert tasks['worker 0'].calls == ['kill', 'wait']
  module.stop({})  # nothing has started
