"""How bleeds changed from one scan of a patient to the next: in all, and lesion by lesion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage, sparse
from scipy.sparse import csgraph

from ichseg.pieces import CONNECTED
from ichseg.predict import components
from ichseg.predict.components import Point
from ichseg.scan.orientation import nonzero_box
from ichseg.scan.register import Alignment, onto
from ichseg.scan.volume import Volume

EXPANSION_ML = 6.0
EXPANSION_PERCENT = 33.0
SOURCE = "Dowlatshahi et al., Neurology 2011;76:1238-1244"
DEFINITION = (
    f"Growth of an intracerebral haematoma by more than {EXPANSION_ML:g} mL or by more than "
    f"{EXPANSION_PERCENT:g} % is commonly called haematoma expansion ({SOURCE})."
)
_OUTSIDE = 0.1  # of a lesion, from which on a scan that ends there does not show it
TOLERANCE_MM = 3.0  # by which the scans may lie beside each other, and thick slices blur an edge

Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Change:
    """A volume before and after.

    Attributes:
        before_ml: The volume in the first scan.
        after_ml: The volume in the second scan.
    """

    before_ml: float
    after_ml: float

    @property
    def growth_ml(self) -> float:
        """How much larger it is; negative where it is smaller."""
        return self.after_ml - self.before_ml

    @property
    def growth_percent(self) -> float | None:
        """The growth as a share of the first volume; None where there was nothing."""
        return 100 * self.growth_ml / self.before_ml if self.before_ml > 0 else None

    @property
    def is_new(self) -> bool:
        """Whether there is a bleed where none was."""
        return self.before_ml == 0 < self.after_ml

    @property
    def expansion(self) -> tuple[str, ...]:
        """Which limits of haematoma expansion are passed, in words; none if there is none.

        The usual definition is growth by more than 6 mL or by more than 33 % of an intracerebral
        haematoma that was there before (see ``SOURCE``). A bleed where none was is new, and is not
        judged by it.
        """
        percent = self.growth_percent
        if percent is None:
            return ()
        passed = []
        if self.growth_ml > EXPANSION_ML:
            passed.append(f"{self.growth_ml:.1f} mL are more than {EXPANSION_ML:g} mL")
        if percent > EXPANSION_PERCENT:
            passed.append(f"{percent:.0f} % are more than {EXPANSION_PERCENT:g} %")
        return tuple(passed)


@dataclass(frozen=True, slots=True)
class LesionChange:
    """One lesion in both scans: several pieces where it split or grew together.

    Attributes:
        before: The numbers of its pieces in the first scan, counted from 1, the largest.
        after: The numbers of its pieces in the second scan, likewise.
        change: The volumes of all these pieces.
        centroid_mm: The middle of its largest piece, in the first scan's place; ``(x, y, z)`` in
            mm, LPS.
        in_both: Whether both scans cover it; where one of them ends before it, or a tenth of it
            lies beyond, the volumes say nothing of growth.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    change: Change
    centroid_mm: Point
    in_both: bool

    @property
    def state(self) -> str:
        """``new``, ``gone``, ``larger``, ``smaller``, or ``same`` to a hundredth of a mL.

        Or ``not covered`` by one of the scans.
        """
        if not self.in_both:
            return "not covered"
        if not self.before:
            return "new"
        if not self.after:
            return "gone"
        growth = round(self.change.growth_ml, 2)
        return "same" if growth == 0 else "larger" if growth > 0 else "smaller"


def compare_lesions(
    before: Volume, after: Volume, scans: tuple[Volume, Volume], alignment: Alignment
) -> tuple[LesionChange, ...]:
    """Pair the lesions of two scans, the largest first.

    Pieces belong together if they lie on each other, or within 3 mm, once one scan is brought onto
    the other. Both grids are asked, as a thin piece may lie between the slices of one of them.
    Volumes are each measured in the scan's own grid.

    Args:
        before: The mask of the first scan; everything but 0 is a lesion.
        after: The mask of the second scan, likewise.
        scans: Both scans, in HU.
        alignment: How the second lies on the first.
    """
    first, second = (
        components.lesions((mask.voxels != 0).astype(np.uint8), scan)
        for mask, scan in zip((before, after), scans, strict=True)
    )
    numbered = before.with_voxels(_numbered(before)), after.with_voxels(_numbered(after))
    back = alignment.inverse
    laid, laid_back = (
        onto(*numbered, alignment, labels=True),
        onto(*numbered[::-1], back, labels=True),
    )
    pairs = _touching(numbered[0], laid)
    pairs |= {(a, b) for b, a in _touching(numbered[1], laid_back)}
    beyond = _beyond(*numbered, alignment), _beyond(*numbered[::-1], back)
    found = [
        LesionChange(
            before=of_first,
            after=of_second,
            change=Change(
                sum(first[number - 1].volume_ml for number in of_first),
                sum(second[number - 1].volume_ml for number in of_second),
            ),
            centroid_mm=first[of_first[0] - 1].centroid_mm
            if of_first
            else alignment.to_first(second[of_second[0] - 1].centroid_mm),
            in_both=beyond[0].isdisjoint(of_first) and beyond[1].isdisjoint(of_second),
        )
        for of_first, of_second in _groups(pairs, len(first), len(second))
    ]
    return tuple(sorted(found, key=lambda each: -max(each.change.before_ml, each.change.after_ml)))


def _numbered(mask: Volume) -> Numbers:
    """The mask's pieces, 1 the largest, as ``components.lesions`` lists them."""
    pieces, count = ndimage.label(mask.voxels != 0, CONNECTED)
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)[1:]
    order = np.argsort(-sizes, kind="stable")
    names = np.zeros(count + 1, np.int32)
    names[1 + order] = np.arange(1, count + 1)
    result: Numbers = names[pieces]
    return result


def _touching(one: Volume, other: Volume) -> set[tuple[int, int]]:
    """Which numbered pieces of one grid lie on each other, or within the tolerance."""
    first, second = (np.asarray(volume.voxels, np.int32) for volume in (one, other))
    if not (first.any() and second.any()):
        return set()
    margin = [int(np.ceil(TOLERANCE_MM / step)) for step in one.spacing_mm]
    box = nonzero_box([first, second])
    where = tuple(
        slice(max(0, low - more), high + more)
        for (low, high), more in zip(box, margin, strict=True)
    )
    first, second = first[where], second[where]
    distance, nearest = ndimage.distance_transform_edt(
        first == 0, sampling=one.spacing_mm, return_indices=True
    )
    near = (second > 0) & (distance <= TOLERANCE_MM)
    pairs = np.stack([first[tuple(nearest)][near], second[near]])
    return {(int(a), int(b)) for a, b in np.unique(pairs, axis=1).T}


def _beyond(numbered: Volume, other: Volume, alignment: Alignment) -> set[int]:
    """Which numbered pieces, or a tenth of them, lie where the other scan does not reach."""
    every = other.with_voxels(np.ones(other.voxels.shape, np.uint8))
    outside = onto(numbered, every, alignment, labels=True).voxels == 0
    numbers = np.asarray(numbered.voxels, np.int32)
    sizes = np.bincount(numbers.ravel())
    lost = np.bincount(numbers[outside], minlength=len(sizes))
    return {int(n) for n in np.flatnonzero(lost >= _OUTSIDE * sizes) if n > 0 and sizes[n]}


def _groups(
    pairs: set[tuple[int, int]], before: int, after: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Numbers of pieces before and after that belong together, by one pair or over several."""
    rows = [a - 1 for a, _ in pairs]
    columns = [before + b - 1 for _, b in pairs]
    size = before + after
    graph = sparse.coo_array((np.ones(len(pairs)), (rows, columns)), shape=(size, size))
    count, group = csgraph.connected_components(graph, directed=False)
    return [
        (
            tuple(i + 1 for i in range(before) if group[i] == number),
            tuple(i + 1 for i in range(after) if group[before + i] == number),
        )
        for number in range(count)
    ]
