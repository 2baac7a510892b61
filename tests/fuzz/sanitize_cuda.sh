#!/usr/bin/env bash
# The GPU tests and a corpus of random calls under compute-sanitizer; fails where a tool names one of our kernels.
#
#   tests/fuzz/sanitize_cuda.sh PYTHON [TOOL...]     tools: memcheck initcheck racecheck synccheck; default: all
#
# All kernels are watched, PyTorch's too: initcheck must see who writes what ours read. Its reports about theirs are not
# counted. Without PyTorch's cache every tensor is an allocation of its own, whose bounds memcheck knows. WORKERS=8, with
# pytest-xdist, runs the tests in so many processes.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=$1
shift
tools=("$@")
[ $# -gt 0 ] || tools=(memcheck initcheck racecheck synccheck)
sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")}
reports=build/compute-sanitizer
mkdir -p "$reports"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

# The tests of the ops, less those without a kernel of ours, and those that a sanitizer does not agree with: graphs,
# compilation, large inputs, allocations that are meant to fail, and gradcheck's thousands of equal calls.
left_out=(compile graph workloads OutOfMemory out_of_memory grid_sample gradcheck gradients_of_all_operands)
printf -v kept " and not %s" "${left_out[@]}"
tests=(-m pytest -q ${WORKERS:+-n "$WORKERS"} -m "cuda and not huge" tests/ops -k "${kept# and }")
corpus=(-m tests.fuzz --device cuda --draws "${DRAWS:-200}" --seed "${SEED:-0}")

failed=0
run() {  # run NAME TOOL ARGUMENTS...
    local report=$reports/$2-$1.log
    local code=0
    "$sanitizer" --tool "$2" --target-processes all --print-limit 1000 "$python" "${@:3}" >"$report" 2>&1 || code=$?
    local ours
    ours=$(grep -c "reimplementation::" "$report" || true)
    grep "ERROR SUMMARY\|RACECHECK SUMMARY\|passed\|mismatches" "$report" | tail -2 || true
    if [ "$code" -ne 0 ] || [ "$ours" -ne 0 ]; then
        echo "$2, $1: FAILED: exit code $code, $ours lines name our kernels; see $report"
        failed=1
    else
        echo "$2, $1: passed"
    fi
}

for tool in "${tools[@]}"; do
    run corpus "$tool" "${corpus[@]}"
    run tests "$tool" "${tests[@]}"
done
exit $failed
