"""Preprocessed cases on disk, readable patch by patch without loading a case.

One folder per configuration, four files per case:

    <case>.data.b2nd        intensities (C, Z, Y, X) as whole multiples of a small step
    <case>.target.b2nd      labels int8 (Z, Y, X); -1 is background outside the nonzero mask, the
                            value above the last label is a voxel to be ignored
    <case>.foreground.npz   voxel coordinates (n, 3) of each label, for foreground sampling; where
                            voxels may be ignored also of all others, as ``annotated``; and of each
                            lesion, with its number before them (n, 4), as ``lesions``
    <case>.json             shape, steps, voxel counts and a digest of the files it was made from;
                            written last: it marks a finished case

and a fifth for a cascade's second stage, written when the first stage has been trained:

    <case>.previous.b2nd    labels int8 (Z, Y, X) that the first stage found, with a digest of its
                            weights in the array's metadata

The arrays are Blosc2 files: compressed blocks, of which a read inflates those that it touches. Why
whole numbers, and how large the steps are: docs/decisions/0005-store.md.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ichseg.errors import DatasetError
from ichseg.files import replacing
from ichseg.model import strict_json
from ichseg.model.plans import Normalisation
from training.store.foreground import by_lesion, sample_foreground, sample_lesions, sample_voxels

SCHEMA_VERSION = 2
HU_STEP = 1 / 16  # CT: rounding errs by at most 0.032 HU
DEVIATION_STEP = 1 / 1024  # other images: by at most 0.0005 standard deviations
_CHUNK, _BLOCK = (16, 128, 128), (4, 64, 64)  # voxels (z, y, x); a block is inflated at once
_DATA, _TARGET, _FOREGROUND, _META = ".data.b2nd", ".target.b2nd", ".foreground.npz", ".json"
_PREVIOUS = ".previous.b2nd"
_WEIGHTS = "weights"  # in the metadata of the first stage's labels
_ANNOTATED, _LESIONS = "annotated", "lesions"  # beside the labels in the file of the coordinates


@dataclass(frozen=True, slots=True)
class CaseMeta:
    """What is known of a stored case without opening its arrays.

    Attributes:
        schema_version: Version of the store's layout.
        name: Name of the case.
        shape: ``(C, Z, Y, X)``.
        steps: For each channel the intensity of which whole multiples are stored.
        labels: Foreground label values present, ascending.
        voxels: How many voxels each of these labels has.
        source: Digest of the files that the case was made from, see ``training.data.sources``;
            empty if it is not known.
        ignore_label: The value of voxels to be ignored, see ``Dataset``; it is none of ``labels``.
    """

    schema_version: int
    name: str
    shape: tuple[int, int, int, int]
    steps: tuple[float, ...]
    labels: tuple[int, ...]
    voxels: tuple[int, ...]
    source: str = strict_json.optional("")
    ignore_label: int | None = strict_json.optional(None)

    def __post_init__(self) -> None:
        strict_json.check_schema("store", self.schema_version, SCHEMA_VERSION)


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array on disk; indexing reads what is indexed, and nothing stays open in between.

    Attributes:
        path: The Blosc2 file.
        shape: Shape of the array.
        steps: Factors along the first axis; None leaves the stored numbers as they are.
    """

    path: Path
    shape: tuple[int, ...]
    steps: npt.NDArray[np.float32] | None = None

    def __getitem__(self, index: Any) -> npt.NDArray[Any]:
        """The part that the index, of integers and slices, names.

        Raises:
            DatasetError: The file is missing or damaged.
        """
        stored = self.multiples(index)
        if self.steps is None:
            return stored
        steps = self.steps[index[0] if isinstance(index, tuple) else index]
        steps = steps.reshape(steps.shape + (1,) * (stored.ndim - steps.ndim))
        return np.multiply(stored, steps, dtype=np.float32, casting="unsafe")

    def multiples(self, index: Any) -> npt.NDArray[np.integer]:
        """The same part as the whole numbers on disk, not multiplied by the steps.

        Raises:
            DatasetError: The file is missing or damaged.
        """
        try:
            return _open_array(self.path)[index]
        except (OSError, RuntimeError, ValueError) as error:
            raise DatasetError(f"{self.path}: damaged, or missing ({error})") from error

    @property
    def nbytes(self) -> int:
        """Bytes of the whole numbers in memory."""
        return int(np.prod(self.shape)) * _open_array(self.path).dtype.itemsize


@dataclass(frozen=True, slots=True)
class StoredCase:
    """A preprocessed case whose voxels are read only where they are indexed.

    Attributes:
        name: Name of the case.
        data: Reads as float32, ``(C, Z, Y, X)``.
        target: Reads as int8, ``(Z, Y, X)``.
        foreground: For each label present, voxel coordinates ``(n, 3)``: all, or a sample.
        counts: How many voxels each of these labels has.
        lesions: For each lesion, by a number, voxel coordinates ``(n, 3)``: all, or a sample. None
            in a store that an older version made.
        previous: Labels of the cascade's first stage, as the target; None if not written.
        previous_weights: Digest of the weights that found them; empty if it is not known.
        annotated: Voxel coordinates ``(n, 3)`` to centre other patches on: a sample of all voxels
            that are not to be ignored. None where no label stands for ignored voxels.
        ignore_label: The value of ignored voxels in the target; None where there is none.
    """

    name: str
    data: StoredArray
    target: StoredArray
    foreground: dict[int, npt.NDArray[np.integer]]
    counts: dict[int, int]
    lesions: dict[int, npt.NDArray[np.integer]] | None = None
    previous: StoredArray | None = None
    previous_weights: str = ""
    annotated: npt.NDArray[np.integer] | None = None
    ignore_label: int | None = None


def write_case(
    folder: Path,
    name: str,
    data: npt.NDArray[np.float32],
    target: npt.NDArray[np.int8],
    normalisations: Sequence[Normalisation],
    *,
    source: str = "",
    ignore_label: int | None = None,
) -> None:
    """Store a case; until it is whole it does not count as there.

    Args:
        folder: The configuration's folder, made if need be.
        name: Name of the case.
        data: float32, ``(C, Z, Y, X)``.
        target: int8, ``(Z, Y, X)``.
        normalisations: How each channel was normalised; decides how finely it is stored.
        source: Digest of the files that it was made from; empty if it is not known.
        ignore_label: The value of voxels in the target that are to be ignored, or None.

    Raises:
        DatasetError: The arrays are of other types or do not fit each other.
        OutputError: The folder cannot be written.
    """
    if data.ndim != 4 or data.dtype != np.float32 or len(data) != len(normalisations):
        raise DatasetError(
            f"case {name}: data is {data.dtype} {data.shape}, "
            f"expected float32 ({len(normalisations)}, Z, Y, X)"
        )
    if target.shape != data.shape[1:] or target.dtype != np.int8:
        raise DatasetError(
            f"case {name}: target is {target.dtype} {target.shape}, expected int8 {data.shape[1:]}"
        )
    foreground, counts = sample_foreground(target, ignore_label)
    steps = tuple(choose_step(image, how) for image, how in zip(data, normalisations, strict=True))
    c, z, y, x = data.shape
    meta = CaseMeta(
        SCHEMA_VERSION,
        name,
        (c, z, y, x),
        steps,
        tuple(counts),
        tuple(counts.values()),
        source,
        ignore_label,
    )
    for suffix in (_META, _PREVIOUS):  # from here on the old case is no more
        _file(folder, name, suffix).unlink(missing_ok=True)
    with replacing(_file(folder, name, _DATA), suffix=".b2nd") as temporary:
        temporary.write_bytes(_multiples(data, steps).to_cframe())
    _write_labels(_file(folder, name, _TARGET), target)
    with replacing(_file(folder, name, _FOREGROUND), suffix=".npz") as temporary:
        arrays: dict[str, Any] = {str(label): found for label, found in foreground.items()}
        if ignore_label is not None:
            arrays[_ANNOTATED] = sample_voxels(target != ignore_label)
        arrays[_LESIONS] = sample_lesions(target, ignore_label)
        np.savez_compressed(temporary, **arrays)
    with replacing(_file(folder, name, _META)) as temporary:
        temporary.write_text(strict_json.dumps(meta), encoding="utf-8")


def write_previous(folder: Path, name: str, labels: npt.NDArray[np.int8], weights: str) -> None:
    """Store beside a finished case what the cascade's first stage found in it.

    Args:
        folder: The second stage's configuration.
        name: Name of the case.
        labels: int8, ``(Z, Y, X)`` as the case's target; 0 is background.
        weights: Digest of the weights that found them.

    Raises:
        DatasetError: The case is not there, or the labels are of another type or shape.
        OutputError: The folder cannot be written.
    """
    shape = open_case(folder, name).target.shape
    if labels.shape != shape or labels.dtype != np.int8:
        raise DatasetError(
            f"{folder}: previous labels of case {name} are {labels.dtype} {labels.shape}, "
            f"expected int8 {shape}"
        )
    _write_labels(_file(folder, name, _PREVIOUS), labels, {_WEIGHTS: weights})


def choose_step(image: npt.NDArray[np.float32], normalisation: Normalisation) -> float:
    """The intensity of which whole multiples are stored, in the unit of the normalised image."""
    if normalisation.scheme == "ct":
        return HU_STEP / normalisation.deviation
    if normalisation.scheme == "zscore":
        return DEVIATION_STEP
    deviation = float(image.std(dtype=np.float64))
    return deviation * DEVIATION_STEP if deviation > 0 else float(abs(image.flat[0])) or 1.0


def open_case(folder: Path, name: str) -> StoredCase:
    """Open a stored case without reading its voxels.

    Raises:
        DatasetError: The case is not there, not finished, or damaged.
    """
    if not is_complete(folder, name):
        raise DatasetError(f"{folder}: no finished case {name}; run `preprocess` first")
    meta = load_meta(folder, name)
    steps = np.array(meta.steps, np.float32)
    data = StoredArray(_file(folder, name, _DATA), meta.shape, steps)
    target = StoredArray(_file(folder, name, _TARGET), meta.shape[1:])
    path = _file(folder, name, _PREVIOUS)
    previous = StoredArray(path, meta.shape[1:]) if path.is_file() else None
    try:
        shapes = tuple(_open_array(array.path).shape for array in (data, target))
        before, weights = None, ""
        if previous is not None:
            found = _open_array(previous.path)
            before = found.shape
            if _WEIGHTS in found.schunk.meta:  # older versions did not note them
                weights = str(found.schunk.meta[_WEIGHTS])
        with np.load(_file(folder, name, _FOREGROUND)) as file:
            annotated = file[_ANNOTATED] if _ANNOTATED in file.files else None
            listed = file[_LESIONS] if _LESIONS in file.files else None
            labels = [key for key in file.files if key not in (_ANNOTATED, _LESIONS)]
            foreground = {int(key): file[key] for key in labels}
    except (OSError, RuntimeError, ValueError) as error:
        raise DatasetError(f"{folder}: case {name} is damaged ({error})") from error
    if shapes != (meta.shape, meta.shape[1:]) or len(steps) != meta.shape[0]:
        raise DatasetError(
            f"{folder}: case {name} has shapes {shapes[0]} and {shapes[1]}, "
            f"expected {meta.shape} and {meta.shape[1:]}"
        )
    if before not in (None, meta.shape[1:]):
        raise DatasetError(
            f"{path}: previous labels have shape {before}, expected {meta.shape[1:]}"
        )
    return StoredCase(
        name=name,
        data=data,
        target=target,
        foreground=foreground,
        counts=dict(zip(meta.labels, meta.voxels, strict=True)),
        lesions=None if listed is None else by_lesion(listed),
        previous=previous,
        previous_weights=weights,
        annotated=annotated,
        ignore_label=meta.ignore_label,
    )


def load_meta(folder: Path, name: str) -> CaseMeta:
    """Shape and voxel counts of a stored case.

    Raises:
        PlansError: The file is missing or does not have the schema this code reads.
    """
    return strict_json.load(CaseMeta, _file(folder, name, _META))


def list_cases(folder: Path) -> tuple[str, ...]:
    """Names of the finished cases, sorted."""
    names = (path.name.removesuffix(_DATA) for path in folder.glob(f"*{_DATA}"))
    return tuple(
        sorted(name for name in names if not name.startswith(".") and is_complete(folder, name))
    )


def is_complete(folder: Path, name: str) -> bool:
    """Whether the case is stored and its files are all there."""
    return all(
        _file(folder, name, suffix).is_file() for suffix in (_DATA, _TARGET, _FOREGROUND, _META)
    )


def _multiples(data: npt.NDArray[np.float32], steps: tuple[float, ...]) -> Any:
    """``data / steps``, rounded, as a Blosc2 array of the smallest type that holds it."""
    divisors = np.array(steps, np.float32).reshape(-1, 1, 1, 1)
    largest = max(
        max(-float(image.min()), float(image.max())) / step
        for image, step in zip(data, steps, strict=True)
    )
    dtype = next(t for t in (np.int16, np.int32, np.int64) if largest < np.iinfo(t).max - 1)
    array = _new_array(data.shape, dtype)
    for start in range(0, data.shape[1], _CHUNK[0]):  # chunk by chunk, to need little memory
        part = data[:, start : start + _CHUNK[0]] / divisors
        array[:, start : start + _CHUNK[0]] = np.rint(part, out=part).astype(dtype)
    return array


def _write_labels(
    path: Path, labels: npt.NDArray[np.int8], metadata: Mapping[str, str] | None = None
) -> None:
    with replacing(path, suffix=".b2nd") as temporary:
        array = _new_array(labels.shape, np.int8, metadata)
        array[:] = np.ascontiguousarray(labels)
        temporary.write_bytes(array.to_cframe())


def _new_array(
    shape: tuple[int, ...], dtype: type, metadata: Mapping[str, str] | None = None
) -> Any:
    """An empty Blosc2 array in memory: filled there and written at once, it is stored sooner."""
    blosc2 = _blosc2()
    # sorting bytes by their place in a number only slows what has one byte
    filters = [blosc2.Filter.SHUFFLE] if np.dtype(dtype).itemsize > 1 else [blosc2.Filter.NOFILTER]
    leading = (1,) * (len(shape) - 3)
    chunk = tuple(min(a, b) for a, b in zip(_CHUNK, shape[-3:], strict=True))
    block = tuple(min(a, b) for a, b in zip(_BLOCK, chunk, strict=True))
    return blosc2.empty(
        shape,
        dtype,
        contiguous=True,
        chunks=leading + chunk,
        blocks=leading + block,
        meta=dict(metadata or {}),
        cparams=blosc2.CParams(codec=blosc2.Codec.LZ4HC, clevel=1, filters=filters, nthreads=1),
    )


def _open_array(path: Path) -> Any:
    blosc2 = _blosc2()
    # one thread: patches are read by several processes at once
    dparams = blosc2.DParams(nthreads=1)
    return blosc2.open(str(path), mode="r", mmap_mode="r", dparams=dparams)


def _blosc2() -> Any:
    """The library; not imported above, as it loads a web client and listing cases needs none."""
    # Whatever an array's own parameters say, without this it starts and ends a thread for each
    # chunk that it writes, which takes as long as the compression.
    os.environ.setdefault("BLOSC_NTHREADS", "1")
    import blosc2

    return blosc2


def _file(folder: Path, name: str, suffix: str) -> Path:
    return folder / f"{name}{suffix}"
