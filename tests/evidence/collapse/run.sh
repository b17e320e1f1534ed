#!/bin/bash
# The searches of PLAN.md that are missing, N side by side (default 2):
#
#     run.sh explore A DATA OUT [N]   # regime A, plain DARTS, seeds 100 to 104
#     run.sh compare A DATA OUT [N]   # regime A, all variants, seeds 0 to 9
#
# DATA: the folder that holds cifar-10-batches-py. OUT/A/runs/ gets <variant>-<seed>/, and beside each its output
# and its processor time. Finished searches are skipped and stopped ones resumed, so it can be killed and started
# again. PYTHON in the environment: another interpreter than `python`.
set -u
[ $# -ge 4 ] || { echo "run.sh: use run.sh explore|compare A DATA OUT [N]" >&2; exit 2; }
DATA=$(realpath "$3") OUT=$(realpath -m "$4")/$2 N=${5:-2}
ROOT=$(realpath "$(dirname "$0")/../../..") PYTHON=${PYTHON:-python}
EPOCHS=60
declare -A CHANNELS=([A]=4 [B]=4 [C]=8) RATE=([A]=5e-4 [B]=6e-3 [C]=3e-3)
declare -A VARIANT=(
    [DARTS]="--lambda_reg 0"
    [central]="--lambda_reg 0.25"
    [exact]="--lambda_reg 0.25 --lambda_grad exact"
    [random]="--lambda_reg 0.25 --lambda_grad random"
    [sign]="--lambda_reg 0.25 --lambda_grad exact --lambda_kind sign")
FLAGS="--data $DATA --search_space nasbench201 --image_size 16 --layers 5 --batch_size 32 --eigenvalue
       --probe_batches 4 --report_freq 1000 --init_channels ${CHANNELS[$2]} --epochs $EPOCHS
       --arch_learning_rate ${RATE[$2]}"
case $1 in
    explore) SEEDS=$(seq 100 104) ;;
    compare) SEEDS=$(seq 0 9) ;;
    *) echo "run.sh: first argument '$1': use explore or compare" >&2; exit 2 ;;
esac

variants_of() {  # variants_of SEED
    [ "$1" -ge 100 ] && echo DARTS && return
    echo DARTS central exact random
    [ "$1" -lt 5 ] && echo sign
}

search() {  # search VARIANT SEED
    local run=runs/$1-$2 flags="$FLAGS ${VARIANT[$1]} --seed $2 --save $1-$2"
    [ "$(cat "$run/metrics.jsonl" 2> /dev/null | wc -l)" = $EPOCHS ] && return
    [ -d "$run" ] && flags="--resume $run --data $DATA"
    { time nice -n 19 "$PYTHON" "$ROOT/train_search.py" $flags >> "$run.log" 2>&1; } 2>> "$run.cpu"
}

mkdir -p "$OUT/runs" && cd "$OUT" || exit
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
TIMEFORMAT='%U %S'  # processor seconds, the program's and the system's for it
for seed in $SEEDS; do
    for variant in $(variants_of $seed); do
        while [ "$(jobs -rp | wc -l)" -ge "$N" ]; do wait -n; done
        search $variant $seed &
    done
done
wait
