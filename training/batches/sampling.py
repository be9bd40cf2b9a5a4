"""Which part of which case a batch is made of.

Batch i of an epoch depends on seed, fold, epoch and i, on whether it is one of validation, and on
the table of hard examples if the fold draws from that. Neither the number of workers nor what was
drawn before changes a byte of it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ichseg.errors import DatasetError, TrainingError
from training.batches import hard_examples
from training.batches.augmentation import (
    NO_AUGMENTATION,
    AugmentationConfig,
    Shape,
    Warp,
    draw_warp,
)
from training.batches.hard_examples import HardExample
from training.store.chunks import StoredCase, open_case

Foreground = Mapping[int, npt.NDArray[np.integer]]


class BatchKey(NamedTuple):
    """Which batch: the ``number``-th training or validation batch of an epoch."""

    epoch: int
    number: int
    validation: bool = False


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """All that batches of one fold have in common.

    Attributes:
        folder: Preprocessed cases of one configuration.
        train, validation: Names of the fold's cases.
        patch: The network's patch, two or three axes.
        batch: Samples per batch, of all processes together.
        in_plane: Spatial augmentation leaves the slice axis alone.
        masked: For each channel whether it is zero outside the nonzero region.
        foreground_fraction: Share of a batch that is centred on foreground (foreground
            oversampling).
        augmentation: How training batches are augmented; validation batches never are.
        seed, fold: First words of every batch's seed.
        centre_jitter: How far the chosen foreground may lie from a patch's centre, see
            ``draw_lower``.
        lesion_fraction: Share of the patches on foreground that are centred on a lesion, each of
            the case as likely as another.
        hard_fraction: Share of the other patches that are centred on an error of the network.
        hard_examples: The table of these errors; None where there is no such share.
        regions: The labels that each region holds, of which one is drawn for a patch on foreground;
            empty where one of the labels is.
        previous_labels: Foreground classes of a cascade's first stage, which become channels.
        share: Number of this process and how many there are: each makes its part of each batch.
        training_bytes: What this process takes of its device's memory to train on such batches, by
            the planner's estimate; 0 where nobody knows.
    """

    folder: Path
    train: tuple[str, ...]
    validation: tuple[str, ...]
    patch: tuple[int, ...]
    batch: int
    in_plane: bool
    masked: tuple[bool, ...]
    foreground_fraction: float
    augmentation: AugmentationConfig
    seed: int
    fold: int
    centre_jitter: float = 0.0
    lesion_fraction: float = 0.0
    hard_fraction: float = 0.0
    hard_examples: Path | None = None
    regions: tuple[tuple[int, ...], ...] = ()
    previous_labels: int = 0
    share: tuple[int, int] = (0, 1)
    training_bytes: int = 0

    def __post_init__(self) -> None:
        rank, world = self.share
        if not 0 <= rank < world:
            raise TrainingError(f"share {rank} of {world} processes, expected 0 to {world - 1}")
        if world > self.batch:
            raise TrainingError(
                f"a batch of {self.batch} over {world} processes, expected at most {self.batch}"
            )

    @property
    def tile(self) -> Shape:
        """The patch as three axes; a 2D patch is one slice thick."""
        z, y, x = (1,) * (3 - len(self.patch)) + self.patch
        return z, y, x

    def augmentation_of(self, key: BatchKey) -> AugmentationConfig:
        """How samples of this batch are augmented: not at all if it is for validation."""
        return NO_AUGMENTATION if key.validation else self.augmentation

    @property
    def mine(self) -> slice:
        """The samples of a batch that this process makes: one more than another at most."""
        rank, world = self.share
        return slice(rank * self.batch // world, (rank + 1) * self.batch // world)


class Draw(NamedTuple):
    """One sample as drawn, before anything is read.

    Attributes:
        name: The case's name.
        lower: First voxel ``(z, y, x)`` of the patch, were it not warped.
        warp: The sample's spatial change, or None.
        rng: Source of all further draws.
    """

    name: str
    lower: Shape
    warp: Warp | None
    rng: np.random.Generator


def draw_batch(spec: BatchSpec, key: BatchKey) -> list[Draw]:
    """Draw all samples of a batch, also those of other processes."""
    words = [spec.seed, spec.fold, key.epoch, key.number]
    rng = np.random.default_rng([*words, 1] if key.validation else words)
    return [
        _draw_sample(spec, key, index, child) for index, child in enumerate(rng.spawn(spec.batch))
    ]


def is_oversampled(rng: np.random.Generator, index: int, batch: int, fraction: float) -> bool:
    """Whether this sample of a batch is centred on foreground: the last ones are, rounded.

    A batch of one is so as often as the fraction says; rounded, it would be never or always.

    Args:
        rng: Source of that draw; for larger batches nothing is drawn.
        index: Number of the sample.
        batch: Samples of the batch.
        fraction: Share of all samples that are to be centred on foreground.
    """
    if batch == 1:
        return rng.random() < fraction
    return index >= round(batch * (1 - fraction))


def draw_lower(
    rng: np.random.Generator,
    shape: Shape,
    foreground: Foreground,
    patch: Shape,
    *,
    on_foreground: bool,
    annotated: npt.NDArray[np.integer] | None = None,
    jitter: float = 0.0,
) -> Shape:
    """First voxel of a patch; negative along an axis where the case is smaller and gets centred.

    On foreground: a class that the case has is drawn uniformly, then one of its voxels, which
    becomes the centre as far as the patch stays in the case. A slice (patch one thick) is first
    drawn among the slices with that class, so a slice with much of it is no likelier. Otherwise, or
    where the case has no foreground, the patch lies anywhere, uniformly; but where voxels are to be
    ignored, it is centred on one that is not.

    Args:
        rng: Source of the draw.
        shape: Voxels of the case ``(z, y, x)``.
        foreground: Voxels ``(n, 3)`` of each class: a label, a region or a lesion, from 1.
        patch: Size ``(z, y, x)``.
        on_foreground: Whether to centre the patch on foreground (foreground oversampling).
        annotated: Voxels ``(n, 3)`` that are not to be ignored; None where none is.
        jitter: How far from the centre that voxel may lie, uniformly along each axis, as a fraction
            of the way to the patch's border: 0 is the centre always (the reference's way), with 1
            it may lie anywhere in the patch.
    """
    span = [size - p for size, p in zip(shape, patch, strict=True)]
    classes = sorted(label for label, voxels in foreground.items() if label > 0 and len(voxels))
    voxels = annotated
    if on_foreground and classes:
        voxels = foreground[classes[int(rng.integers(len(classes)))]]
    if voxels is not None and len(voxels):
        if patch[0] == 1:
            slices = np.unique(voxels[:, 0])
            voxels = voxels[voxels[:, 0] == slices[int(rng.integers(len(slices)))]]
        centre = voxels[int(rng.integers(len(voxels)))]
        wanted = [int(c) - _draw_offset(rng, p, jitter) for c, p in zip(centre, patch, strict=True)]
    else:
        wanted = [int(rng.integers(max(s, 0) + 1)) for s in span]
    z, y, x = (min(max(w, 0), s) if s >= 0 else s // 2 for w, s in zip(wanted, span, strict=True))
    return z, y, x


def _draw_sample(spec: BatchSpec, key: BatchKey, index: int, rng: np.random.Generator) -> Draw:
    names = spec.validation if key.validation else spec.train
    name = names[int(rng.integers(len(names)))]
    on_foreground = is_oversampled(rng, index, spec.batch, spec.foreground_fraction)
    error = None
    if spec.hard_fraction and not on_foreground and not key.validation:
        error = _draw_error(spec, rng)
    if error is not None:
        name = error.case
    case = stored_case(spec.folder, name)
    z, y, x = case.target.shape
    foreground: Foreground = case.foreground
    if error is not None:
        foreground = {1: np.array([error.voxel])}
    elif on_foreground and spec.lesion_fraction and rng.random() < spec.lesion_fraction:
        foreground = _lesions_of(spec, case)
    elif spec.regions:
        foreground = _regions_of(spec.folder, name, spec.regions)
    lower = draw_lower(
        rng,
        (z, y, x),
        foreground,
        spec.tile,
        on_foreground=on_foreground or error is not None,
        annotated=case.annotated,
        jitter=spec.centre_jitter,
    )
    warp = draw_warp(rng, spec.augmentation_of(key), spec.patch, in_plane=spec.in_plane)
    return Draw(name, lower, warp, rng)


def _draw_error(spec: BatchSpec, rng: np.random.Generator) -> HardExample | None:
    """An error of the network to centre a patch on, for the share of patches that get one."""
    assert spec.hard_examples is not None
    if rng.random() >= spec.hard_fraction or not hard_examples.read(spec.hard_examples):
        return None
    return hard_examples.draw(rng, spec.hard_examples)


def _lesions_of(spec: BatchSpec, case: StoredCase) -> Foreground:
    """Voxels of each lesion of a case.

    Raises:
        DatasetError: An older version stored the case, and did not list them.
    """
    if case.lesions is None:
        raise DatasetError(
            f"{spec.folder}: case {case.name} was stored by a version that did not list its "
            "lesions, which --lesion-fraction needs; delete the folder and preprocess again"
        )
    return case.lesions


@functools.lru_cache(maxsize=1024)
def _regions_of(folder: Path, name: str, regions: tuple[tuple[int, ...], ...]) -> Foreground:
    """Voxels of each region that a case has, by its number from 1, from those of the labels."""
    case = stored_case(folder, name)
    return {
        number: merge_samples(
            [case.foreground[label] for label in held if label in case.foreground],
            [case.counts[label] for label in held if label in case.foreground],
        )
        for number, held in enumerate(regions, start=1)
        if any(label in case.foreground for label in held)
    }


def merge_samples(
    samples: Sequence[npt.NDArray[np.integer]], counts: Sequence[int]
) -> npt.NDArray[np.integer]:
    """One sample of the union of disjoint sets, each voxel of which is in it as likely as another.

    Args:
        samples: Voxels ``(n, 3)`` of each set: all of it, or a sample.
        counts: How many voxels each set has.
    """
    rng = np.random.default_rng(0)
    share = min(len(voxels) / count for voxels, count in zip(samples, counts, strict=True))
    found = []
    for voxels, count in zip(samples, counts, strict=True):
        wanted = max(1, round(share * count))
        found.append(rng.choice(voxels, wanted, replace=False) if wanted < len(voxels) else voxels)
    return np.concatenate(found)


def _draw_offset(rng: np.random.Generator, size: int, jitter: float) -> int:
    """Where along an axis of the patch the chosen voxel lies."""
    before, after = size // 2, size - 1 - size // 2
    return before + int(rng.integers(-int(jitter * before), int(jitter * after) + 1))


@functools.lru_cache(maxsize=1024)
def stored_case(folder: Path, name: str) -> StoredCase:
    """A case of the store, which each process opens once.

    Raises:
        DatasetError: The case is missing or damaged.
    """
    return open_case(folder, name)
