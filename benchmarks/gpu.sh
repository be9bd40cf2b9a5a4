#!/usr/bin/env bash
# Everything that is measured on a GPU, in one call of nine minutes at most, on a machine without network.
#
#   PYTHONPATH=. python benchmarks/gpu_pack.py      on a machine with network: what the other one lacks, into benchmarks/.gpu-pack
#   benchmarks/gpu.sh --out FOLDER           on the GPU machine, in a copy of the clone with that folder
#   benchmarks/gpu.sh --out FOLDER --tiny --device cpu           does it run through? (measures nothing)
#
# That machine has to have Python 3.11 or newer ($PYTHON, else python3) with torch and numpy, and what the folder was
# not filled with. Nothing is installed into it: the wheels are unpacked into a temporary folder, and come first.
# FOLDER gets rows.jsonl, one line a figure as soon as there is one, table.txt and log.txt; $OUT if --out is not given.
# All other arguments are those of benchmarks/gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
[[ " $* " == *" --out"* || -z "${OUT:-}" ]] || set -- --out "$OUT" "$@"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
shopt -s nullglob
wheels=(benchmarks/.gpu-pack/*.whl)
if [[ ${#wheels[@]} -gt 0 ]] && ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))'; then
  echo "gpu.sh: the packages in benchmarks/.gpu-pack are for Python 3.12, and left out here"
  wheels=()
fi
for wheel in "${wheels[@]}"; do "$python" -m zipfile -e "$wheel" "$work/site"; done
export PYTHONPATH="$PWD:$work/site${PYTHONPATH:+:$PYTHONPATH}"
# for the log alone: without it, or where it fails, the rest is measured all the same
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || echo "gpu.sh: no answer from nvidia-smi"
"$python" benchmarks/gpu.py --work "$work/work" "$@"
