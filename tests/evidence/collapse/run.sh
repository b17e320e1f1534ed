#!/bin/bash
# The searches of PLAN.md that are missing, N side by side (default 2): run.sh DATA OUT [N]
# DATA: the folder that holds cifar-10-batches-py; OUT: gets runs/<variant>-<seed>/ and beside each its output
# and its processor time. What is finished is skipped and what was stopped is resumed, so it can be killed and
# started again. PYTHON in the environment: another interpreter than `python`.
set -u
DATA=$(realpath "$1") OUT=$(realpath -m "$2") N=${3:-2}
ROOT=$(realpath "$(dirname "$0")/../../..") PYTHON=${PYTHON:-python}
EPOCHS=40
REGIME="--search_space nasbench201 --image_size 16 --init_channels 4 --layers 5 --batch_size 32 --epochs $EPOCHS
        --arch_learning_rate 3e-3 --eigenvalue --probe_batches 4 --report_freq 1000"
declare -A VARIANT=(
    [DARTS]="--lambda_reg 0" [central]="--lambda_reg 0.25" [exact]="--lambda_reg 0.25 --lambda_grad exact"
    [random]="--lambda_reg 0.25 --lambda_grad random"
    [sign]="--lambda_reg 0.25 --lambda_grad exact --lambda_kind sign")

search() {  # search VARIANT SEED
    local run=runs/$1-$2 flags="$REGIME ${VARIANT[$1]} --data $DATA --seed $2 --save $1-$2"
    [ "$(wc -l < "$run/metrics.jsonl" 2> /dev/null)" = $EPOCHS ] && return
    [ -d "$run" ] && flags="--resume $run --data $DATA"
    { time nice -n 19 "$PYTHON" "$ROOT/train_search.py" $flags >> "$run.log" 2>&1; } 2>> "$run.cpu"
}

mkdir -p "$OUT/runs" && cd "$OUT" || exit
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
TIMEFORMAT='%U %S'  # processor seconds, the program's and the system's for it
for seed in 0 1 2 3 4 5 6 7 8 9; do
    for variant in DARTS central exact random $([ $seed -lt 5 ] && echo sign); do
        while [ "$(jobs -rp | wc -l)" -ge "$N" ]; do wait -n; done
        search $variant $seed &
    done
done
wait
