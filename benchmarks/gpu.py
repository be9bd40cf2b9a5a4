"""Training and inference on one GPU, against nnunetv2; ``gpu.sh`` calls it.

    PYTHONPATH=. python benchmarks/gpu.py --work FOLDER [--data TASK04] [--rival-env FOLDER]

1. Speed on made scans of INSTANCE's size (28 to 30 slices of 512x512, 5 mm by 0.45 mm), whose plan
   is 16x320x320, batch 2: milliseconds per iteration, share of the card's bf16 peak, data wait.
2. Inference with that plan, see ``gpu_inference.py``.
3. With ``--data``, the Decathlon's Hippocampus: its automatic plan, fold 0, as many epochs as fit
   into ``--minutes`` a side at the speed of the slower side: Dice on the held-out cases.

Without nnunetv2 ``gpu_plain.py`` and ``gpu_plain_predict.py`` stand in for it in 1 and 2, and 3 has
no rival. What is done is kept in FOLDER. ``--tiny --device cpu`` runs through all of it within
minutes, and measures nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import blocks as timing
from benchmarks import gpu_inference
from benchmarks.blocks import BlockProcess
from benchmarks.fold_pair import CONFIGURATION, HERE, SIDES, FoldPair, Settings, mean_dice
from benchmarks.rivals import DEFAULT_ENV
from benchmarks.rows import Row, faster, report
from ichseg.model import plans
from ichseg.model.network import build_network
from ichseg.scan import volume
from ichseg.scan.volume import Volume

# Dense bf16, tera operations per second, from the vendor's data sheets.
PEAK_TFLOPS = {"H200": 989.4, "H100 PCIe": 756.0, "H100": 989.4, "A100": 312.0, "L40S": 362.0}
LEAST_SPEEDUP = 1.5
LARGEST_WAIT = 5.0  # percent
INSTANCE_PLAN = ((16, 320, 320), 2)


def main() -> int:
    """Print one table and one line of JSON; 1 if a bar is missed."""
    args = _arguments()
    rival = _nnunetv2(args.rival_env)
    print(f"{_card(args.device)}, torch {torch.__version__}, {os.cpu_count()} cores")
    print(
        f"rival: nnunetv2 in {args.rival_env}" if rival else
        "rival: no nnunetv2 here; its network, loss and optimiser in plain torch under fp16 "
        "autocast, on one batch that already lies on the device (benchmarks/gpu_plain.py)"
    )  # fmt: skip
    rows = time_instance(args, rival) + time_inference(args, rival)
    if args.data:
        rows += train_hippocampus(args, rival)
    print(f"\n{_card(args.device)}; rival {'nnunetv2' if rival else 'plain torch, never waiting'}")
    return report("gpu", rows)


def time_instance(args: argparse.Namespace, rival: Path | None) -> list[Row]:
    """Measure seconds per iteration of both sides, in blocks that take turns."""
    source = args.work / "made" / "Task01_Made"
    if not (source / "dataset.json").exists():
        make_scans(source, count=6 if args.tiny else 20, size=64 if args.tiny else 512)
    settings = _settings(
        args, "Dataset001_Made", features=(4, 8, 8, 8, 8, 8) if args.tiny else None
    )
    pair = FoldPair(source, args.work / "instance", settings, rival or Path(sys.executable))
    prepare(pair, rival)
    planned = plans.load(pair.workspace(0) / "plans.json").configuration(CONFIGURATION)
    print(f"made scans: patch {planned.patch}, batch {planned.batch}")
    if not args.tiny and (planned.patch, planned.batch) != INSTANCE_PLAN:
        raise SystemExit(f"error: planned {planned.patch}, {planned.batch}, not {INSTANCE_PLAN}")
    found = take_turns(pair, rival, args)
    ours, its = (timing.median_of(found[side], "seconds") for side in SIDES)
    peak = _peak(args.device)
    waits = [timing.median_wait(found[side]) for side in SIDES]
    patch = "x".join(map(str, planned.patch))
    rows = [
        faster(f"{patch}, one iteration", 1000 * ours, 1000 * its, "ms", LEAST_SPEEDUP),
        Row("data wait", *waits, "%", None, LARGEST_WAIT, waits[0] <= LARGEST_WAIT),
    ]
    if peak:
        work = operations(pair) / 1e12
        shares = (100 * work / seconds / peak for seconds in (ours, its))
        rows.append(Row("share of the bf16 peak", *shares, "%", None, None, None))
    return rows


def time_inference(args: argparse.Namespace, rival: Path | None) -> list[Row]:
    """Measure inference with five folds, eight mirrorings and the plan of the made scans."""
    return gpu_inference.compare(
        args.work / "inference",
        args.work / "instance" / "workspace-seed0" / "plans.json",
        rival,
        device=args.device,
        peak_tflops=_peak(args.device),  # of fp16 as of bf16
        tiny=args.tiny,
        repeats=1 if args.tiny else 3,
    )


def train_hippocampus(args: argparse.Namespace, rival: Path | None) -> list[Row]:
    """Train both sides on the Hippocampus; the Dice after equally many epochs."""
    settings = _settings(
        args, "Dataset004_Hippocampus", features=(8, 16, 16, 16) if args.tiny else None
    )
    pair = FoldPair(args.data, args.work / "hippocampus", settings, rival or Path(sys.executable))
    prepare(pair, rival)
    kept = pair.folder / "timing.json"
    if not kept.exists():
        timing.save(take_turns(pair, rival, args), kept)
    found = timing.load(kept)
    seconds = {side: timing.median_of(found[side], "seconds") for side in SIDES}
    slower = max(seconds.values()) if rival else seconds["ours"]
    # an epoch has batches without an update, too, at about a third of the price
    epoch_s = slower * (settings.batches + settings.validation_batches / 3)
    epochs = 1 if args.tiny else max(1, int(60 * args.minutes / epoch_s))
    pair = dataclasses.replace(pair, settings=dataclasses.replace(settings, epochs=epochs))
    pair.keep_settings()
    sides = SIDES if rival else SIDES[:1]
    for side in sides:
        pair.train(side, 0)
    dice = {side: float(mean_dice([pair.scores(side, 0)]).mean()) for side in sides}
    spent = {side: json.loads(pair.done(side, 0).read_text())["seconds"] / 60 for side in sides}
    return [
        _informs("Hippocampus, epochs", dict.fromkeys(sides, epochs), ""),
        _informs("Hippocampus, mean Dice, seed 0", dice, ""),
        _informs("Hippocampus, minutes", spent, "min"),
        _informs("Hippocampus, one iteration", {k: 1000 * seconds[k] for k in sides}, "ms"),
    ]


def prepare(pair: FoldPair, rival: Path | None) -> None:
    """Plan and preprocess, both sides alike."""
    pair.folder.mkdir(parents=True, exist_ok=True)
    pair.keep_settings()
    pair.prepare_ours(0)
    if rival:
        pair.prepare_rival()
        pair.check_same(0)


def take_turns(
    pair: FoldPair, rival: Path | None, args: argparse.Namespace
) -> dict[str, list[timing.Block]]:
    """Train blocks of ours and of nnunetv2, or of what stands in for it."""
    workers = pair.settings.workers
    if rival:
        its = timing.rival_process(pair, workers)
    else:
        command = [sys.executable, HERE / "gpu_plain.py", pair.workspace(0) / "plans.json"]
        command += ["--device", args.device, "--threads", pair.settings.threads]
        log = pair.folder / "blocks-rival.log"
        its = BlockProcess([*map(str, command)], pair.our_environment(), log)
    with timing.our_process(pair, workers) as ours, its:
        blocks, iterations = (2, 2) if args.tiny else (args.blocks, args.block_iterations)
        return timing.take_turns(ours, its, blocks=blocks, iterations=iterations)


def operations(pair: FoldPair) -> float:
    """Count the floating-point operations of one iteration's convolutions, there and back."""
    planned = plans.load(pair.workspace(0) / "plans.json")
    chosen = planned.configuration(CONFIGURATION)
    channels = len(planned.channels)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = build_network(chosen.architecture, channels, len(planned.labels)).train()
        logits = network(torch.empty(chosen.batch, channels, *chosen.patch))
        sum(scores.sum() for scores in logits).backward()
    return float(counter.get_total_flops())


def make_scans(folder: Path, *, count: int, size: int) -> None:
    """Make noisy ellipsoids in air with a bright ball, as a Decathlon task."""
    random = np.random.default_rng(2022)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    listed = []
    for number in range(count):
        shape = (28 + number % 3, size, size)
        z, y, x = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
        voxels = random.integers(-12, 13, shape, np.int16)
        voxels += np.where(z**2 + y**2 + x**2 < 0.8, 30, -1000).astype(np.int16)
        centre = random.uniform(-0.4, 0.4, 3)
        ball = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 < 0.02
        voxels[ball] += 35
        file = f"made_{number:03}.nii.gz"
        volume.write(Volume(voxels, (5.0, 0.45, 0.45)), folder / "imagesTr" / file)
        volume.write(Volume(ball.astype(np.uint8), (5.0, 0.45, 0.45)), folder / "labelsTr" / file)
        listed.append({"image": f"./imagesTr/{file}", "label": f"./labelsTr/{file}"})
    described = {
        "name": "Made",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "hemorrhage"},
        "tensorImageSize": "3D",
        "numTraining": count,
        "training": listed,
    }
    (folder / "dataset.json").write_text(json.dumps(described))


def _settings(args: argparse.Namespace, dataset: str, features: tuple[int, ...] | None) -> Settings:
    """The settings: nnunetv2's lengths of an epoch, and as many data workers as it takes."""
    cores = os.cpu_count() or 1
    return Settings(
        dataset=dataset,
        batch=2 if args.tiny else None,
        features=features,
        epochs=1,
        batches=3 if args.tiny else 250,
        validation_batches=1 if args.tiny else 50,
        device=args.device,
        precision="fp32" if args.device == "cpu" else "auto",
        threads=1,
        workers=1 if args.tiny else min(12, cores),
    )


def _informs(row: str, values: dict[str, float], unit: str) -> Row:
    return Row(row, values["ours"], values.get("rival"), unit, None, None, None)


def _nnunetv2(folder: Path) -> Path | None:
    """The Python of the rival's environment, if it has nnunetv2; nothing is installed."""
    python = folder.absolute() / "bin" / "python"
    if not python.exists():
        return None
    found = subprocess.run([python, "-c", "import nnunetv2"], check=False, capture_output=True)
    return python if found.returncode == 0 else None


def _card(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def _peak(device: str) -> float | None:
    card = _card(device)
    return next((value for name, value in PEAK_TFLOPS.items() if name in card), None)


def _arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work", type=lambda text: Path(text).absolute(), required=True, metavar="FOLDER")
    add("--data", type=lambda text: Path(text).absolute(), metavar="TASK04", help="Hippocampus")
    add("--minutes", type=float, default=3.0, help="of the Hippocampus, a side [%(default)s]")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="[%(default)s]")
    add("--blocks", type=int, default=6, help="of the timing, a side [%(default)s]")
    add("--block-iterations", type=int, default=30, help="of a block [%(default)s]")
    add("--tiny", action="store_true", help="small scans and networks: does it run through?")
    add(
        "--rival-env",
        type=Path,
        default=DEFAULT_ENV,
        metavar="FOLDER",
        help="of nnunetv2 [%(default)s]",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
