# Every target sets up what it needs: a virtual environment, the packages of requirements-dev.txt, the package built in
# place. FORCE_CUDA, TORCH_CUDA_ARCH_LIST, REQUIRE_EXT, CXX and CUDA_HOME pass through from the environment.

PYTHON ?= python3
VENV ?= .venv

N ?= 10000
SEED ?= 0
DEVICE ?= cpu
JOBS ?= 2

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
FUZZ := --draws $(N) --seed $(SEED) --device $(DEVICE)
SOURCES := setup.py pyproject.toml $(wildcard build_tools/*.py) $(shell find reimplementation/ops/csrc -type f)
SETTINGS := $(FORCE_CUDA) $(TORCH_CUDA_ARCH_LIST) $(REQUIRE_EXT) $(CXX) $(CUDA_HOME) $(CUDA_PATH)

.PHONY: help demo test test-slow check build fuzz fuzz-sanitized sanitize-cuda test-huge soak install-matrix clean always
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: build  ## run the op on the built-in scene, with pictures
	$(BIN)/python -m reimplementation demo

test: build  ## run the tests, JOBS at a time (2); those for a GPU run where there is one
	$(PYTEST)

test-slow: build  ## the tests that compile for long: AOTInductor, the C++ example
	$(PYTEST) -m slow

check: build  ## lint, then test
	$(BIN)/python -m ruff check .
	$(PYTEST)

build: $(VENV)/built  ## compile the extension and install the package in place

soak: build  ## train for half an hour at changing sizes, and watch the memory
	$(BIN)/python -m tests.soak --minutes 30

install-matrix: build  ## install in every way and surroundings that there are here; takes many minutes
	$(BIN)/python -m tests.install.matrix

fuzz: build  ## N random calls of the ops (10000), drawn from SEED, on DEVICE (cpu or cuda), every answer checked
	$(BIN)/python -m tests.fuzz $(FUZZ)

# In a copy of its own: a library with sanitizers in it loads only after theirs. The C++ library comes with them, because
# Python does not load it before the sanitizers look for it.
fuzz-sanitized: $(VENV)/installed  ## the same on the CPU, under AddressSanitizer and UndefinedBehaviorSanitizer
	rm -rf build/sanitized
	SANITIZE=1 REQUIRE_EXT=1 FORCE_CUDA= CUDA_HOME=/none $(BIN)/python setup.py --quiet build --build-lib build/sanitized
	cp -r tests build/sanitized
	cd build/sanitized && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	$(abspath $(BIN))/python -m tests.fuzz $(FUZZ)

sanitize-cuda: build  ## the tests and 200 random calls on a GPU under compute-sanitizer's four tools; takes long
	tests/fuzz/sanitize_cuda.sh $(BIN)/python

test-huge: build  ## tensors beyond 2^31 elements, on a GPU with more than 100 GB
	$(BIN)/python -m pytest -m huge tests/test_huge.py

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info reimplementation/_C.abi3.so reimplementation/_build.json

$(VENV)/built: $(VENV)/installed $(VENV)/settings $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(BIN)/python -m reimplementation info
	@touch $@

$(VENV)/installed: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement $<
	@touch $@

# Changes only when a setting does, so that `FORCE_CUDA=1 make build` after `make build` builds anew.
$(VENV)/settings: $(VENV)/installed always
	@echo "$(SETTINGS)" | cmp --silent - $@ || echo "$(SETTINGS)" > $@
