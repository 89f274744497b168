"""Test that no operation runs in a type for which TensorFlow is slow."""

import dataclasses
import functools
import itertools
import os
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from absl.testing import flagsaver
from support.programs import ROOT, TIMEOUT

import cifar10
import cifar10_train
from cifar10_suite import (
  convolution,
  frequencies,
  measurement,
  optimizers,
  precision,
)
from cifar10_suite.recipes import RECIPES
from cifar10_suite.sessions import session_config
from cifar10_suite.train_settings import TrainSettings

# Operations on whole layers. In a type without an optimized kernel, TensorFlow
# loops over single numbers.
HEAVY = {
  'BatchMatMulV2',
  'Conv2D',
  'Conv2DBackpropFilter',
  'Conv2DBackpropInput',
  'LRN',
  'LRNGrad',
  'MatMul',
  'MaxPool',
  'MaxPoolGrad',
}
# Fast kernels of TensorFlow 2.21 besides float32: by type, the operations and
# their time relative to float32. All others take 100 times as long, or have no
# kernel.
ALL_BUT_LRN = HEAVY - {'LRN', 'LRNGrad'}
KINDS = {
  'AVX2': {},
  'AVX-512': {'bfloat16': (ALL_BUT_LRN, 3.0)},  # oneDNN emulates it
  'AVX-512, bfloat16': {'bfloat16': (ALL_BUT_LRN, 0.5)},
  'AVX-512, bfloat16 and float16': {
    'bfloat16': (ALL_BUT_LRN, 0.5),
    'float16': ({'Conv2D', 'Conv2DBackpropInput', 'BatchMatMulV2'}, 0.5),
  },
  'AMX': {'bfloat16': (ALL_BUT_LRN, 0.25)},
  'no /proc/cpuinfo': {},
}


def time_of(op, kernels):
  """Return the relative time of an operation on a simulated processor."""
  # Some 20 operations take half as long as a convolution and its gradients.
  share = 0.06 if 'by_frequencies' in op.name else 1.0
  dtype = op.get_attr('T').name
  if dtype == 'float32':
    return share
  types, factor = kernels.get(dtype, ((), 0))
  return share * (factor if op.type in types else 100.0)


@pytest.fixture
def no_measurements():
  """Measurements are made anew in the test and after it."""
  forget_measurements()
  yield
  forget_measurements()


@pytest.fixture(params=KINDS)
def kernels(request, monkeypatch, no_measurements):
  """Kernels of a kind of processor; measurements are simulated for it."""
  kernels = KINDS[request.param]

  def seconds(*builds, too_slow=float('inf')):
    times = []
    for build in builds:
      with tf.Graph().as_default() as graph:
        build()
        heavy = [op for op in graph.get_operations() if op.type in HEAVY]
        times.append(sum(time_of(op, kernels) for op in heavy))
    return times

  if request.param == 'no /proc/cpuinfo':
    original = open

    def refuse(path, *args, **kwargs):
      if str(path).startswith('/proc'):
        raise FileNotFoundError(path)
      return original(path, *args, **kwargs)

    monkeypatch.setattr('builtins.open', refuse)
  monkeypatch.setattr(measurement, 'seconds', seconds)
  monkeypatch.setattr(tf.config, 'get_visible_devices', lambda kind: [])
  return kernels


def forget_measurements():
  for function in vars(convolution).values():
    if hasattr(function, 'cache_clear'):
      function.cache_clear()


@pytest.mark.parametrize('recipe', ['tutorial', 'fast'])
@pytest.mark.parametrize(
  ('kernels', 'dtype'),
  [
    # In float32, all kinds have the same graph.
    ('AVX2', tf.float32),
    *itertools.product(KINDS, [tf.bfloat16, tf.float16]),
  ],
  indirect=['kernels'],
)
def test_no_slow_operation_is_used(graph, kernels, dtype, recipe):
  recipe = RECIPES[recipe]
  images = tf.cast(tf.zeros([4, 24, 24, 3]), dtype)
  logits = cifar10.inference(images, recipe=recipe)
  loss = cifar10.loss(logits, tf.zeros([4], tf.int32))
  step = tf.train.get_or_create_global_step()
  cifar10.train(loss, step, recipe=recipe, dtype=dtype)
  heavy = [op for op in graph.get_operations() if op.type in HEAVY]
  assert len(heavy) > 15
  slow = [op for op in heavy if time_of(op, kernels) > 1]
  assert not slow, [(op.name, op.get_attr('T').name) for op in slow]
  if dtype.name in kernels and kernels[dtype.name][1] < 1:
    fast = {op.get_attr('T') for op in heavy if op.type == 'MaxPool'}
    assert fast == ({dtype} if dtype == tf.bfloat16 else {tf.float32})
    of_muon = {op.get_attr('T') for op in heavy if op.name.startswith('Muon/')}
    assert of_muon == (fast if recipe.optimizer == 'muon' else set())


@pytest.mark.parametrize(
  ('device', 'gpus', 'expected'),
  [
    ('', [], tf.bfloat16),
    ('/cpu:0', [], tf.bfloat16),
    ('/job:worker/task:1/cpu:0', [], tf.bfloat16),
    ('', ['GPU:0'], tf.bfloat16),
    ('/gpu:0', ['GPU:0'], tf.bfloat16),
    ('/cpu:0', ['GPU:0'], tf.float32),
    ('/job:ps/task:0', [], tf.float32),
    ('/job:ps/task:0/cpu:0', [], tf.float32),
  ],
)
def test_muon_uses_bfloat16_only_where_it_is_known_to_be_fast(
  graph, monkeypatch, device, gpus, expected
):
  monkeypatch.setattr(convolution, 'is_fast', lambda dtype: True)
  monkeypatch.setattr(tf.config, 'get_visible_devices', lambda kind: gpus)
  with tf.device(device):
    variable = tf.get_variable('v', [300, 40], use_resource=True)
  optimizer = optimizers.MuonOptimizer(0.1, 0.9, dtype=tf.bfloat16)
  optimizer.apply_gradients([(tf.zeros([300, 40]), variable)])
  products = [op for op in graph.get_operations() if op.type == 'MatMul']
  assert products
  assert {op.get_attr('T') for op in products} == {expected}


@pytest.mark.parametrize(
  ('recipe', 'flag', 'expected'),
  [
    ('fast', {}, None),
    ('tutorial', {}, tf.float32),
    ('fast', {'use_bf16': False}, tf.float32),
    ('fast', {'use_fp16': True}, tf.float16),
  ],
)
def test_fast_computes_in_bfloat16_where_that_is_faster(
  kernels, recipe, flag, expected
):
  factor = kernels.get('bfloat16', ((), 100))[1]
  expected = expected or (tf.bfloat16 if factor < 0.8 else tf.float32)
  arguments = [f'--{name}={value}' for name, value in flag.items()]
  with flagsaver.flagsaver():
    cifar10.FLAGS(['program', *arguments])
    settings = cifar10_train.settings_from_flags(RECIPES[recipe])
  assert settings.dtype == expected


@pytest.mark.parametrize(
  ('results', 'expected'),
  [
    ([[1.0, 1.4], [14.0, 9.0, 7.0, 4.0, 2.0]], True),
    # A burst of other load during the few images, or the many.
    ([[1.0, 9.0], [1.0, 0.7], [14.0, 9.0, 7.0, 4.0, 2.0]], True),
    (
      [
        [1.0, 0.7],
        [14.0, 15.0, 14.0, 4.0, 5.0],
        [1.0, 0.7],
        [14.0, 9.0, 7.0, 4.0, 2.0],
      ],
      True,
    ),
    ([[1.0, 9.0], [1.0, 9.0]], False),
    (2 * [[1.0, 1.4], [14.0, 15.0, 14.0, 4.0, 5.0]], False),
  ],
)
def test_a_slow_moment_does_not_decide(
  monkeypatch, no_measurements, results, expected
):
  remaining = iter(results)
  monkeypatch.setattr(measurement, 'seconds', lambda *_, **__: next(remaining))
  assert convolution.is_fast(tf.bfloat16) == expected
  assert not list(remaining)


@pytest.mark.parametrize(
  ('by_axes', 'by_images', 'fastest'),
  [(6, 7, frequencies.by_axes), (7, 6, frequencies.by_images)],
)
def test_the_fastest_transforms_convolve(
  monkeypatch, no_measurements, by_axes, by_images, fastest
):
  results = [14.0, by_axes, by_images, 4.0, 2.0]
  monkeypatch.setattr(measurement, 'seconds', lambda *_, **__: results)
  assert convolution.fastest_transforms(tf.bfloat16) is fastest
  assert convolution.fastest_transforms(tf.float32) is frequencies.by_axes


@pytest.mark.parametrize(('gpus', 'products'), [([], True), (['gpu'], False)])
def test_gpus_convolve_directly(graph, monkeypatch, gpus, products):
  monkeypatch.setattr(tf.config, 'get_visible_devices', lambda kind: gpus)
  convolution.convolution([tf.zeros([2, 6, 6, 20])], tf.zeros([3, 3, 20, 7]))
  types = {op.type for op in graph.get_operations()}
  assert ('Conv2D' in types) != products
  assert ('BatchMatMulV2' in types) == products


@pytest.mark.parametrize(
  ('batch_size', 'threads', 'gpus', 'expected'),
  [
    (128, 2, [], 2),
    (127, 2, [], 1),
    (128, 1, [], 1),
    (128, 4, [], 1),
    (128, 2, ['gpu'], 1),
  ],
)
def test_two_threads_train_with_two_halves_of_a_batch(
  graph, monkeypatch, batch_size, threads, gpus, expected
):
  monkeypatch.setattr(tf.config, 'get_visible_devices', lambda kind: gpus)
  images = tf.zeros([batch_size, 24, 24, 3])
  recipe = dataclasses.replace(RECIPES['tutorial'], batch_size=batch_size)
  with flagsaver.flagsaver():
    cifar10.FLAGS(['program', f'--num_threads={threads}'])
    cifar10_train.build_loss(
      TrainSettings(recipe, train_dir=''),
      images,
      tf.zeros([batch_size], tf.int32),
    )
  convolutions = [
    op
    for op in graph.get_operations()
    if op.type == 'Conv2D' and op.name.startswith('conv1')
  ]
  assert len(convolutions) == expected


class TestMeasurement:
  def test_finds_what_is_slower(self):
    few, many = measurement.seconds(
      *(functools.partial(self.product, size) for size in (50, 1000))
    )
    assert 0 < few < many < TIMEOUT

  def product(self, size):
    x = tf.get_variable('x', [size, size], use_resource=True)
    return [tf.matmul(x, x).op]

  def test_an_operation_without_a_kernel_takes_forever(self):
    def build():
      return [tf.nn.lrn(tf.cast(tf.zeros([1, 2, 2, 8]), tf.bfloat16)).op]

    seconds = measurement.seconds(build, functools.partial(self.product, 2))
    assert seconds[0] == float('inf') > seconds[1]

  @pytest.mark.parametrize(
    ('too_slow', 'expected'), [(1e9, 'ab' * 5), (5, 'abab' + 'a' * 3)]
  )
  def test_contestants_take_turns(self, too_slow, expected):
    """Other load then affects all; those that are too slow run twice."""
    order = []

    def build(name, size):
      def run():
        order.append(name)
        return np.ones([size, size]) @ np.ones([size, size])

      return [tf.py_func(run, [], tf.float64).op]

    measurement.seconds(
      functools.partial(build, 'a', 2),
      functools.partial(build, 'b', 1000),
      too_slow=too_slow,
    )
    assert ''.join(order) == expected

  @pytest.mark.slow
  def test_leaves_the_number_of_threads_to_others(self):
    """The first session of a process sets the default for all others."""
    code = """
import os
from cifar10_suite import loading
loading.load_tensorflow()
import tensorflow.compat.v1 as tf
from cifar10_suite import convolution
tf.disable_v2_behavior()
convolution.is_fast(tf.bfloat16)
before = len(os.listdir('/proc/self/task'))
with tf.Session(config=tf.ConfigProto(inter_op_parallelism_threads=9)) as s:
  s.run(tf.constant(1) + 1)
print(len(os.listdir('/proc/self/task')) - before)
"""
    if not os.path.isdir('/proc/self/task'):
      pytest.skip('counts threads by /proc')
    result = subprocess.run(
      [sys.executable, '-c', code],
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=TIMEOUT,
    )
    assert int(result.stdout) >= 8, result.stderr


# The types take turns, so that other load on the machine affects all equally.
def seconds_per_step(dtypes, steps):
  """Return the median time of a training step of 16 images, per type."""
  sessions = []
  for dtype in dtypes:
    with tf.Graph().as_default():
      images = tf.cast(tf.random.normal([16, 24, 24, 3]), dtype)
      loss = cifar10.loss(cifar10.inference(images), tf.zeros([16], tf.int32))
      step = cifar10.train(loss, tf.train.get_or_create_global_step())
      session = tf.Session(config=session_config())
      session.run(tf.global_variables_initializer())
      session.run(step)
      sessions.append((session, step, []))
  for _ in range(steps):
    for session, step, times in sessions:
      start = time.perf_counter()
      session.run(step)
      times.append(time.perf_counter() - start)
  for session, _, _ in sessions:
    session.close()
  return [statistics.median(times) for _, _, times in sessions]


@pytest.mark.slow
def test_no_type_is_slow_here():
  """Measure this processor; a slow kernel would take 20 times as long."""
  forget_measurements()
  wide, *others = seconds_per_step([tf.float32, tf.float16, tf.bfloat16], 15)
  assert max(others) < 4 * wide


def assert_near(got, expected, tolerance):
  assert np.std(got - expected) < tolerance * np.std(expected)


def direct_convolution(x, kernel, dy):
  """Return TensorFlow's convolution and its gradients."""
  y = tf.nn.conv2d(x, kernel, strides=1, padding='SAME')
  return [y, *tf.gradients(y, [x, kernel], dy)]


@pytest.mark.parametrize(
  'convolve', [frequencies.by_axes, frequencies.by_images]
)
def test_convolution_in_bfloat16_is_near(graph, convolve):
  x = tf.cast(tf.random.normal([6, 9, 8, 20], seed=1), tf.bfloat16)
  kernel = tf.cast(tf.random.normal([5, 5, 20, 7], seed=2), tf.bfloat16)
  dy = tf.cast(tf.random.normal([6, 9, 8, 7], seed=3), tf.bfloat16)
  (y,) = convolve([x], kernel)
  near = [y, *tf.gradients(y, [x, kernel], dy)]
  assert {tensor.dtype for tensor in near} == {tf.bfloat16}
  direct = direct_convolution(x, kernel, dy)
  x, kernel, dy = (tf.cast(tensor, tf.float32) for tensor in (x, kernel, dy))
  exact = direct_convolution(x, kernel, dy)
  both = [tf.cast(tensor, tf.float32) for tensor in (*near, *direct)]
  with tf.Session() as session:
    both, exact = session.run([both, exact])
  errors = [
    np.std(got - expected) / np.std(expected)
    for got, expected in zip(both, [*exact, *exact], strict=True)
  ]
  # Without a kernel for bfloat16, TensorFlow rounds sums, too.
  rounds_sums = max(errors[3:]) > 0.005
  assert max(errors[:3]) < (0.05 if rounds_sums else 0.01)


@pytest.mark.parametrize('dtype', [tf.bfloat16, tf.float16])
@pytest.mark.parametrize('operation', ['convolution', 'max_pool', 'matmul'])
def test_slow_types_are_rounded_from_float32(
  graph, monkeypatch, operation, dtype
):
  monkeypatch.setattr(convolution, 'is_fast', lambda dtype: dtype == tf.float32)
  x = tf.random.normal([2, 6, 6, 20], seed=1)
  if operation == 'convolution':
    arguments = [x, tf.random.normal([5, 5, 20, 7], seed=2)]

    def apply(x, kernel):
      return convolution.convolution([x], kernel)[0]

  elif operation == 'max_pool':
    apply, arguments = functools.partial(convolution.max_pool, name='p'), [x]
  else:
    apply = convolution.matmul
    arguments = [x[:, 0, 0], tf.random.normal([20, 7], seed=2)]
  short = [tf.cast(tensor, dtype) for tensor in arguments]
  y = apply(*short)
  dy = tf.cast(tf.random.normal(y.shape, seed=3), dtype)
  got = [y, *tf.gradients(y, short, dy)]
  assert {tensor.dtype for tensor in got} == {dtype}
  wide = [tf.cast(tensor, tf.float32) for tensor in short]
  y = apply(*wide)
  exact = [y, *tf.gradients(y, wide, tf.cast(dy, tf.float32))]
  with tf.Session() as session:
    got, expected = session.run([got, [tf.cast(t, dtype) for t in exact]])
  for one, other in zip(got, expected, strict=True):
    np.testing.assert_array_equal(one, other)


def test_the_loss_scale_never_vanishes(graph):
  precision.enter_compute_type(tf.constant(1.0), tf.float16)
  _, adapt = precision.without_overflow([(tf.constant(np.inf), None)])
  state, _ = tf.get_collection('loss_scale')
  with tf.Session() as session:
    for _ in range(40):
      session.run(adapt)
    assert list(session.run(state)) == [1, 0]
