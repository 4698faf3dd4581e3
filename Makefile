# Set up, try and test moac. Needs python3 (3.11 or newer), pip, make and git; nothing else.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
MODEL := .cache/smollm2-135m-instruct
PACKAGE := out
MAKEFLAGS += --no-print-directory

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow test-race lint format types clean

help:
	@echo 'make quickstart   install, fetch a small model, compile it, ask it a question'
	@echo 'make test         install, run the tests that take no real model'
	@echo 'make test-slow    run the tests on the small model (minutes)'
	@echo 'make test-race    try the threads of the CPU kernels for races, a million phases at a time'
	@echo 'make lint types   check style and types'
	@echo 'make format       write the style'
	@echo 'make clean        remove what the tools leave, and the environment'

quickstart: $(MODEL)/config.json
	MOAC_CACHE=.cache/moac $(BIN)/moac compile $(MODEL) --budget 0.5 --force -o $(PACKAGE)
	$(BIN)/moac inspect $(PACKAGE)
	$(BIN)/moac run $(PACKAGE) --prompt 'What is the capital of France?'

test: $(INSTALLED)
	$(BIN)/pytest -q -m 'not slow'

test-slow: $(MODEL)/config.json
	MOAC_CACHE=$(CURDIR)/.cache/moac $(BIN)/pytest -q -m slow

test-race: $(INSTALLED)
	$(BIN)/pytest -q tests/test_team.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED)
	$(BIN)/mypy

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp makes the second run quick; it ages when what is to be installed changes.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: $(PYTHON) is older than 3.11; run make PYTHON=python3.11' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(MODEL)/config.json: | $(INSTALLED)
	$(BIN)/python examples/fetch_smollm2.py $(MODEL)
