"""Describe the processor, for readers of figures and test results."""

import os
import platform

# Vector and matrix instructions of x86, then of ARM.
_TELLING_FLAGS = (
  'avx2',
  'avx512f',
  'avx512_bf16',
  'avx512_fp16',
  'amx_bf16',
  'amx_fp16',
  'asimd',
  'asimdhp',
  'bf16',
  'sve',
)


def describe(cpuinfo: str = '/proc/cpuinfo') -> str:
  """Describe the processor in one line.

  The description is for readers only; no code may depend on it. A flag shows
  what the processor supports, not whether TensorFlow uses it or is faster with
  it.

  Args:
    cpuinfo: path of the file in which Linux describes the processor. If it does
      not exist (macOS, Windows) or has no 'model name' (ARM), Python's
      `platform` names the processor.

  Returns:
    The model name, the number of cores and selected flags, for example
    'AMD EPYC 9004, 2 cores (avx2, avx512f, avx512_bf16)'.
  """
  fields = _read_fields(cpuinfo)
  model = (
    fields.get('model name')
    or platform.processor()
    or platform.machine()
    or 'unknown processor'
  )
  count = os.cpu_count() or 1
  cores = '1 core' if count == 1 else f'{count} cores'
  flags = fields.get('flags', fields.get('Features', '')).split()
  telling = ', '.join(flag for flag in _TELLING_FLAGS if flag in flags)
  return f'{model}, {cores}' + (f' ({telling})' if telling else '')


def _read_fields(cpuinfo: str) -> dict[str, str]:
  """Return the first value of each field; none if the file is missing."""
  fields: dict[str, str] = {}
  try:
    with open(cpuinfo, encoding='utf-8', errors='replace') as file:
      for line in file:
        key, _, value = line.partition(':')
        fields.setdefault(key.strip(), value.strip())
  except OSError:
    pass  # not Linux
  return fields
