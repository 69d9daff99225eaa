#!/usr/bin/env bash
# profiling/gpu_check.sh DIR: on a machine with one CUDA GPU, the GPU tests, times against eager PyTorch and torch.compile,
# and kernels by torch's profiler and by Nsight Compute where it is found, in ten minutes; then a summary.
#
# Builds nothing and needs no network: torch, Triton, pytest and pytest-benchmark, numpy for what the tests import. Each step
# has a time limit of its own, and what it has written by then counts. Writes at most 8 files into DIR, each under 16 MiB.
# GPU_CHECK_SECONDS is the limit for everything (570), GPU_CHECK_SHARDS the number of processes for the tests (8), PYTHON the
# Python. GPU_CHECK_DRY_RUN=1 runs every step small and without a GPU.
# Ends with 0 if all steps did, 1 if one failed, 2 where there is no GPU.
set -uo pipefail
if [ $# -ne 1 ]; then
    echo "usage: profiling/gpu_check.sh DIR" >&2
    exit 64
fi
mkdir -p "$1" || exit 64
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 64
python=${PYTHON:-python3}
dry=${GPU_CHECK_DRY_RUN:-}
shards=${GPU_CHECK_SHARDS:-8}
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
if [ -z "$dry" ] && ! limit 60 "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "there is no GPU here that torch can use: nothing was checked" | tee "$out/summary.txt" >&2
    exit 2
fi

# --- tests: in shards, as compiling kernels takes longer than running them; what needs most of the memory, or a checker's
# time, alone and after them ------------------------------------------------------------------------------------------------
# -o addopts=: what pyproject.toml asks of pytest needs plugins that may not be there.
pytest=("$python" -m pytest tests/test_gpu.py -q -rfEs -o addopts= -p no:cacheprovider --tb=short --durations 5)
alone="int32 or sanitizer"
chosen="not ($alone)"
if [ -n "$dry" ]; then
    chosen="leave_one_out and (widths or graphs)"
    alone="leave_one_out and int32"
    shards=2
    export TIGER_FAST_GPU_DRY_RUN=1
fi
pids=()
for ((i = 0; i < shards; i++)); do
    OMP_NUM_THREADS=2 limit 180 "${pytest[@]}" -k "$chosen" --shard "$i/$shards" >"$scratch/tests.$i" 2>&1 &
    pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
    wait "$pid"
    one=$?
    [ "$one" -ne 0 ] && [ "$one" -ne 5 ] && [ "$status" -ne 1 ] && status=$one
done
note tests "$status"
limit 80 "${pytest[@]}" -k "$alone" >"$scratch/tests.$shards" 2>&1
note "tests of large tensors, and checkers" $?
for ((i = 0; i <= shards; i++)); do
    echo "=== part $((i + 1)) of $((shards + 1))"
    tail -c 400000 "$scratch/tests.$i"
done >"$scratch/tests"
keep "$scratch/tests" tests.txt

# --- times -------------------------------------------------------------------------------------------------------------
times=(--json "$out/times.json" --seconds 1.5)
[ -n "$dry" ] && times+=(--dry-run --no-compile)
limit 200 "$python" -m profiling.gpu_times "${times[@]}" >"$scratch/times" 2>"$scratch/times.err"
status=$?
{
    cat "$scratch/times"
    tail -n 40 "$scratch/times.err"
} >"$out/times.txt"
note times "$status"

# --- kernels -------------------------------------------------------------------------------------------------------------
one_pass=(-m profiling.one_pass)
[ -n "$dry" ] && export TRITON_INTERPRET=1 && one_pass+=(--dry-run --op leave_one_out)
limit 40 "$python" "${one_pass[@]}" --table >"$scratch/kernels" 2>&1
status=$?
keep "$scratch/kernels" kernels.txt
note "kernels, torch's profiler" "$status"
limit 30 "$python" -m profiling.host_cost --rounds 100 >>"$out/times.txt" 2>&1
note "host's cost of a call" $?

ncu=$(command -v ncu || ls /usr/local/cuda/bin/ncu 2>/dev/null)
if [ -n "$ncu" ]; then
    metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
    metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__throughput.avg.pct_of_peak_sustained_elapsed
    metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread
    metrics+=,lts__t_sector_hit_rate.pct,smsp__inst_executed_op_local_st.sum
    limit 60 "$ncu" --profile-from-start off --clock-control none --csv --metrics "$metrics" \
        "$python" "${one_pass[@]}" >"$scratch/ncu" 2>&1
    status=$?
    keep "$scratch/ncu" ncu.csv
    note "kernels, Nsight Compute" "$status"
else
    results+=("kernels, Nsight Compute: left out, ncu is not found")
fi

{
    grep -m 1 -i -E 'nvidia|name=' "$out/machine.txt" || echo "no GPU"
    printf '%s\n' "${results[@]}"
    echo
    grep -h -E '^(=== part|[0-9]+ (passed|failed)|.*(passed|failed|skipped).* in )' "$out/tests.txt"
    grep -h -E '^(FAILED|ERROR) ' "$out/tests.txt" | cut -c 1-200 | head -n 40
    echo
    cut -c 1-200 "$out/times.txt" | head -n 40
    echo
    echo "took $SECONDS s"
} >"$out/summary.txt"
cat "$out/summary.txt"
exit "$failed"
