"""Planning and preprocessing, ours against nnunetv2 2.8.1, on the same files.

    PYTHONPATH=. .venv/bin/python benchmarks/preprocessing.py [--quick] [--rival-env FOLDER]

Ten head-CT phantoms with INSTANCE's spread of spacings are made first. Commands run in pairs, ours
and the rival's in turn, two workers each, and count as a user waits for them: the start of Python
included. Single functions run in pairs too: images on one thread, as in a worker, and logits on all
cores, as at inference. Medians. The recipe is ``nnunetv2`` and both have the same clip limits: both
do the same work, and the results are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import memory, preprocessing_data, rivals
from benchmarks.preprocessing_data import RIVAL_DATASET, Pair
from benchmarks.rows import Row, at_most, faster, report, smaller
from ichseg.model import plans
from ichseg.predict import resample
from ichseg.predict.prepare import place
from ichseg.predict.restore import restore
from ichseg.scan.volume import Volume
from training.store import chunks

ROOT = Path(__file__).resolve().parent.parent
WORKERS = "2"
LARGEST_ERROR_HU = 0.05  # that the store may make by rounding


@dataclass(frozen=True, slots=True)
class Sides:
    """How to call both.

    Attributes:
        pair: The dataset, laid out for each side.
        rival_python: The Python of the rival's environment.
        rival_environment: The variables of the rival's commands.
        repeats: How often each pair is run.
    """

    pair: Pair
    rival_python: Path
    rival_environment: dict[str, str]
    repeats: int

    def ours(self, *arguments: object) -> list[str]:
        """A command line of ours."""
        return [sys.executable, "-m", "training", *map(str, arguments)]

    def rival(self, script: str, *arguments: object) -> list[str]:
        """A command line of the rival's."""
        folder = self.rival_python.parent
        return [str(self.rival_python), str(folder / script), *map(str, arguments)]

    def call_ours(self, *arguments: object) -> float:
        """Run a command; the seconds that it took."""
        return _seconds(self.ours(*arguments), os.environ)

    def call_rival(self, script: str, *arguments: object) -> float:
        """Run a command; the seconds that it took."""
        return _seconds(self.rival(script, *arguments), self.rival_environment)


def main() -> int:
    """Print one table and one line of JSON; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="each pair once, no large volume")
    parser.add_argument("--repeats", type=int, default=3, help="of each pair [%(default)s]")
    rivals.add_arguments(parser)
    args = parser.parse_args()
    python = rivals.python_of(args.rival_env)
    with tempfile.TemporaryDirectory(prefix="bench-preprocessing-") as scratch:
        pair = preprocessing_data.make_phantoms(Path(scratch) / "phantoms")
        sides = Sides(pair, python, pair.rival_environment(), 1 if args.quick else args.repeats)
        rows = [
            compare_fingerprint(sides),
            *compare_preprocessing(sides),
            *compare_functions(sides, Path(scratch)),
        ]
        if not args.quick:
            rows += compare_memory(sides, Path(scratch) / "large")
    print(
        f"\n{_processor()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"load {os.getloadavg()[0]:.1f}; {sides.repeats} pairs of each command"
    )
    return report("preprocessing", rows)


def compare_fingerprint(sides: Sides) -> Row:
    """Compare the fingerprint, each time in a workspace that knows nothing yet."""

    def ours() -> float:
        sides.pair.convert()
        return sides.call_ours("fingerprint", "--workspace", sides.pair.workspace,
                               "--workers", WORKERS)  # fmt: skip

    def rival() -> float:
        return sides.call_rival("nnUNetv2_extract_fingerprint", "-d", RIVAL_DATASET,
                                "-np", WORKERS, "--clean", "--no_pbar")  # fmt: skip

    return faster("fingerprint", *_in_pairs("fingerprint", ours, rival, sides.repeats), "s", 5)


def compare_preprocessing(sides: Sides) -> list[Row]:
    """Compare preprocessing of all cases: time, size on disk, and whether results are the same."""
    pair = sides.pair
    sides.call_ours("plan", "--workspace", pair.workspace, "--recipe", "nnunetv2")
    sides.call_rival("nnUNetv2_plan_experiment", "-d", RIVAL_DATASET)
    pair.share_intensities()

    def ours() -> float:
        shutil.rmtree(pair.workspace / "preprocessed", ignore_errors=True)
        return sides.call_ours("preprocess", "3d_fullres", "--workspace", pair.workspace,
                               "--workers", WORKERS)  # fmt: skip

    def rival() -> float:
        shutil.rmtree(pair.rival_store, ignore_errors=True)
        return sides.call_rival("nnUNetv2_preprocess", "-d", RIVAL_DATASET, "-c", "3d_fullres",
                                "-np", WORKERS, "--no_pbar")  # fmt: skip

    times = _in_pairs("preprocess 3d_fullres", ours, rival, sides.repeats)
    return [
        faster("preprocess 3d_fullres", *times, "s", 6),
        smaller("store on disk", _megabytes(pair.store), _megabytes(pair.rival_store), "MB", 0.6),
        *compare_results(sides),
    ]


def compare_results(sides: Sides) -> list[Row]:
    """Compare the stored images and labels of all cases; they differ by rounding.

    Beside it the size of the images, the rival's and what a better codec makes of the same values.
    """
    pair = sides.pair
    normalisation = plans.load(pair.workspace / "plans.json").normalisations[0]
    worst, differing, voxels, sizes = 0.0, 0, 0, np.zeros(2)
    with rivals.Steps(sides.rival_python, sides.rival_environment) as steps:
        for name in chunks.list_cases(pair.store):
            output = pair.folder / "stored.npy"
            steps.seconds("stored", output, folder=pair.rival_store, case=name)
            image, labels = np.load(output)
            case = chunks.open_case(pair.store, name)
            difference = np.abs(np.asarray(case.data[0], np.float32) - image)
            worst = max(worst, float(difference.max()) * normalisation.deviation)
            differing += int((np.maximum(case.target[:], 0) != np.maximum(labels, 0)).sum())
            voxels += labels.size
            steps.seconds("lossless", output, folder=pair.rival_store, case=name)
            sizes += np.load(output) / 1e6
    print(f"labels differ in {differing} of {voxels} voxels", flush=True)
    return [
        smaller("images alone, float32, lossless (zstd)", sizes[1], sizes[0], "MB", None),
        at_most("largest difference of the stored images", worst, "HU", LARGEST_ERROR_HU),
    ]


def compare_functions(sides: Sides, scratch: Path) -> list[Row]:
    """Compare resampling of one image, and of two-channel logits back to the input's grid."""
    random = np.random.default_rng(1)
    image = random.normal(size=(28, 512, 512)).astype(np.float32)
    logits = random.normal(size=(2, 28, 549, 549)).astype(np.float32)
    thicker = random.normal(size=(2, 32, 549, 549)).astype(np.float32)
    repeats = max(3, sides.repeats)
    with rivals.Steps(sides.rival_python, sides.rival_environment) as steps:
        rows = [
            _compare_spline(steps, scratch, image, (28, 549, 549), (5.0, 0.45, 0.45), 5, repeats),
            _compare_spline(steps, scratch, image, (32, 549, 549), (4.4, 0.45, 0.45), 10, repeats),
            _compare_logits(sides, steps, scratch, logits, (5.0, 0.45, 0.45), repeats),
            _compare_logits(sides, steps, scratch, thicker, (4.4, 0.45, 0.45), repeats),
        ]
    return rows


def _compare_spline(
    steps: rivals.Steps,
    scratch: Path,
    image: npt.NDArray[np.float32],
    shape: tuple[int, int, int],
    target_mm: tuple[float, float, float],
    bar: float,
    repeats: int,
) -> Row:
    found = {}
    np.save(scratch / "image.npy", image)
    torch.set_num_threads(1)  # skimage, which the rival calls, uses no more

    def ours() -> float:
        began = time.perf_counter()
        found["ours"] = np.empty(tuple(shape), np.float32)
        resample.resize(image, found["ours"], order=3, separate_axis=0)
        return time.perf_counter() - began

    def rival() -> float:
        return steps.seconds(
            "resample", scratch / "resampled.npy", input=scratch / "image.npy", shape=shape,
            spacing_mm=(5.0, 0.4825, 0.4825), target_mm=target_mm,
        )  # fmt: skip

    name = f"spline {_times(image.shape)} to {_times(shape)}"
    times = _in_pairs(name, ours, rival, repeats, warm_up=True)
    difference = np.abs(found["ours"] - np.load(scratch / "resampled.npy")).max()
    print(f"{name}: largest difference {difference / np.ptp(image):.1e} of the range", flush=True)
    return faster(name, *times, "s", bar)


def _compare_logits(
    sides: Sides,
    steps: rivals.Steps,
    scratch: Path,
    logits: npt.NDArray[np.float32],
    grid_mm: tuple[float, float, float],
    repeats: int,
) -> Row:
    found = {}
    np.save(scratch / "logits.npy", logits)
    planned = plans.load(sides.pair.workspace / "plans.json")
    configuration = dataclasses.replace(planned.configuration("3d_fullres"), spacing_mm=grid_mm)
    scan = Volume(np.ones((28, 512, 512), np.int16), (5.0, 0.4825, 0.4825))
    placement = place([scan], planned, configuration)
    assert placement.grid_shape == logits.shape[1:], placement
    scores = torch.from_numpy(logits)
    torch.set_num_threads(os.cpu_count() or 1)

    def ours() -> float:
        began = time.perf_counter()
        found["ours"] = restore([(scores, placement)], planned)
        return time.perf_counter() - began

    def rival() -> float:
        return steps.seconds(
            "logits", scratch / "labels.npy", input=scratch / "logits.npy",
            shape=scan.voxels.shape, spacing_mm=grid_mm, target_mm=scan.spacing_mm,
            plans=sides.pair.rival_plans, dataset=sides.pair.rival_dataset,
            threads=torch.get_num_threads(),
        )  # fmt: skip

    name = f"logits {_times(logits.shape)} to {_times(scan.voxels.shape)}"
    times = _in_pairs(name, ours, rival, repeats, warm_up=True)
    differing = int((found["ours"] != np.load(scratch / "labels.npy")).sum())
    print(f"{name}: labels differ in {differing} of {scan.voxels.size} voxels", flush=True)
    return faster(name, *times, "s", 10)


def compare_memory(sides: Sides, folder: Path) -> list[Row]:
    """Compare the peak memory of the whole command for one large resampled volume."""
    pair = preprocessing_data.make_large(folder)
    sides = dataclasses.replace(sides, pair=pair, rival_environment=pair.rival_environment())
    pair.convert()
    spacing = preprocessing_data.LARGE_TARGET_MM
    sides.call_ours("plan", "--workspace", pair.workspace, "--recipe", "nnunetv2",
                    "--spacing", ",".join(map(str, spacing)))  # fmt: skip
    sides.call_rival("nnUNetv2_extract_fingerprint", "-d", RIVAL_DATASET, "-np", 1, "--no_pbar")
    sides.call_rival("nnUNetv2_plan_experiment", "-d", RIVAL_DATASET,
                     "-overwrite_target_spacing", *spacing)  # fmt: skip
    pair.share_intensities()
    command = sides.ours("preprocess", "3d_fullres", "--workspace", pair.workspace,
                         "--workers", 1)  # fmt: skip
    ours = memory.peak(command, os.environ, ROOT)
    command = sides.rival("nnUNetv2_preprocess", "-d", RIVAL_DATASET, "-c", "3d_fullres",
                          "-np", 1, "--no_pbar")  # fmt: skip
    rival = memory.peak(command, sides.rival_environment, ROOT)
    name = f"peak memory, {_times(preprocessing_data.LARGE_SHAPE)}"
    return [
        smaller(f"{name}, largest process", ours.largest_mb, rival.largest_mb, "MB", 0.5),
        smaller(f"{name}, all together", ours.together_mb, rival.together_mb, "MB", 0.5),
    ]


def _in_pairs(
    name: str,
    ours: Callable[[], float],
    rival: Callable[[], float],
    repeats: int,
    *,
    warm_up: bool = False,
) -> tuple[float, float]:
    """The medians of both; who begins changes from pair to pair."""
    if warm_up:
        ours()
        rival()
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats):
        for side in (0, 1) if repeat % 2 == 0 else (1, 0):
            times[side].append((ours, rival)[side]())
        print(f"{name}: ours {times[0][-1]:.3g} s, rival {times[1][-1]:.3g} s", flush=True)
    return statistics.median(times[0]), statistics.median(times[1])


def _seconds(command: list[str], environment: os._Environ[str] | dict[str, str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(
        command, env=environment, cwd=ROOT, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    took = time.perf_counter() - began
    if done.returncode != 0:
        raise SystemExit(f"error: {' '.join(command)}\n{done.stdout}")
    return took


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


if __name__ == "__main__":
    sys.exit(main())
