# SPDX-License-Identifier: Apache-2.0
# `make` alone lists what there is. Everything but setup runs from the virtual environment that setup makes.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON := .venv/bin/python
# Further options for pytest: make test PYTEST_ARGS='-k policy -x'
PYTEST_ARGS ?=
# How long to fuzz, and further options: make fuzz FUZZ_SECONDS=3600 FUZZ_ARGS=--keep
FUZZ_SECONDS ?= 300
FUZZ_ARGS ?=
# make mutate MUTATE_ARGS=--quick
MUTATE_ARGS ?=
# Further options for a benchmark: make bench BENCH_ARGS='--networks 1,100'
BENCH_ARGS ?=
# Further options for the VM lane: make test-vm VM_ARGS='--kernel 6.1'
VM_ARGS ?=

.PHONY: help setup bench bench-quick test test-full test-vm test-deb test-systemd lint fuzz mutate demo docs deb clean FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .stamps/setup ## install what the project needs: Debian packages by name, then .venv

# The stamp alone would lie after someone removed .venv.
.stamps/setup: tools/setup/install.sh tools/setup/packages.txt pyproject.toml $(if $(wildcard $(PYTHON)),,FORCE)
	tools/setup/install.sh --venv dev run test
	@mkdir -p $(@D) && touch $@

# Plots are nothing that a test or a node needs.
.stamps/setup-bench: .stamps/setup
	tools/setup/install.sh --venv bench test
	@mkdir -p $(@D) && touch $@

# Emulation and kernel images are 300 MB that nothing else needs.
.stamps/setup-vm: .stamps/setup
	tools/setup/install.sh --venv vm vm
	@mkdir -p $(@D) && touch $@

test: setup ## run the whole test suite, linters included (root: most tests use network namespaces)
	$(PYTHON) -m pytest -q --numprocesses 3 --dist worksteal $(PYTEST_ARGS)

test-full: export DATAPATH_TEST_FULL := 1
test-full: test test-vm ## both without samples: what tests/sampling.py leaves out for the sake of time, too

test-vm: .stamps/setup-vm ## run the tests marked `vm` on Debian's 6.1 and 6.12 kernels, emulated
	$(PYTHON) -m tools.vm $(VM_ARGS)

test-deb: .stamps/setup-vm ## build the Debian package, and install, upgrade, remove and purge it in a chroot (root)
	DATAPATH_TEST_DEB=1 $(PYTHON) -m pytest -q tests/packaging/deb $(PYTEST_ARGS)

test-systemd: .stamps/setup-vm ## boot an emulated Debian with the package, and do to it what nodes suffer, under traffic (root)
	$(PYTHON) -m tools.deb.vm

lint: setup ## run only the linters and the checks of layout, dependencies and documents
	$(PYTHON) -m pytest -q tests/test_linters.py tests/test_layout.py tests/test_dependencies.py tests/test_documents.py $(PYTEST_ARGS)

fuzz: setup ## fuzz the packet parser, five minutes or FUZZ_SECONDS; what breaks it is kept as a regression
	$(PYTHON) -m tools.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

mutate: setup ## change single conditions of the eBPF program and show which test notices (root)
	$(PYTHON) -m tools.mutate $(MUTATE_ARGS)

bench: .stamps/setup-bench ## measure everything into build/bench: table, JSON, plots; about an hour on a quiet machine (root)
	$(PYTHON) -m tools.bench all --output build/bench $(BENCH_ARGS)

bench-quick: .stamps/setup-bench ## measure what matters most, in less than 3 minutes (root)
	$(PYTHON) -m tools.bench quick --output build/bench-quick $(BENCH_ARGS)

demo: setup ## show the broken return path, the classic recipe and ours, with real traffic in namespaces (root)
	$(PYTHON) -m tools.lab demo

deb: setup ## build the package for Debian 12 in dist/
	$(PYTHON) -m tools.deb

docs: setup ## write the pages that are generated from the policy models
	$(PYTHON) tools/gen_policy_docs.py

clean: ## remove what make and the tools made, the virtual environment too
	rm -rf .venv .stamps .cache build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
