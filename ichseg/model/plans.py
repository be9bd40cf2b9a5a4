"""Plans: what the training data decided about preprocessing, patch and network.

Frozen, JSON, self-contained: together with weights they are all that inference needs. Sizes,
spacings and strides are in (z, y, x) order *after* ``Plans.transpose``; a 2D configuration lists
(y, x) for its patch, kernels and strides, and its spacing keeps all three with the first unused.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ichseg.errors import PlansError
from ichseg.model import strict_json
from ichseg.model.architecture import Architecture

SCHEMA_VERSION = 1
_RECIPES = ("msd2018", "nnunetv2")
ARCHITECTURES = ("plain", "resenc_m", "resenc_l", "resenc_xl")
ORIENTATIONS = ("LPS", "RAS", "as_stored")
CROPS = ("nonzero", "head")
PADDINGS = ("zero", "nearest")
MOST_LABELS = 256  # masks are uint8
MOST_LABELS_OF_A_CASCADE = 128  # a second stage is given the first one's as int8
_MOST_PATCH_VOXELS = 1 << 31
_SPACINGS_MM = (1e-4, 1e4)


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Intensity normalisation of one channel.

    Attributes:
        scheme: ``ct`` (clip, subtract mean, divide by deviation, all of the training foreground),
            ``zscore`` (subtract mean and divide by deviation of each image by itself) or ``none``.
        clip_low: The 0.5 percentile of the foreground, in the image's unit; only for ``ct``.
        clip_high: The 99.5 percentile of the foreground; only for ``ct``.
        mean: The mean of the foreground, in the image's unit; only for ``ct``.
        deviation: The standard deviation of the foreground; only for ``ct``.
        masked: Whether a z-score is of the nonzero region alone, and 0 outside of it.
    """

    scheme: str
    clip_low: float = 0.0
    clip_high: float = 0.0
    mean: float = 0.0
    deviation: float = 1.0
    masked: bool = False

    def __post_init__(self) -> None:
        if self.scheme not in ("ct", "zscore", "none"):
            raise ValueError(f"normalisation scheme {self.scheme!r}, expected ct, zscore or none")
        numbers = (self.clip_low, self.clip_high, self.mean, self.deviation)
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"normalisation by {numbers}, expected finite numbers")
        if self.scheme == "ct" and not (self.clip_low < self.clip_high and self.deviation > 0):
            raise ValueError(
                f"ct normalisation clips to [{self.clip_low}, {self.clip_high}], "
                f"deviation {self.deviation}"
            )


@dataclass(frozen=True, slots=True)
class Resampling:
    """How volumes change grid.

    Attributes:
        image_order: The spline order for intensities, 0, 1 or 3.
        label_order: The spline order for label maps. With order 1 each label is interpolated by
            itself and the largest wins.
        score_order: The spline order for a network's probabilities or logits.
        separate_z: Which of ``image``, ``label``, ``score`` take nearest slices along the coarse
            axis, and are interpolated only within them.
        anisotropy: The largest spacing over the smallest one above which that happens.
    """

    image_order: int = 3
    label_order: int = 0
    score_order: int = 1
    separate_z: tuple[str, ...] = ("image", "label", "score")
    anisotropy: float = 3.0

    def __post_init__(self) -> None:
        for name in ("image_order", "label_order", "score_order"):
            if getattr(self, name) not in (0, 1, 3):
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0, 1 or 3")
        if not 0 < self.anisotropy < math.inf:
            raise ValueError(f"anisotropy {self.anisotropy}, expected a positive number")
        if not set(self.separate_z) <= {"image", "label", "score"}:
            raise ValueError(f"separate_z is {self.separate_z}, expected among image, label, score")


@dataclass(frozen=True, slots=True)
class Configuration:
    """One network's grid, patch and shape.

    Attributes:
        name: ``2d``, ``3d_fullres``, ``3d_lowres`` or ``3d_cascade_fullres``.
        spacing_mm: The target voxel size ``(z, y, x)``.
        median_shape: The median size of a case in voxels of that grid.
        patch: The voxels of a patch and of a tile, along two or three axes.
        batch: The number of patches of a training step.
        batch_dice: Whether the Dice loss takes a batch as one volume, and not each patch by itself.
        dummy_2d: Whether spatial augmentation stays in-plane, the patch being much thinner than
            wide.
        previous_stage: The configuration whose segmentation is an extra input, or None.
        architecture: The network's shape.
    """

    name: str
    spacing_mm: tuple[float, float, float]
    median_shape: tuple[int, int, int]
    patch: tuple[int, ...]
    batch: int
    batch_dice: bool
    dummy_2d: bool
    previous_stage: str | None
    architecture: Architecture

    def __post_init__(self) -> None:
        if len(self.patch) != self.architecture.dimensions:
            raise ValueError(
                f"{self.name}: patch {self.patch} for a {self.architecture.dimensions}D network"
            )
        if any(p % s for p, s in zip(self.patch, self.architecture.total_stride, strict=True)):
            raise ValueError(
                f"{self.name}: patch {self.patch} is not a multiple of "
                f"{self.architecture.total_stride}"
            )
        if min(self.patch) < 1 or math.prod(self.patch) > _MOST_PATCH_VOXELS:
            raise ValueError(f"{self.name}: patch {self.patch}, expected sizes of 1 or more")
        low, high = _SPACINGS_MM
        if not all(low <= spacing <= high for spacing in self.spacing_mm):
            raise ValueError(
                f"{self.name}: spacing {self.spacing_mm} mm, expected {low:g} to {high:g} mm"
            )
        if self.batch < 1:
            raise ValueError(f"{self.name}: batch {self.batch}, expected 1 or more")

    @property
    def tile(self) -> tuple[int, int, int]:
        """The patch as three axes; a 2D patch is one slice thick."""
        z, y, x = (1,) * (3 - len(self.patch)) + self.patch
        return z, y, x


@dataclass(frozen=True, slots=True)
class Region:
    """What is trained for and scored by itself: a foreground label, or several taken together.

    Attributes:
        name: Its name, for people.
        label: The label that a mask has where it is found.
        labels: The labels of a reference that it holds; of a label by itself that one.
    """

    name: str
    label: int
    labels: tuple[int, ...]

    def mask(self, labels: Any) -> Any:
        """Where labels, a numpy array or a tensor of any shape, are among those of the region."""
        return functools.reduce(operator.or_, (labels == label for label in self.labels))


@dataclass(frozen=True, slots=True)
class Override:
    """A value that the user chose in place of the planner.

    Attributes:
        name: The option of the ``plan`` command that chose it, without its dashes.
        automatic: What the planner takes if nothing at all is chosen, for ``3d_fullres``; empty
            where it finds nothing that fits. Written as at the command line, as is the next;
            a choice without a value as yes or no.
        chosen: What was chosen.
    """

    name: str
    automatic: str
    chosen: str


@dataclass(frozen=True, slots=True)
class Plans:
    """All decisions for one dataset and recipe.

    Attributes:
        schema_version: The version of this layout.
        recipe: ``msd2018`` (the paper) or ``nnunetv2``.
        dataset: The name of the dataset.
        channels: The modality of each input channel, such as ``CT``.
        labels: The labels' names by value; ``labels[0]`` is the background.
        orientation: ``LPS`` or ``RAS`` (nearest axis permutation and flips before anything else),
            or ``as_stored``.
        transpose: The axis order that puts the coarsest axis first; applied after orientation.
        normalise_first: Whether to normalise before resampling (``nnunetv2``) or after it
            (``msd2018``).
        normalisations: The normalisation of each channel.
        resampling: The interpolation orders and the separate-z rule.
        configurations: One configuration or more, by distinct name.
        architecture: The kind of network that was planned for, one of ``ARCHITECTURES``:
            ``plain``, or nnU-Net v2's with a residual encoder, each for a GPU's memory. Files call
            it ``preset``.
        overrides: What the user chose in place of the planner.
        regions: Empty where each label has a score and the largest wins. Else the scores are of
            regions, which may overlap: the label written where the first region's score is above
            0 (as a probability: above a half), the same of the second, and so on; later ones
            write over earlier ones, and elsewhere is background.
        region_labels: The labels that each region holds, in the order of ``regions``: what is
            trained for. Empty in bundles that do not know, which inference does not need.
        crop: What is cut away before anything else, in training as in inference: ``nonzero``, the
            borders where all channels are 0 (nnU-Net); or ``head``, also the air and the headrest
            around the head, as far as one is found. Outside the crop all is background.
        padding: What a network sees beyond a case that is smaller than its tile: ``zero`` after
            the normalisation (nnU-Net), or the ``nearest`` voxel.
        sources: Digest of the files of the cases that were planned for, in the plans of a
            workspace; bundles leave it out.
    """

    schema_version: int
    recipe: str
    dataset: str
    channels: tuple[str, ...]
    labels: tuple[str, ...]
    orientation: str
    transpose: tuple[int, int, int]
    normalise_first: bool
    normalisations: tuple[Normalisation, ...]
    resampling: Resampling
    configurations: tuple[Configuration, ...]
    architecture: str = strict_json.optional("plain", key="preset")
    overrides: tuple[Override, ...] = strict_json.optional(())
    regions: tuple[int, ...] = strict_json.optional(())
    region_labels: tuple[tuple[int, ...], ...] = strict_json.optional(())
    crop: str = strict_json.optional("nonzero")
    padding: str = strict_json.optional("zero")
    sources: str = strict_json.optional("")

    def __post_init__(self) -> None:
        strict_json.check_schema("plans", self.schema_version, SCHEMA_VERSION)
        if self.recipe not in _RECIPES:
            raise ValueError(f"recipe {self.recipe!r}, expected one of {_RECIPES}")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture {self.architecture!r}, expected one of {ARCHITECTURES}")
        if len(self.normalisations) != len(self.channels):
            raise ValueError(
                f"{len(self.channels)} channels, {len(self.normalisations)} normalisations"
            )
        if sorted(self.transpose) != [0, 1, 2]:
            raise ValueError(f"transpose {self.transpose} is not an order of three axes")
        if self.orientation not in ORIENTATIONS:
            raise ValueError(f"orientation {self.orientation!r}, expected one of {ORIENTATIONS}")
        if len(self.labels) < 2:
            raise ValueError(f"labels {self.labels}, expected a background and at least one more")
        if len(self.labels) > MOST_LABELS:
            raise ValueError(f"{len(self.labels)} labels, expected at most {MOST_LABELS}")
        if not self.channels or not self.configurations:
            raise ValueError("no channels or no configurations")
        for text in (self.dataset, *self.channels, *self.labels):
            check_name(text)
        self._check_stages()
        if self.crop not in CROPS:
            raise ValueError(f"crop {self.crop!r}, expected one of {CROPS}")
        if self.crop == "head" and not self.expects_hu:
            raise ValueError("crop 'head' is found in HU, but not every channel is CT")
        if self.padding not in PADDINGS:
            raise ValueError(f"padding {self.padding!r}, expected one of {PADDINGS}")
        check_regions(len(self.labels) - 1, self.regions, self.region_labels)

    def _check_stages(self) -> None:
        """Refuse configurations of one name, and stages that cannot follow one another."""
        by_name = {configuration.name: configuration for configuration in self.configurations}
        if len(by_name) != len(self.configurations):
            raise ValueError(f"configurations of one name, found {[*by_name]} more than once")
        for configuration in self.configurations:
            check_name(configuration.name)
            if configuration.previous_stage and len(self.labels) > MOST_LABELS_OF_A_CASCADE:
                raise ValueError(
                    f"{len(self.labels)} labels, expected at most {MOST_LABELS_OF_A_CASCADE} for a "
                    f"cascade such as {configuration.name}"
                )
            first = by_name.get(configuration.previous_stage or "")
            if first is not None and first.previous_stage is not None:
                raise ValueError(
                    f"{configuration.name} comes after {first.name}, which is a second stage itself"
                )

    def configuration(self, name: str) -> Configuration:
        """The configuration of that name.

        Raises:
            PlansError: There is none.
        """
        for configuration in self.configurations:
            if configuration.name == name:
                return configuration
        known = ", ".join(c.name for c in self.configurations)
        raise PlansError(f"no configuration {name!r} in the plans, which have {known}")

    def with_first_stages(self, names: Sequence[str]) -> tuple[str, ...]:
        """Names of configurations, the first stage of a cascade before its second; each once.

        Raises:
            PlansError: A name is not that of a configuration.
        """
        found: list[str] = []
        for name in names:
            first = self.configuration(name).previous_stage
            found += [name] if first is None else [first, name]
        return tuple(dict.fromkeys(found))

    @property
    def expects_hu(self) -> bool:
        """Whether every channel is normalised as CT."""
        return all(scheme.scheme == "ct" for scheme in self.normalisations)

    def input_channels(self, configuration: Configuration) -> int:
        """Channels of a network: the image's, and in a second stage one per foreground label."""
        previous = 0 if configuration.previous_stage is None else len(self.labels) - 1
        return len(self.channels) + previous

    @property
    def scores(self) -> int:
        """Scores that a network gives each voxel: one a region, or without regions one a label."""
        return len(self.regions) or len(self.labels)

    @property
    def foreground(self) -> tuple[Region, ...]:
        """What is trained for and scored: each region, or without regions each foreground label.

        Raises:
            PlansError: There are regions, and the plans do not say which labels they hold.
        """
        if len(self.region_labels) < len(self.regions):
            raise PlansError(
                "the bundle's plans do not say which labels its regions hold, as those of an older "
                "import; import it anew"
            )
        written = self.regions or range(1, len(self.labels))
        held = self.region_labels or [(label,) for label in written]
        return tuple(
            Region(self.labels[label], label, labels)
            for label, labels in zip(written, held, strict=True)
        )


def check_regions(
    last: int, regions: Sequence[int], region_labels: Sequence[Sequence[int]]
) -> None:
    """Refuse regions that write or hold what is no label.

    Args:
        last: The highest label.
        regions: The label that each region writes.
        region_labels: The labels that each region holds; empty if that is not known.

    Raises:
        ValueError: There is no such label, or the two do not fit each other.
    """
    if not set(regions) <= set(range(1, last + 1)):
        raise ValueError(f"regions write the labels {regions}, expected 1 to {last}")
    if len(region_labels) not in (0, len(regions)):
        raise ValueError(f"{len(region_labels)} region_labels of {len(regions)} regions")
    for held in region_labels:
        if not held or not set(held) <= set(range(last + 1)):
            raise ValueError(f"a region holds the labels {held}, expected among 0 to {last}")


def check_name(text: str) -> None:
    """Refuse a name with control characters, which would be lines of their own in logs.

    Raises:
        ValueError: The text has such characters.
    """
    if not text.isprintable():
        raise ValueError(f"the name {text!r} has characters that cannot be printed")


def load(path: Path) -> Plans:
    """Read ``plans.json``.

    Raises:
        PlansError: Missing, damaged, or of another schema.
    """
    return strict_json.load(Plans, path)
