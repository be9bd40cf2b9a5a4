#!/usr/bin/env bash
# Training and inference on one GPU against nnunetv2, in one call: prepares, measures, prints the table last.
#
#   benchmarks/gpu.sh --work FOLDER [--data TASK04] [--minutes 3] [--rival-env FOLDER]
#   benchmarks/gpu.sh --work FOLDER --tiny --device cpu     does it run through? (measures nothing)
#
# The machine has to have Python 3.11 or newer with torch. It needs no network: what else is missing
# is installed from the wheels in $WHEELS, if that is set, into FOLDER/python, which sees the
# machine's own packages. On a machine with network fill that folder beforehand (and in the same way
# one with nnunetv2, if it is to be the rival):
#
#   grep -hv -e '^torch==' -e '^-r' -e '^#' requirements.txt training/requirements.txt > wanted.txt
#   pip download --only-binary :all: --python-version 3.12 -r wanted.txt -d "$WHEELS"
set -euo pipefail
cd "$(dirname "$0")/.."

work=
previous=
for argument in "$@"; do
  [ "$previous" = --work ] && work=$argument
  previous=$argument
done
[ -n "$work" ] || { echo "gpu.sh: --work FOLDER is missing" >&2; exit 2; }

python=${PYTHON:-python3}
if [ -n "${WHEELS:-}" ]; then
  mkdir -p "$work"
  wanted=$work/wanted.txt
  grep -hv -e '^torch==' -e '^-r' -e '^#' requirements.txt training/requirements.txt > "$wanted"
  [ -x "$work/python/bin/python" ] || "$python" -m venv --system-site-packages "$work/python"
  python=$work/python/bin/python
  "$python" -m pip install -q --no-index --find-links "$WHEELS" -r "$wanted"
fi

if command -v nvidia-smi > /dev/null; then nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader; fi
PYTHONPATH=. exec "$python" benchmarks/gpu.py "$@"
