"""Recipes: the numbers by which the network is trained (`--recipe`).

The network and the path of code are the same for all; `results/recipes.md` says
what each number of `fast` is worth.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How to train.

  Attributes:
    batch_size: number of images per batch.
    max_steps: step at which training ends.
    learning_rate: the highest one.
    linear: whether the learning rate falls linearly, to nothing at `max_steps`,
      after a short rise; otherwise by a factor of 0.1 every 350 epochs.
    optimizer: 'descent', 'nesterov' or 'muon': plain gradient descent, with
      momentum, or orthogonal as well (`cifar10_optimizers.MuonOptimizer`).
    momentum: of the latter two.
    weight_decay: of the two hidden fully connected layers, see
      `cifar10.inference`.
    label_smoothing: probability that is taken off the labels' classes and
      spread over all ten.
    whitened: whether the first filters start as those that whiten patches of
      the training images, instead of at random.
    crop_margin: how many pixels, of 4, a crop lies off the centre at most.
    contrast: bounds of the random factor by which the contrast changes.
  """

  batch_size: int
  max_steps: int
  learning_rate: float
  linear: bool
  optimizer: str
  momentum: float
  weight_decay: float
  label_smoothing: float
  whitened: bool
  crop_margin: int
  contrast: tuple[float, float]


TUTORIAL = Recipe(
  batch_size=128,
  max_steps=100000,
  learning_rate=0.1,
  linear=False,
  optimizer='descent',
  momentum=0.0,
  weight_decay=0.004,
  label_smoothing=0.0,
  whitened=False,
  crop_margin=4,
  contrast=(0.2, 1.8),
)

FAST = Recipe(
  batch_size=256,
  max_steps=4000,
  learning_rate=0.02,
  linear=True,
  optimizer='muon',
  momentum=0.95,
  weight_decay=0.0,
  label_smoothing=0.1,
  whitened=True,
  crop_margin=2,
  contrast=(0.85, 1.15),
)

RECIPES = {'tutorial': TUTORIAL, 'fast': FAST}
