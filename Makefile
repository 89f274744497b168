# Each target creates .venv if necessary, then runs one command.
# ARGS passes flags: make train ARGS='--max_steps 2000'

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
# With GPU=1, the libraries for NVIDIA GPUs are installed, too.
GPU ?=
ENVIRONMENT = .venv/$(if $(GPU),gpu,run)

.DEFAULT_GOAL := help
.PHONY: help train cluster eval report tensorboard check lint format types \
  test test-unit faults bench

help: # Show this list
	@grep -E '^[a-z-]+:.*# ' Makefile | sed -E 's/:.*# /\t/' | expand -t 14

train: $(ENVIRONMENT) # Train: make train ARGS='--max_steps 5000'
	.venv/bin/python cifar10_train.py $(ARGS)

eval: $(ENVIRONMENT) # Score each new checkpoint during training
	.venv/bin/python cifar10_eval.py $(ARGS)

report: $(ENVIRONMENT) # Score the latest checkpoint and write an HTML report
	.venv/bin/python cifar10_eval.py --run_once --report cifar10_eval/report.html $(ARGS)

tensorboard: $(ENVIRONMENT) # Show training and evaluation at localhost:6006
	.venv/bin/tensorboard --logdir_spec train:cifar10_train,eval:cifar10_eval $(ARGS)

cluster: $(ENVIRONMENT) # Train in a cluster of WORKERS processes
	.venv/bin/python examples/cluster.py --workers $(WORKERS) $(ARGS)

check: lint types test # Run all checks that every change must pass

lint: .venv/dev # Check style and format
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

format: .venv/dev # Format the code
	.venv/bin/ruff check --fix . && .venv/bin/ruff format .

types: .venv/dev # Check type hints
	.venv/bin/mypy

test: .venv/dev # Run all tests except the long fault tests
	.venv/bin/python -m pytest $(ARGS)

test-unit: .venv/dev # Run the unit tests, which take seconds
	.venv/bin/python -m pytest -m 'not slow' tests/unit $(ARGS)

faults: .venv/dev # Run all tests, and inject more crashes and damaged files
	.venv/bin/python -m pytest -m 'faults or not faults' $(ARGS)

bench: .venv/run .venv/bench # Compare speed with alternatives
	.venv/bench/bin/python benchmarks/bench.py $(ARGS)

# These files are as new as the installed packages. With the lock, 'make
# eval' waits while 'make train' installs them, if both are started together.
.venv/run: requirements.txt
.venv/gpu: requirements-gpu.txt requirements.txt
.venv/dev: requirements-dev.txt requirements.txt
.venv/run .venv/gpu .venv/dev:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "This needs Python 3.10 to 3.13, which $(PYTHON) is not. Name one: make PYTHON=python3.12 ..."; exit 1; }
	@flock .venv.lock sh -e -c ' \
	  if [ ! -e $@ ] || [ -n "$$(find $^ -newer $@)" ]; then \
	    echo "Installing $< into .venv; the first time, this takes some minutes."; \
	    $(PYTHON) -m venv .venv; \
	    .venv/bin/python -m pip install --disable-pip-version-check -r $<; \
	    touch $@; \
	  fi'

# The packages to compare with are in a separate environment.
.venv/bench: benchmarks/requirements.txt | .venv/run
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@
