"""Addresses and environments of the tasks of a cluster on this machine."""

import json

from examples.cluster import free_ports


def addresses_of(ps=0, workers=2):
  """Return a cluster on this machine, with the first worker as chief."""
  ports = [f'localhost:{port}' for port in free_ports(ps + workers)]
  cluster = {
    'ps': ports[:ps],
    'chief': ports[ps : ps + 1],
    'worker': ports[ps + 1 :],
  }
  return {kind: some for kind, some in cluster.items() if some}


def environment(addresses, kind, index=0):
  task = {'type': kind, 'index': index}
  return {'TF_CONFIG': json.dumps({'cluster': addresses, 'task': task})}
