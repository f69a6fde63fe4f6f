# Everything runs in .venv, made at the first use. Another Python: make demo PYTHON=python3.12
# On Linux, torch as PyPI has it brings gigabytes of CUDA along; for a machine without a GPU:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: help demo train test test-slow check clean
.NOTPARALLEL:

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1: /p' Makefile

demo: .venv/.demo  ## UniPELT, LoRA and full fine-tuning on 100 messages; writes results/ (two to ten minutes)
	@$(BIN)/python examples/01_unipelt.py

RECIPE ?= examples/recipes/unipelt.yaml
train: .venv/.train  ## an adapter from a recipe: make train RECIPE=examples/recipes/mam.yaml CHANGES="seed=1"
	@$(BIN)/hf-peft-ext train $(RECIPE) $(CHANGES)

test: .venv/.test  ## the fast tests
	$(BIN)/python -m pytest -m "not slow and not gpu"

SLOW ?= tests
test-slow: .venv/.test  ## the slow tests: make test-slow SLOW="tests/test_search.py"
	$(BIN)/python -m pytest -m slow $(SLOW)

check: .venv/.dev  ## style, types, imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:  ## remove results, caches and build files; .venv stays
	rm -rf results build dist .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The stamps: .venv/.NAME is younger than pyproject.toml once the extras of NAME are installed.
.venv/.demo: EXTRAS = demo
.venv/.train: EXTRAS = demo,trl
.venv/.test: EXTRAS = test,quantized,trl,demo,studies,search,notebooks
.venv/.dev: EXTRAS = dev

.venv/.demo .venv/.train .venv/.test .venv/.dev: pyproject.toml | .venv/.torch
	@echo "Installing hf_peft_ext[$(EXTRAS)] into .venv ..."
	@$(BIN)/python -m pip install -qq -e ".[$(EXTRAS)]"
	@touch $@

# first and alone, so that nothing else chooses which torch it is
.venv/.torch:
	@echo "Installing $(firstword $(TORCH)) into .venv ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq $(TORCH)
	@touch $@
