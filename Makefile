# Every target works alone in a fresh clone: it creates .venv and installs what it needs.

PYTHON  ?= python3
WORKERS ?= 2

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# One stamp for each set of extras, so that `make quickstart` installs no developer tools.
BENCH    := $(VENV)/.stamp-bench
DEV      := $(VENV)/.stamp-dev
DOCS     := $(VENV)/.stamp-docs
EXAMPLES := $(VENV)/.stamp-examples

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help quickstart test test-all lint docs bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

quickstart: $(EXAMPLES)  ## Run examples/quickstart.py on real data
	$(BIN)/python examples/quickstart.py

# One torch thread a worker: two workers with all threads each would be slower than one.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: $(DEV)  ## Run the tests, doctests, code blocks and examples
	$(PYTEST) --durations=10

test-all: $(DEV)  ## Run the slow statistical tests as well
	$(PYTEST) --durations=20 -m ""

lint: $(DEV)  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# -E: all pages anew, as their outputs depend on the library and not on the page alone.
docs: $(DOCS)  ## Build the documentation into docs/_build/html, check its links
	rm -rf docs/_build
	$(BIN)/python -m sphinx -W --keep-going -E -j $(WORKERS) -b html docs docs/_build/html
	$(BIN)/python docs/check_links.py docs/_build/html

bench: $(BENCH)  ## Run every benchmarks/bench_*.py
	@for script in $(sort $(wildcard benchmarks/bench_*.py)); do \
	    echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:  ## Remove the environment, caches and build outputs
	rm -rf $(VENV) build dist docs/_build .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first: it is by far the largest, and everything else builds on its version.
$(VENV)/.stamp-torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	@touch $@

$(VENV)/.stamp-%: pyproject.toml constraints.txt $(VENV)/.stamp-torch
	$(PIP) -e '.[$*]'
	@touch $@
