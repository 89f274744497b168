"""Test the programs on a data set of the user's own classes."""

import glob
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from support.data import (
  IN_FLOAT32,
  TINY_BATCH,
  write_class_names,
  write_records,
)
from support.programs import ROOT, TIMEOUT, run, summaries
from tensorboard.plugins.hparams import metadata as hparams

from cifar10_suite import dataset

NAMES = ['oak tree', 'zebra', 'élan']  # sorted, as folders are


def make(data_dir, names, records_per_file=90):
  """Write two training files and a test file of one noisy picture per class."""
  rng = np.random.RandomState(1)
  batches_dir = os.path.join(data_dir, dataset.BATCHES_DIR)
  os.makedirs(batches_dir)
  pictures = rng.randint(0, 256, [len(names), 4, 4, 3])
  pictures = pictures.repeat(8, 1).repeat(8, 2)
  labels = np.arange(records_per_file) % len(names)
  for name in ('data_batch_1.bin', 'data_batch_2.bin', 'test_batch.bin'):
    images = pictures[labels] + rng.randint(-20, 21, [len(labels), 32, 32, 3])
    images = np.clip(images, 0, 255)
    write_records(os.path.join(batches_dir, name), labels, images)
  write_class_names(batches_dir, names)
  return str(data_dir)


def train(data_dir, train_dir, *flags, steps=60, **kwargs):
  return run(
    'cifar10_train.py',
    f'--data_dir={data_dir}',
    f'--train_dir={train_dir}',
    '--recipe=fast',
    IN_FLOAT32,
    '--batch_size=30' if steps >= 60 else TINY_BATCH,  # a few learn nothing
    f'--max_steps={steps}',
    *flags,
    **kwargs,
  )


def evaluate(data_dir, train_dir, eval_dir, *flags, **kwargs):
  return run(
    'cifar10_eval.py',
    f'--data_dir={data_dir}',
    f'--checkpoint_dir={train_dir}',
    f'--eval_dir={eval_dir}',
    '--run_once',
    *flags,
    **kwargs,
  )


def write_pictures(folder, names, count=60):
  """Write noisy pictures of each class, of many sizes, modes and formats."""
  rng = np.random.RandomState(2)
  patterns = rng.randint(0, 256, [len(names), 4, 4, 3])
  for name, pattern in zip(names, patterns, strict=True):
    os.makedirs(folder / name / 'more')
    for k in range(count):
      noisy = np.clip(pattern + rng.randint(-20, 21, pattern.shape), 0, 255)
      image = PIL.Image.fromarray(noisy.astype(np.uint8))
      # The central square of a wide picture is the pattern.
      side, margin = rng.randint(24, 400), rng.randint(0, 100)
      image = image.resize((side, side), PIL.Image.Resampling.NEAREST)
      wide = PIL.Image.new('RGB', (side + 2 * margin, side))
      wide.paste(image, (margin, 0))
      mode, extension = [
        ('RGB', 'png'),
        ('RGBA', 'png'),
        ('P', 'gif'),
        ('CMYK', 'jpg'),
        ('RGB', 'webp'),
      ][k % 5]
      path = folder / name / ('more' if k % 2 else '') / f'{k}.{extension}'
      wide.convert(mode).save(path)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Directories of pictures, their data set, a run, and its scores."""
  root = tmp_path_factory.mktemp('own')
  write_pictures(root / 'pictures', NAMES)
  for k, name in enumerate(NAMES):
    PIL.Image.open(root / 'pictures' / name / '0.png').save(root / f'{k}.png')
  data_dir = root / 'data'
  program = os.path.join(ROOT, 'cifar10_convert.py')
  result = subprocess.run(
    [sys.executable, program, f'{root}/pictures', f'--data_dir={data_dir}'],
    capture_output=True,
    text=True,
    timeout=TIMEOUT,
  )
  assert result.returncode == 0, result.stderr
  assert '36 pictures for testing' in result.stdout
  train(data_dir, root / 'train')
  page = f'--report={root}/report.html'
  lines, _ = evaluate(data_dir, root / 'train', root / 'eval', page)
  assert any('precision @ 1 = 1.000' in line for line in lines)
  return root


def test_scores_and_report_have_its_class_names(trained):
  with open(trained / 'eval/metrics.jsonl') as file:
    record = json.loads(file.read())
  assert list(record['class_accuracy']) == NAMES
  assert np.array(record['confusion_matrix']).shape == (3, 3)
  assert record['num_examples'] == 36
  assert 'precision_at_5' not in record
  page = (trained / 'report.html').read_text()
  assert all(name in page for name in NAMES) and 'airplane' not in page
  assert '--recipe=fast' in page  # as run.json says
  assert 'training</text>' in page  # the legend of the losses
  best = json.loads((trained / 'eval/best/best.json').read_text())
  assert best['eval_data'] == 'test'


@pytest.mark.parametrize('source', ['train', 'eval/best'])
def test_predicts_and_exports_its_class_names(trained, tmp_path, source):
  flag = f'--checkpoint_dir={trained}/{source}'
  pictures = [str(trained / f'{k}.png') for k in range(3)]
  lines, _ = run('cifar10_predict.py', flag, '--top_k=5', *pictures)
  assert len(lines) == 3 * 4
  for k, name in enumerate(NAMES):
    assert lines[4 * k + 1].split('%')[0].startswith(f'  {name} ')
  export = ('cifar10_predict.py', flag, f'--export_dir={tmp_path}/model')
  _, errors = run(*export, status=1)
  assert 'was trained on other classes' in errors
  run(*export, f'--data_dir={trained}/data')
  model = f'--saved_model={tmp_path}/model'
  lines, _ = run('cifar10_predict.py', model, '--json', *pictures)
  assert [json.loads(line)['classes'][0]['name'] for line in lines] == NAMES


def test_the_run_describes_itself(trained, tmp_path):
  run_json = json.loads((trained / 'train/run.json').read_text())
  assert run_json['class_names'] == NAMES
  (start,) = run_json['starts']
  assert start['step'] == 0 and '--recipe=fast' in start['command']
  assert start['recipe']['name'] == 'fast'
  assert start['recipe']['batch_size'] == 30
  # TensorBoard's tab HPARAMS reads the same.
  (value,) = [
    value
    for _, tag, value in summaries(str(trained / 'eval'))
    if tag == hparams.SESSION_START_INFO_TAG
  ]
  info = hparams.parse_session_start_info_plugin_data(
    value.metadata.plugin_data.content
  )
  assert info.hparams['recipe'].string_value == 'fast'
  assert info.hparams['batch_size'].number_value == 30
  shutil.copytree(trained / 'train', tmp_path / 'train')
  train(trained / 'data', tmp_path / 'train', TINY_BATCH, steps=61)
  run_json = json.loads((tmp_path / 'train/run.json').read_text())
  assert [start['step'] for start in run_json['starts']] == [0, 60]


def test_other_classes_are_refused(trained, tmp_path):
  data_dir = make(tmp_path / 'data', ['a', 'b'])
  says = 'was trained on other classes: oak tree, zebra, élan.'
  _, errors = train(data_dir, trained / 'train', status=1)
  assert says in errors and 'Traceback' not in errors
  _, errors = evaluate(data_dir, trained / 'train', tmp_path / 'eval', status=1)
  assert says in errors and 'Traceback' not in errors


def test_cifar10_is_not_downloaded_for_other_classes(trained, tmp_path):
  says = 'was trained on other classes: oak tree, zebra, élan.'
  none = tmp_path / 'none'
  _, errors = evaluate(none, trained / 'train', tmp_path / 'eval', status=1)
  assert says in errors
  _, errors = train(none, trained / 'train', status=1)
  assert says in errors
  assert not none.exists()
  _, errors = run(
    'cifar10_predict.py',
    f'--checkpoint_dir={trained}/train',
    f'--export_dir={tmp_path}/model',
    f'--data_dir={none}',
    status=1,
  )
  assert says in errors and 'Traceback' not in errors
  assert not none.exists()


def test_twelve_classes_have_top_5(tmp_path):
  names = [f'class {k}' for k in range(12)]
  data_dir = make(tmp_path / 'data', names, records_per_file=120)
  train(data_dir, tmp_path / 'train', steps=2)
  page = f'--report={tmp_path}/report.html'
  lines, _ = evaluate(data_dir, tmp_path / 'train', tmp_path / 'eval', page)
  (line,) = [line for line in lines if 'precision @ 5 = ' in line]
  at_5 = float(line.split()[-1])
  with open(tmp_path / 'eval/metrics.jsonl') as file:
    record = json.loads(file.read())
  assert record['precision_at_5'] == pytest.approx(at_5, abs=5e-4)
  assert record['precision'] <= at_5
  assert f'{record["precision_at_5"]:.1%}' in (
    tmp_path / 'report.html'
  ).read_text(encoding='utf-8')


def test_starts_from_another_run_and_holds_images_out(trained, tmp_path):
  data_dir = make(tmp_path / 'data', [*NAMES, 'yak'], records_per_file=120)
  train_dir = tmp_path / 'train'
  lines, _ = train(
    data_dir, train_dir, f'--init_from={trained}/train', '--hold_out=130'
  )
  (line,) = [line for line in lines if line.startswith('Starting from')]
  assert line.endswith(
    'model.ckpt-60: conv1, conv2, local3, local4; softmax_linear has another '
    'shape'
  )
  lines, _ = evaluate(
    data_dir, train_dir, tmp_path / 'eval', '--eval_data=held_out'
  )
  assert any('of 130 right' in line for line in lines)
  best = json.loads((tmp_path / 'eval/best/best.json').read_text())
  assert best['eval_data'] == 'held_out' and best['precision'] == 1.0


def test_starts_from_the_newest_readable_checkpoint(trained, tmp_path):
  source = tmp_path / 'source'
  shutil.copytree(trained / 'train', source)
  (data,) = source.glob('model.ckpt-60.data-*')
  os.truncate(data, 1000)
  lines, errors = train(
    trained / 'data', tmp_path / 'train', f'--init_from={source}', steps=1
  )
  assert errors == ''
  assert any('Skipped: Cannot read' in line for line in lines)
  assert any(line.startswith(f'Starting from {source}/') for line in lines)


def test_a_run_keeps_holding_out_the_same_images(trained, tmp_path):
  shutil.copytree(trained / 'train', tmp_path / 'train')
  _, errors = train(
    trained / 'data', tmp_path / 'train', '--hold_out=20', steps=70, status=1
  )
  assert 'was trained with --hold_out=0, not 20. Choose another' in errors
  os.remove(tmp_path / 'train/run.json')
  _, errors = train(
    trained / 'data', tmp_path / 'train', '--hold_out=20', steps=70, status=1
  )
  assert 'has no run.json, so it may have been trained on the ima' in errors


def test_nothing_left_to_train_removes_nothing(trained, tmp_path):
  shutil.copytree(trained / 'train', tmp_path / 'train')
  before = sorted(os.listdir(tmp_path / 'train'))
  lines, _ = train(
    trained / 'data', tmp_path / 'train', '--keep_checkpoint_max=1', steps=60
  )
  assert 'is already at step 60: nothing left to train' in lines[-1]
  assert sorted(os.listdir(tmp_path / 'train')) == before


def test_initial_weights_are_those_averages(trained, tmp_path):
  data_dir = trained / 'data'
  train(
    data_dir,
    tmp_path / 'train',
    f'--init_from={trained}/train/model.ckpt-60',
    '--learning_rate=0',
    steps=1,
  )
  lines, _ = evaluate(data_dir, tmp_path / 'train', tmp_path / 'eval')
  assert any('precision @ 1 = 1.000' in line for line in lines)


def test_starting_over_from_nowhere_removes_nothing(trained, tmp_path):
  data_dir = make(tmp_path / 'data', NAMES)
  train(data_dir, tmp_path / 'train', steps=1)
  before = sorted(os.listdir(tmp_path / 'train'))
  flags = ['--restart', '--init_from=nowhere']
  train(data_dir, tmp_path / 'train', *flags, status=1)
  assert sorted(os.listdir(tmp_path / 'train')) == before
  flags[1] = f'--init_from={tmp_path}/train/model.ckpt-1'
  _, errors = train(data_dir, tmp_path / 'train', *flags, status=1)
  assert errors.startswith(f'--restart would delete {tmp_path}/train, which')
  assert sorted(os.listdir(tmp_path / 'train')) == before


def test_images_that_an_earlier_run_has_seen_are_named(trained, tmp_path):
  lines, _ = train(
    trained / 'data',
    tmp_path / 'train',
    f'--init_from={trained}/train',
    '--hold_out=30',
    steps=1,
  )
  says = f'{trained}/train may have been trained on images that --hold_out now'
  assert any(line.startswith(says) for line in lines)


@pytest.mark.parametrize(
  ('flag', 'says'),
  [
    ('--init_from=nowhere', '--init_from nowhere does not exist'),
    ('--hold_out=180', '--hold_out=180 must be less'),
  ],
)
def test_mistaken_flags(tmp_path, flag, says):
  data_dir = make(tmp_path / 'data', NAMES)
  _, errors = train(data_dir, tmp_path / 'train', flag, status=1)
  assert says in errors and 'Traceback' not in errors
  assert not glob.glob(f'{tmp_path}/train/*ckpt*')


def test_held_out_images_need_a_run_that_holds_some_out(trained, tmp_path):
  _, errors = evaluate(
    trained / 'data',
    trained / 'train',
    tmp_path / 'eval',
    '--eval_data=held_out',
    status=1,
  )
  assert 'has no run that holds out images' in errors


@pytest.mark.parametrize(
  ('content', 'says'),
  [
    (b'\x80\x02}q\x01(U\x0bbatch_label' + bytes(5000), 'is a pickle'),
    (bytes([3, 57, *range(256)] + [0] * 2816) * 4, "CIFAR-100's records"),
  ],
)
def test_files_of_other_formats_are_left_alone(tmp_path, content, says):
  path = tmp_path / dataset.BATCHES_DIR / 'data_batch_1.bin'
  path.parent.mkdir()
  path.write_bytes(content)
  _, errors = train(tmp_path, tmp_path / 'train', status=1)
  assert says in errors and len(errors.splitlines()) == 1
  assert os.listdir(path.parent) == ['data_batch_1.bin']
  assert path.read_bytes() == content
