# make demo    sets up and shows the shipped model at work
# make test    sets up and runs the tests
# make docs    builds the documentation into site/
# make dist    builds and checks the wheel and the source archive
# make floors  runs fast tests with the oldest versions that pyproject.toml allows
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build where there is one for this version; everything else must not pull in another.
TORCH ?= torch==2.13.0

# One thread each: several processes share few cores in tests, and two threads on shared cores are far slower.
export OMP_NUM_THREADS ?= 1
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test lint types docs check experiments dist floors clean

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

dist: $(VENV)/.ready-dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

# Of one process each: what needs many is no question of versions.
FLOOR_TESTS = tests/data tests/generation tests/metrics tests/methods/immiscible tests/methods/oms/test_step.py \
	tests/methods/mmd_ddm/test_chain.py tests/methods/domain_studio/test_losses.py tests/training/test_arguments.py \
	tests/training/test_loop.py tests/training/test_folder.py tests/training/test_optimizers.py

floors:
	test -x .venv-floors/bin/python || $(PYTHON) -m venv .venv-floors
	.venv-floors/bin/python -m pip install --disable-pip-version-check uv
	.venv-floors/bin/uv pip install --python .venv-floors/bin/python --resolution lowest-direct \
		-e ".[lora,metrics,optimizers,experiments]" --group dev
	.venv-floors/bin/python -m pytest $(FLOOR_TESTS)

clean:
	rm -rf $(VENV) .venv-floors build dist site .pytest_cache .ruff_cache

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
