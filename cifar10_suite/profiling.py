"""Profiles of training steps, for TensorBoard's profiler and for Perfetto.

  plugins/profile/<time>/<host>.xplane.pb   for TensorBoard
  plugins/profile/<time>/trace.json         the same in Chrome's trace format

A profile shows the operations of all threads: those of the steps, of the
kernels that XLA compiles, and of the input pipeline.
"""

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator

import tensorflow.compat.v2 as tf2

from cifar10_suite import commands, files

TRACE = 'trace.json'
_DIRECTORY = os.path.join('plugins', 'profile')  # where TensorBoard looks


class StepProfiler:
  """Profiler for a range of steps."""

  def __init__(self, train_dir: str, first: int, last: int):
    """Initialize the profiler.

    Args:
      train_dir: directory to write to.
      first: number of the first step to profile.
      last: number of the last step to profile.
    """
    self._train_dir = train_dir
    self._first = first
    self._last = last
    self._is_running = False
    self._is_finished = False

  @contextlib.contextmanager
  def step(self, number: int) -> Iterator[None]:
    """Profile what runs in this context if the step is in the range.

    Args:
      number: number of the step, from 0.
    """
    if self._is_running and number > self._last:  # steps of other workers
      self.stop()
    is_wanted = self._first <= number <= self._last and not self._is_finished
    if not is_wanted:
      yield
      return
    if not self._is_running:
      tf2.profiler.experimental.start(self._train_dir)
      self._is_running = True
    with tf2.profiler.experimental.Trace('step', step_num=number, _r=1):
      yield
    if number >= self._last:
      self.stop()

  def stop(self) -> None:
    """Write the profile unless that is done, and print where it is."""
    if self._is_running:
      try:
        tf2.profiler.experimental.stop()
        path = _write_trace(self._train_dir)
        print(f'Wrote a profile: {commands.short_path(path)}')
      except (OSError, tf2.errors.OpError) as error:  # training continues
        print(f'Cannot write a profile: {error}')
    elif not self._is_finished:
      print(
        f'--profile_steps {self._first},{self._last}: no profile, as training '
        'did not run these steps.'
      )
    self._is_running, self._is_finished = False, True


def _write_trace(train_dir: str) -> str:
  """Convert the latest profile to Chrome's trace format; return the path."""
  # TensorFlow offers the conversion only here.
  from tensorflow.python.profiler.internal import _pywrap_profiler_plugin

  pattern = os.path.join(glob.escape(train_dir), _DIRECTORY, '*', '*.xplane.pb')
  profile = max(glob.glob(pattern))  # directories are named by the time
  with tempfile.TemporaryDirectory() as folder:  # for files of the conversion
    copy = shutil.copy(profile, folder)
    trace, _ = _pywrap_profiler_plugin.xspace_to_tools_data(
      [copy], 'trace_viewer@', {}
    )
  path = os.path.join(os.path.dirname(profile), TRACE)
  files.write_whole(path, trace)
  return path
