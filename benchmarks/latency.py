"""Measure the time to classify one picture with each exported format.

  .venv/bin/pip install tf2onnx onnxruntime
  .venv/bin/python benchmarks/latency.py [--checkpoint_dir ...]

Exports a checkpoint to a temporary directory in each format, then classifies
one picture with each in turn, for several rounds. Prints sizes and medians.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

_ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
sys.path.insert(0, _ROOT)

from cifar10_suite import loading

loading.load_tensorflow()

import numpy as np

from cifar10_suite import export_formats

_ROUNDS, _CALLS = 5, 100
# Name: how to load the model, and the flags that export it.
_FORMATS = {
  'SavedModel': (
    lambda path: export_formats.load_saved_model(path)[0],
    ['--export_dir'],
  ),
  'TFLite': (export_formats.load_tflite, ['--export_tflite']),
  'TFLite, float16': (
    export_formats.load_tflite,
    ['--quantize=float16', '--export_tflite'],
  ),
  'TFLite, int8': (
    export_formats.load_tflite,
    ['--quantize=int8', '--export_tflite'],
  ),
  'ONNX': (export_formats.load_onnx, ['--export_onnx']),
}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  _, checkpoint_flags = parser.parse_known_args()
  networks, sizes = {}, {}
  with tempfile.TemporaryDirectory() as directory:
    for name, (load, flags) in _FORMATS.items():
      path = os.path.join(directory, name)
      subprocess.run(
        [
          sys.executable,
          os.path.join(_ROOT, 'cifar10_predict.py'),
          *checkpoint_flags,
          *flags,
          path,
        ],
        check=True,
      )
      with loading.discarded_stderr():  # TFLite logs there
        networks[name] = load(path)
      sizes[name] = _size(path)
  seconds: dict[str, list[float]] = {name: [] for name in networks}
  picture = np.random.RandomState(0).randint(0, 256, [1, 32, 32, 3], np.uint8)
  for _ in range(_ROUNDS):
    for name, network in networks.items():
      for _ in range(_CALLS):
        start = time.perf_counter()
        network(picture)
        seconds[name].append(time.perf_counter() - start)
  for name, times in seconds.items():
    ms = 1000 * statistics.median(times)
    print(f'{name:16} {sizes[name] / 1e6:5.1f} MB {ms:7.2f} ms')


def _size(path: str) -> int:
  """Return the size of a file, or of all files in a directory."""
  paths = [path]
  if os.path.isdir(path):
    paths = [
      os.path.join(folder, name)
      for folder, _, names in os.walk(path)
      for name in names
    ]
  return sum(os.path.getsize(file) for file in paths)


if __name__ == '__main__':
  main()
