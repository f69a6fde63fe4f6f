# Everything runs in .venv, made at the first use, with the versions of constraints.txt, which were tested together.
#   Another Python: make demo PYTHON=python3.12. Another set: make demo CONSTRAINTS=my.txt, or CONSTRAINTS= for none.
# On Linux, torch as PyPI has it brings gigabytes of CUDA along; for a machine without a GPU:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
TORCH ?= $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints.txt)
BIN := .venv/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check -qq $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: help demo train test test-slow test-newest test-oldest constraints check docs clean
.NOTPARALLEL:

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1: /p' Makefile

demo: .venv/.demo  ## UniPELT, LoRA and full fine-tuning on 100 messages; writes results/ (two to ten minutes)
	@$(BIN)/python examples/01_unipelt.py

RECIPE ?= examples/recipes/unipelt.yaml
train: .venv/.train  ## an adapter from a recipe: make train RECIPE=examples/recipes/mam.yaml CHANGES="seed=1"
	@$(BIN)/hf-peft-ext train $(RECIPE) $(CHANGES)

# Tests run in JOBS processes of one thread each: most of their time is Python's, not torch's.
JOBS ?= 2
FAST = -m pytest -m "not slow and not gpu" -n $(JOBS)
test test-newest test-oldest: export OMP_NUM_THREADS = 1

test: .venv/.test  ## the fast tests, in two processes: make test JOBS=8
	$(BIN)/python $(FAST)

SLOW ?= tests
test-slow: .venv/.test  ## the slow tests: make test-slow SLOW="tests/test_search.py"
	$(BIN)/python -m pytest -m slow $(SLOW)

test-newest: .venv-newest/.test  ## the fast tests with the newest versions that pyproject.toml allows, in .venv-newest
	.venv-newest/bin/python $(FAST)
	.venv-newest/bin/python tools/versions.py record

test-oldest: .venv-oldest/.test  ## the fast tests with the oldest ones, in .venv-oldest
	.venv-oldest/bin/python $(FAST)
	.venv-oldest/bin/python tools/versions.py record

constraints: .venv/.dev  ## write what is installed in .venv into constraints.txt; after a test-newest that passed: FROM=.venv-newest
	$(or $(FROM),.venv)/bin/python tools/versions.py constraints

check: .venv/.dev  ## style, types, imports, tested versions
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python tools/versions.py check

docs: .venv/.docs  ## the documentation, in docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

clean:  ## remove results, caches and build files; .venv stays
	rm -rf results build dist docs/_build docs/notebooks .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The stamps: .venv/.NAME is younger than pyproject.toml once the extras of NAME are installed.
.venv/.demo: EXTRAS = demo
.venv/.train: EXTRAS = demo,trl
.venv/.test: EXTRAS = test
.venv/.dev: EXTRAS = dev
.venv/.docs: EXTRAS = docs

.venv/.demo .venv/.train .venv/.test .venv/.dev .venv/.docs: pyproject.toml $(CONSTRAINTS) | .venv/.torch
	@echo "Installing hf_peft_ext[$(EXTRAS)] into .venv ..."
	@$(PIP) -e ".[$(EXTRAS)]"
	@touch $@

# first and alone, so that nothing else chooses which torch it is
.venv/.torch:
	@echo "Installing $(firstword $(TORCH)) into .venv ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --disable-pip-version-check -qq $(TORCH)
	@touch $@

# Upgraded at each call, as what is newest changes; torch stays what TORCH says.
.PHONY: .venv-newest/.test
.venv-newest/.test:
	@echo "Installing the newest of everything into .venv-newest ..."
	@test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	@.venv-newest/bin/python -m pip install -qq --upgrade pip
	@.venv-newest/bin/python -m pip install -qq $(TORCH)
	@.venv-newest/bin/python -m pip install -qq --upgrade --upgrade-strategy eager -e ".[dev]" $(firstword $(TORCH))

.venv-oldest/.test: pyproject.toml
	@echo "Installing the oldest of everything into .venv-oldest ..."
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip install -qq $(TORCH)
	@.venv-oldest/bin/python -m pip install -qq packaging
	@.venv-oldest/bin/python tools/versions.py oldest .venv-oldest/oldest.txt
	@.venv-oldest/bin/python -m pip install -qq -c .venv-oldest/oldest.txt -e ".[test]" $(firstword $(TORCH))
	@touch $@

.PHONY: gpu
gpu: .venv/.test  ## what only a GPU can show, at most 12 minutes; writes examples/benchmarks/results/gpu/
	$(BIN)/python examples/benchmarks/gpu.py $(GPU)
