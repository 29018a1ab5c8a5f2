# `make demo` and `make test` do all of their own set-up; a second run starts in seconds.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
# Tests start hundreds of Pythons: each would compile our sources again where this variable is set.
unexport PYTHONDONTWRITEBYTECODE
# Processes that share the tests (tests/sharing.py). One more than there are cores, because many tests wait for a server.
JOBS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
SHARED := $(PYTEST) -n $(JOBS) --durations=30

FUZZ_SECONDS ?= 120
CHAOS_SECONDS ?= 600
CONTAINER_PACKAGES := buildah podman runc mmdebstrap uidmap netavark aardvark-dns iptables catatonit

.DEFAULT_GOAL := help
.PHONY: help demo demo-web npm pictures test test-quick test-all test-heavy lint bench profile fuzz chaos mutants threat-model errors clients generate clean ready projector tested environments chart-test container-test sbom dist

help:  ## List these targets.
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {printf "%-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: ready  ## Send one sealed chat to a real model, seen from both sides.
	$(BIN)/lacre demo

demo-web: ready  ## Print the link of a chat page over a real model. Ctrl-C ends it.
	$(BIN)/lacre demo --web

test: tested  ## Run the fast tests.
	$(SHARED) -m "not slow and not container and not heavy"

# tests/quick.txt lists files of all four packages that start no server and load no model.
test-quick: ready  ## Run the tests that take a minute, for the loop of editing.
	$(SHARED) -m "not slow and not container and not heavy" @tests/quick.txt

# The second model is 240 MB, which the fast tests do without.
test-all: tested environments  ## Run the slow tests too. JOBS: how many processes share them.
	@$(PYTHON) tools/bootstrap.py gemma
	$(SHARED) -m "not container and not heavy"

# Each suite's environment is made when it first runs.
test-heavy: tested  ## Run the suites that need large environments. SUITES: some of tests/heavy's folders.
	@$(if $(filter projector,$(or $(SUITES),projector)),$(PYTHON) tools/bootstrap.py projector)
	$(SHARED) $(or $(SUITES:%=tests/heavy/%),tests/heavy)

projector: ready  ## Install what a worker needs for models that read images.
	@$(PYTHON) tools/bootstrap.py projector

environments: ready  ## Install other people's programs and other Pythons, for the tests.
	@$(BIN)/python tools/environments.py > /dev/null
	@$(PYTHON) tools/kinds.py > /dev/null

# Renders deploy/helm with a real Helm over a matrix of values, and checks it against Kubernetes' schemas and our own tests.
chart-test: ready  ## Test the Helm chart. `test-all` does so too.
	@$(BIN)/python tools/environments.py chart > /dev/null
	@$(PYTHON) tools/kinds.py > /dev/null
	$(PYTEST) tests/chart

# Builds the images with buildah and runs them with podman, both as root, also as the chart's pods. Sends a sealed chat through them,
# then removes everything.
# LACRE_WHEELS: a folder with another llama-cpp-python wheel, such as the one of `tools/bootstrap.py --portable-wheel`.
container-test: sbom  ## Build and run the images and the chart's pods. Needs root, buildah and podman.
	build/container/bin/hadolint Dockerfile
	@for tool in buildah podman runc mmdebstrap iptables catatonit; do command -v $$tool > /dev/null || { echo "container-test needs $$tool: apt-get install $(CONTAINER_PACKAGES)"; exit 1; }; done
	@test $$(id -u) = 0 || { echo "container-test needs root, for the base image"; exit 1; }
	$(PYTEST) -s tests/containers

sbom: ready  ## List what is in the images, as CycloneDX: build/sbom.
	@$(PYTHON) tools/bootstrap.py container
	@mkdir -p build/sbom
	PYTHONWARNINGS=ignore build/container/bin/cyclonedx-py requirements --pyproject pyproject.toml -o build/sbom/gateway.cdx.json requirements/gateway.lock
	cat requirements/worker.lock requirements/native.lock | PYTHONWARNINGS=ignore build/container/bin/cyclonedx-py requirements --pyproject pyproject.toml -o build/sbom/worker.cdx.json -

# docs/releasing.md. DIST_KEY: a file with the key that signs.
dist: ready  ## Make wheels and source distributions, with SBOMs, provenance and signed checksums.
	@$(BIN)/python tools/dist.py

npm: ready  ## Make the npm package: dist/lacre-VERSION.tgz. Needs Node.
	@$(BIN)/python tools/npm_package.py

lint: ready  ## Check style, types, imports and prose.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/rooms.py
	$(BIN)/python tools/prose.py

bench: ready  ## Measure speed, in ratios against a peer.
	$(BIN)/python -m bench

profile: ready  ## Draw where the gateway spends its time under load: build/profile.svg.
	@$(PYTHON) tools/bootstrap.py profile
	$(BIN)/python -m bench.profile

# FUZZ_SECONDS counts for all targets together. The corpus stays in build/fuzz.
fuzz: ready  ## Search for input that breaks a parser. FUZZ_SECONDS: for all parsers together.
	@$(PYTHON) tools/bootstrap.py fuzz
	PYTHONPATH=tests $(BIN)/python -m fuzz --seconds $(FUZZ_SECONDS)

# Breaks parts of a deployment at the times that CHAOS_SEED draws, and lists violations. Root and nginx make it complete.
chaos: ready  ## Strike a whole deployment, and say what did not hold. CHAOS_SECONDS, CHAOS_SEED.
	PYTHONPATH=tests $(BIN)/python -m chaos --seconds $(CHAOS_SECONDS) $(if $(CHAOS_SEED),--seed $(CHAOS_SEED)) $(if $(CHAOS_RECORD),--record)

mutants: ready  ## Remove one defence at a time, and see which attack notices.
	PYTHONPATH=tests $(BIN)/python -m hostile.mutations

threat-model: ready  ## Write the tables of docs/threat-model.md, from the attacks.
	PYTHONPATH=tests $(BIN)/python -m hostile.table

# docs/pictures: the path of a request, and a terminal.
pictures: ready  ## Draw the README's pictures from a real run.
	PYTHONPATH=tests $(BIN)/python -m parts.pictures

# An encoder, as data. Key management services and their clients. A client that sends everything that the gateway's OpenAPI allows,
# in its own environment.
tested: ready  ## Install what only tests need.
	@$(PYTHON) tools/bootstrap.py embedding kms contract

errors: ready  ## Write docs/errors.md, from the errors.
	$(BIN)/python tools/error_list.py

# After `LACRE_RECORD=1 pytest tests/ecosystem/test_clients.py tests/heavy/clients`, which records what works.
clients: ready  ## Write docs/clients.md, from what the tests of clients recorded.
	PYTHONPATH=tests $(BIN)/python -m ecosystem.clients

generate: ready  ## Write the SDK's sync half, from its async one.
	$(BIN)/python tools/unasync.py

# Quick if nothing changed: tools/bootstrap.py compares the sources of .venv with the tree.
ready:  ## Make .venv ready. Quick if nothing changed.
	@$(PYTHON) tools/bootstrap.py

clean:  ## Remove .venv, caches, build and dist.
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis dist build
