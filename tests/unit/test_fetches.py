"""Test sessions that remember their fetches."""

import collections

import pytest
import tensorflow.compat.v1 as tf

from cifar10_suite import fetches

Pair = collections.namedtuple('Pair', ['first', 'second'])


@pytest.fixture
def session(graph):
  """A session with the hook; `session.plain` has none."""
  with tf.Session() as session, tf.Session() as session.plain:
    fetches.LookUpOnce().after_create_session(session, tf.train.Coordinator())
    yield session


@pytest.fixture
def look_ups(session, monkeypatch):
  """The fetches that the session has looked up."""
  found = []
  for name in ('run', 'make_callable'):
    old = getattr(tf.Session, name)
    monkeypatch.setattr(tf.Session, name, _reporting(old, session, found))
  return found


def _reporting(method, session, found):
  # Threads of other tests may still run sessions of their own.
  def report_and_call(self, fetches, *args, **kwargs):
    if self is session:
      found.append(fetches)
    return method(self, fetches, *args, **kwargs)

  return report_and_call


class TestLookUpOnce:
  def test_results_are_those_of_a_plain_session(self, session):
    a, b = tf.constant(1.0), tf.constant([2, 3])
    for wanted in (
      a,
      a.name,
      a.op,
      [a, b, a],
      (b, [a.op]),
      Pair(a, {'b': b}),
      {'caller': a.op, object: {}, int: {'step': a, 'b': [b]}},
    ):
      plain = session.plain.run(wanted)
      for _ in range(3):
        got = session.run(wanted)
        assert repr(got) == repr(plain) and type(got) is type(plain)

  def test_the_same_fetches_are_looked_up_once(self, session, look_ups):
    a, b = tf.constant(1), tf.constant(2)
    for _ in range(5):
      assert session.run({'a': a, 'b': [b]}) == {'a': 1, 'b': [2]}
      assert session.run({'a': b, 'b': [a]}) == {'a': 2, 'b': [1]}
      assert session.run({'a': a}) == {'a': 1}
      assert session.run({'b': a}) == {'b': 1}
      assert session.run([a]) == [1]
      assert session.run((a,)) == (1,)
    assert len(look_ups) == 6

  def test_feeds_options_and_metadata_have_their_effect(self, session):
    a = tf.placeholder_with_default(1, [])
    assert [session.run(a, {a: number}) for number in (2, 3)] == [2, 3]
    assert session.run(a) == 1
    traced = tf.RunMetadata()
    options = tf.RunOptions(trace_level=tf.RunOptions.FULL_TRACE)
    assert session.run(a, options=options, run_metadata=traced) == 1
    assert traced.step_stats.dev_stats

  def test_an_error_names_its_operation(self, session):
    checked = tf.debugging.check_numerics(tf.constant(float('nan')), 'a weight')
    with pytest.raises(tf.errors.InvalidArgumentError) as plain:
      session.plain.run([checked])
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
      session.run([checked])
    assert error.value.op is checked.op
    assert error.value.node_def == plain.value.node_def
    assert error.value.message == plain.value.message

  def test_what_cannot_be_fetched_is_refused(self, session):
    for wanted, error in ((7, TypeError), ('no:0', ValueError)):
      for _ in range(2):
        with pytest.raises(error):
          session.run(wanted)
