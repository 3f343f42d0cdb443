# make demo    merge two small models that come with polymerge; results in out/demo
# make test    the fast tests
# make check   what must be clean before a change is merged: lint, format, types, tests
#
# Each makes .venv first, when it is missing or its requirements have changed. PYTHON picks the interpreter.

PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test check

help:
	@sed -n 's/^# //p' Makefile | head -3

demo: .venv/runs
	@$(BIN)/polymerge demo out/demo

test: .venv/runs
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 -m "not slow"

check: .venv/checks
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 -m "not slow"

.venv/runs: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "polymerge needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12")'
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing polymerge and its dependencies into .venv"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

.venv/checks: .venv/runs
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
