"""Precision and other metrics of predictions."""

from typing import TypedDict

import numpy as np
import scipy.stats

_MANY = 10  # classes; with more, precision @ 5 counts, too


class _Always(TypedDict):
  """Results of `measure` for any number of classes."""

  right: int
  num_examples: int
  precision: float
  interval: list[float]
  loss: float
  class_accuracy: dict[str, float | None]
  confusion_matrix: list[list[int]]


class Measures(_Always, total=False):
  """Results of `measure`; precision_at_5 is for more than ten classes."""

  precision_at_5: float


def measure(
  labels: np.ndarray,
  log_probabilities: np.ndarray,
  class_names: tuple[str, ...],
) -> Measures:
  """Compare predictions with labels.

  Args:
    labels: integers [n].
    log_probabilities: float [n, classes], natural logarithms.
    class_names: name of each class.

  Returns:
    right, num_examples: number of images whose most likely class is the label,
      and number of all images.
    precision: ratio of the two.
    interval: 95% confidence interval of the precision (E. B. Wilson, "Probable
      inference, the law of succession, and statistical inference", 1927).
    loss: mean cross entropy in nats.
    class_accuracy: fraction of correct predictions by class name; None for a
      class without images.
    confusion_matrix: number of images by true class (row) and predicted class
      (column).
    precision_at_5: fraction of images whose label is among the five most likely
      classes; only for more than ten classes.
  """
  classes = len(class_names)
  predictions = np.argmax(log_probabilities, axis=1)
  matrix = np.zeros([classes, classes], int)
  np.add.at(matrix, (labels, predictions), 1)
  right, count = int(np.trace(matrix)), len(labels)
  interval = scipy.stats.binomtest(right, count).proportion_ci(method='wilson')
  likelihoods = log_probabilities[np.arange(count), labels]
  measures: Measures = {
    'right': right,
    'num_examples': count,
    'precision': right / count,
    'interval': [float(bound) for bound in interval],
    'loss': -float(np.mean(likelihoods, dtype=np.float64)),
    'class_accuracy': {
      name: float(row[k] / row.sum()) if row.any() else None
      for k, (name, row) in enumerate(zip(class_names, matrix, strict=True))
    },
    'confusion_matrix': matrix.tolist(),
  }
  if classes > _MANY:
    fifth = np.sort(log_probabilities, axis=1)[:, -5]
    measures['precision_at_5'] = float(np.mean(likelihoods >= fifth))
  return measures


def most_confidently_wrong(
  labels: np.ndarray, log_probabilities: np.ndarray, count: int
) -> np.ndarray:
  """Return the positions of wrong predictions, the most confident first.

  Args:
    labels: integers [n].
    log_probabilities: float [n, classes], natural logarithms.
    count: maximum number of positions.
  """
  predictions = np.argmax(log_probabilities, axis=1)
  (wrong,) = np.nonzero(predictions != labels)
  sureness = np.max(log_probabilities[wrong], axis=1)
  return wrong[np.argsort(-sureness, kind='stable')[:count]]
