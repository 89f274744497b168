"""Test the parts of a cluster, with servers in this process."""

import contextlib
import dataclasses
import itertools
import json
import queue
import threading

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from support.cluster import addresses_of, environment
from support.programs import TIMEOUT

import cifar10
import cifar10_multi_gpu_train as multi
from cifar10_suite import cluster as clusters
from cifar10_suite import updates
from cifar10_suite.recipes import FAST, TUTORIAL
from cifar10_suite.training import TrainSettings

EXAMPLES = 8  # per worker


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
    task = clusters.this_task()
    assert str(task.name) == name
    assert (task.is_chief, task.number) == (is_chief, number)
    assert [str(server) for server in task.servers] == ['ps 0', 'ps 1']
    assert not task.is_alone

  @pytest.mark.parametrize(
    'config', ['', '{}', '{"cluster": {"chief": ["a:1"]}}']
  )
  def test_is_alone(self, monkeypatch, config):
    monkeypatch.setenv('TF_CONFIG', config)
    task = clusters.this_task()
    assert task.is_alone and task.is_chief
    assert [str(worker) for worker in task.workers] == ['chief 0']

  @pytest.mark.parametrize(
    ('config', 'says'),
    [
      ('{', 'Expecting property name'),
      ('[]', "'list' object"),
      ({'chief': ['a:1'], 'worker': ['b:1']}, 'it has no "ps"'),
      ({'ps': ['a:1', 'b:1']}, 'it has no "chief" and no "worker"'),
      ({'chief': ['a:1', 'b:1'], 'ps': ['c:1']}, 'more than one chief'),
      ({'chief': ['a'], 'ps': ['c:1']}, "'a' is not an address"),
      (
        {'chief': ['a:1'], 'ps': ['c:1'], 'dog': ['d:1']},
        "unknown type, 'dog'",
      ),
      ({'worker': ['a:1'], 'ps': ['c:1']}, 'no chief 0'),
    ],
  )
  def test_mistakes_are_named(self, monkeypatch, config, says):
    if not isinstance(config, str):
      config = environment(config, 'chief')['TF_CONFIG']
    monkeypatch.setenv('TF_CONFIG', config)
    with pytest.raises(clusters.ClusterError) as error:
      clusters.this_task()
    assert says in str(error.value) and '\n' not in str(error.value)

  @pytest.mark.parametrize(
    ('task', 'says'),
    [
      ({'type': 'ps', 'task': 1}, 'its "task" has no "index"'),
      ({'type': 'worker'}, 'its "task" has no "index"'),
      ({'index': 1}, 'its "task" has no "type"'),
      ({}, 'its "task" has no "type"'),
      (None, 'its "task" has no "type"'),
      ({'type': 'ps', 'index': None}, "index None is not a task's number"),
      ({'type': 'ps', 'index': 0.5}, "index 0.5 is not a task's number"),
      ({'type': 'ps', 'index': True}, "index True is not a task's number"),
      ({'type': 'ps', 'index': 'one'}, "index 'one' is not a task's number"),
      ({'type': 'ps', 'index': -1}, "index -1 is not a task's number"),
      ({'type': 'ps', 'index': 2}, 'no ps 2'),
    ],
  )
  def test_a_task_is_never_guessed(self, monkeypatch, task, says):
    """Two tasks that both assume index 0 would train separately."""
    addresses = {'ps': ['a:1', 'b:1'], 'chief': ['c:1'], 'worker': ['d:1']}
    config = {'cluster': addresses} | ({} if task is None else {'task': task})
    monkeypatch.setenv('TF_CONFIG', json.dumps(config))
    with pytest.raises(clusters.ClusterError) as error:
      clusters.this_task()
    assert says in str(error.value) and '\n' not in str(error.value)

  def test_an_index_may_be_a_string_of_digits(self, monkeypatch):
    addresses = {'ps': ['a:1', 'b:1'], 'chief': ['c:1']}
    for key, value in environment(addresses, 'ps', '1').items():
      monkeypatch.setenv(key, value)
    assert str(clusters.this_task().name) == 'ps 1'


def test_variables_are_balanced():
  addresses = addresses_of(ps=2)
  cluster = clusters.Cluster(clusters.Task('chief', 0, addresses))
  with tf.Graph().as_default(), tf.device(cluster.device_setter()):
    loss = cifar10.loss(cifar10.inference(tf.zeros([2, 24, 24, 3])), [1, 2])
    cifar10.train_towers(
      [loss],
      updates.make_global_step(),
      examples_per_step=2,
      synchronize=cluster.synchronized,
    )
    loads = {}
    for variable in tf.global_variables():
      device = tf.DeviceSpec.from_string(variable.device)
      assert device.job == 'ps'
      size = variable.shape.num_elements() * variable.dtype.size
      loads[device.task] = loads.get(device.task, 0) + size
    for tensor in tf.get_collection(tf.GraphKeys.LOCAL_VARIABLES):
      assert 'chief' in tensor.device
  largest = 2 * 4 * 2304 * 384  # bytes of local3's weights and averages
  assert max(loads.values()) < largest * 1.1


def session_of(cluster, config):
  """Return a session in which a worker trains the default graph."""
  return tf.train.MonitoredTrainingSession(
    cluster.master,
    is_chief=cluster.task.is_chief,
    scaffold=cluster.scaffold(config),
    hooks=cluster.hooks(),
    config=config,
    stop_grace_period_secs=2,
  )


@pytest.mark.parametrize(
  ('recipe', 'atol'),
  [
    (TUTORIAL, 1e-7),
    # Orthogonal updates amplify rounding errors of small gradients.
    (dataclasses.replace(FAST, whitened=False, max_steps=20), 1e-5),
  ],
)
@pytest.mark.slow
def test_two_workers_update_as_two_towers(quiet_threads, recipe, atol):
  rng = np.random.RandomState(1)
  images = rng.normal(size=[2, EXAMPLES, 24, 24, 3]).astype(np.float32)
  labels = rng.randint(10, size=[2, EXAMPLES]).astype(np.int32)
  addresses = addresses_of()
  clusters.start_server(clusters.Task('ps', 0, addresses), tf.ConfigProto())
  steps, values = 3, []

  def train(kind):
    task = clusters.Task(kind, 0, addresses)
    cluster = clusters.Cluster(task)
    config = tf.ConfigProto()
    cluster.join(config, TIMEOUT)
    with tf.Graph().as_default():
      with tf.device(cluster.device_setter()):
        batch = tf.constant(images[task.number]), labels[task.number]
        logits = cifar10.inference(batch[0], recipe=recipe)
        loss = cifar10.loss(
          logits, batch[1], label_smoothing=recipe.label_smoothing
        )
        _, train_op = cifar10.train_towers(
          [loss],
          updates.make_global_step(),
          examples_per_step=2 * EXAMPLES,
          recipe=recipe,
          synchronize=cluster.synchronized,
        )
      variables = {v.op.name: v.read_value() for v in tf.global_variables()}
      with session_of(cluster, config) as session:
        for step in range(steps + 1):
          if task.is_chief:
            values.append(
              session.run_step_fn(
                lambda step_context: step_context.session.run(variables)
              )
            )
          if step < steps:
            session.run(train_op)

  worker = threading.Thread(target=train, args=['worker'], daemon=True)
  worker.start()
  train('chief')
  worker.join(TIMEOUT)
  assert not worker.is_alive()

  with tf.Graph().as_default(), tf.Session() as session:
    settings = TrainSettings(
      dataclasses.replace(recipe, batch_size=EXAMPLES), train_dir=''
    )
    _, train_op = multi.train_towers(
      settings,
      ['/cpu:0', '/cpu:0'],
      [(tf.constant(images[k]), labels[k]) for k in range(2)],
    )
    session.run(tf.global_variables_initializer())
    for step, (before, after) in enumerate(itertools.pairwise(values)):
      # Start each step from the same values: different rounding may change the
      # maximum in a pool, which later steps would amplify.
      for variable in tf.global_variables():
        variable.load(before[variable.op.name], session)
      session.run(train_op)
      assert after['global_step'] == step + 1
      for variable in tf.global_variables():
        np.testing.assert_allclose(
          after[variable.op.name],
          session.run(variable),
          rtol=1e-5,
          atol=atol,
          err_msg=variable.op.name,
        )


@pytest.fixture
def start_worker(quiet_threads):
  """A function that starts a chief or worker that trains one number."""
  addresses = addresses_of()
  clusters.start_server(clusters.Task('ps', 0, addresses), tf.ConfigProto())

  def start(kind, backup_workers=0):
    cluster = clusters.Cluster(
      clusters.Task(kind, 0, addresses), backup_workers=backup_workers
    )
    config = tf.ConfigProto()
    cluster.join(config, TIMEOUT)

    @contextlib.contextmanager
    def session():
      """Yield a session, an op that adds 1 to a number, and [number, step]."""
      with tf.Graph().as_default():
        with tf.device(cluster.device_setter()):
          number = tf.get_variable('x', initializer=0.0, use_resource=True)
          step = updates.make_global_step()
          optimizer = cluster.synchronized(
            tf.train.GradientDescentOptimizer(1.0)
          )
          grow = optimizer.apply_gradients([(tf.constant(-1.0), number)], step)
        with session_of(cluster, config) as session:
          yield session, grow, [number, step]

    return session

  return start


@pytest.mark.slow
def test_a_worker_that_is_away_costs_no_gradient(start_worker):
  """With a backup worker, every step of the other worker is an update."""
  with start_worker('chief', backup_workers=1)() as (session, grow, values):
    for _ in range(10):
      session.run(grow)
    assert session.run(values) == [10, 10]


@pytest.mark.slow
def test_a_chief_that_comes_back_wakes_the_others(start_worker):
  """They may wait for a step that the previous chief did not finish."""
  done = queue.SimpleQueue()

  def work():
    with start_worker('worker')() as (session, grow, _):
      for _ in range(2):
        session.run(grow)
        done.put(None)

  worker = threading.Thread(target=work, daemon=True)
  worker.start()
  start_session = start_worker('chief')
  with start_session() as (session, grow, values):
    session.run(grow)
    assert session.run(values) == [1, 1]
  done.get(timeout=TIMEOUT)
  with start_session():
    done.get(timeout=TIMEOUT)
  worker.join(TIMEOUT)
  assert not worker.is_alive()
