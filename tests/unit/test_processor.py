"""Test the number of cores and the descriptions of devices."""

import os

import pytest

from cifar10_suite import devices, processor


@pytest.fixture
def cores_with(tmp_path, monkeypatch):
  """A function that counts usable cores of 64, given files of Linux."""
  monkeypatch.setattr(
    os, 'sched_getaffinity', lambda _: set(range(64)), raising=False
  )

  def cores(files, membership):
    for name, content in files.items():
      path = tmp_path / 'cgroup' / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(content)
    (tmp_path / 'membership').write_text(membership)
    return processor.usable_cores(
      str(tmp_path / 'cgroup'), str(tmp_path / 'membership')
    )

  return cores


@pytest.mark.parametrize(
  ('files', 'membership', 'expected'),
  [
    ({}, '', 64),
    ({'cpu.max': 'max 100000\n'}, '0::/\n', 64),
    ({'cpu.max': '200000 100000\n'}, '0::/\n', 2),
    ({'cpu.max': '150000 100000\n'}, '0::/\n', 2),
    ({'cpu.max': '5000 100000\n'}, '0::/\n', 1),
    # The container's own group is mounted as the root.
    ({'cpu.max': '300000 100000\n'}, '0::/docker/1:2\n', 3),
    # The limit of a parent applies, too.
    (
      {'a/cpu.max': '400000 100000', 'a/b/cpu.max': '800000 100000'},
      '0::/a/b\n',
      4,
    ),
    (
      {'cpu/cpu.cfs_quota_us': '250000', 'cpu/cpu.cfs_period_us': '50000'},
      '4:cpu,cpuacct:/\n3:memory:/x\n',
      5,
    ),
    (
      {'cpu/cpu.cfs_quota_us': '-1', 'cpu/cpu.cfs_period_us': '100000'},
      '4:cpu,cpuacct:/\n',
      64,
    ),
    ({'cpu.max': 'nonsense\n'}, 'nonsense\n', 64),
  ],
)
def test_limits_of_containers_count(cores_with, files, membership, expected):
  assert cores_with(files, membership) == expected


def test_cores_that_the_process_is_bound_to_count(cores_with, monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {5, 7, 9})
  assert cores_with({'cpu.max': '1600000 100000'}, '0::/') == 3


def test_devices_are_described():
  assert devices.describe(0, 1) == '1 thread on the CPU'
  assert devices.describe(0, 8) == '8 threads on the CPU'


@pytest.mark.parametrize(
  ('num_gpus', 'num_there', 'has_driver', 'says'),
  [
    (0, 0, False, None),
    (0, 0, True, 'requirements-gpu.txt'),
    (1, 1, True, None),
    (
      1,
      4,
      True,
      'Using 1 of 4 GPUs. To use all, run cifar10_multi_gpu_train.py '
      '--num_gpus 4',
    ),
  ],
)
def test_unused_gpus_are_mentioned(num_gpus, num_there, has_driver, says):
  hint = devices.hint(num_gpus, num_there, has_driver)
  assert says in hint if says else hint is None
