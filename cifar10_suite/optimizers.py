"""Optimizers that TensorFlow lacks: averaging of variables, and Muon.

Both are subclasses of `tf.train.Optimizer`.
"""

from collections.abc import Mapping

import tensorflow.compat.v1 as tf

from cifar10_suite import convolution, xla
from cifar10_suite.recipes import Recipe
from cifar10_suite.updates import Gradients


def of_recipe(
  rate: tf.Tensor,
  recipe: Recipe,
  step_scales: Mapping[str, float],
  dtype: tf.DType,
) -> tf.train.Optimizer:
  """Return the optimizer of a recipe.

  Args:
    rate: float32 [], the learning rate.
    recipe: the optimizer, its momentum and its decoupled weight decay.
    step_scales: factors of Muon's steps, by variable name.
    dtype: the compute type, for Muon's matrix products.
  """
  if recipe.optimizer == 'descent':
    return tf.train.GradientDescentOptimizer(rate)
  if recipe.optimizer == 'nesterov':
    return tf.train.MomentumOptimizer(rate, recipe.momentum, use_nesterov=True)
  return MuonOptimizer(
    rate, recipe.momentum, recipe.decoupled_weight_decay, step_scales, dtype
  )


class AveragingOptimizer(tf.train.Optimizer):
  """Optimizer wrapper that updates moving averages after the variables.

  A moving average becomes `d * average + (1 - d) * variable`, where
  d = min(decay, (1 + step) / (10 + step)); variable and step are the values
  after the update.
  """

  def __init__(self, optimizer: tf.train.Optimizer, decay: float):
    super().__init__(use_locking=False, name='Averaging')
    self._optimizer = optimizer
    self._decay = decay

  def compute_gradients(self, *args: object, **kwargs: object) -> Gradients:
    return self._optimizer.compute_gradients(*args, **kwargs)

  def apply_gradients(
    self,
    grads_and_vars: Gradients,
    global_step: tf.Variable,
    name: str | None = None,
  ) -> tf.Operation:
    update = self._optimizer.apply_gradients(grads_and_vars, name=name)
    with tf.control_dependencies([update]):
      # Use the sum instead of reading global_step again. In other programs, it
      # may be a TF1 reference variable, and graph optimization may merge two
      # reads of one across an update between them.
      step = tf.assign_add(global_step, 1)
      averages = tf.train.ExponentialMovingAverage(
        self._decay, num_updates=step
      )
      updates = []
      for variable in tf.trainable_variables():
        # On a parameter server, both stay there.
        with tf.colocate_with(variable):
          updates.append(averages.apply([variable]))
      return tf.group(*updates)


def variables_to_restore() -> dict[str, tf.Variable]:
  """Return the variables that evaluation restores, by checkpoint name.

  Trainable variables map to the names of their moving averages.
  """
  # The names do not depend on the decay.
  return tf.train.ExponentialMovingAverage(decay=1.0).variables_to_restore()


class MuonOptimizer(tf.train.Optimizer):
  """Muon: momentum with orthogonalized updates of weight matrices.

  For a gradient g, the momentum is m = momentum * m + g, and the update is
  u = g + momentum * m (Nesterov). Biases change by -learning_rate * u.
  Weights change by about -learning_rate * U V', where U S V' is the singular
  value decomposition of u as a matrix [inputs, outputs]; `orthogonalized` says
  how exactly. All directions of the gradient thus count about equally, except
  for very small ones. From Jordan et al., "Muon: An optimizer for hidden layers
  in neural networks" (2024), who leave out the first and the last layer, and
  multiply by a factor for the shape.

  Decoupled weight decay multiplies weights by 1 - learning_rate * weight_decay
  in each step, as in Loshchilov and Hutter, "Decoupled Weight Decay
  Regularization" (2019). Variables must be resource variables.

  Args:
    learning_rate: float or float32 [].
    momentum: number in [0, 1).
    weight_decay: at least 0; biases do not decay.
    step_scales: factors of the steps u or U V' by variable name, by default 1;
      weight decay does not change.
    dtype: the compute type. The matrix products are in bfloat16 if this is
      bfloat16 and known to be fast on the variable's device, else in float32.
  """

  NAME = 'Muon'  # momentum variables are named '<variable>/Muon'

  def __init__(
    self,
    learning_rate: float | tf.Tensor,
    momentum: float,
    weight_decay: float = 0.0,
    step_scales: Mapping[str, float] | None = None,
    dtype: tf.DType = tf.float32,
  ):
    super().__init__(use_locking=False, name=self.NAME)
    self._learning_rate = learning_rate
    self._momentum = momentum
    self._weight_decay = weight_decay
    self._step_scales = step_scales or {}
    self._dtype = dtype

  def _create_slots(self, var_list: list[tf.Variable]) -> None:
    for variable in var_list:
      self._zeros_slot(variable, 'momentum', self._name)

  def _resource_apply_dense(
    self, grad: tf.Tensor, var: tf.Variable
  ) -> tf.Operation:
    slot = self.get_slot(var, 'momentum')
    momentum, update = _nesterov(slot.read_value(), grad, self._momentum)
    decay = 0.0
    if update.shape.rank > 1:
      outputs = update.shape.as_list()[-1]
      matrix = tf.reshape(update, [-1, outputs])
      matrix = orthogonalized(matrix, self._type_on(var.device))
      update = tf.reshape(matrix, update.shape)
      decay = self._weight_decay
    rate = tf.convert_to_tensor(self._learning_rate)
    scale = self._step_scales.get(var.op.name, 1.0)
    value = _descended(var.read_value(), update, rate, decay, scale)
    return tf.group(tf.assign(slot, momentum), tf.assign(var, value))

  def _type_on(self, device: str) -> tf.DType:
    """Return the type of the products on a variable's device.

    In float16, squares of small gradients would be zero. On a parameter server,
    and on the CPU of a machine with GPUs, nothing is known about the speed of
    bfloat16.
    """
    spec = tf.DeviceSpec.from_string(device)
    has_gpu = tf.config.get_visible_devices('GPU')
    is_unknown = spec.job == 'ps' or (spec.device_type == 'CPU' and has_gpu)
    is_short = self._dtype == tf.bfloat16 and not is_unknown
    return tf.bfloat16 if is_short else tf.float32


@xla.compiled
def _nesterov(
  momentum: tf.Tensor, gradient: tf.Tensor, factor: float
) -> tuple[tf.Tensor, tf.Tensor]:
  """Return the new momentum and Nesterov's update."""
  momentum = factor * momentum + gradient
  return momentum, gradient + factor * momentum


@xla.compiled
def _descended(
  value: tf.Tensor,
  update: tf.Tensor,
  rate: tf.Tensor,
  decay: float,
  scale: float,
) -> tf.Tensor:
  return value - rate * (scale * update + decay * value)


# Polynomials a x + b x^3 + c x^5. One after the other, they map [0.01, 1] to
# [0.73, 1.27], as close to 1 as three can come: each is the best uniform
# approximation of 1 on the range of the one before (Amsel, Persson, Musco and
# Gower, "The Polar Express: Optimal Matrix Sign Methods and Their Application
# to the Muon Algorithm", 2025).
_POLYNOMIALS = (
  (8.0934, -23.6204, 17.4462),
  (3.6366, -2.7219, 0.5365),
  (2.6613, -1.9772, 0.4526),
)


def orthogonalized(
  matrix: tf.Tensor, dtype: tf.DType = tf.float32
) -> tf.Tensor:
  """Set the singular values of a matrix to approximately 1.

  Uses Newton-Schulz iteration: an odd polynomial M (a + b M'M + c (M'M)^2) of a
  matrix applies the polynomial to its singular values. All products but the
  first and the last one involve only the small square matrix M'M.

  Args:
    matrix: float32 [m, n] of known shape.
    dtype: type of the matrix products, float32 or bfloat16.

  Returns:
    float32 [m, n]. Singular values that exceed 0.01 after division by the
    Frobenius norm become values between 0.73 and 1.27; smaller ones are
    multiplied by up to 78. Zero matrices stay zero. In bfloat16, the result
    differs by 2 to 5% of its norm in the large layers of a training, by up to
    12% in conv1, and by more if one singular value dominates all others.
  """
  if matrix.shape[0] < matrix.shape[1]:
    return tf.transpose(orthogonalized(tf.transpose(matrix), dtype))

  def product_of(
    x: tf.Tensor, y: tf.Tensor, transpose_x: bool = False
  ) -> tf.Tensor:
    """Multiply float32 matrices in `dtype`."""
    x, y = tf.cast(x, dtype), tf.cast(y, dtype)
    return tf.cast(convolution.matmul(x, y, transpose_x), tf.float32)

  # After each polynomial, the matrix is M times all factors so far, and `gram`
  # is its transpose times itself. Factors are symmetric, as polynomials of a
  # symmetric matrix. TensorFlow does not compute the last `gram`.
  identity = tf.eye(matrix.shape.as_list()[1])
  gram = product_of(matrix, matrix, transpose_x=True)
  # The trace is the square of the Frobenius norm.
  scale = tf.math.rsqrt(tf.linalg.trace(gram) + 1e-14)
  gram *= scale**2
  factors = None
  for a, b, c in _POLYNOMIALS:
    factor = a * identity + b * gram + c * product_of(gram, gram)
    factors = factor if factors is None else product_of(factors, factor)
    gram = product_of(factor, product_of(gram, factor))
  return product_of(matrix, scale * factors)
