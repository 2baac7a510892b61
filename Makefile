# Every target sets up what it needs: a virtual environment, the packages of requirements-dev.txt, the package built in
# place. The settings of a build (docs/installation.md) pass through from the environment.

PYTHON ?= python3
VENV ?= .venv

N ?= 10000
SEED ?= 0
DEVICE ?= cpu
BACKEND ?=
JOBS ?= 2

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
FUZZ := --draws $(N) --seed $(SEED) --device $(DEVICE) $(if $(BACKEND),--backend $(BACKEND))
SOURCES := setup.py pyproject.toml $(wildcard build_tools/*.py) $(shell find reimplementation/ops/csrc -type f)
SETTINGS := $(FORCE_CUDA) $(TORCH_CUDA_ARCH_LIST) $(REQUIRE_EXT) $(CXX) $(CUDA_HOME) $(CUDA_PATH) \
	$(REIMPLEMENTATION_NO_CUDA) $(REIMPLEMENTATION_NO_EXT)
CLANG_FORMAT = find reimplementation build_tools examples -regex '.*\.\(cpp\|h\|cu\|cuh\)' -exec $(BIN)/clang-format

.PHONY: help demo train-demo test test-slow test-clients check lint format build wheel fuzz fuzz-sanitized sanitize-cuda \
	test-huge soak install-matrix clean always
.DEFAULT_GOAL := help

help:  ## list what make can do
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: build  ## run both ops on the built-in scene, and draw what they see
	$(BIN)/python -m reimplementation demo

train-demo: build  ## train a small detector for some minutes, and draw what it finds before and after
	$(BIN)/python -m reimplementation train --preset tiny --work-dir build/train-demo --show build/train-demo/shown.png

test: build  ## run the tests, JOBS at a time (2); those that need a GPU run where there is one
	$(PYTEST)

test-slow: build  ## run the tests that compile for long: AOTInductor, and the C++ example
	$(PYTEST) -m slow

test-clients: build  ## test other people's models on our ops, each package in an environment of its own; installs much
	tests/integrations/environments.sh $(BIN)/python $(CLIENTS)

check: lint test  ## do all that a change must pass: lint, then test

lint: $(VENV)/installed  ## check types, and style and format of Python and kernels
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(CLANG_FORMAT) --dry-run --Werror {} +

format: $(VENV)/installed  ## bring Python and kernels into their format
	$(BIN)/ruff format .
	$(CLANG_FORMAT) -i {} +

build: $(VENV)/built  ## compile the extension, and install the package in place

# setuptools packs whatever it finds in build/lib, files of earlier versions too.
wheel: $(VENV)/installed  ## build the wheel to publish, for systems since 2018 and every default GPU, and try it; takes long
	rm -rf build/lib* build/bdist* build/wheel dist
	MANYLINUX=1 REQUIRE_EXT=1 FORCE_CUDA=1 \
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --plat manylinux_2_28_x86_64 --only-plat \
	--exclude libtorch_cpu.so --wheel-dir dist build/wheel/*.whl
	$(BIN)/python -m tests.install.matrix --wheel dist/*.whl --only '^wheel'
	du -h dist/*.whl

soak: build  ## train for half an hour at changing sizes, and watch the memory
	$(BIN)/python -m tests.soak --minutes 30

install-matrix: build  ## install in every way and in every surroundings that this machine has; takes long
	$(BIN)/python -m tests.install.matrix

fuzz: build  ## check the answers of N random calls of the ops (10000), drawn from SEED, on DEVICE (cpu or cuda), of one BACKEND or all
	$(BIN)/python -m tests.fuzz $(FUZZ)

# In a copy of its own: a library with sanitizers in it loads only after theirs. The C++ library comes with them, because
# Python does not load it before the sanitizers look for it.
fuzz-sanitized: $(VENV)/installed  ## do the same on the CPU, under AddressSanitizer and UndefinedBehaviorSanitizer
	rm -rf build/sanitized
	SANITIZE=1 REQUIRE_EXT=1 REIMPLEMENTATION_NO_CUDA=1 $(BIN)/python setup.py --quiet build --build-lib build/sanitized
	cp -r tests build/sanitized
	cd build/sanitized && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	$(abspath $(BIN))/python -m tests.fuzz $(FUZZ)

sanitize-cuda: build  ## run the tests and 200 random calls on a GPU under compute-sanitizer's four tools; takes long
	tests/fuzz/sanitize_cuda.sh $(BIN)/python

test-huge: build  ## test tensors beyond 2^31 elements, on a GPU with more than 100 GB
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
