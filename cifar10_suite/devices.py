"""The devices that training uses, in words."""

import os

import tensorflow.compat.v1 as tf

_NVIDIA_DRIVER = '/proc/driver/nvidia/version'


def describe(num_gpus: int, num_threads: int) -> str:
  """Describe the devices of a run: '2 threads on the CPU' or '1 GPU (...)'.

  Args:
    num_gpus: number of GPUs that it uses.
    num_threads: number of threads that it uses without GPUs.
  """
  if num_gpus:
    gpus = tf.config.list_physical_devices('GPU')[:num_gpus]
    names = {
      tf.config.experimental.get_device_details(gpu).get('device_name', 'GPU')
      for gpu in gpus
    }
    return f'{_count(num_gpus, "GPU")} ({", ".join(sorted(names))})'
  return f'{_count(num_threads, "thread")} on the CPU'


def hint(
  num_gpus: int,
  num_there: int,
  has_driver: bool = os.path.exists(_NVIDIA_DRIVER),
) -> str | None:
  """Return advice if the machine has a GPU that is not used.

  Args:
    num_gpus: number of GPUs that the run uses.
    num_there: number of GPUs that TensorFlow can use.
    has_driver: whether the machine has the driver of an NVIDIA GPU.
  """
  is_hidden = os.environ.get('CUDA_VISIBLE_DEVICES') in ('', '-1')
  if not num_there and has_driver and not is_hidden:
    return (
      'This machine has an NVIDIA GPU, which this TensorFlow cannot use. '
      'Install its libraries: pip install -r requirements-gpu.txt'
    )
  if num_gpus < num_there:
    return (
      f'Using {num_gpus} of {num_there} GPUs. To use all, run '
      f'cifar10_multi_gpu_train.py --num_gpus {num_there}'
    )
  return None


def _count(number: int, noun: str) -> str:
  return f'{number} {noun}' + ('' if number == 1 else 's')
