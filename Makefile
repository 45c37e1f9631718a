# `make serve` and `make test` are all that a newcomer needs; each sets up what it needs first.
# `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# How many processes run tests; tests/conftest.py says which tests stay in one process.
# Tests of real processes wait for a quarter of their time, so that two cores have work for three.
quick: JOBS ?= 2
test: JOBS ?= 3
PYTEST = $(BIN)/python -m pytest
PARALLEL = -n $(JOBS) --no-loadscope-reorder

# The gpu extra (torch, transformers, qwen-tts: several GB with CUDA) is for machines that can use it.
WITH_QWEN ?= $(shell nvidia-smi >/dev/null 2>&1 && echo 1)

# Each group of clients has an environment of its own. wyoming-openai needs Python 3.12; without it, its tests skip.
CLIENTS := .cache/clients
PYTHON_OF_agents = $(PYTHON)
PYTHON_OF_wyoming ?= python3.12

.PHONY: serve serve-cluster setup help quick test soak clients bench gpu gpu-full install lint format clean

serve: $(VENV)/.serve$(if $(filter 1,$(WITH_QWEN)),-gpu) ## set up, then serve on 127.0.0.1:8000
	$(BIN)/python -m server

serve-cluster: $(VENV)/.cluster$(if $(filter 1,$(WITH_QWEN)),-gpu) ## the same with all GPUs of this machine, or two workers on its CPU
	$(BIN)/python -m server cluster

setup: $(VENV)/.serve$(if $(filter 1,$(WITH_QWEN)),-gpu) ## what serve does before it serves

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1: /p' $(firstword $(MAKEFILE_LIST))

quick: $(VENV)/.quick ## the tests that need neither torch nor a running service, within a minute
	$(PYTEST) $(PARALLEL) --quick -r fE

test: install lint ## set up, then everything that must pass
	$(PYTEST) $(PARALLEL) --durations 15 --durations-min 5

soak: install ## the long runs that `make test` leaves out, and a long search by Hypothesis
	$(PYTEST) -m 'soak or hypothesis' --hypothesis-profile soak --timeout 3600

clients: install $(CLIENTS)/.agents $(CLIENTS)/.wyoming ## unmodified clients of others against the real service
	$(PYTEST) -m clients tests/clients

install: $(VENV)/.all ## the environment alone, with all that the tests need

lint: install ## ruff, mypy and the walls between the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## apply what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## time the front end, the engine beside the official package, open-loop load and growing texts
	$(BIN)/python -m tests.benchmarks.frontend
	$(BIN)/python -m tests.benchmarks.engine
	$(BIN)/python -m tests.benchmarks.load
	$(BIN)/python -m tests.benchmarks.live_text

# Where a machine brings its own packages: make gpu BIN=/the/folder/of/its/python
gpu: $(if $(filter $(VENV)/bin,$(BIN)),install) ## what needs a GPU, in stages, within eight minutes on one
	$(BIN)/python -m tests.benchmarks.gpu

gpu-full: $(if $(filter $(VENV)/bin,$(BIN)),install) ## all tests that need a GPU, and every table at full size
	$(BIN)/python -m tests.benchmarks.gpu --full

clean: ## remove the environment and all caches
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# ensurepip is checked first: a venv that fails for the lack of it leaves a python behind, and looks complete.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.12")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) lacks its venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.serve-gpu: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[demo,gpu]'
	@touch $@ $(VENV)/.serve

$(VENV)/.cluster: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[demo,cluster]'
	@touch $@ $(VENV)/.serve

$(VENV)/.cluster-gpu: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[demo,cluster,gpu]'
	@touch $@ $(VENV)/.cluster $(VENV)/.serve $(VENV)/.serve-gpu

$(VENV)/.quick: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[demo,dev]'
	@touch $@ $(VENV)/.serve

$(VENV)/.all: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[demo,gpu,cluster,otel,dev]'
	@touch $@ $(VENV)/.quick $(VENV)/.serve $(VENV)/.serve-gpu

$(CLIENTS)/.agents $(CLIENTS)/.wyoming: $(CLIENTS)/.%: pyproject.toml
	@if $(PYTHON_OF_$*) -c '' 2>/dev/null; then \
		$(PYTHON_OF_$*) -m venv $(CLIENTS)/$* \
		&& $(CLIENTS)/$*/bin/python -m pip install --quiet 'pip>=25.1' \
		&& $(CLIENTS)/$*/bin/python -m pip install --quiet --disable-pip-version-check --group $* \
		&& touch $@; \
	else echo "$(PYTHON_OF_$*) is not installed; the tests of $* will be skipped"; fi
