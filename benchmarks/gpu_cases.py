"""What the measurements on a GPU run on: a training store, networks and scans, made from arrays.

Nothing here reads or writes an image by SimpleITK, which a GPU machine without network need not
have. The plan, ``plans/instance.json``, is the one that nnU-Net's rules give scans of INSTANCE's
size (28 to 30 slices of 512x512, 5 mm by 0.45 mm): 16x320x320, batch 2.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.inference_data import ROOT, SPACING_MM, make_scan
from ichseg.files import suffix_of
from ichseg.model import bundle, plans, strict_json
from ichseg.model.bundle import Model
from ichseg.model.network import build_network
from ichseg.model.plans import Plans
from ichseg.scan import headers
from ichseg.scan.volume import Volume
from training.data import dataset
from training.data.dataset import Case, Dataset
from training.data.workspace import plans_file, preprocessed_folder
from training.store import chunks

CONFIGURATION = "3d_fullres"
SAMPLES = ROOT / "test" / "sample"
SHAPE, TINY_SHAPE = (28, 512, 512), (16, 80, 80)
FOLDS, TINY_FOLDS = 5, 2
MIRRORINGS = 8
_CASES = 10
_TINY_FEATURES, _TINY_PATCH = (4, 8, 8, 8, 8, 8, 8), (16, 64, 64)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part of the measurement works, and on what.

    Attributes:
        work: The folder for what is made; what is there already is used again.
        device: ``cuda`` or ``cpu``.
        tiny: Whether all is small, to see whether it runs through.
    """

    work: Path
    device: str
    tiny: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """The size ``(z, y, x)`` of a made scan."""
        return TINY_SHAPE if self.tiny else SHAPE


def planned(place: Place) -> Plans:
    """The plan; a tiny one has the same strides and kernels, and fewer features and voxels."""
    found = plans.load(ROOT / "benchmarks" / "plans" / "instance.json")
    if not place.tiny:
        return found
    configuration = found.configuration(CONFIGURATION)
    architecture = dataclasses.replace(configuration.architecture, features=_TINY_FEATURES)
    small = dataclasses.replace(configuration, architecture=architecture, patch=_TINY_PATCH)
    return dataclasses.replace(found, configurations=(small,))


def workspace(place: Place) -> Path:
    """A workspace with preprocessed cases, whose scans are in no file: noise with a bright ball."""
    folder = place.work / "workspace"
    if (folder / "dataset.json").exists():
        return folder
    plan = planned(place)
    cases = []
    for number in range(_CASES):
        name = f"made_{number:02}"
        z, y, x = place.shape
        voxels, ball = _head((z + number % 3, y, x), number)
        scheme = plan.normalisations[0]
        normalised = voxels.clip(scheme.clip_low, scheme.clip_high)
        normalised = (normalised - scheme.mean) / scheme.deviation
        chunks.write_case(
            preprocessed_folder(folder, CONFIGURATION),
            name,
            normalised.astype(np.float32)[None],
            ball.astype(np.int8),
            plan.normalisations,
        )
        nowhere = folder / "raw" / f"{name}.nii.gz"
        cases.append(Case(name, (nowhere,), nowhere))
    plans_file(folder).write_text(strict_json.dumps(plan))
    dataset.save_dataset(Dataset(plan.dataset, plan.channels, plan.labels, tuple(cases)), folder)
    return folder


def weights(place: Place) -> Path:
    """A bundle of networks with random weights."""
    folder = place.work / "weights"
    if (folder / "model.json").exists():
        return folder
    # nothing is resampled
    plan = dataclasses.replace(planned(place), orientation="as_stored")
    architecture = plan.configuration(CONFIGURATION).architecture
    members = []
    for fold in range(TINY_FOLDS if place.tiny else FOLDS):
        torch.manual_seed(fold)
        state = build_network(architecture, len(plan.channels), plan.scores).state_dict()
        members.append(bundle.save_member(folder, CONFIGURATION, str(fold), state, dtype="f4"))
    bundle.save_model(
        folder,
        Model(
            schema_version=1, name="random", version="0", description="untrained",
            input_slug="head-ct", output_slug="bleed", average="logits", mirror_axes=(0, 1, 2),
            plans=plan, members=tuple(members), provenance={},
        ),
    )  # fmt: skip
    return folder


def scan(place: Place, seed: int = 0) -> Volume:
    """A scan of tissue without air, so that no tile is skipped."""
    return Volume(make_scan(place.shape, seed), SPACING_MM)


def read(path: Path) -> Volume:
    """A sample scan or its mask, MetaImage or NIfTI with an sform, read by its bytes alone."""
    suffix = suffix_of(path)
    header = headers.read_header(path, suffix)
    voxels = headers.read_voxels(path, suffix, header)
    if suffix == ".mha":
        fields = dict(line.split(" = ", 1) for line in header.raw.decode("latin-1").splitlines())
        steps = np.array(fields["ElementSpacing"].split(), float)
        columns = np.array(fields["TransformMatrix"].split(), float).reshape(3, 3).T
    else:
        affine = np.frombuffer(header.raw, "<f4", 12, 280).reshape(3, 4)[:, :3].astype(float)
        affine = affine * np.array([[-1], [-1], [1]])  # to LPS
        steps = np.sqrt((affine**2).sum(0))
        columns = affine / steps
    z, y, x = steps[::-1]
    direction = tuple(columns[::-1, ::-1].ravel().tolist())
    return Volume(voxels, (float(z), float(y), float(x)), direction=direction)


def as_json(plan: Plans) -> dict[str, Any]:
    """The content of ``plans.json``, for who reads it without ``ichseg``."""
    found: dict[str, Any] = json.loads(strict_json.dumps(plan))
    return found


def _head(
    shape: tuple[int, int, int], seed: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """A noisy ellipsoid in air, in HU, and the mask of a brighter ball in it."""
    random = np.random.default_rng(seed)
    z, y, x = np.ogrid[tuple(slice(-1, 1, size * 1j) for size in shape)]
    voxels = random.integers(-12, 13, shape, np.int16).astype(np.float32)
    voxels += np.where(z**2 + y**2 + x**2 < 0.8, 30, -1000)
    centre = random.uniform(-0.4, 0.4, 3)
    ball = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 < 0.02
    voxels[ball] += 35
    return voxels, ball
