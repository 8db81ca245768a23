# The two commands of the README are `make demo` and `make test`; the rest is for working on sparsetile.
PYTHON ?= python3
BIN := .venv/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint format docs clean

demo: .venv/.demo
	$(BIN)/sparsetile train --compare --out runs/demo
	$(BIN)/sparsetile show --run runs/demo

test: .venv/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.docs
	$(BIN)/pdoc --docformat google --output-directory build/docs sparsetile

clean:
	rm -rf .venv build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --quiet --editable '.[plot]'
	touch $@

.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --quiet --editable '.[dev]'
	touch $@

.venv/.docs: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --quiet --editable '.[docs]'
	touch $@
