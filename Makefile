# The commands of a checkout. Each works alone on a machine with Python 3.11 to 3.13 and its venv module, make and git.
PYTHON ?= python3
BIN := .venv/bin
# Two test files at a time: while a process of one starts, the other computes.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-all bench-faults soak test-cluster check format

help: ## list the commands
	@grep -hE '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

.venv: .venv/.installed ## install bigtrain into .venv at the pinned versions, once

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train: .venv ## pack text, train on it, kill the run, resume it, sample from it, write a report
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/quickstart.sh

test: .venv ## every capability once, in its smallest form
	$(PYTEST) -m "not slow and not exhaustive and not cluster and not gpu"

test-slow: .venv ## the rest: every layout, more kills, larger sizes
	$(PYTEST) -m "slow and not exhaustive and not gpu"

test-all: .venv ## the rows that CI does not need at each change, by hand: about an hour
	$(PYTEST) -m "exhaustive and not cluster and not gpu"

bench-faults: .venv ## ten faults of each kind: how soon they are seen and repaired, and what they cost
	$(BIN)/python -m tests.bench.bench_faults

soak: .venv ## half an hour of random kills, then an hour of all faults, each held against an undisturbed run
	$(BIN)/python -m tests.bench.soak --faults kills --minutes 30 --every 15
	$(BIN)/python -m tests.bench.soak --faults all --minutes 60 --every 20

test-cluster: .venv ## runs on clusters of isolated nodes, scripts of others, lost heads and drivers: by hand
	$(BIN)/python -m pytest -m "cluster and not gpu"

check: .venv ## lint, format, types, and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
