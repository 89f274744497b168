"""Schedules of the learning rate, the crop margin and mixup."""

import tensorflow.compat.v1 as tf

from cifar10_suite.recipes import Recipe

_RISING_FRACTION = 0.05  # warm-up of a triangular schedule


def of_recipe(
  global_step: tf.Variable, recipe: Recipe, factor: float, decay_steps: int
) -> tf.Tensor:
  """Return the learning rate of a recipe, float32 [].

  Args:
    global_step: integer [], the number of completed steps.
    recipe: the initial or peak learning rate, and the schedule.
    factor: factor of each drop of a stepwise schedule.
    decay_steps: number of steps between drops.
  """
  rate = recipe.learning_rate
  if recipe.linear:
    return triangle(global_step, rate, recipe.max_steps)
  return staircase(global_step, rate, factor, decay_steps)


def staircase(
  global_step: tf.Variable, initial: float, factor: float, decay_steps: int
) -> tf.Tensor:
  """Return initial * factor^floor(global_step / decay_steps), float32 []."""
  return tf.train.exponential_decay(
    initial, global_step, decay_steps, factor, staircase=True
  )


def triangle(global_step: tf.Variable, peak: float, steps: int) -> tf.Tensor:
  """Return a linear warm-up to `peak` and linear decay to 0, float32 [].

  The warm-up takes 5% of the steps. The rate is 0 in the first step, whose
  `global_step` is 0, and would be 0 in the step after the last one.
  """
  progress = _progress(global_step, steps)
  rising = progress / _RISING_FRACTION
  falling = (1 - progress) / (1 - _RISING_FRACTION)
  return peak * tf.minimum(rising, falling)


def warm_up(global_step: tf.Variable, scale: float, steps: float) -> tf.Tensor:
  """Return a factor that rises linearly from 1 to `scale`, float32 [].

  From Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1
  Hour" (2017), section 2.2.
  """
  return 1 + (scale - 1) * _progress(global_step, steps)


def crop_margin(global_step: tf.Variable, recipe: Recipe) -> float | tf.Tensor:
  """Return the crop margin at this step for `cifar10_input.distort`."""
  first, last = recipe.crop_margin
  if first == last:
    return first
  left = 1 - _progress(global_step, recipe.max_steps)
  still_to_fall = tf.minimum(left / recipe.crop_margin_falls_in, 1)
  return last + (first - last) * still_to_fall


def mixes(global_step: tf.Variable, recipe: Recipe) -> tf.Tensor:
  """Return whether to mix images at this step, bool []."""
  return _progress(global_step, recipe.max_steps) < recipe.mixup_until


def _progress(global_step: tf.Variable, steps: float) -> tf.Tensor:
  """Return the fraction of completed steps, float32 [], at most 1."""
  return tf.minimum(tf.cast(global_step, tf.float32) / steps, 1)
