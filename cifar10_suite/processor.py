"""The processor: its description, and the cores that a program may use."""

import math
import os
import platform

# Vector and matrix instructions of x86, then of ARM.
_SHOWN_FLAGS = (
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

  It is for readers, and the key of an entry in results/bench.json. No code may
  choose a path by it: a flag shows what the processor supports, not whether
  TensorFlow uses it or is faster with it.

  Args:
    cpuinfo: path of the file in which Linux describes the processor. If it does
      not exist (macOS, Windows) or has no 'model name' (ARM), Python's
      `platform` names the processor.

  Returns:
    The name, the numbers of family and model on x86, since the names in virtual
    machines may be the same for all generations, the number of cores and
    selected flags, for example
    'AMD EPYC, family 25, model 17, 2 cores (avx2, avx512f, avx512_bf16)'.
  """
  fields = _read_fields(cpuinfo)
  name = (
    fields.get('model name')
    or platform.processor()
    or platform.machine()
    or 'unknown processor'
  )
  if 'cpu family' in fields and 'model' in fields:
    name += f', family {fields["cpu family"]}, model {fields["model"]}'
  count = os.cpu_count() or 1
  cores = '1 core' if count == 1 else f'{count} cores'
  flags = fields.get('flags', fields.get('Features', '')).split()
  shown = ', '.join(flag for flag in _SHOWN_FLAGS if flag in flags)
  return f'{name}, {cores}' + (f' ({shown})' if shown else '')


def usable_cores(
  cgroups: str = '/sys/fs/cgroup', membership: str = '/proc/self/cgroup'
) -> int:
  """Return the number of cores that this process may use, at least 1.

  This may be less than the machine has: a container or a batch system can bind
  the process to some cores, or limit its share of processor time.

  Args:
    cgroups: directory of Linux's control groups; elsewhere, it does not exist.
    membership: file that lists the groups of this process.
  """
  if hasattr(os, 'sched_getaffinity'):
    cores = float(len(os.sched_getaffinity(0)))
  else:
    cores = float(os.cpu_count() or 1)
  groups = {line.split(':', 2)[-1] for line in _lines(membership)}
  for group in groups | {'/'}:  # a container may not see its group's name
    while True:
      cores = min(cores, _share_of_time(cgroups, group))
      if group in ('', '/'):
        break
      group = os.path.dirname(group)  # its limit applies, too
  return max(1, math.ceil(cores))


def use_threads(count: int) -> None:
  """Set how many threads TensorFlow's operations use; call it before the first.

  By default, TensorFlow uses one per available core, and ignores limits on its
  share of processor time.
  """
  os.environ['TF_NUM_INTRAOP_THREADS'] = str(count)


def _share_of_time(cgroups: str, group: str) -> float:
  """Return the limit of a control group, in cores; infinity without one.

  Version 2 has one file with the quota and the period in microseconds, version
  1 two files. Without a limit, the quota is 'max' or -1.
  """
  group = group.strip('/')
  quota = ' '.join(_lines(os.path.join(cgroups, group, 'cpu.max'))).split()
  if not quota:
    quota = [
      *_lines(os.path.join(cgroups, 'cpu', group, 'cpu.cfs_quota_us')),
      *_lines(os.path.join(cgroups, 'cpu', group, 'cpu.cfs_period_us')),
    ]
  if len(quota) != 2 or not all(number.isdigit() for number in quota):
    return math.inf
  return int(quota[0]) / int(quota[1])


def _lines(path: str) -> list[str]:
  """Return the lines of a file; none if it cannot be read."""
  try:
    with open(path, encoding='utf-8', errors='replace') as file:
      return file.read().splitlines()
  except OSError:
    return []


def _read_fields(cpuinfo: str) -> dict[str, str]:
  """Return the first value of each field; none if the file is missing."""
  fields: dict[str, str] = {}
  for line in _lines(cpuinfo):
    key, _, value = line.partition(':')
    fields.setdefault(key.strip(), value.strip())
  return fields
