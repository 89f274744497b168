"""CIFAR-10's official archive: download, verification, extraction."""

import contextlib
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from typing import IO

from six.moves import http_client, urllib
from tqdm import tqdm

from cifar10_suite import data_files, dataset
from cifar10_suite.data_files import DownloadError, State

URL = dataset.DATA_URL
SHA256 = 'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'
BYTES = 170_052_171
TIMEOUT_SECS = 30  # without data from the server


def path_in(data_dir: str) -> str:
  """Return the path of the archive."""
  return os.path.join(data_dir, os.path.basename(URL))


def fetch(data_dir: str, wanted: list[str]) -> None:
  """Extract data files from the archive; download it if needed.

  Args:
    data_dir: directory of the archive and of the folder of data files.
    wanted: names of the data files.

  Raises:
    DownloadError: if the archive cannot be downloaded, or lacks a file.
    OSError: if files cannot be written.
  """
  batches_dir = os.path.join(data_dir, dataset.BATCHES_DIR)
  archive = path_in(data_dir)
  digest = data_files.sha256(archive)
  if digest != SHA256:
    if digest:
      print(
        f'{archive} is not the whole official archive: it has '
        f'{os.path.getsize(archive):,} of {BYTES:,} bytes, and a different '
        'SHA-256.'
      )
    _download(archive)
  try:
    with tarfile.open(archive, 'r:gz') as tar:
      for member in tar:
        folder, _, name = member.name.removeprefix('./').partition('/')
        if (
          folder == dataset.BATCHES_DIR
          and name in wanted
          and member.isfile()
          and member.size == dataset.FILE_BYTES
          and (content := tar.extractfile(member))
        ):
          data_files.write(batches_dir, name, content)
  except (tarfile.TarError, EOFError) as error:
    raise DownloadError(f'{archive}: {error}') from error
  states = data_files.inspect(batches_dir)
  left = [name for name in wanted if states[name] is not State.RIGHT]
  if left:
    raise DownloadError(f'{archive}: has no valid {", ".join(left)}')


def _download(archive: str) -> None:
  """Download the archive, or resume an earlier download.

  The data stay in `<archive>.part` until they are complete and verified. Until
  then, an existing file under the final name is left alone. It is then kept
  under a `.bak` name, unless it is a truncated copy of the archive.
  """
  part = f'{archive}.part'
  if not os.path.lexists(part):
    _copy_cut_archive(archive, part)
  resumed = os.path.exists(part) and os.path.getsize(part) > 0
  _append_rest(part)
  if resumed and data_files.sha256(part) != SHA256:
    os.remove(part)  # the resumed data were wrong: download everything
    _append_rest(part)
  digest = data_files.sha256(part)
  if digest != SHA256:
    os.remove(part)
    raise DownloadError(f'{URL}: its sha256 is {digest}, not {SHA256}')
  size = os.path.getsize(part)
  if _begins_with(part, archive):
    os.replace(part, archive)
  else:
    data_files.put_in_place(part, archive)
  print(f'Successfully downloaded {os.path.basename(archive)} {size} bytes.')


def _copy_cut_archive(archive: str, part: str) -> None:
  """Copy an archive that may be truncated to `part`, to resume it."""
  if os.path.isfile(archive) and os.path.getsize(archive) < BYTES:
    with open(archive, 'rb') as file:
      is_gzip = file.read(2) == b'\x1f\x8b'
    if is_gzip:
      shutil.copyfile(archive, part)


def _begins_with(path: str, beginning: str) -> bool:
  """Return whether the file `path` starts with the contents of `beginning`."""
  if not os.path.isfile(beginning):
    return False
  with open(path, 'rb') as whole, open(beginning, 'rb') as start:
    while chunk := start.read(data_files.CHUNK_BYTES):
      if whole.read(len(chunk)) != chunk:
        return False
  return True


def _append_rest(part: str) -> None:
  """Download what is missing at the end of `part`."""
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
      _progress(os.path.basename(URL), start, start + left) as advance,
    ):
      file.seek(start)
      for chunk in _chunks(response):
        file.write(chunk)
        advance(len(chunk))
        if file.tell() > BYTES:  # wrong, and possibly endless
          break
  if os.path.getsize(part) < start + left:
    raise DownloadError(
      f'{URL}: cut off after {os.path.getsize(part)} of {start + left} '
      'bytes; the next run resumes from there'
    )


def _open_url(start: int) -> http_client.HTTPResponse | None:
  """Request URL from byte `start`; return None if there is none."""
  request = urllib.request.Request(URL)
  if start:
    request.add_header('Range', f'bytes={start}-')
  try:
    return urllib.request.urlopen(request, timeout=TIMEOUT_SECS)
  except urllib.error.HTTPError as error:
    if error.code == http_client.REQUESTED_RANGE_NOT_SATISFIABLE:
      return None
    raise DownloadError(f'{URL}: {error}') from error
  except (OSError, ValueError, http_client.HTTPException) as error:
    # A ValueError comes from the address of a proxy.
    reason = getattr(error, 'reason', error)
    raise DownloadError(f'{URL}: {reason}') from error


def _chunks(response: IO[bytes]) -> Iterator[bytes]:
  """Yield the body in chunks; convert network errors to DownloadError."""
  try:
    while chunk := response.read(data_files.CHUNK_BYTES):
      yield chunk
  except (OSError, http_client.HTTPException) as error:
    raise DownloadError(f'{URL}: {error}') from error


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
