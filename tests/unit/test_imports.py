"""Test the direction of imports, and that programs can be combined."""

import ast
import glob
import os
import re
import subprocess
import sys

import pytest
from support.programs import ROOT, TIMEOUT

PROGRAMS = {
  'cifar10_convert',
  'cifar10_eval',
  'cifar10_multi_gpu_train',
  'cifar10_predict',
  'cifar10_train',
  'download',
}


def imports_of(path):
  """Return the modules that a file imports at the top, and anywhere."""
  with open(path) as file:
    tree = ast.parse(file.read())

  def names(nodes):
    found = set()
    for node in nodes:
      if isinstance(node, ast.Import):
        found |= {alias.name for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        found |= {f'{node.module}.{alias.name}' for alias in node.names}
    return found

  return names(tree.body), names(ast.walk(tree))


def is_in(module, names):
  return any(module == name or module.startswith(f'{name}.') for name in names)


MODULES = {
  os.path.relpath(path, ROOT).removesuffix('.py'): imports_of(path)
  for path in glob.glob(f'{ROOT}/*.py')
  + glob.glob(f'{ROOT}/cifar10_suite/*.py')
}
PACKAGE = {name for name in MODULES if name.startswith('cifar10_suite')}


def test_the_package_imports_no_top_level_module():
  top_level = set(MODULES) - PACKAGE
  assert len(PACKAGE) > 15 and len(top_level) == 8
  for name in PACKAGE:
    _, anywhere = MODULES[name]
    assert not [module for module in anywhere if is_in(module, top_level)], name


def test_only_programs_import_programs():
  for name in set(MODULES) - PROGRAMS:
    at_top, _ = MODULES[name]
    assert not [module for module in at_top if is_in(module, PROGRAMS)], name


@pytest.mark.parametrize('name', ['cifar10', 'cifar10_input'])
def test_the_model_knows_no_cluster_no_checkpoint_and_no_program(name):
  at_top, _ = MODULES[name]
  machinery = {
    f'cifar10_suite.{room}'
    for room in ('checkpoints', 'cli', 'cluster', 'files', 'hooks', 'ownership')
    + ('loading', 'profiling', 'report', 'scores', 'stopping', 'training')
  }
  assert not [module for module in at_top if is_in(module, machinery)]
  with open(f'{ROOT}/{name}.py') as file:
    assert 'open(' not in file.read()


def test_the_package_reads_no_flags_of_programs():
  command_line = {
    f'cifar10_suite/{room}' for room in ('cli', 'compatibility', 'usage')
  }
  for name in PACKAGE - command_line:
    _, anywhere = MODULES[name]
    assert not is_in('absl.flags', anywhere), name
    with open(f'{ROOT}/{name}.py') as file:
      assert not re.search(r'\bFLAGS\b', file.read()), name


@pytest.mark.parametrize('name', ['download', 'cifar10_convert'])
def test_needs_no_tensorflow(name):
  code = f'import {name}, sys; sys.exit("tensorflow" in sys.modules)'
  subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, check=True, timeout=TIMEOUT
  )


@pytest.mark.slow
def test_all_programs_can_be_imported_together():
  code = f'import {", ".join(sorted(PROGRAMS))}'
  result = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=TIMEOUT,
  )
  assert (result.returncode, result.stderr) == (0, '')
