"""Test that checkpoint directories are self-contained and no files get lost.

A directory of checkpoints may be copied, moved or accessed by another path, and
it may contain other people's files.
"""

import glob
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from support.data import SMALL_RATE, TINY_BATCH
from support.network_by_hand import write_network_by_hand
from support.programs import ROOT, TIMEOUT, Program, rewrite_checkpoint, run


def steps_in(directory):
  """Return the steps of a directory's checkpoints."""
  names = glob.glob(f'{glob.escape(str(directory))}/model.ckpt-*.index')
  return sorted(int(name[:-6].rpartition('-')[2]) for name in names)


def contents(directory):
  """Return the contents of all files in a directory, except locks."""
  found = {}
  for folder, _, names in os.walk(directory):
    for name in set(names) - {'.lock'}:
      path = os.path.join(folder, name)
      if os.path.islink(path):
        found[os.path.relpath(path, directory)] = os.readlink(path)
        continue
      with open(path, 'rb') as file:
        found[os.path.relpath(path, directory)] = file.read()
  return found


def name_absolutely(directory):
  """Write the state file with absolute paths, TensorFlow's default."""
  paths = [f'{directory}/model.ckpt-{step}' for step in steps_in(directory)]
  tf.train.update_checkpoint_state(str(directory), paths[-1], paths)


def write_run(directory, steps, absolute=True):
  """Write checkpoints at given steps, like a training run."""
  os.makedirs(directory)
  for step in steps:
    write_network_by_hand(str(directory), step)
  if absolute:
    name_absolutely(directory)
  else:
    names = [f'model.ckpt-{step}' for step in steps]
    tf.train.update_checkpoint_state(str(directory), names[-1], names)


@pytest.fixture
def flags(data_dir):
  return [f'--data_dir={data_dir}', TINY_BATCH, SMALL_RATE]


@pytest.fixture
def train(flags, tmp_path):
  """A function that trains up to a step and returns the lines."""

  def train(train_dir, max_steps, *more, cwd=tmp_path):
    lines, errors = run(
      'cifar10_train.py',
      *flags,
      f'--train_dir={train_dir}',
      f'--max_steps={max_steps}',
      *more,
      cwd=cwd,
    )
    assert errors == ''
    return lines

  return train


@pytest.fixture
def refused(flags, tmp_path):
  """A function that checks that training is refused; returns the error."""

  def refused(train_dir, *more):
    before = contents(train_dir)
    _, errors = run(
      'cifar10_train.py',
      *flags,
      f'--train_dir={train_dir}',
      '--max_steps=900',
      *more,
      status=1,
    )
    assert contents(train_dir) == before
    assert 'Traceback' not in errors and len(errors.splitlines()) == 1
    return errors

  return refused


@pytest.mark.parametrize(
  'absolute', [True, pytest.param(False, marks=pytest.mark.faults)]
)
@pytest.mark.parametrize(
  'how',
  [
    pytest.param('copied', marks=pytest.mark.faults),
    pytest.param('moved', marks=pytest.mark.faults),
    'moved, another in place',
  ],
)
def test_a_copy_is_resumed_and_pruned_by_itself(
  tmp_path, train, how, absolute, record_fault
):
  original, other = tmp_path / 'a', tmp_path / 'b'
  write_run(original, [1, 2, 3, 4], absolute)
  if how == 'copied':
    shutil.copytree(original, other)
  else:
    os.rename(original, other)
  if how == 'moved, another in place':
    write_run(original, [3, 4, 50])
  before = contents(original)
  lines = train(other, 6, '--keep_checkpoint_max=2')
  assert 'Resuming from step 4' in lines
  assert contents(original) == before
  assert steps_in(other) == [4, 6]
  state = tf.train.get_checkpoint_state(str(other))
  assert list(state.all_model_checkpoint_paths) == [
    f'{other}/model.ckpt-{step}' for step in (4, 6)
  ]
  assert str(tmp_path) not in (other / 'checkpoint').read_text()
  record_fault('a directory of checkpoints copied or moved')


def test_a_copy_is_scored_by_itself(tmp_path, eval_flags, record_fault):
  original, copy = tmp_path / 'a', tmp_path / 'train'
  write_run(original, [1, 2])
  shutil.copytree(original, copy)
  shutil.rmtree(original)
  write_run(original, [2, 30])
  # The network in the copy always predicts 'airplane'.
  rewrite_checkpoint(
    f'{copy}/model.ckpt-2',
    f'{copy}/model.ckpt-2',
    lambda name, old: old if 'step' in name else 0 * old,
  )
  (copy / 'checkpoint').write_text(
    f'model_checkpoint_path: "{original}/model.ckpt-30"\n'
  )
  run('cifar10_eval.py', *eval_flags, '--run_once')
  metrics = (tmp_path / 'eval' / 'metrics.jsonl').read_text().splitlines()
  (record,) = map(json.loads, metrics)
  assert record['step'] == 2
  matrix = np.array(record['confusion_matrix'])
  assert matrix[:, 0].sum() == matrix.sum() == 100
  record_fault('a directory of checkpoints copied or moved')


@pytest.mark.faults
def test_a_copy_trains_while_the_original_does(
  flags, tmp_path, train, record_fault
):
  original, copy = tmp_path / 'a', tmp_path / 'b'
  more = ['--keep_checkpoint_max=0', '--save_checkpoint_secs=1']
  with Program(
    'cifar10_train.py', *flags, f'--train_dir={original}', *more
  ) as trainer:
    for step in (100, 200):
      trainer.wait_for(f': step {step}, ')
    before = steps_in(original)
    shutil.copytree(original, copy)
    train(copy, before[-1] + 500, '--keep_checkpoint_max=1')
    trainer.send_signal(signal.SIGINT)
    status, lines = trainer.finish()
    assert (status, trainer.errors()) == (130, '')
  assert set(before) < set(steps_in(original))
  assert steps_in(copy) == [before[-1] + 500]
  for step in steps_in(original):
    tf.train.load_variable(f'{original}/model.ckpt-{step}', 'conv1/weights')
  record_fault('a directory of checkpoints copied or moved')


def test_another_runs_state_file_is_not_followed(tmp_path, train, record_fault):
  original, other = tmp_path / 'a', tmp_path / 'b'
  write_run(original, [1, 20])
  write_run(other, [2, 4])
  shutil.copy(original / 'checkpoint', other / 'checkpoint')
  before = contents(original)
  lines = train(other, 5, '--keep_checkpoint_max=1')
  assert 'Resuming from step 4' in lines
  assert 'Deleted 1 older checkpoint, to keep --keep_checkpoint_max=1.' in lines
  assert contents(original) == before
  assert steps_in(other) == [5]
  record_fault('the state file of another run')


@pytest.mark.faults
def test_a_state_file_alone_is_not_followed(
  tmp_path, train, refused, record_fault
):
  original, other = tmp_path / 'a', tmp_path / 'b'
  write_run(original, [1, 2])
  other.mkdir()
  shutil.copy(original / 'checkpoint', other / 'checkpoint')
  before = contents(original)
  assert f'{other}/checkpoint is not from this network' in refused(other)
  # Next to a graph of this network, it was left by a trainer.
  train(tmp_path / 'c', 1)
  shutil.copy(tmp_path / 'c' / 'graph.pbtxt', other)
  lines = train(other, 3, '--keep_checkpoint_max=1')
  assert not any('Resuming' in line for line in lines)
  assert any(f'{original}/model.ckpt-2' in line for line in lines)
  assert contents(original) == before
  assert steps_in(other) == [3]
  record_fault('the state file of another run')


@pytest.mark.parametrize(
  'state',
  [
    b'\xff\x00\xfe',
    pytest.param(b'', marks=pytest.mark.faults),
    pytest.param(b'model_checkpoint_path: "mo', marks=pytest.mark.faults),
  ],
)
def test_a_damaged_state_file_is_written_anew(
  tmp_path, train, state, record_fault
):
  write_run(tmp_path / 'a', [1, 2])
  (tmp_path / 'a' / 'checkpoint').write_bytes(state)
  assert 'Resuming from step 2' in train(tmp_path / 'a', 3)
  assert steps_in(tmp_path / 'a') == [1, 2, 3]
  record_fault('the state file lost or cut short')


def test_the_best_checkpoint_may_be_copied_elsewhere(
  tmp_path, eval_flags, record_fault
):
  write_run(tmp_path / 'train', [7])
  run('cifar10_eval.py', *eval_flags, '--run_once')
  elsewhere = tmp_path / 'elsewhere'
  shutil.copytree(tmp_path / 'eval' / 'best', elsewhere)
  shutil.rmtree(tmp_path / 'train')
  shutil.rmtree(tmp_path / 'eval')
  lines, errors = run(
    'cifar10_eval.py',
    *eval_flags,
    '--run_once',
    f'--checkpoint_dir={elsewhere}',
  )
  assert errors == '' and 'step 7: ' in lines[-1]
  record_fault('a directory of checkpoints copied or moved')


@pytest.mark.faults
class TestRelativeDirectories:
  """The tutorial's command lines use relative directories."""

  @pytest.mark.parametrize(
    'fault',
    [
      'index',
      pytest.param('state', marks=pytest.mark.faults),
      pytest.param('none', marks=pytest.mark.faults),
      pytest.param('data', marks=pytest.mark.faults),
    ],
  )
  def test_resumes_again_and_again(self, tmp_path, train, fault, record_fault):
    train('r', 2)
    victim = {
      'index': 'model.ckpt-2.index',
      'data': 'model.ckpt-2.data-00000-of-00001',
      'state': 'checkpoint',
    }.get(fault)
    if victim:
      os.truncate(tmp_path / 'r' / victim, 10)
    start = 0 if fault in ('index', 'data') else 2
    assert f'Resuming from step {start}' in train('./r/', 4)
    assert 'Resuming from step 4' in train('r', 6)
    assert steps_in(tmp_path / 'r') == [0, 2, 4, 6]
    state = (tmp_path / 'r' / 'checkpoint').read_text()
    assert '/' not in state
    record_fault('a relative directory')

  def test_are_the_same_from_elsewhere(
    self, tmp_path, train, flags, record_fault
  ):
    train('r', 2)
    (tmp_path / 'below').mkdir()
    lines = train('../r', 4, cwd=tmp_path / 'below')
    assert 'Resuming from step 2' in lines
    lines, errors = run(
      'cifar10_eval.py',
      flags[0],
      '--checkpoint_dir=r',
      '--eval_dir=below/eval',
      '--num_examples=100',
      '--run_once',
      cwd=tmp_path,
    )
    assert errors == '' and 'step 4: ' in lines[-1]
    lines, _ = run(
      'cifar10_eval.py',
      flags[0],
      '--checkpoint_dir=eval/best',
      '--eval_dir=../again',
      '--num_examples=100',
      '--run_once',
      cwd=tmp_path / 'below',
    )
    assert 'step 4: ' in lines[-1]
    record_fault('a directory of checkpoints copied or moved')


@pytest.mark.faults
def test_fewer_checkpoints_are_kept_when_told_so(tmp_path, train):
  write_run(tmp_path / 'a', range(1, 9))
  train(tmp_path / 'a', 10, '--keep_checkpoint_max=3')
  assert steps_in(tmp_path / 'a') == [7, 8, 10]


def write_other_network(directory, step):
  """Write the checkpoint and graph of an unrelated TF1 program."""
  os.makedirs(directory, exist_ok=True)
  with tf.Graph().as_default() as graph, tf.Session() as session:
    weights = tf.Variable(np.zeros([3, 3]), name='dense/kernel')
    tf.Variable(np.int64(step), name='global_step')
    tf.summary.histogram('dense/kernel', weights)
    session.run(tf.global_variables_initializer())
    tf.train.Saver().save(session, f'{directory}/model.ckpt', step)
    tf.io.write_graph(graph, str(directory), 'graph.pbtxt')
    with tf.summary.FileWriter(str(directory), graph) as writer:
      writer.add_summary(session.run(tf.summary.merge_all()), step)


class TestFilesOfOthers:
  """Files with our names that other programs or users wrote."""

  def test_another_networks_checkpoints_are_not_pruned(
    self, tmp_path, train, record_fault
  ):
    write_run(tmp_path / 'a', [5, 6])
    write_other_network(tmp_path / 'b', 3)
    for path in glob.glob(f'{tmp_path}/b/model.ckpt-3.*'):
      shutil.copy(path, tmp_path / 'a')
    before = contents(tmp_path / 'a')
    name_absolutely(tmp_path / 'a')
    train(tmp_path / 'a', 9, '--keep_checkpoint_max=1')
    assert steps_in(tmp_path / 'a') == [3, 9]
    after = contents(tmp_path / 'a')
    for name in ('model.ckpt-3.index', 'model.ckpt-3.data-00000-of-00001'):
      assert after[name] == before[name]
    record_fault("another program's or a user's file in the way")

  def test_restart_spares_another_programs_run(
    self, tmp_path, refused, record_fault
  ):
    write_other_network(tmp_path / 'a', 3)
    assert 'model.ckpt-3' in refused(tmp_path / 'a', '--restart')
    record_fault("another program's or a user's file in the way")

  def test_restart_spares_single_files_and_folders(
    self, tmp_path, refused, train, record_fault
  ):
    train(tmp_path / 'a', 1)
    write_other_network(tmp_path / 'b', 3)
    for kind in ('graph.pbtxt', 'events.out.tfevents.*'):
      (source,) = glob.glob(f'{tmp_path}/b/{kind}')
      path = tmp_path / 'a' / os.path.basename(source)
      own = path.read_bytes() if path.exists() else None
      shutil.copy(source, path)
      assert path.name in refused(tmp_path / 'a', '--restart')
      path.unlink()
      if own is not None:
        path.write_bytes(own)
    for name in ('model.ckpt-5_temp', 'events.out.tfevents.mine', 'checkpoint'):
      folder = tmp_path / 'a' / name
      if folder.exists():
        folder.unlink()
      folder.mkdir()
      (folder / 'thesis.tex').write_text('years of work')
      assert name in refused(tmp_path / 'a', '--restart')
      shutil.rmtree(folder)
    record_fault("another program's or a user's file in the way", 5)

  def test_restart_removes_what_damage_left(self, tmp_path, train):
    train(tmp_path / 'a', 2)
    for name in ('model.ckpt-2.index', 'model.ckpt-0.index', 'checkpoint'):
      os.truncate(tmp_path / 'a' / name, 10)
    os.remove(tmp_path / 'a' / 'model.ckpt-2.meta')
    (tmp_path / 'a' / 'model.ckpt-9_temp').mkdir()
    part = tmp_path / 'a' / 'model.ckpt-9_temp' / 'part-00000-of-00001.index'
    part.write_text('half')
    (tmp_path / 'a' / f'model.ckpt-9.meta.tmp{32 * "a"}').write_text('half')
    (tmp_path / 'a' / f'run.json.{8 * "a"}.tmp').write_text('half')
    lines = train(tmp_path / 'a', 1, '--restart')
    assert not any('Resuming' in line for line in lines)
    assert steps_in(tmp_path / 'a') == [0, 1]
    assert not [it for it in os.listdir(tmp_path / 'a') if 'mp' in it]

  @pytest.mark.parametrize(
    'name', ['checkpoint', 'graph.pbtxt', '.lock', 'model.ckpt-0.meta']
  )
  @pytest.mark.parametrize('kind', ['file', 'folder', 'link to nothing'])
  def test_are_not_written_over(
    self, tmp_path, refused, name, kind, record_fault
  ):
    path = tmp_path / 'a' / name
    path.parent.mkdir()
    if kind == 'folder':
      path.mkdir()
    elif kind == 'file':
      path.write_text('years of work')
    else:
      path.symlink_to('/mnt/not mounted now')
    assert f'{path} ' in refused(tmp_path / 'a')
    if kind == 'file':
      assert path.read_text() == 'years of work'
    record_fault("another program's or a user's file in the way")

  def test_a_report_writes_over_no_other_page(
    self, tmp_path, eval_flags, record_fault
  ):
    write_run(tmp_path / 'train', [1])
    page = tmp_path / 'thesis.html'
    text = '<title>CIFAR-10 in my thesis</title> years of work'
    page.write_text(text)
    (tmp_path / 'report.html.tmp').write_text('mine')
    _, errors = run(
      'cifar10_eval.py', *eval_flags, '--run_once', f'--report={page}', status=1
    )
    assert f'{page} is not a report' in errors and 'Traceback' not in errors
    assert page.read_text() == text
    for _ in range(2):  # a report may be overwritten
      flag = f'--report={tmp_path}/report.html'
      lines, errors = run('cifar10_eval.py', *eval_flags, '--run_once', flag)
      assert errors == '' and lines[-1] == f'Wrote {tmp_path}/report.html.'
    assert (tmp_path / 'report.html.tmp').read_text() == 'mine'
    assert len(glob.glob(f'{tmp_path}/report.html*')) == 2
    record_fault("another program's or a user's file in the way")

  def test_an_export_removes_no_other_folder(
    self, tmp_path, data_dir, record_fault
  ):
    write_run(tmp_path / 'train', [1])
    for name in ('new.tmp', 'model'):
      (tmp_path / name).mkdir()
      (tmp_path / name / 'thesis.tex').write_text('years of work')
    flags = [f'--checkpoint_dir={tmp_path}/train', f'--data_dir={data_dir}']
    run(
      'cifar10_predict.py', *flags, f'--export_dir={tmp_path}/model', status=1
    )
    lines, _ = run('cifar10_predict.py', *flags, f'--export_dir={tmp_path}/new')
    assert lines[-1].startswith(f'Exported to {tmp_path}/new: precision ')
    for name in ('new.tmp', 'model'):
      assert (tmp_path / name / 'thesis.tex').read_text() == 'years of work'
    assert set(os.listdir(tmp_path)) == {'model', 'new', 'new.tmp', 'train'}
    record_fault("another program's or a user's file in the way")

  def test_scoring_removes_no_other_folder(
    self, tmp_path, eval_flags, record_fault
  ):
    write_run(tmp_path / 'train', [1])
    for name in ('scoring', '.scoring-mine'):
      (tmp_path / 'eval' / name).mkdir(parents=True)
      (tmp_path / 'eval' / name / 'thesis.tex').write_text('years of work')
    run('cifar10_eval.py', *eval_flags, '--run_once')
    for name in ('scoring', '.scoring-mine'):
      path = tmp_path / 'eval' / name / 'thesis.tex'
      assert path.read_text() == 'years of work'
    record_fault("another program's or a user's file in the way")

  @pytest.mark.parametrize(
    ('program', 'name', 'more'),
    [
      ('examples/queue_demo.py', 'test_7.jpg', []),
      ('examples/save_images.py', '7.jpg', []),
      *(
        pytest.param(
          'examples/save_images.py', name, [flag], marks=pytest.mark.faults
        )
        for name, flag in (
          ('distorted.png', '--distorted'),
          ('contact_sheet.png', '--contact_sheet'),
        )
      ),
    ],
  )
  def test_a_lesson_writes_over_no_other_picture(
    self, data_dir, tmp_path, program, name, more, record_fault
  ):
    flags = [f'--output_dir={tmp_path}', *more]
    if 'save' in program:
      flags.append(f'--data_dir={data_dir}')
    (tmp_path / name).write_text('years of work')
    _, errors = run(program, *flags, status=1)
    assert f'{tmp_path}/{name} already exists' in errors, errors
    assert 'Traceback' not in errors
    assert (tmp_path / name).read_text() == 'years of work'
    (tmp_path / name).unlink()
    for _ in range(2):  # a program may overwrite its own files
      _, errors = run(program, *flags)
      assert errors == ''
    record_fault("another program's or a user's file in the way")

  @pytest.mark.faults
  def test_a_clusters_logs_are_appended_to(
    self, data_dir, tmp_path, record_fault
  ):
    (tmp_path / 'chief-0.log').write_text('mine\n')
    command = [
      sys.executable,
      os.path.join(ROOT, 'examples', 'cluster.py'),
      '--workers=2',
      f'--log_dir={tmp_path}',
      f'--data_dir={data_dir}',
      f'--train_dir={tmp_path}/train',
      '--batch_size=16',
      '--max_steps=2',
    ]
    result = subprocess.run(
      command, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'mine' not in result.stdout and ': step 0, ' in result.stdout
    assert (tmp_path / 'chief-0.log').read_text().startswith('mine\n')
    record_fault("another program's or a user's file in the way")
