# All of it works on a fresh machine that has Python >= 3.11 (with venv): no compiler, no
# headers of databases. What is installed already is not looked at again. For its tests on
# MariaDB, `make test` installs a server and what mysqlclient builds with, if it may (as
# root, with apt); else it says at its end what it left out.

PYTHON ?= python3
VENV ?= .venv
# Where `make run` keeps its cluster; remove the folder for a new one.
DIR ?= .neo
SEEDS ?= 1000
# Random runs of clusters in the simulator that are part of `make test`.
RUNS ?= 1000
INPUTS ?= 1000000
SECONDS ?= 600
WORKERS ?= 2
# More arguments for neosimple or pytest: make test ARGS="-k config"
ARGS ?=

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: help run test lint simulate mutation fuzz chaos bench bench-check growth clean

help:
	@echo "make run             a cluster on SQLite in $(DIR), in the foreground (DIR=...)"
	@echo "make test            all tests (ARGS=... for pytest, WORKERS=$(WORKERS))"
	@echo "make lint            ruff and mypy"
	@echo "make simulate        clusters in the simulator (SEEDS=$(SEEDS))"
	@echo "make mutation        bugs planted for the simulator to find (SEEDS=$(SEEDS))"
	@echo "make fuzz            malformed input (INPUTS=$(INPUTS))"
	@echo "make chaos           real processes: the scenarios of docs/reliability.md in"
	@echo "                     full (half an hour), random faults (SECONDS=$(SECONDS))"
	@echo "make bench           NEO beside its peers, and a plot in docs/ (ARGS=...)"
	@echo "make bench-check     fail if NEO lost more than 25 % against ZEO"
	@echo "make growth          cost per operation as sizes grow"
	@echo "make clean           remove what make made, the cluster excepted"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "Python >= 3.11 is needed: make PYTHON=/path/to/python3")'
	@# What failed halfway would count as made.
	$(PYTHON) -m venv $(VENV) || { rm -f $(BIN)/python; exit 1; }

$(VENV)/.run: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all]'
	@touch $@

$(VENV)/.test: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/.run

$(VENV)/.bench: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,bench]'
	@touch $@ $(VENV)/.run $(VENV)/.test

run: $(VENV)/.run
	@exec $(BIN)/neosimple $(ARGS) '$(DIR)'

test: $(VENV)/.test
	@sh tests/install_mariadb.sh $(BIN)/python
	NEO_RUNS=$(RUNS) $(PYTEST) -n $(WORKERS) --dist=worksteal --timeout=900 $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

simulate: $(VENV)/.test
	NEO_SEEDS=$(SEEDS) $(PYTEST) -n $(WORKERS) tests/simulation $(ARGS)

mutation: $(VENV)/.test
	$(BIN)/python -m tests.simulation.planted.mutation --seeds $(SEEDS) --jobs $(WORKERS)

fuzz: $(VENV)/.test
	NEO_FUZZ=$(INPUTS) $(PYTEST) -n $(WORKERS) tests/fuzz $(ARGS)

chaos: $(VENV)/.test
	NEO_CHAOS=$(SECONDS) $(PYTEST) tests/cluster/test_chaos.py \
	    tests/cluster/test_scenarios_*.py $(ARGS)

# On a quiet machine: about 10 minutes, 2 minutes, 10 minutes.
bench: $(VENV)/.bench
	$(BIN)/python -m tests.benchmark --plot $(ARGS)

bench-check: $(VENV)/.bench
	$(BIN)/python -m tests.benchmark --check --quick --repetitions 5 $(ARGS)

growth: $(VENV)/.bench
	$(BIN)/python -m tests.benchmark.growth $(ARGS)

clean:
	rm -rf $(VENV) build dist neoppod.egg-info .mypy_cache .ruff_cache .pytest_cache
	rm -rf .hypothesis .coverage
