# Set-up, tests and demo from a fresh clone. Everything is installed into .venv in this folder and nowhere else.
#
#   make test PYTEST_ARGS="-n 2 -k packaging"      make demo DEMO_ARGS="--seed 1"      make test PYTHON=python3.12

PYTHON ?= python3
PYTEST_ARGS ?=
DEMO_ARGS ?=

VENV := .venv
STAMP := $(VENV)/.stamp
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

# torch's CPU build brings no Triton, and the tests run the kernels in Triton's interpreter. torch's CUDA build pins
# the Triton it was built with, so this is installed only where torch brought none, and stands in no constraint.
TRITON := triton==3.6.0

.DEFAULT_GOAL := help
.PHONY: help demo demo-table test resume-check lint clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP)  ## set up, train tiger-tiny and its controls on the embedded data, write runs/demo/
	$(PY) -m tiger_fast demo $(DEMO_ARGS)

demo-table: $(STAMP)  ## run the demo with three seeds and write docs/demo.md from the reports (half an hour)
	for seed in 0 1 2; do $(PY) -m tiger_fast demo --seed $$seed --out runs/demo-$$seed || exit 1; done
	$(PY) -m tiger_fast.training.demo_table runs/demo-0 runs/demo-1 runs/demo-2 --out docs/demo.md

test: $(STAMP)  ## set up, run the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -q -n 2 --dist loadfile $(PYTEST_ARGS)

resume-check: $(STAMP)  ## set up, kill and restart fifty training runs (five minutes)
	$(PY) -m pytest tests/test_resume.py --slow -s -k fifty

lint: $(STAMP)  ## set up, check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:  ## remove .venv, caches and build leftovers; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "tiger_fast needs Python 3.10 or newer, and PYTHON=$(PYTHON) is not. Name one: make PYTHON=python3.12 ..." >&2; \
	    exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing torch, then the rest; the first time takes a few minutes."
	$(PIP) install -q -c constraints.txt torch
	@if [ "$$(uname -s)-$$(uname -m)" = Linux-x86_64 ] && ! $(PIP) show -q triton 2>/dev/null; then \
	    set -x; $(PIP) install -q $(TRITON); fi
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	@touch $@
