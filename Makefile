# `make test` and `make demo` work on a fresh machine that has python3 (3.11.4 or later), make and a network to PyPI.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
DEMO := build/demo
PYTEST := $(BIN)/python -m pytest
AT_ONCE := -n 2 --dist worksteal  # two tests at a time, more than which memory may not allow

.PHONY: test test-all test-faults test-kills test-gpu lint types unit demo demo-model clean

## lint, types and all tests but the slow ones
test: lint types unit

## the same with the slow tests
test-all: lint types
	$(PYTEST) $(AT_ONCE)

## every call that writes below an output folder fails in turn; needs Linux and a C compiler
test-faults: $(INSTALLED)
	$(PYTEST) $(AT_ONCE) tests/faults

## processes of all kinds of runs, killed at 1,200 random moments: half a day
test-kills: $(INSTALLED)
	TRANSCRIPTFORMER_KILL_ROUNDS=50 $(PYTEST) tests/test_kills.py

## the tests that need a CUDA device
test-gpu: $(INSTALLED)
	$(PYTEST) -m gpu

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/mypy

unit: $(INSTALLED)
	$(PYTEST) $(AT_ONCE) -m "not slow"

## embed blood cells with the model that comes with the package, and draw them
demo: $(INSTALLED)
	$(BIN)/transcriptformer demo --output-path demo_results

## train that model anew
demo-model: $(INSTALLED)
	rm -rf $(DEMO)
	$(BIN)/python scripts/prepare_demo.py $(DEMO)
	$(BIN)/transcriptformer train --config conf/demo_train_config.yaml --data-file $(DEMO)/cells.h5ad \
		--protein-embedding $(DEMO)/pbmc_coexpression.h5 --output-path $(DEMO)/run
	rm -rf src/transcriptformer/demo/checkpoint
	cp -r $(DEMO)/run/checkpoint src/transcriptformer/demo/checkpoint

clean:
	rm -rf $(VENV) $(DEMO) demo_results

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	$(BIN)/python -W ignore -c "import umap"  # which compiles itself the first time
	touch $@
