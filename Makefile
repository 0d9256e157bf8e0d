.DEFAULT_GOAL := help
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/pip install --disable-pip-version-check
STUBS := clients/python/mpt_grpc_client/proto
# The index to take PyTorch from, if not pip's own: PyTorch's page names one with builds for CPUs, a tenth of the size.
TORCH_INDEX ?=

.PHONY: help
help: ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' | column -t -s '|'

.PHONY: setup
setup: .venv/server ## Create .venv with the server and the client, as pinned in constraints.txt

.venv/server: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP) --constraint constraints.txt -e '.[torch]'
	@touch $@

.venv/dev: .venv/server
	$(PIP) --quiet --constraint constraints.txt -e '.[dev]'
	@touch $@

# Environments with the clients that tests call the server with.
.venv/%/ready: tests/gateway/%.txt
	$(PYTHON) -m venv .venv/$*
	.venv/$*/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# The releases of protoc that tools/generate_stubs.py uses for messages and for services.
.venv/protoc-messages/ready:
	$(PYTHON) -m venv .venv/protoc-messages
	.venv/protoc-messages/bin/pip install --quiet --disable-pip-version-check \
		grpcio-tools==1.72.2 mypy-protobuf==5.1.0 setuptools==80.9.0
	@touch $@

.venv/protoc-services/ready:
	$(PYTHON) -m venv .venv/protoc-services
	.venv/protoc-services/bin/pip install --quiet --disable-pip-version-check grpcio-tools==1.68.1 setuptools==80.9.0
	@touch $@

.PHONY: demo
demo: setup ## Stream eight prompts from one server, side by side
	@$(BIN)/python tools/demo.py

.PHONY: serve
serve: setup ## Serve the built-in model; ARGS="--model ..." for others
	@$(BIN)/mpt-grpc serve $(ARGS)

.PHONY: protos
protos: .venv/dev .venv/protoc-messages/ready .venv/protoc-services/ready ## Generate the Python stubs from protos/
	$(BIN)/python tools/generate_stubs.py .venv/protoc-messages/bin .venv/protoc-services/bin

.PHONY: check
check: protos ## Check format, lint, types, layers, protos, prose and links
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	@test -z "$$(git status --porcelain $(STUBS))" || { echo 'stale stubs: run make protos and commit'; exit 1; }

.PHONY: test
test: .venv/dev .venv/sdks/ready .venv/litellm/ready ## Run every test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

.PHONY: dist
dist: .venv/dev ## Build wheels and source distributions of the server and the client into dist/
	rm -rf dist build clients/python/build
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m build --outdir dist clients/python
	$(BIN)/twine check --strict dist/*
