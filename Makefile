# The two commands of the README are `make demo` and `make test`; the others are for people who work on ttaq.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST := $(VENV)/triton-3.6
OUT ?= benchmarks/results
BUDGET_S ?= 540
# A CUDA build of torch brings the triton it was built with; only a CPU build needs one from us.
TRITON_FOR_CPU := triton==3.9.0
# Real images and weights are used where they stand beside the project or where the user says they are.
ifneq ($(wildcard ../shared/data/README.md),)
export TTAQ_DATA ?= $(abspath ../shared/data)
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check lint types dist compat golden bench gpu clean

demo: $(VENV)/.demo
	$(BIN)/ttaq demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile

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

# The kernels with the oldest Triton that is supported: compiled ahead of time, and interpreted.
compat: $(OLDEST)/.dev
	PYTEST_ADDOPTS='-W "ignore:Conversion of an array:DeprecationWarning"' $(OLDEST)/bin/python -m pytest -m "aot or interpreter" tests/kernels

# Rewrites what the tests expect of the compiled kernels, for both versions of Triton. The difference is to be read.
golden: $(VENV)/.dev $(OLDEST)/.dev
	$(BIN)/python tests/kernels/kernel_golden.py
	$(OLDEST)/bin/python tests/kernels/kernel_golden.py

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.run --device cpu

# Runs with the python3 that is there: a GPU machine often has no network. Each call continues where the last one stopped.
gpu:
	$(PYTHON) -m benchmarks.gpu --budget-s $(BUDGET_S) --out $(OUT)

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

# The interpreter of Triton 3.6 fails with NumPy 2.4, and does with older ones what they warn of.
$(OLDEST)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -q -c constraints.txt torch 'numpy<2.4'
	$(OLDEST)/bin/pip install -q -c constraints.txt triton==3.6.0 'numpy<2.4'
	$(OLDEST)/bin/pip install -q -c constraints.txt -e '.[test]' 'numpy<2.4'
	touch $@
