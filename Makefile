# Each target does its own set-up: a virtual environment in .venv, made anew only when needed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test lint soak calm gpu gpu-bundle set-up clean

PY := .venv/bin/python
STAMP := .venv/set-up.stamp
# Several ranks share the machine's cores; more threads than that only wait for each other.
export OMP_NUM_THREADS := 1
# A core is idle for a quarter of the time while one run's ranks wait for each other, and some tests
# wait for a limit to pass. Of the ways to deal tests out, this one keeps their order and gives a
# process one more when it has one left.
THREE_AT_A_TIME := -n 3 --dist loadgroup --no-loadscope-reorder

help:  ## what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

demo: $(STAMP)  ## train twice, kill a worker in the second run, compare every bit
	$(PY) launch/demo/run.py

test: lint  ## lint, then every test; the slowest ones are listed at the end
	$(PY) -m pytest $(THREE_AT_A_TIME) --durations=15 --durations-min=1 $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff, mypy, and whether patches/README.md fits the patch rows
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -W ignore -m megatron_moetion ledger --check

soak: $(STAMP)  ## 60 failures at random instants for each cut (SOAK_ARGS="--failures 9 --seed 5")
	$(PY) -m tests.soak $(SOAK_ARGS)

calm: $(STAMP)  ## 30 minutes without a failure, slow and on busy cores: nothing is taken for one
	$(PY) -m tests.soak.calm $(CALM_ARGS)

gpu: ## the same identity with real CUDA streams, all ranks on one GPU
	launch/gpu/run.sh

gpu-bundle: $(STAMP)  ## pack what a GPU machine without network lacks
	$(PY) launch/gpu/bundle.py

set-up: $(STAMP)  ## only the virtual environment

clean:  ## remove the virtual environment and what the demo left
	rm -rf .venv .moetion

# Without --no-compile pip compiles all of torch, more than is ever imported.
$(STAMP): pyproject.toml setup.py launch/constraints.txt
	@python="$$(launch/find-python.sh)"; echo "set-up: .venv by $$python"; \
	    "$$python" -m venv .venv
	@echo "set-up: pip install of torch, megatron-core and the tools (some GiB)"
	@$(PY) -m pip install -qq --no-compile -c launch/constraints.txt -e '.[dev]'
	@touch $@
