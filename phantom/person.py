"""Who is scanned: size, pose, age and densities, drawn for each head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# How likely each structure is calcified.
_CALCIFICATION_CHANCE = {
    "pineal": 0.7, "left choroid": 0.6, "right choroid": 0.6,
    "left pallidum": 0.12, "right pallidum": 0.12,
    "falx": 0.2, "left carotid": 0.4, "right carotid": 0.4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class HeadParameters:
    """What makes one head differ from another; densities are HU of the pure tissues."""

    mirrored: bool
    """Whether left and right are exchanged."""
    scale: tuple[float, float, float]
    """Size relative to the atlas along ``(z, y, x)``."""
    angles_deg: tuple[float, float, float]
    """Pitch (chin down), roll (ear to shoulder) and yaw (head turned), in degrees."""
    bend_mm: float
    """Standard deviation of the smooth displacement that makes the shape individual."""
    average_share: float
    """How much of the brain comes from the ICBM152 average instead of Colin 27."""
    fluid_exponent: float
    """Below 1 widens sulci (age), above 1 narrows them (youth, swelling)."""
    ventricle_growth_mm: float
    """How far the walls of the ventricles are moved outwards; negative values narrow them."""
    pallor_hu: float
    """Loss of density of white matter around the ventricles (leukoaraiosis)."""
    old_infarct: bool
    """Whether a part of the brain was lost long ago and is fluid now."""
    grey_hu: float
    white_hu: float
    fluid_hu: float
    muscle_hu: float
    fat_hu: float
    bone_hu: float
    spongy_hu: float
    dura_hu: float
    lens_hu: float
    rim_hu: float
    """Brightening towards the inner table, what bone correction leaves over; strongest at the
    vertex. The strongest also shows the dura as a line."""
    calcified: tuple[str, ...]
    """Names of the calcified structures."""


def draw_head(rng: np.random.Generator) -> HeadParameters:
    """Draw a person: size, pose, age and densities."""
    size = 0.955 * rng.normal(1.0, 0.035)
    age = rng.beta(1.8, 1.2)
    calcified = [name for name, chance in _CALCIFICATION_CHANCE.items() if rng.random() < chance]
    return HeadParameters(
        mirrored=bool(rng.random() < 0.5),
        scale=(_vary(size, rng), _vary(size, rng), _vary(size, rng)),
        angles_deg=(float(rng.normal(4, 8)), float(rng.normal(0, 4)), float(rng.normal(0, 6))),
        bend_mm=float(rng.uniform(1.5, 3.5)),
        average_share=float(rng.uniform(0.0, 0.7)),
        fluid_exponent=float(np.exp(0.35 - 1.25 * age + rng.normal(0, 0.12))),
        ventricle_growth_mm=float(-0.7 + 4.8 * age**1.5 + rng.normal(0, 0.7)),
        pallor_hu=float(max(0.0, rng.normal(10 * age - 2, 2.5))),
        old_infarct=bool(rng.random() < 0.2),
        grey_hu=float(rng.normal(35.7, 1.2)),
        white_hu=float(rng.normal(24.0, 1.2)),
        fluid_hu=float(rng.normal(7.5, 1.5)),
        muscle_hu=float(rng.normal(60, 8)),
        fat_hu=float(rng.normal(-95, 8)),
        bone_hu=float(rng.normal(1500, 120)),
        spongy_hu=float(rng.normal(800, 150)),
        dura_hu=float(rng.normal(53, 6)),
        lens_hu=float(rng.normal(80, 10)),
        rim_hu=float(rng.uniform(1.5, 8.0)),
        calcified=tuple(calcified),
    )


def _vary(value: float, rng: np.random.Generator) -> float:
    """The value, a few per cent off."""
    return float(value * rng.normal(1.0, 0.02))
