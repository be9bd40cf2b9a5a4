"""Datasets of which tables, pictures or labels are exchanged for others, and how they are read.

Beside what fails, a dataset is wrong in silence if it leaves labels that nobody declared, or labels
of another shape than their scan.
"""

from __future__ import annotations

import functools
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from helpers.datasets import write_msd, write_v2
from helpers.hand_made_head import SPACING_MM, hand_made_head

Change = Callable[[bytes, random.Random], bytes]
KINDS = ("ignore-label", "real-heads", "backgrounds")
IGNORE = 2
_WORDS = (
    "", "x", "-1", "nan", "inf", "1e999", "1e9", "0.5", "../../x", "\0", '"', "é", "a,b", "9" * 400,
)  # fmt: skip
_ODD: tuple[Callable[[npt.NDArray[np.generic]], npt.NDArray[np.generic]], ...] = (
    lambda labels: labels[:-1],
    lambda labels: labels.astype(np.int16) * 129,
    lambda labels: labels.astype(np.int16) - 1,
    lambda labels: labels.astype(np.float32) / 2,
    lambda labels: labels.astype(np.float32) * np.float32("nan"),
    lambda labels: np.full_like(labels, IGNORE),
    lambda labels: np.full_like(labels, IGNORE + 1),
    lambda labels: labels[0],
    lambda labels: labels,
)


def make(home: Path, kind: str, rng: random.Random, change_json: Change, noise: Change) -> Path:
    """Write a dataset of which one to three things are not as they should be.

    Args:
        home: Where.
        kind: One of ``KINDS``.
        rng: Decides all.
        change_json: Exchanges values of a JSON file.
        noise: Exchanges bytes of any file.
    """
    folder = home / "dataset"
    if kind == "real-heads":
        _pictures(folder, rng)
    elif kind == "ignore-label":
        labels = {"background": 0, "bleed": 1, "ignore": IGNORE}
        write_v2(folder, channels=("CT",), labels=labels)
        _replace_labels(folder / "labelsTr" / "a.nii.gz", rng)
    else:
        _scans(folder, rng)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    tables = [path for path in files if path.suffix in (".json", ".csv")]
    for path in dict.fromkeys(rng.sample(tables, 1) + rng.sample(files, rng.randrange(2))):
        content = path.read_bytes()
        path.unlink()  # it may be linked to a file of another mutant
        what = rng.random()
        if what < 0.1:
            continue
        if path.suffix == ".json":
            content = change_json(content, rng)
        elif path.suffix == ".csv" and what < 0.8:
            content = _other_table(content.decode(), rng).encode()
        elif what < 0.9:
            content = noise(content, rng)
        path.write_bytes(content)
    return folder


def read(kind: str, folder: Path, own: Path) -> str:
    """Make of a dataset what its command makes of it.

    Args:
        kind: One of ``KINDS``.
        folder: The dataset.
        own: Where it may write.

    Returns:
        What is wrong about it; empty if nothing is.
    """
    out = own / "made"
    try:
        return {
            "ignore-label": _convert,
            "real-heads": _make_real_heads,
            "backgrounds": _draw_bleeds,
        }[kind](folder, out)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _convert(folder: Path, out: Path) -> str:
    from training.data.convert import convert
    from training.data.dataset import read_case

    data = convert(folder, out, workers=1)
    declared = {*range(len(data.labels)), data.ignore_label}
    for case in data.labelled:
        images, reference = read_case(case, data.labels, data.ignore_label)
        if wrong := _is_wrong(images[0].voxels.shape, reference.voxels, declared):
            return wrong
    return ""


def _make_real_heads(folder: Path, out: Path) -> str:
    from ichseg.scan import volume
    from training.data import real_heads

    phe, ich = folder / "phe", folder / "ich"
    real_heads.write_dataset(
        out, phe_sich=phe if phe.exists() else None, ct_ich=ich if ich.exists() else None
    )
    for path in (out / "labelsTr").iterdir():
        image = volume.read(out / "imagesTr" / path.name).voxels
        if wrong := _is_wrong(image.shape, volume.read(path).voxels, {0, 1, IGNORE}):
            return wrong
    return ""


def _draw_bleeds(folder: Path, out: Path) -> str:
    from phantom.background import find_backgrounds, paint

    for background in find_backgrounds(folder)[:1]:
        painted = paint(background, (("epidural", 10.0),), np.random.default_rng(1))
        if wrong := _is_wrong(painted.voxels.shape, painted.labels, {0, 1, IGNORE}):
            return wrong
    return ""


def _is_wrong(
    shape: tuple[int, ...], labels: npt.NDArray[np.generic], declared: set[int | None]
) -> str:
    if labels.shape != shape:
        return f"labels of shape {labels.shape} for a scan of {shape}"
    other = set(np.unique(labels).tolist()) - declared
    return f"label {other.pop()} that nobody declared" if other else ""


def _pictures(folder: Path, rng: random.Random) -> None:
    """Two patients of one of the two downloads, small."""
    rows, columns = np.mgrid[:96, :96] - 48
    far = np.hypot(rows, columns)
    plane = np.where(far < 36, 29, np.where(far < 40, 100, -20)).astype(np.int16)
    phe = rng.random() < 0.6
    home = folder / ("phe/images" if phe else "ich/brain")
    home.mkdir(parents=True)
    table = ["slice,xmin,ymin,xmax,ymax" if phe else "PatientNumber,SliceNumber,No_Hemorrhage"]
    for patient in (1, 2):
        for number in range(1, 6):
            hu = plane + np.random.default_rng(number).integers(-3, 4, plane.shape)
            hu[40:52, 30:44] += 36
            grey = (hu.clip(-20, 100) + 20).astype(np.uint8) * 2
            name = f"{patient:04}_{number:02}" if phe else f"{patient:03}_{number:02}"
            _write(home / f"{name}.png", grey if rng.random() < 0.98 else grey[:-1])
            table.append(f"{name},28,38,46,54" if phe else f"{patient},{number},{number % 2}")
    if rng.random() < 0.2:
        rng.choice(sorted(home.iterdir())).unlink()
    name = "boxes.csv" if phe else "hemorrhage_diagnosis.csv"
    (home.parent / name).write_text("\n".join(table) + "\n")


def _scans(folder: Path, rng: random.Random) -> None:
    """A Decathlon folder of two scans, one in six of them a head that a bleed can be drawn into."""
    labels = {"0": "background", "1": "hemorrhage", "2": "ignore"}
    write_msd(folder, labels=labels)
    (folder / "groups.csv").write_text("case,group\na,p\nb,p\n")
    image, label = folder / "imagesTr" / "a.nii.gz", folder / "labelsTr" / "a.nii.gz"
    if rng.random() < 0.16:
        head = _head()
        if rng.random() < 0.3:
            head = rng.choice((head + 32_000.0, head * np.float32("nan"), head[:, :40], head * 0))
        _write(image, head)
        _write(label, np.zeros(head.shape, np.uint8))
    if rng.random() < 0.5:
        _replace_labels(label, rng)


def _replace_labels(path: Path, rng: random.Random) -> None:
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    labels[..., :2] = IGNORE
    _write(path, rng.choice(_ODD)(labels))


def _write(path: Path, voxels: npt.NDArray[np.generic]) -> None:
    image = sitk.GetImageFromArray(voxels)
    if voxels.ndim == 3:
        image.SetSpacing(SPACING_MM[::-1])
    sitk.WriteImage(image, str(path), useCompression=path.suffix == ".gz")


@functools.cache
def _head() -> npt.NDArray[np.float32]:
    return hand_made_head().astype(np.float32)


def _other_table(text: str, rng: random.Random) -> str:
    """Fields, rows and columns of a table exchanged, taken out or doubled."""
    lines = [line.split(",") for line in text.splitlines()]
    for _ in range(rng.randint(1, 3)):
        row = rng.choice(lines)
        column = rng.randrange(len(row)) if row else 0
        what = rng.randrange(6)
        if what == 0:
            lines.remove(row)
        elif what == 1:
            lines.append(list(row))
        elif what == 2:
            del row[column:]
        elif what == 3:
            row.append(rng.choice(_WORDS))
        elif row:
            row[column] = rng.choice(_WORDS)
        if not lines:
            break
    return "\n".join(",".join(line) for line in lines) + "\n"
