"""Test the optimizers against the same computation in NumPy."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from cifar10_suite import optimizers


def iterated(matrix):
  """Apply the polynomials to the singular values of a matrix."""
  u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
  s /= np.sqrt(np.sum(s**2))
  for a, b, c in (
    (8.0934, -23.6204, 17.4462),
    (3.6366, -2.7219, 0.5365),
    (2.6613, -1.9772, 0.4526),
  ):
    s = a * s + b * s**3 + c * s**5
  return u @ (s[:, np.newaxis] * vt)


class TestOrthogonalized:
  @pytest.mark.parametrize('shape', [(75, 64), (40, 40), (10, 192)])
  @pytest.mark.parametrize('scale', [1e-6, 1e3])
  def test_brings_singular_values_near_to_one(self, graph, shape, scale):
    matrix = np.random.RandomState(1).normal(size=shape) * scale
    result = optimizers.orthogonalized(tf.constant(matrix.astype(np.float32)))
    with tf.Session() as session:
      got = session.run(result)
    np.testing.assert_allclose(got, iterated(matrix), atol=1e-3)

  def test_reaches_singular_values_down_to_a_hundredth(self, graph):
    rng = np.random.RandomState(3)
    u, _ = np.linalg.qr(rng.normal(size=(200, 60)))
    v, _ = np.linalg.qr(rng.normal(size=(60, 60)))
    values = np.geomspace(0.011, 0.35, 60)
    values /= np.linalg.norm(values)
    assert 0.01 < values.min() < 0.0105
    matrix = tf.constant((u * values) @ v.T, tf.float32)
    with tf.Session() as session:
      got = session.run(optimizers.orthogonalized(matrix))
    values = np.linalg.svd(got, compute_uv=False)
    assert values.min() > 0.72 and values.max() < 1.28

  def test_rounds_products_to_bfloat16(self, graph):
    matrix = np.random.RandomState(1).normal(size=(300, 64))
    constant = tf.constant(matrix, tf.float32)
    result = optimizers.orthogonalized(constant, tf.bfloat16)
    with tf.Session() as session:
      got = session.run(result)
    assert got.dtype == np.float32
    exact = iterated(matrix)
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < 0.05

  @pytest.mark.parametrize('dtype', [tf.float32, tf.bfloat16])
  def test_zeros_stay_zeros(self, graph, dtype):
    result = optimizers.orthogonalized(tf.zeros([5, 3]), dtype)
    with tf.Session() as session:
      np.testing.assert_array_equal(session.run(result), 0)


def test_muon_steps_as_by_hand(graph):
  rng = np.random.RandomState(2)
  shapes = [5, 5, 3, 8], [20, 6], [4000, 30], [7]
  values = [rng.normal(size=shape) for shape in shapes]
  variables = [
    tf.get_variable(
      f'v{k}',
      initializer=value.astype(np.float32),
      use_resource=True,
    )
    for k, value in enumerate(values)
  ]
  feeds = [tf.placeholder(tf.float32, value.shape) for value in values]
  optimizer = optimizers.MuonOptimizer(0.1, 0.9, weight_decay=0.5)
  step = optimizer.apply_gradients(zip(feeds, variables, strict=True))
  names = {f'v{k}/Muon' for k in range(4)}
  assert names < {v.op.name for v in tf.global_variables()}
  momenta = [np.zeros_like(value) for value in values]
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    for _ in range(3):
      gradients = [rng.normal(size=value.shape) for value in values]
      session.run(step, dict(zip(feeds, gradients, strict=True)))
      for k, gradient in enumerate(gradients):
        momenta[k] = 0.9 * momenta[k] + gradient
        update = gradient + 0.9 * momenta[k]
        if update.ndim > 1:
          rows = update.reshape(-1, update.shape[-1])
          update = iterated(rows).reshape(update.shape) + 0.5 * values[k]
        values[k] = values[k] - 0.1 * update
      for value, got in zip(values, session.run(variables), strict=True):
        np.testing.assert_allclose(got, value, atol=1e-3)
