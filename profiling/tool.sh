# Sourced by nsys.sh and ncu.sh: their arguments, a Python, a GPU, the tool itself.
#
# begin TOOL [ARGUMENT..]: sets python, tool, out (a folder, made), stem (of the files in it), once (arguments of
# `python -m bench once`) and report (those of them that profiling.ncu_report takes too), and goes to the checkout. Ends the
# script with 64 where it was called wrongly, with 2 where there is no GPU or no TOOL.
# shellcheck shell=bash disable=SC2034

begin() {
    local name=$1 folder='' preset=''
    shift
    ids=() once=() report=()
    while [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do
        ids+=("$1")
        shift
    done
    # Nsight Systems ends with the first range, ncu counts in all of them.
    if [ ${#ids[@]} -eq 0 ] || { [ "$name" = nsys ] && [ ${#ids[@]} -gt 1 ]; }; then
        echo "usage: profiling/$name.sh ID$([ "$name" = nsys ] || echo ..) [--out DIR] [--preset P] [--shape B=..,N=..] [--dtype D] [--backend B] [--repeat K]" >&2
        exit 64
    fi
    while [ $# -gt 0 ]; do
        if [ $# -eq 1 ]; then
            echo "$name.sh: $1 has no value" >&2
            exit 64
        fi
        case $1 in
            --out) folder=$2 ;;
            --backend) once+=("$1" "$2") ;;
            --preset) preset=$2 once+=("$1" "$2") report+=("$1" "$2") ;;
            --shape | --dtype | --repeat) once+=("$1" "$2") report+=("$1" "$2") ;;
            *)
                echo "$name.sh has no option $1" >&2
                exit 64
                ;;
        esac
        shift 2
    done
    # What is profiled is meant for a GPU, unless another shape is asked for.
    [ -n "$preset" ] || { once+=(--preset gpu) && report+=(--preset gpu); }
    once=("${ids[@]}" "${once[@]}" --device cuda)
    report=("${ids[@]}" "${report[@]}")
    [ -z "$folder" ] || { mkdir -p "$folder" && folder=$(cd "$folder" && pwd); } || exit 64
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 64
    out=${folder:-$PWD/profiling/out}
    mkdir -p "$out" || exit 64
    stem=$out/$(printf %s "${ids[0]}" | tr -c 'A-Za-z0-9_+=-' .)
    [ ${#ids[@]} -eq 1 ] || stem+=.and-$((${#ids[@]} - 1))-more
    python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
    export PYTHONPATH=$PWD PYTHONDONTWRITEBYTECODE=1 TIGER_FAST_NVTX=1 LC_ALL=C
    if ! tool=$(find_tool "$name"); then
        echo "$name is not found (PATH, /usr/local/cuda/bin, /opt/nvidia): nothing was profiled" >&2
        exit 2
    fi
    if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        echo "there is no GPU here that torch of $python can use (PYTHON names another): nothing was profiled" >&2
        exit 2
    fi
}

find_tool() {
    local place
    command -v "$1" && return
    for place in "/usr/local/cuda/bin/$1" /opt/nvidia/nsight-*/*/"$1" /opt/nvidia/nsight-*/*/bin/"$1"; do
        [ ! -x "$place" ] || { echo "$place" && return; }
    done
    return 1
}
