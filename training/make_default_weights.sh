#!/bin/sh
# Train the default weights from nothing: synthesize, plan, preprocess, five folds, select, export.
#
#   training/make_default_weights.sh [WORKDIR]        default: ./default-weights
#
# Two folds run side by side on one core each. What is done is kept: run it again after an interruption.
# These may be set in the environment:
#   CASES    synthetic scans                        EPOCHS   of training, each fold
#   SEED     of the scans (20221 is the held-out set's, never train on it)
#   OUT      the bundle's folder                    PYTHON   the interpreter
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
work=${1:-default-weights}
cases=${CASES:-200}
epochs=${EPOCHS:-50}
seed=${SEED:-1}
out=${OUT:-$here/weights}
python=${PYTHON:-$here/.venv/bin/python}
export PYTHONPATH="$here"

description="Segments intracranial haemorrhage in head CT without contrast. Trained on synthetic scans only; a demonstration, not for diagnosis or any clinical use."

step() { echo "== $*" >&2; "$python" -m training "$@"; }

if [ "$seed" = 20221 ]; then
    echo "seed 20221 is the held-out set's: choose another" >&2
    exit 1
fi
mkdir -p "$work"
[ -f "$work/data/dataset.json" ] || step synthesize --out "$work/data" --cases "$cases" --seed "$seed"
[ -f "$work/dataset.json" ] || step convert "$work/data" --workspace "$work"
[ -f "$work/plans.json" ] || step plan --workspace "$work" --spacing 5,1.2,1.2 \
    --patch 16,96,96 --batch 2 --features 8,16,32,64,128 \
    --ct-clip=-50,130 --batch-dice --deep-supervision
step preprocess 3d_fullres --workspace "$work"

train() { # fold; exec: so that it is the trainer that the trap ends, and not a shell around it
    echo "== train fold $1, see $work/fold_$1.log" >&2
    exec "$python" -m training train 3d_fullres --workspace "$work" --fold "$1" --recipe compact --epochs "$epochs" \
        --augmentation-engine device --threads 1 --learning-rate 2e-3 --no-validation-mirrors >>"$work/fold_$1.log" 2>&1
}

# On Ctrl-C or SIGTERM both trainers write a checkpoint and end; then this script does.
first='' second=''
trap 'kill -TERM $first $second 2>/dev/null; wait; exit 130' INT TERM

for fold in 0 2 4; do
    train $fold & first=$!
    if [ $fold -lt 4 ]; then
        train $((fold + 1)) & second=$!
    fi
    wait "$first"
    [ -z "$second" ] || wait "$second"
    first='' second=''
done
step cross-validate --workspace "$work"
step select --workspace "$work"
step export --workspace "$work" --out "$out" --threads 2 --name ich-synthetic-compact --model-version 3 \
    --description "$description"
echo "the bundle is in $out" >&2
