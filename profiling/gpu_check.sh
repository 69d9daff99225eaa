#!/usr/bin/env bash
# profiling/gpu_check.sh DIR: on a machine with one CUDA GPU, the GPU tests, the benchmarks of ops and models against eager
# PyTorch and torch.compile, and kernels by torch's profiler and by Nsight Compute where it is found, in ten minutes; then a summary.
#
# Builds nothing of the checkout and needs no network: torch, Triton, pytest and pytest-benchmark, numpy for what the tests
# import; and a C compiler with Python's headers, with which Triton builds its launchers as it compiles kernels. Each step has a
# time limit of its own, and what it has written by then counts. Writes at most 8 files into DIR, each under 16 MiB.
# GPU_CHECK_SECONDS is the limit for everything (570), GPU_CHECK_SHARDS the number of processes for the tests (one a core, at
# most 12), PYTHON the Python (that of .venv if there is one, else python3). GPU_CHECK_DRY_RUN=1 runs every step small and without
# a GPU or a compiler.
# Ends with 0 if all steps did, 1 if one failed, 2 where there is no GPU or no compiler.
set -uo pipefail
if [ $# -ne 1 ] || [[ $1 == -* ]]; then
    echo "usage: profiling/gpu_check.sh DIR" >&2
    exit 64
fi
mkdir -p "$1" || exit 64
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 64
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
dry=${GPU_CHECK_DRY_RUN:-}
cores=$(nproc)
shards=${GPU_CHECK_SHARDS:-$((cores < 12 ? cores : 12))}
end=$((SECONDS + ${GPU_CHECK_SECONDS:-570}))
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=0
results=()

# limit SECONDS COMMAND...: at most that long, and at most what is left of everything.
limit() {
    local seconds=$1 left=$((end - SECONDS))
    shift
    if [ "$left" -lt 5 ]; then
        echo "no time is left for: $*"
        return 124
    fi
    timeout -k 10 "$((seconds < left ? seconds : left))" "$@"
}

# note NAME STATUS: a line of the summary.
note() {
    case $2 in
        0) results+=("$1: done") ;;
        124 | 137) results+=("$1: STOPPED at its time limit") failed=1 ;;
        *) results+=("$1: FAILED ($2)") failed=1 ;;
    esac
}

# At most the last 4 MiB of a log.
keep() {
    tail -c 4194304 "$1" >"$out/$2"
}

{
    date -u +%Y-%m-%dT%H:%M:%SZ
    git rev-parse HEAD 2>/dev/null
    nvidia-smi 2>&1 | head -n 30
    limit 60 "$python" -c '
import platform, torch
print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda, "hip", torch.version.hip)
import triton
print("triton", triton.__version__)
for i in range(torch.cuda.device_count()):
    print(i, torch.cuda.get_device_properties(i))'
} >"$out/machine.txt" 2>&1
if ! limit 60 "$python" -c 'import torch, triton, pytest' 2>/dev/null; then
    echo "$python has not all of torch, Triton and pytest (PYTHON names another): nothing was checked" |
        tee "$out/summary.txt" >&2
    exit 2
fi
if [ -z "$dry" ] && ! limit 60 "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "there is no GPU here that torch can use: nothing was checked" | tee "$out/summary.txt" >&2
    exit 2
fi

if [ -z "$dry" ]; then
    # Which compiler, and where Python.h is looked for, are Triton's choices (triton/runtime/build.py).
    compiler=${CC:-$(command -v gcc || command -v clang)}
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include", "posix_prefix"))' 2>/dev/null)
    missing=
    command -v "${compiler:-gcc}" >/dev/null || missing="no C compiler (${CC:-gcc or clang})"
    [ -e "$include/Python.h" ] || missing=${missing:-"no Python.h in $include"}
    if [ -n "$missing" ]; then
        echo "there is $missing here, and Triton needs it to launch kernels: nothing was checked" |
            tee "$out/summary.txt" >&2
        exit 2
    fi
fi

# --- tests: in shards, as compiling kernels takes longer than running them. What matters most comes first; NVIDIA's checkers,
# which are slow, run beside the limits, and what needs most of the memory alone ----------------------------------------------
# -o addopts=: what pyproject.toml asks of pytest needs plugins that may not be there. The marker `gpu` is on all of test_gpu.py
# and on the conformance vectors where these are on the GPU.
pytest=("$python" -m pytest tests/test_conformance.py tests/test_gpu.py -m gpu -q -rfEs -o addopts= -p no:cacheprovider)
pytest+=(--tb=short --durations 5)
large="int32"
checkers=(memcheck racecheck)
limits="limits"
chosen="not ($large or sanitizer or $limits)"
if [ -n "$dry" ]; then
    chosen="leave_one_out and (widths or graphs or leave_one_out_21)"
    limits="leave_one_out and limits and 300"
    checkers=()
    large="leave_one_out and int32"
    shards=2
    export TIGER_FAST_GPU_DRY_RUN=1
fi

pids=()
names=()
# part SECONDS NAME PYTEST'S ARGUMENTS...: a part of the tests, in the background; `settle` notes how each has ended.
part() {
    local seconds=$1 name=$2
    shift 2
    OMP_NUM_THREADS=2 limit "$seconds" "${pytest[@]}" "$@" >"$scratch/tests.$name" 2>&1 &
    pids+=($!)
    names+=("$name")
}

settle() {
    local i status
    for i in "${!pids[@]}"; do
        wait "${pids[$i]}"
        status=$?
        # 5: there was no test in it.
        note "tests, ${names[$i]}" "$((status == 5 ? 0 : status))"
        {
            echo "=== ${names[$i]}"
            tail -c 150000 "$scratch/tests.${names[$i]}"
        } >>"$scratch/tests"
    done
    pids=()
    names=()
}

for ((i = 0; i < shards; i++)); do
    part 150 "values $((i + 1)) of $shards" -k "$chosen" --shard "$i/$shards"
done
settle
for ((i = 0; i < shards; i++)); do
    part 80 "limits $((i + 1)) of $shards" -k "$limits" --shard "$i/$shards"
done
for tool in "${checkers[@]}"; do
    part 80 "$tool" -k "sanitizer and $tool"
done
settle
part 60 "large tensors" -k "$large"
settle
keep "$scratch/tests" tests.txt

# --- times -------------------------------------------------------------------------------------------------------------
# At its limit pytest is interrupted as from a keyboard, and still writes what was measured by then. Ops come first.
once=(--preset gpu --device cuda --dtype bfloat16)
times=(bench/test_ops.py bench/test_models.py "${once[@]}" --seconds 0.5 --peers "eager,compile,algebra,sdpa")
if [ -n "$dry" ]; then
    times=(bench/test_ops.py --device cpu --shape N=16 --seconds 0.02 --peers "eager,sdpa" -k "leave_one_out or group_attention/")
fi
interruptible='import signal, sys, pytest; signal.signal(signal.SIGTERM, signal.default_int_handler); sys.exit(pytest.main())'
limit 160 "$python" -c "$interruptible" "${times[@]}" -q -o addopts= -p no:cacheprovider \
    --benchmark-json="$scratch/times.json" >"$scratch/times" 2>&1
status=$?
# What does not end with a table begins with its reason.
{
    sed -n '/ bench, preset /,$p' "$scratch/times"
    echo "=== all that pytest said"
    tail -c 2097152 "$scratch/times"
} >"$out/times.txt"
[ ! -s "$scratch/times.json" ] || cp "$scratch/times.json" "$out/times.json"
note times "$status"

# --- kernels -------------------------------------------------------------------------------------------------------------
benchmarks=()
for op in route leave_one_out group_attention counterfactual_losses competency_aggregate alignment_loss adapter; do
    benchmarks+=("$op/forward+backward")
done
if [ -n "$dry" ]; then
    benchmarks=(leave_one_out/forward+backward)
    once=(--device cpu --shape "B=1,N=4,D=16,heads=1" --backend triton)
    export TRITON_INTERPRET=1
fi
limit 40 "$python" -m bench once "${benchmarks[@]}" "${once[@]}" --repeat 10 --table >"$scratch/kernels" 2>&1
status=$?
limit 30 "$python" -m profiling.host_cost --rounds 100 >>"$out/times.txt" 2>&1
note "host's cost of a call" $?

if [ -n "$dry" ]; then
    results+=("kernels, Nsight Compute: left out of a dry run")
else
    PYTHON=$python limit 60 profiling/ncu.sh "${benchmarks[@]}" --dtype bfloat16 --out "$scratch/ncu" >"$scratch/ncu.txt" 2>&1
    ncu=$?
    if [ "$ncu" -eq 2 ]; then
        results+=("kernels, Nsight Compute: left out, $(head -n 1 "$scratch/ncu.txt")")
    else
        note "kernels, Nsight Compute" "$ncu"
        cat "$scratch"/ncu/*.ncu.csv >"$scratch/ncu.csv" 2>/dev/null && keep "$scratch/ncu.csv" ncu.csv
    fi
    {
        echo
        echo "=== Nsight Compute"
        tail -n 200 "$scratch/ncu.txt"
    } >>"$scratch/kernels"
fi
keep "$scratch/kernels" kernels.txt
note "kernels, torch's profiler" "$status"

{
    grep -m 1 -i -E 'nvidia|name=' "$out/machine.txt" || echo "no GPU"
    printf '%s\n' "${results[@]}"
    echo
    grep -h -E '^(=== |[0-9]+ (passed|failed)|.*(passed|failed|skipped).* in )' "$out/tests.txt"
    grep -h -E '^(FAILED|ERROR) ' "$out/tests.txt" | cut -c 1-200 | head -n 40
    echo
    sed '/^=== all/,$d' "$out/times.txt" | cut -c 1-200 | head -n 60
    echo
    echo "took $SECONDS s"
} >"$out/summary.txt"
cat "$out/summary.txt"
exit "$failed"
