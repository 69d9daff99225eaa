#!/usr/bin/env bash
# profiling/nsys.sh ID [options]: a benchmark on Nsight Systems' time line, with the ranges of tiger_fast (docs/profiling.md), and
# its sums: kernels, ranges with the kernels in them, calls of CUDA. Needs a CUDA GPU, nsys, and a Python with torch and Triton
# (PYTHON; else .venv's, else python3); nothing of the checkout has to be built.
#
#   profiling/nsys.sh step/decode --out results
#
# Options go to `python -m bench once`, the preset being "gpu" if none is named; --out is the folder (profiling/out). Writes a
# .nsys-rep, its .sqlite, and a .csv of every sum. Ends with 2 where there is no GPU or no nsys.
set -uo pipefail
# shellcheck source=profiling/tool.sh
. "$(dirname "${BASH_SOURCE[0]}")/tool.sh"
begin nsys "$@"

"$tool" profile --trace cuda,nvtx --sample none --cpuctxsw none --capture-range cudaProfilerApi --capture-range-end stop \
    --force-overwrite true --output "$stem" "$python" -m bench once "${once[@]}" >"$stem.nsys.txt" 2>&1
status=$?
if [ "$status" -ne 0 ] || [ ! -e "$stem.nsys-rep" ]; then
    tail -n 20 "$stem.nsys.txt" >&2
    echo "nsys ended with $status and $([ -e "$stem.nsys-rep" ] && echo a || echo no) report" >&2
    exit 1
fi
sums=cuda_gpu_kern_sum,cuda_gpu_mem_time_sum,cuda_api_sum,nvtx_sum,nvtx_gpu_proj_sum,nvtx_kern_sum
# The .sqlite beside the report is made by this.
"$tool" stats --force-export true --report "$sums" --format csv --output "$stem" "$stem.nsys-rep" >>"$stem.nsys.txt" 2>&1 &&
    "$tool" stats --report cuda_gpu_kern_sum,nvtx_gpu_proj_sum --format table "$stem.nsys-rep"
status=$?
[ "$status" -eq 0 ] || tail -n 20 "$stem.nsys.txt" >&2
echo "$stem.nsys-rep"
exit "$((status != 0))"
