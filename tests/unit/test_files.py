"""Tests atomic writes and locks."""

import errno
import fcntl
import os

import pytest

from cifar10_suite import files, ownership
from cifar10_suite.errors import UserError


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'page.html'
  path.write_text('old')
  with pytest.raises(TypeError):
    files.write_whole(str(path), 'no bytes')
  assert path.read_text() == 'old'
  files.write_whole(str(path), b'new')
  assert path.read_text() == 'new'
  assert os.listdir(tmp_path) == ['page.html']


def test_a_file_of_somebody_else_is_not_written_over(tmp_path):
  path = tmp_path / 'picture.png'
  files.write_unless_taken(str(path), b'one')
  files.write_unless_taken(str(path), b'one')  # the same again
  with pytest.raises(UserError, match='picture.png already exists'):
    files.write_unless_taken(str(path), b'two')
  path.write_bytes(b'marked as ours')
  files.write_unless_taken(str(path), b'two', lambda old: b'ours' in old)
  assert path.read_bytes() == b'two'


def test_an_error_of_writing_names_the_file(tmp_path, monkeypatch):
  def refuse(_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', refuse)
  path = str(tmp_path / 'page.html')
  with pytest.raises(OSError, match='No space left') as caught:
    files.write_whole(path, b'new')
  assert caught.value.filename == path
  assert os.listdir(tmp_path) == []


def test_a_directory_has_one_owner(tmp_path):
  with (
    files.locked_dir('--train_dir', str(tmp_path)),
    pytest.raises(UserError, match=rf'in use by process {os.getpid()} on '),
    files.locked_dir('--train_dir', str(tmp_path)),
  ):
    pass
  with files.locked_dir('--train_dir', str(tmp_path)):  # free again
    pass


@pytest.mark.parametrize('name', ['.lock', 'graph.pbtxt', 'picture.png'])
def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, name):
  def refuse(path, *_, **__):
    raise PermissionError(errno.EACCES, 'Permission denied', path)

  (tmp_path / name).write_text('process 1 on another host')
  monkeypatch.setattr(files, 'open', refuse, raising=False)
  message = f'Cannot read {tmp_path}/{name}: Permission denied'
  with pytest.raises(UserError, match=message):
    if name == '.lock':
      with files.locked_dir('--train_dir', str(tmp_path)):
        pass
    elif name == 'picture.png':
      files.write_unless_taken(str(tmp_path / name), b'new')
    else:
      ownership.refuse_to_overwrite(str(tmp_path))


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(errno.ENOSYS, 'Function not implemented')

  monkeypatch.setattr(fcntl, 'flock', refuse)
  with (
    pytest.raises(UserError, match='Cannot lock .* supports locks'),
    files.locked_dir('--train_dir', str(tmp_path)),
  ):
    pass
