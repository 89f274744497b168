"""Test predictions of pictures, and the exported model."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import tensorflow.compat.v1 as tf
from support.network_by_hand import COLOURS, write_network_by_hand
from support.programs import (
  ROOT,
  TIMEOUT,
  Program,
  probabilities,
  rewrite_checkpoint,
  run,
)

import cifar10_predict
from cifar10_suite import checkpoints, dataset


@pytest.fixture
def train_dir(tmp_path):
  path = tmp_path / 'train'
  path.mkdir()
  write_network_by_hand(str(path), 3)
  return str(path)


def colour_image(colour, size=(32, 32), mode='RGB'):
  image = PIL.Image.new('RGB', size, tuple(255 * plane for plane in colour))
  return image.convert(mode)


def predictions(lines):
  """Return the most likely class of each picture, from lines of JSON."""
  records = [json.loads(line) for line in lines]
  return {
    os.path.basename(record['picture']): record['classes'][0]['id']
    for record in records
  }


def test_pictures_of_any_kind(tmp_path, train_dir):
  folder = tmp_path / 'pictures'
  folder.mkdir()
  expected = {}
  kinds = [
    ('a.png', (32, 32), 'RGB'),
    ('b.jpg', (300, 200), 'RGB'),
    ('c.gif', (33, 70), 'P'),
    ('d.png', (1, 1), 'RGBA'),
    ('e.tiff', (500, 40), 'CMYK'),
    ('f.webp', (64, 64), 'RGB'),
  ]
  for (name, size, mode), (colour, label) in zip(
    kinds, COLOURS.items(), strict=True
  ):
    colour_image(colour, size, mode).save(folder / name)
    expected[name] = label
  for name in ('notes.txt', '.hidden', 'x.csv', 'y.csv', 'z.csv'):
    (folder / name).write_text('not a picture')
  flag = f'--checkpoint_dir={train_dir}'
  lines, errors = run(
    'cifar10_predict.py', f'{folder}/a.png', str(folder), '--json', flag
  )
  assert predictions(lines) == expected and len(lines) == len(expected)
  assert errors.splitlines() == [
    f'Using {train_dir}/model.ckpt-3 (step 3).',
    'Skipped what is not a picture: notes.txt, x.csv, y.csv and 1 more',
  ]
  lines, _ = run(
    'cifar10_predict.py', flag, f'{folder}/[ab].*', '--json', '--num_views=10'
  )
  assert predictions(lines) == {
    name: expected[name] for name in expected if name < 'c'
  }

  # Unreadable files are reported; the others are still classified.
  (tmp_path / 'text.jpg').write_text('a text')
  (tmp_path / 'empty').mkdir()
  lines, errors = run(
    'cifar10_predict.py',
    flag,
    f'{tmp_path}/text.jpg',
    f'{tmp_path}/empty',
    f'{tmp_path}/missing.png',
    f'{folder}/a.png',
    '--top_k=2',
    status=1,
  )
  assert [line.split(': ')[0] for line in errors.splitlines()[1:]] == [
    f'Cannot read {tmp_path}/{name}'
    for name in ('empty', 'text.jpg', 'missing.png')
  ]
  assert lines[0] == f'{folder}/a.png' and len(lines) == 3
  name, percent = lines[1].split()
  assert name == dataset.CLASS_NAMES[expected['a.png']]
  assert float(percent.rstrip('%')) > 50


# Uses the model without any module of this project, as users would.
_USER = """
import base64, json, sys
import tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
for line in sys.stdin:
  request = json.loads(line)
  signature = model.signatures[request.get('signature_name', 'serving_default')]
  (name,) = request['instances'][0]
  values = [instance[name] for instance in request['instances']]
  if name == 'encoded':
    values = tf.constant([base64.b64decode(value['b64']) for value in values])
  else:
    values = tf.constant(values, tf.uint8)
  outputs = {key: value.numpy().tolist()
             for key, value in signature(**{name: values}).items()}
  outputs['class_names'] = [name.decode() for name in outputs['class_names']]
  print(json.dumps({'predictions': [
      dict(zip(outputs, row)) for row in zip(*outputs.values())]}))
"""


def ask(model_dir, tmp_path, requests):
  result = subprocess.run(
    [sys.executable, '-c', _USER, str(model_dir)],
    input='\n'.join(map(json.dumps, requests)),
    capture_output=True,
    text=True,
    cwd=tmp_path,
    check=True,
    timeout=120,
  )
  lines = result.stdout.splitlines()
  return [json.loads(line)['predictions'] for line in lines]


def test_exported_model_serves_without_the_project(
  tmp_path, train_dir, data_dir
):
  write_network_by_hand(train_dir, 5)
  flag = f'--checkpoint_dir={train_dir}/model.ckpt-3'
  model_dir = tmp_path / 'model'
  lines, errors = run(
    'cifar10_predict.py',
    flag,
    f'--data_dir={data_dir}',
    f'--export_dir={model_dir}',
  )
  assert errors == f'Using {train_dir}/model.ckpt-3 (step 3).\n'
  assert lines[-1].startswith(f'Exported to {model_dir}: precision ')
  assert (
    os.listdir(tmp_path / 'model') and not (tmp_path / 'model.tmp').exists()
  )

  rng = np.random.RandomState(1)
  pixels = rng.randint(0, 256, [4, 32, 32, 3], np.uint8)
  paths = [f'{tmp_path}/{k}.png' for k in range(4)]
  for path, picture in zip(paths, pixels, strict=True):
    PIL.Image.fromarray(picture).save(path)
  lines, _ = run('cifar10_predict.py', flag, *paths, '--json', '--top_k=10')
  again, _ = run(
    'cifar10_predict.py', f'--saved_model={model_dir}', *paths, '--json'
  )
  assert predictions(again) == predictions(lines)
  expected = probabilities(lines)
  assert expected.shape == (4, 10)

  instances = [{'images': picture.tolist()} for picture in pixels]
  encoded = []
  for path in paths:
    with open(path, 'rb') as file:
      encoded.append({'b64': base64.b64encode(file.read()).decode()})
  requests = [
    {'instances': instances},
    {
      'signature_name': 'encoded',
      'instances': [{'encoded': value} for value in encoded],
    },
  ]
  results = ask(model_dir, tmp_path, requests)
  assert len(results) == 2
  for answers in results:
    got = [answer['probabilities'] for answer in answers]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    for answer, row in zip(answers, expected, strict=True):
      assert answer['class_ids'] == np.argmax(row)
      assert answer['class_names'] == dataset.CLASS_NAMES[np.argmax(row)]


@pytest.mark.parametrize(
  ('flags', 'says'),
  [
    (['x.png'], 'No checkpoint file found in'),
    (['--checkpoint_dir=a/model.ckpt-7', 'x.png'], 'There is no checkpoint'),
    (['--export_dir=.'], '--export_dir . already exists'),
    (['--export_dir=new', 'x.png'], 'takes no pictures: x.png'),
    (['--export_onnx=new', 'x.png'], '--export_onnx exports a model and takes'),
    (['--export_tflite=.'], '--export_tflite . already exists'),
    (['--quantize=int8', 'x.png'], '--quantize is for --export_tflite.'),
    (
      ['--saved_model=m', '--export_onnx=o'],
      '--saved_model does not go together with --checkpoint_dir',
    ),
  ],
)
def test_mistakes(tmp_path, flags, says):
  flags = [f'--checkpoint_dir={tmp_path}', *flags]
  _, errors = run('cifar10_predict.py', *flags, status=1, cwd=tmp_path)
  assert says in errors and 'Traceback' not in errors
  assert len(errors.splitlines()) <= 2
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
  ('flag', 'says'),
  [
    ('--top_k=1', 'There is no exported model in none.'),
    ('--num_views=10', '--saved_model does not go together with --num_views'),
    ('--export_tflite=x', 'not go together with --export_tflite'),
  ],
)
def test_mistakes_with_an_exported_model(tmp_path, flag, says):
  flags = ['--saved_model=none', flag, 'x.png']
  _, errors = run('cifar10_predict.py', *flags, status=1, cwd=tmp_path)
  assert says in errors and len(errors.splitlines()) == 1
  assert not os.listdir(tmp_path)


def test_a_model_of_another_program(tmp_path):
  with tf.Graph().as_default(), tf.Session() as session:
    x = tf.placeholder(tf.float32, [None])
    tf.saved_model.simple_save(session, f'{tmp_path}/x', {'x': x}, {'y': x + 1})
  flags = [f'--saved_model={tmp_path}/x', 'x.png']
  _, errors = run('cifar10_predict.py', *flags, status=1)
  assert errors.startswith(f'{tmp_path}/x is not an export of this network, ')
  assert len(errors.splitlines()) == 1


def test_sub_folders(tmp_path, train_dir):
  for name in ('photos/b', 'more', 'photos/empty'):
    (tmp_path / name).mkdir(parents=True)
  for name in ('photos/a.png', 'photos/b/b.png', 'more/c.png'):
    colour_image((1, 0, 0)).save(tmp_path / name)
  (tmp_path / 'photos' / 'more').symlink_to('../more')
  flags = [f'--checkpoint_dir={train_dir}', '--recursive', '--json']
  lines, _ = run('cifar10_predict.py', *flags, f'{tmp_path}/photos')
  assert list(predictions(lines)) == ['a.png', 'b.png', 'c.png']


def test_a_reader_may_have_enough(tmp_path, train_dir):
  colour_image((1, 0, 0)).save(tmp_path / 'a.png')
  program = os.path.join(ROOT, 'cifar10_predict.py')
  result = subprocess.run(
    f'{sys.executable} {program} --checkpoint_dir={train_dir} '
    f'{" ".join(200 * [f"{tmp_path}/a.png"])} | true',
    shell=True,
    stderr=subprocess.PIPE,
    timeout=TIMEOUT,
  )
  assert result.stderr.startswith(b'Using ')
  assert result.stderr.count(b'\n') == 1


def test_a_signal_is_not_among_the_results(tmp_path, train_dir):
  colour_image((1, 0, 0)).save(tmp_path / 'a.png')
  for k in range(2000):
    (tmp_path / f'{k}.png').symlink_to('a.png')
  flags = [f'--checkpoint_dir={train_dir}', '--json']
  with Program('cifar10_predict.py', *flags, str(tmp_path)) as program:
    program.wait_for('picture')
    program.send_signal(signal.SIGINT)
    status, lines = program.finish()
    assert status == 130
    assert set(predictions(lines).values()) <= {3}
    assert program.errors().endswith(' (step 3).\nStopped by SIGINT.\n')


def test_a_skipped_checkpoint_is_not_among_the_results(tmp_path, train_dir):
  colour_image((1, 0, 0)).save(tmp_path / 'a.png')
  path = write_network_by_hand(train_dir, 9)
  with open(f'{path}.data-00000-of-00001', 'r+b') as file:
    file.truncate(100)
  lines, errors = run(
    'cifar10_predict.py',
    f'--checkpoint_dir={train_dir}',
    '--json',
    str(tmp_path / 'a.png'),
  )
  assert list(predictions(lines)) == ['a.png']
  assert f'Skipped: Cannot read {path}' in errors


def test_a_checkpoint_that_is_not_finite_is_skipped(tmp_path, train_dir):
  """Its predictions would be NaN, which is not JSON."""
  colour_image((1, 0, 0)).save(tmp_path / 'a.png')
  path = write_network_by_hand(train_dir, 9)
  name = 'softmax_linear/biases/ExponentialMovingAverage'
  rewrite_checkpoint(
    path, path, lambda it, old: np.nan * old if it == name else old
  )
  flags = ['--json', str(tmp_path / 'a.png')]
  lines, errors = run(
    'cifar10_predict.py', f'--checkpoint_dir={train_dir}', *flags
  )
  assert list(predictions(lines)) == ['a.png']
  assert f'Skipped: {path} is of a training that diverged: {name}' in errors
  lines, errors = run(
    'cifar10_predict.py', f'--checkpoint_dir={path}', *flags, status=1
  )
  assert lines == []
  assert errors.splitlines()[-1].startswith(f'{path} is of a training that')


@pytest.mark.parametrize('end', ['index', 'data-00000-of-00001'])
def test_a_checkpoint_that_vanishes_meanwhile(train_dir, monkeypatch, end):
  newest_good = checkpoints.newest_good

  def then_delete(*arguments):
    found = newest_good(*arguments)
    os.remove(f'{found[0]}.{end}')
    return found

  monkeypatch.setattr(checkpoints, 'newest_good', then_delete)
  message = f'Cannot read {train_dir}/model.ckpt-3: '
  with pytest.raises(checkpoints.CheckpointError, match=message):
    cifar10_predict.load_checkpoint(train_dir, num_views=1)


@pytest.mark.parametrize('damage', ['variables', 'saved_model.pb'])
def test_a_damaged_model(tmp_path, train_dir, data_dir, damage):
  flags = [f'--checkpoint_dir={train_dir}', f'--data_dir={data_dir}']
  # The slash at the end means the same directory.
  run('cifar10_predict.py', *flags, f'--export_dir={tmp_path}/new/x/')
  path = tmp_path / 'new' / 'x' / damage
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.write_bytes(path.read_bytes()[:1000])
  flags = [f'--saved_model={tmp_path}/new/x', 'x.png']
  _, errors = run('cifar10_predict.py', *flags, status=1)
  assert 'is not an export of this network, or damaged.' in errors
  assert len(errors.splitlines()) == 1
