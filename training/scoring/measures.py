"""Measures of agreement between two masks, INSTANCE 2022's as its organisers compute them.

Empty masks have no surface to measure to and no volume to divide by. What is written for them is a
policy, chosen by name, since it moves the mean (docs/decisions/0008-evaluation.md):

======================  ====================  ====================  ====================
empty                   ``instance``          ``diagonal``          ``null``
======================  ====================  ====================  ====================
prediction              Dice near 0, RVD 1,   the same, HD the      the same, HD None
                        NSD 0, HD infinite    volume's diagonal
reference               Dice near 0, RVD      the same, HD the      the same, HD None
                        None, NSD 0, HD       volume's diagonal
                        infinite
both                    Dice 1, RVD None,     Dice 1, RVD 0,        all None
                        NSD None, HD          NSD 1, HD 0
                        infinite
======================  ====================  ====================  ====================
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ichseg.predict.dice import dice_of_counts
from training.scoring.surface import bounding_box, hausdorff_mm, surface_dice, surface_distances

Mask = npt.NDArray[np.bool_]

EMPTY_POLICIES = ("instance", "diagonal", "null")
SMOOTHING = 1e-5  # INSTANCE adds it to both sides of the Dice
TOLERANCE_MM = 0.42  # of INSTANCE's surface Dice: about one voxel in-plane


@dataclass(frozen=True, slots=True)
class Scores:
    """How well one mask agrees with another; None where a measure is not defined.

    Attributes:
        dice: (2 |P and G| + 1e-5) / (|P| + |G| + 1e-5), P the prediction, G the reference.
        relative_volume_difference: | |P| - |G| | / |G|.
        surface_dice: Share of both surfaces within 0.42 mm of one another.
        hausdorff_mm: The largest distance between the surfaces.
        hausdorff_95_mm: The distance that 95 % of either surface does not exceed.
    """

    dice: float | None
    relative_volume_difference: float | None
    surface_dice: float | None
    hausdorff_mm: float | None
    hausdorff_95_mm: float | None


MEASURES = tuple(field.name for field in dataclasses.fields(Scores))
TITLES = dict(
    zip(
        MEASURES,
        ("Dice", "RVD", f"NSD at {TOLERANCE_MM} mm", "HD, mm", "HD95, mm"),
        strict=True,
    )
)


def score_masks(
    prediction: Mask,
    reference: Mask,
    spacing_mm: tuple[float, float, float],
    *,
    empty: str,
    diagonal_mm: float,
) -> Scores:
    """Score one mask against its reference with all measures.

    Args:
        prediction: The mask to score, shape ``(z, y, x)``; what is not in it is background.
        reference: The reference mask, of the same shape.
        spacing_mm: The voxel size, ``(z, y, x)``.
        empty: The policy for empty masks, one of ``EMPTY_POLICIES``.
        diagonal_mm: The diagonal of the whole volume, which the policy of that name writes.

    Raises:
        ValueError: The shapes differ, or there is no such policy.
    """
    if empty not in EMPTY_POLICIES:
        raise ValueError(f"policy {empty!r} for empty masks, expected one of {EMPTY_POLICIES}")
    if prediction.shape != reference.shape:
        raise ValueError(f"masks of shapes {prediction.shape} and {reference.shape}")
    box = bounding_box(prediction | reference)
    prediction, reference = prediction[box], reference[box]
    predicted, present = int(np.count_nonzero(prediction)), int(np.count_nonzero(reference))
    shared = int(np.count_nonzero(prediction & reference))
    overlap = dice_of_counts(shared, predicted + present, smoothing=SMOOTHING)
    volume = abs(predicted - present) / present if present else None
    if predicted and present:
        distances = surface_distances(prediction, reference, spacing_mm)
        return Scores(
            dice=overlap,
            relative_volume_difference=volume,
            surface_dice=surface_dice(distances, TOLERANCE_MM),
            hausdorff_mm=hausdorff_mm(distances, 100),
            hausdorff_95_mm=hausdorff_mm(distances, 95),
        )
    if not predicted and not present:
        return _BOTH_EMPTY[empty]
    far = {"instance": math.inf, "diagonal": diagonal_mm, "null": None}[empty]
    return Scores(overlap, volume, 0.0, far, far)


def diagonal_mm(shape: tuple[int, ...], spacing_mm: tuple[float, float, float]) -> float:
    """The length of a volume from corner to corner: no two surface elements lie further apart."""
    return math.hypot(*(size * spacing for size, spacing in zip(shape, spacing_mm, strict=True)))


_BOTH_EMPTY = {
    "instance": Scores(1.0, None, None, math.inf, math.inf),
    "diagonal": Scores(1.0, 0.0, 1.0, 0.0, 0.0),
    "null": Scores(None, None, None, None, None),
}
