"""Measure clusters on slow links.

  sudo .venv/bin/python benchmarks/links.py [--batch_size 32] [--steps 60]

Simulates hosts with links of 100 Mbit/s and 1 Gbit/s, on which 2 and 4 workers
train by all-reduce, and by gradients to one parameter server. All share the
processor of this machine, so a small batch shows the links best. Prints
examples/sec of the whole cluster next to what the size of the gradients and the
bandwidth permit.
"""

import argparse
import json
import os
import re
import tempfile
import time

from hosts import Hosts

_MEGABYTES = 4 * 1_068_298 / 1e6  # of the variables, and of the gradients
_TIMEOUT = 600
_RATE = re.compile(r': step (\d+), loss = .*\(([\d.]+) examples/sec')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument('--steps', type=int, default=60)
  args = parser.parse_args()
  print('link        workers  way         examples/sec  permitted by the link')
  for rate, megabytes in (('100mbit', 12.5), ('1gbit', 125.0)):
    for workers in (2, 4):
      for ps in (0, 1):
        measured = measure(rate, workers, ps, args.batch_size, args.steps)
        # Links send and receive at the same time.
        times = workers if ps else 2 * (workers - 1) / workers
        secs = times * _MEGABYTES / megabytes
        way = 'one server' if ps else 'all-reduce'
        limit = workers * args.batch_size / secs
        print(f'{rate:12}{workers:7}  {way}{measured:14.0f}{limit:23.0f}')


def measure(
  rate: str, workers: int, ps: int, batch_size: int, steps: int
) -> float:
  """Return the examples/sec of a cluster on links of a rate."""
  kinds = ['ps'] * ps + ['chief'] + ['worker'] * (workers - 1)
  with tempfile.TemporaryDirectory() as folder:
    hosts = Hosts(len(kinds))
    try:
      hosts.limit_links(rate)
      addresses: dict[str, list[str]] = {}
      for kind, address in zip(kinds, hosts.addresses, strict=True):
        addresses.setdefault(kind, []).append(f'{address}:2222')
      # With a parameter server, the update of each worker counts as a step.
      per_line = steps * (workers if ps else 1)
      for number, kind in enumerate(kinds):
        index = number - kinds.index(kind)
        config = {'cluster': addresses, 'task': {'type': kind, 'index': index}}
        with open(f'{folder}/{kind}-{index}.log', 'w') as log:
          hosts.start(
            number,
            [
              'cifar10_train.py',
              f'--train_dir={folder}/train',
              f'--batch_size={batch_size}',
              f'--log_frequency={per_line}',
              f'--max_steps={2 * per_line + 1}',
              '--save_summaries_steps=1000000',
            ],
            log,
            {'TF_CONFIG': json.dumps(config)},
          )
      path = f'{folder}/chief-0.log'
      deadline = time.monotonic() + _TIMEOUT
      while time.monotonic() < deadline:
        with open(path) as log:
          lines = _RATE.findall(log.read())
        if len(lines) >= 3 or (ps and len(lines) == 2):
          return float(lines[-1][1])
        time.sleep(1)
      with open(path) as log:
        raise TimeoutError(log.read())
    finally:
      hosts.close()


if __name__ == '__main__':
  os.environ.pop('TF_CONFIG', None)
  main()
