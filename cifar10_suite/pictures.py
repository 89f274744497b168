"""Pictures of any format and size, as the network takes them."""

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

SIZE = 32  # height and width that pictures are brought to
_MAX_PIXELS = 50_000_000  # of a picture; a larger one takes too much memory
_BATCH_SIZE = 128


class PictureError(UserError):
  """A picture cannot be read; the message says why."""


def find(arguments: list[str]) -> Iterator[str]:
  """Yields the files that arguments stand for: files, folders, patterns.

  Of a folder, those that have the name of a format that Pillow reads.
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
  """Yields paths, pictures and problems, of some files at a time.

  Yields:
    paths: of the files that could be read.
    pictures: uint8 [n, 32, 32, 3], theirs.
    problems: a line for each other file.
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
  """Reads a picture of any format, mode and size that Pillow knows.

  It is turned as its camera says, laid on white where it is transparent, and
  its central square is resized with antialiasing.

  Returns:
    uint8 [32, 32, 3]. A picture of 32 x 32 pixels keeps them as they are.

  Raises:
    PictureError: it cannot be read.
  """
  if os.path.isdir(path):
    raise PictureError('there are no pictures in this folder.')
  image: PIL.Image.Image  # as it is opened, then in 8 bits
  try:
    with _quiet_decoders(), PIL.Image.open(path) as image:
      if image.width * image.height > _MAX_PIXELS:
        raise PIL.Image.DecompressionBombError
      image.draft('RGB', (4 * SIZE, 4 * SIZE))  # reads a large JPEG smaller
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
    raise PictureError('it is no picture of a known format.') from error
  except (
    PIL.Image.DecompressionBombError,
    PIL.Image.DecompressionBombWarning,
  ) as error:
    raise PictureError(
      f'it has more than {_MAX_PIXELS // 10**6} million pixels.'
    ) from error
  except Exception as error:  # a damaged file makes decoders raise anything
    raise PictureError(f'it is damaged ({error}).') from error


@contextlib.contextmanager
def _quiet_decoders() -> Iterator[None]:
  """Leaves out their warnings; one of size is as good as an error."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    warnings.simplefilter('error', PIL.Image.DecompressionBombWarning)
    yield
