"""Test run.json: what is a description of a run, and what is not."""

import dataclasses
import json

import pytest
import tensorflow.compat.v1 as tf

from cifar10_suite import runs
from cifar10_suite.errors import UserError
from cifar10_suite.recipes import FAST


@pytest.fixture
def path(tmp_path):
  runs.record_start(
    str(tmp_path), ('ant', 'bee'), None, runs.describe(FAST, tf.float32)
  )
  return tmp_path / runs.NAME


def test_reads_what_it_has_written(path):
  run = runs.read(str(path.parent))
  assert run['class_names'] == ['ant', 'bee']
  assert runs.last_step(run) == FAST.max_steps
  assert runs.read(str(path.parent.parent)) is None


def test_a_start_differs_in_recipe_towers_and_scale(tmp_path):
  start = runs.describe(FAST, tf.float32)
  start |= {'towers': 4, 'scale_learning_rate': True, 'seed': 1}
  runs.record_start(str(tmp_path), ('ant', 'bee'), None, start)
  run = runs.read(str(tmp_path))
  assert runs.changes(run, start | {'seed': None}) == []
  longer = dataclasses.replace(FAST, max_steps=9, batch_size=64)
  now = runs.describe(longer, tf.bfloat16)
  now |= {'towers': 2, 'scale_learning_rate': False}
  assert sorted(runs.changes(run, now)) == [
    'batch_size 64 (before: 256)',
    'compute_type bfloat16 (before: float32)',
    'scale_learning_rate False (before: True)',
    'towers 2 (before: 4)',
  ]
  other = runs.describe(dataclasses.replace(longer, name='mine'), tf.float32)
  assert runs.changes(run, other) == ['recipe mine (before: fast)']


@pytest.mark.parametrize('key', ['command', 'recipe', 'step', 'time'])
def test_refuses_a_start_of_which_something_is_missing(path, key):
  run = json.loads(path.read_text())
  del run['starts'][0][key]
  path.write_text(json.dumps(run))
  refuses(path)


@pytest.mark.parametrize(
  'changes',
  [
    {'program': 'other'},
    {'class_names': [1, 2]},
    {'class_names': ['ant']},
    {'starts': []},
    {'starts': ['recipe']},
    {'starts': {'recipe': {}}},
    {'starts': None},
  ],
)
def test_refuses_other_contents(path, changes):
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
  refuses(path)


@pytest.mark.parametrize('recipe', ['fast', {}, {'name': 'fast'}, None])
def test_refuses_other_recipes(path, recipe):
  run = json.loads(path.read_text())
  run['starts'][0]['recipe'] = recipe
  path.write_text(json.dumps(run))
  refuses(path)


@pytest.mark.parametrize('text', ['', '[]', 'null', '{"program"', '\xff'])
def test_refuses_what_is_not_an_object(path, text):
  path.write_text(text, encoding='latin-1')
  refuses(path)


def refuses(path):
  with pytest.raises(UserError, match=f'{path} does not describe a training'):
    runs.read(str(path.parent))
  assert not runs.is_ours(str(path))
