"""Whole runs of the two programs, as processes, and what they leave: for tests and benchmarks."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import make_bundle

from ichseg.files import UNFINISHED
from ichseg.scan import volume
from ichseg.scan.volume import Volume

ROOT = Path(__file__).parents[2]
TINY = shlex.split(
    "--spacing 5,1,1 --patch 4,16,16 --batch 2 --features 4,8 --no-deep-supervision --epochs 3 "
    "--batches-per-epoch 4 --validation-batches 1 --threads 1 --workers 0 --no-validation-mirrors "
    "--folds 0,1 --device cpu"
)
# What a training makes, but for logs and what has times of day in it.
_MADE = (
    "plans.json", "splits.json", "preprocessed/**/*", "runs/*/*/validation/*",
    "bundles/**/*.safetensors", "selection.json",
)  # fmt: skip


def start(*words):
    """A Python program, what it says in one pipe; its networks take one thread."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def make_scans(folder, count, shape):
    """Scans, one of them damaged, and untrained weights for them."""
    make_bundle(folder / "weights")
    rng = np.random.default_rng(5)
    for number in range(count):
        voxels = rng.integers(-1000, 1000, shape).astype(np.int16)
        voxels[rng.random(shape) < 0.4] = 31
        voxels += rng.integers(-9, 10, shape, np.int16)
        volume.write(Volume(voxels, (5.0, 1.0, 1.0)), folder / "in" / f"{number:03d}.mha")
    (folder / "in" / "bad.mha").write_bytes(b"damaged")


def segment(place, output, *more):
    """``process.py`` on a folder from ``make_scans``."""
    words = ["--input", place / "in", "--output", place / output, "--weights", place / "weights"]
    words += ["--preset", "fast", "--device", "torch-cpu", "--precision", "float32"]
    return start("process.py", *words, *more)


def masks(folder):
    """The masks in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.glob("*.mha")}


def outcomes(folder):
    """Whether each case in ``results.json`` has failed, by name, in its order."""
    entries = json.loads((folder / "results.json").read_text())
    return [(e["inputs"][0]["filename"], bool(e["error_messages"])) for e in entries]


def train(dataset, workspace, *more):
    """``training run`` of two folds."""
    return start("-m", "training", "run", dataset, "--workspace", workspace, *TINY, *more)


def made(workspace):
    """Digests of what a training has made, by path; not what a killed process was writing."""
    return {
        str(path.relative_to(workspace)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in _MADE
        for path in sorted(workspace.glob(pattern))
        if path.is_file() and not path.name.startswith(UNFINISHED)
    }
