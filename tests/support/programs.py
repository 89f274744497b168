"""Run the programs as processes, and read and write their files."""

import contextlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import queue
import runpy
import sys
import tempfile
import threading
import time

import numpy as np
import tensorflow.compat.v1 as tf

import download

ROOT = os.path.dirname(os.path.abspath(download.__file__))
TIMEOUT = 120  # seconds after which a process counts as hung

# Programs take most of their startup time to import these modules. The tests
# therefore fork them from a process that has already imported them.
_processes = multiprocessing.get_context('forkserver')
_processes.set_forkserver_preload(
  [
    'tensorflow.compat.v1',
    'tqdm',
    'scipy.stats',
    'matplotlib.backends.backend_agg',
    'tensorboard.plugins.hparams.summary',
    # These import most other modules of the suite, and define no flags.
    'cifar10_suite.training',
    'cifar10_suite.evaluation',
    'cifar10_suite.exports',
  ]
)


def _run_as_main(
  path, arguments, cwd, environment, constants, stdout, stderr_name
):
  """Run a program in this process, like `python path argument ...` in `cwd`."""
  os.dup2(stdout.fileno(), 1)
  stdout.close()
  # The stream of the process from which this one was forked may be seekable.
  sys.stdout = open(1, 'w', closefd=False)  # noqa: SIM115
  with open(stderr_name, 'w') as stderr:
    os.dup2(stderr.fileno(), 2)
  os.chdir(cwd)
  os.environ.clear()
  os.environ.update(environment)
  tempfile.tempdir = None  # is found again, from TMPDIR
  sys.argv = [path, *arguments]
  sys.path[0] = os.path.dirname(path)
  if sys.path[0] != ROOT:  # perhaps a copy, which has modules of its own
    for name in list(sys.modules):
      if name.startswith(('cifar10', 'download')):
        del sys.modules[name]
  for name, value in constants.items():
    module, _, constant = name.rpartition('.')
    module = importlib.import_module(module)
    assert hasattr(module, constant), name
    setattr(module, constant, value)
  runpy.run_path(path, run_name='__main__')


class Program:
  """A program that runs in parallel to the test, which reads its output."""

  def __init__(
    self, program, *arguments, environment=None, cwd='.', constants=None
  ):
    """Start a program.

    Args:
      program: its path, relative to ROOT or absolute.
      arguments: its arguments.
      environment: changes of the environment.
      cwd: its working directory.
      constants: other values for constants, such as 'cifar10_suite.x.Y'.
    """
    self._errors = tempfile.NamedTemporaryFile('r')  # noqa: SIM115
    self._stdout, stdout = _processes.Pipe(duplex=False)
    self._process = _processes.Process(
      target=_run_as_main,
      args=(
        os.path.join(ROOT, program),
        arguments,
        os.path.abspath(cwd),
        {**os.environ, **(environment or {})},
        constants or {},
        stdout,
        self._errors.name,
      ),
      daemon=True,
    )
    self._process.start()
    self.pid = self._process.pid
    stdout.close()
    self._lines = queue.SimpleQueue()
    threading.Thread(target=self._read, daemon=True).start()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._process.kill()
    self._process.join()
    self._errors.close()

  def _read(self):
    with open(self._stdout.fileno(), closefd=False) as stdout:
      for line in stdout:
        self._lines.put(line.rstrip('\n'))
    self._lines.put(None)

  def _next_line(self, deadline):
    return self._lines.get(timeout=max(deadline - time.monotonic(), 0))

  def wait_for(self, part, timeout=TIMEOUT):
    """Wait for the next line that contains `part`, and return it."""
    deadline = time.monotonic() + timeout
    while True:
      line = self._next_line(deadline)
      assert line is not None, f'ended without {part!r}: {self.errors()}'
      if part in line:
        return line

  def errors(self):
    self._errors.seek(0)
    return self._errors.read()

  def send_signal(self, number):
    os.kill(self.pid, number)

  def finish(self, timeout=TIMEOUT):
    """Wait until the program exits; return its status and remaining lines."""
    deadline = time.monotonic() + timeout
    lines = []
    while (line := self._next_line(deadline)) is not None:
      lines.append(line)
    self._process.join(TIMEOUT)
    return self._process.exitcode, lines


def run(program, *arguments, status=0, timeout=TIMEOUT, **kwargs):
  """Run a program until it exits; return its lines and its error output."""
  with Program(program, *arguments, **kwargs) as process:
    got, lines = process.finish(timeout)
    errors = process.errors()
  assert got == status, '\n'.join([*lines, errors])
  return lines, errors


def wait_until(find, pause=0.01):
  """Call a function until its result is true, and return that."""
  deadline = time.monotonic() + TIMEOUT
  while not (found := find()):
    assert time.monotonic() < deadline
    time.sleep(pause)
  return found


def load(path):
  """Return a program as a module; a relative `path` is from ROOT."""
  name = os.path.splitext(os.path.basename(path))[0]
  spec = importlib.util.spec_from_file_location(name, os.path.join(ROOT, path))
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def probabilities(lines):
  """Return the probabilities in JSON lines with all ten classes, [n, 10]."""
  rows = np.zeros([len(lines), 10])
  for row, line in zip(rows, lines, strict=True):
    for entry in json.loads(line)['classes']:
      row[entry['id']] = entry['probability']
  return rows


def summaries(directory):
  """Return (step, tag, value) of all events in a directory, in order."""
  found = []
  for name in sorted(os.listdir(directory)):
    if 'tfevents' in name:
      # The last event of a file may be incomplete.
      with contextlib.suppress(tf.errors.DataLossError):
        for event in tf.train.summary_iterator(os.path.join(directory, name)):
          for value in event.summary.value:
            found.append((event.step, value.tag, value))
  return found


def rewrite_checkpoint(path, new_path, change):
  """Write a copy of a checkpoint with values `change(name, value)`."""
  reader = tf.train.load_checkpoint(path)
  with tf.Graph().as_default(), tf.Session() as session:
    for name in reader.get_variable_to_shape_map():
      tf.Variable(change(name, reader.get_tensor(name)), name=name)
    session.run(tf.global_variables_initializer())
    tf.train.Saver().save(session, new_path)
