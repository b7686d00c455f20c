# The two commands of the README are `make demo` and `make test`; the others are for people who work on ttaq.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= benchmarks/results
BUDGET_S ?= 540
# A CUDA build of torch brings the triton it was built with; only a CPU build needs one from us.
TRITON_FOR_CPU := triton==3.9.0
# Real images and weights are used where they stand beside the project or where the user says they are.
ifneq ($(wildcard ../shared/data/README.md),)
export TTAQ_DATA ?= $(abspath ../shared/data)
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check lint types dist bench gpu clean

demo: $(VENV)/.demo
	$(BIN)/ttaq demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: lint types test

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist . > /dev/null
	for file in dist/*.whl dist/*.tar.gz; do \
	  target=$$(mktemp -d) && $(BIN)/pip install -q --no-deps --target $$target $$file \
	  && (cd $$target && PYTHONPATH=$$target $(abspath $(BIN))/python -c "import ttaq, ttaq_kernels, pathlib, sys; \
	      sys.exit(not all(pathlib.Path(m.__file__).is_relative_to('$$target') and (pathlib.Path(m.__file__).parent / 'py.typed').exists() for m in (ttaq, ttaq_kernels)))") \
	  && rm -r $$target && echo "$$file installs" || exit 1; \
	done

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.run --device cpu

# Runs with the python3 that is there: a GPU machine often has no network. Each call continues where the last one stopped.
gpu:
	$(PYTHON) -m pytest -m gpu
	$(PYTHON) -m benchmarks.run --device cuda --budget-s $(BUDGET_S) --out $(OUT)/kernels_cuda.jsonl

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ttaq needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Name another one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first, so that its own triton is known before ours is considered.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(BIN)/pip install -q -c constraints.txt torch
	if test "$$(uname)" = Linux && $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' 2> /dev/null; \
	  then $(BIN)/pip install -q $(TRITON_FOR_CPU); fi
	touch $@

$(VENV)/.demo: pyproject.toml constraints.txt $(VENV)/.torch
	$(BIN)/pip install -q -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@
