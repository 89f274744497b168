"""Initial whitening filters for the first convolution."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from cifar10_suite import dataset


def whitening_filters(
  batches_dir: str, image_size: int, size: int, count: int, hold_out: int = 0
) -> np.ndarray:
  """Compute filters whose outputs on training images are nearly uncorrelated.

  Half of the filters are the leading principal components of image patches,
  each divided by its standard deviation, so that detail counts as much as
  brightness. The other half are their negatives, since ReLU passes only one
  sign. From Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (2024),
  section 3.2.

  Args:
    batches_dir: directory of the data files.
    image_size: height and width of the network's crops.
    size: height and width of a filter.
    count: number of filters.
    hold_out: number of images at the end of the training files to leave out.

  Returns:
    float32 [size, size, 3, count]. The standard deviation of their outputs is
    at most 0.2, close to that of random initial filters.
  """
  total = dataset.count_images(False, batches_dir) - hold_out
  positions = np.arange(0, total, total // 1000 + 1)
  some = dataset.read_images(False, batches_dir, positions)
  start = (dataset.HEIGHT - image_size) // 2
  end = start + image_size
  images = some[:, start:end, start:end].astype(np.float32)
  images -= images.mean(axis=(1, 2, 3), keepdims=True)
  images /= np.maximum(images.std(axis=(1, 2, 3), keepdims=True), 1)
  # NumPy's type stub supports only one axis.
  patches = sliding_window_view(  # type: ignore[call-overload]
    images, [size] * 2, (1, 2)
  )
  patches = patches.transpose(0, 1, 2, 4, 5, 3).reshape(
    -1, size**2 * dataset.DEPTH
  )
  variances, components = np.linalg.eigh(
    np.cov(patches, rowvar=False, dtype=np.float32)
  )
  components /= np.sqrt(variances + 0.01)  # avoids amplifying noise
  first = 0.2 * components[:, : -count // 2 - 1 : -1]
  filters = np.concatenate([first, -first], axis=1).astype(np.float32)
  return filters.reshape(size, size, dataset.DEPTH, count)
