#!/usr/bin/env bash
# profiling/ncu.sh ID.. [options]: Nsight Compute's counts for every kernel of benchmarks (`python -m bench list` has the ids),
# and profiling.ncu_report's table and roofline of them. Needs a CUDA GPU, ncu, and a Python with torch and Triton (PYTHON; else
# .venv's, else python3); nothing of the checkout has to be built.
#
#   profiling/ncu.sh route/forward
#   profiling/ncu.sh group_attention/forward+backward --out results --shape B=8,N=4096 --dtype float16
#
# Options go to `python -m bench once`, the preset being "gpu" if none is named; --out is the folder (profiling/out).
# Kernels are warm, caches are not: ncu empties them before each of the passes in which it repeats a kernel. Clocks are left alone.
# Ends with 2 where there is no GPU or no ncu.
set -uo pipefail
# shellcheck source=profiling/tool.sh
. "$(dirname "${BASH_SOURCE[0]}")/tool.sh"
begin ncu "$@"

metrics=gpu__time_duration.sum
add() {
    local name
    for name in "$@"; do metrics+=,$name; done
}
# Memory.
add dram__bytes_read.sum dram__bytes_write.sum dram__bytes.sum.peak_sustained_elapsed.per_second
add dram__throughput.avg.pct_of_peak_sustained_elapsed lts__throughput.avg.pct_of_peak_sustained_elapsed
add l1tex__throughput.avg.pct_of_peak_sustained_active lts__t_sector_hit_rate.pct
# Arithmetic, and the most of it that there can be.
add sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed smsp__issue_active.avg.pct_of_peak_sustained_active
for type in bf16 fp16 tf32; do
    add "sm__ops_path_tensor_src_${type}_dst_fp32.sum"{,.peak_sustained_elapsed.per_second}
done
add smsp__sass_thread_inst_executed_op_{ffma,fadd,fmul}_pred_on.sum
add smsp__sass_thread_inst_executed_op_ffma_pred_on.sum.peak_sustained_elapsed.per_second
# Occupancy, and what holds it; registers that went to memory.
add sm__warps_active.avg.pct_of_peak_sustained_active launch__waves_per_multiprocessor launch__registers_per_thread
add launch__occupancy_limit_{registers,shared_mem,warps,blocks} smsp__inst_executed_op_local_{ld,st}.sum
# What warps wait for.
for reason in barrier branch_resolving dispatch_stall drain gmma imc_miss lg_throttle long_scoreboard math_pipe_throttle \
    membar mio_throttle misc no_instruction not_selected selected short_scoreboard sleeping tex_throttle wait; do
    add "smsp__average_warps_issue_stalled_${reason}_per_issue_active.ratio"
done

"$tool" --profile-from-start off --nvtx --clock-control none --csv --page raw --print-units base \
    --print-kernel-base function --metrics "$metrics" --log-file "$stem.ncu.csv" \
    "$python" -m bench once "${once[@]}" >"$stem.ncu.txt" 2>&1
status=$?
if [ "$status" -ne 0 ]; then
    tail -n 20 "$stem.ncu.txt" >&2
    grep -h '^==ERROR==' "$stem.ncu.csv" >&2
    echo "ncu ended with $status" >&2
    exit 1
fi
"$python" -m profiling.ncu_report "$stem.ncu.csv" --json "$stem.ncu.json" "${report[@]}"
