"""Test that no fault of machines or users loses training or data.

`make faults` runs all tests; `make test` omits those marked `faults`.
"""

import contextlib
import datetime
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from zlib import crc32

import numpy as np
import PIL.Image
import pytest
import tensorflow.compat.v1 as tf
from support.data import SMALL_RATE, TINY_BATCH, make_data_set
from support.network_by_hand import write_network_by_hand
from support.programs import (
  ROOT,
  TIMEOUT,
  Program,
  rewrite_checkpoint,
  run,
  summaries,
  wait_until,
)

import cifar10_input
from cifar10_suite import dataset, ownership
from cifar10_suite.errors import UserError


@pytest.fixture
def train_dir(request, tmp_path, monkeypatch):
  """The value of `--train_dir`: absolute, or 'relative' as in the tutorial."""
  if getattr(request, 'param', 'absolute') == 'absolute':
    return f'{tmp_path}/train'
  monkeypatch.chdir(tmp_path)  # the programs start there
  return 'train/'


@pytest.fixture
def flags(data_dir, train_dir):
  return [
    f'--data_dir={os.path.relpath(data_dir)}',
    f'--train_dir={train_dir}',
    TINY_BATCH,
    SMALL_RATE,
    '--log_frequency=1',
  ]


def values_of(checkpoint):
  """Return the values in a checkpoint by name; fail if it is damaged."""
  reader = tf.train.load_checkpoint(checkpoint)
  return {
    name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()
  }


def resumed_from(lines):
  (line,) = (line for line in lines if line.startswith('Resuming from step '))
  return int(line.rpartition(' ')[2])


def kill_shards(count, kills):
  """Parameters of a short test, and of a long one in `count` parallel parts."""
  parts = range(1, count + 1)
  return [
    (0, 2),
    *(pytest.param(k, kills, marks=pytest.mark.faults) for k in parts),
  ]


def half_saved(train_dir):
  """Return the names of temporary files of current and killed saves."""
  with contextlib.suppress(FileNotFoundError):
    return {name for name in os.listdir(train_dir) if 'temp' in name}
  return set()


def wait_for_saving(train_dir):
  """Wait until a trainer starts to save."""
  before = half_saved(train_dir)
  wait_until(lambda: half_saved(train_dir) - before, pause=0.001)


def times_of_steps(lines):
  """Return the times at which the steps were printed, in seconds."""
  return {
    int(step): datetime.datetime.fromisoformat(when).timestamp()
    for when, step in re.findall(
      r'^(\S+ \S+): step (\d+), ', '\n'.join(lines), re.M
    )
  }


@pytest.mark.parametrize(
  'train_dir',
  ['absolute', pytest.param('relative', marks=pytest.mark.faults)],
  indirect=True,
)
@pytest.mark.parametrize(('shard', 'kills'), kill_shards(4, 25))
def test_kills_of_a_trainer(flags, train_dir, shard, kills, record_fault):
  """Kill the trainer during a save or at a random moment, in turn.

  The loss is at most the second between two checkpoints, one step and one save.
  """
  flags = [*flags, '--save_checkpoint_secs=1']
  rng = np.random.RandomState(shard)
  saved, worst = 0, 0.0
  for k in range(kills):
    with Program('cifar10_train.py', *flags) as trainer:
      if k % 2:
        time.sleep(rng.uniform(0, 4))
      else:
        for _ in range(rng.randint(1, 3)):
          wait_for_saving(train_dir)
      killed = time.time()
      trainer.send_signal(signal.SIGKILL)
      status, lines = trainer.finish()
      assert (status, trainer.errors()) == (-signal.SIGKILL, '')
    if not os.path.exists(f'{train_dir}/checkpoint'):
      assert saved == 0
      continue
    latest = tf.train.latest_checkpoint(train_dir)
    step = int(values_of(latest)['global_step'])  # fails if a file is missing
    assert step >= saved
    saved = step
    worst = max(worst, killed - times_of_steps(lines).get(step, killed))
  assert worst < 1 + 3
  lines, errors = run('cifar10_train.py', *flags, f'--max_steps={saved + 100}')
  assert errors == ''
  # A trainer that is killed before its first save leaves nothing to resume.
  assert saved == 0 or resumed_from(lines) >= saved
  assert summaries(train_dir)  # the event files are readable
  record_fault('training killed', kills, worst)


@pytest.mark.faults
@pytest.mark.parametrize(('shard', 'kills'), kill_shards(4, 25))
def test_kills_of_an_evaluator(data_dir, tmp_path, shard, kills, record_fault):
  """Each checkpoint is scored once, whenever the evaluator is killed."""
  train_dir, eval_dir = tmp_path / 'train', tmp_path / 'eval'
  train_dir.mkdir()
  steps = list(range(kills + 5))
  for step in steps:
    write_network_by_hand(str(train_dir), step)
  flags = [
    f'--data_dir={data_dir}',
    f'--checkpoint_dir={train_dir}',
    f'--eval_dir={eval_dir}',
    '--num_examples=100',
    '--all_checkpoints',
  ]
  rng = np.random.RandomState(shard)
  for _ in range(kills):
    with Program('cifar10_eval.py', *flags) as evaluator:
      time.sleep(rng.uniform(0, 3))
      evaluator.send_signal(signal.SIGKILL)
      _, lines = evaluator.finish()
      assert evaluator.errors() == ''
  # On a machine under load, all checkpoints may remain to be scored.
  lines, errors = run('cifar10_eval.py', *flags, timeout=5 * TIMEOUT)
  assert errors == ''
  with open(eval_dir / 'metrics.jsonl') as file:
    records = [json.loads(line) for line in file]
  assert [record['step'] for record in records] == steps
  assert len({record['right'] for record in records}) == 1
  assert summaries(eval_dir)
  values_of(tf.train.latest_checkpoint(f'{eval_dir}/best'))
  record_fault('evaluation killed', kills)


@pytest.mark.parametrize(
  'kind',
  [
    'cut data',
    pytest.param('cut index', marks=pytest.mark.faults),
    pytest.param('no data', marks=pytest.mark.faults),
    pytest.param('flipped', marks=pytest.mark.faults),
  ],
)
def test_damaged_checkpoints_are_skipped(flags, train_dir, kind, record_fault):
  run('cifar10_train.py', *flags, '--max_steps=3')
  newest = os.path.join(train_dir, 'model.ckpt-3')
  data, index = f'{newest}.data-00000-of-00001', f'{newest}.index'
  if kind == 'cut data':
    os.truncate(data, os.path.getsize(data) // 2)
  elif kind == 'cut index':
    os.truncate(index, os.path.getsize(index) // 2)
  elif kind == 'no data':
    os.remove(data)
  else:
    with open(data, 'r+b') as file:
      file.seek(os.path.getsize(data) // 2)
      file.write(b'flipped')
  lines, errors = run('cifar10_train.py', *flags, '--max_steps=5')
  assert errors == '' and 'Resuming from step 0' in lines
  with open(os.path.join(train_dir, 'run.json')) as file:
    assert len(json.load(file)['starts']) == 2
  assert any(
    line.startswith(f'Skipped: Cannot read {newest}: ') for line in lines
  )
  assert values_of(os.path.join(train_dir, 'model.ckpt-5'))['global_step'] == 5
  lines, errors = run('cifar10_train.py', *flags, '--max_steps=6')
  assert errors == '' and 'Resuming from step 5' in lines
  record_fault('the newest checkpoint damaged')


@pytest.mark.faults
def test_a_lost_state_file_loses_nothing(flags, tmp_path, record_fault):
  run('cifar10_train.py', *flags, '--max_steps=3')
  (tmp_path / 'train' / 'checkpoint').unlink()
  for step in (3, 4):
    lines, errors = run('cifar10_train.py', *flags, f'--max_steps={step + 1}')
    assert errors == '' and resumed_from(lines) == step
  record_fault('the state file lost or cut short')


def test_a_second_trainer_is_refused(flags, train_dir, record_fault):
  with Program('cifar10_train.py', *flags) as first:
    first.wait_for(': step 1, ')
    _, errors = run('cifar10_train.py', *flags, '--restart', status=1)
    host = re.escape(socket.gethostname())
    pattern = (
      rf'.*{train_dir} is in use by process \d+ on {host}\. Stop that.*\n'
    )
    assert re.fullmatch(pattern, errors)
    first.wait_for(', loss = ')  # it continues
    first.send_signal(signal.SIGKILL)
    first.finish()
  # The lock ended with its process.
  lines, errors = run('cifar10_train.py', *flags, '--max_steps=3')
  assert errors == ''
  record_fault('a second trainer in one directory')


@pytest.mark.parametrize(
  'signals',
  [
    pytest.param([first, *second], marks=pytest.mark.faults)
    for first in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for second in ([], [signal.SIGINT], [signal.SIGTERM])
  ],
)
def test_signals_save_once(flags, tmp_path, signals, record_fault):
  rng = np.random.RandomState(1)
  for _ in range(5):
    with Program('cifar10_train.py', *flags) as trainer:
      for _ in range(rng.randint(1, 50)):
        trainer.wait_for(', loss = ')
      for number in signals:
        trainer.send_signal(number)
      status, lines = trainer.finish()
      assert trainer.errors() == ''
    assert status in {128 + number for number in signals}
    step = int(re.search(r'step (\d+) is saved', lines[-1])[1])
    path = tf.train.latest_checkpoint(f'{tmp_path}/train')
    assert values_of(path)['global_step'] == step
  record_fault('one or two signals', 5)


def run_on_a_full_disk(limit, program, *flags, notes=0):
  """Run a program that must fail because no file may exceed `limit` bytes.

  It prints `notes` lines before the error.
  """
  result = subprocess.run(
    [sys.executable, os.path.join(ROOT, program), *flags],
    capture_output=True,
    text=True,
    timeout=TIMEOUT,
    preexec_fn=lambda: resource.setrlimit(
      resource.RLIMIT_FSIZE, (limit, limit)
    ),
  )
  assert result.returncode == 1
  lines = result.stderr.splitlines()[notes:]
  assert len(lines) == 1 and lines[0].startswith('Cannot write to ')


@pytest.mark.parametrize(
  'limit', [3_000_000, pytest.param(100_000, marks=pytest.mark.faults)]
)
def test_a_full_disk_leaves_the_last_checkpoint(
  flags, tmp_path, limit, record_fault
):
  run('cifar10_train.py', *flags, '--max_steps=3')
  path = tf.train.latest_checkpoint(f'{tmp_path}/train')
  before = values_of(path)
  run_on_a_full_disk(limit, 'cifar10_train.py', *flags)
  assert tf.train.latest_checkpoint(f'{tmp_path}/train') == path
  after = values_of(path)
  for name, value in before.items():
    np.testing.assert_array_equal(after[name], value)
  lines, errors = run('cifar10_train.py', *flags, '--max_steps=5', '--restart')
  assert errors == ''  # --restart accepts the files left by the failure
  record_fault('a full disk')


@pytest.mark.parametrize(
  'limit', [10, pytest.param(1_000_000, marks=pytest.mark.faults)]
)
def test_a_full_disk_keeps_a_checkpoint_from_being_scored(
  flags, tmp_path, limit, record_fault
):
  write_network_by_hand(f'{tmp_path}/train', 1)
  command = ['cifar10_eval.py', '--run_once', '--num_examples=100']
  command += [
    f'--checkpoint_dir={tmp_path}/train',
    f'--eval_dir={tmp_path}/eval',
  ]
  command += [flag for flag in flags if flag.startswith('--data_dir')]
  run_on_a_full_disk(limit, *command)
  lines, errors = run(*command)
  assert errors == '' and 'precision @ 1' in lines[-2]
  record_fault('a full disk')


@pytest.mark.faults
def test_a_full_disk_keeps_an_export_from_being_written(flags, tmp_path):
  run('cifar10_train.py', *flags, '--max_steps=1')
  run_on_a_full_disk(
    1_000_000,
    'cifar10_predict.py',
    f'--checkpoint_dir={tmp_path}/train',
    f'--export_dir={tmp_path}/export',
    *[flag for flag in flags if flag.startswith('--data_dir')],
    notes=1,  # names the checkpoint
  )


def test_nan_among_the_summaries(flags, tmp_path, record_fault):
  path = write_network_by_hand(f'{tmp_path}/train', 2)
  # These values make the loss finite, but let one of the gradients overflow.
  signs = np.random.RandomState(1).choice([-1.0, 1.0], [192, 10])
  large = {
    'local3/biases': 1e4,
    'local4/weights': 0,
    'local4/biases': 1e-30,
    'softmax_linear/weights': 1e37 * signs,
  }
  rewrite_checkpoint(
    path,
    path,
    lambda name, old: np.full_like(old, large[name]) if name in large else old,
  )
  before = values_of(path)
  _, errors = run(
    'cifar10_train.py',
    *flags,
    '--save_summaries_steps=1',
    '--log_frequency=100',
    status=1,
  )
  assert 'diverged at step 2: a summarized value is not finite' in errors
  assert len(errors.splitlines()) == 1
  assert tf.train.latest_checkpoint(f'{tmp_path}/train') == path
  np.testing.assert_array_equal(
    values_of(path)['conv1/weights'], before['conv1/weights']
  )
  record_fault('a value that is not finite')


def test_data_that_disappears(flags, tmp_path, record_fault):
  data_dir = make_data_set(str(tmp_path / 'data'))
  flags = [*flags, f'--data_dir={data_dir}']
  with Program('cifar10_train.py', *flags) as trainer:
    trainer.wait_for(': step 2, ')
    shutil.rmtree(os.path.join(data_dir, dataset.BATCHES_DIR))
    status, _ = trainer.finish()
    errors = trainer.errors()
  assert status == 1
  assert re.match(r'Training stopped at step \d+: .*\.bin; No such', errors)
  assert len(errors.splitlines()) == 1
  values_of(tf.train.latest_checkpoint(f'{tmp_path}/train'))
  record_fault('a data file gone')


def test_data_that_is_cut_short(flags, tmp_path, record_fault):
  """A file truncated between two records is readable, but must be detected."""
  data_dir = make_data_set(str(tmp_path / 'data'))
  flags = [*flags, f'--data_dir={data_dir}', '--save_checkpoint_secs=1']
  victim = os.path.join(data_dir, dataset.BATCHES_DIR, 'data_batch_3.bin')
  with Program('cifar10_train.py', *flags) as trainer:
    trainer.wait_for(': step 2, ')
    size = os.path.getsize(victim)
    os.truncate(victim, size // 3073 // 2 * 3073)
    status, _ = trainer.finish()
    errors = trainer.errors()
  assert status == 1
  assert re.match(
    rf'Training stopped at step \d+: {victim} has \d+ bytes now, {size} ',
    errors,
  )
  assert len(errors.splitlines()) == 1
  values_of(tf.train.latest_checkpoint(f'{tmp_path}/train'))
  # A file truncated within a record is refused at the start.
  os.truncate(victim, 1000)
  _, errors = run('cifar10_train.py', *flags, status=1)
  assert errors.startswith(f'Damaged file: {victim} ends 1000 bytes into ')
  record_fault('a data file cut short', 2)


@pytest.mark.faults
def test_a_bad_label_stops_training(flags, tmp_path, record_fault):
  data_dir = make_data_set(str(tmp_path / 'data'))
  flags = [*flags, f'--data_dir={data_dir}']
  victim = os.path.join(data_dir, dataset.BATCHES_DIR, 'data_batch_2.bin')
  with Program('cifar10_train.py', *flags) as trainer:
    trainer.wait_for(': step 2, ')
    with open(victim, 'r+b') as file:
      file.seek(57 * 3073)
      file.write(b'\x0a')
    status, _ = trainer.finish()
    errors = trainer.errors()
  assert status == 1
  assert 'Damaged file: a label is above 9' in errors
  assert f'{victim}:57' in errors
  assert len(errors.splitlines()) == 1
  values_of(tf.train.latest_checkpoint(f'{tmp_path}/train'))
  record_fault('a bad label under training')


@pytest.mark.parametrize(
  'count', [50, pytest.param(1000, marks=pytest.mark.faults)]
)
def test_mutated_records(tmp_path, count, record_fault):
  """A record is read exactly, or refused by file name and number."""
  rng = np.random.RandomState(1)
  records = rng.randint(0, 256, [count, 3073]).astype(np.uint8)
  records[:, 0] %= 10
  for record in records:
    where = rng.randint(0, 3073, 20)
    record[where] = rng.randint(0, 256, 20)
    if rng.rand() < 0.5:
      record[0] = rng.randint(0, 256)
  path = str(tmp_path / 'mutated.bin')
  records.tofile(path)
  with open(path, 'ab') as file:
    file.write(bytes(rng.randint(1, 3073)))  # an incomplete record
  refused = 0
  with tf.Graph().as_default(), tf.Session() as session:
    filenames = tf.train.string_input_producer([path], 1, shuffle=False)
    got = cifar10_input.read_cifar10(filenames)
    fetches = [got.key, got.label, got.uint8image]
    session.run(tf.local_variables_initializer())
    coord = tf.train.Coordinator()
    threads = tf.train.start_queue_runners(session, coord)
    for number, record in enumerate(records):
      if record[0] <= 9:
        key, (label,), image = session.run(fetches)
        assert key.decode() == f'{path}:{number}' and label == record[0]
        np.testing.assert_array_equal(
          image.transpose(2, 0, 1).ravel(), record[1:]
        )
      else:
        refused += 1
        with pytest.raises(tf.errors.InvalidArgumentError) as error:
          session.run(fetches)
        assert f'{path}:{number}]' in error.value.message.replace('"', '')
    with pytest.raises(tf.errors.OutOfRangeError):
      session.run(fetches)
    coord.request_stop()
    coord.join(threads)
  assert 0 < refused < count
  record_fault('a record mutated', count)


def png_with(data, rng):
  """Return a PNG with random changes in its chunks, but valid checksums."""
  chunks, position = [], 8
  while position < len(data):
    (length,) = struct.unpack('>I', data[position : position + 4])
    chunks.append(bytearray(data[position + 4 : position + 8 + length]))
    position += 12 + length
  for _ in range(rng.randint(1, 4)):
    chunk = chunks[rng.randint(len(chunks))]
    if len(chunk) > 4:
      chunk[rng.randint(4, len(chunk))] = rng.randint(256)
  if rng.rand() < 0.3:
    chunks.insert(rng.randint(len(chunks)), chunks[rng.randint(len(chunks))])
  return data[:8] + b''.join(
    struct.pack('>I', len(chunk) - 4) + chunk + struct.pack('>I', crc32(chunk))
    for chunk in chunks
  )


def mutated(data, rng):
  """Return bytes with random changes, deletions or repetitions."""
  data = bytearray(data)
  for position in rng.randint(0, len(data), rng.randint(1, 10)):
    data[position] = rng.randint(256)
  start, end = sorted(rng.randint(0, len(data), 2))
  kind = rng.randint(4)
  if kind == 0:
    del data[start:]
  elif kind == 1:
    del data[start:end]
  elif kind == 2:
    data[start:start] = data[start:end]
  return bytes(data)


def highest_memory(pid):
  """Return the peak memory of a process in bytes, after it exits."""
  most = 0
  deadline = time.monotonic() + TIMEOUT
  # A process that ends may be gone before the file is opened or read.
  with contextlib.suppress(FileNotFoundError, ProcessLookupError):
    while time.monotonic() < deadline:
      with open(f'/proc/{pid}/status') as file:
        kibibytes = re.search(r'VmHWM:\s+(\d+) kB', file.read())
      if not kibibytes:  # it has exited
        break
      most = int(kibibytes[1]) << 10
      time.sleep(0.01)
  return most


@pytest.mark.parametrize(
  'count', [100, pytest.param(2000, marks=pytest.mark.faults)]
)
def test_mutated_pictures(tmp_path, count, record_fault):
  """Each picture yields a prediction or an error; memory stays bounded."""
  rng = np.random.RandomState(1)
  train_dir, folder = tmp_path / 'train', tmp_path / 'pictures'
  train_dir.mkdir()
  folder.mkdir()
  write_network_by_hand(str(train_dir), 1)
  pixels = rng.randint(0, 256, [60, 80, 3]).astype(np.uint8)
  picture = PIL.Image.fromarray(pixels)
  wholes = []
  for mode, name, options in (
    ('RGB', 'png', {}),
    ('P', 'png', {}),
    ('RGBA', 'png', {'optimize': True}),
    ('RGB', 'jpeg', {}),
    ('L', 'jpeg', {'progressive': True}),
  ):
    file = io.BytesIO()
    picture.convert(mode).save(file, name, **options)
    wholes.append((name, file.getvalue()))
  for k in range(count):
    name, whole = wholes[k % len(wholes)]
    change = png_with if name == 'png' and rng.rand() < 0.5 else mutated
    (folder / f'{k}.{name}').write_bytes(change(whole, rng))
  with Program(
    'cifar10_predict.py', '--json', f'--checkpoint_dir={train_dir}', str(folder)
  ) as program:
    most = highest_memory(program.pid)
    status, lines = program.finish()
    _, *errors = program.errors().splitlines()
  assert status == 1
  assert all(json.loads(line)['classes'] for line in lines)
  assert all(line.startswith('Cannot read ') for line in errors), errors
  assert len(lines) + len(errors) == count
  assert lines and errors
  assert most < 1 << 30
  record_fault('a picture mutated', count)


@pytest.mark.faults
def test_a_seed_gives_the_same_start(flags, tmp_path):
  starts = []
  for number in (0, 1):
    train_dir = f'{tmp_path}/{number}'
    run(
      'cifar10_train.py',
      *flags,
      f'--train_dir={train_dir}',
      '--seed=7',
      '--max_steps=1',
    )
    starts.append(values_of(f'{train_dir}/model.ckpt-0'))
  for name, value in starts[0].items():
    np.testing.assert_array_equal(value, starts[1][name])


@pytest.mark.faults
def test_restart_spares_what_is_not_a_trainers(flags, tmp_path, record_fault):
  precious = tmp_path / 'precious'
  precious.mkdir()
  (precious / 'thesis.tex').write_text('years of work')
  (tmp_path / 'link').symlink_to(precious)
  home = tmp_path / 'home'  # a home directory used as --train_dir
  run('cifar10_train.py', *flags, f'--train_dir={home}', '--max_steps=1')
  (home / '.profile').write_text('hidden')
  before = {path: sorted(os.listdir(path)) for path in (precious, home)}
  paths = (precious, tmp_path / 'link', home)
  for path in paths:
    _, errors = run(
      'cifar10_train.py', *flags, f'--train_dir={path}', '--restart', status=1
    )
    assert '--restart removed nothing' in errors
  assert (precious / 'thesis.tex').read_text() == 'years of work'
  for path, names in before.items():
    assert sorted(os.listdir(path)) == names
  # No trainer runs there, in case that it removes something.
  with pytest.raises(UserError, match='--restart removed nothing: / also'):
    ownership.refuse_to_remove_others('/')
  record_fault('--restart where others have files', len(paths) + 1)


@pytest.mark.faults
def test_checkpoints_of_others(flags, tmp_path, record_fault):
  """Training resumes from any matching checkpoint, and refuses others."""
  run('cifar10_train.py', *flags, '--max_steps=2')
  path = f'{tmp_path}/train/model.ckpt-2'

  # Older versions of this suite named checkpoints by absolute path and had no
  # lock. The tutorial also saved averages of the losses.
  older = tmp_path / 'older'
  older.mkdir()
  values = values_of(path) | {'conv1/weight_loss/avg': np.float32(0.1)}
  with tf.Graph().as_default(), tf.Session() as session:
    for name, value in values.items():
      tf.Variable(value, name=name)
    session.run(tf.global_variables_initializer())
    tf.train.Saver().save(session, str(older / 'model.ckpt'), 2)
  lines, errors = run(
    'cifar10_train.py', *flags, f'--train_dir={older}', '--max_steps=4'
  )
  assert errors == '' and resumed_from(lines) == 2
  record_fault('a checkpoint of the tutorial or an older suite')

  for name, change in (
    ('conv1/weights', lambda value: np.zeros([3, 3, 3, 64], np.float32)),
    ('local4/biases', lambda value: value.astype(np.float16)),
  ):
    other = tmp_path / name.replace('/', '_')
    other.mkdir()
    rewrite_checkpoint(
      path,
      f'{other}/model.ckpt-2',
      lambda key, value, name=name, change=change: (
        change(value) if key == name else value
      ),
    )
    before = sorted(os.listdir(other))
    _, errors = run(
      'cifar10_train.py', *flags, f'--train_dir={other}', status=1
    )
    assert f'does not match this network: {name} is ' in errors
    assert set(os.listdir(other)) - {'.lock'} == set(before)
    record_fault('a checkpoint of another network')
