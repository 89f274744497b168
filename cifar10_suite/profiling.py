"""Profiles of training steps, for TensorBoard's profiler and for Perfetto.

  plugins/profile/<time>/<host>.xplane.pb   for TensorBoard
  plugins/profile/<time>/trace.json         the same in Chrome's trace format

A profile shows the operations of all threads: those of the steps, of the
kernels that XLA compiles, and of the input pipeline.
"""

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterator

import tensorflow.compat.v2 as tf2

from cifar10_suite import commands, files

TRACE = 'trace.json'
# Where TensorBoard looks, too.
_PROFILES = os.path.join('plugins', 'profile', '*', '*.xplane.pb')


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
    # Where TensorFlow writes while it profiles.
    self._scratch: tempfile.TemporaryDirectory | None = None
    self._is_finished = False

  @contextlib.contextmanager
  def step(self, number: int) -> Iterator[None]:
    """Profile what runs in this context if the step is in the range.

    Args:
      number: number of the step, from 0.
    """
    if self._scratch and number > self._last:  # steps of other workers
      self.stop()
    if self._first <= number <= self._last and not self._is_finished:
      self._start()
    if not self._scratch:
      yield
      return
    with tf2.profiler.experimental.Trace('step', step_num=number, _r=1):
      yield
    if number >= self._last:
      self.stop()

  def _start(self) -> None:
    if not self._scratch:
      with self._reported_errors():
        scratch = tempfile.TemporaryDirectory(prefix='cifar10-profile-')
        tf2.profiler.experimental.start(scratch.name)
        self._scratch = scratch

  def stop(self) -> None:
    """Write the profile unless that is done, and print where it is."""
    if self._scratch:
      with self._reported_errors(), self._scratch as scratch:
        tf2.profiler.experimental.stop()
        path = _write(scratch, self._train_dir)
        print(f'Wrote a profile: {commands.short_path(path)}')
    elif not self._is_finished:
      print(
        f'--profile_steps {self._first},{self._last}: no profile, as training '
        'did not run these steps.'
      )
    self._scratch, self._is_finished = None, True

  @contextlib.contextmanager
  def _reported_errors(self) -> Iterator[None]:
    """Report any error instead of raising it, so that training continues."""
    try:
      yield
    except Exception as error:
      print(f'Cannot write a profile: {error}')
      self._is_finished = True


def _write(scratch: str, train_dir: str) -> str:
  """Write the profile in `scratch`, and its trace; return the trace's path."""
  # TensorFlow offers the conversion only here.
  from tensorflow.python.profiler.internal import _pywrap_profiler_plugin

  (profile,) = glob.glob(os.path.join(glob.escape(scratch), _PROFILES))
  trace, _ = _pywrap_profiler_plugin.xspace_to_tools_data(
    [profile], 'trace_viewer@', {}
  )
  directory = os.path.join(
    train_dir, os.path.relpath(os.path.dirname(profile), scratch)
  )
  os.makedirs(directory, exist_ok=True)
  path = os.path.join(directory, TRACE)
  files.write_whole(path, trace)  # first: it tells that the profile is ours
  with open(profile, 'rb') as file:
    content = file.read()
  files.write_whole(os.path.join(directory, os.path.basename(profile)), content)
  return path
