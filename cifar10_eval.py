"""Evaluates the CIFAR-10 network, checkpoint by checkpoint.

  python cifar10_eval.py [--checkpoint_dir cifar10_train] [--eval_dir ...]

Started beside cifar10_train.py, before or after it, this scores each new
checkpoint once: the moving averages of its variables, on each test image once.
"""

import datetime
import os
import sys
from collections.abc import Iterator

import console  # first: it keeps TensorFlow's chatter off the console

# isort: split
import numpy as np
import tensorflow.compat.v1 as tf

import cifar10
import cifar10_input
import download

_HERE = os.path.dirname(os.path.abspath(__file__))

tf.app.flags.DEFINE_string(
  'eval_dir', os.path.join(_HERE, 'cifar10_eval'), 'Directory for event files.'
)
tf.app.flags.DEFINE_enum(
  'eval_data',
  'test',
  ['test', 'train_eval'],
  'Which images: those of the test file, or those of the training files.',
)
tf.app.flags.DEFINE_string(
  'checkpoint_dir',
  os.path.join(_HERE, 'cifar10_train'),
  'Directory where training saves its checkpoints.',
)
tf.app.flags.DEFINE_integer(
  'eval_interval_secs',
  300,
  'Seconds from one evaluation to the next, if there is a new checkpoint.',
  lower_bound=0,
)
tf.app.flags.DEFINE_integer(
  'num_examples',
  10000,
  'Number of images to score, the first ones of the files.',
  lower_bound=1,
)
tf.app.flags.DEFINE_boolean(
  'run_once', False, 'Score the latest checkpoint and end.'
)
tf.app.flags.adopt_module_key_flags(cifar10)
FLAGS = tf.app.flags.FLAGS


def main() -> None:
  console.prepare_dir('--eval_dir', FLAGS.eval_dir)
  cifar10.maybe_download_and_extract()
  with tf.Graph().as_default() as graph:
    images, labels = cifar10_input.inputs(
      FLAGS.eval_data == 'test',
      os.path.join(FLAGS.data_dir, download.BATCHES_DIR),
      FLAGS.batch_size,
      num_epochs=1,
    )
    logits = cifar10.inference(tf.cast(images, cifar10.compute_type()))
    is_right = tf.equal(tf.argmax(logits, axis=1, output_type=tf.int32), labels)
    averages = tf.train.ExponentialMovingAverage(cifar10.MOVING_AVERAGE_DECAY)
    scaffold = tf.train.Scaffold(
      saver=tf.train.Saver(averages.variables_to_restore()),
      summary_op=tf.summary.merge_all(),
    )
    with tf.summary.FileWriter(FLAGS.eval_dir, graph) as writer:
      for checkpoint in checkpoints(
        FLAGS.checkpoint_dir, FLAGS.eval_interval_secs, FLAGS.run_once
      ):
        evaluate(checkpoint, is_right, FLAGS.num_examples, scaffold, writer)


def checkpoints(
  checkpoint_dir: str, interval_secs: float, only_latest: bool
) -> Iterator[str]:
  """Yields the latest checkpoint, then each new one, or no more.

  Args:
    checkpoint_dir: directory to look in.
    interval_secs: seconds from one checkpoint to the next, at least.
    only_latest: whether the latest is all that is wanted.

  Raises:
    SystemExit: only the latest is wanted, and there is none.
  """
  latest = tf.train.latest_checkpoint(checkpoint_dir)
  if latest is None:
    where = console.short_path(checkpoint_dir)
    print(f'No checkpoint file found in {where}')
  if not only_latest:
    yield from tf.train.checkpoints_iterator(checkpoint_dir, interval_secs)
  elif latest is None:
    sys.exit(1)
  else:
    yield latest


def evaluate(
  checkpoint: str,
  is_right: tf.Tensor,
  num_examples: int,
  scaffold: tf.train.Scaffold,
  writer: tf.summary.FileWriter,
) -> float:
  """Scores a checkpoint, prints its precision and writes it as a summary.

  Args:
    checkpoint: the checkpoint's path.
    is_right: bool [batch], whether the network is right about each image of a
      batch; raises `OutOfRangeError` after one pass over the data.
    num_examples: number of images to count.
    scaffold: has a saver, which reads the checkpoint, and a summary_op, which
      is run with the first batch.
    writer: writes the summaries, at the checkpoint's global step.

  Returns:
    The fraction of the images whose likeliest class is the right one.
  """
  step = int(tf.train.load_variable(checkpoint, 'global_step'))
  config = tf.ConfigProto(allow_soft_placement=True)
  config.gpu_options.allow_growth = True  # a trainer may share the GPU
  batches = []
  with tf.train.MonitoredSession(
    tf.train.ChiefSessionCreator(
      scaffold, config=config, checkpoint_filename_with_path=checkpoint
    )
  ) as session:
    batch, summary = session.run([is_right, scaffold.summary_op])
    writer.add_summary(summary, step)
    batches.append(batch)
    while sum(map(len, batches)) < num_examples:
      batches.append(session.run(is_right))
  results = np.concatenate(batches)[:num_examples]
  if len(results) < num_examples:
    sys.exit(
      f'There are {len(results)} images to score, not the {num_examples} of '
      '--num_examples.'
    )
  precision = results.mean()
  writer.add_summary(
    tf.Summary(
      value=[tf.Summary.Value(tag='Precision @ 1', simple_value=precision)]
    ),
    step,
  )
  writer.flush()
  print(f'{datetime.datetime.now()}: precision @ 1 = {precision:.3f}')
  return precision


if __name__ == '__main__':
  console.run(main)
