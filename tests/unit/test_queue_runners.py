"""Test on which threads queue runners run their operations."""

import os
import queue as queues
import sys
import threading

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from cifar10_suite import queue_runners


def thread_names_of_two_operations():
  names = [
    tf.py_func(lambda: threading.current_thread().name, [], tf.string)
    for _ in range(2)
  ]
  queue = tf.FIFOQueue(5, [tf.string, tf.string], shapes=[[], []])
  tf.train.add_queue_runner(tf.train.QueueRunner(queue, [queue.enqueue(names)]))
  return queue.dequeue()


class TestOnOwnThreads:
  def test_operations_run_on_the_threads_of_their_runners(self, graph):
    with queue_runners.on_own_threads():
      names = thread_names_of_two_operations()
    with tf.train.MonitoredSession() as session:
      for _ in range(10):
        for name in session.run(names):
          assert b'QueueRunnerThread' in name

  @pytest.mark.skipif(sys.platform != 'linux', reason='has no such priorities')
  def test_the_threads_have_a_lower_priority(self, graph):
    def niceness():
      return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    measured = tf.py_func(lambda: np.int32(niceness()), [], tf.int32)
    numbers = tf.FIFOQueue(4, tf.int32, shapes=[[]])
    with queue_runners.on_own_threads():
      tf.train.add_queue_runner(
        tf.train.QueueRunner(
          numbers, [numbers.enqueue(tf.reshape(measured, []))]
        )
      )
    number = numbers.dequeue()
    before = niceness()
    with tf.train.MonitoredSession() as session:
      assert session.run(number) == min(before + 5, 19)
      assert niceness() == before

  def test_operations_of_one_runner_stay_together(self, graph):
    turns = queues.Queue()
    waiting = tf.py_func(lambda: np.int32(turns.get()), [], tf.int32)
    numbers = tf.FIFOQueue(4, tf.int32, shapes=[[]])
    operations = [numbers.enqueue(0), numbers.enqueue(tf.reshape(waiting, []))]
    with queue_runners.on_own_threads():
      tf.train.add_queue_runner(tf.train.QueueRunner(numbers, operations))
    both = [numbers.dequeue(), numbers.dequeue()]
    with tf.train.MonitoredSession() as session:
      got = []
      for turn in range(1, 11):
        turns.put(turn)
        got.append(sorted(session.run(both)))
      turns.put(0)  # for the operation that waits
    assert got == [[0, turn] for turn in range(1, 11)]

  def test_end_of_input_closes_the_queue(self, graph):
    with queue_runners.on_own_threads():
      numbers = tf.train.range_input_producer(5, num_epochs=1, shuffle=False)
      batch = tf.train.batch(
        [numbers.dequeue()], 2, allow_smaller_final_batch=True
      )
    got = []
    with tf.train.MonitoredSession() as session:
      while not session.should_stop():
        got.extend(session.run(batch))
    np.testing.assert_array_equal(got, range(5))

  def test_an_error_ends_the_session(self, graph):
    queue = tf.FIFOQueue(1, tf.float32, shapes=[[]])
    value = tf.debugging.check_numerics(tf.random.normal([]) * np.inf, 'input')
    with queue_runners.on_own_threads():
      tf.train.add_queue_runner(
        tf.train.QueueRunner(queue, [queue.enqueue(value)])
      )
    number = queue.dequeue()
    with (
      pytest.raises(tf.errors.InvalidArgumentError, match='input'),
      tf.train.MonitoredSession() as session,
    ):
      session.run(number)

  def test_runners_start_once_per_session(self, graph):
    with queue_runners.on_own_threads():
      thread_names_of_two_operations()
    for _ in range(2):
      with tf.Session() as session:
        coordinator = tf.train.Coordinator()
        threads = tf.train.start_queue_runners(session, coordinator)
        assert threads
        assert not tf.train.start_queue_runners(session, coordinator)
        coordinator.request_stop()
        coordinator.join(threads)

  def test_earlier_runners_stay_as_they_are(self, graph):
    thread_names_of_two_operations()
    runners = tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS)
    with queue_runners.on_own_threads():
      thread_names_of_two_operations()
    assert tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS)[:1] == runners
