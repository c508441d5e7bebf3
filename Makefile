# Everything runs from a virtual environment in .venv; `make setup` builds it once.
PYTHON ?= python3
BIN := .venv/bin
# The end-to-end tests mostly wait; more workers than cores would make their probes late.
WORKERS ?= 2
# Tests on a cluster wait for it most of the time.
CLUSTER_WORKERS ?= 3
# What fails is told briefly, and not more than one can read. A test that takes this long hangs.
PYTEST := $(BIN)/python -m pytest -q --tb=short --maxfail 25 --durations 8 --durations-min 10

.PHONY: help setup demo dev check test cluster test-cluster test-nodes teeth kills outcomes bench clean

# What a run needs, and what its developers need: `make demo` does not wait for the second.
RUN_STAMP := .venv/.set-up
DEV_STAMP := .venv/.set-up-dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

help:
	@echo "make demo   one experiment on the sandbox, from set-up to report"
	@echo "make test   the tests           make check  lint, types, import contracts"
	@echo "make cluster  image, sweeper and platform onto the cluster of KUBECONFIG   make test-cluster  the tests on it"
	@echo "make dev    the Dagster UI      make bench  all measurements (teeth, kills, outcomes: one by one)"
	@echo "make clean  stop everything, then remove .venv and .mlchaos"

setup: $(DEV_STAMP)

$(RUN_STAMP): pyproject.toml constraints.txt
	@echo "installing into .venv: about a minute, three on a slow machine"
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

$(DEV_STAMP): $(RUN_STAMP)
	$(PIP) -e '.[dev]'
	touch $@

demo: $(RUN_STAMP)
	$(BIN)/mlchaos run serving-pod-failure

# Its sensors look every 5 s; at the level `info` the daemon would write two lines each time.
PORT ?= 3000
dev: $(RUN_STAMP)
	@echo 'Dagster comes up at http://127.0.0.1:$(PORT) (another port: make dev PORT=3001). Ctrl-C ends it.'
	@PYTHONWARNINGS='ignore:Function `dev_command` is superseded' DAGSTER_HOME=$(CURDIR) \
	  $(BIN)/dagster dev -h 127.0.0.1 -p $(PORT) --log-level warning

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

test: setup
	$(PYTEST) -m "not e2e and not cluster" -n $(WORKERS) --timeout 180 tests
	$(PYTEST) -m e2e -n $(WORKERS) --dist loadfile --timeout 240 tests

# Our image, the sweeper and the platform on the cluster of KUBECONFIG. The image gets there by the local cluster's own tool; on
# any other, build it from the Dockerfile, push it where that cluster finds it, and set it in the manifests.
MLCHAOS_CLUSTER ?= ../shared/cluster
cluster: setup
	@[ -n "$$KUBECONFIG" ] || { echo 'set KUBECONFIG, such as: KUBECONFIG=$$($(MLCHAOS_CLUSTER)/up) make cluster'; exit 2; }
	MLCHAOS_IMAGE_TOOL=$(MLCHAOS_CLUSTER)/image manifests/platform/build-image
	kubectl apply -k manifests/kubernetes
	kubectl apply -k manifests/platform
	kubectl apply -n mlplatform -k manifests/rbac/namespace
	kubectl rollout status -n mlchaos-system deployment --timeout 120s
	kubectl rollout status -n mlplatform deployment --timeout 240s

# Takes any cluster that `make cluster` was run on. The tests make namespaces of their own and leave nothing behind; our client has
# the shipped rights there, and no others (RIGHTS=admin: those of the kubeconfig).
test-cluster: setup
	@[ -n "$$KUBECONFIG" ] || { echo 'set KUBECONFIG, such as: KUBECONFIG=$$($(MLCHAOS_CLUSTER)/up) make test-cluster'; exit 2; }
	$(PYTEST) -m "cluster and not nodes" -n $(CLUSTER_WORKERS) --timeout 300 tests/cluster

# Adds, kills, cuts off and revives nodes: only where MLCHAOS_CLUSTER has a `node` command, and one at a time.
test-nodes: setup
	@[ -n "$$KUBECONFIG" ] || { echo 'set KUBECONFIG, such as: KUBECONFIG=$$($(MLCHAOS_CLUSTER)/up) make test-nodes'; exit 2; }
	MLCHAOS_CLUSTER=$(MLCHAOS_CLUSTER) $(PYTEST) -m "cluster and nodes" --timeout 300 tests/cluster

teeth: setup
	$(BIN)/python -m benchmarks.teeth

outcomes: setup
	$(BIN)/python -m benchmarks.outcomes

kills: setup
	$(BIN)/python -m benchmarks.kills

bench: setup
	$(BIN)/python -m benchmarks

# Nothing is deleted while a fault may be live, nor what is needed to stop the sandbox.
clean:
	[ ! -d .mlchaos ] || [ ! -x $(BIN)/mlchaos ] || { $(BIN)/mlchaos stop --all --reason "make clean" && $(BIN)/mlchaos sandbox down; }
	rm -rf logs .logs_queue .venv .mlchaos build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
