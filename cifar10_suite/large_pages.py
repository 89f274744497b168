"""Training in large pages of memory, on Linux."""

import ctypes
import os
from collections.abc import Iterator

import tensorflow.compat.v1 as tf

_STEPS = 10  # by then, a session has allocated what its steps need
_MIN_BYTES = 9 << 20  # of a block of memory; the stack of a thread has 8 MiB
_MAPS = '/proc/self/maps'
_MADV_COLLAPSE = 25  # from <linux/mman.h>, which Python's mmap does not cover


class UseLargePages(tf.train.SessionRunHook):
  """Hook that moves large blocks of memory into large pages, once.

  Training uses some 200 MiB in such blocks: 50,000 pages of 4 KiB, many more
  than a processor's TLB has entries for. With pages of 2 MiB, the processor
  spends less time on address translation. On many Linux systems, programs have
  to ask for these.
  """

  def __init__(self) -> None:
    self._steps = 0

  def after_run(
    self,
    run_context: tf.train.SessionRunContext,
    run_values: tf.train.SessionRunValues,
  ) -> None:
    self._steps += 1
    if self._steps == _STEPS:
      use_large_pages()


def use_large_pages() -> None:
  """Move the process's blocks of at least 9 MiB into large pages.

  What they contain and their addresses stay the same. Memory stays in small
  pages where Linux is older than 6.1 or has no large pages left, and on other
  systems.
  """
  if not os.path.exists(_MAPS):
    return
  libc = ctypes.CDLL(None)
  for start, end in _anonymous_blocks():
    if end - start >= _MIN_BYTES:
      libc.madvise(
        ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_COLLAPSE
      )


def _anonymous_blocks() -> Iterator[tuple[int, int]]:
  """Yield start and end addresses of writable memory without file or name."""
  with open(_MAPS) as maps:
    areas = [line.split() for line in maps]
  for addresses, mode, _offset, _device, _inode, *name in areas:
    if mode.startswith('rw') and not name:
      start, end = addresses.split('-')
      yield int(start, 16), int(end, 16)
