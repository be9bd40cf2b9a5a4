#!/bin/sh
# Train weights like the default ones in one go: data, plan, preprocess, five folds, cross-validate, select, export.
# How the shipped ones came about, over several versions: docs/decisions/0002-default-weights.md.
#
#   training/make_default_weights.sh PHE_SICH CT_ICH [WORKDIR]        default: ./default-weights
#
# PHE_SICH and CT_ICH are the folders of the two public downloads, see docs/datasets.md. Two folds run side by side on
# one core each. What is done is kept: run it again after an interruption.
# These may be set in the environment:
#   CASES    phantoms; 5 with findings to 4 of them  MINUTES  of training, each fold
#   SEED     of phantoms and painted bleeds         BEGIN    bundle whose folds, of the same cases, to begin with
#            (20221 is the held-out set's,          OUT      the bundle's folder
#            never train on it)                     PYTHON   the interpreter
set -eu

if [ $# -lt 2 ] || [ $# -gt 3 ]; then
    echo "usage: $0 PHE_SICH CT_ICH [WORKDIR]" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")/.." && pwd)
phe_sich=$1
ct_ich=$2
work=${3:-default-weights}
cases=${CASES:-160}
minutes=${MINUTES:-60}
seed=${SEED:-41}
begin=${BEGIN:-}
out=${OUT:-$here/weights}
python=${PYTHON:-$here/.venv/bin/python}
export PYTHONPATH="$here"

description="Segments intracranial haemorrhage in head CT without contrast. Trained on real scans with derived masks and on synthetic ones; for research, not for diagnosis or any clinical use."

step() { echo "== $*" >&2; "$python" -m training "$@"; }
made() { [ -f "$1/dataset.json" ]; }

if [ "$seed" = 20221 ]; then
    echo "seed 20221 is the held-out set's: choose another" >&2
    exit 1
fi
mkdir -p "$work"
made "$work/phantoms" || step synthesize --out "$work/phantoms" --cases "$cases" --seed "$seed" --balanced --negatives 0.15
made "$work/findings" || step synthesize --out "$work/findings" --cases "$((cases / 2))" --seed "$((seed + 1))" --balanced \
    --negatives 0.4 --findings --name FIND
made "$work/mouths" || step synthesize --out "$work/mouths" --cases "$((cases * 3 / 4))" --seed "$((seed + 2))" --balanced \
    --negatives 0.5 --findings --name MOUTH
made "$work/real" || step real-heads --phe-sich "$phe_sich" --ct-ich "$ct_ich" --no-copies --out "$work/real"
made "$work/painted" || step synthesize --background "$work/real" --out "$work/painted" --seed "$seed" --balanced
made "$work/data" || step real-heads --also "$work/real" "$work/phantoms" "$work/findings" "$work/mouths" "$work/painted" \
    --negative-copies 3 --out "$work/data"
[ -f "$work/dataset.json" ] || step convert "$work/data" --workspace "$work" --groups "$work/data/groups.csv"
[ -f "$work/plans.json" ] || step plan --workspace "$work" --spacing 5,1.2,1.2 \
    --patch 16,160,144 --batch 2 --features 8,16,32,64,128 \
    --ct-clip=-20,100 --batch-dice --deep-supervision --padding nearest
step preprocess 3d_fullres --workspace "$work"

train() { # fold; exec: so that it is the trainer that the trap ends, and not a shell around it
    echo "== train fold $1, see $work/fold_$1.log" >&2
    exec "$python" -m training train 3d_fullres --workspace "$work" --fold "$1" --recipe compact --epochs 100000 \
        --minutes "$minutes" --compile --augmentation-engine device --threads 1 --learning-rate 1.5e-3 --lesion-fraction 0.3 \
        ${begin:+--pretrained "$begin"} --no-validation-mirrors >>"$work/fold_$1.log" 2>&1
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
step select --workspace "$work" --drop-at-most-ml 0.05
step export --workspace "$work" --out "$out" --threads 2 --name ich-compact --model-version 11 \
    --licence CC-BY-NC-SA-4.0 \
    --description "$description"
echo "the bundle is in $out" >&2
