"""Test the evaluator with a network whose predictions are known."""

import base64
import io
import json
import os
import re
import shutil

import numpy as np
import PIL.Image
import pytest
from support.data import write_class_names, write_records
from support.network_by_hand import COLOURS, write_network_by_hand
from support.programs import rewrite_checkpoint, run, summaries

from cifar10_suite import dataset


def write_colours(data_dir, count, name='test_batch.bin'):
  """Write a data file; return its labels and the network's predictions."""
  rng = np.random.RandomState(count)
  batches_dir = os.path.join(data_dir, dataset.BATCHES_DIR)
  os.makedirs(batches_dir, exist_ok=True)
  write_class_names(batches_dir)
  colours = np.array(list(COLOURS))[rng.randint(len(COLOURS), size=count)]
  predictions = np.array([COLOURS[tuple(colour)] for colour in colours])
  labels = np.where(
    rng.rand(count) < 0.7, predictions, rng.randint(10, size=count)
  )
  images = np.broadcast_to(
    255 * colours[:, np.newaxis, np.newaxis], [count, 32, 32, 3]
  )
  write_records(os.path.join(batches_dir, name), labels, images)
  return labels, predictions


def run_eval(tmp_path, *flags):
  lines, errors = run(
    'cifar10_eval.py',
    f'--data_dir={tmp_path}/data',
    f'--checkpoint_dir={tmp_path}/train',
    f'--eval_dir={tmp_path}/eval',
    *flags,
  )
  assert errors == ''
  assert 'holds your own data set' in lines[0]
  return lines[1:]


def read_records(tmp_path):
  text = (tmp_path / 'eval' / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def train_dir(tmp_path):
  path = tmp_path / 'train'
  path.mkdir()
  return str(path)


@pytest.mark.parametrize(
  ('batch_size', 'count', 'num_examples'),
  [
    (1, 37, 37),
    (128, 300, 259),
    *(
      pytest.param(*case, marks=pytest.mark.faults)
      for case in ((7, 131, 131), (10000, 131, 130))
    ),
  ],
)
def test_known_predictions_are_counted_exactly(
  tmp_path, train_dir, batch_size, count, num_examples
):
  write_network_by_hand(train_dir, 123)
  labels, predictions = write_colours(str(tmp_path / 'data'), count)
  labels, predictions = labels[:num_examples], predictions[:num_examples]
  lines = run_eval(
    tmp_path,
    '--run_once',
    f'--batch_size={batch_size}',
    f'--num_examples={num_examples}',
  )
  right = int(np.sum(labels == predictions))
  assert lines[0].endswith(f': precision @ 1 = {right / num_examples:.3f}')
  assert f'step 123: {right} of {num_examples} right' in lines[1]
  assert len(lines) == 2 and len(lines[1]) < 80
  (record,) = read_records(tmp_path)
  assert record['step'] == 123
  assert record['precision'] == right / num_examples
  assert record['confusion_matrix'] == [
    [int(np.sum((labels == i) & (predictions == j))) for j in range(10)]
    for i in range(10)
  ]
  for k, name in enumerate(dataset.CLASS_NAMES):
    of_class = predictions[labels == k]
    accuracy = np.mean(of_class == k) if len(of_class) else None
    assert record['class_accuracy'][name] == accuracy

  points = {
    tag: (step, value) for step, tag, value in summaries(str(tmp_path / 'eval'))
  }
  step, value = points['Precision @ 1']
  assert (step, value.simple_value) == (
    123,
    pytest.approx(right / num_examples),
  )
  assert points['accuracy/cat'][1].simple_value == pytest.approx(
    record['class_accuracy']['cat']
  )
  assert points['cross_entropy'][1].simple_value == pytest.approx(
    record['loss']
  )
  for tag in ('confusion_matrix', 'wrong_images'):
    png = points[tag][1].image.encoded_image_string
    picture = PIL.Image.open(io.BytesIO(png))
    assert picture.size == (
      points[tag][1].image.width,
      points[tag][1].image.height,
    )


def test_training_images_can_be_scored(tmp_path, train_dir):
  write_network_by_hand(train_dir, 123)
  write_colours(tmp_path / 'data', 50)
  parts = [
    write_colours(tmp_path / 'data', count, f'data_batch_{k}.bin')
    for k, count in ((1, 40), (2, 31))
  ]
  labels, predictions = np.concatenate(parts, axis=1)
  lines = run_eval(tmp_path, '--run_once', '--eval_data=train_eval')
  right = np.sum(labels == predictions)
  assert f'step 123: {right} of 71 right' in lines[1]
  (record,) = read_records(tmp_path)
  assert record['eval_data'] == 'train_eval'
  assert sum(record['confusion_matrix'], []) == [
    np.sum((labels == i) & (predictions == j))
    for i in range(10)
    for j in range(10)
  ]


def test_scores_all_once_keeps_the_best_and_reports(tmp_path, train_dir):
  write_network_by_hand(train_dir, 10)
  good = write_network_by_hand(train_dir, 9)
  write_colours(str(tmp_path / 'data'), 50)
  bad = f'{train_dir}/model.ckpt-200'  # always predicts 'airplane'
  rewrite_checkpoint(
    good,
    bad,
    lambda name, old: np.array(200) if 'step' in name else 0 * old,
  )
  flags = ['--num_examples=50', '--report=auto']
  lines = run_eval(tmp_path, *flags, '--all_checkpoints')
  assert [r['step'] for r in read_records(tmp_path)] == [9, 10, 200]
  assert lines[-1] == f'Wrote {tmp_path}/eval/report.html.'
  lines = run_eval(tmp_path, *flags, '--all_checkpoints')
  assert len(lines) == 3
  assert all('has already been scored' in line for line in lines)
  assert len(read_records(tmp_path)) == 3
  # A named checkpoint is scored again, for its report.
  os.remove(tmp_path / 'eval' / 'report.html')
  lines = run_eval(tmp_path, *flags, f'--checkpoint_dir={bad}.index')
  assert 'step 200: ' in lines[1]
  assert lines[-1] == f'Wrote {tmp_path}/eval/report.html.'
  assert len(read_records(tmp_path)) == 3

  page = (tmp_path / 'eval' / 'report.html').read_text()
  record = read_records(tmp_path)[-1]
  assert f'{record["precision"]:.1%}' in page and 'step 200' in page
  pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
  count = record['num_examples'] - record['right']
  assert len(pictures) == min(count, 25) > 0
  for picture in pictures:
    PIL.Image.open(io.BytesIO(base64.b64decode(picture))).verify()

  # The first of two equally good checkpoints, which training has deleted.
  shutil.rmtree(train_dir)
  best = json.loads((tmp_path / 'eval' / 'best' / 'best.json').read_text())
  assert best['step'] == 9
  assert best['precision'] == read_records(tmp_path)[0]['precision']
  lines = run_eval(
    tmp_path,
    '--num_examples=50',
    '--run_once',
    f'--checkpoint_dir={tmp_path}/eval/best',
  )
  assert lines[0].endswith(f'precision @ 1 = {best["precision"]:.3f}')
  assert len(read_records(tmp_path)) == 3
  points = [tag for _, tag, _ in summaries(str(tmp_path / 'eval'))]
  assert points.count('Precision @ 1') == 3
