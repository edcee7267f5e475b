# `make demo` and `make test` need Python >= 3.10, make, and a package index; the rest they set up in .venv.

PYTHON ?= $(firstword $(foreach python,python3 python3.13 python3.12 python3.11 python3.10,$(shell \
	$(python) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $(python))))

.PHONY: help demo test lint clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   a real model, with and without the method, inside and beyond its training length"
	@echo "make test   every check and test"

demo: .venv/installed
	.venv/bin/lminf demo

# One process a core, each with one thread: tests are many and small.
test: lint
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist loadgroup

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:
	rm -rf .venv build dist

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "lminf-eval needs Python >= 3.10, and no python3 here is: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing lminf-eval and what it needs into .venv: some minutes, once"
	.venv/bin/python -m pip install --quiet --editable ".[report]" --constraint constraints.txt
	@touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing lminf-eval and what its tests need into .venv: some minutes, once"
	.venv/bin/python -m pip install --quiet --editable ".[dev]" --constraint constraints.txt
	@touch $@ .venv/installed
