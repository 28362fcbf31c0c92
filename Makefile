# `make test` and `make demo` work on a fresh machine that has python3 (3.11.4 or later), make and a network to PyPI.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
GOLDEN := tests/golden
PYTEST := $(BIN)/python -m pytest
AT_ONCE := -n 2 --dist worksteal  # two tests at a time, more than which memory may not allow

.PHONY: test test-all test-gpu lint types unit demo clean

## lint, types and all tests but the slow ones
test: lint types unit

## the same with the slow tests
test-all: lint types
	$(PYTEST) $(AT_ONCE)

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

## embed the synthetic cells of the test suite
demo: $(INSTALLED)
	$(BIN)/transcriptformer inference --checkpoint-path $(GOLDEN)/checkpoint --data-file $(GOLDEN)/cells.h5ad \
		--output-path demo_results --config-override model.inference_config.output_keys=[embeddings,llh]
	$(BIN)/python -c "import anndata; print(anndata.read_h5ad('demo_results/embeddings.h5ad'))"

clean:
	rm -rf $(VENV) demo_results

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@
