"""Test examples/seeds.py with stand-ins for the trainer and the evaluator."""

import pytest
from support.programs import load

# A trainer ends with status 130 as long as `stop-SEED` exists.
TRAINER = """
import json, os, pathlib, shlex, sys
flags = dict(flag[2:].split('=') for flag in sys.argv[1:])
here = pathlib.Path(__file__).parent
with open(here / 'log', 'a') as log:
  log.write(f'train {flags["seed"]}\\n')
directory = pathlib.Path(flags['train_dir'])
directory.mkdir(parents=True, exist_ok=True)
steps = int(flags['max_steps'])
start = {'command': shlex.join(['cifar10_train.py', *sys.argv[1:]])}
start['recipe'] = {'name': 'fast', 'max_steps': steps}
start |= {'step': 0, 'time': '2026-11-28T12:00:00', 'versions': {}}
(directory / 'run.json').write_text(json.dumps({
  'program': 'cifar10_suite', 'class_names': ['a', 'b'], 'starts': [start]}))
if (here / f'stop-{flags["seed"]}').exists():
  sys.exit(130)
(directory / 'saved').write_text(str(steps))
"""
# The precision of seed k after n steps is 0.8 + k / 100 + n / 1000.
EVALUATOR = """
import json, pathlib, sys
assert sys.argv[1] == '--run_once' and sys.argv[4] == '--data_dir=data'
flags = dict(flag[2:].split('=') for flag in sys.argv[2:])
directory = pathlib.Path(flags['eval_dir'])
directory.mkdir(exist_ok=True)
seed = int(directory.parent.name.removeprefix('seed-'))
step = int((pathlib.Path(flags['checkpoint_dir']) / 'saved').read_text())
with open(directory / 'metrics.jsonl', 'a') as file:
  precision = 0.8 + seed / 100 + step / 1000
  file.write(json.dumps({'step': step, 'precision': precision}) + '\\n')
"""


@pytest.fixture
def seeds(tmp_path, monkeypatch, capfd):
  """A function that runs the program; returns its lines and who trained."""
  module = load('examples/seeds.py')
  monkeypatch.setattr(module.subprograms, '_ROOT', str(tmp_path))
  (tmp_path / 'cifar10_train.py').write_text(TRAINER)
  (tmp_path / 'cifar10_eval.py').write_text(EVALUATOR)

  def seeds(count, steps, *others):
    flags = [f'--seeds={count}', f'--dir={tmp_path}/runs', '--data_dir=data']
    flags += [f'--max_steps={steps}', *others]
    monkeypatch.setattr(module.sys, 'argv', ['seeds.py', *flags])
    log = tmp_path / 'log'
    log.write_text('')
    try:
      module.main()
    finally:
      output, errors = capfd.readouterr()
      assert errors == '' or others
    return output.splitlines(), log.read_text().splitlines()

  return seeds


def test_skips_finished_seeds_resumes_others_and_summarizes(seeds, tmp_path):
  (tmp_path / 'stop-2').touch()
  with pytest.raises(SystemExit, match='130'):
    seeds(3, 10)
  assert (tmp_path / 'log').read_text() == 'train 1\ntrain 2\n'
  (tmp_path / 'stop-2').unlink()

  lines, trained = seeds(3, 10)
  assert trained == ['train 2', 'train 3']
  assert lines == [
    f'Seed 1 is finished: {tmp_path}/runs/seed-1',
    f'Seed 2 of 3: {tmp_path}/runs/seed-2',
    f'Seed 3 of 3: {tmp_path}/runs/seed-3',
    'Precision of 3 seeds: mean 0.8300, standard deviation 0.0100',
    '  seed 1: 0.8200 at step 10',
    '  seed 2: 0.8300 at step 10',
    '  seed 3: 0.8400 at step 10',
  ]
  # An evaluation was killed while it wrote its score.
  with open(tmp_path / 'runs' / 'seed-1' / 'eval' / 'metrics.jsonl', 'a') as it:
    it.write('{"step": 10, "prec')
  lines, trained = seeds(1, 10)
  assert trained == []
  assert lines[-2] == 'Precision of 1 seed: mean 0.8200'


def test_results_of_other_flags_are_not_mixed(seeds, tmp_path):
  seeds(1, 10)
  with pytest.raises(SystemExit, match='by another command, .*max_steps=10'):
    seeds(1, 20)
  assert (tmp_path / 'log').read_text() == ''


def test_a_damaged_description_of_a_run(seeds, tmp_path):
  seeds(1, 10)
  run_json = tmp_path / 'runs' / 'seed-1' / 'train' / 'run.json'
  run_json.write_text('damaged')
  with pytest.raises(SystemExit, match=f'{run_json} does not describe'):
    seeds(1, 10, '--recipe=fast')


@pytest.mark.parametrize('flag', ['--seed=5', '--train_dir=here'])
def test_flags_that_differ_between_seeds_are_refused(seeds, tmp_path, flag):
  with pytest.raises(SystemExit, match='2'):
    seeds(1, 10, flag)
  assert (tmp_path / 'log').read_text() == ''
