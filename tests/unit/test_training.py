"""Test the training loop's lines with a clock that ticks at each reading."""

import dataclasses
import itertools

import tensorflow.compat.v1 as tf

from cifar10_suite import hooks, training
from cifar10_suite.recipes import TUTORIAL


def train(train_dir, max_steps):
  with tf.Graph().as_default():
    step = tf.train.get_or_create_global_step()
    training.run_training(
      tf.constant(2.5),
      tf.assign_add(step, 1).op,
      training.TrainSettings(
        dataclasses.replace(TUTORIAL, batch_size=8, max_steps=max_steps),
        train_dir=str(train_dir),
        log_frequency=5,
        save_checkpoint_secs=1000,
        save_summaries_steps=1000,
      ),
    )


def test_lines_cover_the_steps_since_the_last(tmp_path, monkeypatch, capsys):
  ticks = itertools.count()
  monkeypatch.setattr(hooks.time, 'perf_counter', lambda: float(next(ticks)))
  train(tmp_path, max_steps=13)
  train(tmp_path, max_steps=16)
  lines = [
    line.partition(': ')[2]
    for line in capsys.readouterr().out.splitlines()
    if ', loss = ' in line
  ]
  assert lines == [
    # One second for the first step, then one for five steps.
    'step 0, loss = 2.50 (8.0 examples/sec; 1.000 sec/batch)',
    'step 5, loss = 2.50 (40.0 examples/sec; 0.200 sec/batch)',
    'step 10, loss = 2.50 (40.0 examples/sec; 0.200 sec/batch)',
    # After resuming: the first step, then two to the next multiple of five.
    'step 13, loss = 2.50 (8.0 examples/sec; 1.000 sec/batch)',
    'step 15, loss = 2.50 (16.0 examples/sec; 0.500 sec/batch)',
  ]
