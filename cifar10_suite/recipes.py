"""Recipes: the numbers by which the network is trained (`--recipe`).

The network and the path of code are the same for all; `results/recipes.md` says
how those of `fast` and `long` were found.
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
      momentum, or orthogonal as well (`optimizers.MuonOptimizer`).
    momentum: of the latter two.
    weight_decay: of the two hidden fully connected layers, as a part of the
      loss.
    decoupled_weight_decay: of all weights, in Muon's steps: what part of them a
      step takes away, over the learning rate.
    label_smoothing: probability that is taken off the labels' classes and
      spread over all ten.
    dropout: part of the last feature maps' values that a training step leaves
      out, at random.
    whitened: whether the first filters start as those that whiten patches of
      the training images, instead of at random.
    crop_margin: how far off the centre a crop may lie, in the first step and in
      the last: 1 is anywhere in the image, 0 the centre only.
    crop_margin_falls_in: the last part of the steps, in which that changes, and
      linearly.
    contrast: bounds of the random factor by which the contrast changes.
    bfloat16: whether to compute in bfloat16, if the processor has it.
  """

  batch_size: int
  max_steps: int
  learning_rate: float
  linear: bool
  optimizer: str
  momentum: float
  weight_decay: float
  decoupled_weight_decay: float
  label_smoothing: float
  dropout: float
  whitened: bool
  crop_margin: tuple[float, float]
  crop_margin_falls_in: float
  contrast: tuple[float, float]
  bfloat16: bool


TUTORIAL = Recipe(
  batch_size=128,
  max_steps=100000,
  learning_rate=0.1,
  linear=False,
  optimizer='descent',
  momentum=0.0,
  weight_decay=0.004,
  decoupled_weight_decay=0.0,
  label_smoothing=0.0,
  dropout=0.0,
  whitened=False,
  crop_margin=(1, 1),
  crop_margin_falls_in=1.0,
  contrast=(0.2, 1.8),
  bfloat16=False,
)

FAST = Recipe(
  batch_size=256,  # orthogonal steps are costly; 128 is no better in equal time
  max_steps=6000,  # 31 epochs
  learning_rate=0.015,  # 0.012 and 0.02 do alike, 0.04 is too high
  linear=True,  # at the end, small steps let the noise die down
  optimizer='muon',  # learns as much in far fewer steps
  momentum=0.95,  # 0.9 does alike
  weight_decay=0.0,  # the next one does more
  decoupled_weight_decay=0.1,  # 0.2 does a little worse, 0 and 0.5 much
  label_smoothing=0.1,  # keeps the network from being too sure
  dropout=0.0,  # does not pay in so few steps
  whitened=True,  # what the first layer would have to learn first
  crop_margin=(1, 0),  # variety first; at last the view that is scored
  crop_margin_falls_in=0.4,  # in all of them, it overfits sooner
  contrast=(0.7, 1.3),  # few epochs do not need much variety
  bfloat16=True,  # its rounding is lost in the noise of the gradients
)

# In so many steps, FAST would learn the training images by heart. This one has
# more variety to the end.
LONG = dataclasses.replace(
  FAST,
  max_steps=33000,  # 169 epochs
  dropout=0.2,  # 0.3 does a little worse
  crop_margin=(1, 0.5),  # the corners are scored too, with ten views
)

RECIPES = {'tutorial': TUTORIAL, 'fast': FAST, 'long': LONG}
