"""Conversion of pictures of any format and size to network inputs."""

import contextlib
import errno
import functools
import glob
import os
import warnings
from collections.abc import Iterator

import numpy as np
import PIL.Image
import PIL.ImageOps
from PIL.EpsImagePlugin import has_ghostscript
from PIL.TiffImagePlugin import (
  BITSPERSAMPLE,
  PHOTOMETRIC_INTERPRETATION,
  TiffImageFile,
)

from cifar10_suite.errors import UserError

SIZE = 32  # height and width after resizing
_MAX_PIXELS = 50_000_000  # larger pictures take too much memory
_BATCH_SIZE = 128


class PictureError(UserError):
  """Unreadable picture; the message gives the reason."""


# Formats that Pillow recognizes, but reads only with further software, if at
# all, and that are hardly ever pictures.
_UNREADABLE = {'BUFR', 'GRIB', 'HDF5', 'MPEG', 'WMF'}

# Extensions of pictures that Pillow does not read, or only a preview of them.
_FOREIGN = frozenset({
  '.arw', '.cr2', '.dng', '.heic', '.heif', '.jxl', '.nef', '.orf', '.raf',
  '.svg',
})  # fmt: skip


@functools.cache
def extensions() -> frozenset[str]:
  """Return the extensions of pictures, such as '.png'.

  Those that Pillow does not read are among them, so that they are named.
  """
  formats = PIL.Image.registered_extensions()  # also those that it only writes
  readable = PIL.Image.OPEN.keys() - _UNREADABLE | {'MPO'}  # read as JPEG
  return _FOREIGN.union(it for it, name in formats.items() if name in readable)


def find(
  arguments: list[str], recursive: bool = False
) -> tuple[list[str], list[str], list[str]]:
  """Find the files that are specified by files, folders and glob patterns.

  Args:
    arguments: paths and patterns.
    recursive: whether to look into the sub-folders of folders.

  Returns:
    paths: each file once, in the order of the arguments; also arguments that
      are missing.
    skipped: the files in the folders that are not pictures.
    problems: one error message for each folder that cannot be read or has no
      pictures.
  """
  paths: dict[str, str] = {}  # by absolute path
  skipped, problems = [], []
  for argument in arguments:
    matches = [argument]
    if not os.path.lexists(argument):
      matches = sorted(glob.glob(argument)) or matches
    for match in matches:
      found = [match]
      if os.path.isdir(match):
        found, others, errors = in_folder(match, recursive)
        skipped += others
        problems += [
          f'Cannot read {it.filename}: {it.strerror}.' for it in errors
        ]
        if not found and not errors:
          why = 'there are no pictures in this folder.'
          if not recursive:
            why += ' Without --recursive, its sub-folders do not count.'
          problems.append(f'Cannot read {match}: {why}')
      for path in found:
        paths.setdefault(os.path.abspath(path), path)
  return list(paths.values()), skipped, list(dict.fromkeys(problems))


def in_folder(
  folder: str, recursive: bool = True, outer: tuple[str, ...] = ()
) -> tuple[list[str], list[str], list[OSError]]:
  """Find the files with the extension of a picture in a folder.

  Args:
    folder: path of the folder.
    recursive: whether to look into its sub-folders, also into linked ones.
    outer: real paths of the folders around it.

  Returns:
    paths: paths of the pictures.
    others: paths of the other files, and of links that lead out of the folder
      to one around it.
    errors: a reason for each folder that cannot be listed.
  """
  real = os.path.realpath(folder)
  if any(os.path.commonpath([real, it]) == real for it in outer):
    return [], [folder], []
  try:
    folders, files = list_folder(folder)
  except OSError as error:
    return [], [], [error]
  paths: list[str] = []
  others: list[str] = []
  errors: list[OSError] = []
  for path in files:
    # A broken link is an unreadable picture. A pipe would block.
    is_picture = _extension(path) in extensions() and (
      os.path.isfile(path) or not os.path.exists(path)
    )
    (paths if is_picture else others).append(path)
  for name in folders if recursive else []:
    more = in_folder(os.path.join(folder, name), True, (*outer, real))
    paths += more[0]
    others += more[1]
    errors += more[2]
  return paths, others, errors


def list_folder(folder: str) -> tuple[list[str], list[str]]:
  """Return the names of a folder's sub-folders and the paths of its files.

  Hidden files and folders do not count, nor those that macOS adds to archives.
  """
  folders, files = [], []
  for name in sorted(os.listdir(folder)):
    if name.startswith('.') or name == '__MACOSX':
      continue
    path = os.path.join(folder, name)
    if os.path.isdir(path):
      folders.append(name)
    else:
      files.append(path)
  return folders, files


def _extension(path: str) -> str:
  return os.path.splitext(path)[1].lower()


def batches(
  paths: list[str],
) -> Iterator[tuple[list[str], np.ndarray, list[str]]]:
  """Read files in batches.

  Yields:
    paths: paths of the readable files of a batch.
    pictures: uint8 [n, 32, 32, 3], their pictures.
    problems: one error message for each other file.
  """
  for start in range(0, len(paths), _BATCH_SIZE):
    some = paths[start : start + _BATCH_SIZE]
    good, pictures, problems = [], [], []
    for path in some:
      try:
        pictures.append(read_picture(path))
        good.append(path)
      except PictureError as error:
        problems.append(f'Cannot read {path}: {error}')
    yield good, np.array(pictures), problems


def read_picture(path: str) -> np.ndarray:
  """Read a picture in any format that Pillow supports.

  Applies the EXIF orientation, puts transparent pictures on a white background,
  and resizes the central square with antialiasing.

  Returns:
    uint8 [32, 32, 3]. Pixels of a 32x32 picture are unchanged.

  Raises:
    PictureError: if the picture is unreadable.
  """
  if os.path.exists(path) and not os.path.isfile(path):  # a pipe would block
    raise PictureError('it is not a file.')
  is_foreign = _extension(path) in _FOREIGN
  image: PIL.Image.Image  # as opened, then converted to 8 bits
  try:
    with _quiet_decoders(), _open(path) as image:
      if is_foreign and image.format == 'TIFF':  # the preview of a raw file
        raise PIL.UnidentifiedImageError
      if not image.info.get('progressive'):  # whose decoder needs all pixels
        image.draft('RGB', (4 * SIZE, 4 * SIZE))  # decode JPEGs at low size
      if image.width * image.height > _MAX_PIXELS:
        raise PIL.Image.DecompressionBombError
      if image.format == 'EPS' and not has_ghostscript():
        raise PictureError('it needs Ghostscript, which is not installed.')
      image.draft('RGB', (4 * SIZE, 4 * SIZE))
      image.load()
      with contextlib.suppress(Exception):  # damaged EXIF data do not matter
        PIL.ImageOps.exif_transpose(image, in_place=True)
      if not _has_8_or_16_bits(image):
        raise PictureError(
          'only pixels of 8 or 16 bits, without a sign, are supported.'
        )
      if image.mode.startswith('I'):
        image = _from_16_bits(image)
      mode = 'RGBA' if image.has_transparency_data else 'RGB'
      layer = PIL.ImageOps.fit(
        image.convert(mode), (SIZE, SIZE), PIL.Image.Resampling.LANCZOS
      ).convert('RGBA')
    white = PIL.Image.new('RGBA', layer.size, 'white')
    return np.array(PIL.Image.alpha_composite(white, layer).convert('RGB'))
  except PictureError:
    raise
  except PIL.UnidentifiedImageError as error:
    reason = 'it is not a picture in a known format.'
    if is_foreign:
      reason = 'Pillow cannot read this format. Save it as JPEG or PNG.'
    raise PictureError(reason) from error
  except (
    PIL.Image.DecompressionBombError,
    PIL.Image.DecompressionBombWarning,
  ) as error:
    raise PictureError(
      f'it has more than {_MAX_PIXELS // 10**6} million pixels.'
    ) from error
  except Exception as error:  # decoders raise anything for damaged files
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
      raise PictureError(f'{error.strerror}.') from error
    raise PictureError(f'it is damaged ({error}).') from error


def _open(path: str) -> PIL.Image.Image:
  """Open a picture of any size; its pixels are not decoded yet."""
  limit, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
  try:
    return PIL.Image.open(path)
  finally:
    PIL.Image.MAX_IMAGE_PIXELS = limit


def _has_8_or_16_bits(image: PIL.Image.Image) -> bool:
  if image.mode == 'I':
    return image.format == 'PPM'  # other formats have 32 bits, or signs
  if image.mode == 'I;16' and isinstance(image, TiffImageFile):
    return image.tag_v2[BITSPERSAMPLE] == (16,)
  if image.mode == 'I;16' and image.format == 'FITS':  # its bytes are swapped
    return False
  return image.mode != 'F'


def _from_16_bits(image: PIL.Image.Image) -> PIL.Image.Image:
  """Convert a grey picture with 16 bits to 8, with its transparent value."""
  values = np.array(image)
  if (
    isinstance(image, TiffImageFile)
    and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
  ):
    values = 65535 - values  # zero is white, which Pillow ignores
  grey = PIL.Image.fromarray((values // 256).astype(np.uint8))
  if 'transparency' in image.info:
    opaque = values != image.info['transparency']
    grey.putalpha(PIL.Image.fromarray(opaque))
  return grey


@contextlib.contextmanager
def _quiet_decoders() -> Iterator[None]:
  """Ignore warnings of decoders, but raise those about excessive size."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    warnings.simplefilter('error', PIL.Image.DecompressionBombWarning)
    yield
