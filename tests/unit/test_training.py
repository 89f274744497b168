"""Test the training loop's lines with a clock that ticks at each reading."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import threading
from contextlib import nullcontext

import pytest
import tensorflow.compat.v1 as tf

from cifar10_suite import (
  errors,
  hooks,
  large_pages,
  ownership,
  profiling,
  runs,
  training,
)
from cifar10_suite.cluster import ALONE, Cluster
from cifar10_suite.errors import UserError
from cifar10_suite.recipes import TUTORIAL
from cifar10_suite.tf_config import Task
from cifar10_suite.train_settings import TrainSettings

IN_CLUSTER = Cluster(Task('chief', 0), {'chief': ['a:1'], 'worker': ['b:1']})


def train(
  train_dir,
  max_steps,
  profile_steps=None,
  during_step=None,
  cluster=ALONE,
  **changes,
):
  """Train nothing; call `during_step`, if given, with the number of each."""
  with tf.Graph().as_default():
    step = tf.train.get_or_create_global_step()
    call = tf.py_func(during_step, [step], []) if during_step else tf.no_op()
    with tf.control_dependencies([call]):
      train_op = tf.assign_add(step, 1).op
    training.run_training(
      tf.constant(2.5),
      train_op,
      TrainSettings(
        dataclasses.replace(
          TUTORIAL, **{'batch_size': 8, 'max_steps': max_steps, **changes}
        ),
        train_dir=str(train_dir),
        log_frequency=5,
        save_checkpoint_secs=1000,
        save_summaries_steps=1000,
        profile_steps=profile_steps,
        eval_dir=f'{train_dir}/scores',
      ),
      cluster=cluster,
    )


def test_lines_cover_the_steps_since_the_last(tmp_path, monkeypatch, capsys):
  ticks = itertools.count()
  monkeypatch.setattr(hooks.time, 'perf_counter', lambda: float(next(ticks)))
  train(tmp_path, max_steps=13)
  train(tmp_path, max_steps=16)
  output = capsys.readouterr().out
  assert f'--checkpoint_dir {tmp_path} --eval_dir {tmp_path}/scores' in output
  lines = [
    line.partition(': ')[2]
    for line in output.splitlines()
    if ', loss = ' in line
  ]
  assert lines == [
    # One second for the first step, then one for five steps.
    'step 0, loss = 2.50 (8.0 examples/sec; 1.000 sec/batch)',
    'step 5, loss = 2.50 (40.0 examples/sec; 0.200 sec/batch)',
    'step 10, loss = 2.50 (40.0 examples/sec; 0.200 sec/batch)',
    # After resuming: the first step, then two to the next multiple of five.
    'step 13, loss = 2.50 (8.0 examples/sec; 1.000 sec/batch)',
    'step 15, loss = 2.50 (16.0 examples/sec; 0.500 sec/batch)',
  ]


def test_memory_moves_into_large_pages_once(tmp_path, monkeypatch):
  steps = []
  calls = []
  monkeypatch.setattr(
    large_pages, 'use_large_pages', lambda: calls.append(steps[-1])
  )
  train(tmp_path, max_steps=30, during_step=steps.append)
  assert calls == [9], 'not once, after memory has been allocated'


def test_a_worker_says_that_the_chief_went_back(graph, capsys):
  """A chief that returns to parameter servers restores a checkpoint."""
  step = tf.train.get_or_create_global_step()
  train_op = tf.no_op()
  hook = hooks.LogHook(tf.constant(2.5), 8, 0, 100, 5, counts_steps=False)
  numbers = iter([*range(12), *range(4, 12)])

  def move(step_context):
    step.load(next(numbers), step_context.session)

  with tf.train.MonitoredSession(hooks=[hook]) as session:
    for _ in range(20):
      session.run_step_fn(move)
      session.run(train_op)
  lines = re.findall('Going .*|step .*(?=, loss)', capsys.readouterr().out)
  assert lines == [
    'step 0',
    'step 5',
    'step 10',
    'Going back to step 5',
    'step 5',
    'step 10',
  ]


def interrupt_in(last):
  def during_step(step):
    if step == last:
      os.kill(os.getpid(), signal.SIGINT)

  return during_step


def test_a_signal_during_the_last_step_does_not_matter(tmp_path, capsys):
  train(tmp_path, 3, during_step=interrupt_in(2))
  assert 'Trained to step 3, ' in capsys.readouterr().out
  with pytest.raises(SystemExit, match='130'):
    train(tmp_path, 9, during_step=interrupt_in(4))
  assert 'step 5 is saved' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('kind', 'saves'), [('chief', True), ('worker', False)]
)
def test_only_the_chief_says_that_it_saves_after_a_signal(
  tmp_path, monkeypatch, kind, saves
):
  calls = []
  monkeypatch.setattr(
    training.sessions,
    'collected_signals',
    lambda *arguments: calls.append(arguments) or nullcontext(),
  )
  cluster = Cluster(Task(kind, 0), {'chief': ['a:1'], 'worker': ['b:1']})
  monkeypatch.setattr(cluster, 'leave', lambda: None)
  train(tmp_path, 1, cluster=cluster)
  assert calls == [(cluster.signals, saves)]


@pytest.mark.parametrize('cluster', [ALONE, IN_CLUSTER])
def test_a_full_disk_after_a_signal_is_an_error(tmp_path, monkeypatch, cluster):
  def before_save(self, session, step):
    if step:
      raise tf.errors.ResourceExhaustedError(
        None, None, 'model.ckpt-2; No space left on device'
      )

  monkeypatch.setattr(hooks.RefuseToSaveNan, 'before_save', before_save)
  with pytest.raises(UserError, match='Cannot write to .*: No space left'):
    train(tmp_path, 9, during_step=interrupt_in(1), cluster=cluster)


@pytest.mark.parametrize(
  ('max_steps', 'saved', 'says'),
  [(9, True, ', only step 0'), (2, True, ', only step 0'), (9, False, '')],
)
def test_a_worker_lost_after_a_signal_may_cost_the_save(
  tmp_path, monkeypatch, capsys, max_steps, saved, says
):
  def before_save(self, session, step):
    if step or not saved:
      signal.raise_signal(signal.SIGINT)
      raise tf.errors.InternalError(None, None, 'Lost')

  monkeypatch.setattr(hooks.RefuseToSaveNan, 'before_save', before_save)
  with pytest.raises(SystemExit, match='130'):
    train(tmp_path, max_steps, during_step=interrupt_in(1), cluster=IN_CLUSTER)
  step = 2 if saved else 0
  assert f'step {step} is not saved{says}. The' in capsys.readouterr().out


def test_a_run_that_resumes_from_step_0_keeps_its_history(tmp_path, capsys):
  train(tmp_path, 1)
  for path in tmp_path.glob('model.ckpt-1.*'):
    path.unlink()
  train(tmp_path, 2)
  assert 'Resuming from step 0' in capsys.readouterr().out
  assert len(runs.read(str(tmp_path))['starts']) == 2
  train(tmp_path, 2)
  assert 'Resuming' not in capsys.readouterr().out


def test_a_run_ends_where_nothing_is_left_to_train(tmp_path):
  train(tmp_path, max_steps=7)
  run = runs.read(str(tmp_path))
  run['starts'][0]['recipe']['max_steps'] = 100  # it was interrupted
  (tmp_path / 'run.json').write_text(json.dumps(run))
  train(tmp_path, max_steps=5)
  assert runs.last_step(runs.read(str(tmp_path))) == 7


def test_a_resumed_run_says_what_changed(tmp_path, capsys):
  lines = []
  for max_steps, changes in enumerate(
    [{}, {}, {'batch_size': 16}, {'name': 'mine', 'batch_size': 16}], start=1
  ):
    train(tmp_path, max_steps, **changes)
    output = capsys.readouterr().out.splitlines()
    lines.append([line for line in output if line.startswith('Changed ')])
  assert lines == [
    [],
    [],
    ['Changed since the last start: batch_size 16 (before: 8).'],
    ['Changed since the last start: recipe mine (before: tutorial).'],
  ]


class Clock(tf.train.CheckpointSaverListener):
  """A clock that moves by the duration of each save and each step."""

  def __init__(self, secs_per_save):
    self.now = 0.0
    self.saved = []
    self._secs_per_save = secs_per_save

  def before_save(self, session, global_step_value):
    self.saved.append(int(global_step_value))
    self.now += self._secs_per_save


@pytest.mark.parametrize(
  ('max_steps', 'secs_per_save', 'save_secs', 'saved'),
  [
    (100, 0.0, 1000, [0, 15, 30, 45, 60, 70]),  # at least 15 s apart
    (400, 0.0, 1000, [0, 20, 40, 60, 70]),  # a twentieth is 20 steps
    (100, 0.25, 1000, [0, 15, 40, 65, 70]),  # at least 100 saves apart
    (100, 0.25, 20, [0, 15, 35, 55, 70]),  # always after save_secs
  ],
)
def test_checkpoints_are_spread(
  graph, tmp_path, monkeypatch, max_steps, secs_per_save, save_secs, saved
):
  clock = Clock(secs_per_save)
  monkeypatch.setattr(hooks.time, 'monotonic', lambda: clock.now)
  monkeypatch.setattr(hooks.time, 'time', lambda: -clock.now)  # is set back
  step = tf.train.get_or_create_global_step()
  train_op = tf.assign_add(step, 1).op
  scaffold = tf.train.Scaffold(saver=tf.train.Saver(max_to_keep=1))
  hook = hooks.SaveCheckpoints(
    str(tmp_path), save_secs, max_steps, scaffold, [clock]
  )
  with tf.train.MonitoredSession(
    tf.train.ChiefSessionCreator(scaffold), hooks=[hook]
  ) as session:
    for _ in range(70):
      clock.now += 1
      session.run(train_op)
  assert clock.saved == saved


@pytest.mark.parametrize('is_served', [False, True])
def test_exhausted_memory_is_named(graph, is_served):
  def exhaust():  # at once; TensorFlow would try again for ten seconds
    raise MemoryError('OOM when allocating tensor')

  target = tf.train.Server.create_local_server().target if is_served else ''
  with (
    tf.Session(target) as session,
    pytest.raises(tf.errors.ResourceExhaustedError) as caught,
  ):
    session.run(tf.py_func(exhaust, [], []))
  with pytest.raises(UserError, match=r'step 7: .*OOM .* tensor. Choose a sma'):
    hooks.explain(caught.value, 7, 'here')


def test_the_first_of_several_errors_is_named():
  message = (
    'Graph execution error:\n\n2 root error(s) found.\n'
    '  (0) UNAVAILABLE: Connection reset by peer\n  (1) ABORTED: ...'
  )
  assert errors.first_line(message) == 'Connection reset by peer'


def test_a_directory_that_is_not_writable_is_named():
  error = tf.errors.PermissionDeniedError(
    tf.NodeDef(op='SaveV2'), None, 'run/model.ckpt-7; Permission denied'
  )
  with pytest.raises(UserError, match='write to here: Permission .* writable;'):
    hooks.explain(error, 7, 'here')


def test_only_files_of_the_input_are_to_be_restored():
  message = 'No algorithm worked!'
  error = tf.errors.NotFoundError(tf.NodeDef(op='Conv2D'), None, message)
  with pytest.raises(tf.errors.NotFoundError, match=message):
    hooks.explain(error, 7, 'here')
  error = tf.errors.NotFoundError(None, None, 'data_batch_1.bin; No such file')
  with pytest.raises(UserError, match='step 7: data_batch_1.bin; .* Restore'):
    hooks.explain(error, 7, 'here')


def test_the_global_step_is_read_by_the_step_itself(
  graph, tmp_path, monkeypatch
):
  clock = Clock(0)
  monkeypatch.setattr(hooks.time, 'monotonic', lambda: clock.now)
  train_op = tf.assign_add(tf.train.get_or_create_global_step(), 1).op
  scaffold = tf.train.Scaffold()
  hook = hooks.SaveCheckpoints(str(tmp_path), 1e9, 10**6, scaffold, [clock])
  with tf.train.MonitoredSession(
    tf.train.ChiefSessionCreator(scaffold), hooks=[hook]
  ) as session:
    session.run(train_op)
    clock.now += 1000  # a save is allowed again, but not due
    run, graphs = tf.Session.run, []  # threads of other tests may run theirs

    def counted(self, *args, **kwargs):
      graphs.append(self.graph)
      return run(self, *args, **kwargs)

    monkeypatch.setattr(tf.Session, 'run', counted)
    for _ in range(20):
      session.run(train_op)
    assert graphs.count(graph) == 20


def test_steps_look_up_no_fetches_again(tmp_path, monkeypatch):
  run, threads = tf.Session.run, []

  def counted(self, *args, **kwargs):
    threads.append(threading.current_thread())
    return run(self, *args, **kwargs)

  def count_runs(steps):
    threads.clear()
    train(tmp_path / str(steps), steps)
    return threads.count(threading.main_thread())

  monkeypatch.setattr(tf.Session, 'run', counted)
  assert count_runs(30) == count_runs(10)


@pytest.mark.parametrize('fails', ['start', 'stop', 'write'])
def test_a_profile_that_fails_costs_nothing_else(
  tmp_path, monkeypatch, capsys, fails
):
  profiler = profiling.tf2.profiler.experimental
  stop = profiler.stop

  def fail(*_):
    if fails == 'stop':
      stop()  # or other tests could not profile
    raise RuntimeError('no profile today')

  (tmp_path / 'run').mkdir()
  if fails == 'write':
    (tmp_path / 'run' / 'plugins').write_text('mine')
  else:
    monkeypatch.setattr(profiler, fails, fail)
  train(tmp_path / 'run', 8, profile_steps=(3, 5))
  output = capsys.readouterr().out
  assert 'Cannot write a profile: ' in output
  assert 'Trained to step 8, ' in output


def test_a_profile_ends_if_other_workers_do_its_last_step(
  tmp_path, monkeypatch
):
  calls = []
  profiler = profiling.tf2.profiler.experimental
  for name in ('start', 'stop'):
    monkeypatch.setattr(
      profiler, name, lambda *_, name=name: calls.append(name)
    )
  monkeypatch.setattr(profiler, 'Trace', lambda *_, **__: nullcontext())
  monkeypatch.setattr(profiling, '_write', lambda scratch, directory: directory)
  profile = profiling.StepProfiler(str(tmp_path), 10, 12)
  for number in (8, 11, 14, 17):
    with profile.step(number):
      pass
  assert calls == ['start', 'stop']


def test_profiles_steps(tmp_path, capsys):
  train(tmp_path / 'run', 8, profile_steps=(3, 5))
  (path,) = (tmp_path / 'run').glob('plugins/profile/*/trace.json')
  names = [
    event['name'] for event in json.loads(path.read_text())['traceEvents']
  ]
  steps = [name for name in names if name.startswith('step ')]
  assert steps == ['step 3', 'step 4', 'step 5']
  assert names.count('AssignAdd') == 3
  assert len(list(path.parent.glob('*.xplane.pb'))) == 1
  assert str(path) in capsys.readouterr().out
  train(tmp_path / 'run', 10, profile_steps=(3, 5))
  assert 'did not run these steps' in capsys.readouterr().out

  # --restart removes profiles, but nothing beside them.
  os.makedirs(tmp_path / 'other')
  shutil.copy(tmp_path / 'run' / 'run.json', tmp_path / 'other')
  shutil.copytree(tmp_path / 'run' / 'plugins', tmp_path / 'other' / 'plugins')
  (tmp_path / 'other' / 'plugins' / 'notes.txt').write_text('mine')
  with pytest.raises(UserError, match='also contains plugins'):
    ownership.remove_earlier_run(str(tmp_path / 'other'))
  (tmp_path / 'other' / 'plugins' / 'notes.txt').unlink()
  of_others = tmp_path / 'other' / 'plugins' / 'profile' / '2020_01_02_03_04_05'
  of_others.mkdir()
  (of_others / 'host.xplane.pb').write_text('mine')
  with pytest.raises(UserError, match='also contains plugins'):
    ownership.remove_earlier_run(str(tmp_path / 'other'))
  shutil.rmtree(of_others)
  # What xprof leaves beside a profile, and a trainer that is killed.
  (copy,) = (tmp_path / 'other').glob('plugins/profile/*')
  for name in (
    'ALL_HOSTS.op_stats_v2.pb',
    'cache_version.txt',
    'vm.SSTABLE',
    'vm.metadata.SSTABLE',
    f'{path.name}.0123abcd.tmp',
  ):
    (copy / name).touch()
  path = copy / path.name
  path.unlink()
  ownership.remove_earlier_run(str(tmp_path / 'other'))
  assert os.listdir(tmp_path / 'other') == []
