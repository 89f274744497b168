"""Test commands and paths in messages."""

import os
import sys

import pytest
from support.programs import ROOT

from cifar10_suite import commands


@pytest.fixture
def path_with_python(tmp_path, monkeypatch):
  (tmp_path / 'python').symlink_to(sys.executable)
  monkeypatch.setattr(sys, 'executable', str(tmp_path / 'python'))
  monkeypatch.setenv('PATH', str(tmp_path))


def test_a_command_is_short_beside_the_program(path_with_python, monkeypatch):
  monkeypatch.chdir(ROOT)
  command = commands.of('download.py', '--data_dir', 'my data')
  assert command == "python download.py --data_dir 'my data'"


def test_a_command_works_from_elsewhere(path_with_python, monkeypatch):
  monkeypatch.chdir('/')
  # Relative to /, which all paths are in.
  assert commands.of('download.py') == f'python {ROOT[1:]}/download.py'
  monkeypatch.chdir(os.path.dirname(sys.executable))
  assert commands.of('download.py') == f'python {ROOT}/download.py'


def test_a_python_in_the_working_directory_is_not_searched_for(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(sys, 'executable', str(tmp_path / 'python3'))
  monkeypatch.chdir(tmp_path)
  assert commands.of('download.py').startswith('./python3 ')


def test_a_command_names_the_running_python(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  assert commands.of('download.py').startswith(f'{sys.executable} ')


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (['--max_steps=5'], 'the same command'),
    (['--restart'], 'the same command without --restart'),
    (['--restart=true'], 'the same command without --restart'),
    (['--norestart'], 'the same command'),
  ],
)
def test_the_command_that_resumes_does_not_delete(
  monkeypatch, arguments, expected
):
  monkeypatch.setattr('sys.argv', ['cifar10_train.py', *arguments])
  assert commands.same_command() == expected
