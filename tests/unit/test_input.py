"""Test the input module against NumPy, and its random numbers with SciPy."""

import dataclasses
import itertools
import os

import numpy as np
import pytest
import scipy.stats
import tensorflow.compat.v1 as tf
from support.data import random_images, write_records

import cifar10_input
import cifar10_train
from cifar10_suite import commands, dataset, distortion, views, whitening
from cifar10_suite.recipes import TUTORIAL
from cifar10_suite.train_settings import TrainSettings

# Seeds are fixed, so a distribution test fails always or never.
P_VALUE = 1e-3


def standardize(images):
  images = images.astype(np.float64)
  mean = images.mean(axis=(1, 2, 3), keepdims=True)
  stddev = images.std(axis=(1, 2, 3), keepdims=True)
  return (images - mean) / np.maximum(stddev, 1 / np.sqrt(images[0].size))


@pytest.fixture
def two_files(tmp_path):
  """Paths, labels and images of two files, with 3 and 2 records."""
  labels = [np.array([0, 9, 4]), np.array([1, 2])]
  images = [random_images(3, seed=1), random_images(2, seed=2)]
  paths = [str(tmp_path / 'a.bin'), str(tmp_path / 'b.bin')]
  for path, its_labels, its_images in zip(paths, labels, images, strict=True):
    write_records(path, its_labels, its_images)
  return paths, np.concatenate(labels), np.concatenate(images)


class TestReadCifar10:
  def test_decodes_every_record_in_order_and_ends(self, graph, two_files):
    paths, labels, images = two_files
    queue = tf.FIFOQueue(10, tf.string, shapes=[[]])
    record = cifar10_input.read_cifar10(queue)
    assert (record.height, record.width, record.depth) == (32, 32, 3)
    assert record.key.shape.as_list() == []
    assert record.label.shape.as_list() == [1]
    assert record.label.dtype == tf.int32
    assert record.uint8image.shape.as_list() == [32, 32, 3]
    assert record.uint8image.dtype == tf.uint8
    keys = [f'{paths[0]}:{i}' for i in range(3)]
    keys += [f'{paths[1]}:{i}' for i in range(2)]
    with tf.Session() as session:
      session.run(queue.enqueue_many([paths]))
      session.run(queue.close())
      for key, label, image in zip(keys, labels, images, strict=True):
        got = session.run([record.key, record.label, record.uint8image])
        assert got[0].decode() == key
        np.testing.assert_array_equal(got[1], [label])
        np.testing.assert_array_equal(got[2], image)
      with pytest.raises(tf.errors.OutOfRangeError):
        session.run(record.label)

  def test_refuses_a_label_above_9_and_names_the_record(self, graph, tmp_path):
    path = str(tmp_path / 'bad.bin')
    write_records(path, [3, 200], random_images(2))
    queue = tf.FIFOQueue(1, tf.string, shapes=[[]])
    record = cifar10_input.read_cifar10(queue)
    with tf.Session() as session:
      session.run(queue.enqueue(path))
      session.run(record.label)
      with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        session.run(record.label)
    assert f'[{path}:1] [200]' in caught.value.message


def position_planes(count):
  """Images whose pixels tell their row, 1 to 32, and their column."""
  rows, columns = np.mgrid[1:33, 1:33]
  planes = np.stack([rows, columns, 0 * rows]).astype(np.uint8)
  return tf.tile(planes[np.newaxis], [count, 1, 1, 1])


def windows_of(images):
  """Return (row, column, is mirrored) of distorted `position_planes`.

  The last channel, which is zero, and the first one, whose rows rise by one,
  undo the standardization.
  """
  scale = images[:, 1:2, :1, :1] - images[:, :1, :1, :1]
  pixels = (images - images[..., 2:]) / scale
  rows = np.rint(pixels[:, 0, 0, 0]).astype(int)
  columns = np.rint(pixels[..., 1].min(axis=(1, 2))).astype(int)
  mirrored = pixels[:, 0, 0, 1] > pixels[:, 0, -1, 1]
  size = images.shape[1]
  across = columns[:, np.newaxis] + np.arange(size)
  across[mirrored] = across[mirrored, ::-1]
  np.testing.assert_allclose(pixels[..., 1] - across[:, None], 0, atol=0.01)
  down = rows[:, np.newaxis] + np.arange(size)
  np.testing.assert_allclose(pixels[..., 0] - down[..., None], 0, atol=0.01)
  return np.stack([rows - 1, columns - 1, mirrored], axis=1)


def distorted_positions(count, **kwargs):
  """Return `position_planes`, distorted; contrast is unchanged by default."""
  kwargs = {'contrast': (1.0, 1.0), **kwargs}
  with tf.Session() as session:
    return session.run(cifar10_input.distort(position_planes(count), **kwargs))


def without_static_batch(array):
  """Return a tensor whose batch size is unknown when the graph is built."""
  return tf.placeholder_with_default(array, [None, *array.shape[1:]])


# XLA compiles for known shapes and large tensors, as of 100 images; otherwise,
# operations run one by one.
compiled_or_not = pytest.mark.parametrize(
  'as_tensor', [tf.constant, without_static_batch]
)


@pytest.fixture(scope='module')
def windows():
  with tf.Graph().as_default():
    tf.set_random_seed(1)
    return windows_of(distorted_positions(8100))


class TestRandomCrops:
  def test_reach_all_corners_equally_often(self, windows):
    corners = windows[:, 0] * 9 + windows[:, 1]
    counts = np.bincount(corners, minlength=81)
    assert counts.min() > 0
    assert scipy.stats.chisquare(counts).pvalue > P_VALUE

  def test_stay_within_a_quarter_of_the_margin(self, graph):
    windows = windows_of(distorted_positions(500, crop_margin=0.25))
    assert {tuple(window) for window in windows} == set(
      itertools.product(range(3, 6), range(3, 6), [0, 1])
    )

  def test_mirror_half_of_them(self, windows):
    mirrored = int(windows[:, 2].sum())
    assert scipy.stats.binomtest(mirrored, len(windows)).pvalue > P_VALUE

  def test_row_column_and_mirroring_are_independent(self, windows):
    for a, b in [(0, 1), (0, 2), (1, 2)]:
      table = np.zeros([9, 9])
      np.add.at(table, (windows[:, a], windows[:, b]), 1)
      table = table[:, table.sum(axis=0) > 0]
      assert scipy.stats.chi2_contingency(table).pvalue > P_VALUE

  def test_neighbours_in_a_batch_are_independent(self, windows):
    for column in range(3):
      table = np.zeros([9, 9])
      np.add.at(table, (windows[:-1, column], windows[1:, column]), 1)
      table = table[table.sum(axis=1) > 0][:, table.sum(axis=0) > 0]
      assert scipy.stats.chi2_contingency(table).pvalue > P_VALUE


@compiled_or_not
@pytest.mark.parametrize(
  ('dtype', 'tolerance'), [(tf.float32, 1e-5), (tf.bfloat16, 2**-7)]
)
@pytest.mark.parametrize('saturated', [False, True])
def test_distortions_equal_numpy(graph, as_tensor, dtype, tolerance, saturated):
  planes = random_images(100).transpose(0, 3, 1, 2)
  tops, lefts = [0, 8, 3, 8, 1] * 20, [8, 0, 5, 8] * 25
  flips = [False, True, True, False, True] * 20
  brightness = np.linspace(-63, 63, 100, dtype='f4').reshape(-1, 1, 1, 1)
  saturation = np.linspace(0.5, 1.5, 100, dtype='f4').reshape(-1, 1, 1, 1)
  contrast = np.linspace(1.8, 0.2, 100, dtype='f4').reshape(-1, 1, 1, 1)
  numbers = [
    (np.array(tops) + 0.5) / 9,  # each number of pixels is equally frequent
    (np.array(lefts) + 0.5) / 9,
    np.where(flips, 0.49, 0.51),
    (brightness.ravel() + 63) / 126,
    saturation.ravel() - 0.5,
    (contrast.ravel() - 0.2) / 1.6,
  ]
  images = distortion.apply(
    as_tensor(planes),
    tf.constant(np.stack(numbers, axis=1).astype('f4')),
    24,
    tf.constant(1.0),  # crops from anywhere in the image
    63,
    (0.5, 1.5) if saturated else None,
    (0.2, 1.8),
    dtype,
  )
  assert images.dtype == dtype
  with tf.Session() as session:
    got = session.run(tf.cast(images, tf.float32))
  crops = np.stack(
    [
      plane[:, top : top + 24, left : left + 24][..., :: -1 if flip else 1]
      for plane, top, left, flip in zip(planes, tops, lefts, flips, strict=True)
    ]
  )
  bright = crops + np.float64(brightness)
  if saturated:
    greys = bright.mean(axis=1, keepdims=True)
    bright = (bright - greys) * saturation + greys
  means = bright.mean(axis=(2, 3), keepdims=True)
  expected = (bright - means) * contrast + means
  expected = standardize(expected.transpose(0, 2, 3, 1))
  np.testing.assert_allclose(got, expected, rtol=tolerance, atol=1e-5)


class TestDistort:
  def test_standardizes_each_image(self, graph):
    planes = random_images(50).transpose(0, 3, 1, 2)
    distorted = cifar10_input.distort(tf.constant(planes))
    with tf.Session() as session:
      got = session.run(distorted)
    assert got.shape == (50, 24, 24, 3)
    np.testing.assert_allclose(got.mean(axis=(1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(got.std(axis=(1, 2, 3)), 1, atol=1e-4)

  def test_contrast_is_uniform(self, graph):
    images = distorted_positions(5000, crop_margin=0.0, contrast=(0.2, 1.8))
    # The channels' means do not change, but for the standardization.
    mean = np.arange(5, 29).mean()
    unit = (images[..., 0].mean(axis=(1, 2)) - images[:, 0, 0, 2]) / mean
    factors = (images[:, 1, 0, 0] - images[:, 0, 0, 0]) / unit
    assert factors.min() >= 0.2 - 1e-4 and factors.max() < 1.8 + 1e-4
    uniform = scipy.stats.uniform(0.2, 1.6)
    assert scipy.stats.kstest(factors, uniform.cdf).pvalue > P_VALUE
    neighbours = scipy.stats.pearsonr(factors[:-1], factors[1:])
    assert neighbours.pvalue > P_VALUE

  def test_saturation_is_uniform(self, graph):
    planes = np.zeros([5000, 3, 32, 32], np.uint8)
    planes[:, :, 0::3] = 50
    planes[:, :, 1::3] = 150
    planes[:, :, 2::3] = np.array([130, 100, 70]).reshape(3, 1, 1)
    images = cifar10_input.distort(
      tf.constant(planes), (1.0, 1.0), 0.0, saturation=(0.5, 1.5)
    )
    with tf.Session() as session:
      got = session.run(images)[:, 2:5, 0]  # source rows 6, 7 and 8
    colour = got[:, 2, 0] - got[:, 2, 2]
    grey = got[:, 1, 0] - got[:, 0, 0]
    factors = (colour / 60) / (grey / 100)
    uniform = scipy.stats.uniform(0.5, 1)
    assert scipy.stats.kstest(factors, uniform.cdf).pvalue > P_VALUE

  @pytest.mark.parametrize('count', [2, 256])  # without and with XLA
  @pytest.mark.parametrize('saturation', [None, (0.5, 1.5)])
  def test_a_plain_image_becomes_zero(self, graph, count, saturation):
    greys = np.linspace(0, 255, count).astype(np.uint8).reshape(-1, 1, 1, 1)
    plain = np.tile(greys, [1, 3, 32, 32])
    distorted = cifar10_input.distort(tf.constant(plain), saturation=saturation)
    with tf.Session() as session:
      np.testing.assert_allclose(session.run(distorted), 0, atol=0.02)

  def test_a_seed_repeats_the_distortions(self, graph):
    """XLA would ignore the seed of random operations that it compiles."""
    results = []
    for _ in range(2):
      with tf.Graph().as_default():
        tf.set_random_seed(7)
        results.append(distorted_positions(100, contrast=(0.2, 1.8)))
    np.testing.assert_array_equal(*results)


class TestImageSize:
  """The tutorial's readers often edit `IMAGE_SIZE`."""

  @pytest.fixture(params=[8, 23, 24, 25, 31, 32])
  def size(self, request, monkeypatch):
    monkeypatch.setattr(cifar10_input, 'IMAGE_SIZE', request.param)
    return request.param

  @pytest.mark.parametrize('margin', [0, 0.5, 1])
  def test_no_crop_leaves_the_image(self, graph, size, margin):
    windows = windows_of(distorted_positions(1000, crop_margin=margin))
    free = 32 - size
    centre = free // 2
    reach = [int(margin * most + 0.5) for most in (centre, free - centre)]
    possible = range(centre - reach[0], centre + reach[1] + 1)
    for corner in (windows[:, 0], windows[:, 1]):
      starts, counts = np.unique(corner, return_counts=True)
      assert list(starts) == list(possible)
      if margin == 1 and len(counts) > 1:
        assert scipy.stats.chisquare(counts).pvalue > P_VALUE

  @pytest.mark.parametrize('num_views', [1, 2, 10, 50])
  def test_no_view_leaves_the_image(self, graph, size, num_views):
    windows = views.cut(tf.constant(random_images(2)), size, num_views)
    assert windows.shape.as_list() == [2 * num_views, size, size, 3]

  @pytest.mark.slow
  def test_makes_batches_and_filters(self, graph, size, batches_dir):
    images, _ = cifar10_input.distorted_inputs(batches_dir, 8)
    filters = whitening.whitening_filters(batches_dir, size, size=5, count=4)
    assert images.shape.as_list() == [8, size, size, 3]
    assert np.isfinite(filters).all()

  @pytest.mark.parametrize('wrong', [7, 33])
  def test_an_impossible_one_is_named(
    self, graph, monkeypatch, batches_dir, wrong
  ):
    monkeypatch.setattr(cifar10_input, 'IMAGE_SIZE', wrong)
    with pytest.raises(dataset.DataError, match=f'IMAGE_SIZE is {wrong}'):
      cifar10_input.distorted_inputs(batches_dir, 8)
    with pytest.raises(dataset.DataError, match=f'IMAGE_SIZE is {wrong}'):
      cifar10_input.inputs(True, batches_dir, 8)


def test_constants_may_be_assigned(graph, monkeypatch, tmp_path, capsys):
  """Scripts may do so: the tutorial's functions read them when called."""
  for name in ('test_batch.bin', 'data_batch_1.bin'):
    write_records(tmp_path / name, [11] * 50, random_images(50))
  monkeypatch.setattr(cifar10_input, 'NUM_CLASSES', 12)
  monkeypatch.setattr(cifar10_input, 'NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN', 50)
  queue = tf.train.string_input_producer([str(tmp_path / 'test_batch.bin')])
  labels = [
    cifar10_input.read_cifar10(queue).label,
    cifar10_input.inputs(True, str(tmp_path), 2)[1],
    cifar10_input.distorted_inputs(str(tmp_path), 2)[1],
  ]
  assert 'Filling queue with 20 CIFAR images' in capsys.readouterr().out
  with tf.train.MonitoredSession() as session:
    for got in session.run(labels):
      assert set(got) == {11}


class TestDistortedInputs:
  def test_makes_full_batches(self, graph, batches_dir, capsys):
    images, labels = cifar10_input.distorted_inputs(batches_dir, 8)
    assert images.shape.as_list() == [8, 24, 24, 3]
    assert images.dtype == tf.float32
    assert labels.shape.as_list() == [8]
    assert labels.dtype == tf.int32
    assert (
      'Filling queue with 20000 CIFAR images before starting to train.'
      in capsys.readouterr().out
    )
    assert not tf.local_variables()
    with tf.train.MonitoredSession() as session:
      got_images, got_labels = session.run([images, labels])
    np.testing.assert_allclose(got_images.std(axis=(1, 2, 3)), 1, atol=1e-3)
    assert set(got_labels) <= set(range(10))

  def test_shuffling_mixes_the_five_files(self, graph, tmp_path):
    for label in range(5):  # files of full size, each with one class
      records = np.zeros([10000, 3073], np.uint8)
      records[:, 0] = label
      records.tofile(tmp_path / f'data_batch_{label + 1}.bin')
    _, labels = cifar10_input.distorted_inputs(str(tmp_path), 200)
    with tf.train.MonitoredSession() as session:
      counts = np.bincount(session.run(labels), minlength=5)
    assert scipy.stats.chisquare(counts).pvalue > P_VALUE

  def test_draws_from_20000_images(self, graph, tmp_path):
    records = np.zeros([10000, 3073], np.uint8)
    records[:, 0] = np.arange(10000) // 1000  # its thousand
    for i in range(1, 6):
      records.tofile(tmp_path / f'data_batch_{i}.bin')
    _, labels = cifar10_input.distorted_inputs(str(tmp_path), 400)
    with tf.train.MonitoredSession() as session:
      counts = np.bincount(session.run(labels), minlength=10)
    # At most half of the images are of the first 2,000 of the five files. Some
    # readers are ahead of others, which lowers the share.
    assert counts[:2].sum() < 200 + 5 * 10, counts

  def test_a_bad_label_stops_the_session(self, graph, tmp_path):
    for i in range(1, 6):
      write_records(
        tmp_path / f'data_batch_{i}.bin',
        [200 if i == 3 else 1] * 2,
        random_images(2),
      )
    _, labels = cifar10_input.distorted_inputs(str(tmp_path), 2)
    with (
      pytest.raises(tf.errors.InvalidArgumentError, match='data_batch_3.bin:'),
      tf.train.MonitoredSession() as session,
    ):
      session.run(labels)


class TestInputs:
  def test_one_exact_pass_in_order(self, graph, batches_dir):
    images, labels = cifar10_input.inputs(True, batches_dir, 7, num_epochs=1)
    got_images, got_labels = [], []
    with tf.train.MonitoredSession() as session:
      while not session.should_stop():
        batch_images, batch_labels = session.run([images, labels])
        got_images.append(batch_images)
        got_labels.append(batch_labels)
    assert [len(batch) for batch in got_labels] == [7] * 14 + [2]
    records = np.fromfile(os.path.join(batches_dir, 'test_batch.bin'), np.uint8)
    records = records.reshape(100, 3073)
    np.testing.assert_array_equal(np.concatenate(got_labels), records[:, 0])
    whole = records[:, 1:].reshape(100, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(
      np.concatenate(got_images),
      standardize(whole[:, 4:28, 4:28]),
      atol=1e-4,
    )

  def test_training_files_come_in_order(self, graph, batches_dir):
    _, labels = cifar10_input.inputs(False, batches_dir, 64, num_epochs=1)
    got = []
    with tf.train.MonitoredSession() as session:
      while not session.should_stop():
        got.append(session.run(labels))
    expected = [
      np.fromfile(os.path.join(batches_dir, name), np.uint8)[::3073]
      for name in list(dataset.FILE_SHA256)[:5]
    ]
    np.testing.assert_array_equal(np.concatenate(got), np.concatenate(expected))

  def test_repeats_without_end_and_without_local_variables(
    self, graph, batches_dir
  ):
    images, labels = cifar10_input.inputs(True, batches_dir, 30)
    assert images.shape.as_list() == [30, 24, 24, 3]
    assert not tf.local_variables()
    coordinator = tf.train.Coordinator()
    with tf.Session() as session:
      threads = tf.train.start_queue_runners(session, coordinator)
      got = np.concatenate([session.run(labels) for _ in range(20)])
      coordinator.request_stop()
      coordinator.join(threads)
    np.testing.assert_array_equal(got[:100], got[500:600])

  @pytest.mark.parametrize('size', [0, 1, 3072, 3074, 30000])
  def test_refuses_a_file_of_a_wrong_size(self, graph, tmp_path, size):
    path = tmp_path / 'test_batch.bin'
    path.write_bytes(bytes(size))
    with pytest.raises(ValueError, match=str(path)):
      cifar10_input.inputs(True, str(tmp_path), 2)

  def test_names_a_missing_file_and_the_remedy(self, graph, tmp_path):
    directory = tmp_path / 'cifar-10-batches-bin'
    with pytest.raises(ValueError) as caught:
      cifar10_input.inputs(True, str(directory), 2)
    assert str(caught.value).startswith(
      f'Failed to find file: {directory}/test_batch.bin'
    )
    remedy = f'To fetch CIFAR-10: {commands.of("download.py")}'
    assert f'{remedy} --data_dir {tmp_path}' in str(caught.value)


class TestHeldOut:
  """Held-out images are the last ones; whole reads of a file may have none."""

  @pytest.fixture
  def held_out_dir(self, tmp_path):
    for k, labels in enumerate([300 * [0], 700 * [1] + 300 * [2]], start=1):
      records = np.zeros([len(labels), 3073], np.uint8)
      records[:, 0] = labels
      records.tofile(tmp_path / f'data_batch_{k}.bin')
    return str(tmp_path)

  @pytest.mark.parametrize(
    ('count', 'expected'), [(300, 300 * [2]), (1000, 700 * [1] + 300 * [2])]
  )
  def test_are_scored(self, graph, held_out_dir, count, expected):
    _, labels = cifar10_input.inputs(
      False, held_out_dir, 64, num_epochs=1, hold_out=count
    )
    got: list[int] = []
    with tf.train.MonitoredSession() as session:
      while not session.should_stop():
        got.extend(session.run(labels))
    assert got == expected

  @pytest.mark.parametrize(
    ('count', 'expected'), [(300, {0, 1}), (1000, {0}), (0, {0, 1, 2})]
  )
  def test_are_not_trained_on(self, graph, held_out_dir, count, expected):
    ((_, labels),) = cifar10_input.distorted_batches(
      held_out_dir, 100, 1, num_examples=1000, hold_out=count
    )
    with tf.train.MonitoredSession() as session:
      got = np.concatenate([session.run(labels) for _ in range(40)])
    assert set(got) == expected

  def test_are_not_trained_on_by_the_trainer(self, graph, tmp_path):
    batches_dir = tmp_path / dataset.BATCHES_DIR
    batches_dir.mkdir()
    write_records(
      batches_dir / 'data_batch_1.bin', np.arange(75), random_images(75)
    )
    settings = TrainSettings(
      dataclasses.replace(TUTORIAL, batch_size=10),
      train_dir='',
      data_dir=str(tmp_path),
      data_set=dataset.DataSet(tuple(str(k) for k in range(75)), 55),
      hold_out=20,
    )
    ((_, labels),) = cifar10_train.distorted_batches(settings, 1)
    with tf.train.MonitoredSession() as session:
      got = np.concatenate([session.run(labels) for _ in range(100)])
    assert set(got) == set(range(55))


def build_both_inputs(batches_dir):
  cifar10_input.distorted_inputs(batches_dir, 4)
  cifar10_input.inputs(True, batches_dir, 4, num_epochs=1)


def test_everything_is_on_the_cpu(graph, batches_dir):
  with tf.device('/gpu:1'), tf.name_scope('tower_1'):
    build_both_inputs(batches_dir)
  assert {op.device for op in graph.get_operations()} == {'/device:CPU:0'}


def test_summary_tags_carry_no_tower(graph, batches_dir):
  with tf.name_scope('tower_1'):
    build_both_inputs(batches_dir)
  merged = tf.summary.merge_all()
  with tf.train.MonitoredSession() as session:
    summary = tf.Summary.FromString(session.run(merged))
  tags = {value.tag for value in summary.value}
  assert 'images/image/0' in tags
  assert not any('tower' in tag for tag in tags)
