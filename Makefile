# `make test` and `make demo` need only python3 (3.11.4 or later), make and access to PyPI.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
DEMO := build/demo
PYTEST := $(BIN)/python -m pytest
AT_ONCE := -n 2 --dist worksteal  # more parallel tests may exceed memory

.PHONY: test test-all test-faults test-kills test-gpu lint types unit demo demo-model clean

## lint, types and all tests except slow ones
test: lint types unit

## lint, types and all tests
test-all: lint types
	$(PYTEST) $(AT_ONCE)

## fault injection for every call that writes below an output folder; needs Linux and a C compiler
test-faults: $(INSTALLED)
	$(PYTEST) $(AT_ONCE) tests/faults

## kill processes of all kinds of runs at 1,200 random moments; takes half a day
test-kills: $(INSTALLED)
	TRANSCRIPTFORMER_KILL_ROUNDS=50 $(PYTEST) tests/test_kills.py

## tests that need a CUDA device
test-gpu: $(INSTALLED)
	$(PYTEST) -m gpu

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/mypy

unit: $(INSTALLED)
	$(PYTEST) $(AT_ONCE) -m "not slow"

## embed blood cells with the bundled model and draw a UMAP
demo: $(INSTALLED)
	$(BIN)/transcriptformer demo --output-path demo_results

## retrain the bundled model
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
	$(BIN)/python -W ignore -c "import umap"  # compiles on first import
	touch $@
