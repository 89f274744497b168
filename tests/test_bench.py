"""Tests the benchmark's runner with made-up contestants."""

import os
import platform
import subprocess
import sys

import pytest
from programs import ROOT, TIMEOUT

import cifar10_processor


def test_keras_normalizes_in_bfloat16():
  """On processors, TensorFlow's own normalization has no such kernel."""
  code = """
import numpy as np, keras, keras_peer
x = np.random.RandomState(1).normal(0, 50, [2, 3, 3, 12]).astype('float32')
wanted = keras_peer.norm()(x).numpy()
keras.mixed_precision.set_global_policy('mixed_bfloat16')
y = keras_peer.norm()(x)
assert y.dtype == 'bfloat16', y.dtype
np.testing.assert_allclose(y.numpy().astype('float32'), wanted, rtol=0.02)
assert np.abs(wanted / x).min() < 0.9  # it does normalize
"""
  subprocess.run(
    [sys.executable, '-c', code],
    cwd=os.path.join(ROOT, 'benchmarks'),
    check=True,
    timeout=TIMEOUT,
  )


X86 = """\
processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 9004
flags\t\t: fpu sse2 avx avx512f avx2 avx512_bf16 avx512_vnni
bugs\t\t: spectre_v1

processor\t: 1
model name\t: another
flags\t\t: amx_bf16
"""
ARM = """\
processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd aes asimdhp sve i8mm bf16
CPU implementer\t: 0x41
"""


@pytest.mark.parametrize(
  ('cpuinfo', 'cores', 'wanted'),
  [
    (X86, 2, 'AMD EPYC 9004, 2 cores (avx2, avx512f, avx512_bf16)'),
    (ARM, 64, 'aarch64, 64 cores (asimd, asimdhp, bf16, sve)'),
    ('model name : Atom\nflags : sse2 bf', 1, 'Atom, 1 core'),
    (None, 8, 'aarch64, 8 cores'),
  ],
  ids=['x86', 'ARM', 'no flags', 'no file'],
)
def test_describes_the_processor(tmp_path, monkeypatch, cpuinfo, cores, wanted):
  monkeypatch.setattr(platform, 'processor', lambda: '')
  monkeypatch.setattr(platform, 'machine', lambda: 'aarch64')
  monkeypatch.setattr(os, 'cpu_count', lambda: cores)
  path = tmp_path / 'cpuinfo'
  if cpuinfo:
    path.write_text(cpuinfo)
  assert cifar10_processor.describe(str(path)) == wanted


def test_describes_the_processor_as_the_platform_does(tmp_path, monkeypatch):
  monkeypatch.setattr(platform, 'processor', lambda: 'Apple M2')
  description = cifar10_processor.describe(str(tmp_path / 'cpuinfo'))
  assert description.startswith('Apple M2, ')
