.DEFAULT_GOAL := help
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STUBS := clients/python

.PHONY: help
help: ## Show what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' | column -t -s '|'

.PHONY: setup
setup: .venv/ready ## Make .venv with all that is pinned in constraints.txt

.venv/ready: pyproject.toml clients/python/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt -e clients/python -e '.[dev]'
	@touch $@

.PHONY: demo
demo: setup ## Stream eight prompts from one server, side by side
	@$(BIN)/python tools/demo.py

.PHONY: serve
serve: setup ## Run the server on the demo model; ARGS="--model …" for others
	@$(BIN)/mpt-grpc serve $(ARGS)

.PHONY: protos
protos: setup ## Make the Python stubs from protos/
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=$(STUBS) \
		--grpc_python_out=$(STUBS) --mypy_out=quiet:$(STUBS) --mypy_grpc_out=quiet:$(STUBS) protos/mpt/v1/*.proto

.PHONY: check
check: setup protos ## Lint, types, layers, protos, stale stubs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	git diff --exit-code -- $(STUBS)/mpt

.PHONY: test
test: setup ## Run every test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2
