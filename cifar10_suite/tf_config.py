"""The tasks of a cluster, from the environment variable TF_CONFIG.

Training operators set it for each task. It lists the addresses of all tasks and
says which one this process is:

  {"cluster": {"chief": ["a:2222"], "worker": ["b:2222", "c:2222"]},
   "task": {"type": "worker", "index": 0}}
"""

import dataclasses
import json
import os
import re

from cifar10_suite.errors import UserError


@dataclasses.dataclass(frozen=True)
class Task:
  """A task of a cluster, printed as 'worker 0'.

  Attributes:
    kind: 'chief', 'worker', 'ps' or 'evaluator'.
    index: index among the tasks of this kind.
  """

  kind: str = 'chief'
  index: int = 0

  def __str__(self) -> str:
    return f'{self.kind} {self.index}'

  @property
  def device(self) -> str:
    """TensorFlow device name of the task's machine."""
    return f'/job:{self.kind}/replica:0/task:{self.index}'


# 'host:port' of the tasks of each kind.
Addresses = dict[str, list[str]]


def from_environment() -> tuple[Task, Addresses]:
  """Return the task of this process and the addresses of all, from TF_CONFIG.

  There are no addresses without a cluster.

  Raises:
    UserError: if TF_CONFIG is invalid.
  """
  text = os.environ.get('TF_CONFIG') or '{}'
  try:
    config = json.loads(text.replace('"master"', '"chief"'))  # an older name
    addresses = {
      kind: list(some)
      for kind, some in config.get('cluster', {}).items()
      if some
    }
    task = dict(config.get('task', {}))
  except (ValueError, TypeError, AttributeError) as error:
    raise UserError(f'Invalid TF_CONFIG: {error}') from error
  if task.get('type') == 'evaluator':
    return Task('evaluator'), addresses
  addresses.pop('evaluator', None)
  if sum(map(len, addresses.values())) <= 1:
    return Task(), {}
  if problem := _problem(task, addresses):
    raise UserError(f'Invalid TF_CONFIG: {problem}.')
  return Task(task['type'], int(task['index'])), addresses


def _problem(task: dict[str, object], addresses: Addresses) -> str | None:
  """Describe what is wrong with a cluster, or with a task in it."""
  if missing := {'type', 'index'} - set(task):
    # A default might give two tasks the same one.
    return f'its "task" has no "{max(missing)}"'
  kind, index = str(task['type']), str(task['index'])
  if not index.isdecimal():
    return f'index {task["index"]!r} is not a non-negative integer'
  for address in sum(addresses.values(), []):
    match = re.fullmatch(r'(.+):(\d{1,5})', str(address))
    if not match or not 0 < int(match[2]) < 65536 or not _is_host(match[1]):
      return f'{address!r} is not an address such as "host:2222"'
  if unknown := set(addresses) - {'chief', 'worker', 'ps'}:
    return f'it has tasks of an unknown type, {min(unknown)!r}'
  if len(addresses.get('chief', [])) > 1:
    return 'it has more than one chief'
  if not (addresses.get('chief') or addresses.get('worker')):
    return 'it has no "chief" and no "worker"'
  if int(index) >= len(addresses.get(kind, [])):
    return f'"task" is {kind} {index}, which "cluster" does not list'
  return None


def _is_host(name: str) -> bool:
  """Return whether a name may be that of a host: 'a..b' may not."""
  try:
    name.encode('idna')
  except UnicodeError:
    return False
  return True
