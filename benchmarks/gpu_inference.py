"""Inference on one GPU, against nnunetv2: five folds, eight mirrorings, one case; ``gpu.py`` calls.

The plan is the one that was made for the training (16x320x320), the networks' weights are random,
the scan holds no air: 27 tiles, 1080 forward passes. Commands run in pairs, the start of Python
included. Then our library runs on the same case in this process, warmed up once, for the share of
the card's fp16 peak and the peak of its memory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from benchmarks import inference, inference_data
from benchmarks.inference import Bench, Run
from benchmarks.inference_data import ROOT, Cases
from benchmarks.rows import Row, faster
from ichseg.model import bundle, plans, strict_json
from ichseg.model.bundle import Model
from ichseg.model.network import build_network
from ichseg.model.plans import Plans
from ichseg.predict import sliding_window
from ichseg.predict.ensemble import Ensemble
from ichseg.scan import volume

CONFIGURATION = "3d_fullres"
SHAPE = (28, 512, 512)
FOLDS, MIRRORINGS = 5, 8
LEAST_SPEEDUP = 2.0


def compare(
    folder: Path,
    trained_for: Path,
    rival: Path | None,
    *,
    device: str,
    peak_tflops: float | None,
    tiny: bool,
    repeats: int,
) -> list[Row]:
    """Measure both command lines, then ours in memory.

    Args:
        folder: The folder for all that is made; it is made anew.
        trained_for: The plans that the training was measured with.
        rival: The Python of nnunetv2's environment; without it plain torch stands in.
        device: The device of both sides.
        peak_tflops: The card's peak rate in fp16, dense.
        tiny: Whether to take two folds on a small scan.
        repeats: How often the pair of commands is run.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    planned = _plans(trained_for)
    plans_file = folder / "planned.json"
    plans_file.write_text(strict_json.dumps(planned))
    shape, folds = ((40, 96, 96), 2) if tiny else (SHAPE, FOLDS)
    cases = inference_data.make_cases(folder, shape, 1)
    configuration = planned.configuration(CONFIGURATION)
    tiles = sliding_window.cover(shape, configuration.tile)
    passes = len(tiles.corners()) * folds * MIRRORINGS
    name = f"{folds} folds, {MIRRORINGS} mirrorings, {len(tiles.corners())} tiles"
    if rival:
        bench = Bench(folder, rival, repeats, device)
        network = inference_data.make_network(folder, CONFIGURATION, folds, rival, plans_file)
        weights = network.weights
        runs = inference.compare_runs(bench, network, cases, "full", passes)
    else:
        weights = folder / "weights"
        draw_bundle(weights, planned, folds)
        runs = _compare_plain(folder, cases, weights, passes, device=device, repeats=repeats)
    took = [sorted(run.seconds for run in side)[len(side) // 2] for side in runs]
    rows = [faster(f"{name}, end to end", took[0], took[1], "s", LEAST_SPEEDUP)]
    return rows + _in_memory(weights, cases, passes, planned, device, peak_tflops)


def draw_bundle(folder: Path, planned: Plans, folds: int) -> None:
    """Write a bundle of networks with random weights."""
    architecture = planned.configuration(CONFIGURATION).architecture
    members = []
    for fold in range(folds):
        torch.manual_seed(fold)
        state = build_network(architecture, len(planned.channels), planned.scores).state_dict()
        members.append(bundle.save_member(folder, CONFIGURATION, str(fold), state, dtype="f4"))
    bundle.save_model(
        folder,
        Model(
            schema_version=1, name="random", version="0", description="untrained",
            input_slug="head-ct", output_slug="bleed", average="logits", mirror_axes=(0, 1, 2),
            plans=planned, members=tuple(members), provenance={},
        ),
    )  # fmt: skip


def _plans(trained_for: Path) -> Plans:
    """The plans with the scans' orientation and exact spacing: nothing is resampled."""
    planned = plans.load(trained_for)
    configuration = planned.configuration(CONFIGURATION)
    return dataclasses.replace(
        planned,
        orientation="as_stored",
        configurations=(dataclasses.replace(configuration, spacing_mm=inference_data.SPACING_MM),),
    )


def _compare_plain(
    folder: Path, cases: Cases, weights: Path, passes: int, *, device: str, repeats: int
) -> tuple[list[Run], list[Run]]:
    """Time our command, and ``gpu_plain_predict.py`` with the same weights."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ours = [
        sys.executable, ROOT / "benchmarks" / "inference_ours.py", "predict", "--input", cases.ours,
        "--output", folder / "masks", "--weights", weights, "--device", device, "--preset", "full",
    ]  # fmt: skip
    (name,) = cases.names
    theirs = [
        sys.executable, ROOT / "benchmarks" / "gpu_plain_predict.py", weights,
        cases.ours / f"{name}.nii.gz", folder / "plain.nii.gz", "--device", device,
    ]  # fmt: skip
    pairs = inference.in_pairs(
        lambda: inference.run_command(ours, environment),
        lambda: inference.run_command(theirs, environment),
        repeats,
    )
    for run in (*pairs[0], *pairs[1]):
        if run.said["passes"] != passes:
            raise SystemExit(f"error: {run.said['passes']} forward passes, expected {passes}")
    found = volume.read(folder / "masks" / f"{name}.nii.gz").voxels
    expected = volume.read(folder / "plain.nii.gz").voxels
    print(
        f"  foreground {expected.mean():.1%}, labels differ in {(found != expected).mean():.3%} "
        "of voxels", flush=True,
    )  # fmt: skip
    return pairs


def _in_memory(
    weights: Path, cases: Cases, passes: int, planned: Plans, device: str, peak_tflops: float | None
) -> list[Row]:
    ensemble = Ensemble.load(weights, device)
    scan = volume.read(cases.ours / f"{cases.names[0]}.nii.gz")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        found = ensemble.segment(scan, "full")
        seconds.append(time.perf_counter() - began)
    print(f"  in memory {json.dumps(dict(found.seconds))}", flush=True)
    rows = [Row("  in memory, the second time", seconds[1], None, "s", None, None, None)]
    configuration = planned.configuration(CONFIGURATION)
    cost = inference_data.gflop(configuration, len(planned.channels), 2) / 1000
    rate = passes * cost / seconds[1]
    rows.append(Row("  rate of the whole", rate, None, "TFLOP/s", None, None, None))
    if peak_tflops:
        rows.append(
            Row("  share of the fp16 peak", 100 * rate / peak_tflops, None, "%", None, None, None)
        )
    if device == "cuda":
        peak_gb = torch.cuda.max_memory_allocated() / 1e9
        rows.append(Row("  peak CUDA memory", peak_gb, None, "GB", None, None, None))
    return rows
