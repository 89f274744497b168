"""Tests the evaluator's counting on predictions that are known."""

import os

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import cifar10_eval
import cifar10_input


@pytest.mark.parametrize('batch_size', [1, 7, 64, 1000])
@pytest.mark.parametrize('num_examples', [1, 50, 100])
def test_counts_each_of_the_first_images_once(
  graph, batches_dir, tmp_path, batch_size, num_examples
):
  _, labels = cifar10_input.inputs(True, batches_dir, batch_size, num_epochs=1)
  is_right = labels < 4  # as if the network were right about these classes
  step = tf.train.get_or_create_global_step()
  scaffold = tf.train.Scaffold(
    saver=tf.train.Saver(), summary_op=tf.summary.merge_all()
  )
  with tf.Session() as session:
    session.run(step.assign(123))
    path = tf.train.Saver().save(session, str(tmp_path / 'model.ckpt'), 123)
  with tf.summary.FileWriter(str(tmp_path / 'eval')) as writer:
    precision = cifar10_eval.evaluate(
      path, is_right, num_examples, scaffold, writer
    )
  records = np.fromfile(os.path.join(batches_dir, 'test_batch.bin'), np.uint8)
  expected = np.mean(records[:: 32 * 32 * 3 + 1][:num_examples] < 4)
  assert precision == pytest.approx(expected)
  (name,) = os.listdir(tmp_path / 'eval')
  points = [
    (event.step, value.simple_value)
    for event in tf.train.summary_iterator(str(tmp_path / 'eval' / name))
    for value in event.summary.value
    if value.tag == 'Precision @ 1'
  ]
  assert points == [(123, pytest.approx(expected))]
