"""Evaluate checkpoints of the CIFAR-10 network.

  python cifar10_eval.py [--checkpoint_dir cifar10_train] [--eval_dir ...]

Run this program alongside cifar10_train.py; either may start first. It scores
the newest checkpoint, then waits for a newer one. It uses the moving averages
of the variables, and each test image exactly once. Scores go to the console, to
event files for TensorBoard and to metrics.jsonl. A copy of the best checkpoint
is kept.
"""

import datetime
import os
import sys
from typing import NamedTuple

from cifar10_suite import loading

loading.load_tensorflow()

import numpy as np
import tensorflow.compat.v1 as tf

import cifar10
import cifar10_input
from cifar10_suite import (
  checkpoints,
  cli,
  commands,
  dataset,
  evaluation,
  figures,
  files,
  metrics,
  optimizers,
  processor,
  report,
  runs,
  score_summaries,
  views,
)
from cifar10_suite import scores as scoring
from cifar10_suite.errors import UserError
from cifar10_suite.evaluation import EvalSettings

cli.define_eval_dir()
tf.app.flags.DEFINE_enum(
  'eval_data',
  'test',
  ['test', 'train_eval', 'held_out'],
  'Images to score; held_out are those that training left out.',
)
cli.define_checkpoint_flags()
cli.define_threads_flag()
tf.app.flags.DEFINE_integer(
  'eval_interval_secs',
  300,
  'Seconds from a score to the next look for a checkpoint.',
  lower_bound=0,
)
tf.app.flags.DEFINE_integer(
  'num_examples',
  10000,
  'Number of images to score, the first ones of the files; without this flag, '
  'all test or held-out images.',
  lower_bound=1,
)
tf.app.flags.DEFINE_boolean(
  'run_once', False, 'Score the latest checkpoint and exit.'
)
tf.app.flags.DEFINE_boolean(
  'all_checkpoints', False, 'Score every checkpoint, oldest first, and exit.'
)
tf.app.flags.DEFINE_boolean(
  'until_trained', False, 'Exit when the last step of training is scored.'
)
tf.app.flags.mark_bool_flags_as_mutual_exclusive(
  ['run_once', 'all_checkpoints', 'until_trained']
)
tf.app.flags.DEFINE_integer(
  'timeout_secs',
  None,
  'Exit if no checkpoint appears for this many seconds.',
  lower_bound=1,
)
tf.app.flags.DEFINE_string(
  'report',
  None,
  'HTML file for a report after each score; auto is report.html in --eval_dir.',
)
tf.app.flags.DEFINE_enum(
  'device', 'auto', ['auto', 'cpu'], 'Device to run on; cpu disables GPUs.'
)
tf.app.flags.adopt_module_key_flags(cifar10)
FLAGS = tf.app.flags.FLAGS

_NICENESS = 5  # gives way to training on the same machine


class Evaluation(NamedTuple):
  """Evaluation graph.

  Attributes:
    labels: int32 [batch]; raises `OutOfRangeError` after one pass over the
      images.
    log_probabilities: float32 [batch, classes], for the same images.
    num_examples: number of images to score.
    hold_out: number of held-out images that are scored; 0 for other images.
    variables: the variables to restore, by checkpoint name.
    scaffold: holds the saver that restores a checkpoint, and the summary_op to
      run with the first batch.
  """

  labels: tf.Tensor
  log_probabilities: tf.Tensor
  num_examples: int
  hold_out: int
  variables: dict[str, tf.Variable]
  scaffold: tf.train.Scaffold


def main() -> None:
  if hasattr(os, 'nice'):  # not on Windows
    os.nice(_NICENESS)
  # Use half of the cores, but at least two, and leave the rest to training.
  processor.use_threads(
    FLAGS.num_threads or max(2, processor.usable_cores() // 2)
  )
  if FLAGS.device == 'cpu':
    tf.config.set_visible_devices([], 'GPU')
  cli.prepare_dir('--eval_dir', FLAGS.eval_dir)
  if page := report_path():
    cli.prepare_dir('--report', os.path.dirname(page) or '.')
    report.refuse_to_overwrite(page)
  settings = settings_from_flags()
  runs.refuse_download_for_other_classes(
    checkpoints.directory_of(settings.checkpoint_dir), settings.batches_dir
  )
  cifar10.maybe_download_and_extract()
  class_names = dataset.class_names(settings.batches_dir)
  paths = dataset.evaluation_files(settings.is_test, settings.batches_dir)
  dataset.read_labels(paths, class_names)  # checks them
  any_scored = any_new = False
  with (
    files.locked_dir('--eval_dir', settings.eval_dir),
    tf.Graph().as_default(),
  ):
    hold_out = held_out(settings) if settings.eval_data == 'held_out' else 0
    num_examples = number_to_score(settings, hold_out)
    scores = scoring.Scores(
      settings.eval_dir,
      settings={
        'eval_data': settings.eval_data,
        'num_examples': num_examples,
        'num_views': settings.num_views,
      },
      class_names=class_names,
    )
    runs.refuse_other_classes(
      checkpoints.directory_of(settings.checkpoint_dir), class_names
    )
    network = build_evaluation(
      settings, len(class_names), num_examples, hold_out
    )
    for checkpoint in evaluation.checkpoints_to_score(
      settings, network.variables, scores
    ):
      try:
        any_new |= score(settings, checkpoint, network, scores, class_names)
        any_scored = True
      except checkpoints.CheckpointError as error:
        print(f'Skipped: {error}')
  if not any_scored:
    sys.exit(1)
  if page and any_new:
    print(f'Wrote {commands.short_path(page)}.')


def settings_from_flags() -> EvalSettings:
  """Return the settings from the flags."""
  return EvalSettings(
    batches_dir=os.path.join(FLAGS.data_dir, dataset.BATCHES_DIR),
    num_examples=FLAGS.num_examples if FLAGS['num_examples'].present else None,
    run_once=FLAGS.run_once or bool(checkpoints.named(FLAGS.checkpoint_dir)),
    num_views=int(FLAGS.num_views),
    dtype=cifar10.compute_type(),
    report=report_path(),
    **{
      name: FLAGS[name].value
      for name in (
        'checkpoint_dir',
        'eval_dir',
        'eval_data',
        'batch_size',
        'device',
        'all_checkpoints',
        'until_trained',
        'eval_interval_secs',
        'timeout_secs',
      )
    },
  )


def report_path() -> str | None:
  """Return the path of the report, or None without `--report`."""
  if FLAGS.report == 'auto':
    return os.path.join(FLAGS.eval_dir, 'report.html')
  return FLAGS.report


def number_to_score(settings: EvalSettings, hold_out: int) -> int:
  """Return the number of images to score.

  By default, it is that of all test images or all held-out images; of training
  images, at most 10,000 are scored.

  Args:
    settings: settings from the flags.
    hold_out: number of held-out images; 0 to score other images.

  Raises:
    UserError: if there are fewer images than `--num_examples`.
  """
  count = hold_out or dataset.count_images(
    settings.is_test, settings.batches_dir
  )
  if settings.num_examples is None:
    is_train = settings.eval_data == 'train_eval'
    most = cifar10.NUM_EXAMPLES_PER_EPOCH_FOR_EVAL if is_train else count
    return min(count, most)
  if count < settings.num_examples:
    raise UserError(
      f'There are {count} images to score, not the {settings.num_examples} of '
      '--num_examples.'
    )
  return settings.num_examples


def held_out(settings: EvalSettings) -> int:
  """Return how many images the run in `checkpoint_dir` holds out.

  Raises:
    UserError: if it holds out none, or there is none.
  """
  count = evaluation.wait_for_held_out(settings)
  if not count:
    raise UserError(
      f'--eval_data=held_out: {settings.checkpoint_dir} has no run that holds '
      'out images. Train with --hold_out first.'
    )
  return count


def build_evaluation(
  settings: EvalSettings, num_classes: int, num_examples: int, hold_out: int
) -> Evaluation:
  """Build the evaluation in the default graph.

  Args:
    settings: settings from the flags.
    num_classes: number of classes.
    num_examples: number of images to score.
    hold_out: number of held-out images to read; 0 to read other images.
  """
  images, labels = cifar10_input.inputs(
    settings.is_test,
    settings.batches_dir,
    settings.batch_size,
    num_epochs=1,
    num_views=settings.num_views,
    num_classes=num_classes,
    hold_out=hold_out,
  )
  logits = cifar10.inference(
    tf.cast(images, settings.dtype), num_classes=num_classes
  )
  variables = optimizers.variables_to_restore()
  scaffold = tf.train.Scaffold(
    saver=tf.train.Saver(variables), summary_op=tf.summary.merge_all()
  )
  return Evaluation(
    labels,
    views.average(logits, settings.num_views),
    num_examples,
    hold_out,
    variables,
    scaffold,
  )


def score(
  settings: EvalSettings,
  checkpoint: str,
  network: Evaluation,
  scores: scoring.Scores,
  class_names: tuple[str, ...],
) -> bool:
  """Evaluate a checkpoint, print its precision and record its score.

  Returns:
    Whether it was evaluated: with `run_once`, or if it had no score yet.

  Raises:
    CheckpointError: if the checkpoint is unusable.
    UserError: as `evaluation.refuse_other_data`, or if the data files are gone.
  """
  known = scores.find(checkpoint)
  if known and not settings.run_once:
    print(f'{commands.short_path(checkpoint)} has already been scored.')
    return False
  with checkpoints.copied(checkpoint, settings.eval_dir) as copy:
    run = runs.read(os.path.dirname(copy))
    evaluation.refuse_other_data(
      os.path.dirname(checkpoint), run, network.hold_out, class_names
    )
    # An error if a file is gone.
    dataset.evaluation_files(settings.is_test, settings.batches_dir)
    # The original, because an error names its path.
    step = checkpoints.check(checkpoint, network.variables)
    labels, log_probabilities, summary = evaluate(
      copy, network, evaluation_config(settings.device)
    )
    record = scores.make_record(
      copy,
      step,
      is_latest=not (
        settings.all_checkpoints or checkpoints.named(settings.checkpoint_dir)
      ),
      started=runs.started(run),
      measures=metrics.measure(labels, log_probabilities, class_names),
    )
    wrong = wrong_images(
      settings, labels, log_probabilities, class_names, network.hold_out
    )
    if not known:
      summary = score_summaries.summarize(
        record, wrong, summary, runs.hyperparameters(run)
      )
      scores.add(record, copy, summary, tf.get_default_graph())
  _print(record)
  if not settings.run_once:
    best = max(scores.curve(record), key=lambda it: it['precision'])
    print(f'  best so far: {best["precision"]:.3f} at step {best["step"]}')
  if settings.report:
    report.write_page(
      settings.report,
      os.path.dirname(checkpoint),
      scores.curve(known or record),
      record,
      wrong,
    )
  return True


def evaluate(
  checkpoint: str,
  network: Evaluation,
  config: tf.ConfigProto,
) -> tuple[np.ndarray, np.ndarray, bytes]:
  """Run the network once on each image.

  Args:
    checkpoint: path of the checkpoint to restore.
    network: the evaluation graph.
    config: configuration of the session.

  Returns:
    labels: int32 [num_examples].
    log_probabilities: float32 [num_examples, classes].
    summary: a serialized `tf.Summary` of the first batch.

  Raises:
    UserError: if the files contain fewer images.
  """
  num_examples = network.num_examples
  fetches = [network.labels, network.log_probabilities]
  batches = []
  with tf.train.MonitoredSession(
    tf.train.ChiefSessionCreator(
      network.scaffold,
      config=config,
      checkpoint_filename_with_path=checkpoint,
    )
  ) as session:
    batch, summary = session.run([fetches, network.scaffold.summary_op])
    batches.append(batch)
    # If the files end too early, the session suppresses OutOfRangeError, and
    # the program continues after this block.
    while sum(len(labels) for labels, _ in batches) < num_examples:
      batches.append(session.run(fetches))
  labels, log_probabilities = (
    np.concatenate(parts)[:num_examples] for parts in zip(*batches, strict=True)
  )
  if len(labels) < num_examples:
    raise UserError(
      f'Read only {len(labels)} images instead of {num_examples}: a data file '
      'has changed.'
    )
  return labels, log_probabilities, summary


def evaluation_config(device: str) -> tf.ConfigProto:
  """Return a session configuration that leaves resources to a trainer.

  Args:
    device: 'cpu' to disable GPUs, or 'auto'.
  """
  config = tf.ConfigProto(
    allow_soft_placement=True,
    inter_op_parallelism_threads=1,
  )
  config.gpu_options.allow_growth = True  # allocate only what is needed
  if device == 'cpu':
    config.device_count['GPU'] = 0
  return config


def wrong_images(
  settings: EvalSettings,
  labels: np.ndarray,
  log_probabilities: np.ndarray,
  class_names: tuple[str, ...],
  hold_out: int,
) -> list[figures.WrongImage]:
  """Return the most confident errors.

  Args:
    settings: which images were scored.
    labels: int32 [n], of the first n images of the files, or of the held-out
      ones.
    log_probabilities: float32 [n, classes].
    class_names: name of each class.
    hold_out: number of held-out images; 0 if other images were scored.
  """
  wrong = metrics.most_confidently_wrong(
    labels, log_probabilities, figures.WRONG_IMAGES
  )
  positions = wrong
  if hold_out:
    total = dataset.count_images(False, settings.batches_dir)
    positions = wrong + total - hold_out
  images = dataset.read_images(
    settings.is_test, settings.batches_dir, positions
  )
  predictions = np.argmax(log_probabilities, axis=1)
  return [
    figures.WrongImage(
      image,
      class_names[labels[k]],
      class_names[predictions[k]],
      float(np.exp(log_probabilities[k, predictions[k]])),
    )
    for image, k in zip(images, wrong, strict=True)
  ]


def _print(record: scoring.Record) -> None:
  low, high = record['interval']
  print(
    f'{datetime.datetime.now()}: precision @ 1 = {record["precision"]:.3f}\n'
    f'  step {record["step"]}: {record["right"]} of {record["num_examples"]} '
    f'right, 95% interval {low:.3f} to {high:.3f}, loss {record["loss"]:.3f}'
  )
  if 'precision_at_5' in record:
    print(f'  precision @ 5 = {record["precision_at_5"]:.3f}')


if __name__ == '__main__':
  cli.run(main)
