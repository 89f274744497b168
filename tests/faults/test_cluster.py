"""Test training in a cluster of processes, and failures of its tasks."""

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from support.cluster import addresses_of, environment
from support.data import SMALL_RATE
from support.programs import ROOT, TIMEOUT, Program, run, summaries

from cifar10_suite import cluster as clusters

KINDS = ['ps 0', 'chief 0', 'worker 0']
HOSTS = ['ps', 'chief', 'worker']


@pytest.fixture
def flags(data_dir, tmp_path):
  return [
    f'--data_dir={data_dir}',
    f'--train_dir={tmp_path}/train',
    '--batch_size=16',
    SMALL_RATE,
    '--log_frequency=10',
    '--save_checkpoint_secs=1',
    '--cluster_timeout_secs=60',
  ]


class Tasks:
  """A cluster of programs that can be killed and restarted."""

  def __init__(self, flags, ps=1, workers=2, program='cifar10_train.py'):
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


def test_trains_and_changes_places_with_one_machine(flags, tmp_path):
  lines, _ = run('cifar10_train.py', *flags, '--max_steps=5')
  with Tasks([*flags, '--max_steps=20'], ps=2, workers=3) as tasks:
    lines = tasks.finish()
  assert 'Resuming from step 5' in lines['chief 0']
  where = f'{tmp_path}/train'
  saved = f'Trained to step 20, which is saved in {where}.'
  assert lines['chief 0'][-1] == saved, lines
  assert lines['worker 1'][-1] == 'Trained to step 20.'
  # On a busy machine, it may also report that it waits for the chief.
  words = [line for line in lines['ps 1'] if 'chief 0 at ' not in line]
  assert words == ['Training has ended.']
  tags = {tag for _, tag, _ in summaries(where)}
  assert {'total_loss', 'learning_rate', 'conv1/weights/gradients'} <= tags
  lines, errors = run('cifar10_train.py', *flags, '--max_steps=25')
  assert errors == '' and 'Resuming from step 20' in lines
  # All tasks exit if there is nothing left to train.
  with Tasks([*flags, '--max_steps=25']) as tasks:
    lines = tasks.finish()
  assert any('nothing left to train' in line for line in lines['chief 0'])


@pytest.mark.faults
def test_towers_in_a_cluster(flags):
  with Tasks(
    [*flags, '--num_gpus=2', '--max_steps=20'],
    program='cifar10_multi_gpu_train.py',
  ) as tasks:
    lines = tasks.finish()
  assert lines['worker 0'][-1] == 'Trained to step 20.'


@pytest.mark.faults
def test_without_waiting_for_each_other(flags):
  """Each asynchronous update counts as a step."""
  with Tasks([*flags, '--nosync', '--max_steps=60']) as tasks:
    lines = tasks.finish()
  for worker in ('chief 0', 'worker 0'):
    assert 'Trained to step ' in lines[worker][-1], lines


@pytest.mark.faults
def test_a_backup_worker_may_be_late(flags):
  """Training continues without a stopped worker, up to the last step."""
  flags = [*flags, '--backup_workers=1', '--max_steps=60', '--log_frequency=1']
  with Tasks(flags) as tasks:
    for _ in range(3):
      tasks.programs['worker 0'].wait_for(', loss = ')
    tasks.programs['worker 0'].send_signal(signal.SIGSTOP)
    status, lines = tasks.programs['chief 0'].finish()
    assert status == 0 and 'Trained to step 60' in lines[-1]
    # The parameter server waits longer than for a task that does not respond.
    with pytest.raises(queue.Empty):
      tasks.programs['ps 0'].wait_for('Training has ended.', timeout=20)
    tasks.programs['worker 0'].send_signal(signal.SIGCONT)
    status, lines = tasks.programs['worker 0'].finish()
    assert status == 0 and lines[-1] == 'Trained to step 60.'
    assert tasks.programs['ps 0'].finish() == (0, ['Training has ended.'])


@pytest.mark.faults
def test_a_server_outlasts_those_that_it_has_heard(quiet_threads):
  """If it exited earlier, its response to the last worker might get lost."""
  addresses = addresses_of(workers=1)
  with Program(
    'cifar10_train.py', environment=environment(addresses, 'ps')
  ) as server:
    chief = clusters.Cluster(clusters.Task('chief', 0, addresses))
    # It continues to monitor the server, and must not give up when that exits.
    chief.join(tf.ConfigProto(), timeout_secs=float('inf'))
    chief.leave()
    # This process still responds, since TensorFlow's servers cannot be stopped.
    with pytest.raises(queue.Empty):
      server.wait_for('Training has ended.', timeout=10)
    assert server.finish() == (0, ['Training has ended.'])


@pytest.mark.parametrize(
  ('victims', 'times'),
  [
    (['ps 0'], 1),
    *(pytest.param([kind], 5, marks=pytest.mark.faults) for kind in KINDS),
    pytest.param(KINDS, 2, marks=pytest.mark.faults),
  ],
)
def test_training_goes_on_without(flags, victims, times, record_fault):
  """Killed tasks are restarted; all tasks reach the last step and exit."""
  rng = np.random.RandomState(1)
  worst = 0
  with Tasks([*flags, '--max_steps=300']) as tasks:
    tasks.programs['chief 0'].wait_for(': step 10, ')
    for victim in victims * times:
      for _ in range(rng.randint(1, 3)):
        last = tasks.programs['chief 0'].wait_for(', loss = ')
      time.sleep(rng.uniform(0, 0.2))  # a random moment between two lines
      tasks.kill(victim)
      tasks.start(victim)
      if not victim.startswith('worker'):
        line = tasks.programs['chief 0'].wait_for('Resuming from step ')
        reached = int(re.search(r'step (\d+), ', last)[1])
        worst = max(worst, reached - int(line.split()[-1]))
    lines = tasks.finish()
  assert 'Trained to step 300' in lines['chief 0'][-1]
  assert worst < 60  # one save per second, and about ten steps per second
  record_fault(
    f'in a cluster killed: {", ".join(victims)}',
    times * len(victims),
    worst,
    'steps',
  )


@pytest.mark.faults
def test_a_chief_that_is_stopped_may_come_back(flags):
  """The others wait for it, as for a killed chief."""
  with Tasks([*flags, '--max_steps=60']) as tasks:
    chief = tasks.programs['chief 0']
    chief.wait_for(': step 10, ')
    chief.send_signal(signal.SIGTERM)
    status, lines = chief.finish()
    assert status == 143
    step = re.search(r'step (\d+) is saved', lines[-1])[1]
    tasks.start('chief 0')
    lines = tasks.finish()
  assert f'Resuming from step {step}' in lines['chief 0']
  assert 'Trained to step 60' in lines['chief 0'][-1]
  assert lines['worker 0'][-1] == 'Trained to step 60.'


@pytest.mark.parametrize(
  ('kind', 'missing'), [('worker', 'ps'), ('ps', 'chief')]
)
def test_gives_up_on_a_cluster_that_is_not_there(flags, kind, missing):
  addresses = addresses_of()
  _, errors = run(
    'cifar10_train.py',
    *flags,
    '--cluster_timeout_secs=2',
    environment=environment(addresses, kind),
    status=1,
  )
  where = f'{missing} 0 at {addresses[missing][0]}'
  assert f'{where} has not answered for 2 s' in errors


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
    environment=environment({}, 'evaluator'),
    status=1,
  )
  # The message is from the evaluator.
  assert 'was trained on other classes' in errors
  assert 'Name the right one with --data_dir.' in errors


def test_a_whole_cluster_with_one_command(flags, tmp_path):
  result = subprocess.run(
    [
      sys.executable,
      os.path.join(ROOT, 'examples', 'cluster.py'),
      f'--log_dir={tmp_path}/logs',
      '--workers=2',
      *flags,
      '--max_steps=12',
    ],
    capture_output=True,
    text=True,
    timeout=TIMEOUT,
  )
  assert result.returncode == 0, result.stdout
  assert ': step 10, loss = ' in result.stdout
  assert 'Trained to step 12' in result.stdout.splitlines()[-1]
  assert set(os.listdir(tmp_path / 'logs')) == {
    'chief-0.log',
    'ps-0.log',
    'worker-0.log',
  }


class Hosts:
  """Simulated hosts with separate addresses, connected by a bridge."""

  def __init__(self, count):
    self._stack = contextlib.ExitStack()
    tag = f'c{os.getpid() % 10**6}'
    self.addresses = [f'10.77.0.{k + 1}' for k in range(count)]
    self.ports = [f'{tag}p{k}' for k in range(count)]  # on the bridge
    self._spaces = [f'{tag}n{k}' for k in range(count)]
    self._bridge = f'{tag}b'
    self._make(
      f'ip link add {self._bridge} type bridge', f'ip link del {self._bridge}'
    )
    self._make(f'ip link set {self._bridge} up')
    for number in range(count):
      self._boot(number)

  def _boot(self, number):
    space, port = self._spaces[number], self.ports[number]
    self._make(f'ip netns add {space}', f'ip netns del {space}')
    self._make(
      f'ip link add {port} type veth peer name eth0 netns {space}',
      f'ip link del {port}',
    )
    self._make(f'ip link set {port} master {self._bridge} up')
    self._make(f'ip -n {space} addr add {self.addresses[number]}/24 dev eth0')
    self._make(f'ip -n {space} link set eth0 up')
    self._make(f'ip -n {space} link set lo up')

  def replace(self, number):
    """Replace a lost host by a new one with the same address."""
    self._make(f'ip link del {self.ports[number]}')
    self._make(f'ip netns del {self._spaces[number]}')
    self._boot(number)

  def _make(self, command, undo=None):
    subprocess.run(command.split(), check=True, capture_output=True)
    if undo:
      self._stack.callback(subprocess.run, undo.split(), capture_output=True)

  def start(self, number, arguments, log, environment):
    """Start a program on a host, with output to a file."""
    process = subprocess.Popen(
      ['ip', 'netns', 'exec', self._spaces[number], sys.executable, *arguments],
      cwd=ROOT,
      stdout=log,
      stderr=log,
      env={**os.environ, **environment},
    )
    self._stack.callback(process.wait)
    self._stack.callback(process.kill)
    return process

  def set_link(self, number, state):
    self._make(f'ip link set {self.ports[number]} {state}')

  def bytes_of(self, number):
    """Return the number of bytes that a host has sent and received."""
    folder = f'/sys/class/net/{self.ports[number]}/statistics'
    total = 0
    for name in ('rx_bytes', 'tx_bytes'):
      with open(f'{folder}/{name}') as file:
        total += int(file.read())
    return total

  def close(self):
    self._stack.close()


@pytest.fixture
def hosts():
  try:
    hosts = Hosts(3)
  except (OSError, subprocess.CalledProcessError):
    pytest.skip('network namespaces cannot be made here')
  yield hosts
  hosts.close()


def wait_for(path, part, times=1):
  """Wait until a file contains `part` at least `times` times."""
  deadline = time.monotonic() + TIMEOUT
  while path.read_text().count(part) < times:
    assert time.monotonic() < deadline, path.read_text()
    time.sleep(0.05)


@pytest.fixture
def start_on_host(hosts, flags, tmp_path):
  """A function that starts a task on its host, and the logs of the tasks."""
  addresses = {
    kind: [f'{address}:2222']
    for kind, address in zip(HOSTS, hosts.addresses, strict=True)
  }
  logs = {kind: tmp_path / f'{kind}.log' for kind in HOSTS}

  def start(kind, *more_flags):
    with open(logs[kind], 'a') as log:
      return hosts.start(
        HOSTS.index(kind),
        ['cifar10_train.py', *flags, *more_flags],
        log,
        environment(addresses, kind),
      )

  return start, logs


@pytest.mark.faults
@pytest.mark.parametrize(
  ('kind', 'still'),
  [('ps', None), ('chief', None), ('chief', 'worker'), ('worker', 'chief')],
)
def test_a_host_that_vanishes(hosts, start_on_host, kind, still, record_fault):
  """A replacement continues, though the others are not notified of the loss.

  If another task (`still`) is stopped, the lost task is waiting for its server,
  so that no traffic reveals the loss to the server.
  """
  start, logs = start_on_host
  tasks = {name: start(name, '--max_steps=200') for name in HOSTS}
  wait_for(logs['chief'], ': step 50, ')
  if still:
    tasks[still].send_signal(signal.SIGSTOP)
    time.sleep(2)
  hosts.set_link(HOSTS.index(kind), 'down')
  tasks[kind].kill()
  tasks[kind].wait()
  hosts.replace(HOSTS.index(kind))
  tasks[kind] = start(kind, '--max_steps=200')
  if still:
    time.sleep(10)
    tasks[still].send_signal(signal.SIGCONT)
  statuses = [task.wait(TIMEOUT) for task in tasks.values()]
  assert statuses == [0, 0, 0], [log.read_text() for log in logs.values()]
  assert 'Trained to step 200' in logs['chief'].read_text()
  record_fault(f'in a cluster vanished: {kind} 0')


@pytest.mark.faults
def test_a_link_cut_and_healed(hosts, start_on_host, record_fault):
  """Training pauses, continues when the link is up, and finishes."""
  start, logs = start_on_host
  more_flags = ['--save_checkpoint_secs=600', '--max_steps=400']
  processes = [start(kind, *more_flags) for kind in HOSTS]
  wait_for(logs['chief'], ': step 50, ')
  before = hosts.bytes_of(0)
  wait_for(logs['chief'], ': step 150, ')
  per_step = (hosts.bytes_of(0) - before) / 100
  for victim in (2, 0):  # a worker, then the parameter server
    hosts.set_link(victim, 'down')
    time.sleep(10)
    hosts.set_link(victim, 'up')
    lines = logs['chief'].read_text().count(', loss = ')
    wait_for(logs['chief'], ', loss = ', lines + 2)
  assert [process.wait(TIMEOUT) for process in processes] == [0, 0, 0], [
    log.read_text() for log in logs.values()
  ]
  wait_for(logs['chief'], 'Trained to step 400')
  # Each worker receives all variables and sends all gradients in each step.
  size = 4 * 1_068_298
  print(f'{per_step / size:.2f} times the variables a step')
  assert 0.95 * 4 * size < per_step < 1.1 * 4 * size
  record_fault('in a cluster: a link cut for ten seconds', 2)
