"""Asynchronous training with parameter servers, TensorFlow's classic way.

Parameter servers ("ps") hold the variables. Each worker reads them, computes
gradients and applies them, without waiting for the others.
"""

import time

import tensorflow.compat.v1 as tf

from cifar10_suite.cluster import POLL_SECS, Cluster
from cifar10_suite.tf_config import Addresses, Task

_SILENCE_SECS = 5  # after which a worker counts as gone


class ParameterServers(Cluster):
  """Worker whose variables are on parameter servers."""

  def __init__(self, task: Task, addresses: Addresses):
    super().__init__(task, addresses)
    self.device = tf.train.replica_device_setter(
      worker_device=task.device, cluster=tf.train.ClusterSpec(addresses)
    )

  def scaffold(
    self, config: tf.ConfigProto, **parts: object
  ) -> tf.train.Scaffold:
    config.device_filters.extend(['/job:ps', self.task.device])
    return _Scaffold(self, config, parts)


class _Scaffold(tf.train.Scaffold):
  """Scaffold that waits for parameter servers and variables.

  TensorFlow finalizes the scaffold before it creates each session, also after
  the loss of a server. Its own wait would poll only every 30 s.
  """

  def __init__(
    self, cluster: Cluster, config: tf.ConfigProto, parts: dict[str, object]
  ):
    super().__init__(**parts)
    self._cluster = cluster
    self._session_config = config

  def finalize(self) -> tf.train.Scaffold:
    super().finalize()
    while not self._is_ready():
      time.sleep(POLL_SECS)
    return self

  def _is_ready(self) -> bool:
    """Return whether all servers respond.

    Except for the chief, they must also have initialized variables.
    """
    target, config = self._cluster.master, self._session_config
    try:
      with tf.Session(target, config=config) as session:
        missing = session.run(self.ready_for_local_init_op).size
    except tf.errors.OpError:  # a server is down, which `watch` reports
      return False
    return self._cluster.is_chief or not missing


def serve(server: Cluster, timeout_secs: int) -> None:
  """Run a parameter server until the chief has finished.

  The server then stays until the workers have exited, for at most
  `timeout_secs`. It exits with status 1 if the chief does not answer for that
  long.
  """
  server.join(tf.ConfigProto(), {}, timeout_secs)
  server.leave()
  seen = time.monotonic()
  deadline = seen + timeout_secs
  for statuses in server.read(server.workers):
    now = time.monotonic()
    if any(statuses.values()):
      seen = now
    if now > min(seen + _SILENCE_SECS, deadline):
      break
  print('Training has ended.')
