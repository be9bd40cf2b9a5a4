"""Tiny datasets on disk, in each of the layouts that are read."""

from __future__ import annotations

import json

import numpy as np
import SimpleITK as sitk

from ichseg.scan import volume
from ichseg.scan.volume import Volume

SPACING_MM = (5.0, 0.5, 0.5)


def make_voxels(seed, shape=(3, 4, 5)):
    return np.random.default_rng(seed).integers(-100, 100, shape).astype(np.int16)


def write_pair(image, label, seed):
    """An image, and a label of its voxels above 50."""
    voxels = make_voxels(seed)
    volume.write(Volume(voxels, SPACING_MM), image)
    volume.write(Volume((voxels > 50).astype(np.uint8), SPACING_MM), label)


def describe(folder, content, changes):
    """Write dataset.json; a change to None takes the key out."""
    kept = {key: value for key, value in {**content, **changes}.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(kept))


def write_msd(folder, names=("a", "b"), **changes):
    """A Decathlon folder; ``changes`` replace keys of its dataset.json."""
    for seed, name in enumerate(names):
        label = folder / "labelsTr" / f"{name}.nii.gz"
        write_pair(folder / "imagesTr" / f"{name}.nii.gz", label, seed)
    content = {
        "name": "Tiny",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "bleed"},
        "training": [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
            for name in names
        ],
        "test": [],
    }
    describe(folder, content, changes)
    return folder


def write_v1(folder, names=("a", "b"), channels=("T1", "T2"), **changes):
    """An nnU-Net v1 raw folder: the list of an MSD task, but one file a channel."""
    write_msd(folder, names, modality={str(i): name for i, name in enumerate(channels)}, **changes)
    _split_files(folder, names, len(channels))
    return folder


def write_v2(folder, names=("a", "b"), channels=("T1", "T2"), **changes):
    """An nnU-Net v2 raw folder."""
    write_msd(folder, names)
    _split_files(folder, names, len(channels))
    content = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": {"bleed": 1, "background": 0},
        "numTraining": len(names),
        "file_ending": ".nii.gz",
    }
    describe(folder, content, changes)
    return folder


def write_instance(folder, names=("001", "002")):
    """The layout of the INSTANCE 2022 download."""
    for seed, name in enumerate(names):
        label = folder / "train" / "label" / f"{name}.nii.gz"
        write_pair(folder / "train" / "data" / f"{name}.nii.gz", label, seed)
    return folder


def _split_files(folder, names, channels):
    """``a.nii.gz`` becomes ``a_0000.nii.gz``, and beside it lie other channels."""
    for seed, name in enumerate(names):
        image = folder / "imagesTr" / f"{name}.nii.gz"
        image.rename(image.with_name(f"{name}_0000.nii.gz"))
        for channel in range(1, channels):
            other = Volume(make_voxels(100 * channel + seed), SPACING_MM)
            volume.write(other, image.with_name(f"{name}_{channel:04d}.nii.gz"))


def contents(folder):
    """Bytes and times of all files: equal if nothing was touched."""
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_4d(path, channels, dtype=np.int16):
    """As ITK writes a series of volumes: channels last in NIfTI, a direction of 4x4."""
    turn = np.deg2rad(10)
    direction = (np.cos(turn), -np.sin(turn), 0, np.sin(turn), np.cos(turn), 0, 0, 0, 1)
    stack = []
    for channel in channels:
        image = sitk.GetImageFromArray(channel.astype(dtype))
        image.SetSpacing((0.5, 0.75, 5.0))
        image.SetOrigin((-10.0, 20.0, 30.0))
        image.SetDirection(direction)
        stack.append(image)
    sitk.WriteImage(sitk.JoinSeries(stack, 7.0, 2.0), str(path))
