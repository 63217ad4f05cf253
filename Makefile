# make quickstart   install, then distil, export and measure a small model on this machine
# make test         install what the tests need, then run them
# make check        format, lint, types: the gate before a commit; make fix repairs the first two
# make wheel        dist/clipkd-*.whl
#
# PYTHON=python3.12 chooses the interpreter, OUT=runs/other the quickstart's run, PYTEST='-k losses' what to test
# (PYTEST=--slow: the tests of more than some ten seconds too).

PYTHON ?= python3
OUT ?= runs/quickstart
PYTEST ?=

BIN := .venv/bin
SOURCES := pyproject.toml constraints.txt Makefile
# The pinned NumPy and SciPy have no build for Python 3.10, where pip therefore chooses.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	$(shell $(BIN)/python -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')

.PHONY: quickstart test check fix wheel

quickstart: .venv/installed
	@$(BIN)/clipkd run glyphs --out $(OUT)

test: .venv/installed-dev
	@$(BIN)/python -m pytest $(PYTEST)

check: .venv/installed-dev
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary

fix: .venv/installed-dev
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

wheel: .venv/installed
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

# The stamps: pip runs again only when what it would install has changed.

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo \
		"$(PYTHON): clipkd needs Python 3.10 or later; got: $$($(PYTHON) --version 2>&1)." \
		"Next: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/python $(SOURCES)
	@echo 'installing into .venv: some GB, minutes' >&2
	@$(PIP) -e '.[all]'
	@touch $@

.venv/installed-dev: .venv/installed
	@echo 'installing what the tests need into .venv' >&2
	@$(PIP) -e '.[all,dev]'
	@touch $@
