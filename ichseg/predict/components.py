"""After the networks: rules about connected components, and a table of what was found.

Components are 26-connected: voxels that share a face, an edge or a corner belong together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ichseg import ndimage, pieces
from ichseg.engine.arrays import slabs
from ichseg.model.rules import ComponentRule
from ichseg.pieces import Pieces
from ichseg.scan.volume import Volume

Labels = npt.NDArray[np.uint8]
Point = tuple[float, float, float]
SCORED_ML = 0.2  # of the case's score
# Specks at the inner table: smaller, thinner and less sure than these, and mostly beside bone.
SPECK_ML, SPECK_MM, SPECK_PROBABILITY, BESIDE_BONE_MM = 2.0, 5.0, 0.8, 4.0
DENSE_HU, THIN_HU = 150.0, 0.0  # on average; fresh blood has 50 to 100, old blood that of water
LARGE_ML = 500.0  # a skull holds about 1,500
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


@dataclass(frozen=True, slots=True, eq=False)
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


def doubts(
    labels: Labels, scan: Volume, foreground: Labels, found: Sequence[Lesion]
) -> tuple[str, ...]:
    """Why what was found in a CT may be none, one sentence each; see ``speck_warning``."""
    told = (
        size_warning(found),
        density_warning(found),
        speck_warning(labels, scan, foreground, found),
    )
    return tuple(warning for warning in told if warning is not None)


def size_warning(found: Sequence[Lesion]) -> str | None:
    """Words for more than a head can bleed: networks that were hardly trained mark everything."""
    found_ml = sum(lesion.volume_ml for lesion in found)
    if found_ml <= LARGE_ML:
        return None
    return (
        f"{found_ml:,.0f} mL were found, and no bleed within a skull is larger than "
        f"{LARGE_ML:.0f} mL: it may well be something else"
    )


def density_warning(found: Sequence[Lesion]) -> str | None:
    """Words for lesions of which half or more, by volume, are too dense for blood, or too thin.

    Networks that are given a few slices, or another part of the body, may take bone for it.

    Args:
        found: The lesions, with the mean HU of each.
    """
    found_ml = sum(lesion.volume_ml for lesion in found)
    for odd, perhaps in (
        (
            [lesion for lesion in found if lesion.mean_hu > DENSE_HU],
            "bone, contrast medium or metal",
        ),
        ([lesion for lesion in found if lesion.mean_hu < THIN_HU], "air or fat"),
    ):
        odd_ml = sum(lesion.volume_ml for lesion in odd)
        if odd and odd_ml >= found_ml / 2:
            mean_hu = sum(lesion.mean_hu * lesion.volume_ml for lesion in odd) / odd_ml
            return (
                f"{odd_ml:.2f} of {found_ml:.2f} mL that were found have {mean_hu:.0f} HU on "
                f"average, where blood has 50 to 100: it may well be {perhaps}"
            )
    return None


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
    if not found or perhaps_ml < sum(each.volume_ml for each in found) / 2:
        return None  # as nearly always, and without the memory of what follows
    bone_hu = min(_BONE_HU, float(scan.voxels.max()) - 1)
    if np.greater_equal(scan.voxels, bone_hu).sum() * scan.voxel_ml < _LEAST_BONE_ML:
        return None
    where = _box(labels)
    if where is None:
        return None
    every = pieces.measure(labels[where], 0, foreground=foreground[where])
    probabilities = every.mean_probability
    around = [int(np.ceil(BESIDE_BONE_MM / mm)) for mm in scan.spacing_mm]
    specks_ml, surest = 0.0, 0.0
    for index in np.argsort(-every.voxels, kind="stable")[:_MOST_SPECKS]:
        speck_ml = float(every.voxels[index]) * scan.voxel_ml
        sure = float(probabilities[index])
        if speck_ml >= SPECK_ML or sure >= SPECK_PROBABILITY:
            continue
        inside = pieces.one(labels[where], 0, every, index)
        box = [
            (whole.start + low, whole.start + end)
            for whole, low, end in zip(where, every.low[:, index], every.end[:, index], strict=True)
        ]
        outer = tuple(
            slice(max(low - more, 0), end + more)
            for (low, end), more in zip(box, around, strict=True)
        )
        before = [low - wide.start for (low, _), wide in zip(box, outer, strict=True)]
        bone = np.greater_equal(scan.voxels[outer], bone_hu)
        at = tuple(i + start for i, start in zip(np.nonzero(inside), before, strict=True))
        if _is_thin(inside, scan.spacing_mm) and _is_beside(bone, at, scan.spacing_mm):
            specks_ml += speck_ml
            surest = max(surest, sure)
    found_ml = float(every.voxels.sum()) * scan.voxel_ml
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
        if rule.drop_below_probability and foreground is None:
            raise ValueError("a rule about probabilities needs them")
        probability = None if foreground is None else foreground[where]
        found = pieces.measure(result[where], rule.label, foreground=probability)
        # a component of exactly the limit stays, though the product may err in its last digit
        kept = found.voxels * voxel_ml >= rule.drop_below_ml * (1 - 1e-9)
        if rule.keep_largest:
            kept &= np.arange(len(found)) == found.voxels.argmax()
        if rule.drop_below_probability:
            kept &= found.mean_probability >= rule.drop_below_probability
        pieces.keep(result[where], rule.label, found, kept)
    return result


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
            probability = None if foreground is None else foreground[where]
            every = pieces.measure(labels[where], label, scan.voxels[where], probability)
            found += _listed(label, every, where, scan, is_sure_known=probability is not None)
    return tuple(sorted(found, key=lambda lesion: -lesion.volume_ml))


def _listed(
    label: int,
    every: Pieces,
    where: tuple[slice, slice, slice],
    scan: Volume,
    *,
    is_sure_known: bool,
) -> list[Lesion]:
    """The pieces of one label, from its box in the scan."""
    sure: list[tuple[float, ...]] = [()] * len(every)
    if is_sure_known:
        sure = list(zip(every.mean_probability.tolist(), (every.most / 255).tolist(), strict=True))
    corner = np.array([[part.start] for part in where])
    low, end = every.low, every.end
    centroids = _positions(every.mean_index + corner, scan)
    middles = _positions((low + end - 1) / 2 + corner, scan)
    reach = abs(_steps(scan)) @ (end - low) / 2
    return [
        Lesion(label, size, _point(centroid), (_point(first), _point(last)), mean_hu, *probable)
        for size, centroid, first, last, mean_hu, probable in zip(
            (every.voxels * scan.voxel_ml).tolist(),
            centroids.T.tolist(),
            (middles - reach).T.tolist(),
            (middles + reach).T.tolist(),
            every.mean_hu.tolist(),
            sure,
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


def _box(labels: Labels, label: int = 0) -> tuple[slice, slice, slice] | None:
    """The box of a label, or of all together; None if there is nothing."""
    boxes = ndimage.find_objects(labels, max_label=label)
    boxes = [box for box in (boxes[-1:] if label else boxes) if box is not None]
    if not boxes:
        return None
    z, y, x = (
        slice(min(part.start for part in parts), max(part.stop for part in parts))
        for parts in zip(*boxes, strict=True)
    )
    return z, y, x
