"""Queue lesson: how TF1 reads files.

  python examples/queue_demo.py [--shuffle] [--num_epochs 5]

Three pictures pass through a filename queue and a reader in each epoch:

  string_input_producer    fills a queue with file names, in a thread
  WholeFileReader          takes a name from the queue and reads the file
  session.run              requests the next picture

The pictures are written to read/test_1.jpg, read/test_2.jpg, ... After five
epochs of three pictures, there are fifteen files, and the queue is empty.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

from cifar10_suite import commands, loading

loading.load_tensorflow()

import tensorflow.compat.v1 as tf

from cifar10_suite import cli, files

_HERE = os.path.dirname(os.path.abspath(__file__))

tf.app.flags.DEFINE_boolean('shuffle', False, 'Shuffle within each epoch.')
tf.app.flags.DEFINE_integer(
  'num_epochs', 5, 'Number of passes over the pictures.', lower_bound=1
)
tf.app.flags.DEFINE_string(
  'output_dir', os.path.join(_HERE, 'read'), 'Directory to write to.'
)
FLAGS = tf.app.flags.FLAGS

NAMES = ['A.jpg', 'B.jpg', 'C.jpg']


def main() -> None:
  cli.prepare_dir('--output_dir', FLAGS.output_dir)
  filenames = [os.path.join(_HERE, 'pictures', name) for name in NAMES]
  contents = []
  for path in filenames:
    with open(path, 'rb') as file:
      contents.append(file.read())

  # Build the graph. Nothing is read yet: operations run later, in a session.
  # With num_epochs, the producer counts epochs in a local variable.
  filename_queue = tf.train.string_input_producer(
    filenames, num_epochs=FLAGS.num_epochs, shuffle=FLAGS.shuffle
  )
  key, value = tf.WholeFileReader().read(filename_queue)

  with tf.Session() as session:
    session.run(tf.local_variables_initializer())
    # Start threads that fill the queue. Without them, the first read would wait
    # forever. The coordinator stops them.
    coordinator = tf.train.Coordinator()
    threads = tf.train.start_queue_runners(session, coordinator)
    count = 0
    try:
      while True:
        # Fetch both in one run: two runs would read two files.
        name, content = session.run([key, value])
        count += 1
        path = os.path.join(FLAGS.output_dir, f'test_{count}.jpg')
        # A copy of another picture, from an earlier run, may be replaced.
        files.write_unless_taken(path, content, contents.__contains__)
        print(
          f'{os.path.basename(name.decode())} -> {commands.short_path(path)}'
        )
    except tf.errors.OutOfRangeError:
      # The queue is closed and empty.
      print(
        f'OutOfRangeError: {FLAGS.num_epochs} epochs of {len(NAMES)} pictures '
        f'make {count}, and the queue is empty.'
      )
    finally:
      coordinator.request_stop()
      coordinator.join(threads)


if __name__ == '__main__':
  cli.run(main)
