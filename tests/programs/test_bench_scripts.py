"""Run benchmark scripts of the suite itself, for a moment each."""

import json
import os
import subprocess
import sys

import pytest
from support.programs import ROOT, TIMEOUT

RUN = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
import timing
timing.WARM_UP_STEPS, timing.SECONDS = 1, 0.1
sys.argv[:] = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.parametrize(
  'arguments',
  [
    ['step_alone.py', 'float32', 'fast'],
    ['step_alone.py', 'bfloat16', 'fast'],
    ['inputs.py', 'DATA'],
  ],
  ids=lambda arguments: ' '.join(arguments),
)
@pytest.mark.slow
def test_a_script_reports_its_speed(batches_dir, arguments):
  folder = os.path.join(ROOT, 'benchmarks')
  script, *others = arguments
  others = [batches_dir if it == 'DATA' else it for it in others]
  command = [sys.executable, '-c', RUN, folder, f'{folder}/{script}', *others]
  done = subprocess.run(
    command, capture_output=True, text=True, timeout=TIMEOUT, check=True
  )
  figures = json.loads(done.stdout.splitlines()[-1])
  assert figures['examples_per_sec'] > 0
  assert figures['cpu_us_per_example'] > 0
