"""The constants by which each generation of nnU-Net plans."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ichseg.errors import PlansError
from ichseg.model.plans import Resampling

ANISOTROPY = 3.0  # ratio of spacings, or of patch edges, beyond which the coarse axis is separate


@dataclass(frozen=True, slots=True)
class Limits:
    """The constants that differ between 2D and 3D.

    Attributes:
        most_features: The cap that doubling the features per level stops at.
        budget: Feature-map elements that stand for the GPU's memory, at ``batch``.
        batch: Patches per training step that the budget is for.
        room: Patches that have to fit: the patch shrinks until they do.
        first_patch: Where the search starts: ``edge`` (isotropic in mm, 512 voxels along the
            coarsest axis), ``volume`` (isotropic in mm, 256^3 voxels, in 2D 2048^2), or ``case``
            (the median case, which is not shrunk either).
        pooling: How axes are pooled: ``late``, ``spacing`` or ``spacing_v2``.
    """

    most_features: int
    budget: float
    batch: int
    room: int
    first_patch: str
    pooling: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """The constants of one generation of nnU-Net.

    Attributes:
        name: What plans call the recipe.
        limits_2d, limits_3d: The constants that differ between 2D and 3D.
        gpu_memory_gb: The memory that the budgets stand for.
        base_features: Features of the first level; they double with each level.
        block: What the encoder is made of, see ``Architecture``.
        encoder_convs: Convolutions (or residual blocks) of the first encoder levels; deeper ones
            have as many as the last given.
        decoder_convs: Convolutions of each decoder level.
        dataset_share: The share of the dataset's voxels that one batch may cover.
        memory: How a patch is charged: ``approximate`` or ``exact``.
        shrinking: How a patch is made smaller: ``halve`` or ``replan``.
        cascade: Whose voxels the cases are compared with to decide about a cascade: a fixed
            ``capacity``, or those of the planned ``patch``.
        round_batch: Batch is rounded (True) or cut (False).
        finer_slices: Whether very anisotropic data take the 10th percentile of the slice spacing.
        round_shapes: Whether cases' shapes are rounded before their median is taken.
        biases: Whether transposed convolutions and the head carry a bias.
        deep_supervision: Whether training attaches a head to every decoder level.
        normalise_first: Whether normalisation comes before resampling.
        resampling: Interpolation orders.
    """

    name: str
    limits_2d: Limits
    limits_3d: Limits
    gpu_memory_gb: float
    base_features: int
    block: str
    encoder_convs: tuple[int, ...]
    decoder_convs: int
    dataset_share: float
    memory: str
    shrinking: str
    cascade: str
    round_batch: bool
    finer_slices: bool
    round_shapes: bool
    biases: bool
    deep_supervision: bool
    normalise_first: bool
    resampling: Resampling


_MSD2018 = Recipe(
    name="msd2018",
    limits_2d=Limits(
        most_features=480,
        budget=19_739_648,
        batch=50,
        room=2,
        first_patch="case",
        pooling="spacing",
    ),
    limits_3d=Limits(
        most_features=320,
        budget=520_000_000,
        batch=2,
        room=2,
        first_patch="edge",
        pooling="late",
    ),
    gpu_memory_gb=12.0,  # the large cards of 2018
    base_features=30,
    block="plain",
    encoder_convs=(2,),
    decoder_convs=2,
    dataset_share=0.05,
    memory="approximate",
    shrinking="halve",
    cascade="capacity",
    round_batch=False,
    finer_slices=False,
    round_shapes=False,
    biases=False,
    deep_supervision=False,
    normalise_first=False,
    resampling=Resampling(image_order=3, label_order=0, score_order=1, anisotropy=ANISOTROPY),
)

_NNUNETV2 = Recipe(
    name="nnunetv2",
    limits_2d=Limits(
        most_features=512,
        budget=85_000_000,
        batch=12,
        room=2,
        first_patch="volume",
        pooling="spacing_v2",
    ),
    limits_3d=Limits(
        most_features=320,
        budget=560_000_000,
        batch=2,
        room=2,
        first_patch="volume",
        pooling="spacing_v2",
    ),
    gpu_memory_gb=8.0,
    base_features=32,
    block="plain",
    encoder_convs=(2,),
    decoder_convs=2,
    dataset_share=0.05,
    memory="exact",
    shrinking="replan",
    cascade="patch",
    round_batch=True,
    finer_slices=True,
    round_shapes=True,
    biases=True,
    deep_supervision=True,
    normalise_first=True,
    resampling=Resampling(image_order=3, label_order=1, score_order=1, anisotropy=ANISOTROPY),
)


def _residual(budget_2d: float, budget_3d: float, gpu_memory_gb: float) -> Recipe:
    """nnU-Net v2 with a residual encoder, for a GPU of this memory."""
    return replace(
        _NNUNETV2,
        limits_2d=replace(_NNUNETV2.limits_2d, budget=budget_2d, room=12),
        limits_3d=replace(_NNUNETV2.limits_3d, budget=budget_3d),
        gpu_memory_gb=gpu_memory_gb,
        block="residual",
        encoder_convs=(1, 3, 4, 6),
        decoder_convs=1,
        dataset_share=1.0,
    )


# By recipe and architecture, as in plans.
RECIPES = {
    "msd2018": {"plain": _MSD2018},
    "nnunetv2": {
        "plain": _NNUNETV2,
        "resenc_m": _residual(135_000_000, 680_000_000, 8.0),
        "resenc_l": _residual(380_000_000, 2_100_000_000, 24.0),
        "resenc_xl": _residual(560_000_000, 3_600_000_000, 40.0),
    },
}


def find_recipe(name: str, architecture: str, gpu_memory_gb: float | None = None) -> Recipe:
    """The constants of a recipe and an architecture.

    Args:
        name: Name of the recipe.
        architecture: Name of the kind of network, such as ``plain``.
        gpu_memory_gb: Memory that the budgets are scaled to, None for the recipe's own.

    Raises:
        PlansError: There is no such recipe, or it has no such architecture.
    """
    if name not in RECIPES:
        raise PlansError(f"recipe {name!r}, expected one of {', '.join(RECIPES)}")
    if architecture not in RECIPES[name]:
        raise PlansError(
            f"architecture {architecture} with recipe {name}, expected {' or '.join(RECIPES[name])}"
        )
    recipe = RECIPES[name][architecture]
    if gpu_memory_gb is None:
        return recipe
    factor = gpu_memory_gb / recipe.gpu_memory_gb
    return replace(
        recipe,
        limits_2d=replace(recipe.limits_2d, budget=recipe.limits_2d.budget * factor),
        limits_3d=replace(recipe.limits_3d, budget=recipe.limits_3d.budget * factor),
        gpu_memory_gb=gpu_memory_gb,
    )
