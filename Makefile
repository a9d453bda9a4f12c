# `make` lists the targets. Each one that runs Python first sets up .venv when it is missing or stale.
# PYTHON=python3.12 picks the interpreter that .venv is made with, ARGS="..." adds arguments to pytest,
# WORKERS=0 runs it in one process.

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.stamp

.PHONY: help demo test lint bench clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' Makefile

demo: $(STAMP)  ## train compact and expanded networks on real digits, contract, print the figures
	$(BIN)/fxexpand demo --out build/demo

test: $(STAMP)  ## run the tests
	$(BIN)/pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(STAMP)  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	sh .ci/types

bench: $(STAMP)  ## run every module in benchmarks/
	@set -e; none=yes; \
	for file in benchmarks/[!_]*.py; do \
	    [ -e "$$file" ] || continue; \
	    none=; module=benchmarks.$$(basename "$$file" .py); \
	    echo "== $$module"; $(BIN)/python -m "$$module"; \
	done; \
	[ -z "$$none" ] || echo "There are no benchmarks yet."

clean:  ## remove what the other targets made, all but .venv
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

# The stamp holds the path of the checkout it was made in. Where that is another one, or the interpreter is gone,
# the environment is stale however new the stamp.
ifneq ($(shell $(BIN)/python -c "" 2>/dev/null && cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

$(STAMP): setup.cfg pyproject.toml
	@PYTHON="$(PYTHON)" sh .ci/venv
