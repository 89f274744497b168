"""Test data sets of other classes and files than CIFAR-10's."""

import itertools
import os

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from support.data import write_records

import cifar10_input
from cifar10_suite import dataset


def make(tmp_path, names, *labels_of_files, test=(0, 1)):
  """Write a data set in which each image is as bright as its number."""
  batches_dir = tmp_path / dataset.BATCHES_DIR
  batches_dir.mkdir(exist_ok=True)
  (batches_dir / 'batches.meta.txt').write_text('\n'.join([*names, '']))
  number = itertools.count()
  for k, labels in enumerate([*labels_of_files, test]):
    name = f'data_batch_{k + 1}' if k < len(labels_of_files) else 'test_batch'
    images = np.zeros([len(labels), 32, 32, 3])
    images += [[[[next(number)]]] for _ in labels]
    write_records(batches_dir / f'{name}.bin', labels, images)
  return str(tmp_path)


class TestLoad:
  def test_classes_and_images(self, tmp_path):
    data_dir = make(tmp_path, ['cat', 'big dog'], [0, 1, 1], [0])
    data_set = dataset.load(data_dir)
    assert data_set == dataset.DataSet(('cat', 'big dog'), 4)
    assert dataset.load(data_dir, hold_out=2).num_training_images == 2

  def test_256_classes(self, tmp_path):
    names = [f'class {k}' for k in range(256)]
    data_dir = make(tmp_path, names, range(256), test=range(256))
    assert dataset.load(data_dir).class_names == tuple(names)

  def test_a_byte_order_mark_is_not_a_name(self, tmp_path):
    data_dir = make(tmp_path, ['\ufeffcat', 'dog'], [0, 1], [0])
    assert dataset.load(data_dir).class_names == ('cat', 'dog')

  @pytest.mark.parametrize(
    ('names', 'labels', 'says'),
    [
      (['a', 'b'], [1, 2, 1, 2], 'must count from 0, not from 1'),
      (['a', 'b'], [0, 1, 2, 3], 'names 2 classes'),
      (['a', 'b', 'c'], [0, 1, 1], "no training images of class 'c'"),
      (['a'], [0], 'must have 2 to 256 different names'),
      (['a', 'a'], [0, 1], 'of which 1 differ'),
      (map(str, range(257)), [0], 'It has 257'),
    ],
  )
  def test_mistakes_are_named(self, tmp_path, names, labels, says):
    data_dir = make(tmp_path, names, labels, test=labels)
    with pytest.raises(dataset.DataError, match=says):
      dataset.load(data_dir)

  def test_a_bad_label_is_located(self, tmp_path):
    data_dir = make(tmp_path, ['a', 'b'], [0, 1], [1, 0, 7])
    with pytest.raises(dataset.DataError, match=r'data_batch_2\.bin:2\] \[7\]'):
      dataset.load(data_dir)

  def test_a_missing_list_of_names(self, tmp_path):
    data_dir = make(tmp_path, ['a', 'b'], [0, 1])
    os.remove(f'{data_dir}/{dataset.BATCHES_DIR}/batches.meta.txt')
    with pytest.raises(dataset.DataError, match='name of each class'):
      dataset.load(data_dir)

  def test_an_unreadable_list_of_names(self, tmp_path):
    data_dir = make(tmp_path, ['a', 'b'], [0, 1])
    path = f'{data_dir}/{dataset.BATCHES_DIR}/batches.meta.txt'
    os.remove(path)
    os.mkdir(path)
    with pytest.raises(
      dataset.DataError, match=f'^Cannot read {path}: Is a directory.$'
    ):
      dataset.load(data_dir)

  def test_a_gap_between_files(self, tmp_path):
    data_dir = make(tmp_path, ['a', 'b'], [0, 1], [0, 1], [0, 1])
    path = f'{data_dir}/{dataset.BATCHES_DIR}/data_batch_2.bin'
    os.remove(path)
    with pytest.raises(ValueError, match=f'Failed to find file: {path}'):
      dataset.load(data_dir)

  def test_holding_out_everything(self, tmp_path):
    data_dir = make(tmp_path, ['a', 'b'], [0, 1], [0, 1])
    with pytest.raises(dataset.DataError, match='--hold_out=4 must be less'):
      dataset.load(data_dir, hold_out=4)

  @pytest.mark.parametrize(
    ('labels', 'hold_out', 'says'),
    [
      ([0, 2, 2], 0, "of class 'b'. Add some, or make the data set again with"),
      ([0, 1, 1], 0, "of class 'c'. Remove it from batches.meta.txt, or add"),
      ([0, 0, 0], 0, "of class 'b'. Remove it from batches.meta.txt, or add"),
      ([0, 1, 2], 1, "of class 'c' before those held out. Choose a smaller"),
      ([0, 1, 1], 1, "of class 'c'. Remove it from batches.meta.txt, or add"),
      ([2, 0, 1], 2, "of class 'a' before those held out. Choose a smaller"),
    ],
  )
  def test_a_class_without_images(self, tmp_path, labels, hold_out, says):
    data_dir = make(tmp_path, ['a', 'b', 'c'], labels)
    with pytest.raises(dataset.DataError) as error:
      dataset.load(data_dir, hold_out)
    assert f'has no training images {says}' in f'{error.value}'


@pytest.fixture
def numbered_dir(tmp_path):
  """Directory of files with 30, 20 and 25 records, labelled 0 to 74."""
  names = [str(k) for k in range(75)]
  files = [range(30), range(30, 50), range(50, 75)]
  data_dir = make(tmp_path, names, *files)
  return f'{data_dir}/{dataset.BATCHES_DIR}'


class TestHeldOutImages:
  @pytest.mark.parametrize('count', [1, 25, 26, 45, 74])
  def test_are_the_last_ones(self, graph, numbered_dir, count):
    _, labels = cifar10_input.inputs(
      False, numbered_dir, 10, num_epochs=1, num_classes=75, hold_out=count
    )
    got = []
    with tf.train.MonitoredSession() as session:
      while not session.should_stop():
        got.extend(session.run(labels))
    assert got == list(range(75 - count, 75))

  @pytest.mark.parametrize('count', [0, 1, 25, 26, 45, 74])
  def test_are_not_trained_on(self, graph, numbered_dir, count):
    ((_, labels),) = cifar10_input.distorted_batches(
      numbered_dir,
      10,
      1,
      num_classes=75,
      num_examples=75 - count,
      hold_out=count,
    )
    with tf.train.MonitoredSession() as session:
      got = np.concatenate([session.run(labels) for _ in range(100)])
    assert set(got) == set(range(75 - count))


def test_a_label_beyond_the_classes_stops_training(graph, numbered_dir):
  ((_, labels),) = cifar10_input.distorted_batches(
    numbered_dir, 10, 1, num_classes=74, num_examples=75
  )
  with (
    pytest.raises(tf.errors.InvalidArgumentError, match='above 73'),
    tf.train.MonitoredSession() as session,
  ):
    while True:
      session.run(labels)


def test_reads_images_at_positions_of_several_files(tmp_path):
  rng = np.random.RandomState(0)
  sizes = [3, 1, 2, 4, 5]
  images = rng.randint(0, 256, [sum(sizes), 32, 32, 3]).astype(np.uint8)
  for k, part in enumerate(np.split(images, np.cumsum(sizes)[:-1]), start=1):
    planes = part.transpose(0, 3, 1, 2).reshape(len(part), -1)
    records = np.insert(planes, 0, 0, axis=1)
    records.tofile(tmp_path / f'data_batch_{k}.bin')
  positions = np.array([14, 0, 3, 2, 4, 3])
  got = dataset.read_images(False, str(tmp_path), positions)
  np.testing.assert_array_equal(got, images[positions])
  assert len(dataset.read_images(False, str(tmp_path), np.arange(0))) == 0
  with pytest.raises(IndexError):
    dataset.read_images(False, str(tmp_path), np.array([15]))
