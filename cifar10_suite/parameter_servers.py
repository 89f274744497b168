"""Asynchronous training with parameter servers, TensorFlow's classic way.

Parameter servers ("ps") hold the variables. Each worker reads them, computes
gradients and applies them, without waiting for the others.
"""

import time
from collections.abc import Callable

import tensorflow.compat.v1 as tf

from cifar10_suite.cluster import (
  FAREWELL_SECS,
  POLL_SECS,
  Cluster,
  Status,
  Task,
  TaskName,
  ignore_ends_of_sessions,
  in_background,
  start_server,
  watch,
)


class ParameterServers(Cluster):
  """A worker, as in `Cluster`, whose variables are on parameter servers."""

  def __init__(self, task: Task):
    super().__init__(task)
    self.device = tf.train.replica_device_setter(
      worker_device=task.device,
      cluster=tf.train.ClusterSpec(task.addresses),
      ps_strategy=balanced(len(task.servers)),
    )

  def join(
    self, config: tf.ConfigProto, settings: dict[str, object], timeout_secs: int
  ) -> None:
    config.device_filters.extend(['/job:ps', self.task.device])
    self.master = start_server(self.task, config).target
    self._status = Status(self.task.name, self.master)
    self._status.publish(ended=False)
    needed = {*self.task.servers, self.task.workers[0]} - {self.task.name}

    def look() -> None:
      for _ in watch(self.task, list(needed), timeout_secs):
        pass

    in_background(look)
    ignore_ends_of_sessions()

  def scaffold(
    self, config: tf.ConfigProto, **parts: object
  ) -> tf.train.Scaffold:
    return _Scaffold(self, config, parts)

  def leave(self) -> None:
    """Stay until all parameter servers know that this worker has finished."""
    self._status.publish(ended=True)
    deadline = time.monotonic() + FAREWELL_SECS
    for statuses in watch(self.task, self.task.servers, FAREWELL_SECS + 1):
      heard = [status and status['ended'] for status in statuses.values()]
      if all(str(self.task.name) in (names or []) for names in heard):
        return
      if time.monotonic() > deadline:
        print('Cannot notify all parameter servers of the end of training.')
        return


class _Scaffold(tf.train.Scaffold):
  """Scaffold that waits for parameter servers and variables.

  TensorFlow finalizes it for each session: the first one and those created
  after the loss of a server.
  """

  def __init__(
    self,
    cluster: ParameterServers,
    config: tf.ConfigProto,
    parts: dict[str, object],
  ):
    super().__init__(**parts)
    self._cluster = cluster
    self._session_config = config

  def finalize(self) -> tf.train.Scaffold:
    super().finalize()
    # TensorFlow would check only every 30 s.
    while self._missing_variables() and not self._cluster.task.is_chief:
      time.sleep(POLL_SECS)
    return self

  def _missing_variables(self) -> int:
    """Return the number of uninitialized variables, once servers respond."""
    while True:
      try:
        with tf.Session(
          self._cluster.master, config=self._session_config
        ) as session:
          return session.run(self.ready_for_local_init_op).size
      except tf.errors.OpError:  # a server is down, which `watch` reports
        time.sleep(POLL_SECS)


def balanced(count: int) -> Callable[[tf.Operation], int]:
  """Return a strategy that places variables on the server with the least data.

  Args:
    count: number of parameter servers.
  """
  loads = [0] * count

  def choose(op: tf.Operation) -> int:
    shape = tf.TensorShape(op.get_attr('shape'))
    server = loads.index(min(loads))
    loads[server] += shape.num_elements() * op.get_attr('dtype').size
    return server

  return choose


def serve(task: Task, timeout_secs: float) -> None:
  """Run a parameter server until the chief and the workers have finished.

  After the chief has finished, the server waits for the workers for at most
  `timeout_secs`, and gives up earlier if none of them has responded for
  `FAREWELL_SECS`. It then stays until they have exited, for at most
  `FAREWELL_SECS`, so that the last one still hears it.

  Raises:
    UserError: if the chief has not responded for `timeout_secs`.
  """
  status = Status(task.name, start_server(task, tf.ConfigProto()).target)
  status.publish(ended=[])
  chief, *others = task.workers
  ended: set[str] = set()

  def note(statuses: dict[TaskName, dict | None]) -> None:
    ended.update(
      str(name) for name, it in statuses.items() if it and it['ended']
    )
    status.publish(ended=sorted(ended))

  for statuses in watch(task, [chief], timeout_secs, others):
    note(statuses)
    if str(chief) in ended:
      break
  seen = time.monotonic()
  deadline = seen + timeout_secs
  for statuses in watch(task, [], timeout_secs, task.workers):
    note(statuses)
    now = time.monotonic()
    if any(statuses.values()):
      seen = now
    if len(ended) == len(task.workers):
      if seen < now:
        break
      deadline = min(deadline, now + FAREWELL_SECS)
    if now > min(seen + FAREWELL_SECS, deadline):
      break
  print('Training has ended.')
