"""The command line, and what its ``--help`` teaches."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from pathlib import Path

from ichseg import __version__

MOUNTED_INPUT = Path("/input")  # there in a container
MOUNTED_PREDICT = Path("/predict")  # there only when INSTANCE 2022's command mounts it
_GPUS = ("auto", "cuda")  # devices that may be one
DESCRIPTION = """\
Segment intracranial haemorrhage on non-contrast head CT.

Reads one scan or a folder of scans (.mha, .mhd, .nrrd, .nii, .nii.gz, or DICOM slices: a folder of
them for each scan), or Grand Challenge's input layout. Writes a mask for each scan, and
results.json. For research, not for diagnosis.
"""
EXAMPLES = """\
examples:
  a folder of scans, quickly, with a picture of each:
    {command} --input scans --output out --preset fast --report
  the same after an interruption; what is finished stays as it is:
    {command} --input scans --output out --preset fast --report --resume
  ten thousand scans on two GPUs of this machine:
    {command} --input scans --output out --gpus 0,1 --resume
  and on all machines of a Ray cluster that this one belongs to:
    {command} --input scans --output out --ray auto --resume
  how much the bleeds of a patient have grown between two scans (compare-scans --help):
    {command} compare-scans monday.nii.gz tuesday.nii.gz --output follow_up
  your own weights on a GPU, within ten minutes for all scans together:
    {command} --input scans --output out --weights bundle --device cuda --time-budget 10m
  one scan, and the probability of a bleed in each voxel:
    {command} --input scan.nii.gz --output out --probabilities

Each mask has its scan's name, format and geometry: 0 background, 1 and up the bundle's labels.
That of an .mhd is an .mha, that of a DICOM study NAME_straight.mha.
results.json says for each scan the volume in mL, a table of lesions, warnings, what ran and how
long it took. A scan that cannot be segmented gets no mask and does not stop the others; then the
exit status is 1 and the last line on stderr says why. Whatever else lies in the input folder is
named at the start, with the reason why it is no scan; volumes in folders of it are looked for with
--recursive.
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; what makes no sense ends the process with status 2.

    Every default suits the Grand Challenge platform.

    Args:
        argv: The arguments; those of the process by default.
    """
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.api not in ("exec", "invoke"):  # argparse does not look at a default
        parser.error(f"ICHSEG_API is {arguments.api!r}, expected exec or invoke")
    on_cpu = arguments.gpus is not None and arguments.device not in _GPUS
    for flag, chosen in (("--gpus", arguments.gpus), ("--ray", arguments.ray)):
        for word, given in (
            ("--time-budget", arguments.time_budget is not None),
            ("--api invoke", arguments.api == "invoke"),
            (f"--device {arguments.device}", on_cpu),
            ("--ray", flag == "--gpus" and arguments.ray is not None),
        ):
            if chosen is not None and given:
                parser.error(f"{flag} and {word} exclude each other")
    if arguments.ray_cpus is not None and arguments.ray is None:
        parser.error("--ray-cpus is of no use without --ray")
    if arguments.output is None:
        if arguments.predict_dir is None and MOUNTED_PREDICT.is_dir():
            arguments.predict_dir = MOUNTED_PREDICT
        arguments.output = arguments.predict_dir or Path("/output")
    elif arguments.predict_dir is not None:
        parser.error("--output and --predict_dir exclude each other")
    if arguments.ray is not None:  # nodes are in other folders
        for name in ("input", "output", "predict_dir"):
            if (path := getattr(arguments, name)) is not None:
                setattr(arguments, name, path.absolute())
    return arguments


def usage() -> str:
    """What ``--help`` shows."""
    return make_parser().format_help()


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    name = Path(sys.argv[0]).name
    parser = argparse.ArgumentParser(
        prog=name,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES.format(command=f"python {name}" if name.endswith(".py") else name),
    )
    parser.add_argument("--version", action="version", version=f"ichseg {__version__}")
    _add_places(parser.add_argument_group("what is read and written"))
    _add_choices(parser.add_argument_group("what runs"))
    _add_platform(parser.add_argument_group("as a container"))
    return parser


def _add_places(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--input",
        "--input_dir",
        type=path_of,
        default=MOUNTED_INPUT,
        help="folder with the scans, or one scan (default /input)",
    )
    group.add_argument(
        "--recursive",
        action="store_true",
        help="also take volumes in folders of the input folder; their masks lie in folders of the "
        "same names in the output folder",
    )
    group.add_argument(
        "--follow-links",
        action="store_true",
        help="also take scans to which links lead out of the input folder; without this they fail",
    )
    group.add_argument(
        "--output", type=path_of, help="folder for masks and results.json (default /output)"
    )
    group.add_argument(
        "--report",
        action="store_true",
        help="also make a picture of each scan with its mask, and a page of all of them to open in "
        "a browser, report/index.html",
    )
    group.add_argument(
        "--probabilities",
        nargs="?",
        const="uint8",
        choices=["uint8", "float16", "nnunet"],
        help="also write the probabilities of each label beside each mask, in the scan's grid: "
        "uint8 (default) in steps of 1/255 or float16, both as SCAN_probability.nii.gz of 0 to 1; "
        "nnunet: SCAN.npz and SCAN.pkl, which nnUNetv2_ensemble reads",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with an earlier run: leave scans alone whose mask is unaltered, and was made "
        "of a scan of this size, date and content (of which pieces are looked at) by this version, "
        "with these weights, engine, precision, preset, threshold and time budget",
    )


def _add_choices(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--preset",
        choices=["full", "balanced", "fast"],
        default="full",
        help="full: all folds, each with all mirrorings; balanced: all folds; fast: one fold "
        "(default full)",
    )
    group.add_argument(
        "--weights",
        type=path_of,
        help="folder of a weights bundle (default /opt/ml/model if it holds one, else the weights "
        "that come with this program)",
    )
    group.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda", "torch-cpu"],
        default="auto",
        help="auto takes a GPU if one works, else the CPU (OpenVINO); torch-cpu is the reference, "
        "several times slower (default auto)",
    )
    group.add_argument(
        "--precision",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="in which convolutions are computed; auto takes float16 on a GPU, and on a CPU "
        "bfloat16 if the processor computes it itself, which is about twice as fast, else float32 "
        "(default auto)",
    )
    group.add_argument(
        "--gpus",
        metavar="N,N,...",
        help="spread the scans over these GPUs of this machine, a process each",
    )
    group.add_argument(
        "--ray",
        metavar="HOST:PORT|auto",
        help="spread the scans over a Ray cluster, a worker for each of its GPUs, or where there "
        "are none for each share of its cores; auto is the cluster of this machine. All nodes have "
        "to see the same files (docs/cluster.md)",
    )
    group.add_argument(
        "--ray-cpus",
        type=_count,
        metavar="N",
        help="cores of each of these workers, which computes with so many threads (default 4, or "
        "fewer where a node has fewer)",
    )
    group.add_argument(
        "--threshold",
        type=_probability,
        metavar="P",
        help="mark a voxel where the probability of a bleed is above this, 0.01 to 0.99 (default: "
        "its likeliest label counts, which for one label is 0.5)",
    )
    group.add_argument(
        "--time-budget",
        type=_seconds,
        metavar="TIME",
        help="seconds, or such as 90s, 5m or 1h30m, for the whole run, since the platform's limit "
        "is on a job: folds first, then mirrorings, as many as fit; what is left is shared evenly "
        "by the scans that are left; a scan for which not even one fold fits fails at once and "
        "says what it needs (default: none; masks then are the same run after run)",
    )


def _add_platform(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--api",
        choices=["exec", "invoke"],
        default=os.environ.get("ICHSEG_API") or "exec",
        help="exec: one run; invoke: Grand Challenge's server, on port 4743, a run for each POST "
        "(default exec, or what the image was built for)",
    )
    group.add_argument(
        "--input-slug",
        metavar="SLUG",
        help="Grand Challenge's socket of the scan (default: what the weights were made for)",
    )
    group.add_argument(
        "--output-slug",
        metavar="SLUG",
        help="Grand Challenge's socket of the mask (default: what the weights were made for)",
    )
    group.add_argument(
        "--predict_dir",
        type=path_of,
        help="INSTANCE 2022's batch: each .nii.gz of the input folder gets a mask of the same name "
        "here, and there is no results.json (default /predict if there is one and no --output)",
    )


def path_of(text: str) -> Path:
    """A path; an empty one, such as of a variable that is not set, would be this folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name, expected a path; . is this folder")
    return Path(text)


def _probability(text: str) -> float:
    """A threshold of probabilities."""
    value = float(text)
    if not 0.01 <= value <= 0.99:
        raise argparse.ArgumentTypeError(f"{text!r}, expected 0.01 to 0.99")
    return value


def _count(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected at least 1")
    return value


def _seconds(text: str) -> float:
    """A positive time: seconds, or hours, minutes and seconds with their letters."""
    found = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?", text.strip().lower())
    if found is None or not any(found.groups()):
        raise argparse.ArgumentTypeError(f"{text!r}, expected such as 600, 90s, 5m or 1h30m")
    try:
        hours, minutes, seconds = (float(part or 0) for part in found.groups())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} holds what is no number") from None
    value = 3600 * hours + 60 * minutes + seconds
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a time above 0")
    return value
