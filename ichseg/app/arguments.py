"""The command line of ``process.py``, and what its ``--help`` teaches."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

MOUNTED_PREDICT = Path("/predict")  # there only when INSTANCE 2022's command mounts it
EXAMPLES = """\
examples:
  a folder of scans, quickly, with a picture of each:
    python process.py --input scans --output out --preset fast --report
  the same after an interruption; what is finished stays as it is:
    python process.py --input scans --output out --preset fast --report --resume
  your own weights on a GPU, within ten minutes for all scans together:
    python process.py --input scans --output out --weights bundle --device cuda --time-budget 600

Each mask has its scan's name, format and geometry: 0 background, 1 and up the bundle's labels.
results.json says for each scan the volume in mL, a table of lesions, warnings, what ran and how
long it took. A scan that cannot be segmented gets no mask and does not stop the others; then the
exit status is 1 and the last line on stderr says why.
"""


def parse_arguments(argv: list[str] | None, description: str) -> argparse.Namespace:
    """Every default suits the Grand Challenge platform; what makes no sense ends with status 2."""
    parser = argparse.ArgumentParser(
        prog="process.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add(
        "--input",
        "--input_dir",
        type=Path,
        default=Path("/input"),
        help="folder with the scans (default /input)",
    )
    add("--output", type=Path, help="folder for masks and results.json (default /output)")
    add(
        "--predict_dir",
        type=Path,
        help="INSTANCE 2022's batch: each .nii.gz of the input folder gets a mask of the same name "
        "here, and there is no results.json (default /predict if there is one and no --output)",
    )
    add(
        "--api",
        choices=["exec", "invoke"],
        default=os.environ.get("ICHSEG_API", "exec"),
        help="exec: one run; invoke: Grand Challenge's server, on port 4743, a run for each POST "
        "(default exec, or what the image was built for)",
    )
    add(
        "--weights",
        type=Path,
        help="weights bundle (default /opt/ml/model if it holds one, else weights/)",
    )
    add(
        "--device",
        choices=["auto", "cpu", "cuda", "torch-cpu"],
        default="auto",
        help="auto takes a GPU if one works, else the CPU (OpenVINO); torch-cpu is the reference, "
        "several times slower",
    )
    add(
        "--preset",
        choices=["full", "balanced", "fast"],
        default="full",
        help="full: all folds, all mirrorings; balanced: all folds; fast: one fold (default full)",
    )
    add(
        "--time-budget",
        type=_seconds,
        metavar="SECONDS",
        help="for the whole run, since the platform's limit is on a job: folds first, then "
        "mirrorings, as many as fit; what is left is shared evenly by the scans that are left; a "
        "scan for which not even one fold fits fails at once and says what it needs (default: "
        "none; masks then are the same run after run)",
    )
    add(
        "--resume",
        action="store_true",
        help="leave scans alone whose mask is unaltered and whose entry in results.json is of the "
        "same weights, preset and time budget and of a scan of this size and date",
    )
    add("--report", action="store_true", help="also write an overlay picture of each case")
    add("--input-slug", help="Grand Challenge input socket (default from the bundle)")
    add("--output-slug", help="Grand Challenge output socket (default from the bundle)")
    arguments = parser.parse_args(argv)
    if arguments.output is None:
        if arguments.predict_dir is None and MOUNTED_PREDICT.is_dir():
            arguments.predict_dir = MOUNTED_PREDICT
        arguments.output = arguments.predict_dir or Path("/output")
    elif arguments.predict_dir is not None:
        parser.error("--output and --predict_dir exclude each other")
    return arguments


def _seconds(text: str) -> float:
    """A positive number of seconds."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value
