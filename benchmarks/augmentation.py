"""CPU time that augmenting a sample takes: both our engines, and nnunetv2's own transforms.

    PYTHONPATH=. .venv/bin/python benchmarks/augmentation.py

One thread, recipe nnunetv2, regions as each side reads them, two samples at once in the device
engine (on the CPU). The rival runs in its own environment (``rivals.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

PATCHES = ((16, 96, 96), (40, 56, 40))  # the first is augmented in-plane
SAMPLES = 200


def region(size: tuple[int, ...]) -> tuple[Any, Any]:
    """Make a patch of noise with two boxes as labels 1 and 2."""
    data = np.random.default_rng(0).standard_normal((1, *size), dtype=np.float32)
    labels = np.zeros((1, *size), np.int8)
    labels[0, :, 20:40, 20:30], labels[0, :, 30:50, 22:30] = 1, 2
    return data, labels


def spend(make: Callable[[int], Callable[[], object]]) -> float:
    """Measure milliseconds of CPU time a sample; what ``make`` prepares for each is not counted."""
    spent = 0.0
    for index in range(SAMPLES):
        run = make(index)
        start = time.process_time()
        run()
        spent += time.process_time() - start
    return 1e3 * spent / SAMPLES


def measure_ours(patch: tuple[int, int, int]) -> tuple[float, float]:
    """Measure the host and the device engine."""
    import torch

    from training.batches.augment_device import augment_batch
    from training.batches.augment_host import augment
    from training.batches.augmentation import NNUNETV2, draw_warp

    torch.set_num_threads(1)
    flat = patch is PATCHES[0]

    def host(index: int) -> Callable[[], object]:
        rng = np.random.default_rng(index)
        warp = draw_warp(rng, NNUNETV2, patch, in_plane=flat)
        data, labels = region(patch if warp is None else warp.reach(patch))
        return lambda: augment(data, labels, warp, patch, NNUNETV2, rng, in_plane=flat)

    def device(index: int) -> Callable[[], object]:
        rngs = [np.random.default_rng(2 * index + sample) for sample in range(2)]
        warps = [draw_warp(rng, NNUNETV2, patch, in_plane=flat) for rng in rngs]
        reaches = [warp.reach(patch) for warp in warps if warp is not None]
        z, y, x = (max(sizes) for sizes in zip(patch, *reaches, strict=True))
        data, labels = (torch.from_numpy(a)[None].repeat(2, 1, 1, 1, 1) for a in region((z, y, x)))
        return lambda: augment_batch(
            data, labels, warps, patch, NNUNETV2, rngs, classes=3, in_plane=flat
        )

    return spend(host), spend(device) / 2


def measure_rival(patch: tuple[int, int, int]) -> float:
    """Measure the transforms of nnunetv2's default trainer, in the rival's environment."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    torch.set_num_threads(1)
    trainer = SimpleNamespace(
        configuration_manager=SimpleNamespace(patch_size=patch), print_to_log_file=lambda *_: None
    )
    configure = nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size
    rotation, flat, size, mirrored = configure(trainer)
    transforms = nnUNetTrainer.get_training_transforms(patch, rotation, None, mirrored, flat)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)

    def make(_: int) -> Callable[[], object]:
        data, labels = (torch.from_numpy(array) for array in region(tuple(map(int, size))))
        return lambda: transforms(image=data, segmentation=labels.to(torch.int16))

    return spend(make)


def main() -> int:
    """Measure ours here and the rival in its environment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--in-rival", action="store_true", help=argparse.SUPPRESS)
    if "--in-rival" in sys.argv:
        print(json.dumps([measure_rival(patch) for patch in PATCHES]))
        return 0
    from benchmarks import rivals, rows

    rivals.add_arguments(parser)
    args = parser.parse_args()
    python = rivals.python_of(args.rival_env)
    command = [python, str(Path(__file__).resolve()), "--in-rival"]
    single = {**os.environ, "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(command, env=single, check=True, capture_output=True, text=True).stdout
    table = []
    for patch, rival in zip(PATCHES, json.loads(printed.splitlines()[-1]), strict=True):
        for engine, ours in zip(("host", "device"), measure_ours(patch), strict=True):
            name = f"{'x'.join(map(str, patch))}, {engine} engine"
            table.append(rows.smaller(name, ours, rival, "ms", None))
    return rows.report("augmentation", table)


if __name__ == "__main__":
    sys.exit(main())
