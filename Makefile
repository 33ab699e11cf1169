# Every target works in a fresh clone with nothing installed: what it needs goes
# into one virtual environment, an extra of setup.cfg at a time.
#   make train PYTHON=python3.12    another interpreter (3.10 or newer)
#   make train VENV=/path/to/env    another place for the environment
#   make train TORCH=cpu            torch without CUDA, from PyTorch's own index: 1.3 GB, not 6

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help venv figures paper swap train test test-all lint format docs dist bench bench-report bench-cg bench-products bench-step bench-kronecker bench-scaling gpu clean
.SECONDARY:

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed 's/:.*## /\t/' | expand -t 18
	@echo
	@echo 'The first target sets up $(VENV). PyTorch from PyPI brings CUDA and takes about 6 GB;'
	@echo 'with TORCH=cpu, from PyTorch'"'"'s own index, it takes about 1.3 GB.'

venv: $(VENV)/.with-examples $(VENV)/.with-test $(VENV)/.with-dev ## set up .venv with all that examples, tests and lint need

train: $(VENV)/.with-train ## train a classifier of handwritten digits; table, CSV and plot in runs/digits
	$(BIN)/python examples/digits.py

# A worker a core, at most 8, each of one thread: small tensors on several wait for each other.
# WORKERS=0 runs all in one process, as `python -m pytest FILE` does.
WORKERS ?= auto
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

test: $(VENV)/.with-test ## run the tests that are not slow, on all cores
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.with-test ## run all tests, on all cores
	$(PYTEST)

lint: $(VENV)/.with-dev ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.with-dev ## apply what lint would ask for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# All of it takes about 16 hours: three seeds of 16 optimizers on 11 tasks. `make bench
# TASKS=regression MINUTES=10` shortens all runs so that the task fits; RACE has further arguments,
# as in RACE="--optimizers hf adam" or RACE=--resume after an interruption.
TASKS ?=
MINUTES ?=
SEEDS ?= 3
DATA ?= data
RACE ?=

bench: $(VENV)/.with-benchmarks ## race all optimizers on equal wall-clock; TASKS="regression poisson" for some tasks
	$(BIN)/python benchmarks/race.py --seeds $(SEEDS) --data-root $(DATA) $(if $(TASKS),--tasks $(TASKS)) $(if $(MINUTES),--minutes $(MINUTES)) $(RACE)

bench-report: $(VENV)/.with-benchmarks ## put the races' tables into docs/benchmarks.md, draw their plots anew
	$(BIN)/python benchmarks/race.py --report --into docs/benchmarks.md

figures: ## put the figures of benchmarks/results into README and docs
	$(PYTHON) benchmarks/figures.py

paper: $(VENV)/.with-benchmarks ## reproduce the paper on the Curves autoencoder, about 10 minutes
	$(BIN)/python benchmarks/race.py --tasks curves --optimizers hf-plain hf-pairs hf-growing hf-both hf --budget 45 --seeds 2 --clock cpu

swap: $(VENV)/.with-examples ## print one call of L-BFGS beside steps of ours, about 6 minutes
	$(BIN)/python benchmarks/swap.py

docs: $(VENV)/.with-docs ## build the documentation into build/docs, offline; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

dist: $(VENV)/.with-dist ## build wheel and sdist, check them, and run the README's example in an empty environment
	rm -rf build/lib dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	.ci/try-dist $(PYTHON) dist build/empty

bench-cg: $(VENV)/.with-benchmarks ## print what the pairs are worth to CG, product by product; plot
	$(BIN)/python benchmarks/cg_work.py --data-root $(DATA)

bench-products: $(VENV)/.with-benchmarks ## print the cost of a curvature product beside other packages'
	$(BIN)/python benchmarks/products.py

bench-step: $(VENV)/.with-benchmarks ## print where the time and memory of a step go
	$(BIN)/python benchmarks/step.py

bench-kronecker: $(VENV)/.with-benchmarks ## print what a Kronecker step costs beside dense layers; table and plot
	$(BIN)/python benchmarks/kronecker.py

gpu: $(VENV)/.with-benchmarks $(VENV)/.with-test ## test and measure everything on a CUDA GPU, at most 9 minutes; exits with 2 without one
	$(BIN)/python benchmarks/gpu.py $(GPU)

bench-scaling: $(VENV)/.with-benchmarks ## print how steps scale over processes, and a model's predictions for GPUs; plot
	$(BIN)/python benchmarks/scaling.py

clean: ## remove caches and build outputs, not the environment
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("torch_hf needs Python 3.10 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# With TORCH=cpu torch and torchvision come from PyTorch's index of CPU builds, before the rest.
$(VENV)/.with-torch: | $(VENV)/.created
	@if [ "$(TORCH)" = cpu ]; then \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check torch torchvision --index-url https://download.pytorch.org/whl/cpu; \
	fi
	@touch $@

$(VENV)/.with-%: setup.cfg pyproject.toml | $(VENV)/.with-torch
	@echo "Installing the '$*' extra into $(VENV); the first time fetches PyTorch, about a minute."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@
