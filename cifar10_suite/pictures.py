"""Conversion of pictures of any format and size to network inputs."""

import contextlib
import glob
import itertools
import os
import warnings
from collections.abc import Iterator

import numpy as np
import PIL.Image
import PIL.ImageOps

from cifar10_suite.errors import UserError

SIZE = 32  # height and width after resizing
_MAX_PIXELS = 50_000_000  # larger pictures take too much memory
_BATCH_SIZE = 128


class PictureError(UserError):
  """Unreadable picture; the message gives the reason."""


def find(arguments: list[str]) -> Iterator[str]:
  """Yield the files that are specified by files, folders and glob patterns.

  In folders, only files with an extension known to Pillow count.
  """
  extensions = PIL.Image.registered_extensions()
  for argument in arguments:
    if os.path.isdir(argument):
      names = sorted(os.listdir(argument))
      found = [
        os.path.join(argument, name)
        for name in names
        if os.path.splitext(name)[1].lower() in extensions
      ]
      yield from found or [argument]
    elif os.path.exists(argument):
      yield argument
    else:
      yield from sorted(glob.glob(argument)) or [argument]


def batches(
  paths: Iterator[str],
) -> Iterator[tuple[list[str], np.ndarray, list[str]]]:
  """Read files in batches.

  Yields:
    paths: paths of the readable files of a batch.
    pictures: uint8 [n, 32, 32, 3], their pictures.
    problems: one error message for each other file.
  """
  paths = iter(paths)
  while some := list(itertools.islice(paths, _BATCH_SIZE)):
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
  if os.path.isdir(path):
    raise PictureError('there are no pictures in this folder.')
  image: PIL.Image.Image  # as opened, then converted to 8 bits
  try:
    with _quiet_decoders(), PIL.Image.open(path) as image:
      if image.width * image.height > _MAX_PIXELS:
        raise PIL.Image.DecompressionBombError
      image.draft('RGB', (4 * SIZE, 4 * SIZE))  # decode large JPEGs at low size
      PIL.ImageOps.exif_transpose(image, in_place=True)
      if image.mode.startswith('I'):  # 16 bits
        image = PIL.Image.fromarray((np.array(image) // 256).astype(np.uint8))
      mode = 'RGBA' if image.has_transparency_data else 'RGB'
      layer = PIL.ImageOps.fit(
        image.convert(mode), (SIZE, SIZE), PIL.Image.Resampling.LANCZOS
      ).convert('RGBA')
    white = PIL.Image.new('RGBA', layer.size, 'white')
    return np.array(PIL.Image.alpha_composite(white, layer).convert('RGB'))
  except (FileNotFoundError, PermissionError) as error:
    raise PictureError(f'{error.strerror}.') from error
  except PIL.UnidentifiedImageError as error:
    raise PictureError('it is not a picture in a known format.') from error
  except (
    PIL.Image.DecompressionBombError,
    PIL.Image.DecompressionBombWarning,
  ) as error:
    raise PictureError(
      f'it has more than {_MAX_PIXELS // 10**6} million pixels.'
    ) from error
  except Exception as error:  # decoders raise anything for damaged files
    raise PictureError(f'it is damaged ({error}).') from error


@contextlib.contextmanager
def _quiet_decoders() -> Iterator[None]:
  """Ignore warnings of decoders, but raise those about excessive size."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    warnings.simplefilter('error', PIL.Image.DecompressionBombWarning)
    yield
