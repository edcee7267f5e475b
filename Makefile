# `make demo` and `make test` need Python >= 3.10, make, and a package index; the rest they set up in .venv.

PYTHON ?= $(firstword $(foreach python,python3 python3.13 python3.12 python3.11 python3.10,$(shell \
	$(python) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $(python))))
# Every other release of torch may be a build for CUDA, of several gigabytes.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: help demo test lint test-newest test-oldest test-torch clean
.DELETE_ON_ERROR:

help:
	@echo "make demo         a real model, with and without the method, inside and beyond its training length"
	@echo "make test         every check and test, on the releases of constraints.txt"
	@echo "make test-newest  the quick tests, every family and two real runs, on the newest releases (torch as in constraints.txt)"
	@echo "make test-oldest  the same on the oldest releases that pyproject.toml declares"
	@echo "make test-torch TORCH=2.14.1 PYTHON=python3.13   the same on another torch and Python, newest otherwise"

demo: .venv/installed
	.venv/bin/lminf demo

# One process a core, each with one thread: tests are many and small.
test: lint
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist loadgroup

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test-newest: .venv-newest/installed
	tests/try_releases.sh .venv-newest

test-oldest: .venv-oldest/installed
	tests/try_releases.sh .venv-oldest

test-torch: .venv-torch-$(TORCH)/installed
	tests/try_releases.sh .venv-torch-$(TORCH)

clean:
	rm -rf .venv .venv-newest .venv-oldest .venv-torch-* build dist

%/bin/python:
	@test -n "$(PYTHON)" || { echo "lminf-eval needs Python >= 3.10, and no python3 here is: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $*

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing lminf-eval and what it needs into .venv: some minutes, once"
	.venv/bin/python -m pip install --quiet --editable ".[report]" --constraint constraints.txt
	@touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing lminf-eval and what its tests need into .venv: some minutes, once"
	.venv/bin/python -m pip install --quiet --editable ".[dev]" --constraint constraints.txt
	@touch $@ .venv/installed

.venv-newest/installed .venv-torch-$(TORCH)/installed: %/installed: %/bin/python pyproject.toml constraints.txt
	@echo "installing the newest releases of what lminf-eval needs into $*: some minutes, once"
	$*/bin/python -m pip install --quiet torch==$(TORCH)
	$*/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[dev]" torch==$(TORCH)
	@touch $@

.venv-oldest/installed: %/installed: %/bin/python pyproject.toml constraints.txt tests/lower_bounds.py
	@echo "installing the oldest releases that lminf-eval declares into $*: some minutes, once"
	$*/bin/python -m pip install --quiet packaging tomli
	$*/bin/python tests/lower_bounds.py pyproject.toml constraints.txt > $*/constraints.txt
	$*/bin/python -m pip install --quiet --editable ".[dev]" --constraint $*/constraints.txt
	@touch $@
