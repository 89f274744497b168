"""What a training starts from, says first, and shares with other workers."""

import dataclasses

import tensorflow.compat.v1 as tf

import cifar10_suite
from cifar10_suite import checkpoints, cli, devices, runs
from cifar10_suite.errors import UserError
from cifar10_suite.training import TrainSettings


def continuing(settings: TrainSettings) -> TrainSettings:
  """Return the settings with the activation scale of the network to start from.

  Raises:
    UserError: if the recipe's optimizer cannot train that network.
  """
  recipe = settings.recipe
  if not settings.restart and checkpoints.saved_in(settings.train_dir):
    directory = settings.train_dir
  elif settings.init_from:
    directory = checkpoints.directory_of(settings.init_from)
  else:
    return settings
  scale = runs.activation_scale(directory)
  if recipe.optimizer == 'muon':
    recipe = dataclasses.replace(recipe, activation_scale=scale)
  elif settings.init_from and scale != 1:
    raise UserError(
      f'--init_from {settings.init_from} needs --recipe fast or long: it was '
      'trained with one of them.'
    )
  return dataclasses.replace(settings, recipe=recipe)


def announce(
  settings: TrainSettings, num_gpus: int | None, num_threads: int
) -> None:
  """Print what training runs on, in which precision, how and where to.

  Args:
    settings: settings from the flags.
    num_gpus: number of GPUs to use; None for one, if there is one.
    num_threads: number of threads for computing on the CPU.
  """
  there = len(tf.config.list_physical_devices('GPU'))
  num_gpus = min(there, 1) if num_gpus is None else num_gpus
  print(
    f'Training with {devices.describe(num_gpus, num_threads)} in '
    f'{settings.dtype.name}: recipe {settings.recipe.name}, results in '
    f'{cli.short_path(settings.train_dir)}.'
  )
  if hint := devices.hint(num_gpus, there):
    print(hint)


def settings_in_common(
  settings: TrainSettings, num_towers: int, **others: object
) -> dict[str, object]:
  """Return the settings that all workers of a cluster must share.

  Args:
    settings: settings from the flags.
    num_towers: number of batches that a worker handles per step.
    **others: further ones, by name.
  """
  return {
    'version': cifar10_suite.__version__,
    'TensorFlow': tf.__version__,
    **dataclasses.asdict(settings.recipe),
    'compute type': settings.dtype.name,
    'towers': num_towers,
    'class names': settings.data_set.class_names,
    'number of training images': settings.data_set.num_training_images,
    'hold_out': settings.hold_out,
    **others,
  }
