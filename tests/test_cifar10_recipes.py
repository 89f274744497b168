"""Tests recipes: their parts, and the programs under `--recipe`."""

import dataclasses
import glob
import re
import shutil

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from programs import ROOT, run, summaries

import cifar10
import cifar10_input
from cifar10_recipes import FAST, TUTORIAL


def assert_falls(directory, highest, rise, last, first=0):
  """Checks the learning rates summarized from step `first` to step `last`.

  TensorFlow's hook reads the global step while it is being counted, and may
  write a step early or late: which steps there are is not certain.
  """
  rates = [
    (step - 1, value.simple_value)  # the number of steps done before it
    for step, tag, value in summaries(directory)
    if tag == 'learning_rate' and step > first
  ]
  assert len(rates) >= (last - first) // 10 - 1
  for step, rate in rates:
    part = min(step / rise, (last - step) / (last - rise))
    assert rate == pytest.approx(highest * part, rel=1e-4)


class TestParts:
  def test_smoothed_labels(self, graph):
    rng = np.random.RandomState(3)
    logits = rng.normal(size=[7, 10]).astype(np.float32)
    labels = rng.randint(10, size=[7])
    recipe = dataclasses.replace(TUTORIAL, label_smoothing=0.2)
    total = cifar10.loss(tf.constant(logits), labels, recipe)
    z = logits.astype(np.float64)
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    targets = np.full([7, 10], 0.02)
    targets[np.arange(7), labels] = 0.82
    with tf.Session() as session:
      got = session.run(total)
    assert got == pytest.approx(-(targets * log_p).sum(axis=1).mean(), rel=1e-5)

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

  def test_only_chosen_weights_decay(self, graph):
    recipe = dataclasses.replace(TUTORIAL, weight_decay=0.0)
    cifar10.inference(tf.zeros([2, 24, 24, 3]), recipe)
    assert tf.get_collection('losses') == []

  def test_drops_out(self, graph):
    tf.set_random_seed(1)
    image = np.random.RandomState(4).normal(size=[1, 24, 24, 3])
    images = tf.constant(np.repeat(image, 500, axis=0).astype(np.float32))

    def logits(dropout):
      recipe = dataclasses.replace(TUTORIAL, dropout=dropout)
      with tf.variable_scope(tf.get_variable_scope(), reuse=tf.AUTO_REUSE):
        return cifar10.inference(images, recipe)

    outputs = [logits(dropout) for dropout in (0.0, 0.2, 0.5)]
    # With positive weights, what comes after is linear.
    positive = [
      variable.assign(tf.abs(variable)) for variable in tf.trainable_variables()
    ]
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      session.run(positive)
      none, some, half = session.run(outputs)
    for got in (some, half):
      np.testing.assert_allclose(got.mean(axis=0), none[0], rtol=0.01)
    # The variance is in proportion to dropout / (1 - dropout).
    np.testing.assert_allclose(half.var(axis=0) / some.var(axis=0), 4, rtol=0.2)

  def test_first_filters_whiten(self, graph, batches_dir):
    filters = cifar10_input.whitening_filters(batches_dir, size=3, count=8)
    assert filters.shape == (3, 3, 3, 8) and filters.dtype == np.float32
    np.testing.assert_array_equal(filters[..., :4], -filters[..., 4:])
    images, _ = cifar10_input.inputs(False, batches_dir, 500)
    outputs = tf.nn.conv2d(images, filters[..., :4], 1, 'VALID')
    with tf.train.MonitoredSession() as session:
      got = session.run(outputs).reshape(-1, 4)
    np.testing.assert_allclose(got.std(axis=0), 0.2, rtol=0.1)
    correlation = np.corrcoef(got, rowvar=False) - np.eye(4)
    assert np.abs(correlation).max() < 0.1

  def test_distorts_as_far_as_it_says(self, graph, data_dir, monkeypatch):
    recipe = dataclasses.replace(
      TUTORIAL,
      contrast=(1.0, 1.0),
      crop_margin=(1, 0),
      crop_margin_falls_in=0.1,
      max_steps=100,
    )
    monkeypatch.setattr(cifar10.FLAGS['data_dir'], 'value', data_dir)
    images, _ = cifar10.distorted_inputs(recipe)
    plain, _ = cifar10.inputs(eval_data=False)
    possible = tf.concat([plain, plain[:, :, ::-1]], axis=0)
    near_end, end = (tf.train.get_global_step().assign(n) for n in (90, 100))
    with tf.train.MonitoredSession() as session:
      # Four of these have all 500 images.
      known = np.concatenate([session.run(possible) for _ in range(4)])

      def distances():
        got = session.run(images)
        assert len(got) == cifar10.FLAGS.batch_size
        return [np.abs(known - x).max(axis=(1, 2, 3)).min() for x in got]

      def later_distances():
        for _ in range(10):  # some of them were ready before
          later = distances()
        return later

      assert np.mean(np.greater(distances(), 0.1)) > 0.9
      session.run(near_end)
      assert np.mean(np.greater(later_distances(), 0.1)) > 0.9
      session.run(end)
      np.testing.assert_allclose(later_distances(), 0, atol=1e-4)


@pytest.fixture
def flags(data_dir, tmp_path):
  return [
    f'--data_dir={data_dir}',
    f'--train_dir={tmp_path}/train',
    '--recipe=fast',
    '--batch_size=64',
    '--log_frequency=10',
    '--save_summaries_steps=10',
  ]


def test_trains_resumes_and_is_evaluated(flags, eval_flags, tmp_path):
  run('cifar10_train.py', *flags, '--max_steps=40')
  assert_falls(tmp_path / 'train', FAST.learning_rate, rise=2, last=40)
  lines, errors = run(
    'cifar10_multi_gpu_train.py',
    *flags,
    '--max_steps=80',
    '--learning_rate=0.01',
  )
  assert errors == ''
  assert 'Resuming from step 40' in lines
  assert_falls(tmp_path / 'train', 0.01, rise=4, last=80, first=40)
  losses = re.findall(r'loss = ([\d.]+)', '\n'.join(lines))
  assert float(losses[0]) < 1.5
  lines, _ = run('cifar10_eval.py', *eval_flags, '--run_once')
  (precision,) = re.findall(r'precision @ 1 = ([\d.]+)', '\n'.join(lines))
  assert float(precision) > 0.8


def test_long_trains(flags):
  lines, errors = run(
    'cifar10_multi_gpu_train.py', *flags, '--recipe=long', '--max_steps=2'
  )
  assert errors == '' and 'Trained to step 2' in lines[-1]


def test_recipes_do_not_go_on_from_each_other(flags, tmp_path):
  tutorial = [*flags, '--recipe=tutorial', '--max_steps=2']
  run('cifar10_train.py', *flags, '--max_steps=2')
  _, errors = run('cifar10_train.py', *tutorial, status=1)
  assert 'model.ckpt-2 was trained with another --recipe' in errors
  run('cifar10_train.py', *tutorial, '--restart')
  _, errors = run('cifar10_train.py', *flags, '--max_steps=4', status=1)
  assert 'model.ckpt-2 was trained with another --recipe' in errors
  assert 'Traceback' not in errors


def test_an_unknown_recipe_is_named(flags):
  _, errors = run('cifar10_train.py', *flags, '--recipe=slow', status=1)
  assert '--recipe=slow' in errors and 'tutorial|fast|long' in errors
  assert 'Traceback' not in errors


@pytest.mark.parametrize('size', [32, 9])
def test_another_image_size_trains_and_is_evaluated(
  flags, eval_flags, tmp_path, size
):
  """As a reader of the tutorial would: by an edit of the constant."""
  copy = tmp_path / 'copy'
  copy.mkdir()
  for path in glob.glob(f'{ROOT}/*.py'):
    shutil.copy(path, copy)
  module = copy / 'cifar10_input.py'
  text = module.read_text()
  assert text.count('\nIMAGE_SIZE = 24\n') == 1
  module.write_text(text.replace('IMAGE_SIZE = 24', f'IMAGE_SIZE = {size}'))
  lines, errors = run(str(copy / 'cifar10_train.py'), *flags, '--max_steps=3')
  assert errors == '' and 'Trained to step 3' in lines[-1]
  lines, errors = run(
    str(copy / 'cifar10_eval.py'), *eval_flags, '--run_once', '--num_views=10'
  )
  assert errors == '' and 'step 3: ' in lines[-1]
  other = f'--eval_dir={tmp_path}/other'
  _, errors = run('cifar10_eval.py', *eval_flags, other, '--run_once', status=1)
  assert 'is not of this network: local3/weights' in errors
