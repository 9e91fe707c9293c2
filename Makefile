# make demo   sets up and shows the shipped model at work
# make test   sets up and runs the tests
# make docs   builds the documentation into site/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build where there is one for this version; everything else must not pull in another.
TORCH ?= torch==2.13.0

# One thread each: several processes share few cores in tests, and two threads on shared cores are far slower.
export OMP_NUM_THREADS ?= 1
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test lint types docs check experiments clean

demo: $(VENV)/.ready
	$(BIN)/diffusers-ext demo

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-dev
	$(BIN)/pyright

docs: $(VENV)/.ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: lint types docs test

experiments: $(VENV)/.ready-dev
	$(BIN)/python -m pip install --progress-bar on -e ".[experiments]"

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache

$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --disable-pip-version-check -e .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --disable-pip-version-check "pip>=25.1"
	$(BIN)/python -m pip install --group dev
	touch $@

$(VENV)/.ready-docs: $(VENV)/.ready-dev
	$(BIN)/python -m pip install --group docs
	touch $@
