"""Test the programs as processes."""

import datetime
import fcntl
import glob
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from support.data import SMALL_RATE, TINY_BATCH, make_data_set
from support.network_by_hand import write_network_by_hand
from support.programs import (
  ROOT,
  TIMEOUT,
  Program,
  rewrite_checkpoint,
  run,
  summaries,
)

from cifar10_suite import commands, dataset

LINE = re.compile(
  r'(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+): step (?P<step>\d+), '
  r'loss = (?P<loss>\d+\.\d\d) \((?P<rate>\d+\.\d) examples/sec; '
  r'(?P<sec>\d+\.\d{3}) sec/batch\)'
)


def steps_in(lines):
  return [LINE.fullmatch(line) for line in lines if ', loss = ' in line]


@pytest.fixture
def train_flags(data_dir, tmp_path):
  return [
    f'--data_dir={data_dir}',
    f'--train_dir={tmp_path}/train',
    TINY_BATCH,
    SMALL_RATE,
  ]


# Waits for a batch that never comes, in a call that ignores signals.
BLOCKED = """
import sys
sys.path.insert(0, sys.argv[1])
import tensorflow.compat.v1 as tf
from cifar10_suite import sessions
tf.disable_eager_execution()
sessions._PATIENCE_SECS = 1
saves = len(sys.argv) == 2
with sessions.collected_signals([], saves), tf.Session() as session:
  print('Waiting', flush=True)
  session.run(tf.FIFOQueue(1, tf.int32).dequeue())
"""


@pytest.mark.parametrize(
  ('flags', 'says'),
  [
    ([], 'Still completing the step. Another '),
    (['worker'], 'Still waiting for other tasks. Another '),
  ],
)
def test_a_late_second_signal_ends_a_step_that_waits(tmp_path, flags, says):
  program = tmp_path / 'blocked.py'
  program.write_text(BLOCKED)
  with Program(str(program), ROOT, *flags) as process:
    process.wait_for('Waiting')
    for number in (signal.SIGINT, signal.SIGTERM):  # at once: one wish
      process.send_signal(number)
    process.wait_for(says)
    process.send_signal(signal.SIGTERM)
    status, lines = process.finish()
  assert (status, len(lines)) == (128 + signal.SIGTERM, 1)
  assert lines[0].startswith('Stopped by SIGTERM during a step.')


@pytest.mark.parametrize('ends', ['reader', 'terminal'])
def test_saves_when_nobody_reads_the_output(train_flags, popen, tmp_path, ends):
  program = os.path.join(ROOT, 'cifar10_train.py')
  process = popen(
    [sys.executable, program, *train_flags, '--log_frequency=1'],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  next(line for line in process.stdout if ': step 3, ' in line)
  if ends == 'terminal':
    process.send_signal(signal.SIGHUP)
    expected = signal.SIGHUP
  else:
    process.stdout.close()
    expected = signal.SIGTERM
  assert process.wait(TIMEOUT) == 128 + expected
  assert process.stderr.read() == ''
  latest = tf.train.latest_checkpoint(f'{tmp_path}/train')
  assert int(latest.rpartition('-')[2]) >= 3


def test_runs_with_closed_output(train_flags, tmp_path):
  program = os.path.join(ROOT, 'cifar10_train.py')
  command = [sys.executable, program, *train_flags, '--max_steps=2']
  subprocess.run(
    ['sh', '-c', 'exec "$@" >&- 2>&-', 'sh', *command],
    check=True,
    timeout=TIMEOUT,
  )
  assert (tmp_path / 'train' / 'model.ckpt-2.index').exists()


def test_learns_stops_resumes_and_is_evaluated(
  train_flags, eval_flags, tmp_path
):
  train_flags.append('--batch_size=32')
  train_dir, eval_dir = tmp_path / 'train', tmp_path / 'eval'

  with Program(
    'cifar10_train.py', *train_flags, '--log_frequency=10'
  ) as program:
    program.wait_for(': step 10, ')
    program.send_signal(signal.SIGINT)
    status, lines = program.finish()
    assert status == 130
    assert program.errors() == ''
  stopped = re.search(r'Stopped by SIGINT: step (\d+) is saved', lines[-1])
  step = int(stopped[1])
  assert step > 10
  assert str(train_dir) in lines[-1]
  names = os.listdir(train_dir)
  assert f'model.ckpt-{step}.index' in names
  assert 'model.ckpt-0.index' in names

  lines, errors = run(
    'cifar10_train.py', *train_flags, '--max_steps=300', '--log_frequency=50'
  )
  assert errors == ''
  assert f'Resuming from step {step}' in lines
  numbers = [int(line['step']) for line in steps_in(lines)]
  wanted = [n for n in range(0, 300, 50) if n > step]
  assert numbers == [step, *wanted]
  assert 'model.ckpt-300.index' in os.listdir(train_dir)

  lines, errors = run('cifar10_eval.py', *eval_flags, '--run_once')
  assert errors == ''
  assert re.fullmatch(r'[-\d]+ [:.\d]+: precision @ 1 = 1\.000', lines[-2])
  precisions = [
    (step, value.simple_value)
    for step, tag, value in summaries(eval_dir)
    if tag == 'Precision @ 1'
  ]
  assert precisions == [(300, 1.0)]

  tags = {tag for _, tag, _ in summaries(train_dir)}
  assert {'total_loss', 'learning_rate', 'images/image/0'} <= tags


def test_rates_are_true(train_flags, tmp_path):
  train_flags.append('--batch_size=32')
  begin = datetime.datetime.now()
  lines, _ = run(
    'cifar10_train.py',
    *train_flags,
    '--max_steps=40',
    '--log_frequency=7',
    '--num_threads=3',
    environment={'PATH': str(tmp_path)},
  )
  end = datetime.datetime.now()
  assert (
    'Training with 3 threads on the CPU in float32: recipe tutorial, results '
    f'in {tmp_path}/train.'
  ) in lines
  assert 'The network has 1,068,298 parameters.' in lines
  program = re.escape(commands.of('cifar10_eval.py'))
  assert re.fullmatch(
    rf'It took \d+ s\. To score it: {program} --run_once '
    rf'--checkpoint_dir {tmp_path}/train --eval_dir {tmp_path}/eval '
    r'--data_dir \S+',
    lines[-1],
  )
  steps = steps_in(lines)
  assert [int(line['step']) for line in steps] == [0, 7, 14, 21, 28, 35]
  last_time, last_step = None, -1
  for line in steps:
    now = datetime.datetime.fromisoformat(line['time'])
    count = int(line['step']) - last_step
    seconds = count * float(line['sec'])
    # Times are printed in ms, rates with one decimal.
    assert count * 32 / float(line['rate']) == pytest.approx(
      seconds, rel=0.02, abs=0.01
    )
    if last_time is None:
      assert begin + datetime.timedelta(seconds=seconds) < now
    else:
      measured = (now - last_time).total_seconds()
      assert seconds == pytest.approx(measured, rel=0.02, abs=0.01)
    last_time, last_step = now, int(line['step'])
  assert last_time < end


# The evaluator looks more often, and waits less for a trainer to start.
IMPATIENT = {
  'cifar10_suite.evaluation._POLL_SECS': 0.1,
  'cifar10_suite.evaluation._START_SECS': 1,
}


def scored_steps(tmp_path):
  return [
    step
    for step, tag, _ in summaries(tmp_path / 'eval')
    if tag == 'Precision @ 1'
  ]


def test_evaluator_waits_and_scores_each_checkpoint_once(
  train_flags, eval_flags, tmp_path
):
  with Program(
    'cifar10_eval.py',
    *eval_flags,
    '--eval_interval_secs=1',
    constants=IMPATIENT,
  ) as evaluator:
    evaluator.wait_for('No checkpoint file found')
    evaluator.wait_for(f'Waiting for a checkpoint in {tmp_path}/train.')
    for step in (2, 4):
      run('cifar10_train.py', *train_flags, f'--max_steps={step}')
      evaluator.wait_for(f'step {step}: ')
      best = evaluator.wait_for('  best so far: ')
      assert re.fullmatch(r'  best so far: \d\.\d{3} at step [0-4]', best)
    evaluator.send_signal(signal.SIGINT)
    status, lines = evaluator.finish()
    assert status == 130
    assert lines == []
    assert evaluator.errors() == 'Stopped by SIGINT.\n'
  steps = scored_steps(tmp_path)
  assert steps == sorted(set(steps)) and {2, 4} <= set(steps)


def test_evaluator_beside_a_trainer_that_deletes_checkpoints(
  train_flags, eval_flags, tmp_path
):
  """Training ends by score, and evaluation with it."""
  with Program(
    'cifar10_train.py',
    *train_flags,
    '--save_checkpoint_secs=1',
    '--keep_checkpoint_max=2',
    '--patience=2',
    '--learning_rate=0',  # so that no score is better than the first one
    f'--eval_dir={tmp_path}/eval',
  ) as trainer:
    eval_flags.append('--eval_interval_secs=0')
    with Program(
      'cifar10_eval.py', *eval_flags, constants=IMPATIENT
    ) as evaluator:
      for _ in range(2):  # then killed and restarted
        evaluator.wait_for(' right, ')
      assert evaluator.errors() == ''
    lines, errors = run(
      'cifar10_eval.py', *eval_flags, '--until_trained', constants=IMPATIENT
    )
    assert errors == '' and 'Evaluation ends: ' in lines[-1]
    status, (*_, reason, last, _) = trainer.finish()
    assert (status, trainer.errors()) == (0, '')
  steps = scored_steps(tmp_path)
  assert steps == sorted(set(steps)) and len(steps) >= 3
  metrics = (tmp_path / 'eval' / 'metrics.jsonl').read_text()
  scores = [json.loads(line) for line in metrics.splitlines()]
  assert [score['step'] for score in scores] == steps
  assert len(glob.glob(f'{tmp_path}/train/*.index')) == 2
  assert f'Trained to step {steps[-1]}, ' in last
  best = max(scores, key=lambda score: score['precision'])
  assert reason.startswith('Stopped by --patience 2: the best precision is ')
  assert f' {best["precision"]:.3f} at step {best["step"]}, ' in reason


def test_evaluator_skips_what_it_cannot_use(train_flags, eval_flags, tmp_path):
  train_dir = tmp_path / 'train'
  run('cifar10_train.py', *train_flags, '--max_steps=3')
  data = train_dir / 'model.ckpt-3.data-00000-of-00001'
  whole = data.read_bytes()
  data.write_bytes(whole[:1000])
  # It scores the newest readable checkpoint.
  lines, errors = run('cifar10_eval.py', *eval_flags, '--run_once')
  assert errors == '' and 'step 0: ' in lines[-1]
  assert lines[-3].startswith(f'Skipped: Cannot read {train_dir}/model.ckpt-3')
  lines, errors = run('cifar10_eval.py', *eval_flags, '--all_checkpoints')
  assert 'been scored' in lines[-2] and lines[-1].startswith('Skipped: ')
  with Program(
    'cifar10_eval.py', *eval_flags, '--until_trained', constants=IMPATIENT
  ) as evaluator:
    evaluator.wait_for('Waiting')  # step 3 is the last, but has no score
    data.write_bytes(whole)
    run('cifar10_train.py', *train_flags, '--max_steps=4')
    evaluator.wait_for('step 4: ')
    status, lines = evaluator.finish()
    assert lines[-1].endswith('/model.ckpt-4 is the last step.')
    assert status == 0 and evaluator.errors() == ''
  assert scored_steps(tmp_path) == [0, 4]


@pytest.mark.parametrize(
  ('flag', 'says'),
  [
    ('--run_once', 'No checkpoint file found'),
    ('--timeout_secs=1', 'Evaluation ends: no new checkpoint'),
  ],
)
def test_evaluation_without_checkpoint_fails(eval_flags, flag, says):
  lines, errors = run(
    'cifar10_eval.py', *eval_flags, flag, status=1, constants=IMPATIENT
  )
  assert says in lines[-1]
  assert errors == ''


def test_sigterm_saves_the_last_step(train_flags, tmp_path):
  with Program(
    'cifar10_train.py', *train_flags, '--log_frequency=1'
  ) as process:
    process.wait_for(': step 2, ')
    process.send_signal(signal.SIGTERM)
    status, lines = process.finish()
    assert status == 143
    assert process.errors() == ''
  last_step = max([2, *(int(line['step']) for line in steps_in(lines))])
  assert tf.train.latest_checkpoint(str(tmp_path / 'train')).endswith(
    f'model.ckpt-{last_step + 1}'
  )


def test_control_c_while_tensorflow_loads(popen, tmp_path):
  (tmp_path / 'tensorflow').mkdir()
  (tmp_path / 'tensorflow' / '__init__.py').write_text(
    "import time; print('loading', flush=True); time.sleep(1000)"
  )
  process = popen(
    [sys.executable, os.path.join(ROOT, 'cifar10_train.py')],
    env={**os.environ, 'PYTHONPATH': str(tmp_path)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'loading\n'
  process.send_signal(signal.SIGINT)
  output, errors = process.communicate(timeout=TIMEOUT)
  assert (process.returncode, output) == (130, '')
  assert errors == 'Stopped by SIGINT.\n'


@pytest.mark.parametrize(
  'program',
  [
    'cifar10_train.py',
    'cifar10_multi_gpu_train.py',
    'cifar10_eval.py',
    'cifar10_predict.py',
    'cifar10_convert.py',
    'download.py',
    'examples/seeds.py',
  ],
)
def test_a_python_without_the_packages(program):
  result = subprocess.run(
    [sys.executable, '-S', os.path.join(ROOT, program)],  # only what it brings
    capture_output=True,
    text=True,
    timeout=TIMEOUT,
  )
  assert result.returncode == 1
  assert result.stderr.startswith(f'{sys.executable} lacks ')
  assert 'numpy' in result.stderr
  assert len(result.stderr.splitlines()) == 1


def test_restart_removes_only_what_training_wrote(train_flags, tmp_path):
  train_dir = tmp_path / 'train'
  run('cifar10_train.py', *train_flags, '--max_steps=3')
  (train_dir / 'notes.txt').write_text('mine')
  before = sorted(os.listdir(train_dir))
  _, errors = run(
    'cifar10_train.py', *train_flags, '--max_steps=2', '--restart', status=1
  )
  assert 'notes.txt' in errors and 'Traceback' not in errors
  assert sorted(os.listdir(train_dir)) == before
  (train_dir / 'notes.txt').unlink()
  lines, _ = run('cifar10_train.py', *train_flags, '--max_steps=2', '--restart')
  assert not any('Resuming' in line for line in lines)
  assert 'model.ckpt-2.index' in os.listdir(train_dir)
  assert 'model.ckpt-3.index' not in os.listdir(train_dir)


@pytest.fixture
def on_terminal(popen):
  """A function that runs the trainer; returns what it writes to a terminal.

  Its arguments are flags of the trainer, `stdout`, where standard output goes
  instead, and the expected exit `status`.
  """

  def on_terminal(*flags, stdout=None, status=0):
    leader, follower = pty.openpty()
    size = struct.pack('HHHH', 24, 120, 0, 0)  # rows, columns
    fcntl.ioctl(follower, termios.TIOCSWINSZ, size)
    process = popen(
      [sys.executable, os.path.join(ROOT, 'cifar10_train.py'), *flags],
      stdout=stdout or follower,
      stderr=follower,
    )
    os.close(follower)
    output = b''
    try:
      while chunk := os.read(leader, 4096):
        output += chunk
    except OSError:  # the terminal was closed
      pass
    os.close(leader)
    assert process.wait(TIMEOUT) == status
    return output.decode()

  return on_terminal


def shown_of(output):
  """Return the lines that a terminal shows in the end."""
  # Remove what carriage returns and escape sequences overwrite.
  shown = re.sub(r'[^\n]*\r(?!\n)|\x1b\[[0-9;]*[A-Za-z]', '', output)
  return [line.strip('\r') for line in shown.split('\n')]


def test_a_terminal_shows_progress_and_whole_lines(on_terminal, train_flags):
  output = on_terminal(*train_flags, '--max_steps=30', '--log_frequency=10')
  lines = shown_of(output)
  steps = [line for line in lines if LINE.fullmatch(line)]
  assert len(steps) == 3
  assert 'Loading TensorFlow' in output and 'Loading' not in ''.join(lines)
  assert 'examples/sec' in output and '30/30' in output


def test_an_error_has_a_line_of_its_own_below_the_progress(
  on_terminal, train_flags
):
  flags = [*train_flags, '--learning_rate=1e30', '--log_frequency=1']
  lines = shown_of(on_terminal(*flags, status=1))
  assert lines[-1] == '' and lines[-2].startswith('Training diverged at ')


def test_no_progress_between_the_lines_of_a_pipe(on_terminal, train_flags):
  """As in `| tee log`, which shows the lines on the same terminal."""
  output = on_terminal(*train_flags, '--max_steps=1', stdout=subprocess.DEVNULL)
  assert 'Loading TensorFlow' in output and 'step' not in output


@pytest.mark.faults
def test_precisions_share_checkpoints(train_flags, record_fault):
  for steps, precision in ((2, '--use_fp16'), (4, '--use_bf16'), (6, '')):
    flags = [*train_flags, *filter(None, [precision])]
    lines, errors = run('cifar10_train.py', *flags, f'--max_steps={steps}')
    assert errors == ''
    if steps > 2:
      assert f'Resuming from step {steps - 2}' in lines
      record_fault('a checkpoint of another precision')


@pytest.mark.parametrize(
  ('values', 'says'),
  [
    pytest.param(
      {'local3/weights': 1e30},
      'diverged at step 2: the loss is inf',
      marks=pytest.mark.faults,
    ),
    (  # The loss is finite, but the next moving average overflows.
      {'conv1/biases': -3e38, 'conv1/biases/ExponentialMovingAverage': 3e38},
      'diverged at step 5: a variable is not finite',
    ),
  ],
)
def test_nan_stops_before_anything_is_saved(
  train_flags, tmp_path, values, says, record_fault
):
  train_dir = str(tmp_path / 'train')
  path = write_network_by_hand(train_dir, 2)
  rewrite_checkpoint(
    path,
    path,
    lambda name, old: np.full_like(old, values.get(name, old)),
  )
  _, errors = run('cifar10_train.py', *train_flags, '--max_steps=5', status=1)
  assert says in errors
  assert 'Traceback' not in errors
  assert tf.train.latest_checkpoint(train_dir) == path
  record_fault('a value that is not finite')


@pytest.mark.faults
def test_a_checkpoint_that_is_not_finite_is_not_resumed(train_flags, tmp_path):
  run('cifar10_train.py', *train_flags, '--max_steps=2')
  path = tf.train.latest_checkpoint(str(tmp_path / 'train'))
  bad = path.replace('ckpt-2', 'ckpt-3')
  rewrite_checkpoint(
    path,
    bad,
    lambda name, old: old + 1 if name == 'global_step' else np.nan * old,
  )
  flags = [*train_flags, '--max_steps=4']
  lines, errors = run('cifar10_train.py', *flags)
  assert errors == ''
  assert any(f'Skipped: {bad} is of a training that' in it for it in lines)
  assert 'Resuming from step 2' in lines
  source = f'--init_from={bad}'
  _, errors = run(
    'cifar10_train.py', *flags, source, f'--train_dir={tmp_path}/b', status=1
  )
  assert f'--init_from {bad} has no readable checkpoint' in errors


def test_reads_the_tutorials_checkpoints(train_flags, eval_flags, tmp_path):
  """The tutorial also saved its loss averages."""
  reader = tf.train.load_checkpoint(
    write_network_by_hand(f'{tmp_path}/source', 2)
  )
  (tmp_path / 'train').mkdir()
  with tf.Graph().as_default(), tf.Session() as session:
    for name in reader.get_variable_to_shape_map():
      tf.Variable(reader.get_tensor(name), name=name)
    for loss in ('cross_entropy', 'local3/weight_loss', 'total_loss'):
      tf.Variable(1.0, name=f'{loss}/avg')
    session.run(tf.global_variables_initializer())
    tf.train.Saver().save(session, f'{tmp_path}/train/model.ckpt', 7)
  lines, _ = run('cifar10_eval.py', *eval_flags, '--run_once')
  assert 'precision @ 1 = ' in lines[-2]
  lines, _ = run('cifar10_train.py', *train_flags, '--max_steps=4')
  assert 'Resuming from step 2' in lines


def test_reads_checkpoints_of_the_first_tutorial(
  train_flags, eval_flags, tmp_path
):
  """Its global step has no name; the evaluator takes it from the file's."""
  reader = tf.train.load_checkpoint(
    write_network_by_hand(f'{tmp_path}/source', 2)
  )
  (tmp_path / 'train').mkdir()
  with tf.Graph().as_default(), tf.Session() as session:
    for name in reader.get_variable_to_shape_map():
      is_step = name == 'global_step'
      tf.Variable(reader.get_tensor(name), name=None if is_step else name)
    session.run(tf.global_variables_initializer())
    tf.train.Saver().save(session, f'{tmp_path}/train/model.ckpt', 7)
  lines, _ = run('cifar10_eval.py', *eval_flags, '--run_once')
  assert lines[-1].startswith('  step 7: ')
  _, errors = run('cifar10_train.py', *train_flags, '--max_steps=9', status=1)
  assert 'global_step is missing in the checkpoint' in errors


@pytest.mark.parametrize(
  ('program', 'flag', 'main', 'rare'),
  [
    ('cifar10_train.py', '-h', '--max_steps', '--hold_out'),
    ('cifar10_multi_gpu_train.py', '--help', '--num_gpus', '--patience'),
    ('cifar10_eval.py', '--help', '--checkpoint_dir', '--eval_data'),
    ('cifar10_predict.py', '-h', '--top_k', '--json'),
  ],
)
def test_help_fits_on_a_page(program, flag, main, rare):
  lines, errors = run(program, flag)
  assert errors == '' and len(lines) < 40
  assert max(map(len, lines)) <= 80
  assert not any(ROOT in line for line in lines)
  at = {
    name: next(k for k, line in enumerate(lines) if line.startswith(name))
    for name in (f'  {main} ', 'Rarely used:', f'  {rare} ')
  }
  assert list(at.values()) == sorted(at.values())


class TestMistakes:
  @pytest.fixture
  def check(self, train_flags, eval_flags, data_dir, tmp_path):
    """A function that checks that a program refuses its arguments.

    Unless they name others, it uses new directories: a program that does not
    refuse them must not touch those of the user.
    """
    flags = {
      'cifar10_train.py': train_flags,
      'cifar10_eval.py': eval_flags,
      'cifar10_predict.py': [f'--data_dir={data_dir}'],
      'cifar10_convert.py': [f'--data_dir={tmp_path}/data'],
      'download.py': [f'--data_dir={tmp_path}/data'],
    }

    def check(program, *arguments, says, status=1):
      command = [program, *flags[program], *arguments]
      _, errors = run(*command, status=status, cwd=tmp_path)
      assert says in errors
      assert 'Traceback' not in errors
      assert len(errors.splitlines()) <= 2
      return errors

    return check

  @pytest.mark.parametrize(
    ('program', 'argument', 'says'),
    [
      ('cifar10_train.py', '--batch_size=0', '--batch_size=0'),
      ('cifar10_train.py', '--stop_at_precision=86', 'such as 0.86'),
      ('cifar10_train.py', '--data_dri=x', 'Did you mean: data_dir'),
      ('cifar10_train.py', 'stray', 'Unexpected argument: stray'),
      ('cifar10_train.py', '--lr=1', 'Did you mean --learning_rate?'),
      ('cifar10_train.py', '--epochs', 'Did you mean --max_steps'),
      ('cifar10_train.py', '--max_steps=3000000000', '--max_steps 3000000000'),
      ('cifar10_train.py', '--profile_steps=100000,100001', 'step 99999.'),
      ('cifar10_train.py', '--train_dir=~/run', 'has not expanded ~'),
      ('download.py', '--data_dir=~/data', 'has not expanded ~'),
      ('cifar10_eval.py', '--num_examples=-1', '--num_examples=-1'),
    ],
  )
  def test_flags(self, check, program, argument, says):
    check(program, argument, says=says)

  def test_eval_data(self, check):
    check('cifar10_eval.py', '--eval_data=nonsense', says='nonsense')

  def test_download_flag(self, check):
    check('download.py', '--data_dri=x', says='--data_dri=x', status=2)

  @pytest.mark.parametrize(
    ('program', 'flag'),
    [('cifar10_train.py', '--train_dir'), ('cifar10_eval.py', '--eval_dir')],
  )
  def test_output_directory(self, check, program, flag, tmp_path):
    (tmp_path / 'file').write_text('')
    for path in (tmp_path / 'file', '/proc/nowhere'):
      check(program, f'{flag}={path}', says=f'{flag} {path}')

  @pytest.mark.parametrize(
    ('program', 'arguments'),
    [
      ('cifar10_train.py', ['--train_dir=s3://bucket/run']),
      ('cifar10_eval.py', ['--checkpoint_dir', 'gs://bucket/run']),
      ('cifar10_predict.py', ['hdfs://host/cat.jpg']),
      ('cifar10_convert.py', ['x', '--data_dir', 's3://bucket/data']),
      ('download.py', ['--data_dir', 's3://bucket/data']),
    ],
  )
  def test_remote_directories(self, check, program, arguments, tmp_path):
    value = arguments[-1].rpartition('=')[2]
    errors = check(program, *arguments, says='is not a local path')
    assert errors.startswith(value)
    assert len(errors.splitlines()) == 1
    assert not os.listdir(tmp_path)

  def test_a_directory_that_looks_like_a_pattern(self, check, tmp_path):
    flag = f'--train_dir={tmp_path}/run[1]'
    check('cifar10_train.py', flag, says=f'{flag.replace("=", " ")} has')
    flags = [f'--checkpoint_dir={tmp_path}/run[1]', '--run_once']
    check('cifar10_eval.py', *flags, says=f'{tmp_path}/run[1] has')
    assert not os.path.exists(f'{tmp_path}/run[1]')
    says = f'{tmp_path}/run[1]'
    for flag in ('--export_dir', '--saved_model'):
      check('cifar10_predict.py', flag, f'{tmp_path}/run[1]', says=says)
    shutil.copytree(os.path.join(ROOT, 'pretrained'), f'{tmp_path}/run[1]')
    (index,) = glob.glob(f'{glob.escape(f"{tmp_path}/run[1]")}/*.index')
    flag = f'--checkpoint_dir={index.removesuffix(".index")}'
    check('cifar10_predict.py', flag, 'x.png', says=says)

  def test_missing_and_truncated_file(self, check, tmp_path):
    data_dir = make_data_set(str(tmp_path / 'data'), records_per_file=5)
    path = os.path.join(data_dir, dataset.BATCHES_DIR, 'data_batch_4.bin')
    with open(path, 'r+b') as file:
      file.truncate(3073 * 4 + 1)
    flag = f'--data_dir={data_dir}'
    check('cifar10_train.py', flag, says=path)
    os.remove(path)
    says = f'Failed to find file: {path}'
    check('cifar10_train.py', flag, says=says)

  @pytest.mark.parametrize(
    ('program', 'name'),
    [
      ('cifar10_train.py', 'data_batch_4.bin'),
      ('cifar10_eval.py', 'test_batch.bin'),
    ],
  )
  def test_bad_label(self, check, tmp_path, program, name):
    data_dir = make_data_set(str(tmp_path / 'data'), records_per_file=100)
    path = os.path.join(data_dir, dataset.BATCHES_DIR, name)
    flags = [f'--data_dir={data_dir}']
    if program == 'cifar10_eval.py':
      write_network_by_hand(f'{tmp_path}/train', 1)
      flags.append('--run_once')
    with open(path, 'r+b') as file:
      file.seek(3073 * 4)
      file.write(bytes([200]))
    check(program, *flags, says=f'[{path}:4] [200]')

  def test_too_few_examples(self, check, tmp_path):
    write_network_by_hand(f'{tmp_path}/train', 1)
    check(
      'cifar10_eval.py',
      '--num_examples=101',
      '--run_once',
      says='There are 100 images to score, not the 101 of --num_examples.',
    )

  def test_checkpoint_of_another_network(self, check, tmp_path):
    (tmp_path / 'train').mkdir()
    with tf.Graph().as_default(), tf.Session() as session:
      tf.train.get_or_create_global_step()
      tf.get_variable('conv1/weights', [3, 3])
      session.run(tf.global_variables_initializer())
      tf.train.Saver().save(session, f'{tmp_path}/train/model.ckpt', 7)
    check(
      'cifar10_train.py',
      says='conv1/weights is float32 [3, 3] in the checkpoint, '
      'float32 [5, 5, 3, 64] in the network',
    )
