# `make demo` and `make test` are all a fresh clone needs: both build .venv first, and again only when its pins change.

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
N ?= 10
CASE ?=
SEED ?=

.DEFAULT_GOAL := help
.PHONY: help venv litellm demo test faults check format proto lock sbom audit bench bench-quick clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1	\2/p' $(MAKEFILE_LIST) | expand -t 16

venv: .venv/.project  ## the virtual environment, from pinned and hashed packages
	@:

litellm: .venv-litellm/.requirements  ## LiteLLM for its tests and its example, in an environment of its own
	@:

demo: venv  ## the whole path on this machine, verified to the nano
	@$(BIN)/python -m gateway.cli demo $(ARGS)

# Files in the order of tests/conftest.py. Processes that tests start hundreds of times shall find themselves compiled.
unexport PYTHONDONTWRITEBYTECODE

test: venv litellm  ## the tests, two at a time; ARGS="-k name -x" goes to pytest
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

faults: venv  ## kills, cut wires and full disks under load; N=100 CASE=B1 SEED=7
	@FAULTS_N=$(N) FAULTS_SEED=$(SEED) $(BIN)/python -m pytest tests/faults -s $(if $(CASE),-k $(CASE)_) $(ARGS)

check: venv  ## style, types, import rules, freshness of generated code
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict
	$(BIN)/lint-imports --no-logo
	$(BIN)/python .ci/stubs.py --check
	$(BIN)/python .ci/api_reference.py --check

format: venv  ## formats and sorts imports
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: venv  ## the stubs and docs/api from proto/
	$(BIN)/python .ci/stubs.py
	$(BIN)/python .ci/api_reference.py

# A release has a week to be found out before it is taken. For a mend that cannot wait: ARGS="--upgrade-package httpx
# --exclude-newer-package httpx=2026-11-30", a date after its release.
COOL_DOWN ?= 1 week
PIN := $(BIN)/uv pip compile --generate-hashes --no-header --no-annotate --quiet
LOCK := $(PIN) --constraint .ci/constraints.txt --universal --python-version 3.11 --exclude-newer "$(COOL_DOWN)"

lock: venv  ## .ci/*.txt from pyproject.toml; ARGS=--upgrade for newer versions
	$(LOCK) pyproject.toml --extra dev --output-file .ci/requirements.txt $(ARGS)
	$(LOCK) pyproject.toml --extra litellm --output-file .ci/litellm.txt $(ARGS)
	$(LOCK) .ci/audit.in --output-file .ci/audit.txt $(ARGS)
	$(PIN) pyproject.toml --extra envoy --extra kafka --extra nats --extra otel --output-file .ci/runtime.txt \
		--constraint .ci/requirements.txt --python-version 3.11.9 --python-platform x86_64-manylinux_2_31

sbom: .venv-audit/.requirements  ## build/sbom.cdx.json: what the image installs, as CycloneDX
	@$(BIN)/python .ci/sbom.py build/sbom.cdx.json

audit: .venv-audit/.requirements  ## known vulnerabilities of what is pinned; AUDIT_STRICT=1 fails when nobody can be asked
	@$(BIN)/python .ci/audit.py

bench: venv  ## the measurements, whole
	@$(BIN)/python -m benchmarks $(ARGS)

bench-quick: venv  ## the measurements, in a few minutes
	@$(BIN)/python -m benchmarks --quick $(ARGS)

clean:  ## back to a fresh clone; data folders stay
	rm -rf .venv .venv-litellm .venv-audit build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are touched only after a whole install, so an interrupted one is done again.

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "Python 3.11 or newer is needed and $(PYTHON) is not: try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.requirements: .ci/requirements.txt | .venv/bin/python
	@echo "Installing pinned packages into .venv (under a minute)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r $<
	@touch $@

.venv/.project: pyproject.toml .venv/.requirements
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# LiteLLM pins what we have in newer versions. uv installs it in seconds; pip takes half a minute.
.venv-litellm/.requirements: .ci/litellm.txt | .venv/.requirements
	@echo "Installing LiteLLM into .venv-litellm (under a minute)"
	@$(BIN)/python -m venv --clear --without-pip .venv-litellm
	@$(BIN)/uv pip install --quiet --python .venv-litellm --no-deps --require-hashes -r $< \
		|| $(BIN)/python -m pip --python .venv-litellm install --quiet --disable-pip-version-check --no-compile \
			--no-deps --require-hashes -r $<
	@touch $@

.venv-audit/.requirements: .ci/audit.txt | .venv/.requirements
	@$(BIN)/python -m venv --clear --without-pip .venv-audit
	@$(BIN)/uv pip install --quiet --python .venv-audit --no-deps --require-hashes -r $<
	@touch $@
