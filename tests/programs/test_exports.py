"""Test exported models with the runtimes that people use for them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import zipfile

import numpy as np
import PIL.Image
import pytest
from ai_edge_litert import interpreter as litert
from support.network_by_hand import write_network_by_hand
from support.programs import ROOT, TIMEOUT, probabilities, run

from cifar10_suite import dataset, exports
from cifar10_suite.errors import UserError


@pytest.fixture(scope='module')
def source(tmp_path_factory, data_dir):
  """Flags that name a checkpoint and the data set to compare on."""
  train_dir = tmp_path_factory.mktemp('train')
  write_network_by_hand(str(train_dir), 3)
  return [f'--checkpoint_dir={train_dir}', f'--data_dir={data_dir}']


@pytest.fixture(scope='module')
def pictures():
  """Pictures of all colours, uint8 [n, 32, 32, 3]."""
  rng = np.random.RandomState(1)
  colours = rng.randint(0, 2, [12, 1, 1, 3]) * 200
  noise = rng.randint(0, 56, [12, 32, 32, 3])
  return (colours + noise).astype(np.uint8)


@pytest.fixture(scope='module')
def expected(source, pictures, tmp_path_factory):
  """The probabilities of the checkpoint, float [n, 10]."""
  folder = tmp_path_factory.mktemp('pictures')
  for k, picture in enumerate(pictures):
    PIL.Image.fromarray(picture).save(folder / f'{k:02}.png')
  lines, _ = run(
    'cifar10_predict.py', *source, str(folder), '--json', '--top_k=10'
  )
  return probabilities(lines)


def export(source, *flags, **options):
  lines, errors = run('cifar10_predict.py', *source, *flags, **options)
  assert errors.startswith('Using ') and errors.count('\n') == 1, errors
  return lines[-1]


def test_no_temporary_files_are_left(tmp_path, source):
  """Not even after a kill; the tests' processes do not clean up at exit."""
  temporary = tmp_path / 'temporary'
  temporary.mkdir()
  environment = {'TMPDIR': str(temporary)}
  export(source, f'--export_dir={tmp_path}/model', environment=environment)
  assert os.listdir(temporary) == []


@pytest.mark.parametrize(
  ('quantize', 'max_bytes', 'tolerance'),
  [(None, 4.4e6, 1e-5), ('float16', 2.2e6, 0.01), ('int8', 1.2e6, 0.1)],
)
def test_tflite(
  tmp_path, source, pictures, expected, quantize, max_bytes, tolerance
):
  path = f'{tmp_path}/cifar10.tflite'
  flags = [f'--quantize={quantize}'] if quantize else []
  line = export(source, f'--export_tflite={path}', *flags)
  assert line.startswith(f'Exported to {path}: precision ')
  assert os.path.getsize(path) < max_bytes
  assert os.listdir(tmp_path) == ['cifar10.tflite']

  interpreter = litert.Interpreter(path)
  (argument,) = interpreter.get_input_details()
  (result,) = interpreter.get_output_details()
  assert argument['dtype'] == np.uint8
  for count in (1, len(pictures)):
    interpreter.resize_tensor_input(argument['index'], [count, 32, 32, 3])
    interpreter.allocate_tensors()
    interpreter.set_tensor(argument['index'], pictures[:count])
    interpreter.invoke()
    got = interpreter.get_tensor(result['index'])
    np.testing.assert_allclose(got, expected[:count], atol=tolerance)
  with zipfile.ZipFile(path) as archive:
    names = archive.read('labels.txt').decode().splitlines()
  assert names == dataset.CLASS_NAMES


def test_onnx(tmp_path, source, pictures, expected):
  import onnxruntime

  path = f'{tmp_path}/cifar10.onnx'
  line = export(source, f'--export_onnx={path}')
  assert line.startswith(f'Exported to {path}: precision ')
  session = onnxruntime.InferenceSession(path)
  for count in (1, len(pictures)):
    (got,) = session.run(None, {'images': pictures[:count]})
    assert got.shape == (count, 10) and got.dtype == np.float32
    np.testing.assert_allclose(got, expected[:count], atol=1e-4)
  names = session.get_modelmeta().custom_metadata_map['class_names']
  assert json.loads(names) == dataset.CLASS_NAMES


def test_onnx_needs_a_package(tmp_path, source):
  (tmp_path / 'tf2onnx.py').write_text('raise ImportError("no tf2onnx")')
  program = os.path.join(ROOT, 'cifar10_predict.py')
  result = subprocess.run(
    [sys.executable, program, *source, f'--export_onnx={tmp_path}/model'],
    env={**os.environ, 'PYTHONPATH': str(tmp_path)},
    capture_output=True,
    text=True,
    timeout=TIMEOUT,
  )
  assert result.returncode == 1
  assert 'pip install tf2onnx onnxruntime' in result.stderr
  assert 'Traceback' not in result.stderr
  assert 'model' not in os.listdir(tmp_path)


class TestComparison:
  """A model gets its name only if it is like the checkpoint."""

  reference = exports.Reference(
    images=np.zeros([4, 32, 32, 3], np.uint8),
    labels=np.array([0, 1, 0, 1]),
    probabilities=np.array(2 * [[0.9, 0.1], [0.2, 0.8]], np.float32),
  )

  def export(self, path, change, interrupted_by=None, **kwargs):
    def write(temporary):
      with open(temporary, 'x') as file:
        file.write('model')
      if interrupted_by:
        os.kill(os.getpid(), interrupted_by)

    probabilities = self.reference.probabilities + np.float32(change)
    return exports.export(
      '--flag',
      str(path),
      write,
      lambda _: lambda images: probabilities[: len(images)],
      self.reference,
      **kwargs,
    )

  def test_the_same(self, tmp_path):
    line = self.export(tmp_path / 'model', 1e-6)
    assert line.startswith('precision 1.0000 on 4 test images')
    assert (tmp_path / 'model').read_text() == 'model'

  @pytest.mark.parametrize('change', [0.01, np.nan])
  def test_others_are_not_kept(self, tmp_path, change):
    with pytest.raises(UserError, match='--flag: the model was not kept'):
      self.export(tmp_path / 'model', change)
    assert os.listdir(tmp_path) == []

  def test_quantized_models_are_compared_by_precision(self, tmp_path):
    """One image of a few may be lost."""
    change = np.zeros([4, 2])
    change[2] = [-0.9, 0]
    line = self.export(tmp_path / 'good', change, is_quantized=True)
    assert line.startswith('precision 0.7500 on 4 test images')
    change[0] = [-0.9, 0]
    with pytest.raises(UserError, match='precision 0.5000 on 4 test images'):
      self.export(tmp_path / 'bad', change, is_quantized=True)
    assert os.listdir(tmp_path) == ['good']

  @pytest.mark.parametrize(('lost', 'is_good'), [(3, True), (4, False)])
  def test_quantized_models_may_lose_one_percent(
    self, tmp_path, monkeypatch, lost, is_good
  ):
    reference = exports.Reference(
      *(np.repeat(values, 75, axis=0) for values in self.reference)
    )
    monkeypatch.setattr(self, 'reference', reference)
    change = np.zeros([300, 2])
    change[:lost, 0] = -0.9
    monkeypatch.setattr(exports, '_BATCH_SIZE', 300)
    with contextlib.nullcontext() if is_good else pytest.raises(UserError):
      self.export(tmp_path / 'model', change, is_quantized=True)
    assert os.listdir(tmp_path) == ['model'] * is_good

  def test_quantized_models_are_finite(self, tmp_path):
    change = np.zeros([4, 2])
    change[1, 1] = np.nan  # the largest value for argmax, and the right class
    with pytest.raises(UserError, match='--flag: the model was not kept'):
      self.export(tmp_path / 'model', change, is_quantized=True)
    assert os.listdir(tmp_path) == []

  @pytest.mark.parametrize(
    ('number', 'error', 'arguments'),
    [
      (signal.SIGINT, KeyboardInterrupt, ()),
      (signal.SIGTERM, SystemExit, (143,)),
      (signal.SIGHUP, SystemExit, (129,)),
    ],
  )
  def test_nothing_is_left_after_a_signal(
    self, tmp_path, number, error, arguments
  ):
    with pytest.raises(error) as caught:
      self.export(tmp_path / 'model', 0, interrupted_by=number)
    assert caught.value.args == arguments
    assert os.listdir(tmp_path) == []

  def test_nothing_is_overwritten(self, tmp_path):
    (tmp_path / 'model').write_text('of somebody')
    with pytest.raises(UserError, match='already exists'):
      self.export(tmp_path / 'model', 0)
    assert (tmp_path / 'model').read_text() == 'of somebody'
