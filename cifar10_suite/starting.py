"""Start of training: initial network, first line, settings of all workers."""

import dataclasses
import os
from collections.abc import Callable

import numpy as np
import tensorflow.compat.v1 as tf

import cifar10_suite
from cifar10_suite import checkpoints, commands, convolution, devices, runs
from cifar10_suite.cluster import wait_until
from cifar10_suite.errors import UserError
from cifar10_suite.train_settings import TrainSettings

_AVERAGE = '/ExponentialMovingAverage'  # suffix of the names of averages


def with_activation_scale(
  settings: TrainSettings, is_alone: bool
) -> TrainSettings:
  """Return the settings, with the `activation_scale` of the run to start from.

  That is the run to resume or, in a new run, the one of `--init_from`. Without
  either, the recipe's scale stays.

  Args:
    settings: settings from the flags.
    is_alone: whether this is the only worker; others may not see that run.

  Raises:
    UserError: if the recipe, or a cluster, cannot train that network.
  """
  recipe = settings.recipe
  resumes = not settings.restart and checkpoints.saved_in(settings.train_dir)
  if resumes:
    directory = settings.train_dir
  elif settings.init_from:
    directory = checkpoints.directory_of(settings.init_from)
    _check_source(directory, settings)
  else:
    return settings
  scale = runs.activation_scale(directory)
  if scale != recipe.activation_scale and not is_alone:
    raise UserError(
      f'{directory} was trained with another recipe or version: its '
      'activations have another scale. Train it further without a cluster.'
    )
  if recipe.optimizer == 'muon':
    recipe = dataclasses.replace(recipe, activation_scale=scale)
  elif not resumes and scale != 1:
    raise UserError(
      f'--init_from {settings.init_from} needs --recipe fast or long: it was '
      'trained with one of them.'
    )
  return dataclasses.replace(settings, recipe=recipe)


def _check_source(directory: str, settings: TrainSettings) -> None:
  """Check the run of `--init_from`; say if it has seen held-out images.

  Raises:
    UserError: if `--restart` would delete it.
  """
  train_dir = settings.train_dir
  is_there = os.path.isdir(directory)
  if settings.restart and is_there and os.path.samefile(directory, train_dir):
    raise UserError(
      f'--restart would delete {directory}, which --init_from names. Copy it, '
      'or choose another --train_dir.'
    )
  run = runs.read(directory)
  if (
    is_there
    and runs.class_names(directory) == settings.data_set.class_names
    and runs.hold_out(run) < settings.hold_out
  ):
    print(
      f'{directory} may have been trained on images that --hold_out now leaves '
      'out: their scores would be too high.'
    )


def from_run(
  source: str,
) -> Callable[[tf.train.Scaffold, tf.Session], None]:
  """Return a function that initializes variables from another run.

  It is meant as `init_fn` of a scaffold, which calls it unless training
  resumes. Weights start from their moving averages in the newest readable
  checkpoint. Layers of another shape, such as the last one for another number
  of classes, stay as they are. The function prints which.

  Args:
    source: directory of the run, or path of one of its checkpoints.

  Raises:
    CheckpointError: if there is no readable checkpoint of this network.
  """
  if not (path := checkpoints.named(source)) and not os.path.isdir(source):
    raise checkpoints.CheckpointError(
      f'--init_from {source} does not exist. Name a run, which is its '
      'directory, or a checkpoint.'
    )
  path, stored = _newest_averages(
    source, [path] if path else checkpoints.saved_in(source)[::-1]
  )
  fits: dict[str, bool] = {}
  for variable in tf.trainable_variables():
    name = variable.op.name
    layer = name.rpartition('/')[0]
    if name in stored:
      is_alike = list(stored[name].shape) == variable.shape.as_list()
      fits[layer] = fits.get(layer, True) and is_alike
  values = {}
  for variable in tf.global_variables():
    name = variable.op.name.removesuffix(_AVERAGE)
    if name in stored and fits[name.rpartition('/')[0]]:
      values[variable] = stored[name]
  fitting = ', '.join(layer for layer, fit in fits.items() if fit)
  others = ', '.join(layer for layer, fit in fits.items() if not fit)

  def initialize(_: tf.train.Scaffold, session: tf.Session) -> None:
    feeds = {v.initializer.inputs[1]: value for v, value in values.items()}
    session.run([variable.initializer for variable in values], feeds)
    print(
      f'Starting from {path}: {fitting}'
      + (f'; {others} has another shape' if others else '')
    )

  return initialize


def _newest_averages(
  source: str, paths: list[str]
) -> tuple[str, dict[str, np.ndarray]]:
  """Return the first readable checkpoint, and its values by `_averages_in`.

  Raises:
    CheckpointError: if there is none; it names `source`.
  """
  for path in paths:
    try:
      if values := _averages_in(path):
        return path, values
    except checkpoints.CheckpointError as error:
      print(f'Skipped: {error}')
  raise checkpoints.CheckpointError(
    f'--init_from {source} has no readable checkpoint of this network.'
  )


def _averages_in(path: str) -> dict[str, np.ndarray]:
  """Return the values of the network's variables, by name, from a checkpoint.

  They are the moving averages, or the variables where there are none. Those
  that the checkpoint lacks are left out.

  Raises:
    CheckpointError: if it is unreadable, or if a value is not finite.
  """
  values = {}
  with checkpoints.reading(path):
    reader = tf.train.load_checkpoint(path)
    for variable in tf.trainable_variables():
      name = variable.op.name
      for key in (f'{name}{_AVERAGE}', name):
        if name not in values and reader.has_tensor(key):
          values[name] = reader.get_tensor(key)
  checkpoints.refuse_not_finite(path, values)
  return values


def announce(
  settings: TrainSettings, num_gpus: int | None, num_threads: int
) -> None:
  """Print the device, the compute type, the recipe and the results directory.

  Args:
    settings: settings from the flags.
    num_gpus: number of GPUs to use; None for one, if there is one.
    num_threads: number of threads for computing on the CPU.
  """
  num_present = len(tf.config.list_physical_devices('GPU'))
  num_gpus = min(num_present, 1) if num_gpus is None else num_gpus
  print(
    f'Training with {devices.describe(num_gpus, num_threads)} in '
    f'{settings.dtype.name}: recipe {settings.recipe.name}, results in '
    f'{commands.short_path(settings.train_dir)}.'
  )
  if hint := devices.hint(num_gpus, num_present):
    print(hint)


def settings_in_common(
  settings: TrainSettings, num_towers: int, bfloat16_gradients: bool
) -> dict[str, object]:
  """Return the settings that all workers of a cluster must share.

  They include the variables of the default graph, which cifar10.py defines.

  Args:
    settings: settings from the flags.
    num_towers: number of batches that a worker handles per step.
    bfloat16_gradients: whether gradients are averaged in bfloat16.
  """
  return {
    'version': cifar10_suite.__version__,
    'TensorFlow': tf.__version__,
    **dataclasses.asdict(settings.recipe),
    'compute type': settings.dtype.name,
    # Workers without them compute in float32 and round: variables would differ.
    'kernels for bfloat16': settings.dtype == tf.bfloat16
    and convolution.is_fast(tf.bfloat16),
    'towers': num_towers,
    'class names': settings.data_set.class_names,
    'number of training images': settings.data_set.num_training_images,
    'hold_out': settings.hold_out,
    'scale_learning_rate': settings.scale_learning_rate,
    'bfloat16_gradients': bfloat16_gradients,
    **{
      f'variable {it.op.name}': f'{it.dtype.base_dtype.name} {it.shape}'
      for it in tf.global_variables()
    },
  }


def wait_for_chief(settings: TrainSettings) -> None:
  """Wait until the chief continues or deletes a run that has ended.

  Otherwise, the evaluator would mistake that run for the current one, and exit.
  This waits for `cluster_timeout_secs` at most.
  """

  def is_before_start() -> bool:
    latest = checkpoints.latest(settings.train_dir)
    if not latest or not checkpoints.ends_run(latest):
      return False
    step = checkpoints.step_in_name(latest)
    return settings.restart or step < settings.recipe.max_steps

  if is_before_start():
    where = commands.short_path(settings.train_dir)
    print(f'Waiting for the chief: {where} has a run that has ended.')
    wait_until(lambda: not is_before_start(), settings.cluster_timeout_secs)
