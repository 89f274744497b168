"""Test towers on logical CPU devices."""

import dataclasses
import functools
import os
import re
import types

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import cifar10
import cifar10_input
import cifar10_multi_gpu_train as multi
import cifar10_train
from cifar10_suite import dataset, updates
from cifar10_suite.cluster import ALONE
from cifar10_suite.errors import UserError
from cifar10_suite.recipes import TUTORIAL
from cifar10_suite.train_settings import TrainSettings

EXAMPLES = 16
STEPS = 5


def train_on_same_images(build, config=None, values=None):
  """Train from fixed variables on fixed images; return losses and variables.

  Args:
    build: builds a step from images [16, 24, 24, 3] and labels [16].
    config: configuration of the session.
    values: variables after each step of another training, from which to start
      the next one.

  Returns:
    The loss before each step, and all variables after it.
  """
  starts = values
  rng = np.random.RandomState(1)
  with tf.Graph().as_default():
    images = tf.placeholder(tf.float32, [EXAMPLES, 24, 24, 3])
    labels = tf.placeholder(tf.int32, [EXAMPLES])
    loss, train_op = build(images, labels)
    variables = sorted(tf.global_variables(), key=lambda v: v.op.name)
    reads = {variable.op.name: variable.read_value() for variable in variables}
    start = {
      variable.op.name: (
        rng.uniform(-0.03, 0.03, variable.shape.as_list())
        if variable.dtype.is_floating
        else 0
      )
      for variable in variables
    }
    losses, values = [], []
    with tf.Session(config=config) as session:
      session.run(tf.global_variables_initializer())
      for variable in variables:
        variable.load(start[variable.op.name], session)
      for step in range(STEPS):
        if starts and step:
          for variable in variables:
            variable.load(starts[step - 1][variable.op.name], session)
        feed = {
          images: rng.normal(size=images.shape.as_list()),
          labels: rng.randint(10, size=[EXAMPLES]),
        }
        losses.append(session.run([loss, train_op], feed)[0])
        values.append(session.run(reads))
  return losses, values


def settings_of(batch_size, **changes):
  recipe = dataclasses.replace(TUTORIAL, batch_size=batch_size, **changes)
  return TrainSettings(recipe, train_dir='')


def build_single(images, labels):
  loss = cifar10.loss(cifar10.inference(images), labels)
  step = tf.train.get_or_create_global_step()
  return loss, cifar10.train(loss, step)


@functools.cache
def train_single():
  return train_on_same_images(build_single)


@pytest.mark.parametrize('towers', [1, 2, 4])
@pytest.mark.slow
def test_towers_update_as_one_large_batch(towers):
  devices, config = multi.tower_devices(towers)

  def build_towers(images, labels):
    parts = tf.split(images, towers), tf.split(labels, towers)
    batches = list(zip(*parts, strict=True))
    return multi.train_towers(settings_of(EXAMPLES // towers), devices, batches)

  wanted_losses, wanted = train_single()
  # Each step starts from the same values: occasionally, rounding changes the
  # result of a ReLU or a maximum, which later steps would amplify.
  losses, values = train_on_same_images(build_towers, config, wanted)
  np.testing.assert_allclose(losses, wanted_losses, rtol=1e-6)
  tolerances = [1e-7] + [1e-6] * (STEPS - 1)
  for got, expected, tolerance in zip(values, wanted, tolerances, strict=True):
    assert got.keys() == expected.keys() and len(got) == 21
    for name in expected:
      np.testing.assert_allclose(
        got[name], expected[name], rtol=1e-6, atol=tolerance, err_msg=name
      )
  assert values[-1]['global_step'] == STEPS


def test_a_missing_gradient_is_zero(graph):
  first, second = (tf.get_variable(name, []) for name in ('first', 'second'))
  averages = updates.average_gradients(
    [
      [(tf.constant(3.0), first), (None, second)],
      [(None, first), (None, second)],
      [(tf.constant(6.0), first), (None, second)],
    ]
  )
  assert [variable for _, variable in averages] == [first, second]
  assert averages[1][0] is None
  with tf.Session() as session:
    assert session.run(averages[0][0]) == 3.0


def build_on_files(batches_dir, towers):
  devices, config = multi.tower_devices(towers)
  settings = dataclasses.replace(
    settings_of(8, crop_margin=(1, 0)), data_dir=os.path.dirname(batches_dir)
  )
  loss, train_op = multi.build_graph(settings, ALONE, devices=devices)
  return loss, train_op, config


@pytest.mark.slow
def test_everything_runs_where_it_belongs(graph, batches_dir):
  _, train_op, config = build_on_files(batches_dir, 2)
  summary_op = tf.summary.merge_all()
  metadata = tf.RunMetadata()
  with tf.train.MonitoredSession(
    tf.train.ChiefSessionCreator(config=config)
  ) as session:
    session.run(
      [train_op, summary_op],
      options=tf.RunOptions(trace_level=tf.RunOptions.FULL_TRACE),
      run_metadata=metadata,
    )
  ran = [
    (int(re.search(r'CPU:(\d+)$', device.device)[1]), node.node_name)
    for device in metadata.step_stats.dev_stats
    for node in device.node_stats
  ]
  counts = np.zeros([3], int)
  for device, name in ran:
    counts[device] += 1
    tower = re.search(r'tower_(\d)/', name)
    if re.search(r'^_SOURCE|^_SINK|/_\d+$|^GroupCrossDevice', name):
      continue  # transfers and synchronization between devices
    if tower and not re.search('ReadVariableOp|Summary', name):
      assert device == 1 + int(tower[1]), name
    else:
      assert device == 0, name
  assert min(counts) > 50
  for variable in tf.global_variables():
    assert variable.device.endswith('CPU:0'), variable.op.name
  for op in graph.get_operations():
    if op.name.startswith('input/'):
      assert op.device.endswith('CPU:0'), op.name


@pytest.mark.slow
def test_tags_are_those_of_the_single_program(batches_dir):
  tags = []
  _, config = multi.tower_devices(3)
  for build in (
    lambda: build_on_files(batches_dir, 3),
    lambda: build_single(*cifar10_input.distorted_inputs(batches_dir, 8)),
  ):
    with tf.Graph().as_default():
      build()
      summary_op = tf.summary.merge_all()
      with tf.train.MonitoredSession(
        tf.train.ChiefSessionCreator(config=config)
      ) as session:
        summary = session.run(summary_op)
    values = tf.Summary.FromString(summary).value
    tags.append(sorted(value.tag for value in values))
  assert tags[0] == tags[1]
  assert 'total_loss' in tags[0] and 'conv1/activations' in tags[0]


def test_one_pipeline_feeds_all(batches_dir):
  def queues(towers):
    with tf.Graph().as_default() as graph:
      build_on_files(batches_dir, towers)
      return [
        (op.type, op.node_def.attr['capacity'].i)
        for op in graph.get_operations()
        if op.type.endswith('QueueV2') and 'capacity' in op.node_def.attr
      ]

  assert queues(4) == queues(1) != []


def test_the_schedule_counts_examples(graph):
  step = tf.placeholder(tf.int64, [])

  def rates(towers, scale, steps):
    rate = cifar10.learning_rate(step, 100 * towers, scale=scale)
    with tf.Session() as session:
      return [session.run(rate, {step: number}) for number in steps]

  for towers in (1, 2, 4):
    decay = 350 * 500 // towers  # in steps
    assert rates(towers, 1, [0, decay - 1, decay]) == pytest.approx(
      [0.1, 0.1, 0.01]
    )
    warm = 5 * 500 // towers
    steps = [0, warm // 2, warm, decay]
    middle = 0.1 * (1 + (towers - 1) * steps[1] / (2500 / towers))
    assert rates(towers, towers, steps) == pytest.approx(
      [0.1, middle, 0.1 * towers, 0.01 * towers]
    )


def check_decay(step, before, config):
  """Check that the learning rate falls to a tenth of `before` at a step."""
  (rate,) = (
    summary.op.inputs[1]
    for summary in tf.get_collection(tf.GraphKeys.SUMMARIES)
    if summary.op.type == 'ScalarSummary'
    and 'learning_rate' in str(summary.op.inputs[0].op.node_def)
  )
  global_step = tf.train.get_global_step()
  with tf.Session(config=config) as session:
    for at, expected in ((step - 1, before), (step, before / 10)):
      global_step.load(at, session)
      assert session.run(rate) == pytest.approx(expected)


@pytest.mark.parametrize('scale', [False, True])
def test_towers_share_the_schedule(graph, batches_dir, scale):
  devices, config = multi.tower_devices(2)
  batches = cifar10_input.distorted_batches(batches_dir, 8, 2)
  settings = dataclasses.replace(settings_of(8), scale_learning_rate=scale)
  multi.train_towers(settings, devices, batches)
  factor = 2 if scale else 1
  check_decay(350 * 50000 // 16, 0.1 * factor, config)


@pytest.mark.parametrize('towers', [1, 2])
def test_the_schedule_counts_the_images_of_all_workers(
  graph, batches_dir, towers
):
  """With the number of images in the user's own data set."""
  settings = dataclasses.replace(
    settings_of(8),
    data_dir=os.path.dirname(batches_dir),
    data_set=dataset.DataSet(tuple(dataset.CLASS_NAMES), 500),
  )
  cluster = types.SimpleNamespace(workers_per_step=3, average=lambda it: it)
  config = None
  if towers == 1:
    cifar10_train.build_graph(settings, cluster)
  else:
    devices, config = multi.tower_devices(towers)
    multi.build_graph(settings, cluster, devices=devices)
  check_decay(350 * 500 // (3 * towers * 8), 0.1, config)


def test_too_few_gpus(monkeypatch):
  monkeypatch.setattr(
    tf.config, 'list_physical_devices', lambda kind: [kind] * 2
  )
  assert multi.tower_devices(2)[0] == ['/gpu:0', '/gpu:1']
  with pytest.raises(UserError, match='num_gpus=3 .*: 2'):
    multi.tower_devices(3)
  devices, config = multi.tower_devices(0)
  assert devices == ['/cpu:1'] and config.device_count['GPU'] == 0


def test_examples_per_second_count_all_towers(tmp_path, monkeypatch):
  got = {}
  monkeypatch.setattr(
    cifar10_train,
    'run',
    lambda *arguments, num_towers, num_gpus: got.update(n=num_towers),
  )
  monkeypatch.setattr(multi.FLAGS['num_gpus'], 'value', 3)
  multi.main()
  assert got['n'] == 3
