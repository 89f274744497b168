"""Test the parts of recipes."""

import dataclasses

import numpy as np
import pytest
import scipy.special
import scipy.stats
import tensorflow.compat.v1 as tf

import cifar10
import cifar10_input
import cifar10_train
from cifar10_suite import lrn, mixup, runs, schedules, starting, whitening
from cifar10_suite.dataset import CLASS_NAMES
from cifar10_suite.errors import UserError
from cifar10_suite.recipes import FAST, LONG, TUTORIAL
from cifar10_suite.train_settings import TrainSettings


@pytest.mark.parametrize('resumes', [False, True])
def test_keeps_the_activation_scale_of_the_earlier_network(tmp_path, resumes):
  earlier = {}
  for recipe in (TUTORIAL, LONG):
    earlier[recipe] = str(tmp_path / recipe.name)
    runs.record_start(
      earlier[recipe], CLASS_NAMES, None, runs.describe(recipe, tf.float32)
    )
    (tmp_path / recipe.name / 'model.ckpt-1.index').touch()
    (tmp_path / recipe.name / 'model.ckpt-1.data-00000-of-00001').touch()

  def scale(recipe, source):
    new = str(tmp_path / 'new')
    where = (earlier[source], None) if resumes else (new, earlier[source])
    settings = TrainSettings(recipe, where[0], init_from=where[1])
    new_settings = starting.with_activation_scale(settings, True)
    return new_settings.recipe.activation_scale

  assert scale(TUTORIAL, TUTORIAL) == 1
  assert scale(FAST, TUTORIAL) == 1
  assert scale(FAST, LONG) == LONG.activation_scale == 20
  if not resumes:
    with pytest.raises(UserError, match='needs --recipe fast or long'):
      scale(TUTORIAL, LONG)
  afresh = TrainSettings(FAST, earlier[TUTORIAL], restart=True)
  assert (
    starting.with_activation_scale(afresh, True).recipe.activation_scale == 20
  )


class TestParts:
  def test_smoothed_labels(self, graph):
    rng = np.random.RandomState(3)
    logits = rng.normal(size=[7, 10]).astype(np.float32)
    labels = rng.randint(10, size=[7])
    total = cifar10.loss(tf.constant(logits), labels, label_smoothing=0.2)
    z = logits.astype(np.float64)
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    targets = np.full([7, 10], 0.02)
    targets[np.arange(7), labels] = 0.82
    with tf.Session() as session:
      got = session.run(total)
    assert got == pytest.approx(-(targets * log_p).sum(axis=1).mean(), rel=1e-5)

  def test_labels_may_be_distributions(self, graph):
    rng = np.random.RandomState(5)
    logits = rng.normal(size=[7, 10]).astype(np.float32)
    targets = rng.dirichlet(np.ones(10), size=7).astype(np.float32)
    total = cifar10.loss(tf.constant(logits), targets, label_smoothing=0.2)
    log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
    smoothed = 0.8 * targets + 0.02
    with tf.Session() as session:
      got = session.run(total)
    assert got == pytest.approx(
      -(smoothed * log_p).sum(axis=1).mean(), rel=1e-5
    )

  def test_the_learning_rate_rises_and_falls(self, graph):
    recipe = dataclasses.replace(FAST, learning_rate=2.0, max_steps=1000)
    global_step = tf.train.get_or_create_global_step()
    rate = cifar10.learning_rate(global_step, 256, recipe=recipe)
    with tf.Session() as session:
      for step, expected in (
        (0, 0),
        (25, 1),
        (50, 2),
        (525, 1),
        (1000, 0),
        (1100, 0),
      ):
        session.run(global_step.assign(step))
        assert session.run(rate) == pytest.approx(expected, abs=1e-5)

  @pytest.mark.parametrize('dtype', [tf.float32, tf.bfloat16])
  def test_mixes_images_and_labels(self, graph, dtype):
    tf.set_random_seed(6)
    rng = np.random.RandomState(6)
    images = rng.normal(size=[4000, 6, 6, 3]).astype(dtype.as_numpy_dtype)
    labels = np.arange(4000) % 10
    mixed, distributions = mixup.mixed(
      tf.constant(images), tf.constant(labels), 10, 0.2, tf.constant(True)
    )
    assert mixed.dtype == dtype
    with tf.Session() as session:
      mixed, distributions = session.run([mixed, distributions])
    weights = distributions[np.arange(4000), labels]
    others = distributions[np.arange(4000), np.roll(labels, 1)]
    np.testing.assert_allclose(weights + others, 1, rtol=1e-6)
    beta = scipy.stats.beta(0.2, 0.2)
    assert weights.min() >= 0.5
    larger = scipy.stats.kstest(
      weights, lambda x: beta.cdf(x) - beta.cdf(1 - x)
    )
    assert larger.pvalue > 1e-6
    w = weights[:, np.newaxis, np.newaxis, np.newaxis]
    images = images.astype(np.float32)
    expected = w * images + (1 - w) * np.roll(images, 1, axis=0)
    rounding = 1e-5 if dtype == tf.float32 else 0.01
    np.testing.assert_allclose(
      mixed.astype(np.float32), expected, rtol=rounding, atol=rounding
    )

  def test_mixes_until_the_chosen_step(self, graph):
    recipe = dataclasses.replace(LONG, mixup_until=0.7, max_steps=100)
    global_step = tf.train.get_or_create_global_step()
    images = tf.random.normal([64, 6, 6, 3])
    mixed, distributions = mixup.mixed(
      images,
      tf.range(64) % 10,
      10,
      0.2,
      schedules.mixes(global_step, recipe),
    )
    changes = tf.reduce_max(tf.abs(mixed - images))
    certainty = tf.reduce_min(tf.reduce_max(distributions, axis=1))
    with tf.Session() as session:
      for step in (0, 69, 70, 100):
        session.run(global_step.assign(step))
        change, least = session.run([changes, certainty])
        assert (change > 0.1) == (least < 0.99) == (step < 70)

  def test_activation_scale_changes_only_normalization(
    self, graph, monkeypatch
  ):
    monkeypatch.setattr(lrn, '_ALPHA', 0)
    rng = np.random.RandomState(7)
    images = rng.normal(size=[32, 24, 24, 3]).astype(np.float32)
    labels = rng.randint(10, size=[32])
    filters = 0.05 * rng.normal(size=[5, 5, 3, 64])
    losses, changes = [], []
    for scale in (1.0, 20.0):
      with tf.Graph().as_default():
        tf.set_random_seed(8)
        recipe = dataclasses.replace(FAST, activation_scale=scale, max_steps=40)
        logits = cifar10.inference(
          tf.constant(images),
          recipe=recipe,
          first_filters=filters.astype(np.float32),
        )
        loss = cifar10.loss(logits, labels)
        step = tf.train.get_or_create_global_step()
        train_op = cifar10.train(loss, step, recipe=recipe)
        with tf.Session() as session:
          session.run(tf.global_variables_initializer())
          before = session.run(tf.trainable_variables())
          losses.append([session.run([loss, train_op])[0] for _ in range(8)])
          after = session.run(tf.trainable_variables())
          changes.append([b - a for a, b in zip(before, after, strict=True)])
    assert losses[0][-1] < losses[0][0] - 0.2
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    # The weights and biases of conv1, conv2 and local3.
    for plain, scaled, factor in zip(
      *changes, [20, 20, 1, 20, 1 / 20, 1, 1, 1, 1, 1], strict=True
    ):
      np.testing.assert_allclose(
        scaled / factor, plain, atol=0.02 * np.abs(plain).max()
      )

  def test_only_chosen_weights_decay(self, graph):
    recipe = dataclasses.replace(TUTORIAL, weight_decay=0.0)
    cifar10.inference(tf.zeros([2, 24, 24, 3]), recipe=recipe)
    assert tf.get_collection('losses') == []

  def test_drops_out(self, graph):
    tf.set_random_seed(1)
    image = np.random.RandomState(4).normal(size=[1, 24, 24, 3])
    images = tf.constant(np.repeat(image, 500, axis=0).astype(np.float32))

    def logits(dropout, is_training=True):
      recipe = dataclasses.replace(TUTORIAL, dropout=dropout)
      with tf.variable_scope(tf.get_variable_scope(), reuse=tf.AUTO_REUSE):
        return cifar10.inference(images, is_training=is_training, recipe=recipe)

    outputs = [logits(dropout) for dropout in (0.0, 0.2, 0.5)]
    scored = logits(0.5, is_training=False)
    # With positive weights, the layers after dropout are linear.
    positive = [
      variable.assign(tf.abs(variable)) for variable in tf.trainable_variables()
    ]
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      session.run(positive)
      (none, some, half), scored = session.run([outputs, scored])
    np.testing.assert_array_equal(scored, none)
    for got in (some, half):
      np.testing.assert_allclose(got.mean(axis=0), none[0], rtol=0.01)
    # The variance is proportional to dropout / (1 - dropout).
    np.testing.assert_allclose(half.var(axis=0) / some.var(axis=0), 4, rtol=0.2)

  def test_first_filters_whiten(self, graph, batches_dir):
    filters = whitening.whitening_filters(batches_dir, 24, size=3, count=8)
    assert filters.shape == (3, 3, 3, 8) and filters.dtype == np.float32
    np.testing.assert_array_equal(filters[..., :4], -filters[..., 4:])
    images, _ = cifar10_input.inputs(False, batches_dir, 500)
    outputs = tf.nn.conv2d(images, filters[..., :4], 1, 'VALID')
    with tf.train.MonitoredSession() as session:
      got = session.run(outputs).reshape(-1, 4)
    np.testing.assert_allclose(got.std(axis=0), 0.2, rtol=0.1)
    correlation = np.corrcoef(got, rowvar=False) - np.eye(4)
    assert np.abs(correlation).max() < 0.1

  @pytest.mark.slow
  def test_distorts_as_far_as_it_says(self, graph, data_dir, monkeypatch):
    recipe = dataclasses.replace(
      TUTORIAL,
      contrast=(1.0, 1.0),
      crop_margin=(1, 0),
      crop_margin_falls_in=0.1,
      max_steps=100,
    )
    monkeypatch.setattr(cifar10.FLAGS['data_dir'], 'value', data_dir)
    settings = TrainSettings(recipe, train_dir='', data_dir=data_dir)
    ((images, _),) = cifar10_train.distorted_batches(settings, 1)
    plain, _ = cifar10.inputs(eval_data=False)
    possible = tf.concat([plain, plain[:, :, ::-1]], axis=0)
    near_end, end = (tf.train.get_global_step().assign(n) for n in (90, 100))
    with tf.train.MonitoredSession() as session:
      # Four batches contain all 500 images.
      known = np.concatenate([session.run(possible) for _ in range(4)])

      def distances():
        got = session.run(images)
        assert len(got) == cifar10.FLAGS.batch_size
        return [np.abs(known - x).max(axis=(1, 2, 3)).min() for x in got]

      def later_distances():
        for _ in range(9):  # were prefetched
          session.run(images)
        return distances()

      assert np.mean(np.greater(distances(), 0.1)) > 0.9
      session.run(near_end)
      assert np.mean(np.greater(later_distances(), 0.1)) > 0.9
      session.run(end)
      np.testing.assert_allclose(later_distances(), 0, atol=1e-4)


def test_the_trainer_changes_the_saturation(graph, data_dir):
  recipe = dataclasses.replace(TUTORIAL, batch_size=4, saturation=(0.0, 0.0))
  settings = TrainSettings(recipe, train_dir='', data_dir=data_dir)
  ((images, _),) = cifar10_train.distorted_batches(settings, 1)
  with tf.train.MonitoredSession() as session:
    assert np.ptp(session.run(images), axis=-1).max() < 1e-4  # grey


@pytest.mark.parametrize('recipe', [FAST, LONG], ids=lambda it: it.name)
def test_the_trainer_smooths_and_mixes_labels(graph, monkeypatch, recipe):
  rng = np.random.RandomState(1)
  logits = rng.normal(size=[64, 10]).astype(np.float32)
  labels = rng.randint(10, size=64)
  monkeypatch.setattr(
    cifar10, 'inference', lambda *_, **__: tf.constant(logits)
  )
  loss = cifar10_train.build_loss(
    TrainSettings(dataclasses.replace(recipe, whitened=False), train_dir=''),
    tf.zeros([64, 24, 24, 3]),
    tf.constant(labels),
  )
  log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
  smoothing = recipe.label_smoothing
  smoothed = (1 - smoothing) * np.eye(10)[labels] + smoothing / 10
  expected = -(smoothed * log_p).sum(axis=1).mean()
  step = tf.train.get_or_create_global_step()
  with tf.Session() as session:
    session.run(step.initializer)
    first = session.run(loss)
    session.run(step.assign(recipe.max_steps))  # no longer mixes
    assert session.run(loss) == pytest.approx(expected, rel=1e-5)
  assert (abs(first - expected) > 1e-3) == bool(recipe.mixup)
