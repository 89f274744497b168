"""Test that memory moves into large pages, where Linux can do that."""

import ctypes
import mmap
import re
import sys

import pytest

from cifar10_suite import large_pages

NUM_BYTES = 64 << 20
MADV_COLLAPSE = 25


def new_block(text):
  """Return 64 MiB of memory in small pages, filled with a text."""
  flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
  block = mmap.mmap(-1, NUM_BYTES, flags=flags)
  block.madvise(mmap.MADV_NOHUGEPAGE)
  block.write(text * (NUM_BYTES // len(text)))
  block.madvise(mmap.MADV_HUGEPAGE)  # allowed from now on
  return block


def size_in_large_pages(block):
  """Return how many bytes of a block are in large pages."""
  address = ctypes.addressof(ctypes.c_char.from_buffer(block))
  with open('/proc/self/smaps') as smaps:
    areas = re.split(r'\n(?=[0-9a-f]+-)', smaps.read())
  size = 0
  for area in areas:
    start, end = (int(it, 16) for it in area.split()[0].split('-'))
    if start < address + NUM_BYTES and end > address:
      size += int(re.search(r'AnonHugePages: +(\d+)', area)[1]) * 1024
  return size


@pytest.mark.skipif(sys.platform != 'linux', reason='needs Linux')
def test_memory_moves_and_keeps_its_contents():
  try:
    new_block(b'another one!').madvise(MADV_COLLAPSE)
  except OSError as error:
    pytest.skip(f'this Linux cannot: {error}')
  block = new_block(b'abcdefgh')
  assert size_in_large_pages(block) == 0
  large_pages.use_large_pages()
  assert size_in_large_pages(block) > NUM_BYTES // 2
  assert block[:] == b'abcdefgh' * (NUM_BYTES // 8)
