# Each target creates .venv if necessary, then runs one command.
# ARGS passes flags: make train ARGS='--max_steps 2000'
# RUN names a run: with RUN=fast, its files are in runs/fast/train and .../eval.

PYTHON ?= python3
ARGS ?=
RUN ?=
WORKERS ?= 2
# With GPU=1, the libraries for NVIDIA GPUs are installed, too.
GPU ?=
ENVIRONMENT = .venv/$(if $(GPU),gpu,run)
N ?= 3
ROW ?=

# Names with spaces would fall apart in commands.
$(if $(word 2,$(RUN)),$(error RUN=$(RUN) contains a space. Choose another name))

comma := ,
train_dir = $(if $(RUN),runs/$(RUN)/train,cifar10_train)
eval_dir = $(if $(RUN),runs/$(RUN)/eval,cifar10_eval)
train_flags = $(if $(RUN),--train_dir $(train_dir) --eval_dir $(eval_dir))
eval_flags = $(if $(RUN),--checkpoint_dir $(train_dir) --eval_dir $(eval_dir))
board_flags = $(if $(RUN),--logdir runs/$(RUN),--logdir_spec train:$(train_dir)$(comma)eval:$(eval_dir))

# Shows and runs a command. Ctrl-C (status 130) is not an error; the
# trap lets the shell wait while the program saves its last step.
show_and_run = @$(info $(strip $(1)))trap : INT; $(1) || [ $$? -eq 130 ]

.DEFAULT_GOAL := help
.PHONY: help train reproduce seeds cluster eval report tensorboard check lint \
  format types test test-unit faults bench

help: # Show this list
	@grep -E '^[a-z-]+:.*# ' Makefile | sed -E 's/:.*# /\t/' | expand -t 14

train: $(ENVIRONMENT) # Train: make train RUN=short ARGS='--max_steps 5000'
	$(call show_and_run,.venv/bin/python cifar10_train.py $(train_flags) $(ARGS))

eval: $(ENVIRONMENT) # Score the newest checkpoints during training
	$(call show_and_run,.venv/bin/python cifar10_eval.py --eval_interval_secs 30 $(eval_flags) $(ARGS))

report: $(ENVIRONMENT) # Score the latest checkpoint and write an HTML report
	$(call show_and_run,.venv/bin/python cifar10_eval.py --run_once --report auto $(eval_flags) $(ARGS))

tensorboard: $(ENVIRONMENT) # Show training and evaluation; RUN=. shows all named runs
	$(call show_and_run,.venv/bin/python -m cifar10_suite.board $(board_flags) $(ARGS))

reproduce: $(ENVIRONMENT) # Make the table of results again; ROW=fast makes one row
	$(call show_and_run,.venv/bin/python benchmarks/reproduce.py $(if $(ROW),--row $(ROW)) $(ARGS))

seeds: $(ENVIRONMENT) # Train and score N seeds: make seeds N=5 ARGS='--recipe fast'
	$(call show_and_run,.venv/bin/python examples/seeds.py --seeds $(N) --dir runs/$(or $(RUN),seeds) $(ARGS))

cluster: $(ENVIRONMENT) # Train in a cluster of WORKERS processes
	$(call show_and_run,.venv/bin/python examples/cluster.py --workers $(WORKERS) $(train_flags) $(ARGS))

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
# Compiling the modules afterwards uses all cores; pip would use one.
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
	    .venv/bin/python -m pip install --disable-pip-version-check --no-compile -r $<; \
	    .venv/bin/python -m compileall -qq -j 0 .venv/lib || true; \
	    touch $@; \
	  fi'

# The packages to compare with are in a separate environment.
.venv/bench: benchmarks/requirements.txt | .venv/run
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet --disable-pip-version-check -r $< || \
	  { touch -t 197001010000 $@; exit 1; }
	touch $@
