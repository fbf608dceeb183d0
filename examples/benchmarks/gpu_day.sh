#!/usr/bin/env bash
# What one GPU can say about this project in eight minutes: are the kernels right, how far are they
# from their floors, and what does decoding cost beside the baselines.
#
#   bash examples/benchmarks/gpu_day.sh FOLDER              on a GPU of 80 GB; nothing is installed
#   bash examples/benchmarks/gpu_day.sh --rehearse FOLDER   every part at toy size, without a GPU
#
# FOLDER is $OUT by default, and the interpreter $PYTHON, or python3. Each part has its own limit and
# writes as it goes, so that one that is cut off leaves what it has. parts.csv says how each ended
# (124: cut off); the exit status is 1 if any did not succeed.
set -u -o pipefail

rehearse=
if [ "${1:-}" = --rehearse ]; then
    rehearse=1
    shift
fi
out=${1:-${OUT:?expected a folder for the results, got none; pass it, or set OUT}}
python=${PYTHON:-python3}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

tests=(tests/gpu tests/triton_ops/kernels -n 8 -m 'not slow' --timeout 60)
kernels=()
graphs=(--cases 1x32768,16x8192)
eager=(--cases 1x32768 --compile-limit 90)
if [ -n "$rehearse" ]; then
    export TRITON_INTERPRET=1
    tests=(tests/gpu tests/triton_ops/kernels/test_window_scores_kernel.py -k 'half or gpu')
    kernels=(--interpret)
    graphs=(--toy)
    eager=(--toy --compile-limit 0)
fi

failed=0
echo part,seconds,limit,status >"$out/parts.csv"
part() { # NAME LIMIT MODULE ARGUMENTS...: run a module of Python for at most LIMIT seconds
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    timeout -k 5 "$limit" "$python" -m "$@" 2>&1 | tee "$out/$name.txt"
    status=$?
    echo "$name,$((SECONDS - start)),$limit,$status" >>"$out/parts.csv"
    [ "$status" -eq 0 ] || failed=1
}

decode=(examples.benchmarks.gpu_decode --rounds 2 --largest 0)
part tests 125 pytest -q -p no:cacheprovider --junitxml "$out/tests.xml" "${tests[@]}"
part kernels 65 examples.benchmarks.gpu_kernels --output "$out" "${kernels[@]}"
# What matters most comes first: graphs, then what the host slows down and what must be compiled.
part graphs 140 "${decode[@]}" --output "$out/graphs" "${graphs[@]}" --profile budget-graphs \
    --decoders budget-graphs,dynamic,exact-graphs,floor-graph,moving-graphs,unequal-graphs
part eager 145 "${decode[@]}" --output "$out/eager" "${eager[@]}" --profile budget \
    --decoders budget,floor,static
exit "$failed"
