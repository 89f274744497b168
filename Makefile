# Each target makes the environment in .venv if it must, then runs one command.
# Flags are passed on: make train ARGS='--max_steps 2000'

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2

.PHONY: train cluster eval report tensorboard test faults lint bench

train: .venv/run
	.venv/bin/python cifar10_train.py $(ARGS)

cluster: .venv/run
	.venv/bin/python examples/cluster.py --workers $(WORKERS) $(ARGS)

eval: .venv/run
	.venv/bin/python cifar10_eval.py $(ARGS)

report: .venv/run
	.venv/bin/python cifar10_eval.py --run_once --report cifar10_eval/report.html $(ARGS)

tensorboard: .venv/run
	.venv/bin/tensorboard --logdir_spec train:cifar10_train,eval:cifar10_eval $(ARGS)

test: .venv/dev
	.venv/bin/python -m pytest $(ARGS)

faults: .venv/dev
	.venv/bin/python -m pytest -m 'faults or not faults' $(ARGS) \
	  tests/test_faults.py tests/test_directories.py tests/test_download.py \
	  tests/test_cifar10_cluster.py

lint: .venv/dev
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

bench: .venv/run .venv/bench
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
