"""The command line of ``compare-scans``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ichseg.app.arguments import path_of

NAME = "compare-scans"
DESCRIPTION = """\
Compare two head CT scans of one patient.

Segments both, brings the second onto the first by a rotation and a shift, and says how much the
bleeds have grown: in all, and lesion by lesion. Writes follow_up.json, both masks, the second scan
and its mask in the grid of the first, and a page with both scans side by side. For research, not
for diagnosis.
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse what stands after the command's name; what makes no sense ends the process.

    Args:
        argv: The arguments after ``compare-scans``.
    """
    return make_parser().parse_args(argv)


def make_parser() -> argparse.ArgumentParser:
    """The parser of these arguments."""
    parser = argparse.ArgumentParser(
        prog=f"{Path(sys.argv[0]).name} {NAME}",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=path_of, help="the first scan: a file or a folder of slices")
    parser.add_argument("after", type=path_of, help="the second scan of the same patient")
    parser.add_argument(
        "--output",
        type=path_of,
        default=Path("follow_up"),
        help="folder for what is found (default follow_up)",
    )
    parser.add_argument(
        "--masks",
        type=path_of,
        nargs=2,
        metavar=("BEFORE", "AFTER"),
        help="masks of both scans, in their grids (default: both scans are segmented)",
    )
    parser.add_argument(
        "--preset",
        choices=["full", "balanced", "fast"],
        default="full",
        help="how thoroughly they are segmented (default full)",
    )
    parser.add_argument(
        "--weights",
        type=path_of,
        help="folder of a weights bundle (default /opt/ml/model if it holds one, else the weights "
        "that come with this program)",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda", "torch-cpu"],
        default="auto",
        help="what runs the networks (default auto)",
    )
    return parser
