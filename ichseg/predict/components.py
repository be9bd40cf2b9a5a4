"""After the networks: rules about connected components, and a table of what was found.

Components are 26-connected: voxels that share a face, an edge or a corner belong together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ichseg.engine.arrays import slabs
from ichseg.model.rules import ComponentRule
from ichseg.scan.volume import Volume

Labels = npt.NDArray[np.uint8]
Point = tuple[float, float, float]
_CONNECTED = np.ones((3, 3, 3), bool)
SCORED_ML = 0.2  # of the case's score
# Specks at the inner table: smaller, thinner and less sure than these, and mostly beside bone.
SPECK_ML, SPECK_MM, SPECK_PROBABILITY, BESIDE_BONE_MM = 2.0, 5.0, 0.8, 4.0
_BONE_HU, _LEAST_BONE_ML = 250, 50.0  # a skull is several hundred mL
_MOST_SPECKS = 100  # that are looked at; noise has hundreds of thousands
_SLAB_VOXELS = 300_000  # looked at together: arrays of 8 bytes a voxel are made of them


@dataclass(frozen=True, slots=True)
class Lesion:
    """One component. Positions are ``(x, y, z)`` in mm, LPS, as in DICOM and ITK.

    That is: x grows to the patient's left, y to the back, z to the head.

    Attributes:
        label: The component's label.
        volume_ml: The component's volume.
        centroid_mm: The mean position of its voxels' centres.
        box_mm: The lowest and the highest corner of a box along the patient's axes around its
            voxels to their outer faces; the smallest such box, or a larger one where the scan is
            oblique.
        mean_hu: The mean intensity of the scan within it.
        mean_probability: The mean, over its voxels, of the probability that a voxel is anything but
            background; None where that is not known.
        max_probability: The highest of these probabilities.
    """

    label: int
    volume_ml: float
    centroid_mm: Point
    box_mm: tuple[Point, Point]
    mean_hu: float
    mean_probability: float | None = None
    max_probability: float | None = None


@dataclass(frozen=True, slots=True)
class Segmentation:
    """What was found.

    Attributes:
        mask: Labels, uint8, in the geometry of the input volume.
        volume_ml: Total volume of all foreground labels.
        ran: What was computed: preset, networks, mirrorings, tiles, engine.
        seconds: Wall time of preparation, compilation, prediction and restoration.
        disagreement: How much the networks disagree about the foreground: the mean, over networks,
            of 1 - Dice of what one of them found and what all of its configuration did together. It
            is 0 where all agree, also that there is none, and None where no configuration ran two.
            Component rules are not applied before.
        warnings: Anything a reader of the result should know.
        foreground: The probability that a voxel is anything but background, in steps of 1/255,
            uint8 in the shape of the mask; component rules do not touch it.
        case_score: How sure it is that there is anything at all, 0 to 1, see ``case_score``.
        lesions: The connected pieces of the mask, the largest first.
        probabilities: Where asked for, those of each label but the background, or of each region,
            ``(labels, z, y, x)``: float16 from 0 to 1, or uint8 in steps of 1/255.
    """

    mask: Volume
    volume_ml: float
    ran: dict[str, object]
    seconds: dict[str, float]
    disagreement: float | None = None
    warnings: tuple[str, ...] = ()
    foreground: npt.NDArray[np.uint8] | None = None
    case_score: float | None = None
    lesions: tuple[Lesion, ...] = ()
    probabilities: npt.NDArray[np.float16] | npt.NDArray[np.uint8] | None = None


def case_score(foreground: Labels, voxel_ml: float) -> float:
    """How sure it is that there is anything at all, 0 to 1.

    It is the mean probability of the likeliest ``SCORED_ML``, wherever these voxels lie: high where
    a bleed of about that size or more is likely, low where only a few voxels are, and defined where
    the mask is empty, too.

    Args:
        foreground: The probability of anything but background in steps of 1/255, ``(z, y, x)``.
        voxel_ml: The volume of a voxel.
    """
    counts = np.zeros(256, np.int64)
    for rows in slabs(foreground.shape, _SLAB_VOXELS):
        counts += np.bincount(foreground[rows].ravel(), minlength=256)
    wanted = min(max(round(SCORED_ML / voxel_ml), 1), foreground.size)
    total, taken = 0, 0
    for step in range(255, 0, -1):
        more = min(int(counts[step]), wanted - taken)
        total += more * step
        taken += more
        if taken == wanted:
            break
    return total / wanted / 255


def speck_warning(
    labels: Labels, scan: Volume, foreground: Labels, found: Sequence[Lesion]
) -> str | None:
    """Words for a mask of which half or more looks like specks at the inner table of the skull.

    There partial volume, beam hardening and the dura are as dense as blood. A speck is thin, lies
    mostly beside bone, and no network is sure of it (docs/decisions/0017-confidence.md).

    Args:
        labels: ``(z, y, x)``, in the scan's grid; 0 is background.
        scan: The CT in HU, or in a window of them whose bone saturates.
        foreground: The probability of anything but background in steps of 1/255.
        found: The lesions of these labels.

    Returns:
        A warning; None if there are fewer specks, or no skull.
    """
    perhaps_ml = sum(each.volume_ml for each in found if _may_be_speck(each))
    if perhaps_ml < sum(each.volume_ml for each in found) / 2:
        return None  # as nearly always, and without the memory of what follows
    bone_hu = min(_BONE_HU, float(scan.voxels.max()) - 1)
    where = ndimage.find_objects((labels != 0).view(np.uint8))
    if not where or np.greater_equal(scan.voxels, bone_hu).sum() * scan.voxel_ml < _LEAST_BONE_ML:
        return None
    components, count = ndimage.label(labels[where[0]], _CONNECTED)
    likely = foreground[where[0]]
    sizes = np.zeros(count + 1, np.int64)
    for rows in slabs(components.shape, _SLAB_VOXELS):
        sizes += np.bincount(components[rows].ravel(), minlength=count + 1)
    sizes = sizes[1:]
    boxes = ndimage.find_objects(components)
    around = [int(np.ceil(BESIDE_BONE_MM / mm)) for mm in scan.spacing_mm]
    specks_ml, surest = 0.0, 0.0
    for index in np.argsort(-sizes, kind="stable")[:_MOST_SPECKS]:
        speck_ml = float(sizes[index]) * scan.voxel_ml
        inside = components[boxes[index]] == index + 1
        sure = float(likely[boxes[index]][inside].mean()) / 255
        if speck_ml >= SPECK_ML or sure >= SPECK_PROBABILITY:
            continue
        outer = tuple(
            slice(max(whole.start + part.start - more, 0), whole.start + part.stop + more)
            for whole, part, more in zip(where[0], boxes[index], around, strict=True)
        )
        before = [
            whole.start + part.start - wide.start
            for whole, part, wide in zip(where[0], boxes[index], outer, strict=True)
        ]
        bone = np.greater_equal(scan.voxels[outer], bone_hu)
        at = tuple(i + start for i, start in zip(np.nonzero(inside), before, strict=True))
        if _is_thin(inside, scan.spacing_mm) and _is_beside(bone, at, scan.spacing_mm):
            specks_ml += speck_ml
            surest = max(surest, sure)
    found_ml = float(sizes.sum()) * scan.voxel_ml
    if specks_ml < found_ml / 2 or not specks_ml:
        return None
    share = "all that was found" if specks_ml > 0.999 * found_ml else "most of what was found"
    return (
        f"{share} ({specks_ml:.2f} of {found_ml:.2f} mL) looks like specks at the inner table of "
        f"the skull: thin, beside bone, of a mean probability of {surest:.2f} at most; it may well "
        "be none"
    )


def _may_be_speck(lesion: Lesion) -> bool:
    sure = lesion.mean_probability
    return lesion.volume_ml < SPECK_ML and (sure is None or sure < SPECK_PROBABILITY)


def _is_thin(inside: npt.NDArray[np.bool_], spacing_mm: Sequence[float]) -> bool:
    """Whether a component is nowhere thicker than a speck."""
    reach = ndimage.distance_transform_edt(np.pad(inside, 1), sampling=spacing_mm).max()
    return bool(2 * reach - min(spacing_mm) <= SPECK_MM)


def _is_beside(
    bone: npt.NDArray[np.bool_],
    at: tuple[npt.NDArray[np.intp], ...],
    spacing_mm: Sequence[float],
) -> bool:
    """Whether half or more of the voxels ``at`` these indices lie beside bone."""
    if not bone.any():
        return False
    away = ndimage.distance_transform_edt(~bone, sampling=spacing_mm)[at]
    return bool((away <= BESIDE_BONE_MM).mean() >= 0.5)


def apply_rules(
    labels: Labels,
    rules: Sequence[ComponentRule],
    voxel_ml: float,
    foreground: Labels | None = None,
) -> Labels:
    """Labels ``(z, y, x)`` without what the rules drop; they are applied one after another.

    Args:
        labels: The labels found; they are left as they are.
        rules: The rules, each about one label.
        voxel_ml: The volume of a voxel.
        foreground: The probability of anything but background in steps of 1/255, for rules about
            it.

    Raises:
        ValueError: A rule is about probabilities, and these are not given.
    """
    result = labels.copy() if rules else labels
    for rule in rules:
        where = _box(result, rule.label)
        if where is None:
            continue
        part = result[where]
        components, count = ndimage.label(part == rule.label, _CONNECTED)
        sizes = np.zeros(count + 1, np.int64)
        for rows in slabs(components.shape, _SLAB_VOXELS):
            sizes += np.bincount(components[rows].ravel(), minlength=count + 1)
        sizes[0] = 0
        # a component of exactly the limit stays, though the product may err in its last digit
        keep = sizes * voxel_ml >= rule.drop_below_ml * (1 - 1e-9)
        if rule.keep_largest and count:
            keep &= np.arange(count + 1) == sizes.argmax()
        if rule.drop_below_probability:
            if foreground is None:
                raise ValueError("a rule about probabilities needs them")
            sums = _sums(components, foreground[where], count)
            keep &= sums / np.maximum(sizes, 1) >= 255 * rule.drop_below_probability
        keep[0] = True
        for rows in slabs(components.shape, _SLAB_VOXELS):
            part[rows][~keep[components[rows]]] = 0
    return result


def _sums(components: npt.NDArray[np.int32], values: Labels, count: int) -> npt.NDArray[np.float64]:
    """The sum of some values over each component, the background's first."""
    total = np.zeros(count + 1)
    for rows in slabs(components.shape, _SLAB_VOXELS):
        total += np.bincount(components[rows].ravel(), values[rows].ravel(), count + 1)
    return total


def lesions(labels: Labels, scan: Volume, foreground: Labels | None = None) -> tuple[Lesion, ...]:
    """Every component of every label, the largest first.

    Args:
        labels: ``(z, y, x)``, in the scan's grid; 0 is background.
        scan: The CT in HU.
        foreground: The probability of anything but background in steps of 1/255, if it is known.

    Raises:
        ValueError: The shapes differ.
    """
    if labels.shape != scan.voxels.shape:
        raise ValueError(f"labels have shape {labels.shape}, the scan {scan.voxels.shape}")
    found = []
    for label, where in enumerate(ndimage.find_objects(labels), start=1):
        if where is not None:
            inside = labels[where] == label
            chance = None if foreground is None else foreground[where]
            found += _of_label(label, inside, scan.voxels[where], chance, where, scan)
    return tuple(sorted(found, key=lambda lesion: -lesion.volume_ml))


def _of_label(
    label: int,
    inside: npt.NDArray[np.bool_],
    hu: npt.NDArray[np.generic],
    chance: Labels | None,
    where: tuple[slice, slice, slice],
    scan: Volume,
) -> list[Lesion]:
    """The components of one label, from its box in the scan."""
    components, count = ndimage.label(inside, _CONNECTED)
    sums = np.zeros((6, count + 1))  # voxels; z, y, x; HU; probability in steps
    most = np.zeros(count + 1, np.uint8)
    for rows in slabs(components.shape, _SLAB_VOXELS):
        at = np.nonzero(components[rows])
        of = components[rows][at]
        steps = of if chance is None else chance[rows][at]
        weights = (None, at[0] + rows.start, at[1], at[2], hu[rows][at], steps)
        if chance is not None:
            np.maximum.at(most, of, steps)
        for total, weight in zip(sums, weights, strict=True):
            total += np.bincount(of, weight, minlength=count + 1)
    voxels = sums[0, 1:]
    means = sums[1:, 1:] / voxels
    likely: list[tuple[float, ...]] = [()] * count
    if chance is not None:
        likely = list(zip((means[4] / 255).tolist(), (most[1:] / 255).tolist(), strict=True))
    corner = np.array([[part.start] for part in where])
    edges = [[(part.start, part.stop) for part in b] for b in ndimage.find_objects(components)]
    low, end = np.array(edges).transpose(2, 1, 0)  # each (3, n)
    centroids = _positions(means[:3] + corner, scan)
    middles = _positions((low + end - 1) / 2 + corner, scan)
    reach = abs(_steps(scan)) @ (end - low) / 2
    return [
        Lesion(label, size, _point(centroid), (_point(first), _point(last)), mean_hu, *probable)
        for size, centroid, first, last, mean_hu, probable in zip(
            (voxels * scan.voxel_ml).tolist(),
            centroids.T.tolist(),
            (middles - reach).T.tolist(),
            (middles + reach).T.tolist(),
            means[3].tolist(),
            likely,
            strict=True,
        )
    ]


def _steps(scan: Volume) -> npt.NDArray[np.float64]:
    """3x3; column j is the way from one voxel to the next along axis j, in mm."""
    steps: npt.NDArray[np.float64] = np.reshape(scan.direction, (3, 3)) * scan.spacing_mm
    return steps


def _positions(indices: npt.NDArray[np.float64], scan: Volume) -> npt.NDArray[np.float64]:
    """The positions of voxel indices in mm; both ``(3, n)`` in this project's order."""
    return np.array(scan.origin_mm)[:, None] + _steps(scan) @ indices


def _point(position: Sequence[float]) -> Point:
    """From this project's order to that of DICOM and ITK."""
    z, y, x = position
    return x, y, z


def _box(labels: Labels, label: int) -> tuple[slice, slice, slice] | None:
    """The box of a label, or None if it does not occur."""
    boxes = ndimage.find_objects(labels, max_label=label)
    where: tuple[slice, slice, slice] | None = boxes[label - 1]
    return where
