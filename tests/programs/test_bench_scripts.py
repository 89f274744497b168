"""Run benchmark scripts of the suite itself, for a moment each."""

import os
import sys

import pytest
from support.programs import ROOT


@pytest.mark.parametrize(
  ('arguments', 'batch_size'),
  [
    (['step_alone.py', 'float32', 'fast'], 256),
    (['step_alone.py', 'bfloat16', 'fast'], 256),
    (['inputs.py', 'DATA'], 128),
  ],
  ids=lambda value: ' '.join(value) if isinstance(value, list) else None,
)
@pytest.mark.slow
def test_a_script_reports_its_speed(
  batches_dir, arguments, batch_size, turns, monkeypatch
):
  folder = os.path.join(ROOT, 'benchmarks')
  monkeypatch.setattr(turns, '_WARM_UP_STEPS', 2)
  script, *others = arguments
  others = [batches_dir if it == 'DATA' else it for it in others]
  command = [sys.executable, os.path.join(folder, script), *others]
  failures = {}
  figures = turns.alternate(
    {script: turns.Steps(command, batch_size)}, failures
  )
  assert failures == {}
  assert figures[script]['examples_per_sec'] > 0
  assert figures[script]['cpu_us_per_example'] > 0
  assert figures[script]['startup_secs'] > 0
