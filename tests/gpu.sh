#!/usr/bin/env bash
# Nine minutes of one GPU, in one call: are the kernels right, does training work, how fast are
# both, and where do others do better?
#
#   bash tests/gpu_wheels.sh        # before, where there is a network: makes tests/wheels
#   COMMIT=abc1234 bash tests/gpu.sh    # on the GPU machine, tests/wheels carried along
#   bash tests/gpu.sh --rehearse    # the same steps in small on a CPU, in under three minutes
#
#   0:20  set-up: installs tests/wheels beside what the machine has
#   3:20  correctness: the kernels' tests and real training, side by side; meanwhile the last step
#         is compiled
#   2:36  kernels.bench, alone on the GPU
#   0:20  bench_chunk, alone on the GPU: where a chunk's time goes
#   1:48  bench_train, alone on the GPU
#
# KERNELS_MINUTES=1 TRAIN_MINUTES=1 before the command make the two benchmarks shorter.
#
# Every step has a time limit, and one that fails does not stop the next. CSV files, plots and logs
# go to $OUT, at most 8 files. The output ends with all that failed and all that is faster or leaner
# than ours. Exit status 1 if a step failed.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-$(mktemp -d)}
commit=${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONUNBUFFERED=1

# step NAME SECONDS COMMAND...: runs a command within its limit, its output to $logs/NAME.log
logs=$OUT
step() {
    local name=$1 limit=$2 started=$SECONDS status=0
    shift 2
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$logs/$name.log" 2>&1 || status=$?
    echo "$name $status $((SECONDS - started)) $limit" >>"$scratch/steps"
    echo "[$SECONDS s] $name: exit status $status after $((SECONDS - started)) s"
}

if [[ ${1:-} == --rehearse ]]; then
    export CUDA_VISIBLE_DEVICES=  # the kernels' tests then take Triton's interpreter
    export OMP_NUM_THREADS=1      # steps run side by side, and threads that wait spin
    test_options=(-m "not gpu and not slow" -k test_kernels_chunks)
    training_options=(--tiny)
    kernels_options=(--quick --minutes 0.3)
    train_options=(--minutes 0.2 model.n_layer=2 model.n_embd=64 model.n_head=2)
    train_options+=(model.block_size=32 batch_size=4 micro_batch_size=2)
else
    test_options=(-m gpu -n 6)
    training_options=()
    kernels_options=(--minutes ${KERNELS_MINUTES:-2.6})
    train_options=(--minutes ${TRAIN_MINUTES:-1.8})

    # Into a folder of their own: that works in a virtual environment (a second one would not see
    # the first one's torch) and in a system's Python, and changes nothing that the machine has.
    export PYTHONPATH=$scratch/site
    install=(python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir)
    logs=$scratch step set_up 60 "${install[@]}" --target "$scratch/site" tests/wheels/*.whl
    python3 -c "import hydra, torch; print(torch.__version__, torch.cuda.get_device_name())" || {
        cat "$scratch/set_up.log"
        echo "no GPU, or no tests/wheels (bash tests/gpu_wheels.sh makes it): stopped"
        exit 1
    }
    nvidia-smi
    echo "[$SECONDS s] set-up"
fi

# Correctness. The kernels' tests go by file name: to collect all tests takes packages that the
# machine lacks.
step training 200 python3 -m tests.gpu_training "${training_options[@]}" &
if [[ ${1:-} != --rehearse ]]; then
    logs=$scratch step compile 200 python3 -m tests.bench_train --minutes 0 &
fi
step tests 150 python3 -m pytest -v -rfE --tb=short -p no:cacheprovider "${test_options[@]}" \
    tests/test_kernels*.py
wait

step kernels 190 python3 -m kernels.bench "${kernels_options[@]}" \
    --out "$OUT/kernels.csv" --commit "$commit"
if [[ ${1:-} != --rehearse ]]; then
    step chunk 30 python3 -m tests.bench_chunk 20
fi
step bench_train 130 python3 -m tests.bench_train "${train_options[@]}" \
    --out "$OUT/train.csv" --commit "$commit"

# Four logs (five on a GPU) and two CSV files leave room for a plot.
ls "$OUT"/*.png 2>/dev/null | tail -n +2 | xargs -r rm
ls -l "$OUT"

# What failed (124, 137: at its time limit), and where others do better. Only the end of a long
# output comes back from the machine, so each step has 15 short lines.
echo -e "\n==== where we lose, $commit"
failed=0
while read -r name status seconds limit; do
    log=$OUT/$name.log
    [[ -f $log ]] || continue
    echo "$name: exit status $status, $seconds s of $limit"
    {
        sed -n '/^==== where we lose/,/^$/p' "$log" | tail -n +2
        [[ $status == 0 ]] || { failed=1; grep -E "^FAILED|^ERROR| (FAILED|ERROR) " "$log"; tail -n 8 "$log"; }
    } >"$scratch/details"
    cut -c 1-150 "$scratch/details" | head -n 15 | sed 's/^/    /'
done <"$scratch/steps"
exit $failed
