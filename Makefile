# `make serve` and `make test` are all that a fresh machine needs: Python 3.11 or 3.12 and a package index that pip knows.
#
#   make serve ARGS="--model ./Qwen3-0.6B --http-port 9000"
#   make install PIP_ARGS="--extra-index-url …"       another index, as for torch builds without CUDA

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS)
INSTALLED := $(VENV)/.installed
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))

.DEFAULT_GOAL := help
.PHONY: help install serve test test-slow test-chaos test-pods lint format typecheck proto docs chart test-image bench

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

install: $(INSTALLED) ## .venv with Pagoda, editable, and everything for development

# torch first and alone, at the version pinned: if it came in as some dependency's dependency, pip would first fetch whatever
# newer build it likes best, and those bring gigabytes of CUDA libraries.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "Python 3.11 or 3.12 is needed; say which: make PYTHON=python3.12 …"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): a few minutes the first time"
	@$(PIP) torch
	@$(PIP) --editable '.[dev]'
	@touch $@

serve: install ## serve a model, the demo model if ARGS names none
	$(BIN)/pagoda serve $(ARGS)

test: lint typecheck ## lint, types and the whole test suite
	$(BIN)/python -m pytest -m "not slow and not chaos and not pods" $(ARGS)

test-slow: install ## tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

test-chaos: install ## processes killed and stopped, faults, leaving clients, fuzzed bodies, memory: minutes
	$(BIN)/python -m pytest -m chaos tests/chaos $(ARGS)

test-pods: install ## the rendered release as pods on this machine, upgraded under load; needs root and podman
	$(BIN)/python -m pytest -m pods tests/e2e $(ARGS)

lint: install ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: install ## mypy
	$(BIN)/mypy

proto: install ## compile proto/*.proto into the descriptor sets that the server loads
	$(BIN)/python proto/generate.py

bench: install ## throughput without a server; ARGS="--model DIR --batch-sizes 1 8 32 --json FILE"
	$(BIN)/python benchmarks/offline_throughput.py $(ARGS)

docs: chart ## write docs/configuration.md, and what `chart` writes, out of the schema
	$(BIN)/python -m pagoda.config.documentation > docs/configuration.md

chart: install ## write the chart's README.md and values.schema.json out of values.yaml and the schema
	$(BIN)/python charts/generate.py

test-image: install ## build the image and run it as a pod would; needs docker or podman. ARGS="--image TAG" takes one that is there
	$(BIN)/python -m tests.deploy.image $(ARGS)
