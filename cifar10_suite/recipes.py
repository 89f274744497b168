"""Recipes: sets of training hyperparameters (`--recipe`).

All recipes share the same network and code. `results/recipes.md` explains how
the hyperparameters of `fast` and `long` were chosen.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Training hyperparameters.

  Attributes:
    name: value of `--recipe`.
    batch_size: number of images per batch.
    max_steps: step at which training ends.
    learning_rate: initial or peak learning rate.
    linear: whether the learning rate decays linearly to zero at `max_steps`,
      after a short linear warm-up, instead of by a factor of 0.1 every 350
      epochs.
    optimizer: 'descent' (gradient descent), 'nesterov' (Nesterov momentum) or
      'muon' (`optimizers.MuonOptimizer`).
    momentum: momentum of 'nesterov' and 'muon'.
    weight_decay: factor of the L2 loss of the two hidden fully connected
      layers, which is part of the total loss.
    decoupled_weight_decay: decoupled weight decay of all weights with 'muon',
      in units of the learning rate.
    label_smoothing: probability moved from the label to a uniform distribution
      over all classes.
    dropout: dropout rate of the last feature maps.
    activation_scale: factor of the activations of both convolutions. It
      multiplies the initial filters of conv1 and biases of conv2, and divides
      the initial weights of local3; Muon's steps change to match.
      With 1, as in the tutorial, activations are so small that local response
      normalization changes them by less than 0.1%.
    mixup: concentration of `mixup.mixed`; 0 mixes no images.
    mixup_until: fraction of the steps after which images are no longer mixed.
    whitened: whether to initialize the first filters so that they whiten
      patches of the training images, instead of randomly.
    crop_margin: maximum offset of crops at the first and at the last step: 1 is
      anywhere in the image, 0 only the centre.
    crop_margin_falls_in: fraction of the steps, at the end, over which the crop
      margin changes linearly.
    contrast: bounds of the random contrast factor.
    saturation: bounds of a random saturation factor, or None.
    bfloat16: whether to compute in bfloat16 if the CPU is fast in it.
  """

  name: str
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
  activation_scale: float
  mixup: float
  mixup_until: float
  whitened: bool
  crop_margin: tuple[float, float]
  crop_margin_falls_in: float
  contrast: tuple[float, float]
  saturation: tuple[float, float] | None
  bfloat16: bool


TUTORIAL = Recipe(
  name='tutorial',
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
  activation_scale=1.0,
  mixup=0.0,
  mixup_until=0.0,
  whitened=False,
  crop_margin=(1, 1),
  crop_margin_falls_in=1.0,
  contrast=(0.2, 1.8),
  saturation=None,
  bfloat16=False,
)

FAST = Recipe(
  name='fast',
  batch_size=256,  # Muon's steps are costly; 128 is no better in equal time
  max_steps=4500,  # 23 epochs
  learning_rate=0.015,  # 0.012 and 0.02 are similar, 0.04 is too high
  linear=True,  # small steps at the end reduce the gradient noise
  optimizer='muon',  # learns as much in far fewer steps
  momentum=0.95,  # 0.9 is similar
  weight_decay=0.0,  # decoupled weight decay works better
  decoupled_weight_decay=0.1,  # 0.2 is slightly worse, 0 and 0.5 much worse
  label_smoothing=0.1,  # avoids overconfident predictions
  dropout=0.0,  # does not pay off in so few steps
  activation_scale=20.0,  # normalization adds most between 17 and 32
  mixup=0.0,  # pays off only in many steps
  mixup_until=0.0,
  whitened=True,  # saves the first layer from learning this
  crop_margin=(1, 0),  # variety first; finally the view used in evaluation
  crop_margin_falls_in=0.4,  # over all steps, the network overfits sooner
  contrast=(0.7, 1.3),  # few epochs need little variety
  saturation=None,
  bfloat16=True,  # rounding is small compared with the gradient noise
)

# With this many steps, FAST would overfit. More variety prevents that.
LONG = dataclasses.replace(
  FAST,
  name='long',
  max_steps=45000,  # 230 epochs
  mixup=0.2,  # better than dropout
  mixup_until=0.8,  # finally the images used in evaluation
  saturation=(0.5, 1.5),
  crop_margin=(1, 0.5),  # evaluation with ten views includes these crops
)

RECIPES = {recipe.name: recipe for recipe in (TUTORIAL, FAST, LONG)}
