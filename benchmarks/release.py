"""Write pretrained/ from a training directory: averages, run.json, and a card.

  python benchmarks/release.py runs/reproduce/long-1/train

The card has the scores of the test images.
"""

import argparse
import glob
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

from cifar10_suite import loading

loading.load_tensorflow()

import tensorflow.compat.v1 as tf

from cifar10_suite import checkpoints, files, runs

TARGET = os.path.join(ROOT, 'pretrained')
CARD = os.path.join(HERE, 'model_card.md')  # with {fields}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('train_dir', help='a finished run of long, with --seed 1')
  train_dir = parser.parse_args().train_dir
  if os.path.realpath(train_dir) == os.path.realpath(TARGET):
    parser.error(f'{train_dir} is where the result goes')
  source, run = checkpoints.latest(train_dir), runs.read(train_dir)
  start = run['starts'][-1] if run else {}
  if (
    not source
    or not run
    or (start['recipe']['name'], start.get('seed')) != ('long', 1)
    or checkpoints.step_in_name(source) != runs.last_step(run)
  ):
    parser.error(f'{train_dir} has no finished run of long with seed 1')
  os.makedirs(TARGET, exist_ok=True)
  for old in glob.glob(f'{TARGET}/model.ckpt-*'):
    os.remove(old)
  path = write_averages(source)
  checkpoints.write_state(TARGET, [path])
  start = write_run(run)
  one, ten = score(1), score(10)
  with open(CARD) as card, open(f'{TARGET}/README.md', 'w') as file:
    file.write(card.read().format(**fields(path, start, one, ten)))
  names = sorted(
    name for name in os.listdir(TARGET) if name.startswith('model.ckpt')
  )
  with open(f'{TARGET}/SHA256SUMS', 'w') as file:
    for name in names:
      with open(f'{TARGET}/{name}', 'rb') as part:
        file.write(f'{hashlib.sha256(part.read()).hexdigest()}  {name}\n')


def write_averages(source: str) -> str:
  """Write the moving averages of a checkpoint and the step; return the path."""
  reader = tf.train.load_checkpoint(source)
  with tf.Graph().as_default(), tf.Session() as session:
    variables = {
      name: tf.Variable(reader.get_tensor(name), use_resource=True)
      for name in reader.get_variable_to_shape_map()
      if name.endswith('/ExponentialMovingAverage') or name == 'global_step'
    }
    session.run(tf.global_variables_initializer())
    return tf.train.Saver(variables).save(
      session,
      os.path.join(TARGET, os.path.basename(source)),
      write_meta_graph=False,
      write_state=False,
    )


def write_run(run: dict) -> dict:
  """Write the training's run.json without the directory; return its start."""
  start = run['starts'][-1]
  command = re.sub(r' --train_dir[= ]\S+', '', start['command'])
  start = {**start, 'step': 0, 'command': command}
  files.write_whole(
    os.path.join(TARGET, runs.NAME),
    json.dumps({**run, 'starts': [start]}, indent=1).encode() + b'\n',
  )
  return start


def score(num_views: int) -> dict:
  """Score the test images with the evaluator; return the record."""
  with tempfile.TemporaryDirectory() as directory:
    subprocess.run(
      [
        sys.executable,
        os.path.join(ROOT, 'cifar10_eval.py'),
        '--run_once',
        f'--checkpoint_dir={TARGET}',
        f'--eval_dir={directory}',
        f'--num_views={num_views}',
      ],
      check=True,
    )
    with open(f'{directory}/{files.SCORES}') as file:
      return json.loads(file.readline())


def fields(path: str, start: dict, one: dict, ten: dict) -> dict[str, object]:
  """Return the fields of the card."""
  lower, upper = one['interval']
  ten_lower, ten_upper = ten['interval']
  return {
    'command': f'python {start["command"]}',
    'recipe': start['recipe']['name'],
    'steps': f'{one["step"]:,}',
    'epochs': round(one['step'] * start['recipe']['batch_size'] / 50000),
    'processor': start['processor'],
    'compute_type': start['compute_type'],
    'versions': f'Python {start["versions"]["python"]}, TensorFlow '
    f'{start["versions"]["tensorflow"]}',
    'checkpoint': os.path.basename(path),
    'megabytes': f'{os.path.getsize(f"{path}.data-00000-of-00001") / 1e6:.1f}',
    'one': f'{one["precision"]:.2%} ({lower:.1%} to {upper:.1%})',
    'ten': f'{ten["precision"]:.2%} ({ten_lower:.1%} to {ten_upper:.1%})',
    'one_loss': f'{one["loss"]:.3f}',
    'ten_loss': f'{ten["loss"]:.3f}',
    'classes': '\n'.join(
      f'| {name} | {accuracy:.1%} | {ten["class_accuracy"][name]:.1%} |'
      for name, accuracy in one['class_accuracy'].items()
    ),
  }


if __name__ == '__main__':
  main()
