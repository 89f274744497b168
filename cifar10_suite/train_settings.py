"""Settings of a training program."""

import dataclasses
import os

import tensorflow.compat.v1 as tf

from cifar10_suite.dataset import BATCHES_DIR, CIFAR10, DataSet
from cifar10_suite.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  """Settings of a training program, from its flags.

  Attributes:
    recipe: hyperparameters, including batch size and number of steps.
    train_dir: directory for checkpoints and event files.
    data_dir: directory of the data set.
    data_set: its classes and number of images.
    hold_out: number of images at the end of the training files to leave out.
    init_from: directory or checkpoint of a run whose weights to start from, or
      None.
    dtype: compute type.
    log_frequency: steps between lines on the console.
    save_checkpoint_secs: maximum number of seconds between checkpoints.
    save_summaries_steps: steps between summaries.
    keep_checkpoint_max: number of checkpoints to keep; 0 keeps all.
    stop_at_precision: precision at which to stop, or None.
    patience: number of scores without a new best after which to stop, or None.
    eval_dir: directory of the scores, for the last two; only read.
    profile_steps: numbers of the first and the last step to profile, or None.
    seed: random seed, or None.
    restart: whether to remove an earlier run from `train_dir` first.
    cluster_timeout_secs: seconds without response after which to give up on a
      task of the cluster.
    scale_learning_rate: whether to multiply the learning rate by the number of
      towers of all workers; with parameter servers, of one worker.
  """

  recipe: Recipe
  train_dir: str
  data_dir: str = ''
  data_set: DataSet = CIFAR10
  hold_out: int = 0
  init_from: str | None = None
  dtype: tf.DType = tf.float32
  log_frequency: int = 100
  save_checkpoint_secs: int = 600
  save_summaries_steps: int = 100
  keep_checkpoint_max: int = 5
  stop_at_precision: float | None = None
  patience: int | None = None
  eval_dir: str = ''
  profile_steps: tuple[int, int] | None = None
  seed: int | None = None
  restart: bool = False
  cluster_timeout_secs: int = 600
  scale_learning_rate: bool = False

  @property
  def batches_dir(self) -> str:
    """Directory of the data files."""
    return os.path.join(self.data_dir, BATCHES_DIR)

  @property
  def stops_by_score(self) -> bool:
    """Whether scores may end training before the last step."""
    return bool(self.stop_at_precision or self.patience)
