"""What the user may choose in place of the planner, and the record of it in the plans."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ichseg.errors import PlansError
from ichseg.model.plans import ARCHITECTURES, CROPS, PADDINGS, Override, Plans


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the user chose; None leaves it to the planner.

    Attributes:
        spacing_mm: Target voxel size ``(z, y, x)``, for all configurations.
        patch: Voxels ``(z, y, x)``, for 3D configurations.
        batch: Patches per training step, for 3D configurations.
        features: Features per level, for 3D configurations; their number is the number of levels.
        gpu_memory_gb: Memory to plan for.
        ct_clip: Lowest and highest intensity in HU of CT channels, in place of percentiles.
        batch_dice: Whether Dice is over the batch, for 3D configurations.
        deep_supervision: Whether training adds a head per decoder level, for 3D configurations.
        crop: What is cut away from a case, see ``Plans.crop``.
        padding: What lies beyond a small case, see ``Plans.padding``.
    """

    spacing_mm: tuple[float, float, float] | None = None
    patch: tuple[int, int, int] | None = None
    batch: int | None = None
    features: tuple[int, ...] | None = None
    gpu_memory_gb: float | None = None
    ct_clip: tuple[float, float] | None = None
    batch_dice: bool | None = None
    deep_supervision: bool | None = None
    crop: str | None = None
    padding: str | None = None

    def __post_init__(self) -> None:
        if self.spacing_mm is not None and not all(0 < s < math.inf for s in self.spacing_mm):
            raise PlansError(f"spacing {self.spacing_mm} mm, expected three positive numbers")
        if self.patch is not None and min(self.patch) < 1:
            raise PlansError(f"patch {self.patch}, expected three positive sizes")
        if self.batch is not None and self.batch < 1:
            raise PlansError(f"batch {self.batch}, expected at least 1")
        if self.features is not None and (len(self.features) < 2 or min(self.features) < 1):
            raise PlansError(f"features {self.features}, expected two or more positive numbers")
        if self.gpu_memory_gb is not None and not 0 < self.gpu_memory_gb < math.inf:
            raise PlansError(f"GPU memory {self.gpu_memory_gb} GB, expected a positive number")
        if self.ct_clip is not None and not (
            -math.inf < self.ct_clip[0] < self.ct_clip[1] < math.inf
        ):
            raise PlansError(f"CT clip {self.ct_clip} HU, expected a lower and a higher number")
        if self.crop is not None and self.crop not in CROPS:
            raise PlansError(f"crop {self.crop!r}, expected one of {CROPS}")
        if self.padding is not None and self.padding not in PADDINGS:
            raise PlansError(f"padding {self.padding!r}, expected one of {PADDINGS}")


def add_architecture_argument(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """The flag that names the network to plan for; ``plain`` where nothing does."""
    parser.add_argument(
        "--architecture",
        choices=ARCHITECTURES,
        default=default,
        help="network to plan for; the resenc ones (residual encoder, for GPUs of 8, 24 and 40 GB) "
        "belong to recipe nnunetv2 [plain]",
    )


def add_override_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of ``Overrides``."""
    chosen = parser.add_argument_group(
        "in place of what the planner finds", "Recorded in the plans, beside what it finds."
    )
    chosen.add_argument(
        "--spacing",
        type=_numbers(float, 3),
        metavar="Z,Y,X",
        help="voxel size in mm, such as 5,0.5,0.5",
    )
    chosen.add_argument(
        "--patch", type=_numbers(int, 3), metavar="Z,Y,X", help="voxels of a 3D patch"
    )
    chosen.add_argument("--batch", type=int, metavar="N", help="3D patches per training step")
    chosen.add_argument(
        "--features",
        type=_numbers(int, None),
        metavar="A,B,...",
        help="features of each level of the 3D network; as many levels as numbers",
    )
    chosen.add_argument(
        "--gpu-memory-gb",
        type=float,
        metavar="GB",
        help="memory of the GPU to plan for [12 for msd2018, 8 for nnunetv2, more for resenc_l and "
        "resenc_xl]",
    )
    chosen.add_argument(
        "--ct-clip",
        type=_numbers(float, 2),
        metavar="LOW,HIGH",
        help="limits in HU that CT is clipped to; write --ct-clip=-20,120 where one is negative",
    )
    chosen.add_argument(
        "--batch-dice",
        action=argparse.BooleanOptionalAction,
        help="3D Dice loss over the batch, or over each patch",
    )
    chosen.add_argument(
        "--deep-supervision",
        action=argparse.BooleanOptionalAction,
        help="train the 3D network with a head at every decoder level, or with one",
    )
    chosen.add_argument(
        "--crop",
        choices=CROPS,
        help="what is cut away from each case, in training and in inference: borders of zeros, or "
        "also the air around the head [nonzero]",
    )
    chosen.add_argument(
        "--padding",
        choices=PADDINGS,
        help="what a network sees beyond a scan that is smaller than its patch, in inference: "
        "zeros after the normalisation, or the nearest voxel [zero]",
    )


def overrides_from(args: argparse.Namespace) -> Overrides:
    """What the flags of ``add_override_arguments`` say.

    Raises:
        PlansError: A value is out of range.
    """
    return Overrides(
        spacing_mm=args.spacing,
        patch=args.patch,
        batch=args.batch,
        features=args.features,
        gpu_memory_gb=args.gpu_memory_gb,
        ct_clip=args.ct_clip,
        batch_dice=args.batch_dice,
        deep_supervision=args.deep_supervision,
        crop=args.crop,
        padding=args.padding,
    )


def record(
    overrides: Overrides, automatic: Plans | None, automatic_gb: float
) -> tuple[Override, ...]:
    """What was chosen beside what the planner takes when nothing is.

    Args:
        overrides: What the user chose.
        automatic: Plans without any override; None if there are none that fit.
        automatic_gb: GPU memory that the recipe plans for.
    """
    found = []
    for name, value in (
        ("spacing", overrides.spacing_mm),
        ("patch", overrides.patch),
        ("batch", overrides.batch),
        ("features", overrides.features),
        ("gpu-memory-gb", overrides.gpu_memory_gb),
        ("ct-clip", overrides.ct_clip),
        ("batch-dice", overrides.batch_dice),
        ("deep-supervision", overrides.deep_supervision),
        ("crop", overrides.crop),
        ("padding", overrides.padding),
    ):
        if value is not None:
            alone = automatic_gb if name == "gpu-memory-gb" else _automatic(name, automatic)
            found.append(Override(name, _text(alone), _text(value)))
    return tuple(found)


def _automatic(name: str, plans: Plans | None) -> object:
    """The value in ``3d_fullres``, with its axes in the order of the command line."""
    if plans is None:
        return None
    full = plans.configuration("3d_fullres")
    match name:
        case "spacing":
            return _untransposed(full.spacing_mm, plans.transpose)
        case "patch":
            return _untransposed(full.patch, plans.transpose)
        case "batch":
            return full.batch
        case "features":
            return full.architecture.features
        case "ct-clip":
            ct = next(n for n in plans.normalisations if n.scheme == "ct")
            return ct.clip_low, ct.clip_high
        case "deep-supervision":
            return full.architecture.deep_supervision
        case "crop":
            return plans.crop
        case "padding":
            return plans.padding
    return full.batch_dice


def _untransposed(values: Sequence[float], transpose: Sequence[int]) -> tuple[float, ...]:
    return tuple(values[transpose.index(axis)] for axis in range(3))


def _text(value: object) -> str:
    """A value as the command line takes it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(_text(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _numbers(kind: Callable[[str], float], count: int | None) -> Callable[[str], tuple[float, ...]]:
    """An argparse type: numbers separated by commas."""

    def parse(text: str) -> tuple[float, ...]:
        try:
            values = tuple(kind(part) for part in text.split(","))
        except ValueError:
            values = ()
        if not values or (count is not None and len(values) != count):
            what = "numbers" if kind is float else "whole numbers"
            wanted = f"{count} {what}" if count else what
            raise argparse.ArgumentTypeError(f"{text!r}, expected {wanted} separated by commas")
        return values

    return parse
