# Every target works in a fresh clone with nothing installed: what it needs goes
# into one virtual environment, an extra of setup.cfg at a time.
#   make train PYTHON=python3.12    another interpreter (3.10 or newer)
#   make train VENV=/path/to/env    another place for the environment

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help venv train test test-all lint format bench-products bench-step bench-kronecker bench-scaling clean
.SECONDARY:

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed 's/:.*## /\t/' | expand -t 18

venv: $(VENV)/.with-examples $(VENV)/.with-test $(VENV)/.with-dev ## set up .venv with all that examples, tests and lint need

train: $(VENV)/.with-examples ## train a classifier of handwritten digits; table, CSV and plot in runs/digits
	$(BIN)/python examples/digits.py

test: $(VENV)/.with-test ## run the tests that are not slow
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.with-test ## run all tests
	$(BIN)/python -m pytest

lint: $(VENV)/.with-dev ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.with-dev ## apply what lint would ask for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-products: $(VENV)/.with-benchmarks ## print the cost of a curvature product beside other packages'
	$(BIN)/python benchmarks/products.py

bench-step: $(VENV)/.with-benchmarks ## print where the time and memory of a step go
	$(BIN)/python benchmarks/step.py

bench-kronecker: $(VENV)/.with-benchmarks ## print what a Kronecker step costs beside dense layers; table and plot
	$(BIN)/python benchmarks/kronecker.py

bench-scaling: $(VENV)/.with-benchmarks ## print how steps scale over processes, and a model's predictions for GPUs; plot
	$(BIN)/python benchmarks/scaling.py

clean: ## remove caches and build outputs, not the environment
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("torch_hf needs Python 3.10 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.with-%: setup.cfg pyproject.toml | $(VENV)/.created
	@echo "Installing the '$*' extra into $(VENV); the first time fetches PyTorch, about a minute."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@
