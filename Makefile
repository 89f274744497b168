# Each target makes the environment in .venv if it must, then runs one command.
# Flags are passed on: make train ARGS='--max_steps 2000'

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help train cluster eval report tensorboard check lint format types \
  test test-unit faults bench

help: # Shows this list
	@grep -E '^[a-z-]+:.*# ' Makefile | sed -E 's/:.*# /\t/' | expand -t 14

train: .venv/run # Trains: make train ARGS='--max_steps 5000'
	.venv/bin/python cifar10_train.py $(ARGS)

eval: .venv/run # Scores each new checkpoint, beside training
	.venv/bin/python cifar10_eval.py $(ARGS)

report: .venv/run # Scores the latest checkpoint and writes a page about it
	.venv/bin/python cifar10_eval.py --run_once --report cifar10_eval/report.html $(ARGS)

tensorboard: .venv/run # Shows training and evaluation at localhost:6006
	.venv/bin/tensorboard --logdir_spec train:cifar10_train,eval:cifar10_eval $(ARGS)

cluster: .venv/run # Trains in a cluster of WORKERS processes
	.venv/bin/python examples/cluster.py --workers $(WORKERS) $(ARGS)

check: lint types test # What every change has to pass

lint: .venv/dev # Checks style and format
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

format: .venv/dev # Formats the code
	.venv/bin/ruff check --fix . && .venv/bin/ruff format .

types: .venv/dev # Checks type hints
	.venv/bin/mypy

test: .venv/dev # Runs all tests but the long ones of faults
	.venv/bin/python -m pytest $(ARGS)

test-unit: .venv/dev # Runs the tests that take seconds
	.venv/bin/python -m pytest -m 'not slow' tests/unit $(ARGS)

faults: .venv/dev # Injects crashes, full disks and damaged files
	.venv/bin/python -m pytest -m 'faults or not faults' $(ARGS) \
	  tests/faults tests/programs/test_download.py

bench: .venv/run .venv/bench # Compares speed with alternatives
	.venv/bench/bin/python benchmarks/bench.py $(ARGS)

# These two stamps are as new as what is installed. The lock is for 'make train'
# and 'make eval' started together: the second waits, and finds the work done.
.venv/run: requirements.txt
.venv/dev: requirements-dev.txt requirements.txt
.venv/run .venv/dev:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "This needs Python 3.10 to 3.13, which $(PYTHON) is not. Name one: make PYTHON=python3.12 ..."; exit 1; }
	@flock .venv.lock sh -e -c ' \
	  if [ ! -e $@ ] || [ -n "$$(find $^ -newer $@)" ]; then \
	    echo "Installing $< into .venv; the first time, this takes some minutes."; \
	    $(PYTHON) -m venv .venv; \
	    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r $<; \
	    touch $@; \
	  fi'

# What the suite is compared with lives in an environment of its own.
.venv/bench: benchmarks/requirements.txt | .venv/run
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@
