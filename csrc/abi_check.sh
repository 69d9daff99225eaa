#!/usr/bin/env bash
# Is one wheel good for every torch from 2.11 on? Builds it with the oldest and with the newest, installs each beside the
# other, and runs NATIVE_TESTS there. Only whole builds of torch are on every registry, with CUDA's libraries, which
# `import torch` wants even on a machine without a GPU: two environments of about 5 GB each, kept in build/abi-check/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
WORK=$ROOT/build/abi-check
OLDEST=torch==2.11.0
NEWEST=torch
export PIP_DISABLE_PIP_VERSION_CHECK=1 TIGER_FAST_NATIVE=1

mkdir -p "$WORK"
grep -vE '^(torch|setuptools)==' constraints.txt >"$WORK/constraints.txt"

environment() { # NAME REQUIREMENT
    local home=$WORK/$1
    [ -e "$home/.complete" ] && return
    rm -rf "$home"
    "${PYTHON:-python3}" -m venv "$home"
    "$home/bin/pip" install -q -c "$WORK/constraints.txt" "$2" 'setuptools>=77' numpy pytest pytest-timeout hypothesis
    touch "$home/.complete"
}

build_wheel() { # NAME
    rm -rf "$WORK/wheel-$1"
    "$WORK/$1/bin/pip" wheel -q . --no-deps --no-build-isolation --wheel-dir "$WORK/wheel-$1"
}

check() { # BUILT_WITH RUN_WITH
    local python=$WORK/$2/bin/python
    "$python" -m pip install -q --no-deps --force-reinstall "$WORK/wheel-$1"/tiger_fast-*-cp310-abi3-*.whl
    # From another folder, so that the installed package is found and not the checkout's.
    cd "$WORK"
    echo "== built with $("$WORK/$1/bin/python" -c 'import torch; print("torch", torch.__version__)')"
    "$python" -c '
import torch, tiger_fast
assert "site-packages" in tiger_fast.__file__ and "cpu" in tiger_fast.available_backends()
print("== runs with torch", torch.__version__, "from", *tiger_fast.__path__)'
    "$python" -m pytest -q -p no:cacheprovider -c "$ROOT/pyproject.toml" --rootdir "$ROOT" "${NATIVE_TESTS[@]/#/$ROOT/}" || failed=1
    cd "$ROOT"
}

read -ra NATIVE_TESTS <<<"${NATIVE_TESTS:-tests/test_conformance.py}"
environment oldest "$OLDEST"
environment newest "$NEWEST"
build_wheel oldest
build_wheel newest
failed=0
check oldest newest
check newest oldest
exit $failed
