"""Preprocessed cases on disk, readable patch by patch without loading a case.

One folder per configuration, four files per case:

    <case>.data.npy         float32 (C, Z, Y, X), memory-mapped when opened
    <case>.target.npy       int8 (Z, Y, X), memory-mapped; -1 is background outside the nonzero mask
    <case>.foreground.npz   voxel coordinates (n, 3) of each label, for foreground sampling
    <case>.json             shape and voxel counts; written last, so it marks a finished case
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ichseg import schema, volume
from ichseg.errors import DatasetError

SCHEMA_VERSION = 1
_LISTED_AT_LEAST = 10_000  # voxels of a label whose coordinates are kept (nnU-Net v1)
_LISTED_FRACTION = 0.01  # of larger labels
_SEED = 1234
_DATA, _TARGET, _FOREGROUND, _META = ".data.npy", ".target.npy", ".foreground.npz", ".json"


@dataclass(frozen=True, slots=True)
class CaseMeta:
    """What is known of a stored case without opening its arrays.

    Attributes:
        schema_version: Version of the store's layout.
        name: Name of the case.
        shape: ``(C, Z, Y, X)``.
        labels: Foreground label values present, ascending.
        voxels: How many voxels of each.
    """

    schema_version: int
    name: str
    shape: tuple[int, int, int, int]
    labels: tuple[int, ...]
    voxels: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"store schema {self.schema_version}, this code reads {SCHEMA_VERSION}"
            )


@dataclass(frozen=True, slots=True)
class StoredCase:
    """A preprocessed case whose voxels are read only where they are indexed.

    Attributes:
        name: Name of the case.
        data: Memory-mapped float32, ``(C, Z, Y, X)``.
        target: Memory-mapped int8, ``(Z, Y, X)``.
        foreground: For each label present, voxel coordinates ``(n, 3)``: all, or a sample.
    """

    name: str
    data: npt.NDArray[np.float32]
    target: npt.NDArray[np.int8]
    foreground: dict[int, npt.NDArray[np.integer]]


def write_case(
    folder: Path, name: str, data: npt.NDArray[np.float32], target: npt.NDArray[np.int8]
) -> None:
    """Store a case; until it is whole it does not count as there.

    Args:
        folder: The configuration's folder, made if need be.
        name: Name of the case.
        data: float32, ``(C, Z, Y, X)``.
        target: int8, ``(Z, Y, X)``.

    Raises:
        DatasetError: The arrays are of other types or do not fit each other.
        OutputError: The folder cannot be written.
    """
    if data.ndim != 4 or data.dtype != np.float32:
        raise DatasetError(
            f"case {name}: data is {data.dtype} {data.shape}, expected float32 (C, Z, Y, X)"
        )
    if target.shape != data.shape[1:] or target.dtype != np.int8:
        raise DatasetError(
            f"case {name}: target is {target.dtype} {target.shape}, expected int8 {data.shape[1:]}"
        )
    foreground, counts = sample_foreground(target)
    c, z, y, x = data.shape
    meta = CaseMeta(
        SCHEMA_VERSION, name, (c, z, y, x), tuple(counts), tuple(counts[label] for label in counts)
    )
    _file(folder, name, _META).unlink(missing_ok=True)  # from here on the old case is no more
    with volume.replacing(_file(folder, name, _DATA), suffix=".npy") as temporary:
        np.save(temporary, data)
    with volume.replacing(_file(folder, name, _TARGET), suffix=".npy") as temporary:
        np.save(temporary, target)
    with volume.replacing(_file(folder, name, _FOREGROUND), suffix=".npz") as temporary:
        arrays: dict[str, Any] = {str(label): found for label, found in foreground.items()}
        np.savez(temporary, **arrays)
    with volume.replacing(_file(folder, name, _META)) as temporary:
        temporary.write_text(schema.dumps(meta), encoding="utf-8")


def open_case(folder: Path, name: str) -> StoredCase:
    """Open a stored case without reading its voxels.

    Raises:
        DatasetError: The case is not there, not finished, or damaged.
    """
    if not is_complete(folder, name):
        raise DatasetError(f"{folder}: no finished case {name}; run `preprocess` first")
    meta = load_meta(folder, name)
    try:
        data = np.load(_file(folder, name, _DATA), mmap_mode="r")
        target = np.load(_file(folder, name, _TARGET), mmap_mode="r")
        with np.load(_file(folder, name, _FOREGROUND)) as file:
            foreground = {int(label): file[label] for label in file.files}
    except (OSError, ValueError) as error:
        raise DatasetError(f"{folder}: case {name} is damaged ({error})") from error
    if data.shape != meta.shape or target.shape != meta.shape[1:]:
        raise DatasetError(
            f"{folder}: case {name} has shapes {data.shape} and {target.shape}, "
            f"expected {meta.shape} and {meta.shape[1:]}"
        )
    return StoredCase(name, data, target, foreground)


def load_meta(folder: Path, name: str) -> CaseMeta:
    """Shape and voxel counts of a stored case.

    Raises:
        PlansError: The file is missing or does not have the schema this code reads.
    """
    return schema.load(CaseMeta, _file(folder, name, _META))


def list_cases(folder: Path) -> tuple[str, ...]:
    """Names of the finished cases, sorted."""
    names = (path.name.removesuffix(_DATA) for path in folder.glob(f"*{_DATA}"))
    return tuple(
        sorted(name for name in names if not name.startswith(".") and is_complete(folder, name))
    )


def is_complete(folder: Path, name: str) -> bool:
    """Whether the case is stored and whole."""
    return all(
        _file(folder, name, suffix).is_file() for suffix in (_DATA, _TARGET, _FOREGROUND, _META)
    )


def sample_foreground(
    target: npt.NDArray[np.int8],
) -> tuple[dict[int, npt.NDArray[np.integer]], dict[int, int]]:
    """Coordinates to centre foreground patches on, and voxel counts, both by label.

    Every voxel of labels up to 10 000 voxels; of larger ones 10 000 or 1 %, whichever is more,
    drawn without replacement with a fixed seed.

    Args:
        target: ``(Z, Y, X)``; values above 0 are foreground.
    """
    random = np.random.RandomState(_SEED)
    dtype = np.int16 if max(target.shape) <= np.iinfo(np.int16).max else np.int32
    foreground: dict[int, npt.NDArray[np.integer]] = {}
    counts: dict[int, int] = {}
    for label in (int(value) for value in np.unique(target) if value > 0):
        flat = np.flatnonzero(target == label)
        counts[label] = len(flat)
        wanted = max(min(_LISTED_AT_LEAST, len(flat)), int(np.ceil(len(flat) * _LISTED_FRACTION)))
        if wanted < len(flat):
            flat = flat[random.choice(len(flat), wanted, replace=False)]
        foreground[label] = np.stack(np.unravel_index(flat, target.shape), axis=1).astype(dtype)
    return foreground, counts


def _file(folder: Path, name: str, suffix: str) -> Path:
    return folder / f"{name}{suffix}"
