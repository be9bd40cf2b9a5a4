"""Inference, ours against nnunetv2 2.8.1: the same weights, tiles and mirrorings, on this CPU.

    PYTHONPATH=. .venv/bin/python benchmarks/inference.py [--row NAME ...] [--rival-env FOLDER]

The networks are those of ``benchmarks/plans/compact.json``, with weights that the rival draws at
random and saves in its own format; ``training import-nnunet`` reads them. Commands run in pairs,
ours and the rival's in turn, and count as a user waits for them: the start of Python included.
Seconds in the network's forward are taken inside the same runs. Medians.
"""

from __future__ import annotations

import argparse
import functools
import json
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
from typing import Any

import numpy as np

from benchmarks import inference_data, rivals
from benchmarks.inference_data import COMPACT, ROOT, Cases, Network
from benchmarks.rows import Row, at_most, faster, report, smaller
from ichseg.engine import machine, openvino_engine, openvino_graph
from ichseg.engine.choose import choose_engine
from ichseg.engine.engine import NetworkSpec
from ichseg.model import plans
from ichseg.scan import volume
from ichseg.scan.volume import Volume

# What the last row restores, see benchmarks/preprocessing.py: its large volume and grid.
LARGE_SHAPE, LARGE_MM = (400, 512, 512), (0.8, 0.8, 0.8)
LARGE_GRID, LARGE_GRID_MM = (356, 546, 546), (0.9, 0.75, 0.75)
FLOAT32 = "float32"
# How many times as fast as nnunetv2 whole runs have to be.
BARS = {
    "case": {"bfloat16": 5.0, FLOAT32: 3.3},
    "mirrors": {"bfloat16": 4.0, FLOAT32: 2.5},
    "folder": {"bfloat16": 4.5, FLOAT32: 2.8},
}
SCANS = 20
FORWARD_BARS = {"bfloat16": 0.8, FLOAT32: 0.85}
MATRIX = 3072  # rows and columns of the product that the forward pass is measured against


@dataclass(frozen=True, slots=True)
class Bench:
    """What every row needs.

    Attributes:
        folder: The folder for all that is written.
        rival_python: The Python of the rival's environment.
        repeats: How often each pair is run.
        device: The device of both sides.
    """

    folder: Path
    rival_python: Path
    repeats: int
    device: str = "cpu"

    def rival_environment(self, results: Path) -> dict[str, str]:
        """The variables by which the rival finds its models."""
        found = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        for name in ("raw", "preprocessed"):
            found[f"nnUNet_{name}"] = str(self.folder)
        return found | {"nnUNet_results": str(results)}


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a command.

    Attributes:
        seconds: The seconds until the command ended.
        said: What its last line says, which is JSON.
    """

    seconds: float
    said: dict[str, float]


def main() -> int:
    """Print one table and one line of JSON; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME",
                        help=f"only these of {', '.join(ROWS)}")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=1, help="of each pair [%(default)s]")
    rivals.add_arguments(parser)
    args = parser.parse_args()
    python = rivals.python_of(args.rival_env)
    say_what_a_tile_costs()
    rows: list[Row] = []
    for name in args.row:
        began = os.getloadavg()[0]
        with tempfile.TemporaryDirectory(prefix="bench-inference-") as scratch:
            rows += ROWS[name](Bench(Path(scratch), python, args.repeats))
        print(f"{name}: load {began:.1f} before, {os.getloadavg()[0]:.1f} after", flush=True)
    print(f"\n{choose_engine('cpu').name}; {args.repeats} pair(s) of each command")
    return report("inference", rows)


def say_what_a_tile_costs() -> None:
    """Print one line for each network."""
    planned = plans.load(COMPACT)
    for configuration in planned.configurations:
        cost = inference_data.gflop(configuration, 1, planned.scores)
        size = "x".join(map(str, configuration.patch))
        print(f"network {configuration.name}: tile {size}, {cost:.1f} GFLOP", flush=True)


def compare_one_case(bench: Bench) -> list[Row]:
    """Compare one fold, no mirrorings, 75 tiles; and what of it was not the network's forward."""
    network = inference_data.make_network(bench.folder, "3d_fullres", 1, bench.rival_python)
    cases = inference_data.make_cases(bench.folder, (28, 512, 512), 1)
    ours, theirs = compare_runs(bench, network, cases, "fast", 75)
    rows = whole_runs("one case, 75 tiles, end to end", ours, theirs, BARS["case"])
    outside = [
        statistics.median(run.seconds - run.said["forward"] for run in runs)
        for runs in (ours[FLOAT32], theirs)
    ]
    return [*rows, faster("  outside the network's forward", *outside, "s", 10)]


def compare_mirrors(bench: Bench) -> list[Row]:
    """Compare two folds, 8 mirrorings, 4 tiles."""
    network = inference_data.make_network(bench.folder, "3d_fullres", 2, bench.rival_python)
    cases = inference_data.make_cases(bench.folder, (16, 288, 288), 1)
    ours, theirs = compare_runs(bench, network, cases, "full", 64)
    return whole_runs("2 folds, 8 mirrorings, 4 tiles", ours, theirs, BARS["mirrors"])


def compare_folder(bench: Bench) -> list[Row]:
    """Compare five cases of 8 slices in one call, by nnU-Net's 2D network."""
    network = inference_data.make_network(bench.folder, "2d", 1, bench.rival_python)
    cases = inference_data.make_cases(bench.folder, (8, 512, 512), 5)
    ours, theirs = compare_runs(bench, network, cases, "fast", 40)
    return whole_runs("five cases of 8 slices, 2D network", ours, theirs, BARS["folder"])


def whole_runs(
    name: str, ours: dict[str, list[Run]], theirs: list[Run], bars: dict[str, float]
) -> list[Row]:
    """Rows of whole runs in each precision, and of the most memory that one took."""
    rows = []
    for precision, runs in ours.items():
        said = f"{name}, {precision}"
        rows.append(faster(said, *_medians(runs, theirs), "s", bars[precision]))
    for precision, runs in ours.items():
        peaks = [_of(of, "peak_mb") for of in (runs, theirs)]
        rows.append(smaller(f"  peak memory, {precision}", *peaks, "MB", None))
    return rows


def precisions() -> list[str]:
    """float32, and before it bfloat16 where ``auto`` takes that on this processor."""
    return list(dict.fromkeys([choose_engine("cpu").precision, FLOAT32]))


def compare_runs(
    bench: Bench, network: Network, cases: Cases, preset: str, passes: int
) -> tuple[dict[str, list[Run]], list[Run]]:
    """Run both command lines on the same cases; both have to make so many forward passes.

    Ours runs in each precision.
    """
    masks, rival_masks = bench.folder / "masks", bench.folder / "rival-masks"
    command = [
        sys.executable, ROOT / "benchmarks" / "inference_ours.py", "predict",
        "--input", cases.ours, "--output", masks, "--weights", network.weights,
        "--device", bench.device, "--preset", preset,
    ]  # fmt: skip
    folds = [path.name.removeprefix("fold_") for path in network.results.rglob("fold_*")]
    rival_command = [
        bench.rival_python, ROOT / "benchmarks" / "nnunetv2_predict.py", "predict",
        "-i", cases.rival, "-o", rival_masks, "-d", inference_data.DATASET,
        "-c", network.configuration.name, "-f", *sorted(folds), "-device", bench.device,
        *([] if preset == "full" else ["--disable_tta"]),
    ]  # fmt: skip

    def ours(precision: str) -> Run:
        own = [*command, *(["--precision", precision] if bench.device == "cpu" else [])]
        return run_command(own, {**os.environ, "PYTHONPATH": str(ROOT)})

    def rival() -> Run:
        return run_command(rival_command, bench.rival_environment(network.results))

    own, theirs = precisions(), []
    runs: dict[str, list[Run]] = {precision: [] for precision in own}
    for repeat in range(bench.repeats):
        sides = [*own, None] if repeat % 2 == 0 else [None, *own]
        for side in sides:
            run = ours(side) if side else rival()
            (runs[side] if side else theirs).append(run)
            print(f"  {side or 'rival'} {run}", flush=True)
            if run.said["passes"] != passes:
                raise SystemExit(f"error: {run.said['passes']} forward passes, expected {passes}")
    for name in cases.names:
        found, expected = (
            volume.read(folder / f"{name}.nii.gz").voxels for folder in (masks, rival_masks)
        )
        print(
            f"  {name}: foreground {expected.mean():.1%}, labels differ in "
            f"{(found != expected).mean():.3%} of voxels", flush=True,
        )  # fmt: skip
    return runs, theirs


def compare_restore(bench: Bench) -> list[Row]:
    """Compare restoring and writing a mask of 512x512x400 from logits of another grid."""
    planned = plans.load(COMPACT)
    paths = {name: bench.folder / name for name in ("scores.npy", "plans.json", "dataset.json")}
    np.save(paths["scores.npy"], inference_data.make_scores(LARGE_GRID))
    paths["plans.json"].write_text(json.dumps(inference_data.rival_plans(planned)))
    labels = {"background": 0, "hemorrhage": 1}
    paths["dataset.json"].write_text(
        json.dumps({"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"})
    )
    header = bench.folder / "header.nii.gz"
    volume.write(Volume(np.zeros(LARGE_SHAPE, np.uint8), LARGE_MM), header)
    request = {
        "scores": paths["scores.npy"], "plans": paths["plans.json"],
        "dataset": paths["dataset.json"], "ours": COMPACT, "header": header,
        "shape": LARGE_SHAPE, "spacing_mm": LARGE_MM,
        "grid_shape": LARGE_GRID, "grid_mm": LARGE_GRID_MM,
    }  # fmt: skip
    runs = []
    for python, script, environment in (
        (sys.executable, "inference_ours.py", {**os.environ, "PYTHONPATH": str(ROOT)}),
        (bench.rival_python, "nnunetv2_predict.py", bench.rival_environment(bench.folder)),
    ):
        own = bench.folder / f"{script}.json"
        own.write_text(json.dumps({**request, "output": bench.folder / script}, default=str))
        command = [python, ROOT / "benchmarks" / script, "restore", own]
        runs.append(lambda c=command, e=environment: run_command(c, e))
    ours, theirs = in_pairs(runs[0], runs[1], max(bench.repeats, 2))
    found, expected = (
        volume.read(bench.folder / f"{script}.nii.gz").voxels
        for script in ("inference_ours.py", "nnunetv2_predict.py")
    )
    print(f"  labels differ in {int((found != expected).sum())} of {found.size} voxels")
    name = f"restoring and writing {'x'.join(map(str, LARGE_SHAPE))}"
    return [
        faster(name, *(_of(runs, "seconds") for runs in (ours, theirs)), "s", 10),
        smaller("  peak memory", *(_of(runs, "peak_mb") for runs in (ours, theirs)), "MB", 0.4),
    ]


def measure_forward(bench: Bench) -> list[Row]:
    """Measure the forward pass in each precision beside a product of two large matrices in it."""
    del bench
    planned = plans.load(COMPACT)
    configuration = planned.configuration("3d_fullres")
    cost = inference_data.gflop(configuration, 1, planned.scores)
    spec = NetworkSpec(configuration.architecture, 1, planned.scores, configuration.tile, "logits")
    random = np.random.default_rng(0)
    state = draw_state(spec, random)
    tile = random.normal(size=(1, *configuration.tile)).astype(np.float32)
    square = [random.normal(size=(MATRIX, MATRIX)).astype(np.float32) for _ in range(2)]
    rows = []
    for precision in precisions():
        network = choose_engine("cpu", precision).load(spec, state)
        product = openvino_product(square[1], precision)
        ways: dict[str, tuple[Callable[[], object], float]] = {
            "forward": (functools.partial(_drain, network, tile), cost),
            "product by OpenVINO": (functools.partial(product, square[0]), 2 * MATRIX**3 / 1e9),
        }
        if precision == FLOAT32:
            ways["product by numpy"] = (lambda: square[0] @ square[1], 2 * MATRIX**3 / 1e9)
        rates = np.zeros((len(ways), 20))
        for turn in range(rates.shape[1]):
            for way, (call, gflop) in enumerate(ways.values()):
                began = time.perf_counter()
                call()
                rates[way, turn] = gflop / (time.perf_counter() - began)
        rates = rates[:, 3:]  # the first calls warm up
        for name, values in zip(ways, rates, strict=True):
            print(f"  {precision} {name}: {np.median(values):.0f} GFLOP/s", flush=True)
        best = rates[1:][np.median(rates[1:], 1).argmax()]
        share = float(np.median(rates[0] / best))  # turn by turn: the machine may be shared
        bar = FORWARD_BARS[precision]
        name = f"forward in {precision}, share of a matrix product's rate"
        rows.append(Row(name, share, None, "", None, bar, share >= bar))
    return rows


def _drain(network: Any, tile: np.ndarray) -> None:
    """Run one tile through the network."""
    for _ in network([tile]):
        pass


def draw_state(spec: NetworkSpec, random: np.random.Generator) -> dict[str, Any]:
    """Draw the network's tensors at random."""
    from ichseg.model.network import build_network

    network = build_network(spec.architecture, spec.input_channels, spec.scores)
    return {
        name: random.normal(scale=max(1, tensor[0].numel()) ** -0.5, size=tensor.shape).astype("f4")
        for name, tensor in network.state_dict().items()
    }


def openvino_product(right: np.ndarray, precision: str) -> Callable[[np.ndarray], object]:
    """Make the product with a matrix, by the library and with the settings that run the network.

    In bfloat16 the left matrix is rounded on its way in, as a tile's features are.
    """
    openvino: Any = openvino_graph.import_openvino()
    op = openvino.opset13
    left = op.parameter(list(right.shape), np.float32)
    factors = [left, op.constant(right)]
    if precision != FLOAT32:
        factors = [op.convert(factor, "bf16") for factor in factors]
    product = op.convert(op.matmul(*factors, False, False), "f32")
    model = openvino.Model([product], [left], "product")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": machine.cpu_threads()}
    request = openvino_engine._core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda value: request.infer([value], share_inputs=True, share_outputs=True)


def measure_scans(bench: Bench) -> list[Row]:
    """Time twenty scans in a folder beside one alone, by the default weights."""
    scan = ROOT / "test" / "sample" / "input" / "ge_intraparenchymal.mha"

    def segmenting(count: int) -> Callable[[], Run]:
        given, out = bench.folder / f"scans-{count}", bench.folder / f"masks-{count}"
        given.mkdir()
        for number in range(count):
            shutil.copy(scan, given / f"scan_{number:02d}.mha")
        command = [sys.executable, ROOT / "benchmarks" / "inference_ours.py", "predict",
                   "--input", given, "--output", out, "--preset", "balanced"]  # fmt: skip
        return lambda: run_command(command, {**os.environ, "PYTHONPATH": str(ROOT)})

    many, one = in_pairs(segmenting(SCANS), segmenting(1), max(bench.repeats, 3))
    many_s, one_s = _medians(many, one)
    print(f"  {SCANS} scans {many_s:.1f} s, one {one_s:.2f} s", flush=True)
    return [at_most(f"{SCANS} scans, seconds each / one alone", many_s / SCANS / one_s, "", 0.6)]


def measure_start(bench: Bench) -> list[Row]:
    """Time importing process.py, in pairs with importing torch and SimpleITK."""

    def importing(code: str) -> Callable[[], Run]:
        return lambda: run_command(
            [sys.executable, "-c", f"{code}; print('{{}}')"], dict(os.environ)
        )

    ours, other = in_pairs(
        importing("import process"), importing("import torch, SimpleITK"), max(bench.repeats, 5)
    )
    ours_s, other_s = _medians(ours, other)
    print(f"  import process {ours_s:.2f} s, import torch, SimpleITK {other_s:.2f} s")
    return [at_most("importing process.py / torch and SimpleITK", ours_s / other_s, "", 1.2)]


ROWS: dict[str, Callable[[Bench], list[Row]]] = {
    "case": compare_one_case,
    "mirrors": compare_mirrors,
    "folder": compare_folder,
    "restore": compare_restore,
    "forward": measure_forward,
    "scans": measure_scans,
    "start": measure_start,
}


def in_pairs(
    ours: Callable[[], Run], rival: Callable[[], Run], repeats: int
) -> tuple[list[Run], list[Run]]:
    """Run both in pairs; who begins changes from pair to pair."""
    runs: tuple[list[Run], list[Run]] = ([], [])
    for repeat in range(repeats):
        for side in (0, 1) if repeat % 2 == 0 else (1, 0):
            runs[side].append((ours, rival)[side]())
        print(f"  ours {runs[0][-1]}\n  rival {runs[1][-1]}", flush=True)
    return runs


def run_command(command: list[Any], environment: dict[str, str]) -> Run:
    """Run a command until it ends; its last line is JSON.

    Raises:
        SystemExit: It failed.
    """
    began = time.perf_counter()
    done = subprocess.run(
        [str(part) for part in command], env=environment, cwd=ROOT, check=False, text=True,
        capture_output=True,
    )  # fmt: skip
    took = time.perf_counter() - began
    if done.returncode != 0:
        raise SystemExit(f"error: {' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return Run(took, json.loads(done.stdout.splitlines()[-1]))


def _medians(ours: list[Run], theirs: list[Run]) -> tuple[float, float]:
    return (
        statistics.median(run.seconds for run in ours),
        statistics.median(run.seconds for run in theirs),
    )


def _of(runs: list[Run], key: str) -> float:
    return statistics.median(run.said[key] for run in runs)


if __name__ == "__main__":
    sys.exit(main())
