"""Test the parts of a cluster, with servers in this process."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from absl.testing import flagsaver
from support.cluster import addresses_of, environment
from support.programs import TIMEOUT

import cifar10
import cifar10_train
from cifar10_suite import (
  all_reduce,
  checkpoints,
  parameter_servers,
  runs,
  starting,
  tf_config,
  updates,
)
from cifar10_suite.cluster import Cluster
from cifar10_suite.errors import UserError
from cifar10_suite.recipes import RECIPES, TUTORIAL
from cifar10_suite.tf_config import Task
from cifar10_suite.train_settings import TrainSettings
from examples.cluster import share_cores

EXAMPLES = 4  # per worker


@pytest.mark.parametrize(
  ('flags', 'images'), [([], []), (['--hold_out=20'], ['--eval_data=held_out'])]
)
def test_an_evaluator_scores_what_training_holds_out(
  monkeypatch, flags, images
):
  commands = []
  monkeypatch.setattr(
    cifar10_train.os, 'execv', lambda *it: commands.append(it)
  )
  with flagsaver.flagsaver():
    cifar10_train.FLAGS(
      ['program', '--train_dir=run', '--num_threads=3', *flags]
    )
    settings = TrainSettings(TUTORIAL, 'run')
    cifar10_train.become_evaluator(settings)
  ((_, (_, program, *passed)),) = commands
  assert os.path.basename(program) == 'cifar10_eval.py'
  assert passed == [
    '--num_threads=3',
    *images,
    '--checkpoint_dir=run',
    '--until_trained',
  ]


@pytest.mark.parametrize(
  ('restart', 'last_step', 'waits'),
  [(True, 10, True), (False, 10, False), (False, 5, False), (False, 20, True)],
)
def test_an_evaluator_does_not_end_with_an_earlier_run(
  monkeypatch, tmp_path, restart, last_step, waits
):
  """It waits for the chief to delete or continue a run that has ended."""
  calls = []

  def record(last_step, before):
    recipe = dataclasses.replace(TUTORIAL, max_steps=last_step)
    start = runs.describe(recipe, tf.float32)
    runs.record_start(str(tmp_path), ('a', 'b'), before, start)

  def wait_until(condition, timeout_secs):
    calls.append(timeout_secs)
    assert not condition()
    record(last_step, 10)
    if restart:
      (tmp_path / 'checkpoint').unlink()
    assert condition()

  record(10, None)
  (tmp_path / 'model.ckpt-10.index').touch()
  checkpoints.write_state(str(tmp_path), ['model.ckpt-10'])
  monkeypatch.setattr(starting, 'wait_until', wait_until)
  recipe = dataclasses.replace(TUTORIAL, max_steps=last_step)
  settings = TrainSettings(recipe, str(tmp_path), restart=restart)
  starting.wait_for_chief(settings)
  assert calls == [settings.cluster_timeout_secs] * waits


class TestTask:
  @pytest.mark.parametrize(
    ('config', 'name', 'is_chief', 'number'),
    [
      ({'chief': ['a:1'], 'worker': ['b:1', 'c:1']}, 'worker 1', False, 2),
      ({'chief': ['a:1'], 'worker': ['b:1']}, 'chief 0', True, 0),
      ({'master': ['a:1'], 'worker': ['b:1']}, 'chief 0', True, 0),
      ({'worker': ['b:1', 'c:1']}, 'worker 0', True, 0),
    ],
  )
  def test_is_read(self, monkeypatch, config, name, is_chief, number):
    kind, index = name.split()
    addresses = {**config, 'ps': ['p:1', 'q:1'], 'evaluator': ['e:1']}
    kind = 'master' if 'master' in config else kind
    for key, value in environment(addresses, kind, int(index)).items():
      monkeypatch.setenv(key, value)
    cluster = Cluster(*tf_config.from_environment())
    assert str(cluster.task) == name
    assert (cluster.is_chief, cluster.number) == (is_chief, number)
    assert cluster.servers == [Task('ps', 0), Task('ps', 1)]
    assert not cluster.is_alone

  def test_needs_no_parameter_servers(self, monkeypatch):
    addresses = {'chief': ['a:1'], 'worker': ['b:1', 'c:1']}
    for key, value in environment(addresses, 'worker', 1).items():
      monkeypatch.setenv(key, value)
    cluster = Cluster(*tf_config.from_environment())
    assert cluster.number == 2
    assert not cluster.servers and not cluster.is_alone

  def test_an_empty_list_is_no_list(self, monkeypatch):
    addresses = {'chief': ['a:1'], 'worker': ['[::1]:2'], 'ps': []}
    for key, value in environment(addresses, 'worker', 0).items():
      monkeypatch.setenv(key, value)
    assert 'ps' not in tf_config.from_environment()[1]

  @pytest.mark.parametrize(
    'config', ['', '{}', '{"cluster": {"chief": ["a:1"]}}']
  )
  def test_is_alone(self, monkeypatch, config):
    monkeypatch.setenv('TF_CONFIG', config)
    cluster = Cluster(*tf_config.from_environment())
    assert cluster.is_alone and cluster.is_chief
    assert cluster.workers == [Task('chief', 0)]

  @pytest.mark.parametrize(
    ('config', 'says'),
    [
      ('{', 'Expecting property name'),
      ('[]', "'list' object"),
      ({'ps': ['a:1', 'b:1']}, 'it has no "chief" and no "worker"'),
      ({'chief': ['a:1', 'b:1'], 'ps': ['c:1']}, 'more than one chief'),
      ({'chief': ['a'], 'ps': ['c:1']}, "'a' is not an address"),
      ({'chief': ['a:99999'], 'ps': ['c:1']}, "'a:99999' is not an address"),
      ({'chief': ['a..b:1'], 'ps': ['c:1']}, "'a..b:1' is not an address"),
      (
        {'chief': ['a:1'], 'ps': ['c:1'], 'dog': ['d:1']},
        "unknown type, 'dog'",
      ),
      ({'worker': ['a:1'], 'ps': ['c:1']}, '"task" is chief 0'),
    ],
  )
  def test_mistakes_are_named(self, monkeypatch, config, says):
    if not isinstance(config, str):
      config = environment(config, 'chief')['TF_CONFIG']
    monkeypatch.setenv('TF_CONFIG', config)
    with pytest.raises(UserError) as error:
      tf_config.from_environment()
    assert says in str(error.value) and '\n' not in str(error.value)

  @pytest.mark.parametrize(
    ('task', 'says'),
    [
      ({'type': 'ps', 'task': 1}, 'its "task" has no "index"'),
      ({'type': 'worker'}, 'its "task" has no "index"'),
      ({'index': 1}, 'its "task" has no "type"'),
      ({}, 'its "task" has no "type"'),
      (None, 'its "task" has no "type"'),
      ({'type': 'ps', 'index': None}, 'index None is not a non-negative'),
      ({'type': 'ps', 'index': 0.5}, 'index 0.5 is not a non-negative'),
      ({'type': 'ps', 'index': True}, 'index True is not a non-negative'),
      ({'type': 'ps', 'index': 'one'}, "index 'one' is not a non-negative"),
      ({'type': 'ps', 'index': -1}, 'index -1 is not a non-negative'),
      ({'type': 'ps', 'index': 2}, '"task" is ps 2'),
    ],
  )
  def test_a_task_is_never_guessed(self, monkeypatch, task, says):
    """Two tasks that both assume index 0 would train separately."""
    addresses = {'ps': ['a:1', 'b:1'], 'chief': ['c:1'], 'worker': ['d:1']}
    config = {'cluster': addresses} | ({} if task is None else {'task': task})
    monkeypatch.setenv('TF_CONFIG', json.dumps(config))
    with pytest.raises(UserError) as error:
      tf_config.from_environment()
    assert says in str(error.value) and '\n' not in str(error.value)

  def test_an_index_may_be_a_string_of_digits(self, monkeypatch):
    addresses = {'ps': ['a:1', 'b:1'], 'chief': ['c:1']}
    for key, value in environment(addresses, 'ps', '1').items():
      monkeypatch.setenv(key, value)
    assert tf_config.from_environment()[0] == Task('ps', 1)


def test_variables_are_on_parameter_servers():
  cluster = parameter_servers.ParameterServers(
    Task('chief', 0), addresses_of(ps=2)
  )
  with tf.Graph().as_default(), tf.device(cluster.device):
    build_step(TUTORIAL, np.zeros([2, 24, 24, 3], 'f'), [1, 2])
    for variable in tf.global_variables():
      device = tf.DeviceSpec.from_string(variable.device)
      # A worker on the same machine needs all memory of the GPU.
      assert (device.job, device.device_type) == ('ps', 'CPU')
    for tensor in tf.get_collection(tf.GraphKeys.LOCAL_VARIABLES):
      assert 'chief' in tensor.device
    # Else each step would send the moving averages to the worker.
    steps = [
      it
      for it in tf.get_default_graph().get_operations()
      if 'AssignMovingAvg' in it.name and it.type == 'Sub'
    ]
    jobs = [tf.DeviceSpec.from_string(it.device).job for it in steps]
    assert jobs and set(jobs) == {'ps'}


@pytest.mark.parametrize('kind', ['chief', 'worker', 'ps'])
def test_bfloat16_gradients_are_refused_with_parameter_servers(kind):
  with flagsaver.flagsaver(bfloat16_gradients=True):
    with pytest.raises(UserError, match='--bfloat16_gradients does not work '):
      cifar10_train.cluster_of(Task(kind, 0), addresses_of(ps=1))
    cifar10_train.cluster_of(Task('chief', 0), addresses_of())


def test_parameter_servers_leave_gpus_alone(monkeypatch):
  configs = []

  def join(config, *_):
    configs.append(config)
    raise UserError('not started')

  server = Cluster(Task('ps', 0), addresses_of(ps=1))
  monkeypatch.setattr(server, 'join', join)
  with pytest.raises(UserError):
    parameter_servers.serve(server, TIMEOUT)
  assert [dict(it.device_count) for it in configs] == [{'GPU': 0}]


def build_step(recipe, images, labels, num_workers=1, **kwargs):
  """Build a training step; return it and the values of all variables."""
  logits = cifar10.inference(tf.constant(images), recipe=recipe)
  loss = cifar10.loss(logits, labels, label_smoothing=recipe.label_smoothing)
  _, train_op = cifar10.train_towers(
    [loss],
    updates.global_step(),
    examples_per_step=num_workers * EXAMPLES,
    recipe=recipe,
    **kwargs,
  )
  return train_op, {v.op.name: v.read_value() for v in tf.global_variables()}


class Workers:
  """Workers that train by all-reduce in threads of this process."""

  def __init__(self, count, settings=None, **options):
    self.addresses = addresses_of(workers=count)
    self.options = options
    self.settings = settings or {}
    self.errors = {}

  def run(self, work):
    """Call `work(cluster, session)` in a thread for each worker."""
    self.threads = [
      threading.Thread(target=self._run_one, args=[work, task], daemon=True)
      for task in Cluster(Task('chief', 0), self.addresses).workers
    ]
    for thread in self.threads:
      thread.start()
    for thread in self.threads:
      thread.join(TIMEOUT)
      assert not thread.is_alive()
    if self.errors:
      raise next(iter(self.errors.values()))

  def _run_one(self, work, task):
    try:
      cluster = all_reduce.AllReduce(task, self.addresses, **self.options)
      config = tf.ConfigProto()
      with tf.Graph().as_default(), tf.device(cluster.device):
        work(cluster, config)
    except Exception as error:
      self.errors[task] = error


def session_of(cluster, config):
  """Return a session in which a worker trains the default graph."""
  return tf.train.MonitoredTrainingSession(
    cluster.master,
    is_chief=cluster.initializes,
    hooks=[cluster],
    config=config,
    stop_grace_period_secs=2,
  )


def values_in(session, variables):
  return session.run_step_fn(
    lambda step_context: step_context.session.run(variables)
  )


@pytest.mark.parametrize(
  ('name', 'count', 'steps'),
  [
    ('tutorial', 2, 50),
    pytest.param('tutorial', 3, 3, marks=pytest.mark.faults),
    pytest.param('tutorial', 4, 3, marks=pytest.mark.faults),
    pytest.param('fast', 3, 3, marks=pytest.mark.faults),
    pytest.param('long', 4, 3, marks=pytest.mark.faults),
  ],
)
@pytest.mark.slow
def test_workers_update_as_one(log_level, name, count, steps):
  """As one process with all of their images, and all with the same bits."""
  recipe = dataclasses.replace(
    RECIPES[name], whitened=False, dropout=0.0, max_steps=60
  )
  # Orthogonal updates amplify rounding errors of small gradients.
  atol = 1e-5 if recipe.optimizer == 'muon' else 1e-7
  rng = np.random.RandomState(1)
  images = rng.normal(size=[count, EXAMPLES, 24, 24, 3]).astype(np.float32)
  labels = rng.randint(10, size=[count, EXAMPLES]).astype(np.int32)
  values = [[] for _ in range(count)]

  def work(cluster, config):
    number = cluster.number
    train_op, variables = build_step(
      recipe,
      images[number],
      labels[number],
      count,
      average_over_workers=cluster.average,
    )
    cluster.join(config, {}, TIMEOUT)
    with session_of(cluster, config) as session:
      values[number].append(values_in(session, variables))
      for _ in range(steps):
        session.run(train_op)
        values[number].append(values_in(session, variables))

  Workers(count).run(work)
  for others in values[1:]:
    for one, two in zip(values[0], others, strict=True):
      for key, value in one.items():
        np.testing.assert_array_equal(value, two[key], key)

  with tf.Graph().as_default(), tf.Session() as session:
    train_op, _ = build_step(
      recipe, np.concatenate(images), np.concatenate(labels), count
    )
    reads = {v.op.name: v.read_value() for v in tf.global_variables()}
    session.run(tf.global_variables_initializer())
    pairs = itertools.pairwise(values[0][:4])
    for step, (before, after) in enumerate(pairs):
      # Start each step from the same values: different rounding may change the
      # maximum in a pool, which later steps would amplify.
      for variable in tf.global_variables():
        variable.load(before[variable.op.name], session)
      session.run(train_op)
      assert after['global_step'] == step + 1
      for name, expected in session.run(reads).items():
        np.testing.assert_allclose(
          after[name], expected, rtol=1e-5, atol=atol, err_msg=name
        )


def one_number(cluster, value=0.0, gradient=1.0):
  """Build a number, a step that subtracts a gradient, and the global step."""
  number = tf.get_variable('x', initializer=value, use_resource=True)
  step = updates.global_step()
  gradients = cluster.average([(tf.constant(gradient), number)])
  descent = tf.train.GradientDescentOptimizer(1.0)
  return number, descent.apply_gradients(gradients, step), step


@pytest.mark.slow
def test_workers_start_with_the_variables_of_the_chief(log_level):
  found = {}

  def work(cluster, config):
    number, update, step = one_number(
      cluster, 7.0 + cluster.number, 2.0 * cluster.number
    )
    cluster.join(config, {}, TIMEOUT)
    with session_of(cluster, config) as session:
      found[cluster.number] = [values_in(session, number)]
      session.run(update)
      found[cluster.number] += values_in(session, [number, step])

  Workers(2).run(work)
  assert found == {0: [7, 6, 1], 1: [7, 6, 1]}


@pytest.mark.slow
def test_gradients_in_bfloat16(log_level):
  """The mean is rounded as in bfloat16."""
  found = {}

  def work(cluster, config):
    number, update, _ = one_number(cluster, 0.0, 1 + 2**-7 + 2**-9)
    cluster.join(config, {}, TIMEOUT)
    with session_of(cluster, config) as session:
      session.run(update)
      found[cluster.number] = values_in(session, number)

  Workers(2, bfloat16=True).run(work)
  assert found == {0: -1 - 2**-7, 1: -1 - 2**-7}


@pytest.mark.slow
@pytest.mark.parametrize(
  ('count', 'changed', 'bfloat16', 'says'),
  [
    (3, 0, False, 'variables of chief 0 differ from those of the others'),
    (3, 1, True, 'variables of worker 0 differ from those of the others'),
    (3, 2, False, 'variables of worker 1 differ from those of the others'),
    (2, 0, False, r'variables of chief 0 and worker 0 differ\.'),
  ],
)
def test_different_variables_are_not_saved(
  log_level, tmp_path, count, changed, bfloat16, says
):
  """A difference in one worker ends the runs of all."""

  def work(cluster, config):
    number, update, _ = one_number(cluster)
    change = number.assign_add(0.5)
    hooks = [cluster]
    if cluster.is_chief:
      hooks.append(
        tf.train.CheckpointSaverHook(
          str(tmp_path), save_steps=1, saver=tf.train.Saver()
        )
      )
    cluster.join(config, {}, TIMEOUT)
    with tf.train.MonitoredTrainingSession(
      cluster.master, is_chief=True, hooks=hooks, config=config
    ) as session:
      session.run(update)
      if cluster.number == changed:
        values_in(session, change)
      session.run(update)

  workers = Workers(count, bfloat16=bfloat16)
  with pytest.raises(UserError, match=says):
    workers.run(work)
  assert len(workers.errors) == count
  path = tf.train.latest_checkpoint(str(tmp_path))
  assert tf.train.load_variable(path, 'x') == -1


def test_an_error_that_repeats_is_not_recovered_from_forever(
  graph, monkeypatch, capsys
):
  def fail():
    raise OSError('no more files')

  with tf.Session() as session, pytest.raises(tf.errors.UnknownError) as caught:
    session.run(tf.py_func(fail, [], []))
  # `execv` keeps the environment.
  monkeypatch.setenv('CIFAR10_RESTARTS', '')
  starts = []
  monkeypatch.setattr(all_reduce.os, 'execv', lambda *it: starts.append(it))
  cluster = all_reduce.AllReduce(Task('chief', 0), addresses_of())
  for step in (5, *[7] * 12, 8):
    cluster.recover(caught.value, step)
  assert len(starts) == 1 + 10 + 1
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith('Starting over: UnknownError: OSError: no more f')
  assert lines[11] == 'Started over 10 times at step 7 without progress.'
  # Other workers may be lost any number of times.
  lost = tf.errors.UnavailableError(None, None, 'Connection reset by peer')
  for _ in range(12):
    cluster.recover(lost, 8)
  assert len(starts) == 12 + 12


@pytest.mark.skipif(
  not hasattr(os, 'sched_setaffinity'), reason='not on this system'
)
def test_processes_share_the_cores_of_a_machine():
  cores = sorted(os.sched_getaffinity(0))

  def cores_of(number, count):
    with subprocess.Popen(
      [sys.executable, '-c', 'input()'], stdin=subprocess.PIPE
    ) as process:
      share_cores(process, number, count)
      try:
        return os.sched_getaffinity(process.pid)
      finally:
        process.kill()

  shares = [cores_of(k, len(cores)) for k in range(len(cores))]
  assert shares == [{core} for core in cores]
  # More processes than cores, or shares that would not be equal.
  assert cores_of(0, len(cores) + 1) == set(cores)
