"""Test the reading of pictures."""

import errno
import os
import struct
import zlib

import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import pytest

from cifar10_suite import pictures


def check_bits(path, refused):
  """Read a picture whose pixels are 100, or see it refused for its bits."""
  if refused:
    with pytest.raises(pictures.PictureError, match='of 8 or 16 bits, without'):
      pictures.read_picture(str(path))
  else:
    assert (pictures.read_picture(str(path)) == 100).all()


class TestReadPicture:
  def read(self, tmp_path, image, name='x.png', **options):
    image.save(tmp_path / name, **options)
    return pictures.read_picture(str(tmp_path / name))

  def test_small_pictures_keep_their_pixels(self, tmp_path):
    pixels = np.random.RandomState(1).randint(0, 256, [32, 32, 3], np.uint8)
    got = self.read(tmp_path, PIL.Image.fromarray(pixels))
    np.testing.assert_array_equal(got, pixels)

  @pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'I;16', 'RGBA', 'P'])
  def test_modes(self, tmp_path, mode):
    grey = PIL.Image.new('L', (40, 40), 255)
    if mode == 'I;16':
      image = PIL.Image.fromarray(np.full([40, 40], 65535, np.uint16))
    else:
      image = grey.convert(mode)
    np.testing.assert_array_equal(self.read(tmp_path, image), 255)

  def test_transparency_is_white(self, tmp_path):
    image = PIL.Image.new('RGBA', (40, 40), (0, 0, 0, 0))
    np.testing.assert_array_equal(self.read(tmp_path, image), 255)

  @pytest.mark.parametrize('channels', [1, 3])
  def test_transparent_colour_of_16_bits(self, tmp_path, channels):
    def chunk(name, data):
      check = zlib.crc32(name + data)
      return (
        struct.pack('>I', len(data)) + name + data + struct.pack('>I', check)
      )

    rows = np.full([32, 1 + 64 * channels], 100, np.uint8)  # values 0x6464
    rows[:, 0] = 0  # no filter
    rows[16:, 1:] = 50
    head = struct.pack('>IIBBBBB', 32, 32, 16, channels - 1, 0, 0, 0)
    (tmp_path / 'x.png').write_bytes(
      b'\x89PNG\r\n\x1a\n'
      + chunk(b'IHDR', head)
      + chunk(b'tRNS', b'dd' * channels)
      + chunk(b'IDAT', zlib.compress(rows.tobytes()))
      + chunk(b'IEND', b'')
    )
    got = pictures.read_picture(str(tmp_path / 'x.png'))
    assert (got[:16] == 255).all() and (got[16:] == 50).all()

  def test_camera_rotation(self, tmp_path):
    pixels = np.zeros([64, 64, 3], np.uint8)
    pixels[:, :32] = 255  # white on the left
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # rotate clockwise: the left side becomes the top
    got = self.read(tmp_path, PIL.Image.fromarray(pixels), exif=exif)
    assert got[:14].min() > 240 and got[18:].max() < 15

  @pytest.mark.parametrize('exif', [b'x', b'Exif\x00\x00II*\x00\xff\xff'])
  @pytest.mark.parametrize('kind', ['png', 'jpg', 'webp'])
  def test_damaged_metadata_do_not_matter(self, tmp_path, kind, exif):
    path = tmp_path / f'picture.{kind}'
    PIL.Image.new('RGB', (40, 40), (9, 9, 9)).save(path, exif=exif)
    got = pictures.read_picture(str(path))
    np.testing.assert_allclose(got, 9, atol=2)

  def test_centre_and_antialiasing(self, tmp_path):
    stripes = np.zeros([320, 640, 3], np.uint8)
    stripes[:, 160:480] = np.arange(320)[:, np.newaxis] % 2 * 255
    got = self.read(tmp_path, PIL.Image.fromarray(stripes))
    np.testing.assert_allclose(got[:, 4:-4].astype(float), 127.5, atol=3)

  def test_too_large(self, tmp_path):
    PIL.Image.new('1', (20000, 20000)).save(tmp_path / 'large.png')
    with pytest.raises(pictures.PictureError, match='million pixels'):
      pictures.read_picture(str(tmp_path / 'large.png'))

  def test_large_jpegs_are_decoded_at_low_size(self, tmp_path):
    """Of 105 million pixels; decoding all would take 315 MB."""
    image = PIL.Image.new('L', (10500, 10000), 200)
    path = tmp_path / 'large.jpg'
    image.save(path)
    np.testing.assert_allclose(pictures.read_picture(str(path)), 200, atol=2)
    image.save(path, progressive=True)  # its decoder needs all pixels
    with pytest.raises(pictures.PictureError, match='million pixels'):
      pictures.read_picture(str(path))

  @pytest.mark.parametrize('dtype', [np.int32, np.float32])
  def test_32_bits_are_refused(self, tmp_path, dtype):
    path = tmp_path / 'x.tif'
    PIL.Image.fromarray(np.zeros([40, 40], dtype)).save(path)
    with pytest.raises(pictures.PictureError, match='of 8 or 16 bits, without'):
      pictures.read_picture(str(path))

  @pytest.mark.parametrize(
    ('bits', 'sign', 'zero_is_white', 'refused'),
    [
      (16, 1, False, False),
      (16, 1, True, False),
      (16, 2, False, True),
      (12, 1, False, True),
    ],
  )
  def test_16_bits_of_a_tiff(
    self, tmp_path, bits, sign, zero_is_white, refused
  ):
    tags = {  # of grey pixels, 40 x 40, in one uncompressed strip
      256: 40,
      257: 40,
      258: bits,
      259: 1,
      262: 0 if zero_is_white else 1,
      273: 200,
      277: 1,
      278: 40,
      279: 40 * 40 * bits // 8,
      339: sign,
    }
    entries = [
      struct.pack('<HHIHH', tag, 3, 1, value, 0) for tag, value in tags.items()
    ]
    head = b'II*\0' + struct.pack('<IH', 8, len(tags)) + b''.join(entries)
    value = 155 if zero_is_white else 100
    path = tmp_path / 'x.tif'
    path.write_bytes(
      head.ljust(200, b'\0') + bytes([value] * (40 * 40 * bits // 8))
    )
    check_bits(path, refused)

  @pytest.mark.parametrize(('bits', 'refused'), [(8, False), (16, True)])
  def test_bits_of_fits(self, tmp_path, bits, refused):
    """Pillow swaps the bytes of FITS pictures with 16 bits, and their sign."""
    cards = ['SIMPLE  = T', f'BITPIX  = {bits}', 'NAXIS   = 2']
    cards += ['NAXIS1  = 40', 'NAXIS2  = 40', 'END']
    head = ''.join(card.ljust(80) for card in cards).ljust(2880).encode()
    path = tmp_path / 'x.fits'
    path.write_bytes(head + bytes([100] * (40 * 40 * bits // 8)))
    check_bits(path, refused)

  def test_a_damaged_part_is_not_read_as_black(self, tmp_path):
    rng = np.random.RandomState(1)
    image = PIL.Image.fromarray(rng.randint(0, 256, [50, 60, 3], np.uint8))
    image.save(tmp_path / 'x.png')
    data = bytearray((tmp_path / 'x.png').read_bytes())
    data[data.index(b'IDAT') + 3000] ^= 0xFF
    (tmp_path / 'x.png').write_bytes(data)
    image.save(tmp_path / 'x.tif', compression='tiff_lzw')
    data = (tmp_path / 'x.tif').read_bytes()
    # The directory of a TIFF is at its end.
    middle = bytes(len(data) // 4)
    half = len(data) // 2
    (tmp_path / 'x.tif').write_bytes(
      data[:half] + middle + data[half + len(middle) :]
    )
    for name in ('x.png', 'x.tif'):
      with pytest.raises(pictures.PictureError, match='damaged'):
        pictures.read_picture(str(tmp_path / name))

  def test_a_pipe_does_not_block(self, tmp_path):
    os.mkfifo(tmp_path / 'x.png')
    with pytest.raises(pictures.PictureError, match='not a file'):
      pictures.read_picture(str(tmp_path / 'x.png'))

  def test_other_errors_are_not_called_damage(self, tmp_path, monkeypatch):
    (tmp_path / 'loop.png').symlink_to('loop.png')
    PIL.Image.new('L', (40, 40)).save(tmp_path / 'x.eps')
    monkeypatch.setattr(PIL.EpsImagePlugin, 'gs_binary', False)
    for name, says in (
      ('loop.png', 'Too many levels of symbolic links.'),
      ('x.eps', 'it needs Ghostscript, which is not installed.'),
    ):
      with pytest.raises(pictures.PictureError) as error:
        pictures.read_picture(str(tmp_path / name))
      assert f'{error.value}' == says

  @pytest.mark.parametrize('name', ['x.png', 'x.jpg', 'x.gif', 'x.webp'])
  def test_damaged(self, tmp_path, name):
    rng = np.random.RandomState(1)
    pixels = rng.randint(0, 256, [50, 60, 3], np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    refused = 0
    for _ in range(100):
      data = bytearray(whole[: rng.randint(1, len(whole) + 1)])
      for position in rng.randint(0, len(data), 5):
        data[position] = rng.randint(256)
      (tmp_path / name).write_bytes(data)
      try:
        image = pictures.read_picture(str(tmp_path / name))
        assert image.shape == (32, 32, 3)
      except pictures.PictureError:
        refused += 1
    assert refused > 0


def test_finds_each_picture_once(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ('a/1.png', 'a/b/2.JPG', 'a/b/.3.png', 'a/b/x.txt', 'c/d/4.png'):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  assert pictures.find(['a']) == (['a/1.png'], [], [])
  paths = ['a/1.png', 'a/b/2.JPG']
  assert pictures.find(['a'], recursive=True) == (paths, ['a/b/x.txt'], [])
  twice = ['./a/b/2.JPG', 'a', 'a/*.png', f'{tmp_path}/a/1.png', 'none.png']
  paths = ['./a/b/2.JPG', 'a/1.png', 'none.png']
  assert pictures.find(twice) == (paths, [], [])
  paths, skipped, (problem,) = pictures.find(['c', 'c'])
  assert (paths, skipped) == ([], [])
  assert problem.startswith('Cannot read c: there are no pictures in this')


class TestFind:
  def test_extensions_are_those_of_pictures(self):
    known = pictures.extensions()
    assert {'.png', '.jpg', '.jpeg', '.mpo', '.gif', '.webp'} <= known
    assert not known & {'.pdf', '.palm', '.mpg', '.h5', '.grib', '.txt'}

  @pytest.mark.parametrize('recursive', [False, True])
  def test_folders_without_pictures(self, tmp_path, recursive):
    (tmp_path / '__MACOSX').mkdir()
    (tmp_path / '__MACOSX' / 'x.png').touch()
    found, skipped, (problem,) = pictures.find([str(tmp_path)], recursive)
    assert found == skipped == []
    hint = ' Without --recursive, its sub-folders do not count.'
    assert problem == (
      f'Cannot read {tmp_path}: there are no pictures in this folder.'
      + ('' if recursive else hint)
    )

  def test_formats_that_pillow_cannot_read_are_named(self, tmp_path):
    names = ['a.HEIC', 'b.svg', 'c.dng']
    for name in names:  # DNG is a kind of TIFF, in which Pillow finds a preview
      PIL.Image.new('RGB', (40, 40)).save(tmp_path / name, 'TIFF')
    found, skipped, problems = pictures.find([str(tmp_path)])
    assert found == [f'{tmp_path}/{name}' for name in names]
    assert skipped == problems == []
    ((good, _, problems),) = pictures.batches([*found, f'{tmp_path}/no.heic'])
    assert good == []
    assert problems == [
      *(
        f'Cannot read {path}: Pillow cannot read this format. Save it as JPEG '
        'or PNG.'
        for path in found
      ),
      f'Cannot read {tmp_path}/no.heic: No such file or directory.',
    ]
    # The content counts: cameras and clouds also give this name to JPEGs.
    PIL.Image.new('RGB', (40, 40), 'red').save(tmp_path / 'a.HEIC', 'JPEG')
    assert pictures.read_picture(f'{tmp_path}/a.HEIC').mean() > 80

  def test_patterns_match_folders(self, tmp_path):
    for name in ('photos/cats/a.png', 'photos/dogs/b.png', 'photos/c.txt'):
      (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / name).touch()
    found, skipped, problems = pictures.find([f'{tmp_path}/photos/*s'])
    assert found == [
      f'{tmp_path}/photos/cats/a.png',
      f'{tmp_path}/photos/dogs/b.png',
    ]
    assert skipped == problems == []

  def test_links_to_folders_are_followed(self, tmp_path):
    for name in ('photos/a.png', 'photos/b/c.png', 'more/d.png'):
      (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / name).touch()
    (tmp_path / 'photos' / 'more').symlink_to(tmp_path / 'more')
    (tmp_path / 'photos' / 'b' / 'all').symlink_to('..')
    found, skipped, problems = pictures.find([f'{tmp_path}/photos'], True)
    assert [os.path.relpath(path, f'{tmp_path}/photos') for path in found] == [
      'a.png',
      'b/c.png',
      'more/d.png',
    ]
    assert skipped == [f'{tmp_path}/photos/b/all']
    assert problems == []

  @pytest.mark.parametrize('inner', ['', '/b'])
  def test_unreadable_folders_are_named(self, tmp_path, monkeypatch, inner):
    for name in ('photos/a.png', 'photos/b/c.png', 'd.png'):
      (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / name).touch()
    unreadable = f'{tmp_path}/photos{inner}'
    listdir = os.listdir

    def refuse(folder):
      if folder == unreadable:
        raise PermissionError(errno.EACCES, 'Permission denied', folder)
      return listdir(folder)

    monkeypatch.setattr(os, 'listdir', refuse)
    arguments = [f'{tmp_path}/photos', f'{tmp_path}/d.png']
    found, _, problems = pictures.find(arguments, True)
    first = [f'{tmp_path}/photos/a.png'] if inner else []
    assert found == [*first, f'{tmp_path}/d.png']
    assert problems == [f'Cannot read {unreadable}: Permission denied.']
