"""Test benchmarks/reproduce.py with stand-ins for the programs."""

import importlib
import json
import sys

import pytest
from support.programs import ROOT

from cifar10_suite import __version__

# A trainer ends with status 130 at half of its steps as long as `stop` exists.
TRAINER = """
import json, pathlib, sys
here = pathlib.Path(__file__).parent
recipe, seed = sys.argv[2], int(sys.argv[4])
directory = pathlib.Path(sys.argv[-1].removeprefix('--train_dir='))
if (directory / 'run.json').exists():
  print('Resuming from step 50')
directory.mkdir(exist_ok=True)
versions = {'python': '3', 'tensorflow': '2'}
(directory / 'run.json').write_text(json.dumps({'starts': [{
  'recipe': {'batch_size': 8, 'max_steps': 100}, 'versions': versions,
  'processor': 'a CPU', 'compute_type': 'float32'}]}))
for rate in (1.0, 90.0 + seed, 900.0):
  print(f'step 0, loss = 1.00 ({rate} examples/sec; 0.08 sec/batch)')
if (here / 'stop').exists():
  sys.exit(130)
print(f'It took 1 h {seed} min. To score it: ...' if seed > 1 else
  'It took 1 min 3 s. To score it: ...')
"""
# Precisions by seed: 0.81, 0.82, ...; one point more with ten views.
EVALUATOR = """
import json, pathlib, sys
flags = dict(flag[2:].split('=') for flag in sys.argv[1:] if '=' in flag)
seed = int(flags['checkpoint_dir'].split('-')[-1].split('/')[0])
directory = pathlib.Path(flags['eval_dir'])
directory.mkdir(exist_ok=True)
steps = [100] if '--run_once' in sys.argv else [0, 100]
assert ('--all_checkpoints' in sys.argv) == (len(steps) == 2)
assert len(steps) == 1 or seed == 1
views = 0.01 if flags.get('num_views') == '10' else 0
with open(directory / 'metrics.jsonl', 'w') as file:
  for step in steps:
    precision = 0.8 + 0.01 * seed + views if step else 0.1
    record = {'step': step, 'precision': precision, 'interval': [0.7, 0.9]}
    file.write(json.dumps(record) + '\\n')
"""


@pytest.fixture
def reproduce(tmp_path, monkeypatch, capsys):
  """A function that runs the program; returns its lines and the entries."""
  monkeypatch.syspath_prepend(f'{ROOT}/benchmarks')
  for name in ('curves', 'reproduce'):
    monkeypatch.delitem(sys.modules, name, raising=False)
  module = importlib.import_module('reproduce')
  monkeypatch.setattr(module.subprograms, '_ROOT', str(tmp_path))
  monkeypatch.setattr(module.curves, 'RESULTS', str(tmp_path))
  monkeypatch.setattr(module, 'RUNS', str(tmp_path / 'runs.json'))
  monkeypatch.setattr(module, 'ROOT', str(tmp_path))  # not a Git repository
  (tmp_path / 'cifar10_train.py').write_text(TRAINER)
  (tmp_path / 'cifar10_eval.py').write_text(EVALUATOR)
  (tmp_path / 'runs.json').write_text('[]')

  def reproduce():
    flags = ['--row=fast', f'--dir={tmp_path}/runs']
    monkeypatch.setattr(module.sys, 'argv', ['reproduce.py', *flags])
    try:
      module.main()
    finally:
      lines = capsys.readouterr().out.splitlines()
    return lines, json.loads((tmp_path / 'runs.json').read_text())

  return reproduce


def test_continues_and_makes_the_table(reproduce, tmp_path):
  (tmp_path / 'stop').touch()
  with pytest.raises(SystemExit, match='130'):
    reproduce()
  (tmp_path / 'stop').unlink()
  lines, entries = reproduce()
  again, same = reproduce()  # repeats nothing
  assert same == entries and again[-1] == lines[-1]
  assert again[0] == f'{tmp_path}/runs/fast-1 is finished.'
  assert [entry['seed'] for entry in entries] == [1, 2, 3, 4, 5]
  assert (
    lines[-1]
    == '| `fast` | 5 | 100 | 63.5 min | 83.00% ± 1.58 | 84.00% ± 1.58 |'
  )
  assert (tmp_path / 'precision.png').stat().st_size > 10000
  entry = entries[1]
  assert (
    entry['examples_per_sec'] == 92
    and entry['commit'] == f'version {__version__}'
  )
  assert entry['command'].startswith(
    'python cifar10_train.py --recipe fast --seed 2 '
  )
  for entry, steps in zip(entries, ([0, 100], [100]), strict=False):
    scores = (tmp_path / entry['metrics']).read_text().splitlines()
    assert [json.loads(score)['step'] for score in scores] == steps


def test_gives_the_time_of_uninterrupted_runs(reproduce):
  lines, entries = reproduce()
  seconds = [63, *(3600 + 60 * seed for seed in range(2, 6))]
  assert [entry['seconds'] for entry in entries] == seconds
  assert '| 63.0 min |' in lines[-1]
