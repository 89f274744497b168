"""Asynchronous training with parameter servers, TensorFlow's classic way.

Parameter servers ("ps") hold the variables. Each worker reads them, computes
gradients and applies them, without waiting for the others.
"""

import sys

import tensorflow.compat.v1 as tf

from cifar10_suite import stop_signals
from cifar10_suite.cluster import Cluster, wait_until
from cifar10_suite.tf_config import Addresses, Task

_STOP_SECS = 20  # after a signal, for the chief to save the last step


class ParameterServers(Cluster):
  """Worker whose variables are on parameter servers."""

  def __init__(self, task: Task, addresses: Addresses):
    super().__init__(task, addresses)
    self.device = tf.train.replica_device_setter(
      ps_device='/job:ps/cpu:0',
      worker_device=task.device,
      cluster=tf.train.ClusterSpec(addresses),
    )

  def _has_met(self) -> bool:
    """Return whether all servers answer and the chief has set the variables.

    Without this, TensorFlow would look for the variables only every 30 s.
    """
    servers = [self.statuses.get(server) for server in self.servers]
    chief = self.statuses.get(self.workers[0]) or {}
    return all(servers) and (self.is_chief or 'has_variables' in chief)

  def after_create_session(
    self, session: tf.Session, coord: tf.train.Coordinator
  ) -> None:
    if self.is_chief:
      self.publish(has_variables=True)


def serve(server: Cluster, timeout_secs: int) -> None:
  """Run a parameter server until the chief has finished.

  The server then stays until the workers have exited, for at most
  `timeout_secs`. It exits with status 1 if the chief does not answer for that
  long. After a signal, it stays until the chief has saved its last step and
  exited, for at most 20 seconds.
  """
  with stop_signals.handled(server.signals.append):
    # A GPU of this machine belongs to a worker.
    config = tf.ConfigProto(device_count={'GPU': 0})
    server.join(config, {}, timeout_secs)
    wait_until(lambda: server.has_ended or server.stops())
    if not server.has_ended:
      chief = server.workers[0]
      wait_until(lambda: not server.statuses.get(chief), _STOP_SECS)
      sys.exit(128 + server.signals[0])
  server.leave()
  wait_until(
    lambda: not any(server.statuses[worker] for worker in server.workers),
    timeout_secs,
  )
  print('Training has ended.')
