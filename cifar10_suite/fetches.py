"""A session that looks up the fetches of a training step only once."""

from collections.abc import Callable, Hashable

import tensorflow.compat.v1 as tf


class LookUpOnce(tf.train.SessionRunHook):
  """Hook that lets its session remember how to run the same fetches again.

  `tf.Session.run` looks up all fetches in the graph, in each call. In a step,
  most hooks fetch the global step, so this takes a quarter of a millisecond, in
  which the processor waits.
  """

  def after_create_session(
    self, session: tf.Session, coord: tf.train.Coordinator
  ) -> None:
    session.run = _remembering_run(session)


def _remembering_run(session: tf.Session) -> Callable:
  """Return a function with the arguments, results and errors of `session.run`.

  Runs with feeds or options are left to `session.run`. Otherwise, nothing is
  added to `run_metadata`, since only options ask for it.
  """
  plain_run = session.run
  known: dict[Hashable, Callable] = {}

  def run(
    fetches: object,
    feed_dict: dict | None = None,
    options: tf.RunOptions | None = None,
    run_metadata: tf.RunMetadata | None = None,
  ) -> object:
    if feed_dict or (options and options.ByteSize()):
      return plain_run(fetches, feed_dict, options, run_metadata)
    key = _key(fetches)
    if key not in known:
      known[key] = session.make_callable(fetches)
    # As in `session.run`, this adds the failed operation to an error.
    return session._do_call(known[key])

  return run


def _key(fetches: object) -> Hashable:
  """Return a key that is equal for equal fetches in equal containers."""
  if isinstance(fetches, dict):
    return dict, *((key, _key(value)) for key, value in fetches.items())
  if isinstance(fetches, (list, tuple)):
    return type(fetches), *map(_key, fetches)
  return fetches
