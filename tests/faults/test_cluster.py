"""Test training in a cluster of processes, and failures of its tasks."""

import contextlib
import glob
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from support.cluster import addresses_of, environment
from support.data import SMALL_RATE, TINY_BATCH
from support.programs import ROOT, TIMEOUT, Program, run, summaries

from benchmarks.hosts import Hosts
from cifar10_suite import parameter_servers
from cifar10_suite.tf_config import Task

# Without parameter servers, and with one.
WITHOUT, WITH = {'ps': 0, 'workers': 3}, {'ps': 1, 'workers': 2}


@pytest.fixture
def flags(data_dir, tmp_path):
  return [
    f'--data_dir={data_dir}',
    f'--train_dir={tmp_path}/train',
    TINY_BATCH,
    SMALL_RATE,
    '--log_frequency=10',
    '--save_checkpoint_secs=1',
    '--cluster_timeout_secs=60',
  ]


class Tasks:
  """A cluster of programs that can be killed and restarted."""

  def __init__(self, flags, ps=0, workers=2, program='cifar10_train.py'):
    self._addresses = addresses_of(ps, workers)
    self._program, self._flags = program, flags
    self._stack = contextlib.ExitStack()
    self.programs = {}
    for kind, some in self._addresses.items():
      for index in range(len(some)):
        self.start(f'{kind} {index}')

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._stack.close()

  def start(self, name):
    kind, index = name.split()
    self.programs[name] = self._stack.enter_context(
      Program(
        self._program,
        *self._flags,
        environment=environment(self._addresses, kind, int(index)),
      )
    )
    return self.programs[name]

  def kill(self, name):
    self.programs[name].send_signal(signal.SIGKILL)
    self.programs[name].finish()

  def finish(self):
    """Wait until all tasks exit; return the remaining lines of each."""
    lines = {}
    for name, program in self.programs.items():
      status, lines[name] = program.finish()
      assert (status, program.errors()) == (0, ''), (name, lines[name])
    return lines


@pytest.mark.parametrize(
  'tasks',
  [
    {'ps': 0, 'workers': 2},
    {'ps': 0, 'workers': 3},
    {'ps': 2, 'workers': 3},
  ],
)
@pytest.mark.faults
def test_trains_and_changes_places_with_one_machine(flags, tmp_path, tasks):
  lines, _ = run('cifar10_train.py', *flags, '--max_steps=5')
  with Tasks([*flags, '--max_steps=20'], **tasks) as running:
    lines = running.finish()
  assert 'Resuming from step 5' in lines['chief 0']
  where = f'{tmp_path}/train'
  # With parameter servers, each worker may still apply its last gradient.
  step = '2[0-9]' if tasks['ps'] else '20'
  saved = f'Trained to step {step}, which is saved in {re.escape(where)}.'
  assert re.fullmatch(saved, lines['chief 0'][-1]), lines
  # With parameter servers, the chief may train all steps before a worker does.
  ended = '|Training has ended.' if tasks['ps'] else ''
  assert re.fullmatch(
    f'Trained to step {step}.{ended}', lines['worker 0'][-1]
  ), lines
  if tasks['ps']:
    # On a busy machine, it may also report that it waits for the chief.
    words = [line for line in lines['ps 1'] if 'chief 0 at ' not in line]
    assert words == ['Training has ended.']
  tags = {tag for _, tag, _ in summaries(where)}
  assert {'total_loss', 'learning_rate', 'conv1/weights/gradients'} <= tags
  lines, errors = run('cifar10_train.py', *flags, '--max_steps=25')
  assert errors == '' and any('Resuming from step 2' in line for line in lines)
  # All tasks exit if there is nothing left to train.
  with Tasks([*flags, '--max_steps=25'], **tasks) as running:
    lines = running.finish()
  assert any('nothing left to train' in line for line in lines['chief 0'])
  for some in lines.values():
    assert not any('Trained to' in line for line in some)
  assert lines['worker 0'][-1] == 'Training has ended.'


@pytest.mark.faults
@pytest.mark.parametrize('tasks', [WITHOUT, WITH])
def test_towers_in_a_cluster(flags, tasks):
  with Tasks(
    [*flags, '--num_gpus=2', '--max_steps=20'],
    program='cifar10_multi_gpu_train.py',
    **tasks,
  ) as running:
    lines = running.finish()
  assert re.match('Trained to step 2|Training has', lines['worker 0'][-1])


def test_refuses_a_worker_with_other_flags(flags):
  """Both say why; the chief then accepts a worker with the right flags."""
  flags = [*flags, '--max_steps=5']
  addresses = addresses_of()
  reason = (
    'batch_size is 1, not 2. Start all workers with the same version, flags '
    'and data set.'
  )
  with (
    Program(
      'cifar10_train.py', *flags, environment=environment(addresses, 'chief')
    ) as chief,
    Program(
      'cifar10_train.py',
      *flags,
      '--batch_size=1',
      environment=environment(addresses, 'worker'),
    ) as other,
  ):
    assert other.finish()[0] == 1
    assert other.errors() == f'chief 0 refuses worker 0: {reason}\n'
    chief.wait_for(f'Refused worker 0: {reason}')
    with Program(
      'cifar10_train.py', *flags, environment=environment(addresses, 'worker')
    ) as worker:
      assert worker.finish()[0] == 0
      assert chief.finish()[0] == 0


def test_refuses_a_worker_with_another_network(flags, tmp_path):
  """Such as that of an edited cifar10.py, instead of waiting forever."""
  edited = tmp_path / 'edited'
  edited.mkdir()
  for name in ('cifar10_train.py', 'cifar10_input.py', 'cifar10.py'):
    with open(os.path.join(ROOT, name)) as file:
      (edited / name).write_text(file.read().replace('384', '380'))
  addresses = addresses_of()
  reason = (
    'variable local3/weights is float32 (2304, 380), not float32 (2304, 384). '
    'Start all workers with the same version, flags and data set.'
  )
  with (
    Program(
      'cifar10_train.py', *flags, environment=environment(addresses, 'chief')
    ) as chief,
    Program(
      edited / 'cifar10_train.py',
      *flags,
      environment=environment(addresses, 'worker'),
    ) as worker,
  ):
    assert worker.finish()[0] == 1
    assert worker.errors() == f'chief 0 refuses worker 0: {reason}\n'
    chief.wait_for(f'Refused worker 0: {reason}')


@pytest.mark.parametrize(
  'flag', ['--nosync', '--sync=true', '--backup_workers']
)
def test_names_removed_flags(flags, flag):
  _, errors = run('cifar10_train.py', *flags, flag, '1', status=1)
  assert errors.startswith(f'Remove {flag.partition("=")[0]}: it no longer')
  assert len(errors.splitlines()) == 1


@pytest.mark.faults
def test_a_server_outlasts_the_workers(log_level):
  """If it exited with the chief, a slower worker would lose its variables."""
  addresses = addresses_of(ps=1, workers=1)
  with Program(
    'cifar10_train.py',
    '--cluster_timeout_secs=20',
    environment=environment(addresses, 'ps'),
  ) as server:
    chief = parameter_servers.ParameterServers(Task('chief', 0), addresses)
    # It continues to monitor the server, and must not give up when that exits.
    chief.join(tf.ConfigProto(), {}, timeout_secs=float('inf'))
    chief.leave()
    # This process still responds, since TensorFlow's servers cannot be stopped.
    with pytest.raises(queue.Empty):
      server.wait_for('Training has ended.', timeout=10)
    assert server.finish() == (0, ['Training has ended.'])


def newest_saved(train_dir):
  """Return the step of the newest checkpoint; 0 if there is none."""
  steps = (
    int(re.search(r'-(\d+)\.index$', name)[1])
    for name in glob.glob(f'{train_dir}/model.ckpt-*.index')
  )
  return max(steps, default=0)


@pytest.mark.parametrize(
  ('tasks', 'victims', 'times'),
  [
    ({'ps': 0, 'workers': 2}, ['worker 0'], 1),
    *(
      pytest.param(WITHOUT, [name], 8, marks=pytest.mark.faults)
      for name in ('chief 0', 'worker 0', 'worker 1')
    ),
    pytest.param(WITHOUT, ['worker 0', 'chief 0'], 2, marks=pytest.mark.faults),
    *(
      pytest.param(WITH, [name], 5, marks=pytest.mark.faults)
      for name in ('ps 0', 'chief 0', 'worker 0')
    ),
  ],
)
def test_training_goes_on_without(
  flags, tmp_path, tasks, victims, times, record_fault
):
  """Killed tasks are restarted; all tasks reach the last step and exit.

  Training resumes from the newest checkpoint.
  """
  rng = np.random.RandomState(1)
  worst = 0
  steps = 30 * (len(victims) * times + 2)
  flags = [*flags, f'--max_steps={steps}']
  with Tasks(flags, **tasks) as running:
    chief = running.programs['chief 0']
    while not newest_saved(tmp_path / 'train'):
      chief.wait_for(', loss = ')
    for victim in victims * times:
      for _ in range(rng.randint(1, 3)):
        last = chief.wait_for(', loss = ')
      time.sleep(rng.uniform(0, 0.2))  # a random moment between two lines
      saved = newest_saved(tmp_path / 'train')
      running.kill(victim)
      chief = running.programs['chief 0']
      running.start(victim)
      if not tasks['ps'] or not victim.startswith('worker'):
        chief = running.programs['chief 0']
        line = chief.wait_for('Resuming from step ')
        resumed = int(line.split()[-1])
        assert resumed >= saved
        reached = int(re.search(r'step (\d+), ', last)[1])
        worst = max(worst, reached - resumed)
    lines = running.finish()
  # With parameter servers, each worker may still apply its last gradient.
  assert f'Trained to step {steps // 10}' in lines['chief 0'][-1]
  record_fault(
    f'in a cluster {"with" if tasks == WITH else "without"} ps killed: '
    f'{", ".join(victims)}',
    times * len(victims),
    worst,
    'steps',
  )


@pytest.mark.faults
@pytest.mark.parametrize('name', ['chief 0', 'worker 0'])
def test_a_worker_that_hangs(flags, name, record_fault):
  """The other one says so, and continues afterwards."""
  with Tasks([*flags, '--max_steps=60']) as tasks:
    (other,) = set(tasks.programs) - {name}
    for program in tasks.programs.values():
      program.wait_for(': step 10, ')
    tasks.programs[name].send_signal(signal.SIGSTOP)
    tasks.programs[other].wait_for(f'Waiting for {name} at ')
    time.sleep(5)
    tasks.programs[name].send_signal(signal.SIGCONT)
    tasks.programs[other].wait_for(f'Found {name} at ')
    lines = tasks.finish()
  assert 'Trained to step 60' in lines['chief 0'][-1]
  record_fault(f'in a cluster without ps stopped for 10 s: {name}')


@pytest.mark.faults
@pytest.mark.parametrize('tasks', [WITHOUT, WITH])
def test_a_chief_that_is_stopped_may_come_back(flags, tasks):
  """The others wait for it, as for a killed chief."""
  # With parameter servers, the others continue.
  with Tasks([*flags, '--max_steps=300'], **tasks) as running:
    chief = running.programs['chief 0']
    for _ in range(2):
      chief.wait_for(', loss = ')
    chief.send_signal(signal.SIGTERM)
    status, lines = chief.finish()
    assert status == 143
    step = re.search(r'step (\d+) is saved', lines[-1])[1]
    running.start('chief 0')
    lines = running.finish()
  if tasks == WITHOUT:
    assert f'Resuming from step {step}' in lines['chief 0']
  assert 'Trained to step 30' in lines['chief 0'][-1]
  assert 'Trained to step 30' in lines['worker 0'][-1]


@pytest.mark.faults
def test_stopping_all_saves_the_last_step(flags):
  """Workers that are stopped first let the chief complete its step."""
  with Tasks([*flags, '--save_checkpoint_secs=600']) as tasks:
    chief, worker = tasks.programs.values()
    for _ in range(3):
      chief.wait_for(', loss = ')
    worker.send_signal(signal.SIGTERM)
    step = chief.wait_for(', loss = ').partition(': step ')[2].partition(',')[0]
    chief.send_signal(signal.SIGTERM)
    status, lines = chief.finish()
    assert status == 143
    saved = re.search(r'Stopped by SIGTERM: step (\d+) is saved', lines[-1])[1]
    assert int(saved) > int(step)
    status, lines = worker.finish()
    assert status == 143
    assert 'is not saved here' in lines[-1]
    assert chief.errors() == worker.errors() == ''


@pytest.mark.faults
def test_stopping_all_saves_the_last_step_with_a_server(flags):
  with Tasks([*flags, '--save_checkpoint_secs=600'], ps=1) as tasks:
    chief = tasks.programs['chief 0']
    for _ in range(3):
      line = chief.wait_for(', loss = ')
    step = line.partition(': step ')[2].partition(',')[0]
    for program in tasks.programs.values():  # the server first
      program.send_signal(signal.SIGTERM)
    for name, program in tasks.programs.items():
      status, lines = program.finish()
      assert status == 143 and program.errors() == ''
      if name == 'chief 0':
        saved = re.search(r'SIGTERM: step (\d+) is saved', lines[-1])[1]
  assert int(saved) > int(step)


@pytest.mark.faults
def test_a_worker_that_comes_too_late_ends(flags):
  with Tasks([*flags, '--max_steps=20']) as tasks:
    tasks.programs['chief 0'].wait_for('Trained to step 20')
    tasks.kill('worker 0')
    tasks.start('worker 0')
    for program in tasks.programs.values():
      assert program.finish()[0] == 0


@pytest.mark.parametrize(
  ('ps', 'kind', 'missing'),
  [
    (1, 'worker', 'ps'),
    (0, 'worker', 'chief'),
    *(
      pytest.param(*case, marks=pytest.mark.faults)
      for case in ((1, 'ps', 'chief'), (0, 'chief', 'worker'))
    ),
  ],
)
def test_gives_up_on_a_cluster_that_is_not_there(flags, ps, kind, missing):
  addresses = addresses_of(ps)
  _, errors = run(
    'cifar10_train.py',
    *flags,
    '--cluster_timeout_secs=1',
    environment=environment(addresses, kind),
    status=1,
  )
  where = f'{missing} 0 at {addresses[missing][0]}'
  assert f'{where} has not answered for 1 s' in errors


def test_an_evaluator_task_evaluates(flags, tmp_path):
  run('cifar10_train.py', *flags, '--max_steps=2')
  (train_dir,) = [
    flag.partition('=')[2] for flag in flags if flag.startswith('--train_dir=')
  ]
  path = os.path.join(train_dir, 'run.json')
  with open(path) as file:
    content = file.read()
  with open(path, 'w') as file:
    file.write(content.replace('"frog"', '"toad"'))
  _, errors = run(
    'cifar10_train.py',
    *flags,
    '--max_steps=2',
    environment=environment({}, 'evaluator'),
    status=1,
  )
  # The message is from the evaluator.
  assert 'was trained on other classes' in errors
  assert 'Name the right one with --data_dir.' in errors


@pytest.mark.parametrize('ps', [0, pytest.param(1, marks=pytest.mark.faults)])
def test_a_whole_cluster_with_one_command(flags, tmp_path, ps):
  result = subprocess.run(
    [
      sys.executable,
      os.path.join(ROOT, 'examples', 'cluster.py'),
      f'--log_dir={tmp_path}/logs',
      '--workers=2',
      f'--ps={ps}',
      '--evaluator',
      f'--eval_dir={tmp_path}/eval',
      *flags,
      '--max_steps=12',
    ],
    capture_output=True,
    text=True,
    timeout=TIMEOUT,
  )
  assert result.returncode == 0, result.stdout
  assert ', loss = ' in result.stdout
  assert 'Trained to step 1' in result.stdout
  logs = {'chief-0.log', 'worker-0.log', 'evaluator-0.log'}
  logs |= {'ps-0.log'} if ps else set()
  assert set(os.listdir(tmp_path / 'logs')) == logs
  lines = (tmp_path / 'logs' / 'evaluator-0.log').read_text().splitlines()
  assert re.fullmatch(
    r'Evaluation ends: .*/model.ckpt-1\d is the last step.', lines[-1]
  )


def lacks_namespaces():
  """Return why network namespaces cannot be made here; '' if they can."""
  if os.geteuid():
    return 'network namespaces need root privileges'
  if not shutil.which('ip'):
    return 'network namespaces need the command ip'
  name = f'probe{os.getpid()}'
  made = subprocess.run(['ip', 'netns', 'add', name], capture_output=True)
  if made.returncode:
    return f'network namespaces cannot be made here: {made.stderr.decode()}'
  subprocess.run(['ip', 'netns', 'del', name], check=True)
  return ''


@pytest.fixture
def hosts():
  if reason := lacks_namespaces():
    pytest.skip(reason)
  hosts = Hosts(3)
  yield hosts
  hosts.close()


def wait_for(path, part, times=1):
  """Wait until a file contains `part` at least `times` times."""
  deadline = time.monotonic() + TIMEOUT
  while path.read_text().count(part) < times:
    assert time.monotonic() < deadline, path.read_text()
    time.sleep(0.05)


@pytest.fixture(params=['all-reduce', 'ps'])
def kinds(request):
  """The kind of task on each host."""
  return {
    'all-reduce': ['chief', 'worker', 'worker'],
    'ps': ['ps', 'chief', 'worker'],
  }[request.param]


@pytest.fixture
def start_on_host(hosts, kinds, flags, tmp_path):
  """A function that starts the task of a host, and the logs of the tasks."""
  tasks, addresses = [], {}
  for kind, address in zip(kinds, hosts.addresses, strict=True):
    tasks.append((kind, len(addresses.setdefault(kind, []))))
    addresses[kind].append(f'{address}:2222')
  logs = [tmp_path / f'{kind}-{index}.log' for kind, index in tasks]

  def start(number, *more_flags):
    with open(logs[number], 'a') as log:
      return hosts.start(
        number,
        ['cifar10_train.py', *flags, *more_flags],
        log,
        environment(addresses, *tasks[number]),
      )

  return start, logs


@pytest.mark.faults
@pytest.mark.parametrize('victim', [0, 1, 2])
def test_a_host_that_vanishes(
  hosts, kinds, start_on_host, victim, record_fault
):
  """A replacement continues, though the others are not notified of the loss."""
  start, logs = start_on_host
  tasks = [start(number, '--max_steps=200') for number in range(3)]
  chief = kinds.index('chief')
  wait_for(logs[chief], ', loss = ', 4)
  hosts.set_link(victim, 'down')
  tasks[victim].kill()
  tasks[victim].wait()
  hosts.replace(victim)
  tasks[victim] = start(victim, '--max_steps=200')
  statuses = [task.wait(TIMEOUT) for task in tasks]
  assert statuses == [0, 0, 0], [log.read_text() for log in logs]
  assert 'Trained to step 20' in logs[chief].read_text()
  record_fault(f'in a cluster vanished: {kinds[victim]} of {kinds}')


@pytest.mark.faults
def test_a_link_cut_and_healed(hosts, kinds, start_on_host, record_fault):
  """Training pauses, continues when the link is up, and finishes."""
  start, logs = start_on_host
  # With a parameter server, the update of each worker is a step.
  steps = 1000 if 'ps' in kinds else 400
  more_flags = ['--save_checkpoint_secs=600', f'--max_steps={steps}']
  processes = [start(number, *more_flags) for number in range(3)]
  chief = kinds.index('chief')
  looks = []
  for lines in (5, 15):
    wait_for(logs[chief], ', loss = ', lines)
    sent = hosts.bytes_from(0)
    printed = re.findall(r': step (\d+), ', logs[chief].read_text())
    looks.append((int(printed[-1]), sent))
  (first, sent_before), (last, sent) = looks
  per_step = (sent - sent_before) / (last - first)
  for victim in (2, 0):
    hosts.set_link(victim, 'down')
    time.sleep(10)
    hosts.set_link(victim, 'up')
    lines = logs[chief].read_text().count(', loss = ')
    wait_for(logs[chief], ', loss = ', lines + 2)
  assert [process.wait(TIMEOUT) for process in processes] == [0, 0, 0], [
    log.read_text() for log in logs
  ]
  wait_for(logs[chief], f'Trained to step {steps // 10}')
  # In a ring of three, a worker sends its gradients 4/3 times per step. A
  # parameter server sends all variables once per step.
  expected = 4 * 1_068_298 * (1 if 'ps' in kinds else 4 / 3)
  print(f'{per_step / expected:.3f} times the expected bytes per step')
  assert 0.95 * expected < per_step < 1.1 * expected
  record_fault(f'a link cut for ten seconds: {kinds}', 2)
