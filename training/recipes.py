"""The constants by which each generation of nnU-Net plans."""

from __future__ import annotations

from dataclasses import dataclass

from ichseg.plans import Resampling

ANISOTROPY = 3.0  # ratio of spacings, or of patch edges, beyond which an axis is treated apart


@dataclass(frozen=True, slots=True)
class Recipe:
    """The constants of one generation of nnU-Net.

    Attributes:
        name: As in plans.
        base_features, most_features_2d, most_features_3d: Features of the first level, and the cap
            that doubling per level stops at.
        budget_2d, budget_3d: Feature-map elements that stand for the GPU's memory.
        batch_2d, batch_3d: Batch at which the budget holds.
        memory: How a patch is charged: ``approximate`` or ``exact``.
        pooling_2d, pooling_3d: How axes are pooled: ``late``, ``spacing`` or ``spacing_v2``.
        shrinking: How a patch is made smaller: ``halve`` or ``replan``.
        first_patch: Where the search starts: ``edge`` (512 voxels of the coarsest axis) or
            ``volume`` (256^3, in 2D 2048^2), both isotropic in mm.
        round_batch: Batch is rounded (True) or cut (False).
        finer_slices: Whether very anisotropic data take the 10th percentile of the slice spacing.
        round_shapes: Whether cases' shapes are rounded before their median is taken.
        biases: Whether transposed convolutions and the head carry a bias.
        deep_supervision: Whether training attaches a head to every decoder level.
        normalise_first: Whether normalisation comes before resampling.
        resampling: Interpolation orders.
    """

    name: str
    base_features: int
    most_features_2d: int
    most_features_3d: int
    budget_2d: float
    budget_3d: float
    batch_2d: int
    batch_3d: int
    memory: str
    pooling_2d: str
    pooling_3d: str
    shrinking: str
    first_patch: str
    round_batch: bool
    finer_slices: bool
    round_shapes: bool
    biases: bool
    deep_supervision: bool
    normalise_first: bool
    resampling: Resampling


RECIPES = {
    "msd2018": Recipe(
        name="msd2018",
        base_features=30,
        most_features_2d=480,
        most_features_3d=320,
        budget_2d=19_739_648,
        budget_3d=520_000_000,
        batch_2d=50,
        batch_3d=2,
        memory="approximate",
        pooling_2d="spacing",
        pooling_3d="late",
        shrinking="halve",
        first_patch="edge",
        round_batch=False,
        finer_slices=False,
        round_shapes=False,
        biases=False,
        deep_supervision=False,
        normalise_first=False,
        resampling=Resampling(image_order=3, label_order=0, score_order=1, anisotropy=ANISOTROPY),
    ),
    "nnunetv2": Recipe(
        name="nnunetv2",
        base_features=32,
        most_features_2d=512,
        most_features_3d=320,
        budget_2d=85_000_000,
        budget_3d=560_000_000,
        batch_2d=12,
        batch_3d=2,
        memory="exact",
        pooling_2d="spacing_v2",
        pooling_3d="spacing_v2",
        shrinking="replan",
        first_patch="volume",
        round_batch=True,
        finer_slices=True,
        round_shapes=True,
        biases=True,
        deep_supervision=True,
        normalise_first=True,
        resampling=Resampling(image_order=3, label_order=1, score_order=1, anisotropy=ANISOTROPY),
    ),
}
