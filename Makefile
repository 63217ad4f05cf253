# make quickstart   install, then distill, export and measure a small model on this machine
# make test         install the test dependencies, then run the tests
# make check        check format, lint and types before a commit; make fix fixes the first two
# make wheel        build dist/clipkd-*.whl
# make readme       run the quickstart, and write its table, chart and gain into README.md
#
# Variables: PYTHON=python3.12 (interpreter), OUT=runs/other (the quickstart's run directory), PYTEST='-k losses'
# (arguments for pytest; PYTEST=--slow also runs the slow tests).

PYTHON ?= python3
OUT ?= runs/quickstart
PYTEST ?=

BIN := .venv/bin
SOURCES := pyproject.toml constraints.txt Makefile
# The pinned NumPy and SciPy have no build for Python 3.10, so pip chooses the versions there.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	$(shell $(BIN)/python -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')

.PHONY: quickstart test check fix wheel readme

quickstart: .venv/installed
	@$(BIN)/clipkd run glyphs --out $(OUT)

# One process for each core, and one thread in each: most tests are single-threaded.
test: .venv/installed-dev
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive \
		$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile $(PYTEST)

check: .venv/installed-dev
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary

fix: .venv/installed-dev
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

wheel: .venv/installed
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

readme: quickstart
	@$(BIN)/python benchmarks/readme_table.py $(OUT)

# Stamp files: pip runs again only when these sources change.

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
	@echo 'installing the test dependencies into .venv' >&2
	@$(PIP) -e '.[all,dev]'
	@touch $@
