"""What the preprocessing benchmark runs on: one dataset, laid out for both sides."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ichseg.model import plans
from ichseg.scan import volume
from ichseg.scan.volume import Volume

ROOT = Path(__file__).resolve().parent.parent
RIVAL_DATASET = 1
_RIVAL_NAME = "Dataset001_Bench"
CASES, SEED = 10, 2022
LARGE_SHAPE, LARGE_MM = (400, 512, 512), (0.8, 0.8, 0.8)
# Both finer and coarser than the volume's; about as many voxels come out as go in.
LARGE_TARGET_MM = (0.9, 0.75, 0.75)


@dataclass(frozen=True, slots=True)
class Pair:
    """One dataset for both sides; all lies in ``folder``."""

    folder: Path

    @property
    def source(self) -> Path:
        """The dataset in the Decathlon's layout."""
        return self.folder / "Task01_Bench"

    @property
    def workspace(self) -> Path:
        """Our workspace."""
        return self.folder / "workspace"

    @property
    def store(self) -> Path:
        """Our preprocessed cases."""
        return self.workspace / "preprocessed" / "3d_fullres"

    @property
    def rival_store(self) -> Path:
        """The rival's preprocessed cases."""
        return self.folder / "preprocessed" / _RIVAL_NAME / "nnUNetPlans_3d_fullres"

    @property
    def rival_plans(self) -> Path:
        """The rival's plans."""
        return self.folder / "preprocessed" / _RIVAL_NAME / "nnUNetPlans.json"

    @property
    def rival_dataset(self) -> Path:
        """The rival's dataset.json."""
        return self.folder / "raw" / _RIVAL_NAME / "dataset.json"

    def rival_environment(self) -> dict[str, str]:
        """The variables by which the rival finds its folders."""
        found = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        for name in ("raw", "preprocessed", "results"):
            found[f"nnUNet_{name}"] = str(self.folder / name)
        return found

    def convert(self) -> None:
        """Make our workspace anew."""
        shutil.rmtree(self.workspace, ignore_errors=True)
        subprocess.run(
            [sys.executable, "-m", "training", "convert", str(self.source),
             "--workspace", str(self.workspace)],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def share_intensities(self) -> None:
        """Give the rival our clip limits, mean and deviation; its own are of a sample.

        Raises:
            SystemExit: The plans differ in more than that, so that the work would not be the same.
        """
        ours = plans.load(self.workspace / "plans.json")
        theirs = json.loads(self.rival_plans.read_text())
        found = ours.configuration("3d_fullres").spacing_mm
        expected = theirs["configurations"]["3d_fullres"]["spacing"]
        if not np.allclose(found, expected, rtol=1e-6):
            raise SystemExit(f"error: ours plans a spacing of {found} mm, the rival {expected}")
        for channel, scheme in enumerate(ours.normalisations):
            facts = theirs["foreground_intensity_properties_per_channel"][str(channel)]
            facts["percentile_00_5"], facts["percentile_99_5"] = scheme.clip_low, scheme.clip_high
            facts["mean"], facts["std"] = scheme.mean, scheme.deviation
        self.rival_plans.write_text(json.dumps(theirs))


def make_phantoms(folder: Path) -> Pair:
    """Make ten phantoms from ``training synthesize``: INSTANCE's spacings, sizes and bleeds."""
    pair = Pair(folder)
    folder.mkdir(parents=True)
    print(f"data: {CASES} head-CT phantoms, seed {SEED}", flush=True)
    command = ["-m", "training", "synthesize", "--out", str(pair.source), "--cases", str(CASES)]
    command += ["--seed", str(SEED), "--negatives", "0"]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    for path in sorted((pair.source / "imagesTr").iterdir()):
        scan = volume.read(path)
        print(f"  {path.name} {scan.voxels.shape} at {np.round(scan.spacing_mm, 4)} mm", flush=True)
    _lay_out_for_rival(pair)
    return pair


def make_large(folder: Path) -> Pair:
    """Make one volume of 400x512x512: a noisy ellipsoid in air with a ball in it."""
    pair = Pair(folder)
    random = np.random.default_rng(SEED)
    z, y, x = np.ogrid[-1 : 1 : LARGE_SHAPE[0] * 1j, -1 : 1 : LARGE_SHAPE[1] * 1j,
                       -1 : 1 : LARGE_SHAPE[2] * 1j]  # fmt: skip
    voxels = random.integers(-12, 13, LARGE_SHAPE, np.int16)
    voxels += np.where(z**2 + y**2 + x**2 < 0.8, 30, -1000).astype(np.int16)
    labels = (z**2 + (y - 0.3) ** 2 + x**2 < 0.05).astype(np.uint8)
    voxels[labels > 0] += 35
    for name, array in (("imagesTr", voxels), ("labelsTr", labels)):
        (pair.source / name).mkdir(parents=True)
        volume.write(Volume(array, LARGE_MM), pair.source / name / "large.nii.gz")
    (pair.source / "dataset.json").write_text(
        json.dumps(
            {
                "name": "Large",
                "modality": {"0": "CT"},
                "labels": {"0": "background", "1": "hemorrhage"},
                "tensorImageSize": "3D",
                "numTraining": 1,
                "training": [
                    {"image": "./imagesTr/large.nii.gz", "label": "./labelsTr/large.nii.gz"}
                ],
            }
        )
    )
    _lay_out_for_rival(pair)
    return pair


def _lay_out_for_rival(pair: Pair) -> None:
    """Hard-link the dataset into nnunetv2's raw folder."""
    raw = pair.folder / "raw" / _RIVAL_NAME
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    cases = [path.name.removesuffix(".nii.gz") for path in (pair.source / "imagesTr").iterdir()]
    for case in cases:
        os.link(
            pair.source / "imagesTr" / f"{case}.nii.gz", raw / "imagesTr" / f"{case}_0000.nii.gz"
        )
        os.link(pair.source / "labelsTr" / f"{case}.nii.gz", raw / "labelsTr" / f"{case}.nii.gz")
    pair.rival_dataset.write_text(
        json.dumps(
            {
                "channel_names": {"0": "CT"},
                "labels": {"background": 0, "hemorrhage": 1},
                "numTraining": len(cases),
                "file_ending": ".nii.gz",
            }
        )
    )
