# Set-up, tests and demo from a fresh clone. Everything is installed into .venv in this folder and nowhere else.
#
#   make test TESTS=tests/test_functional.py PYTEST_ARGS="-k route"
#   make demo DEMO_ARGS="--seed 1"      make test PYTHON=python3.12
#   make bench BENCH_ARGS="-k route/forward"

PYTHON ?= python3
TESTS ?= tests
PYTEST_ARGS ?=
BENCH_ARGS ?=
DEMO_ARGS ?=

VENV := .venv
STAMP := $(VENV)/.stamp
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

# torch's CPU build brings no Triton, and the tests run the kernels in Triton's interpreter. torch's CUDA build pins
# the Triton it was built with, so this is installed only where torch brought none, and stands in no constraint.
TRITON := triton==3.6.0

.DEFAULT_GOAL := help
.PHONY: help bench demo demo-table test resume-check lint clean native built abi-check asan ubsan fuzz static

# What the sanitizers and the check against other torch versions run.
NATIVE_TESTS ?= tests/test_conformance.py tests/test_functional.py \
    $(filter-out tests/test_native_build.py,$(wildcard tests/test_native*.py))

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: built  ## set up, train tiger-tiny and its controls on the embedded data, write runs/demo/
	$(PY) -m tiger_fast demo $(DEMO_ARGS)

demo-table: built  ## run the demo with three seeds and write docs/demo.md from the reports (half an hour)
	for seed in 0 1 2; do $(PY) -m tiger_fast demo --seed $$seed --out runs/demo-$$seed || exit 1; done
	$(PY) -m tiger_fast.training.demo_table runs/demo-0 runs/demo-1 runs/demo-2 --out docs/demo.md

test: built  ## set up, compile csrc/ where a compiler is found, run the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest $(TESTS) -q -n 2 --dist loadfile $(PYTEST_ARGS)

bench: built  ## measure the smoke preset; fail where a ratio has fallen below the committed baseline (two minutes, an idle machine)
	env -u OMP_NUM_THREADS $(PY) -m pytest bench/ --preset smoke --gate $(BENCH_ARGS)

resume-check: built  ## set up, kill and restart fifty training runs (five minutes)
	$(PY) -m pytest tests/test_resume.py --slow -s -k fifty

native: $(STAMP)  ## compile csrc/ into tiger_fast/_native.abi3.so; what has not changed is not compiled again
	$(PY) csrc/build_native.py

built: $(STAMP)
	@$(PY) csrc/build_native.py --optional

abi-check:  ## build with the oldest torch, run with the newest, and the other way round (downloads 5 GB, keeps 11)
	PYTHON=$(PYTHON) NATIVE_TESTS="$(NATIVE_TESTS)" csrc/abi_check.sh

# The interpreter is not instrumented, so the sanitizer's library has to be there before it; libstdc++ beside it, or the
# first exception that C++ throws aborts. Python and torch never free much of what they allocate: leaks are not looked for.
# A size that no machine has is to be refused by the library, not to end the process.
asan: export LD_PRELOAD_FOR_TESTS = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)
asan: export ASAN_OPTIONS = detect_leaks=0:allocator_may_return_null=1
asan: $(STAMP)  ## run NATIVE_TESTS with AddressSanitizer in the native library
	$(call sanitized,address)

ubsan: export UBSAN_OPTIONS = print_stacktrace=1
ubsan: $(STAMP)  ## run NATIVE_TESTS with UndefinedBehaviorSanitizer in the native library
	$(call sanitized,undefined)

# The line in the middle fails where the instrumented library does not load, as the tests would run without it.
define sanitized
CXX="$(CXX)" $(PY) csrc/build_native.py --sanitize $(1) --output build/$(1)/_native.so
export LD_PRELOAD="$$LD_PRELOAD_FOR_TESTS" TIGER_FAST_NATIVE_LIBRARY=$(CURDIR)/build/$(1)/_native.so; \
    $(PY) -c 'import tiger_fast; assert "cpu" in tiger_fast.available_backends()' && \
    $(PY) -m pytest -q -p no:cacheprovider $(NATIVE_TESTS) $(PYTEST_ARGS)
endef

fuzz: built  ## ten thousand random calls against the reference in float64
	$(PY) -m pytest tests/test_native_fuzz.py --fuzz-cases 10000 $(PYTEST_ARGS)

static: $(STAMP)  ## compile every kernel for four architectures and write profiling/static/ (long; needs no GPU)
	env -u TRITON_INTERPRET $(PY) -m profiling.static_report --cases all --arch sm_80 sm_90 sm_100 gfx942 \
	    --tables profiling/static

lint: $(STAMP)  ## set up, check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:  ## remove .venv, the native library, caches and build leftovers; runs/ stays
	rm -rf $(VENV) build dist tiger_fast/_native.* *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
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
