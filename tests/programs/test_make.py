"""Test the targets of the Makefile with a stand-in for Python."""

import os
import pty
import shutil
import signal
import subprocess

import pytest
from support.programs import ROOT, TIMEOUT

# Prints its arguments; if asked to, it waits for Ctrl-C and then "saves".
PYTHON = """#!/bin/sh
trap 'sleep 0.2; echo saved; exit 130' INT
echo "$0 $*"
case "$*" in *status*) exit 3;; *wait*) while :; do sleep 0.1; done;; esac
"""


@pytest.fixture
def make(popen, tmp_path):
  """A function that starts make in a directory with the Makefile."""
  shutil.copy(f'{ROOT}/Makefile', tmp_path)
  (tmp_path / '.venv' / 'bin').mkdir(parents=True)
  (tmp_path / '.venv' / 'bin' / 'python').write_text(PYTHON)
  (tmp_path / '.venv' / 'bin' / 'python').chmod(0o755)
  (tmp_path / 'requirements.txt').touch()
  (tmp_path / '.venv' / 'run').touch()

  def make(*arguments, **streams):
    return popen(
      ['make', *arguments],
      cwd=tmp_path,
      env={'PATH': os.environ['PATH']},  # not that of a make around the tests
      text=True,
      **streams,
    )

  return make


def commands_of(make, *arguments):
  process = make(*arguments, stdout=subprocess.PIPE)
  output, _ = process.communicate(timeout=TIMEOUT)
  assert process.returncode == 0
  shown, done = output.splitlines()
  assert ' '.join(shown.split()) == done  # make shows what it runs
  return done.removeprefix('.venv/bin/')


def test_one_name_keeps_a_run_together(make):
  train = 'python cifar10_train.py'
  evaluate = 'python cifar10_eval.py --eval_interval_secs 30'
  report = 'python cifar10_eval.py --run_once --report auto'
  board = 'python -m cifar10_suite.board'
  assert commands_of(make, 'train') == train
  assert commands_of(make, 'eval') == evaluate
  assert commands_of(make, 'report', 'ARGS=--x a,b') == f'{report} --x a,b'
  assert commands_of(make, 'tensorboard') == (
    f'{board} --logdir_spec train:cifar10_train,eval:cifar10_eval'
  )
  eval_dir = '--eval_dir runs/a/eval'
  assert commands_of(make, 'train', 'RUN=a', 'ARGS=--recipe fast') == (
    f'{train} --train_dir runs/a/train {eval_dir} --recipe fast'
  )
  flags = f'--checkpoint_dir runs/a/train {eval_dir}'
  assert commands_of(make, 'eval', 'RUN=a') == f'{evaluate} {flags}'
  assert commands_of(make, 'report', 'RUN=a') == f'{report} {flags}'
  assert commands_of(make, 'tensorboard', 'RUN=a') == f'{board} --logdir runs/a'
  assert commands_of(make, 'seeds', 'RUN=a', 'N=5') == (
    'python examples/seeds.py --seeds 5 --dir runs/a'
  )
  assert commands_of(make, 'reproduce') == 'python benchmarks/reproduce.py'
  assert commands_of(make, 'reproduce', 'ROW=fast') == (
    'python benchmarks/reproduce.py --row fast'
  )


def test_ctrl_c_is_no_error(make):
  leader, follower = pty.openpty()
  process = make(
    'train',
    'ARGS=--wait',
    stdin=follower,
    stdout=follower,
    stderr=follower,
    start_new_session=True,
    preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
  )
  os.close(follower)
  output = b''
  try:
    while chunk := os.read(leader, 4096):
      output += chunk
      if output.count(b'--wait\r\n') == 2 and b'^C' not in output:
        os.write(leader, b'\x03')
  except OSError:  # the terminal was closed
    pass
  assert process.wait(TIMEOUT) in (0, -signal.SIGINT)
  assert output.endswith(b'^Csaved\r\n') and b'Error' not in output


def test_other_failures_are_errors(make):
  process = make(
    'train', 'ARGS=--status', stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
  )
  _, errors = process.communicate(timeout=TIMEOUT)
  assert process.returncode == 2 and 'Error' in errors


def test_a_name_with_a_space_is_refused(make):
  process = make('train', 'RUN=my run', stderr=subprocess.PIPE)
  _, errors = process.communicate(timeout=TIMEOUT)
  assert process.returncode == 2
  assert 'RUN=my run contains a space. Choose another name.' in errors
