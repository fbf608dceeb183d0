# Everything below works in a fresh clone: what it needs it installs into .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Two workers on two cores: more threads than that only take turns.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The lower end of the transformers range, read from pyproject.toml, in a folder laid over .venv; with it what
# that release accepts only in versions older than constraints.txt has, and what those need in turn.
LOWEST := $(shell sed -n 's/^ *"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
OVERLAY := .venv-lowest
OVERLAY_STAMP := $(OVERLAY)/.installed
WITH_OVERLAY := PYTHONPATH=$(CURDIR)/$(OVERLAY)
OVERLAY_PACKAGES := transformers==$(LOWEST) tokenizers==0.22.2 huggingface_hub==1.33.0 \
	httpx==0.28.1 httpcore==1.0.9 certifi==2026.10.18

.DELETE_ON_ERROR:
.PHONY: help venv demo test test-lowest lint format docs clean

help:
	@echo 'make venv         create $(VENV) with the package, its tests and tools, versions from constraints.txt'
	@echo 'make demo         run the main job on the shipped model'
	@echo 'make test         run all tests, the kernels in the interpreter, then test-lowest'
	@echo 'make test-lowest  run the contract tests with transformers $(LOWEST), the oldest that is supported'
	@echo 'make lint         check format, style and types'
	@echo 'make format       format the code and sort its imports'
	@echo 'make docs         build the documentation into site/'
	@echo 'make clean        delete environments, caches and builds'

venv: $(STAMP)

# torch goes first and by its exact version: a looser requirement takes the newest build with all of CUDA. The
# extras `calibrate` and `eval` (datasets, lm-eval) stay out: gigabytes that no test needs.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo 'error: $(PYTHON) not found; set PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "error: expected Python >= 3.10, got %d.%d; set PYTHON=/path/to/python3" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt \
		--editable '.[plot]' --group dev
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m examples.demo

# The variable decides for a whole process, when Triton is imported, so the kernels have one of their own.
test: $(STAMP)
	$(PYTEST) tests --ignore tests/triton_ops/kernels
	TRITON_INTERPRET=1 $(PYTEST) tests/triton_ops/kernels
	@$(MAKE) --no-print-directory test-lowest

$(OVERLAY_STAMP): $(STAMP) Makefile
	rm -rf $(OVERLAY)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OVERLAY) $(OVERLAY_PACKAGES)
	@touch $@

# The version is asked of the module that the tests will import, not of the installer.
test-lowest: $(OVERLAY_STAMP)
	@$(WITH_OVERLAY) $(BIN)/python -c 'import sys, transformers as t; print("contract tests with transformers", t.__version__); sys.exit(t.__version__ != "$(LOWEST)" and "error: expected transformers $(LOWEST), got " + t.__file__)'
	$(WITH_OVERLAY) $(PYTEST) tests/contract

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --select I --fix .

# mkdocs is not in constraints.txt: the built pages are no part of what is tested.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(OVERLAY) build dist site .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
