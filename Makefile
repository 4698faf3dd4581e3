# Set up, try and test moac. Needs python3 (3.11 or newer), pip, make and git; nothing else.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TOOLS := .venv-tools/bin
TOOLED := .venv-tools/.installed
MODEL := .cache/smollm2-135m-instruct
PACKAGE := out
# Chosen by hand: torch without a version would bring gigabytes of CUDA packages.
TORCH := torch==2.13.0
EVERY := dev,eval,cuda,ray
comma := ,
# Of `make fuzz`: how many hostile inputs a parser gets, drawn from which seed, and which parsers
# (all of them where none is named).
CASES := 1000
SEED := 0
PARSERS :=
MAKEFLAGS += --no-print-directory

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow test-oldest test-newest test-race test-memory test-ray test-faults \
	fuzz lock lint format types docs models pictures dist audit sbom licences clean

help:
	@echo 'make quickstart   install, fetch a small model, compile it, ask it a question'
	@echo 'make test         install, run the tests that take no real model'
	@echo 'make test-slow    the tests on the small model, and all that take long (test-faults among them)'
	@echo 'make test-race    try the threads of the CPU kernels for races, a million phases at a time'
	@echo 'make test-ray     the tests of replicas, with Ray, which the others do without'
	@echo 'make test-memory  run the CPU kernels under the address and undefined-behaviour sanitizers'
	@echo 'make fuzz         give every parser hostile inputs: CASES=1000 of each, from SEED=0'
	@echo 'make test-faults  kill compiles, fill disks, flip bits (many minutes)'
	@echo 'make test-oldest  the tests, with the oldest versions that pyproject.toml allows'
	@echo 'make test-newest  the tests, with the newest ones; torch stays in both'
	@echo 'make lock         choose versions anew: constraints files, and hashes for CI'
	@echo 'make lint types   check style and types'
	@echo 'make format       write the style'
	@echo 'make docs         write docs/CLI.md and docs/schema from the code'
	@echo 'make models       measure every family and write docs/MODELS.md'
	@echo 'make pictures     draw docs/pictures from benchmarks/results'
	@echo 'make dist         wheel and sdist into dist/, checked, and tried in a fresh environment'
	@echo 'make audit        ask for known vulnerabilities of every pinned version'
	@echo 'make sbom         dist/moac.cdx.json: all that is installed, in CycloneDX'
	@echo 'make licences     print the licences of all that is installed'
	@echo 'make clean        remove what the tools leave, and the environment'

quickstart: $(MODEL)/config.json
	MOAC_CACHE=.cache/moac $(BIN)/moac compile $(MODEL) --budget 0.5 --effort quick --force -o $(PACKAGE)
	$(BIN)/moac inspect $(PACKAGE)
	$(BIN)/moac run $(PACKAGE) --prompt 'What is the capital of France?'

test: $(INSTALLED)
	$(BIN)/pytest -q -m 'not slow'

test-slow: $(MODEL)/config.json
	MOAC_CACHE=$(CURDIR)/.cache/moac $(BIN)/pytest -q -m slow

test-race: $(INSTALLED)
	$(BIN)/pytest -q tests/test_team.py

test-ray:
	$(call new_environment,.venv-ray)
	$(call install,.venv-ray/bin,constraints.txt,dev$(comma)ray)
	.venv-ray/bin/pytest -q -m slow tests/test_replica_processes.py

test-memory: $(INSTALLED)
	$(BIN)/pytest -q tests/test_instruction_sets.py -k sanitized

fuzz: $(INSTALLED)
	$(BIN)/python tests/hostile/fuzz.py $(PARSERS) --cases $(CASES) --seed $(SEED)

test-faults: $(INSTALLED)
	$(BIN)/pytest -q -rfEsP tests/test_long_jobs.py tests/test_byte_flips.py tests/test_reproducible.py \
		tests/test_ship.py

test-oldest:
	$(call new_environment,.venv-oldest)
	$(call install,.venv-oldest/bin,constraints-oldest.txt,$(EVERY))
	.venv-oldest/bin/pytest -q -m 'not slow'
	.venv-oldest/bin/pytest -q -m slow tests/test_replica_processes.py

# What pyproject.toml allows, today; constraints.txt is not asked.
test-newest:
	$(call new_environment,.venv-newest)
	@echo '$(TORCH)' > .venv-newest/constraints.txt
	$(call install,.venv-newest/bin,.venv-newest/constraints.txt,$(EVERY))
	.venv-newest/bin/pip list
	.venv-newest/bin/pytest -q -m 'not slow'
	.venv-newest/bin/pytest -q -m slow tests/test_replica_processes.py

lock: $(BIN)/python $(TOOLED)
	$(BIN)/python tools/lock.py $(TORCH) constraints.txt
	$(BIN)/python tools/lock.py $(TORCH) constraints-oldest.txt --oldest
	PATH="$(TOOLS):$$PATH" $(TOOLS)/python tools/hashes.py constraints.txt constraints-hashed.txt
	PATH="$(TOOLS):$$PATH" $(TOOLS)/python tools/hashes.py --resolve \
		tools/requirements.in tools/requirements.txt

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python tools/cli_reference.py docs/CLI.md
	$(BIN)/python tools/schemas.py docs/schema

models: $(INSTALLED)
	$(BIN)/python tools/models.py docs/MODELS.md

pictures: $(INSTALLED)
	$(BIN)/python benchmarks/pictures.py docs/pictures

# The wheel is built from the sdist, so what the one lacks the other lacks, too.
dist: $(INSTALLED) $(TOOLED)
	rm -rf dist
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
		$(TOOLS)/python -m build --outdir dist .
	$(TOOLS)/twine check --strict dist/*
	$(TOOLS)/check-wheel-contents dist/*.whl
	MOAC_WHEEL="$$(echo $(CURDIR)/dist/*.whl)" $(BIN)/pytest -q -m slow tests/test_base_install.py

audit: $(TOOLED)
	PATH="$(TOOLS):$$PATH" $(TOOLS)/python tools/audit.py constraints.txt

sbom: $(INSTALLED) $(TOOLED)
	mkdir -p dist
	$(TOOLS)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--output-file dist/moac.cdx.json $(BIN)/python
	@echo dist/moac.cdx.json

licences: $(INSTALLED) $(TOOLED)
	$(TOOLS)/pip-licenses --python $(BIN)/python

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-ray .venv-tools build dist
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp makes the second run quick; it ages when what is to be installed changes.
# CI installs by hashes, and so everything.
$(INSTALLED): pyproject.toml constraints.txt constraints-hashed.txt | $(BIN)/python
ifdef CI
	$(call install_hashed,$(BIN))
else
	$(call install,$(BIN),constraints.txt,dev)
endif
	@touch $@

# Every file's hash is known before it is installed.
$(TOOLED): tools/requirements.txt
	$(call new_environment,.venv-tools)
	$(TOOLS)/python -m pip install --quiet --require-hashes --requirement $<
	@touch $@

$(BIN)/python:
	$(call new_environment,.venv)

$(MODEL)/config.json: | $(INSTALLED)
	$(BIN)/python examples/fetch_smollm2.py $(MODEL)

# An environment that has pip alone: $(call new_environment,FOLDER).
define new_environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: $(PYTHON) is older than 3.11; run make PYTHON=python3.11' >&2; exit 1; }
	rm -rf $(1)
	$(PYTHON) -m venv $(1)
endef

# The project with extras: $(call install,BIN,CONSTRAINTS,EXTRAS). Both variables say the same to
# what builds it; which of them is read depends on the version of pip.
define install
	PIP_CONSTRAINT=$(2) PIP_BUILD_CONSTRAINT=$(2) $(1)/python -m pip install --quiet \
		--constraint $(2) --editable '.[$(3)]'
endef

# The project with every extra, each file of a known hash but torch's: $(call install_hashed,BIN).
define install_hashed
	$(1)/python -m pip install --quiet --no-deps --require-hashes --requirement constraints-hashed.txt
	$(1)/python -m pip install --quiet --no-deps $(TORCH)
	$(1)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(1)/python -m pip check
endef
