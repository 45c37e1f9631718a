# `make serve` and `make test` are all that a newcomer needs; each sets up what it needs first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The gpu extra (torch, transformers, qwen-tts: several GB with CUDA) is for machines that can use it.
WITH_QWEN ?= $(shell nvidia-smi >/dev/null 2>&1 && echo 1)

.PHONY: serve test install lint format bench gpu soak clean

serve: $(VENV)/.serve$(if $(filter 1,$(WITH_QWEN)),-gpu) ## set up, then serve on 127.0.0.1:8000
	$(BIN)/python -m server

test: install lint ## set up, then everything that must pass
	$(BIN)/python -m pytest

install: $(VENV)/.all ## the environment alone, with all that the tests need

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## the front end, the engine beside the official package, and open-loop load
	$(BIN)/python -m tests.benchmarks.frontend
	$(BIN)/python -m tests.benchmarks.engine
	$(BIN)/python -m tests.benchmarks.load

# Where a machine brings its own packages: make gpu BIN=/the/folder/of/its/python
gpu: $(if $(filter $(VENV)/bin,$(BIN)),install) ## what only a GPU can tell: its tests, then every table at full size
	$(BIN)/python -m pytest tests/gpu -s -rs
	for size in 1.7B 0.6B; do \
		checkpoint=$$($(BIN)/python -m tests.benchmarks.endless --size $$size) \
		&& $(BIN)/python -m tests.benchmarks.engine --device cuda --checkpoint "$$checkpoint" \
		&& $(BIN)/python -m tests.benchmarks.load --device cuda --size $$size || exit 1; \
	done

soak: install ## the long runs that `make test` leaves out, and a long search by Hypothesis
	$(BIN)/python -m pytest -m 'soak or hypothesis' --hypothesis-profile soak --timeout 3600

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# ensurepip is asked for first: a venv that fails for the lack of it leaves a python behind, and looks made.
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

$(VENV)/.all: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[demo,gpu,dev]'
	@touch $@ $(VENV)/.serve $(VENV)/.serve-gpu
