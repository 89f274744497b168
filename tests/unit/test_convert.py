"""Test the conversion of pictures to data sets."""

import os
import unicodedata

import numpy as np
import PIL.Image
import pytest
from support.conversion import (
  as_set,
  images_of,
  make_cifar100,
  parts,
  random_images,
  read_data_set,
  write_archive,
  write_classes,
  write_pictures,
)

import cifar10_convert
from cifar10_suite import cifar100, class_folders, conversion, pictures
from cifar10_suite.errors import UserError


@pytest.fixture
def source(tmp_path):
  return str(tmp_path / 'pictures')


@pytest.fixture
def data_dir(tmp_path):
  return str(tmp_path / 'data')


def read(source, processes=1):
  """Return the examples in a folder; all pictures must be readable."""
  advances = []
  found = class_folders.find(source)
  examples, problems = class_folders.read(found, processes, advances.append)
  assert problems == []
  assert sum(advances) == len(found.paths)
  return examples


def examples_of(sizes, is_test=None):
  """Return examples with random images and classes of given sizes."""
  labels = np.repeat(np.arange(len(sizes)), sizes)
  planes = random_images(len(labels)).reshape(-1, 3072)
  return conversion.Examples(
    [f'class {i}' for i in range(len(sizes))],
    np.column_stack([labels, planes]).astype(np.uint8),
    [f'picture {i}' for i in range(len(labels))],
    is_test,
  )


class TestPictures:
  def test_are_those_of_the_reader(self, source):
    rng = np.random.RandomState(1)
    rgb = PIL.Image.fromarray(rng.randint(0, 256, [61, 47, 3], np.uint8))
    rgba = PIL.Image.fromarray(rng.randint(0, 256, [40, 90, 4], np.uint8))
    deep = PIL.Image.fromarray(rng.randint(0, 65536, [50, 33], np.uint16))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    os.makedirs(f'{source}/a')
    os.makedirs(f'{source}/b/deeper/still')
    rgb.save(f'{source}/a/rgb.png')
    rgb.save(f'{source}/a/rotated.jpg', exif=exif)
    rgb.convert('L').save(f'{source}/a/grey.bmp')
    rgb.convert('P').save(f'{source}/a/palette.gif')
    rgba.save(f'{source}/b/rgba.webp', lossless=True)
    deep.save(f'{source}/b/deeper/sixteen bits.PNG')
    rgb.convert('CMYK').save(f'{source}/b/deeper/still/cmyk.jpeg')
    rgb.resize((7, 300)).save(f'{source}/b/narrow.tiff')
    examples = read(source)
    assert examples.class_names == ['a', 'b']
    assert examples.is_test is None
    assert [os.path.relpath(path, source) for path in examples.sources] == [
      'a/grey.bmp',
      'a/palette.gif',
      'a/rgb.png',
      'a/rotated.jpg',
      'b/narrow.tiff',
      'b/rgba.webp',
      'b/deeper/sixteen bits.PNG',
      'b/deeper/still/cmyk.jpeg',
    ]
    np.testing.assert_array_equal(examples.records[:, 0], [0] * 4 + [1] * 4)
    np.testing.assert_array_equal(
      images_of(examples.records),
      [pictures.read_picture(path) for path in examples.sources],
    )
    assert len(np.unique(examples.records[:, 1:], axis=0)) == 8

  def test_are_independent_of_the_number_of_processes(self, source):
    write_classes(source, {'a': 40, 'b': 60})
    alone, together = read(source), read(source, 3)
    assert alone.sources == together.sources
    np.testing.assert_array_equal(alone.records, together.records)

  def test_relative_paths(self, tmp_path, source, monkeypatch):
    write_classes(source, {'a': 40, 'b': 60})
    monkeypatch.chdir(tmp_path)
    assert len(read('pictures', 2).records) == 100

  def test_unreadable_ones_are_named(self, source):
    images = write_classes(source, {'a': 40, 'b': 40})
    with open(f'{source}/a/3.png', 'wb') as file:
      file.write(b'damaged')
    os.remove(f'{source}/b/0.png')
    os.symlink('nowhere', f'{source}/b/0.png')
    found = class_folders.find(source)
    for processes in (1, 2):
      examples, problems = class_folders.read(found, processes, lambda _: None)
      assert problems == [
        (f'{source}/a/3.png', 'it is not a picture in a known format.'),
        (f'{source}/b/0.png', 'No such file or directory.'),
      ]
      assert len(examples.sources) == 78
      expected = [np.delete(images['a'], 3, 0), images['b'][1:]]
      for label, left in enumerate(expected):
        got = images_of(examples.records[examples.records[:, 0] == label])
        assert as_set(got) == as_set(left)

  def test_of_unknown_formats_are_not_left_out_silently(
    self, source, data_dir, capsys
  ):
    write_classes(source, {'a': 2, 'b': 2})
    os.remove(f'{source}/a/0.png')
    with open(f'{source}/a/0.heic', 'wb') as file:
      file.write(b'\0\0\0\x18ftypheic' + bytes(100))
    write_pictures(f'{source}/a/more', random_images(2, seed=1))
    with pytest.raises(UserError, match='Cannot read 1 of 6 pictures; nothing'):
      cifar10_convert.convert(source, data_dir)
    assert capsys.readouterr().err == (
      f'Cannot read {source}/a/0.heic: Pillow cannot read this format. Save it '
      'as JPEG or PNG.\n'
    )
    cifar10_convert.convert(source, data_dir, skip_unreadable=True)
    assert sum(map(len, parts(data_dir)[1:])) == 5

  def test_other_files_are_ignored(self, source):
    write_classes(source, {'a': 2, 'b': 2, '.hidden': 2, '__MACOSX': 2})
    write_pictures(f'{source}/a/.thumbnails', random_images(1))
    for name in ('a/notes.txt', 'loose.png', 'b/.x.png'):
      with open(os.path.join(source, name), 'w') as file:
        file.write('x')
    os.mkfifo(f'{source}/b/pipe.png')
    found = class_folders.find(source)
    assert sorted(found.ignored) == [
      f'{source}/{name}' for name in ('a/notes.txt', 'b/pipe.png', 'loose.png')
    ]
    assert [os.path.relpath(path, source) for path in found.paths] == [
      'a/0.png',
      'a/1.png',
      'b/0.png',
      'b/1.png',
    ]

  def test_links(self, tmp_path, source):
    write_classes(source, {'a': 2})
    write_pictures(tmp_path / 'elsewhere', random_images(2, seed=1))
    os.symlink(tmp_path / 'elsewhere', f'{source}/b')
    found = class_folders.find(source)
    assert found.class_names == ['a', 'b']
    assert found.labels == [0, 0, 1, 1]

  def test_loops_of_links_end(self, source):
    write_classes(source, {'a': 2, 'b': 3})
    os.symlink('.', f'{source}/a/loop')
    assert len(class_folders.find(source).paths) == 5

  @pytest.mark.parametrize(
    'parts, outer',
    [
      ([''], ''),
      ([''], '/..'),
      (['/train', '/test'], ''),
      (['/train', '/test'], '/train'),
    ],
  )
  def test_links_to_outer_folders_are_ignored(
    self, tmp_path, source, parts, outer
  ):
    """Such a folder has the pictures of the other classes."""
    write_pictures(tmp_path / 'elsewhere', random_images(4))
    for part in parts:
      write_classes(source + part, {'a': 2, 'b': 3})
      os.symlink(tmp_path / 'elsewhere', f'{source}{part}/c')
    links = [f'{source}{parts[0]}/{name}/all' for name in ('a', 'c')]
    for link in links:
      os.symlink(source + outer, link)
    found = class_folders.find(source)
    sizes = [size * len(parts) for size in (2, 3, 4)]
    assert np.bincount(found.labels).tolist() == sizes
    assert set(found.ignored) >= set(links)


class TestSplit:
  @pytest.mark.parametrize(
    'fraction, expected',
    [
      (0.2, [1, 2, 20]),
      (0.5, [1, 5, 50]),
      (0.999, [1, 9, 99]),
      (1e-9, [1, 1, 1]),
    ],
  )
  def test_fraction_of_each_class(self, fraction, expected):
    examples = examples_of([2, 10, 100])
    examples.is_test = conversion.split(examples, fraction, seed=0)
    chosen = examples.records[examples.is_test, 0]
    np.testing.assert_array_equal(np.bincount(chosen), expected)
    conversion.check_parts(examples)

  def test_depends_on_the_seed_only(self):
    examples = examples_of([50, 50])
    first, same, other = (
      conversion.split(examples, 0.3, seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()

  def test_every_picture_can_be_chosen(self):
    examples = examples_of([5, 5])
    times = sum(
      conversion.split(examples, 0.2, seed).astype(int) for seed in range(300)
    )
    # Binomial with p = 0.2: mean 60, standard deviation 7
    assert times.min() > 60 - 5 * 7 and times.max() < 60 + 5 * 7

  def test_equal_pictures_stay_together(self):
    examples = examples_of([40, 40])
    examples.records[10:20, 1:] = examples.records[0:10, 1:]
    examples.records[40:50, 1:] = examples.records[0:10, 1:]  # the other class
    for seed in range(20):
      is_test = conversion.split(examples, 0.5, seed)
      assert 0 < is_test[:10].sum() < 10
      np.testing.assert_array_equal(is_test[10:20], is_test[:10])
      np.testing.assert_array_equal(is_test[40:50], is_test[:10])
      examples.is_test = is_test
      assert conversion.repeated(examples) == []

  def test_few_different_pictures(self):
    examples = examples_of([10, 10])
    examples.records[:4, 1:] = examples.records[0, 1:]
    examples.records[4:10, 1:] = examples.records[4, 1:]
    for seed in range(10):
      is_test = conversion.split(examples, 0.2, seed)
      np.testing.assert_array_equal(is_test[:10], [True] * 4 + [False] * 6)

  def test_class_of_equal_pictures(self):
    examples = examples_of([10, 10])
    examples.records[10:, 1:] = examples.records[10, 1:]
    with pytest.raises(UserError, match='class 1 cannot be split'):
      conversion.split(examples, 0.2, 0)

  @pytest.mark.parametrize('size, number', [(1, '1'), (0, 'no')])
  def test_class_too_small(self, size, number):
    with pytest.raises(UserError, match=f'class 1 has {number} readable'):
      conversion.split(examples_of([5, size, 5]), 0.2, 0)

  def test_given_parts(self):
    is_test = np.array([False, True, False, True])
    conversion.check_parts(examples_of([2, 2], is_test))
    for index, part in ((2, 'training'), (3, 'testing')):
      wrong = is_test.copy()
      wrong[index] ^= True
      with pytest.raises(UserError, match=f'class 1 has no .* for {part}'):
        conversion.check_parts(examples_of([2, 2], wrong))

  def test_repeated_pictures_are_named(self):
    examples = examples_of([3, 3], np.array([False, False, True] * 2))
    examples.records[5, 1:] = examples.records[1, 1:]
    examples.records[4, 1:] = examples.records[0, 1:]  # both for training
    assert conversion.repeated(examples) == [('picture 5', 'picture 1')]


class TestWrite:
  @pytest.mark.parametrize(
    'count, sizes', [(10000, [10000]), (10001, [5001, 5000]), (5, [5])]
  )
  def test_sizes_of_files(self, data_dir, count, sizes):
    numbers = np.arange(count + 2, dtype=np.uint32)
    records = np.zeros([count + 2, 3073], np.uint8)
    records[:, 0] = numbers % 2
    records[:, 1:5] = numbers.view(np.uint8).reshape(-1, 4)
    examples = conversion.Examples(
      ['a', 'b'], records, [''] * (count + 2), numbers < 2
    )
    counts = conversion.write(examples, data_dir, 0)
    expected = {f'data_batch_{i}.bin': n for i, n in enumerate(sizes, 1)}
    assert counts == {**expected, 'test_batch.bin': 2}
    contents = read_data_set(data_dir)
    assert contents.pop('batches.meta.txt') == b'a\nb\n'
    assert {name: len(x) / 3073 for name, x in contents.items()} == counts
    _, training, test = parts(data_dir)
    assert as_set(training) == as_set(records[2:])
    assert as_set(test) == as_set(records[:2])

  def test_records_are_mixed(self, data_dir):
    is_test = np.arange(4000) % 2 == 1
    conversion.write(examples_of([1000] * 4, is_test), data_dir, 0)
    for records in parts(data_dir)[1:]:
      for some in np.array_split(records[:, 0], 10):
        # Hypergeometric: mean 50, standard deviation 6
        assert (abs(np.bincount(some, minlength=4) - 50) < 30).all()

  def test_seed_determines_the_bytes(self, tmp_path):
    examples = examples_of([20, 20], np.arange(40) % 3 == 0)
    contents = []
    for number, seed in enumerate([0, 0, 1]):
      conversion.write(examples, str(tmp_path / f'{number}'), seed)
      contents.append(read_data_set(tmp_path / f'{number}'))
    assert contents[0] == contents[1]
    for name in ('data_batch_1.bin', 'test_batch.bin'):
      assert contents[0][name] != contents[2][name]

  def test_others_can_read_the_files(self, data_dir):
    conversion.write(examples_of([2, 2], np.arange(4) % 2 == 0), data_dir, 0)
    mask = os.umask(0)
    os.umask(mask)
    folder = f'{data_dir}/cifar-10-batches-bin'
    assert os.stat(folder).st_mode & 0o777 == 0o777 & ~mask
    for name in os.listdir(folder):
      assert os.stat(f'{folder}/{name}').st_mode & 0o777 == 0o666 & ~mask

  @pytest.mark.parametrize('exists', [False, True])
  def test_interruption_leaves_nothing(
    self, tmp_path, data_dir, monkeypatch, exists
  ):
    def interrupt(old, new):
      assert sorted(os.listdir(old)) == [
        'batches.meta.txt',
        'data_batch_1.bin',
        'test_batch.bin',
      ]
      raise KeyboardInterrupt

    if exists:
      os.mkdir(data_dir)
    before = os.listdir(tmp_path)
    monkeypatch.setattr(os, 'rename', interrupt)
    target = data_dir if exists else f'{data_dir}/new/deep'
    with pytest.raises(KeyboardInterrupt):
      conversion.write(examples_of([2, 2], np.arange(4) % 2 == 0), target, 0)
    assert os.listdir(tmp_path) == before
    assert not exists or os.listdir(data_dir) == []

  @pytest.mark.parametrize('name', ['notes.txt', 'cifar-10-batches-bin/', '.x'])
  def test_directories_of_others_stay_as_they_are(self, tmp_path, name):
    path = tmp_path / name
    path.mkdir() if name.endswith('/') else path.write_text('mine')
    examples = examples_of([2, 2], np.arange(4) % 2 == 0)
    with pytest.raises(UserError, match='already contains'):
      conversion.write(examples, str(tmp_path), 0)
    assert os.listdir(tmp_path) == [name.rstrip('/')]
    if path.is_dir():
      assert os.listdir(path) == []

  def test_two_at_once(self, data_dir, monkeypatch):
    examples = examples_of([2, 2], np.arange(4) % 2 == 0)
    rename = os.rename

    def come_second(old, new):
      with monkeypatch.context() as patch:
        patch.setattr(os, 'rename', rename)
        os.makedirs(new)
        with open(f'{new}/first', 'w'):
          pass
      rename(old, new)

    monkeypatch.setattr(os, 'rename', come_second)
    with pytest.raises(UserError, match='Cannot write to --data_dir'):
      conversion.write(examples, data_dir, 0)
    assert list(read_data_set(data_dir)) == ['first']


class TestClassNames:
  @pytest.mark.parametrize('count', [2, 256])
  def test_fewest_and_most(self, source, data_dir, count, capsys):
    names = [f'{i:03}' for i in range(count)]
    images = write_classes(source, dict.fromkeys(names, 2))
    cifar10_convert.convert(source, data_dir)
    got, training, test = parts(data_dir)
    assert got == names
    assert len(training) == len(test) == count
    for label, name in enumerate(names):
      both = [records[records[:, 0] == label] for records in (training, test)]
      assert [len(records) for records in both] == [1, 1]
      assert as_set(images_of(np.concatenate(both))) == as_set(images[name])
    assert f'Wrote {count} classes to' in capsys.readouterr().out

  def test_names_that_look_the_same(self, source, data_dir, capsys):
    """macOS may write an accent as a character of its own."""
    write_classes(source, {'caf\u00e9': 3, 'cafe\u0301': 3})
    cifar10_convert.convert(str(source), str(data_dir))
    assert ' differ only in the encoding of accents.' in capsys.readouterr().err

  def test_names_that_differ_only_in_case(self, source, data_dir, capsys):
    write_classes(source, dict.fromkeys(['Cat', 'cat', 'dog'], 2))
    cifar10_convert.convert(source, data_dir)
    assert capsys.readouterr().err == (
      'The classes Cat and cat differ only in case.\n'
    )
    assert len(parts(data_dir)[0]) == 3

  def test_order_and_characters(self, source, data_dir):
    names = ['Zebra', 'a b', 'ape', 'çà', '猫']
    write_classes(source, dict.fromkeys(reversed(names), 2))
    cifar10_convert.convert(source, data_dir)
    assert parts(data_dir)[0] == names

  @pytest.mark.parametrize(
    'names, message',
    [
      ([], 'has no sub-folders'),
      (['cat'], "found 1 class \\('cat'\\), but a data set has 2 to 256"),
      ([f'{i}' for i in range(257)], 'found 257 classes, but a data set has 2'),
      (['cat', 'a\nb'], r"the class name 'a\\nb' has a line break"),
      (['cat', 'a\x85b'], r"the class name 'a\\x85b' has a line break"),
      (['cat', ' '], "the class name ' ' is empty"),
      (['cat', 'dog '], "the class name 'dog ' begins or ends with a space"),
      (['cat', 'd\udcff'], r"the class name 'd\\udcff' is not valid UTF-8"),
    ],
    ids=lambda value: f'{len(value)}',
  )
  def test_invalid(self, source, data_dir, names, message):
    os.makedirs(source)
    for name in names:
      os.mkdir(os.path.join(source, name))
    with pytest.raises(UserError, match=message):
      cifar10_convert.convert(source, data_dir)
    assert not os.path.exists(data_dir)


class TestParts:
  def test_given_split(self, source, data_dir, capsys):
    training = write_classes(f'{source}/train', {'a': 3, 'b': 4})
    test = write_classes(f'{source}/test', {'a': 2, 'b': 1}, seed=1)
    cifar10_convert.convert(source, data_dir)
    names, *got = parts(data_dir)
    assert names == ['a', 'b']
    for records, expected in zip(got, [training, test], strict=True):
      for label, name in enumerate(names):
        of_class = records[records[:, 0] == label]
        assert as_set(images_of(of_class)) == as_set(expected[name])
    assert capsys.readouterr().err == ''

  def test_fraction_has_no_effect(self, source, data_dir, capsys):
    write_classes(f'{source}/train', {'a': 3, 'b': 4})
    write_classes(f'{source}/test', {'a': 2, 'b': 1}, seed=1)
    cifar10_convert.convert(source, data_dir, test_fraction=0.5)
    assert len(parts(data_dir)[2]) == 3
    assert '--test_fraction has no effect' in capsys.readouterr().err

  def test_other_parts_are_ignored(self, source, data_dir, capsys):
    for seed, part in enumerate(['train', 'test', 'valid']):
      write_classes(f'{source}/{part}', {'a': 2, 'b': 2}, seed)
    cifar10_convert.convert(source, data_dir)
    assert sum(map(len, parts(data_dir)[1:])) == 8
    assert capsys.readouterr().err == (
      f"Ignored, because not a picture in a class's folder: {source}/valid\n"
    )

  def test_repeated_pictures_are_named(self, source, data_dir, capsys):
    images = write_classes(f'{source}/train', {'a': 2, 'b': 2})
    write_classes(f'{source}/test', {'a': 1}, seed=1)
    write_pictures(f'{source}/test/b', images['b'][:1])
    cifar10_convert.convert(source, data_dir)
    assert capsys.readouterr().err == (
      'The same picture is for testing and for training: '
      f'{source}/test/b/0.png and {source}/train/b/0.png\n'
    )
    assert len(parts(data_dir)[2]) == 2

  def test_accents_may_be_encoded_in_two_ways(self, source, data_dir):
    for part, form in (('train', 'NFC'), ('test', 'NFD')):
      name = unicodedata.normalize(form, 'café')
      write_classes(f'{source}/{part}', {name: 2, 'caff': 3})
    cifar10_convert.convert(source, data_dir)
    names, *both = parts(data_dir)
    assert names == ['caff', unicodedata.normalize('NFC', 'café')]
    for records in both:
      np.testing.assert_array_equal(np.bincount(records[:, 0]), [3, 2])

  def test_classes_differ(self, source, data_dir):
    write_classes(f'{source}/train', {'a': 1, 'b': 1, 'c': 1})
    write_classes(f'{source}/test', {'a': 1, 'b': 1, 'd': 1})
    with pytest.raises(UserError, match="train has 'c'; only test has 'd'"):
      cifar10_convert.convert(source, data_dir)

  @pytest.mark.parametrize(
    'names',
    [
      ['training', 'validation'],
      ['Train', 'Val'],
      ['seg_train', 'seg_test', 'seg_pred'],
      ['train', 'val', 'unlabeled'],
      ['Test Set', 'Training Set'],
    ],
  )
  def test_other_names_of_parts(self, source, data_dir, names):
    for name, classes in zip(names, ['abc', 'ab', 'x'], strict=False):
      write_classes(f'{source}/{name}', dict.fromkeys(classes, 2))
    with pytest.raises(UserError, match='have the same sub-folders. If these'):
      cifar10_convert.convert(source, data_dir)

  def test_a_class_may_be_called_train(self, source, data_dir):
    for name in ('train', 'car', 'testudo'):
      write_classes(f'{source}/{name}', {'red': 2, 'blue': 2})
    cifar10_convert.convert(source, data_dir)
    assert parts(data_dir)[0] == ['car', 'testudo', 'train']

  @pytest.mark.parametrize('other', [[], ['val'], ['valid', 'validation']])
  def test_no_test_part(self, source, data_dir, other):
    for part in ['train', *other]:
      write_classes(f'{source}/{part}', {'a': 2, 'b': 2})
    with pytest.raises(UserError, match='but no test. Name the folder'):
      cifar10_convert.convert(source, data_dir)

  def test_empty_class(self, source, data_dir):
    write_classes(f'{source}/train', {'a': 2, 'b': 2})
    write_classes(f'{source}/test', {'a': 2, 'b': 0})
    with open(f'{source}/test/b/x.txt', 'w'):
      pass
    with pytest.raises(UserError) as error:
      cifar10_convert.convert(source, data_dir)
    assert f'{error.value}' == (
      f'Class b has no pictures in {source}/test/b, only files such as '
      f'{source}/test/b/x.txt.'
    )

  def test_class_without_readable_pictures(self, source, data_dir):
    write_classes(f'{source}/train', {'a': 2, 'b': 2})
    write_classes(f'{source}/test', {'a': 1, 'b': 1}, seed=1)
    with open(f'{source}/test/b/0.png', 'wb') as file:
      file.write(b'x')
    with pytest.raises(UserError, match='Class b has no readable .* testing'):
      cifar10_convert.convert(source, data_dir, skip_unreadable=True)
    assert not os.path.exists(data_dir)

  def test_classes_of_very_different_size_are_named(
    self, source, data_dir, tmp_path, capsys
  ):
    write_classes(source, {'a': 10, 'b': 2, 'c': 4})
    cifar10_convert.convert(source, data_dir)
    assert capsys.readouterr().err == ''
    write_pictures(f'{source}/a/more', random_images(1, seed=1))
    cifar10_convert.convert(source, str(tmp_path / 'second'))
    assert capsys.readouterr().err == (
      'The classes differ much in size: a has 11 pictures, b 2.\n'
    )


@pytest.mark.parametrize('parts', [[''], ['/train', '/test']])
def test_pictures_in_two_classes_are_named(source, data_dir, capsys, parts):
  for seed, part in enumerate(parts):
    images = write_classes(source + part, {'cat': 30, 'dog': 30}, seed)
  more = f'{source}{parts[-1]}/dog/more'
  write_pictures(more, images['cat'][:23])
  cifar10_convert.convert(source, data_dir)
  *lines, last = capsys.readouterr().err.splitlines()
  cats = sorted(f'{source}{parts[-1]}/cat/{k}.png' for k in range(23))
  assert lines == [
    'The same picture is in class cat and in class dog: '
    f'{path} and {more}/{os.path.basename(path)}'
    for path in cats[:20]
  ]
  assert last == 'The same holds for 3 further pictures.'


class TestCifar100:
  @pytest.fixture
  def files(self):
    return make_cifar100()

  @pytest.fixture
  def archive(self, tmp_path, files):
    path = str(tmp_path / 'cifar-100-binary.tar.gz')
    write_archive(path, files)
    return path

  def check(self, data_dir, files):
    names, *got = parts(data_dir)
    assert names == [f'f{i:02}' for i in range(100)]
    for records, name in zip(got, ['train.bin', 'test.bin'], strict=True):
      original = np.frombuffer(files[name], np.uint8).reshape(-1, 3074)
      assert as_set(records) == as_set(original[:, 1:])

  def test_archive(self, archive, data_dir, files, tmp_path):
    cifar10_convert.convert(archive, data_dir)
    self.check(data_dir, files)
    assert len(os.listdir(tmp_path)) == 2  # nothing was extracted

  @pytest.mark.parametrize('inner', ['', '/cifar-100-binary'])
  def test_folder(self, source, data_dir, files, inner):
    os.makedirs(source + inner)
    for name, content in files.items():
      with open(f'{source}{inner}/{name}', 'wb') as file:
        file.write(content)
    cifar10_convert.convert(source, data_dir)
    self.check(data_dir, files)

  def test_other_members_are_not_read(self, tmp_path, data_dir, files):
    path = str(tmp_path / 'x.tgz')
    others = ['../other/train.bin', '../../test.bin', 'sub/test.bin', 'other']
    write_archive(path, {**files, **dict.fromkeys(others, b'x')})
    cifar10_convert.convert(path, data_dir)
    self.check(data_dir, files)

  def test_repeated_records_are_named(self, tmp_path, data_dir, files, capsys):
    files['test.bin'] = (
      files['test.bin'][: 7 * 3074 + 2]
      + files['train.bin'][5 * 3074 + 2 : 6 * 3074]
      + files['test.bin'][8 * 3074 :]
    )
    path = str(tmp_path / 'x.tgz')
    write_archive(path, files)
    cifar10_convert.convert(path, data_dir)
    message = 'test.bin, record 7 and train.bin, record 5\n'
    assert message in capsys.readouterr().err

  @pytest.mark.parametrize(
    'name, change, message',
    [
      (
        'train.bin',
        lambda x: x[:-1],
        'train.bin ends 3073 bytes into a record',
      ),
      ('test.bin', lambda x: b'', 'test.bin is empty'),
      ('test.bin', lambda x: x + b'x', 'test.bin ends 1 bytes into a record'),
      ('test.bin', None, 'there is no test.bin'),
      ('fine_label_names.txt', None, 'there is no fine_label_names.txt'),
      ('fine_label_names.txt', lambda x: x[:-4], 'has 99 instead of 100 names'),
      (
        'train.bin',
        lambda x: x[:3074] + b'\x14' + x[3075:],
        'record 1 of train.bin has the labels 20 and',
      ),
      ('test.bin', lambda x: b'\x00\x64' + x[2:], 'has the labels 0 and 100'),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
  )
  def test_damaged_files(
    self, tmp_path, data_dir, files, name, change, message
  ):
    if change:
      files[name] = change(files[name])
    else:
      del files[name]
    folder = tmp_path / 'folder'
    folder.mkdir()
    for file, content in files.items():
      (folder / file).write_bytes(content)
    write_archive(str(tmp_path / 'x.tgz'), files)
    for path in (folder, tmp_path / 'x.tgz'):
      with pytest.raises(UserError, match=message) as error:
        cifar10_convert.convert(str(path), data_dir)
      assert str(path) in f'{error.value}'
    assert not os.path.exists(data_dir)

  def test_damaged_archives(self, archive, data_dir, files):
    with open(archive, 'rb') as file:
      whole = file.read()
    rng = np.random.RandomState(0)
    cuts = [whole[:length] for length in rng.randint(0, len(whole), 20)]
    for content in [*cuts, whole[:-1], whole[:-9]]:
      with open(archive, 'wb') as file:
        file.write(content)
      with pytest.raises(UserError, match='or it is damaged|is neither'):
        cifar100.read(archive)
    for position in [*rng.randint(20, len(whole), 20), len(whole) - 6]:
      changed = bytearray(whole)
      changed[position] ^= 0x10
      with open(archive, 'wb') as file:
        file.write(changed)
      with pytest.raises(UserError, match='or it is damaged'):
        cifar100.read(archive)

  @pytest.mark.parametrize('content', [b'', b'x', b'\x89PNG' * 1000])
  def test_other_files(self, tmp_path, data_dir, content):
    (tmp_path / 'x').write_bytes(content)
    with pytest.raises(
      UserError, match='x is neither a folder of pictures nor'
    ):
      cifar10_convert.convert(str(tmp_path / 'x'), data_dir)

  @pytest.mark.parametrize(
    'folder, names, message',
    [
      ('cifar-10-batches-py', ['batches.meta', 'data_batch_1'], 'for Python'),
      ('cifar-100-python', ['meta', 'test', 'train'], 'for Python'),
      ('cifar-10-batches-bin', ['data_batch_1.bin'], 'needs no conversion'),
    ],
  )
  def test_other_versions(self, tmp_path, data_dir, folder, names, message):
    inner = tmp_path / 'outer' / folder
    inner.mkdir(parents=True)
    for name in names:
      (inner / name).write_bytes(b'x')
    archive = tmp_path / 'x.tar.gz'
    write_archive(str(archive), dict.fromkeys(names, b'x'), folder)
    for path in (inner, inner.parent, archive):
      with pytest.raises(UserError, match=message):
        cifar10_convert.convert(str(path), data_dir)
    assert not os.path.exists(data_dir)


class TestArguments:
  @pytest.mark.parametrize('fraction', [0, 1, -0.5, 1.5, np.nan, np.inf])
  def test_fraction(self, source, data_dir, fraction):
    write_classes(source, {'a': 2, 'b': 2})
    with pytest.raises(UserError, match='--test_fraction .* is not between'):
      cifar10_convert.convert(source, data_dir, test_fraction=fraction)

  def test_empty_data_dir(self, source, monkeypatch):
    write_classes(source, {'a': 2, 'b': 0})
    monkeypatch.chdir(source)
    with pytest.raises(UserError, match='--data_dir is empty. Name a new'):
      cifar10_convert.convert(source, '')

  @pytest.mark.parametrize('seed', [-1, 1 << 32])
  def test_seed(self, source, data_dir, seed):
    write_classes(source, {'a': 2, 'b': 2})
    with pytest.raises(UserError, match='--seed .* is not between'):
      cifar10_convert.convert(source, data_dir, seed=seed)

  def test_nothing_is_read_if_nothing_could_be_written(self, source, tmp_path):
    write_classes(source, {'a': 2, 'b': 0})
    (tmp_path / 'file').write_text('mine')
    for data_dir, message in (
      (source, 'already contains a, b'),
      (f'{source}/data', 'is inside PICTURES'),
      (str(tmp_path / 'file'), 'Not a directory'),
      (str(tmp_path / 'file' / 'data'), 'Not a directory'),
    ):
      with pytest.raises(UserError, match=message):
        cifar10_convert.convert(source, data_dir)
    assert sorted(os.listdir(tmp_path)) == ['file', 'pictures']
    assert sorted(os.listdir(source)) == ['a', 'b']
