# Everything from a machine with only Python 3.11+ and make.
#   make demo    the whole loop on the embedded default: label, train, score, report
#   make test    the test suite, but for the few slow ones
#   make test-all  all of it: make test, then make test-slow
#   make chaos   kill loops and fuzzers, MINUTES=10 of them, and what they came to
#   make test-gpu the tests that need a CUDA card, which `make test` does not use
#   make docs    the documentation as pages, into build/docs; any broken link or heading is an error
#   make check   what a change must pass: format, lint, types, docs, tests

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A process a core, each with one thread (tests/conftest.py); neighbours in a file share what they set up.
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal --durations=10
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow test-all test-gpu chaos docs check format speed clean

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15) and "Python 3.11 to 3.14 is needed, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[demo,teachers,dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[docs]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/distill demo

test: $(VENV)/.dev
	$(PYTEST)

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

test-all: test test-slow

test-gpu: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m cuda

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . build/docs

MINUTES ?= 10

chaos: $(VENV)/.dev
	$(BIN)/python -m tests.chaos --minutes $(MINUTES)

check: $(VENV)/.dev docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)
	$(PYTEST) -m slow

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

speed: $(VENV)/.dev
	for script in tests/speed/*.py; do name=$$(basename $$script .py); echo "== $$name"; \
	  $(BIN)/python -m tests.speed.$$name || echo "$$name wants arguments, or failed"; done

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
