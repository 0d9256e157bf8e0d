.DEFAULT_GOAL := help
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
STUBS := clients/python

.PHONY: help
help: ## Show what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' | column -t -s '|'

.PHONY: setup
setup: .venv/server ## Make .venv with what the server and the client need, as pinned in constraints.txt

.venv/server: pyproject.toml clients/python/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) --constraint constraints.txt -e clients/python -e .
	@touch $@

.venv/dev: .venv/server
	$(PIP) --constraint constraints.txt -e clients/python -e '.[dev]'
	@touch $@

# The clients that the tests call the server with, in environments of their own.
.venv/%/ready: tests/gateway/%.txt
	$(PYTHON) -m venv .venv/$*
	.venv/$*/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

.PHONY: demo
demo: setup ## Stream eight prompts from one server, side by side
	@$(BIN)/python tools/demo.py

.PHONY: serve
serve: setup ## Run the server on the demo model; ARGS="--model …" for others
	@$(BIN)/mpt-grpc serve $(ARGS)

.PHONY: protos
protos: .venv/dev ## Make the Python stubs from protos/
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=$(STUBS) \
		--grpc_python_out=$(STUBS) --mypy_out=quiet:$(STUBS) --mypy_grpc_out=quiet:$(STUBS) protos/mpt/v1/*.proto

.PHONY: check
check: protos ## Lint, types, layers, protos, stale stubs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	@test -z "$$(git status --porcelain $(STUBS)/mpt)" || { echo 'stale stubs: run make protos and commit'; exit 1; }

.PHONY: test
test: .venv/dev .venv/sdks/ready .venv/litellm/ready ## Run every test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2
