# What a developer types. Every target that runs something does the set-up that it needs first (deploy/dev/setup), which
# takes a few minutes on a bare Debian 12 and milliseconds from then on.
#
#     make test TESTS=tests/unit/test_allocator.py      some tests
#     make test ARGS='-x -k conflict'                   arguments for pytest

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

BIN := .venv/bin
SETUP := deploy/dev/setup
TESTS := $(wildcard tests/unit tests/golden tests/etcd tests/netns tests/runtime)
ARGS :=

.PHONY: help setup demo test test-all test-bare check bench clean

help: ## print this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: ## install what the other targets need; they do it themselves, too
	@$(SETUP) run test bench

demo: ## build a three-node cluster of namespaces, show that its pods reach each other, take it down (root)
	@$(SETUP) --root 'make demo' run
	@$(BIN)/python -m podwire.lab.demo $(ARGS)

test: ## run the tests that take seconds (as root: all tiers but vm and kind)
	@$(SETUP) run test
	@$(BIN)/python -m pytest -m 'not slow' --hypothesis-profile=repeatable $(TESTS) $(ARGS)

test-all: test-bare ## run every test that this machine can run, after test-bare (root)
	@$(SETUP) run test bench vm
	@deploy/dev/vm-kernel
	@$(BIN)/python -m pytest --hypothesis-profile=exploring tests $(ARGS)

test-bare: ## prove the set-up in a fresh Debian 12 root made by mmdebstrap (root)
	@$(SETUP) --root 'make test-bare' run bare
	@deploy/dev/test-bare

check: ## lint, formatting, types, import contracts
	@$(SETUP) run
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: ## measure ADD and DEL against the reference plugins (root)
	@$(SETUP) --root 'make bench' run test bench
	@if [[ -e bench/__main__.py ]]; then $(BIN)/python -m bench $(ARGS); else echo 'no benchmark'; fi

clean: ## remove what was made here: virtual environment, stubs, caches, results
	@rm -rf .venv .setup-stamp dist build bench/results .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@rm -f podwire/v1/*_pb2.py podwire/v1/*_pb2.pyi podwire/v1/*_pb2_grpc.py
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
