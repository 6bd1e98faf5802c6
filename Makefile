# `make demo` shows the library at work on a real model, `make test` checks everything. Both need Python and make.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check clean

demo: .venv/ready
	$(BIN)/s4c generate --compare --max-new-tokens 192 "Explain to a child why the sky is blue."

test: check
	$(BIN)/python -m pytest

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv

.venv/ready: pyproject.toml setup.py constraints.txt $(wildcard s4c/models/native/src/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
