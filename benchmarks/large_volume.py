"""Peak memory of `process.py` on a volume of 512x512x1000 voxels of 0.5 mm, and of its estimate.

    PYTHONPATH=. .venv/bin/python benchmarks/large_volume.py

The volume is a sample scan, magnified to 0.5 mm and run through back and forth, with noise. Data
memory is limited to 7 GiB, as the platform does to a job of 8 GiB. Linux only.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import memory
from benchmarks.rows import Row, at_most, report
from ichseg.scan import volume
from ichseg.scan.volume import Volume

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "test" / "sample" / "input" / "ge_intraparenchymal.mha"
SHAPE, SPACING_MM = (1000, 512, 512), 0.5
MOST_GB = 8 * 1024**3 / 1e9
DATA_LIMIT_KIB = 7 * 1024**2
OFF_BY = 0.25  # the estimate, as a fraction of the peak


def main() -> int:
    """Print the table and the line of JSON; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=ROOT / "weights")
    parser.add_argument("--preset", choices=["full", "balanced", "fast"], default="fast")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rival-env", help="not used: there is no rival to this")
    args = parser.parse_args()
    flags = ["--weights", str(args.weights), "--preset", args.preset, "--device", args.device]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        for kind in ("sample", "large"):
            folder = Path(name) / kind
            (folder / "in").mkdir(parents=True)
            if kind == "sample":
                shutil.copy(SAMPLE, folder / "in")
            else:
                volume.write(magnified(), folder / "in" / "large.mha")
            began = time.perf_counter()
            peak_gb, estimate_gb = run(folder, flags)
            rows += [
                at_most(f"{kind}: peak memory (VmHWM)", peak_gb, "GB", MOST_GB),
                at_most(
                    f"{kind}: the estimate ({estimate_gb:.2f} GB) is off by",
                    abs(estimate_gb / peak_gb - 1),
                    "share",
                    OFF_BY,
                ),
                Row(
                    f"{kind}: from start to end",
                    time.perf_counter() - began, None, "s", None, None, None,
                ),
            ]  # fmt: skip
    return report("large_volume", rows)


def magnified() -> Volume:
    """The sample scan in voxels of 0.5 mm: nearest ones, mirrored at its ends, and noise."""
    sample = volume.read(SAMPLE)
    index = []
    for wanted, size, spacing_mm in zip(SHAPE, sample.voxels.shape, sample.spacing_mm, strict=True):
        at = (np.arange(wanted) * SPACING_MM / spacing_mm).astype(int) % (2 * size)
        index.append(np.minimum(at, 2 * size - 1 - at))
    voxels = sample.voxels[np.ix_(*index)]
    voxels += np.random.default_rng(0).integers(-3, 4, SHAPE, np.int16)
    return Volume(voxels, (SPACING_MM,) * 3)


def run(folder: Path, flags: list[str]) -> tuple[float, float]:
    """Peak and estimate in GB of a run on this folder's scan."""
    command = [
        sys.executable, str(ROOT / "process.py"), "--input", str(folder / "in"),
        "--output", str(folder / "out"), *flags,
    ]  # fmt: skip
    limited = ["bash", "-c", f'ulimit -d {DATA_LIMIT_KIB}; exec "$@"', "bash", *command]
    log = folder / "log"
    peak = memory.peak(limited, os.environ, ROOT, log)
    said = log.read_text(encoding="utf-8")
    print(said, end="", flush=True)
    (estimate_gb,) = re.findall(r"about ([\d.]+) GB of memory", said)
    return peak.largest_mb / 1000, float(estimate_gb)


if __name__ == "__main__":
    sys.exit(main())
