# `make demo` shows the library at work on a real model, `make test` checks everything. Both need Python and make.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check sanitize clean

demo: .venv/ready
	$(BIN)/s4c generate --compare --max-new-tokens 192 "Tell me a short story about a fox who learns to swim."

test: check
	$(BIN)/python -m pytest

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The C++ core under the address, undefined behaviour and thread sanitizers; two minutes.
SANITIZED := build/sanitize/address/test_core build/sanitize/thread/test_core
build/sanitize/address/%: SANITIZER = -g1 -fno-sanitize-recover -fsanitize=address,undefined
build/sanitize/thread/%: SANITIZER = -g1 -fsanitize=thread

sanitize: $(SANITIZED)
	for test in $^; do $$test || exit 1; done

$(SANITIZED): tests/native/test_core.cpp setup.py $(wildcard s4c/models/native/src/*) | .venv/ready
	S4C_OPTIMISE=-O1 CFLAGS="$(SANITIZER)" CXXFLAGS="$(SANITIZER)" LDFLAGS="$(SANITIZER)" \
		$(BIN)/python setup.py -q build_ext --build-temp $(@D)/objects --build-lib $(@D)
	$(CXX) -std=c++17 -O1 -pthread $(SANITIZER) -Is4c/models/native/src $< $(@D)/s4c/models/native/_core*.so \
		-Wl,-rpath,$(abspath $(@D))/s4c/models/native -o $@

clean:
	rm -rf .venv build

.venv/ready: pyproject.toml setup.py constraints.txt $(wildcard s4c/models/native/src/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
