# What README, CONTRIBUTING and .ci/run call. Needs Rust 1.89, Python 3.10 and make; everything else is installed into .venv.
#
#   make demo                          the first of the README's two commands
#   make test PYTHON=python3.12        the interpreter that .venv is made with, where there is none yet
#   make test TORCH_INDEX=URL          torch from another package index, for instance one with CPU-only builds

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=

python := $(abspath $(VENV))/bin/python
bin := $(abspath $(VENV))/bin
uv_install := $(bin)/uv pip install --python $(python) --constraint constraints.txt
# CPUs that this machine cannot run are at least compiled for, where their standard library is installed.
cross_target := aarch64-unknown-linux-gnu
has_cross_target = -d "$$(rustc --print sysroot)/lib/rustlib/$(cross_target)"
benches = $(filter-out %/environment.py,$(shell grep -l "^if __name__" benches/python/*.py))
rust_sources := Cargo.toml Cargo.lock $(shell find rust cuda -name '*.rs' -o -name Cargo.toml -o -path 'cuda/*' -type f)

# The CUDA compiler has a folder of its own, since torch asks for other versions of what it is made of. Only Linux has one.
# LOWBIT_CUDA=0 does without; LOWBIT_NVCC=PATH takes another.
cuda_compiler := $(shell sed -n 's/.*"\(cuda-toolkit\[[^;"]*\);.*/\1/p' pyproject.toml)
ifeq ($(shell uname -s)-$(LOWBIT_CUDA)-$(LOWBIT_NVCC),Linux--)
export LOWBIT_NVCC := $(abspath $(VENV))/cuda/nvidia/cu13/bin/nvcc
nvcc := $(VENV)/.nvcc
endif

# One interpreter for every build of the bindings, so that none invalidates another's.
export PYO3_PYTHON := $(python)
export PATH := $(bin):$(PATH)

##@ Use

.PHONY: demo
demo: $(VENV)/.extension ## quantize a real language model, compare the formats, write demo-output/
	$(bin)/lowbit demo

.PHONY: build
build: $(VENV)/.extension ## the virtual environment with lowbit_rs in it, nothing more

.PHONY: wheel
wheel: $(VENV)/.requirements $(nvcc) ## a wheel for this machine in dist/
	$(bin)/maturin build --release --out dist

##@ Check

.PHONY: test
test: test-rust test-python ## every test

.PHONY: test-rust
test-rust: $(nvcc) ## the tests of the core: neither Python nor torch, nor a GPU
	cargo test --locked --package lowbit_core --package lowbit_kernels --all-features

.PHONY: test-python
test-python: $(VENV)/.extension ## the tests of the Python package
	$(python) -m pytest

.PHONY: lint
lint: lint-rust lint-python ## formatting, clippy, ruff, mypy, stubs against the binary

.PHONY: lint-rust
lint-rust: $(VENV)/.requirements $(nvcc)
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets --all-features -- -D warnings
	cargo clippy --locked --package lowbit_core --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings -A rustdoc::private-intra-doc-links' cargo doc --locked --workspace --no-deps --document-private-items --quiet
	@if [ $(has_cross_target) ]; then \
	    set -x; cargo clippy --locked --package lowbit_core --target $(cross_target) -- -D warnings; \
	else \
	    echo 'lint: NEON is not checked: rustup target add $(cross_target)'; \
	fi

.PHONY: lint-python
lint-python: $(VENV)/.extension
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	MYPYPATH=python $(python) -m mypy.stubtest lowbit_rs._native --allowlist <(echo lowbit_rs._native.__all__) # PyO3's own

.PHONY: format
format: $(VENV)/.requirements ## rewrite the sources as lint wants them
	cargo fmt --all
	$(bin)/ruff check --fix-only --quiet
	$(bin)/ruff format

##@ Measure

.PHONY: bench
bench: $(VENV)/.bench ## every script of benches/python; results in benches/results/
	for script in $(benches); do echo "== $$script"; $(python) "$$script"; done

##@ Tidy

.PHONY: pins
pins: $(VENV)/.requirements ## constraints.txt anew, after a change of the dependencies in pyproject.toml
	$(bin)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.10 --no-annotate --quiet \
	    --custom-compile-command 'make pins' --output-file constraints.txt

.PHONY: clean
clean: ## remove what builds and tests made; .venv stays
	rm -rf target dist demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f python/lowbit_rs/_native*.so python/lowbit_rs/_native*.pyd $(VENV)/.extension
	find python tests benches -type d \( -name __pycache__ -o -name '.*_cache' \) -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## remove .venv, too
	rm -rf $(VENV)

.PHONY: help
help: ## this list
	@awk 'BEGIN { FS = ":.*## " } \
	    /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	    /^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# The virtual environment. A stamp in it says what was done, so a second call costs nothing.

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"PYTHON: got {sys.version.split()[0]}, expected 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.requirements: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(python) -m pip --version >/dev/null 2>&1 || $(python) -m ensurepip
	$(python) -m pip install --quiet --disable-pip-version-check uv
	$(if $(TORCH_INDEX),$(uv_install) --index $(TORCH_INDEX) torch)
	$(uv_install) --requirement pyproject.toml --extra dev --extra demo
	touch $@

$(VENV)/.nvcc: pyproject.toml | $(VENV)/.requirements
	$(bin)/uv pip install --quiet --python $(python) --target $(VENV)/cuda '$(cuda_compiler)'
	touch $@

$(VENV)/.extension: $(rust_sources) $(VENV)/.requirements $(nvcc)
	VIRTUAL_ENV=$(abspath $(VENV)) $(bin)/maturin develop --release --uv
	touch $@

$(VENV)/.bench: $(VENV)/.extension
	$(uv_install) --requirement pyproject.toml --extra bench
	touch $@
