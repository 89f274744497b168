"""Test the model against NumPy and TensorFlow's operations."""

import dataclasses
import functools
import threading

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import cifar10
import cifar10_input
from cifar10_suite import (
  convolution,
  frequencies,
  lrn,
  precision,
  summaries,
  training,
  updates,
  xla,
)
from cifar10_suite.recipes import TUTORIAL
from cifar10_suite.train_settings import TrainSettings

FLAGS = tf.app.flags.FLAGS

SHAPES = {
  'conv1/weights': [5, 5, 3, 64],
  'conv1/biases': [64],
  'conv2/weights': [5, 5, 64, 64],
  'conv2/biases': [64],
  'local3/weights': [2304, 384],
  'local3/biases': [384],
  'local4/weights': [384, 192],
  'local4/biases': [192],
  'softmax_linear/weights': [192, 10],
  'softmax_linear/biases': [10],
}


def random_batch(count, seed=0):
  rng = np.random.RandomState(seed)
  images = rng.randn(count, 24, 24, 3).astype(np.float32)
  return images, rng.randint(0, 10, [count]).astype(np.int32)


def build_training(count, dtype=tf.float32):
  """Return loss and train_op for one random batch."""
  images, labels = random_batch(count)
  logits = cifar10.inference(tf.cast(images, dtype))
  loss = cifar10.loss(logits, tf.constant(labels))
  train_op = cifar10.train(loss, tf.train.get_or_create_global_step())
  return loss, train_op


LARGE = [8, 14, 15, 64]  # XLA compiles for large tensors


# XLA compiles for known shapes only; otherwise, operations run one by one.
@pytest.mark.parametrize('batch_is_known', [True, False])
class TestReluAndNormalize:
  def build(self, x, biases, dy, batch_is_known, dtype=tf.float32):
    """Return y and the gradients of x and the biases, as float32."""
    shape = [None, *x.shape[1:]]
    x, dy = (tf.constant(value, tf.float32) for value in (x, dy))
    if not batch_is_known:
      x, dy = (tf.placeholder_with_default(value, shape) for value in (x, dy))
    x, dy = tf.cast(x, dtype), tf.cast(dy, dtype)
    biases = tf.cast(biases, dtype)
    y = lrn.relu_and_normalize(x, biases, name='norm')
    results = [y, *tf.gradients(y, [x, biases], dy)]
    assert {result.dtype for result in results} == {dtype}
    return [tf.cast(result, tf.float32) for result in results]

  @pytest.mark.parametrize(
    'shape', [LARGE, [2, 3, 4, 64], [1, 1, 5, 7], [2, 2, 2, 1]]
  )
  def test_equals_numpy(self, graph, shape, batch_is_known):
    rng = np.random.RandomState(0)
    x, biases = 30 * rng.randn(*shape), rng.randn(shape[-1])
    relu = np.maximum(x + biases, 0)
    expected = np.empty(shape)
    for channel in range(shape[-1]):
      window = relu[..., max(0, channel - 4) : channel + 5]
      sums = 1.0 + 0.001 / 9.0 * np.square(window).sum(axis=-1)
      expected[..., channel] = relu[..., channel] / sums**0.75
    y, _, _ = self.build(x, biases, x, batch_is_known)
    with tf.Session() as session:
      np.testing.assert_allclose(session.run(y), expected, rtol=1e-5, atol=1e-6)

  def test_equals_tensorflows_and_its_gradient(self, graph, batch_is_known):
    rng = np.random.RandomState(0)
    x, dy = 20 * rng.randn(*LARGE), rng.randn(*LARGE)
    b = rng.randn(64)
    ours = self.build(x, b, dy, batch_is_known)
    x, b, dy = (tf.constant(value, tf.float32) for value in (x, b, dy))
    relu = tf.nn.relu(tf.nn.bias_add(x, b))
    y = tf.nn.lrn(relu, 4, bias=1.0, alpha=0.001 / 9.0, beta=0.75)
    with tf.Session() as session:
      got, expected = session.run([ours, [y, *tf.gradients(y, [x, b], dy)]])
    for mine, theirs in zip(got, expected, strict=True):
      np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)

  @pytest.mark.parametrize('dtype', [tf.float16, tf.bfloat16])
  def test_short_floats_keep_their_precision(
    self, graph, dtype, batch_is_known
  ):
    rng = np.random.RandomState(0)
    arguments = 300 * rng.randn(*LARGE), rng.randn(64)
    # The values of the type itself, so that only the results are rounded.
    arguments = [
      tf.cast(tf.cast(value, dtype), tf.float32) for value in arguments
    ]
    with tf.Session() as session:
      x, b = session.run(arguments)
      dy = np.ones_like(x)
      exact = self.build(x, b, dy, batch_is_known)
      short = self.build(x, b, dy, batch_is_known, dtype)
      for got, expected in zip(*session.run([short, exact]), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-2, atol=1e-3)


def test_compiled_casts_round_like_tensorflows(graph):
  bits = np.random.RandomState(0).randint(0, 2**32, 2**17, np.uint32)
  bits[:1000] = bits[:1000] & 0xFFFF0000 | 0x8000  # halfway between two
  values = bits.view(np.float32)
  values[np.isnan(values)] = np.nan
  values[:4] = np.inf, -np.inf, np.finfo(np.float32).max, 1e-45
  expected = tf.cast(values, tf.bfloat16)
  got = xla.compiled(xla.cast)(tf.constant(values), tf.bfloat16)
  with tf.Session() as session:
    got, expected = (
      array.astype(np.float32) for array in session.run([got, expected])
    )
  np.testing.assert_array_equal(got, expected)
  # Arithmetic may set the sign of a NaN.
  x = tf.random.normal([2**17], seed=1)
  nans = xla.compiled(lambda x: xla.cast(x * np.inf - x * np.inf, tf.bfloat16))
  with tf.Session() as session:
    assert np.isnan(session.run(nans(x)).astype(np.float32)).all()


def build_program(batches_dir):
  """Return loss and train_op of the graph of the training program."""
  images, labels = cifar10_input.distorted_inputs(batches_dir, 4)
  loss = cifar10.loss(cifar10.inference(images), labels)
  return loss, cifar10.train(loss, tf.train.get_or_create_global_step())


class TestInference:
  def test_is_the_tutorials_network(self, graph):
    images, _ = random_batch(4)
    logits = cifar10.inference(tf.constant(images))
    v = {variable.op.name: variable for variable in tf.trainable_variables()}
    assert {name: var.shape.as_list() for name, var in v.items()} == SHAPES

    def lrn(x):
      return tf.nn.lrn(x, 4, bias=1.0, alpha=0.001 / 9.0, beta=0.75)

    def conv(x, layer):
      x = tf.nn.conv2d(x, v[f'{layer}/weights'], [1, 1, 1, 1], 'SAME')
      return tf.nn.relu(x + v[f'{layer}/biases'])

    def dense(x, layer):
      return tf.matmul(x, v[f'{layer}/weights']) + v[f'{layer}/biases']

    def pool(x):
      return tf.nn.max_pool(x, [1, 3, 3, 1], [1, 2, 2, 1], 'SAME')

    x = lrn(pool(conv(images, 'conv1')))
    x = pool(lrn(conv(x, 'conv2')))
    x = tf.nn.relu(dense(tf.reshape(x, [4, 2304]), 'local3'))
    x = tf.nn.relu(dense(x, 'local4'))
    expected = dense(x, 'softmax_linear')
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      got, wanted = session.run([logits, expected])
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)

  @pytest.mark.parametrize('num_parts', [2, 4])
  def test_parts_of_the_batch_change_nothing(self, graph, num_parts):
    images, labels = random_batch(8)
    logits, gradients = [], []
    for count in (1, num_parts):
      with tf.variable_scope(tf.get_variable_scope(), reuse=tf.AUTO_REUSE):
        logits.append(cifar10.inference(tf.constant(images), num_parts=count))
      loss = tf.nn.sparse_softmax_cross_entropy_with_logits(
        labels=labels, logits=logits[-1]
      )
      gradients.append(tf.gradients(loss, tf.trainable_variables()))
    names = [variable.op.name for variable in tf.trainable_variables()]
    assert sorted(names) == sorted(SHAPES)
    convolutions = [
      op.outputs[0].shape[0]
      for op in graph.get_operations()
      if op.type == 'Conv2D' and op.name.startswith('conv1')
    ]
    assert convolutions == [8] + [8 // num_parts] * num_parts
    summaries = tf.get_collection(tf.GraphKeys.SUMMARIES)
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      (whole, parts), gradients, summaries = session.run(
        [logits, gradients, summaries]
      )
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)
    for expected, got in zip(*gradients, strict=True):
      # Rounding may decide which pixel is the maximum.
      assert np.linalg.norm(got - expected) < 1e-3 * np.linalg.norm(expected)
    values = [tf.Summary.FromString(it).value[0] for it in summaries]
    half = len(values) // 2
    for one, other in zip(values[:half], values[half:], strict=True):
      assert other.tag == f'{one.tag}_1'
      assert other.simple_value == pytest.approx(one.simple_value, abs=2e-3)
      assert other.histo.num == one.histo.num
      near = pytest.approx(one.histo.sum, rel=1e-4, abs=1e-4)
      assert other.histo.sum == near

  def test_takes_any_batch_size(self, graph):
    images = tf.placeholder(tf.float32, [None, 24, 24, 3])
    logits = cifar10.inference(images)
    assert logits.shape.as_list() == [None, 10]
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      for count in (1, 5):
        got = session.run(logits, {images: random_batch(count)[0]})
        assert got.shape == (count, 10)

  def test_variables_start_as_specified(self, graph):
    cifar10.inference(tf.constant(random_batch(1)[0]))
    stddevs = {
      'conv1': 0.05,
      'conv2': 0.05,
      'local3': 0.04,
      'local4': 0.04,
      'softmax_linear': 1 / 192,
    }
    biases = dict.fromkeys(stddevs, 0.1) | {'conv1': 0, 'softmax_linear': 0}
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      for variable in tf.trainable_variables():
        layer, kind = variable.op.name.split('/')
        value = session.run(variable)
        assert value.dtype == np.float32
        if kind == 'biases':
          np.testing.assert_array_equal(value, np.float32(biases[layer]))
        else:
          # Truncation at two sigma reduces the standard deviation to 0.8796
          # sigma.
          assert np.abs(value).max() <= 2 * stddevs[layer]
          assert value.std() == pytest.approx(0.88 * stddevs[layer], rel=0.05)

  @pytest.mark.parametrize(
    ('dtype', 'tolerance'), [(tf.float16, 0.1), (tf.bfloat16, 0.3)]
  )
  def test_short_floats_keep_float32_variables(self, graph, dtype, tolerance):
    images, labels = random_batch(16)
    with tf.variable_scope(tf.get_variable_scope(), reuse=tf.AUTO_REUSE):
      short = cifar10.inference(tf.cast(images, dtype))
      exact = cifar10.inference(tf.constant(images))
    assert short.dtype == tf.float32
    variables = tf.trainable_variables()
    assert {variable.dtype.base_dtype for variable in variables} == {tf.float32}

    def gradients(logits):
      return tf.gradients(
        tf.reduce_mean(
          tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels=labels, logits=logits
          )
        ),
        variables,
      )

    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      got, expected = session.run([gradients(short), gradients(exact)])
    for a, b in zip(got, expected, strict=True):
      assert a.dtype == np.float32
      assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b)


class TestLoss:
  def test_is_cross_entropy_and_weight_decay(self, graph):
    images, labels = random_batch(32)
    logits = cifar10.inference(tf.constant(images))
    total = cifar10.loss(logits, tf.constant(labels))
    losses = tf.get_collection('losses')
    names = [loss.op.name for loss in losses]
    assert names == [
      'local3/weight_loss',
      'local4/weight_loss',
      'cross_entropy',
    ]
    with tf.variable_scope(tf.get_variable_scope(), reuse=True):
      weights = [tf.get_variable(f'local{i}/weights') for i in (3, 4)]
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      got, parts, z, w = session.run([total, losses, logits, weights])
    z = z.astype(np.float64)
    log_sum = np.log(np.exp(z).sum(axis=1))
    cross_entropy = (log_sum - z[np.arange(32), labels]).mean()
    decays = [0.004 * np.square(x.astype(np.float64)).sum() / 2 for x in w]
    np.testing.assert_allclose(parts, [*decays, cross_entropy], rtol=1e-5)
    np.testing.assert_allclose(got, sum(decays) + cross_entropy, rtol=1e-5)
    assert cross_entropy == pytest.approx(np.log(10), abs=0.1)

  @pytest.mark.parametrize('dtype', [np.uint8, np.int64, np.float32])
  def test_takes_labels_of_any_type(self, graph, dtype):
    """The tutorial converts them, such as the bytes of records."""
    images, labels = random_batch(4)
    logits = cifar10.inference(tf.constant(images))
    cifar10.loss(logits, labels)
    cifar10.loss(logits, labels.astype(dtype))
    *_, of_int32, of_dtype = tf.get_collection('losses')
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      expected, got = session.run([of_int32, of_dtype])
    assert got == expected


class TestLearningRate:
  @pytest.mark.parametrize(
    ('batch_size', 'step', 'expected'),
    [
      (128, 0, 0.1),
      (128, 136717, 0.1),
      (128, 136718, 0.01),
      (128, 273435, 0.01),
      (128, 273436, 0.001),
      (1000, 17499, 0.1),
      (1000, 17500, 0.01),
    ],
  )
  def test_drops_after_350_epochs(self, graph, batch_size, step, expected):
    global_step = tf.train.get_or_create_global_step()
    rate = cifar10.learning_rate(global_step, batch_size)
    with tf.Session() as session:
      session.run(global_step.assign(step))
      assert session.run(rate) == pytest.approx(expected, rel=1e-6)


class TestTrain:
  def test_constants_may_be_assigned(self, graph, monkeypatch):
    """Scripts may do so: the tutorial's functions read them when called."""
    monkeypatch.setattr(cifar10, 'NUM_CLASSES', 12)
    monkeypatch.setattr(cifar10, 'INITIAL_LEARNING_RATE', 0.01)
    monkeypatch.setattr(cifar10, 'NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN', 256)
    monkeypatch.setattr(cifar10, 'NUM_EPOCHS_PER_DECAY', 10.0)
    loss, train_op = build_training(8)
    biases = tf.trainable_variables()[-1]
    assert biases.shape.as_list() == [12]
    (gradient,) = tf.gradients(loss, [biases])
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      for step, rate in ((19, 0.01), (20, 0.001)):
        session.run(tf.train.get_global_step().assign(step))
        before, slope = session.run([biases, gradient])
        session.run(train_op)
        after = session.run(biases)
        np.testing.assert_allclose(before - after, rate * slope, atol=1e-7)

  def test_descends_then_averages(self, graph):
    loss, train_op = build_training(8)
    variables = tf.trainable_variables()
    averages = [
      tf.global_variables(f'{variable.op.name}/ExponentialMovingAverage')[0]
      for variable in variables
    ]
    gradients = tf.gradients(loss, variables)
    global_step = tf.train.get_global_step()
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      session.run(global_step.assign(20))
      for step in (20, 21, 22):
        before, slope, old = session.run([variables, gradients, averages])
        session.run(train_op)
        after, new = session.run([variables, averages])
        # The tutorial's decay, with the step after the update.
        decay = min(0.9999, (1 + step + 1) / (10 + step + 1))
        for i in range(len(variables)):
          descent = 0.1 * slope[i]
          error = np.linalg.norm(before[i] - descent - after[i])
          assert error < 1e-3 * np.linalg.norm(descent)
          np.testing.assert_allclose(
            new[i],
            decay * old[i] + (1 - decay) * after[i],
            rtol=1e-5,
            atol=1e-6,
          )
      assert session.run(global_step) == 23

  def test_loss_averages_start_at_the_first_loss(self, graph):
    loss, train_op = build_training(8)
    merged = tf.summary.merge_all()
    raw, averaged = [], []
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      for _ in range(3):
        serialized, _ = session.run([merged, train_op])
        summary = tf.Summary.FromString(serialized)
        values = {value.tag: value.simple_value for value in summary.value}
        raw.append(values['total_loss (raw)'])
        averaged.append(values['total_loss'])
    expected = raw[0]
    for i in range(3):
      expected = 0.9 * expected + 0.1 * raw[i]
      assert averaged[i] == pytest.approx(expected, rel=1e-5)

  @pytest.mark.parametrize('dtype', [tf.float32, tf.float16, tf.bfloat16])
  @pytest.mark.slow
  def test_checkpoint_has_exactly_the_tutorials_names(
    self, graph, dtype, tmp_path
  ):
    _, train_op = build_training(2, dtype)
    with tf.train.MonitoredTrainingSession(
      checkpoint_dir=str(tmp_path), hooks=[tf.train.StopAtStepHook(2)]
    ) as session:
      while not session.should_stop():
        session.run(train_op)
    path = tf.train.latest_checkpoint(str(tmp_path))
    assert path == str(tmp_path / 'model.ckpt-2')
    reader = tf.train.load_checkpoint(path)
    expected = {'global_step': []}
    for name, shape in SHAPES.items():
      expected[name] = expected[f'{name}/ExponentialMovingAverage'] = shape
    assert reader.get_variable_to_shape_map() == expected
    dtypes = reader.get_variable_to_dtype_map()
    assert dtypes.pop('global_step') == tf.int64
    assert set(dtypes.values()) == {tf.float32}

  def test_summaries_have_the_specified_tags(self, graph):
    build_training(2)
    layers = ['conv1', 'conv2', 'local3', 'local4', 'softmax_linear']
    losses = ['cross_entropy', 'local3/weight_loss', 'local4/weight_loss']
    expected = {'learning_rate'}
    for layer in layers:
      expected |= {f'{layer}/activations', f'{layer}/sparsity'}
    for loss in [*losses, 'total_loss']:
      expected |= {loss, f'{loss} (raw)'}
    for name in SHAPES:
      expected |= {name, f'{name}/gradients'}
    merged = tf.summary.merge_all()
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      summary = tf.Summary.FromString(session.run(merged))
    tags = [value.tag for value in summary.value]
    assert sorted(tags) == sorted(expected)


@pytest.mark.parametrize('shape', [[7], [3, 5], [2304, 384], [128, 24, 24, 64]])
def test_a_histogram_samples_all_rows_and_columns(graph, shape):
  """Otherwise, one channel might stand for all."""
  columns = tf.range(shape[-1], dtype=tf.float32)
  summaries.histogram('columns', tf.zeros(shape) + columns)
  with tf.Session() as session:
    text = session.run(tf.summary.merge_all())
  histogram = tf.Summary.FromString(text).value[0].histo
  size = np.prod(shape)
  assert histogram.num == size if size < 1e4 else 1e4 < histogram.num < 4e4
  assert (histogram.min, histogram.max) == (0, shape[-1] - 1)
  mean = histogram.sum / histogram.num
  np.testing.assert_allclose(mean, (shape[-1] - 1) / 2, rtol=0.01)


class TestTowers:
  def test_share_variables_on_the_cpu(self, graph):
    images, _ = random_batch(2)
    for i in range(2):
      with (
        tf.variable_scope(tf.get_variable_scope(), reuse=i > 0),
        tf.device(f'/gpu:{i}'),
        tf.name_scope(f'{cifar10.TOWER_NAME}_{i}'),
      ):
        logits = cifar10.inference(tf.constant(images))
        assert logits.device == f'/device:GPU:{i}'
    assert len(tf.trainable_variables()) == len(SHAPES)
    for variable in tf.trainable_variables():
      assert variable.op.name in SHAPES
      assert variable.device == '/device:CPU:0'

  def test_alone_leaves_the_device_to_the_caller(self, graph):
    cifar10.inference(tf.constant(random_batch(2)[0]))
    with tf.device('/gpu:1'), tf.variable_scope('placed'):
      cifar10.inference(tf.constant(random_batch(2)[0]))
    devices = [variable.device for variable in tf.trainable_variables()]
    assert devices == [''] * 10 + ['/device:GPU:1'] * 10


def train_on_16_images(dtype, start=None):
  """Train 12 steps; return the losses, the variables before and after.

  Args:
    dtype: the compute type.
    start: initial values of the variables by name; random ones by default.
  """
  # With the tutorial's rate, so few images diverge in any type.
  recipe = dataclasses.replace(TUTORIAL, learning_rate=0.05)
  images, labels = random_batch(16)
  with tf.Graph().as_default(), tf.Session() as session:
    tf.set_random_seed(1)
    logits = cifar10.inference(tf.cast(images, dtype))
    loss = cifar10.loss(logits, tf.constant(labels))
    train_op = cifar10.train(
      loss, tf.train.get_or_create_global_step(), recipe=recipe
    )
    session.run(tf.global_variables_initializer())
    variables = {v.op.name: v for v in tf.global_variables()}
    for name, value in (start or {}).items():
      variables[name].load(value, session)
    start = session.run(variables)
    losses = [session.run([loss, train_op])[0] for _ in range(12)]
    return losses, start, session.run(variables)


@functools.cache
def train_in_float32():
  return train_on_16_images(tf.float32)


class TestLossScaling:
  def test_an_overflow_changes_nothing_but_the_scale(self, graph):
    factor = tf.placeholder(tf.float32, [])
    w = tf.get_variable('w', [], initializer=tf.ones_initializer())
    y = precision.leave_compute_type(
      precision.enter_compute_type(w, tf.float16)
    )
    optimizer = tf.train.GradientDescentOptimizer(1.0)
    gradients = optimizer.compute_gradients(factor * y)
    step = updates.apply_gradients(
      optimizer,
      gradients,
      tf.train.get_or_create_global_step(),
      run_before=tf.no_op(),
    )
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      # 3 x 2^15 overflows in float16, 3 x 2^14 does not.
      values = []
      for _ in range(3):
        session.run(step, {factor: 3.0})
        values.append(session.run(w))
      assert values == [1.0, -2.0, -5.0]
      # A step that overflows may write summaries: histograms refuse infinity.
      session.run([step, tf.summary.merge_all()], {factor: 1e5})
      assert session.run(w) == -5.0
      # Scaling preserves a gradient that would vanish in float16.
      session.run(step, {factor: 1e-8})
      assert session.run(gradients[0][0], {factor: 1e-8}) == pytest.approx(
        1e-8, rel=1e-2
      )

  @pytest.mark.parametrize('dtype', [tf.float16, tf.bfloat16])
  @pytest.mark.slow
  def test_learns_as_in_float32(self, dtype):
    wanted, start, _ = train_in_float32()
    losses, _, end = train_on_16_images(dtype, start)
    np.testing.assert_allclose(losses, wanted, atol=0.005)
    assert wanted[-1] < wanted[0] - 0.3
    for name, value in end.items():
      assert np.isfinite(value).all()
      assert not np.array_equal(value, start[name]), name


def test_tags_of_losses_leave_out_towers(graph):
  with tf.name_scope('tower_0'):
    logits = cifar10.inference(tf.zeros([4, 24, 24, 3]))
    loss = cifar10.loss(logits, tf.zeros([4], tf.int32))
  # Called outside of the tower's name scope, as in readers' own scripts.
  names = [name for name, _ in updates.mean_losses([loss])]
  assert names == [
    'local3/weight_loss',
    'local4/weight_loss',
    'cross_entropy',
    'total_loss',
  ]


@pytest.mark.parametrize(
  'convolve',
  [
    convolution.convolution,
    convolution.by_neighbours,
    frequencies.by_axes,
    frequencies.by_images,
  ],
)
@pytest.mark.parametrize('channels', [3, 20])
@pytest.mark.parametrize('size', [3, 5])
def test_convolution_equals_tensorflows(graph, channels, size, convolve):
  x = tf.random.normal([6, 9, 8, channels], seed=1)
  kernel = tf.random.normal([size, size, channels, 7], seed=2)
  dy = tf.random.normal([6, 9, 8, 7], seed=3)
  results = []
  for y in (
    tf.concat(convolve([x[:2], x[2:]], kernel), axis=0),
    tf.nn.conv2d(x, kernel, strides=1, padding='SAME'),
  ):
    results.append([y, *tf.gradients(y, [x, kernel], dy)])
  with tf.Session() as session:
    for got, expected in zip(*session.run(results), strict=True):
      np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


class TestStep:
  """Conditions for a fast step, without timing."""

  def test_parts_share_the_transform_of_the_filters(self, graph):
    x, kernel = tf.zeros([6, 8, 8, 20]), tf.zeros([5, 5, 20, 7])
    ys = frequencies.by_images([x[:3], x[3:]], kernel)
    tf.gradients(ys, [x, kernel])
    # Those of the images are products of batches.
    types = [op.type for op in graph.get_operations()]
    assert types.count('MatMul') == 2  # of the filters, and its gradient

  def test_graph_has_no_slow_operations(self, graph, batches_dir):
    build_program(batches_dir)
    types = {op.type for op in graph.get_operations()}
    assert types.isdisjoint({'LRN', 'LRNGrad', 'ReaderReadV2'})
    assert 'ReaderReadUpToV2' in types

  @pytest.mark.slow
  def test_takes_one_run(self, batches_dir, tmp_path, monkeypatch):
    calls = []
    run = tf.Session._call_tf_sessionrun  # of callables, too

    def counting_run(self, *args):
      if threading.current_thread() is threading.main_thread():
        calls.append(args)
      return run(self, *args)

    def count_runs(steps):
      calls.clear()
      with tf.Graph().as_default():
        loss, train_op = build_program(batches_dir)
        training.run_training(
          loss,
          train_op,
          TrainSettings(
            dataclasses.replace(TUTORIAL, max_steps=steps),
            train_dir=str(tmp_path / str(steps)),
            log_frequency=1000,
            save_checkpoint_secs=1000,
            save_summaries_steps=1000,
          ),
        )
      return len(calls)

    monkeypatch.setattr(tf.Session, '_call_tf_sessionrun', counting_run)
    # Starting and closing a session takes a constant number of runs.
    assert count_runs(25) - count_runs(5) == 20
