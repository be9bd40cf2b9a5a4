"""What one case of a dataset shows: whether its files can be read, and fit one another.

Geometry is compared with the first channel's, which every later step goes by. What differs by no
more than rounding is equal; what differs by little is an error that a new header mends; what
differs by more may be another scan, and is for a person to look at.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ichseg.errors import InputError
from ichseg.scan import plausibility, volume
from ichseg.scan.volume import Volume
from ichseg.wording import counted, times
from training.data.dataset import Case

ERROR, WARNING = "error", "warning"
PLAUSIBLE_SPACING_MM = (0.05, 20.0)
# More values than this are intensities, not labels.
_MOST_LABELS = 1000


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far two geometries may differ.

    Attributes:
        spacing: Largest relative difference of the voxel size along any axis.
        origin: Largest distance along any axis between the first voxels' positions, as a fraction
            of the finest spacing.
        direction: Largest difference of any direction cosine.
    """

    spacing: float
    origin: float
    direction: float


# A NIfTI quaternion in float32 gives cosines to about 6e-4 where its first number, which is not
# stored, is near 0. Headers rounded to two or three decimals stay within the second limits.
EQUAL = Tolerance(spacing=1e-4, origin=0.01, direction=1e-3)
REPAIRABLE = Tolerance(spacing=1e-2, origin=0.1, direction=1e-2)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or odd.

    Attributes:
        severity: ``error`` or ``warning``.
        case: Name of the case; ``-`` where the dataset as a whole is concerned.
        file: The file, relative to the workspace; ``-`` where none in particular is concerned.
        text: What was found and what was expected.
        repairable: Whether a new header mends it.
    """

    severity: str
    case: str
    file: str
    text: str
    repairable: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """Size and place of a volume; the fields are those of ``Volume`` with these names."""

    shape: tuple[int, ...]
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    direction: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What one readable file is like.

    Attributes:
        file: The file, relative to the workspace.
        grid: Its size and place.
        digest: Equal for equal voxels in equal shape, whatever their type; None if all voxels are
            equal, for those tell nothing.
    """

    file: str
    grid: Grid
    digest: str | None


@dataclass(frozen=True, slots=True)
class CaseFacts:
    """What one case showed.

    Attributes:
        name: Name of the case.
        findings: All that is wrong or odd, in the order of the case's files.
        images, label: What the files are like that could be read.
        present: Those of the declared labels that occur.
    """

    name: str
    findings: tuple[Finding, ...]
    images: tuple[FileFacts, ...]
    label: FileFacts | None
    present: tuple[int, ...]

    @property
    def files(self) -> tuple[FileFacts, ...]:
        """What its images and, last, its label are like."""
        return (*self.images, *([self.label] if self.label is not None else []))


def examine_case(
    case: Case,
    workspace: Path,
    labels: Sequence[str],
    ignore_label: int | None = None,
    in_hu: bool = False,
) -> CaseFacts:
    """Read each file of a case once, one at a time, and check all that a case alone can show.

    Args:
        case: The case.
        workspace: Where file names are relative to.
        labels: Names by voxel value.
        ignore_label: A further value that references may have, see ``Dataset``.
        in_hu: Whether every channel is CT, so that inference holds scans against what HU look like.
    """
    findings: list[Finding] = []
    images: list[FileFacts] = []
    first: FileFacts | None = None
    for path in case.images:
        found, facts = _examine_image(path, case.name, workspace, first, in_hu=in_hu)
        findings += found
        if facts is not None:
            first = first or facts
            images.append(facts)
    label: FileFacts | None = None
    present: tuple[int, ...] = ()
    if case.label is None:
        text = "no reference segmentation: the case is not trained on"
        findings.append(Finding(WARNING, case.name, "-", text))
    else:
        found, label, present = _examine_label(
            case.label, case.name, workspace, first, labels, ignore_label
        )
        findings += found
    if first is not None and first.file != shown(case.images[0], workspace):
        # the geometry to go by cannot be read, so there is none to mend the others with
        findings = [dataclasses.replace(finding, repairable=False) for finding in findings]
    return CaseFacts(case.name, tuple(findings), tuple(images), label, present)


def grid_of(found: Volume) -> Grid:
    """A volume's size and place."""
    return Grid(found.voxels.shape, found.spacing_mm, found.origin_mm, found.direction)


def compare(found: Grid, expected: Grid) -> Iterator[tuple[str, bool]]:
    """How a grid differs from another beyond ``EQUAL``.

    Yields:
        Each difference in words, and whether a new header may mend it: all are ``REPAIRABLE``.
    """
    if found.shape != expected.shape:
        yield f"size {times(found.shape)}, expected {times(expected.shape)}", False
        return  # of another grid, the place is beside the point
    sizes = np.array(expected.spacing_mm)
    differences = (
        (
            "spacing",
            found.spacing_mm,
            expected.spacing_mm,
            np.max(np.abs(np.array(found.spacing_mm) - sizes) / sizes),
        ),
        (
            "origin",
            found.origin_mm,
            expected.origin_mm,
            np.max(np.abs(np.subtract(found.origin_mm, expected.origin_mm))) / sizes.min(),
        ),
        (
            "direction",
            found.direction,
            expected.direction,
            np.max(np.abs(np.subtract(found.direction, expected.direction))),
        ),
    )
    small = all(distance <= getattr(REPAIRABLE, what) for what, _, _, distance in differences)
    for what, here, there, distance in differences:
        if not distance <= getattr(EQUAL, what):
            yield f"{what} {_numbers(here)}, expected {_numbers(there)}", small


def shown(path: Path, workspace: Path) -> str:
    """How the table names a file: relative to the workspace where it lies inside."""
    return str(path.relative_to(workspace) if path.is_relative_to(workspace) else path)


def _examine_image(
    path: Path, case: str, workspace: Path, first: FileFacts | None, *, in_hu: bool
) -> tuple[list[Finding], FileFacts | None]:
    file = shown(path, workspace)
    try:
        read = _read(path)
    except InputError as error:
        return [Finding(ERROR, case, file, str(error).removeprefix(f"{path}: "))], None
    digest, low, not_finite = _scan(read.voxels)
    facts = FileFacts(file, grid_of(read), digest)
    findings = _place_findings(facts, case, first)
    if not_finite:
        findings.append(Finding(ERROR, case, file, not_finite))
    elif digest is None:
        findings.append(Finding(WARNING, case, file, f"all voxels are {low:g}"))
    elif in_hu and plausibility.is_offset(read, path):
        text = f"{plausibility.OFFSET_HU} is added to HU, which inference would take off"
        findings.append(Finding(ERROR, case, file, f"{text}; expected HU"))
    return findings, facts


def _examine_label(
    path: Path,
    case: str,
    workspace: Path,
    first: FileFacts | None,
    labels: Sequence[str],
    ignore_label: int | None,
) -> tuple[list[Finding], FileFacts | None, tuple[int, ...]]:
    file = shown(path, workspace)
    try:
        read = _read(path)
    except InputError as error:
        return [Finding(ERROR, case, file, str(error).removeprefix(f"{path}: "))], None, ()
    digest, _, not_finite = _scan(read.voxels)
    facts = FileFacts(file, grid_of(read), digest)
    findings = _place_findings(facts, case, first)
    if not_finite:
        findings.append(Finding(ERROR, case, file, not_finite))
    counts = _count_values(read.voxels)
    values = range(len(labels) if ignore_label is None else ignore_label + 1)
    declared = f"expected whole labels 0..{values[-1]}"
    if counts is None:
        text = f"more than {_MOST_LABELS} different values, {declared}; is it an image?"
        findings.append(Finding(ERROR, case, file, text))
        return findings, facts, ()
    undeclared = sorted(value for value in counts if value not in values)
    if undeclared:
        voxels = sum(counts[value] for value in undeclared)
        text = f"{voxels} voxels have values {_some(undeclared)}, {declared}"
        findings.append(Finding(ERROR, case, file, text))
    present = tuple(label for label in range(len(labels)) if label in counts)
    if counts.keys() <= {0}:
        findings.append(Finding(WARNING, case, file, "empty: no voxel but background"))
    elif counts.keys() == {ignore_label}:
        text = f"all voxels are {ignore_label}, which is left out: nothing is learnt from the case"
        findings.append(Finding(WARNING, case, file, text))
    elif counts.keys() == {0, ignore_label}:
        text = f"no voxel but background and {ignore_label}, which is left out"
        findings.append(Finding(WARNING, case, file, text))
    return findings, facts, present


def _read(path: Path) -> Volume:
    """Read as ``volume.read`` does, but let values that are not finite pass, to be counted."""
    channels = volume.read_channels(path)
    if len(channels) != 1:
        raise InputError(f"{path}: {len(channels)} channels in one file, expected one")
    return channels[0]


def _place_findings(facts: FileFacts, case: str, first: FileFacts | None) -> list[Finding]:
    """Check the spacing of a case's first file, and that its other files lie upon the first."""
    if first is not None:
        return [
            Finding(ERROR, case, facts.file, f"{text} as {first.file}", repairable)
            for text, repairable in compare(facts.grid, first.grid)
        ]
    low, high = PLAUSIBLE_SPACING_MM
    if all(low <= size <= high for size in facts.grid.spacing_mm):
        return []
    text = f"spacing {_numbers(facts.grid.spacing_mm)} mm, expected {low:g} to {high:g}; which unit"
    return [Finding(ERROR, case, facts.file, f"{text} is it in?")]


def _scan(voxels: npt.NDArray[np.generic]) -> tuple[str | None, float, str]:
    """Digest (None if all voxels are equal), smallest value, and what is not finite, in words.

    Slice by slice, so that little more than the voxels is in memory.
    """
    digest = hashlib.blake2b(repr(voxels.shape).encode(), digest_size=16)
    low, high, bad = np.inf, -np.inf, 0
    for plane in voxels:
        values = plane.astype(np.float64) + 0.0  # so that -0.0 becomes 0.0
        digest.update(values)
        finite = np.isfinite(values)
        bad += values.size - int(np.count_nonzero(finite))
        low = min(low, float(np.min(values, where=finite, initial=np.inf)))
        high = max(high, float(np.max(values, where=finite, initial=-np.inf)))
    return (
        None if low == high and not bad else digest.hexdigest(),
        low,
        f"NaN or infinite in {counted(bad, 'voxel')}" if bad else "",
    )


def _count_values(voxels: npt.NDArray[np.generic]) -> dict[float, int] | None:
    """How many voxels have each finite value; None if there are too many values for labels."""
    counts: dict[float, int] = {}
    for plane in voxels:
        values, occurrences = np.unique(plane[np.isfinite(plane)], return_counts=True)
        for value, occurrence in zip(values.tolist(), occurrences.tolist(), strict=True):
            counts[value] = counts.get(value, 0) + occurrence
        if len(counts) > _MOST_LABELS:
            return None
    return counts


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.7g}" for value in values)


def _some(values: Sequence[float]) -> str:
    """The first few values, in words."""
    listed = ", ".join(f"{value:g}" for value in itertools.islice(values, 5))
    return f"{listed}, ..." if len(values) > 5 else listed
