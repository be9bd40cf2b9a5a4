"""What a dataset looks like: voxel sizes, shapes and foreground intensities.

Intensities are those of *all* foreground voxels of all cases, pooled; voxels with
the ignore label do not count as foreground. nnU-Net takes a sample in which each case weighs the
same; here a large bleed weighs more than a small one.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ichseg.errors import DatasetError, PlansError
from ichseg.files import replacing
from ichseg.model import strict_json
from ichseg.predict.crop import crop_box
from ichseg.scan import plausibility
from ichseg.scan.orientation import Box, orient_axes
from ichseg.wording import times
from training.data.dataset import (
    Case,
    Dataset,
    add_workspace_argument,
    describe_failure,
    is_ct,
    load_dataset,
    read_case,
)
from training.data.parallel import each_case, with_progress, workers_for
from training.data.sources import digest_sources
from training.data.workspace import fingerprint_file

SCHEMA_VERSION = 1
# Whole numbers within this are counted in a histogram; anything else is pooled voxel by voxel.
_HISTOGRAM_LIMIT = 2**31
# Peak of one worker: channels as they are stored, labels, masks and what is cut out; measured for
# one channel 9 bytes a voxel (int16) and 11 (float32).
_BYTES_PER_CHANNEL_VOXEL, _BYTES_PER_VOXEL, _BYTES_BESIDE = 6, 8, 200_000_000

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Intensities:
    """Foreground statistics of one channel, in the image's unit, over all cases.

    Attributes:
        voxels: How many foreground voxels there are.
        mean, deviation: Mean and standard deviation of the population, in float64.
        minimum, percentile_00_5, median, percentile_99_5, maximum: Percentiles as
            ``np.percentile`` interpolates them linearly.
    """

    voxels: int
    mean: float
    deviation: float
    minimum: float
    percentile_00_5: float
    median: float
    percentile_99_5: float
    maximum: float


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What planning needs to know of a dataset; one entry per labelled case, in order of names.

    Attributes:
        schema_version: Version of this layout.
        names: Names of the cases.
        spacings_mm: Voxel sizes ``(z, y, x)`` in LPS order.
        shapes: Voxels ``(z, y, x)`` after cropping to nonzero.
        relative_size: Median over cases of voxels after over voxels before the crop.
        intensities: One per channel.
        sources: Digest of the files that it was measured in, see ``digest_sources``; empty if it
            was made by hand.
        head_shapes: Voxels ``(z, y, x)`` after cutting to the head, see ``Plans.crop``; empty
            unless every channel is CT.
        beyond_head: Foreground voxels that such a cut would lose; empty like ``head_shapes``.
        ignore_label: The label whose voxels were no foreground; None if there is none.
    """

    schema_version: int
    names: tuple[str, ...]
    spacings_mm: tuple[tuple[float, float, float], ...]
    shapes: tuple[tuple[int, int, int], ...]
    relative_size: float
    intensities: tuple[Intensities, ...]
    sources: str = ""
    head_shapes: tuple[tuple[int, int, int], ...] = strict_json.optional(())
    beyond_head: tuple[int, ...] = strict_json.optional(())
    ignore_label: int | None = strict_json.optional(None)

    def __post_init__(self) -> None:
        strict_json.check_schema("fingerprint", self.schema_version, SCHEMA_VERSION)
        if not len(self.names) == len(self.spacings_mm) == len(self.shapes):
            raise ValueError(
                f"{len(self.names)} names, {len(self.spacings_mm)} spacings, "
                f"{len(self.shapes)} shapes"
            )


@dataclass(frozen=True, slots=True)
class Counts:
    """How often each value occurs; ``values`` are ascending and distinct."""

    values: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _CaseFacts:
    spacing_mm: tuple[float, float, float]
    shape: tuple[int, int, int]
    head_shape: tuple[int, int, int]
    beyond_head: int
    relative_size: float
    foreground: tuple[Counts | npt.NDArray[np.float64], ...]  # of each channel


def compute_fingerprint(dataset: Dataset, workers: int | None, sources: str = "") -> Fingerprint:
    """Read every labelled case once, in parallel.

    Args:
        dataset: The cases.
        workers: How many processes to run; None for as many as cores and memory allow.
        sources: Digest of the cases' files, to be kept with the result.

    Raises:
        DatasetError: Cases cannot be read (each is logged), or none has foreground.
    """
    cases = dataset.labelled
    if not cases:
        raise DatasetError(f"dataset {dataset.name}: no case has a reference segmentation")
    if workers is None:
        images = [case.images[0] for case in cases]  # all channels are of one size
        per_voxel = _BYTES_PER_CHANNEL_VOXEL * len(dataset.channels) + _BYTES_PER_VOXEL
        workers = workers_for(images, per_voxel, _BYTES_BESIDE)
    in_hu = all(is_ct(channel) for channel in dataset.channels)
    facts: dict[str, _CaseFacts] = {}
    failures = []
    shared = (dataset.labels, dataset.ignore_label, in_hu)
    results = each_case(_examine, cases, *shared, workers=workers)
    for case, found in with_progress(results, len(cases), "fingerprint"):
        if isinstance(found, Exception):
            failures.append(describe_failure(case, found))
            _log.error("%s", failures[-1])
        else:
            facts[case.name] = found
    if failures:
        raise DatasetError(
            f"{len(failures)} of {len(cases)} cases failed, the first: {failures[0]}"
        )
    ordered = [facts[case.name] for case in cases]
    return Fingerprint(
        schema_version=SCHEMA_VERSION,
        names=tuple(case.name for case in cases),
        spacings_mm=tuple(fact.spacing_mm for fact in ordered),
        shapes=tuple(fact.shape for fact in ordered),
        relative_size=float(np.median([fact.relative_size for fact in ordered])),
        intensities=tuple(
            summarise([fact.foreground[channel] for fact in ordered], f"channel {name}")
            for channel, name in enumerate(dataset.channels)
        ),
        sources=sources,
        head_shapes=tuple(fact.head_shape for fact in ordered) if in_hu else (),
        beyond_head=tuple(fact.beyond_head for fact in ordered) if in_hu else (),
        ignore_label=dataset.ignore_label,
    )


def load_fingerprint(workspace: Path) -> Fingerprint:
    """Read ``WORKSPACE/fingerprint.json``.

    Raises:
        PlansError: Missing, damaged, or of another schema.
    """
    return strict_json.load(Fingerprint, fingerprint_file(workspace))


def load_or_compute(
    workspace: Path,
    dataset: Dataset,
    workers: int | None,
    *,
    heads: bool = False,
    keep: bool = True,
) -> Fingerprint:
    """The stored fingerprint if the files are those it was made of; otherwise a new one.

    Args:
        workspace: Where the fingerprint is stored.
        dataset: The cases.
        workers: How many processes read them, if need be; None as in ``compute_fingerprint``.
        heads: Whether one from a version that did not look for heads will not do.
        keep: Store a new fingerprint; otherwise nothing is written.
    """
    path = fingerprint_file(workspace)
    # before the files are read: a change meanwhile is noticed
    sources = digest_sources(workspace, dataset, remember=keep)
    if path.exists():
        try:
            fingerprint = load_fingerprint(workspace)
        except PlansError as error:
            _log.warning("%s; computed again", error)
        else:
            if not _is_of(fingerprint, dataset, sources):
                what = "cases" if fingerprint.ignore_label == dataset.ignore_label else "labels"
                _log.warning("%s: the %s have changed since; computed again", path, what)
            elif heads and not fingerprint.head_shapes:
                _log.warning("%s: does not say where heads are; computed again", path)
            else:
                return fingerprint
    fingerprint = compute_fingerprint(dataset, workers, sources)
    if keep:
        with replacing(path) as temporary:
            temporary.write_text(strict_json.dumps(fingerprint), encoding="utf-8")
    return fingerprint


def _is_of(fingerprint: Fingerprint, dataset: Dataset, sources: str) -> bool:
    names = tuple(case.name for case in dataset.labelled)
    if (fingerprint.names, len(fingerprint.intensities)) != (names, len(dataset.channels)):
        return False
    if not fingerprint.sources:  # made by hand
        return True
    return (fingerprint.sources, fingerprint.ignore_label) == (sources, dataset.ignore_label)


def count_values(values: npt.NDArray[np.generic]) -> Counts | npt.NDArray[np.float64]:
    """A histogram when all values are whole numbers (as in CT), else the values in float64.

    Either way nothing is rounded: statistics of the result equal those of the values.
    """
    if values.size == 0:
        return Counts(np.empty(0), np.empty(0, np.int64))
    low, high = values.min(), values.max()
    whole = values.dtype.kind in "iub" or bool(np.array_equal(values, np.rint(values)))
    if not whole or max(abs(float(low)), abs(float(high))) > _HISTOGRAM_LIMIT:
        return values.astype(np.float64)
    if float(high) - float(low) < max(1 << 16, values.size):
        occurrences = np.bincount(values.astype(np.int64) - int(low))
        present = np.flatnonzero(occurrences)
        return Counts((present + int(low)).astype(np.float64), occurrences[present])
    found, occurrences = np.unique(values.astype(np.int64), return_counts=True)
    return Counts(found.astype(np.float64), occurrences)


def summarise(
    parts: Sequence[Counts | npt.NDArray[np.float64]], where: str = "foreground"
) -> Intensities:
    """Statistics of the pooled parts.

    Raises:
        DatasetError: There are no values at all.
    """
    counted = [part for part in parts if isinstance(part, Counts)]
    if len(counted) == len(parts):
        return _summarise_counts(_merge(counted), where)
    pooled = np.concatenate(
        [
            np.repeat(part.values, part.counts) if isinstance(part, Counts) else part
            for part in parts
        ]
    )
    low, middle, high = (float(v) for v in np.percentile(pooled, (0.5, 50.0, 99.5)))
    return Intensities(
        voxels=int(pooled.size),
        mean=float(pooled.mean()),
        deviation=float(pooled.std()),
        minimum=float(pooled.min()),
        percentile_00_5=low,
        median=middle,
        percentile_99_5=high,
        maximum=float(pooled.max()),
    )


def percentile_of_counts(counts: Counts, percent: float) -> float:
    """``np.percentile(values, percent)``, linear, of values known by how often each occurs."""
    total = int(counts.counts.sum())
    upto = np.cumsum(counts.counts)
    rank = (total - 1) * (percent / 100)
    below = int(np.floor(rank))
    fraction = rank - below
    a, b = (
        float(counts.values[np.searchsorted(upto, min(i, total - 1), side="right")])
        for i in (below, below + 1)
    )
    # the two forms numpy uses, so that rounding is the same too
    return b - (b - a) * (1 - fraction) if fraction >= 0.5 else a + (b - a) * fraction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the ``fingerprint`` command."""
    add_workspace_argument(parser)
    parser.add_argument(
        "--workers", type=int, help="parallel processes [one a core, as far as memory suffices]"
    )


def main(args: argparse.Namespace) -> int:
    """Run the ``fingerprint`` command."""
    started = time.monotonic()
    dataset = load_dataset(args.workspace)
    fingerprint = load_or_compute(args.workspace, dataset, args.workers)
    spacing = times(np.median(fingerprint.spacings_mm, axis=0), digits=4)
    shape = times(np.median(fingerprint.shapes, axis=0), digits=4)
    sys.stdout.write(
        f"{len(fingerprint.names)} cases in {time.monotonic() - started:.1f} s: "
        f"median spacing {spacing} mm, median shape {shape} (z x y x x)\n"
    )
    for channel, found in zip(dataset.channels, fingerprint.intensities, strict=True):
        sys.stdout.write(
            f"{channel} foreground: {found.voxels} voxels, mean {found.mean:.2f}, deviation "
            f"{found.deviation:.2f}, 0.5 % {found.percentile_00_5:.2f}, median {found.median:.2f}, "
            f"99.5 % {found.percentile_99_5:.2f}\n"
        )
    return 0


def _examine(
    case: Case, labels: Sequence[str], ignore_label: int | None, in_hu: bool
) -> _CaseFacts:
    """Read one case, bring it to LPS, crop it, take its foreground; find the head in HU."""
    images, reference = read_case(case, labels, ignore_label)
    for image, path in zip(images, case.images, strict=True):
        if in_hu and plausibility.is_offset(image, path):
            raise DatasetError(
                f"{path}: {plausibility.OFFSET_HU} is added to HU, which inference would take off; "
                "take it off all images before training"
            )
    axes = orient_axes(images[0])
    stack = [axes.apply(image.voxels) for image in images]
    label = axes.apply(reference.voxels)
    foreground = np.greater(label, 0)
    if ignore_label is not None:
        foreground &= label != ignore_label
    spacing = tuple(images[0].spacing_mm[axis] for axis in axes.permutation)
    box = crop_box(stack, spacing, "nonzero")
    crop = _index(box)
    head = crop_box(stack, spacing, "head") if in_hu else box
    return _CaseFacts(
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
        shape=_size(box),
        head_shape=_size(head),
        beyond_head=int(foreground[crop].sum() - foreground[_index(head)].sum()),
        relative_size=label[crop].size / label.size,
        foreground=tuple(count_values(channel[crop][foreground[crop]]) for channel in stack),
    )


def _index(box: Box) -> tuple[slice, slice, slice]:
    z, y, x = (slice(*bounds) for bounds in box)
    return z, y, x


def _size(box: Box) -> tuple[int, int, int]:
    z, y, x = (stop - start for start, stop in box)
    return z, y, x


def _merge(parts: Iterable[Counts]) -> Counts:
    values = np.concatenate([part.values for part in parts])
    counts = np.concatenate([part.counts for part in parts])
    distinct, which = np.unique(values, return_inverse=True)
    merged = np.zeros(len(distinct), np.int64)
    np.add.at(merged, which, counts)
    return Counts(distinct, merged)


def _summarise_counts(counts: Counts, where: str) -> Intensities:
    total = int(counts.counts.sum())
    if total == 0:
        raise DatasetError(f"{where}: no foreground voxel in any case")
    mean = float(np.dot(counts.values, counts.counts)) / total
    variance = float(np.dot((counts.values - mean) ** 2, counts.counts)) / total
    return Intensities(
        voxels=total,
        mean=mean,
        deviation=variance**0.5,
        minimum=float(counts.values[0]),
        percentile_00_5=percentile_of_counts(counts, 0.5),
        median=percentile_of_counts(counts, 50.0),
        percentile_99_5=percentile_of_counts(counts, 99.5),
        maximum=float(counts.values[-1]),
    )
