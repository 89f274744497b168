"""Simulated hosts: network namespaces of Linux, which need root."""

import contextlib
import os
import subprocess
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Hosts:
  """Simulated hosts with separate addresses, connected by a bridge."""

  def __init__(self, count):
    self._stack = contextlib.ExitStack()
    tag = f'c{os.getpid() % 10**6}'
    self.addresses = [f'10.77.0.{k + 1}' for k in range(count)]
    self.ports = [f'{tag}p{k}' for k in range(count)]  # on the bridge
    self._spaces = [f'{tag}n{k}' for k in range(count)]
    self._bridge = f'{tag}b'
    try:
      self._make(
        f'ip link add {self._bridge} type bridge', f'ip link del {self._bridge}'
      )
      self._make(f'ip link set {self._bridge} up')
      for number in range(count):
        self._boot(number)
    except subprocess.CalledProcessError:
      self.close()
      raise

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
      cwd=_ROOT,
      stdout=log,
      stderr=log,
      env={**os.environ, **environment},
    )
    self._stack.callback(process.wait)
    self._stack.callback(process.kill)
    return process

  def set_link(self, number, state):
    self._make(f'ip link set {self.ports[number]} {state}')

  def bytes_from(self, number):
    """Return the number of bytes that a host has sent."""
    path = f'/sys/class/net/{self.ports[number]}/statistics/rx_bytes'
    with open(path) as file:
      return int(file.read())

  def limit_links(self, rate):
    """Limit the links of all hosts, in both directions, to a rate of `tc`."""
    for space, port in zip(self._spaces, self.ports, strict=True):
      limit = f'root tbf rate {rate} burst 512kb latency 100ms'
      self._make(f'tc qdisc replace dev {port} {limit}')
      self._make(f'tc -n {space} qdisc replace dev eth0 {limit}')

  def close(self):
    self._stack.close()
