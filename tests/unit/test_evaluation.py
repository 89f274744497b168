"""Test which checkpoints are scored, and when."""

import types

import tensorflow.compat.v1 as tf

from cifar10_suite import checkpoints, evaluation


def test_waits_after_each_score(monkeypatch):
  now = [0]  # seconds; each tenth brings a checkpoint
  clock = types.SimpleNamespace(
    monotonic=lambda: now[0],
    sleep=lambda seconds: now.__setitem__(0, now[0] + seconds),
  )
  monkeypatch.setattr(evaluation, 'time', clock)
  monkeypatch.setattr(
    checkpoints, 'latest', lambda directory: f'model.ckpt-{now[0] // 10:.0f}'
  )
  monkeypatch.setattr(
    checkpoints,
    'newest_good',
    lambda directory, variables: (checkpoints.latest(directory), 0),
  )
  settings = evaluation.EvalSettings(
    checkpoint_dir='.',
    eval_dir='',
    batches_dir='',
    eval_data='test',
    num_examples=None,
    num_views=1,
    batch_size=1,
    dtype=tf.float32,
    device='auto',
    report=None,
    run_once=False,
    all_checkpoints=False,
    until_trained=False,
    eval_interval_secs=300,
    timeout_secs=None,
  )
  times = []
  for _ in evaluation.checkpoints_to_score(settings, {}, None):
    times.append(now[0])
    now[0] += 5  # the evaluation
    if len(times) == 3:
      break
  assert times[0] == 0
  assert 305 <= times[1] < 315 and 610 <= times[2] < 630
