"""Unit tests of the loading of TensorFlow, which conftest.py does."""

import gc
import os


def test_excludes_tensorflow_from_garbage_collection():
  assert gc.isenabled()
  assert gc.get_freeze_count() > 100_000


def test_leaves_the_environment_to_keras():
  assert 'TF_USE_LEGACY_KERAS' not in os.environ
