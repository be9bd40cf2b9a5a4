"""Soft Dice plus cross-entropy, of labels or of regions; never in less than float32.

Labels exclude one another: softmax, and the Dice of all but the background. Regions may overlap:
each has a sigmoid, a binary cross-entropy and a Dice of its own. Both terms are ratios of sums over
voxels. Where several processes share a batch, the sums are added over them before the ratio, so
that loss and gradient are those of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ichseg.model.plans import Region
from training.fit.process_group import ALONE, ProcessGroup

SMOOTH = 1e-5


def dice_cross_entropy(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    batch_dice: bool,
    regions: Sequence[Region] = (),
    ignore_label: int | None = None,
    top_k_fraction: float = 1.0,
    group: ProcessGroup = ALONE,
) -> Tensor:
    """Mean cross-entropy minus mean soft Dice of the foreground classes; the best is -1.

    Args:
        logits: ``(B, K, *patch)``, or a list of such, finest first, under deep supervision. K are
            the labels, the background first, or the regions.
        target: Labels ``(B, *patch)``, integer.
        batch_dice: Dice of the batch as one volume (True), or mean Dice of its samples.
        regions: The regions that the logits are of; empty where they are of labels.
        ignore_label: The label of voxels that are left out; None where there is none.
        top_k_fraction: Share of the voxels that are not left out, those of the highest
            cross-entropy, over which that is averaged: 1 takes all, less is a top-k loss.
        group: The processes that have the rest of the batch.

    Returns:
        A scalar, float32 (float64 for logits in float64), the same in every process. The sum of its
        gradients over the processes is the gradient of the whole batch.
    """

    def one_scale(scale: Tensor, labels: Tensor) -> Tensor:
        """The loss of one head, whose target has its size."""
        dtype = torch.promote_types(scale.dtype, torch.float32)
        told = None if ignore_label is None else (labels != ignore_label)[:, None].to(dtype)
        found, truth, entropy = (
            _of_regions(scale.to(dtype), labels, regions) if regions else _of_labels(scale, labels)
        )
        if told is not None:  # there nothing is found, and nothing is to be
            found, truth, entropy = found * told, truth * told, entropy * told
        dice = soft_dice(found, truth, batch_dice=batch_dice, background=not regions, group=group)
        return mean_entropy(entropy, told, top_k_fraction=top_k_fraction, group=group) - dice

    if isinstance(logits, Tensor):
        return one_scale(logits, target)
    total = torch.zeros((), device=target.device)
    for weight, scale in zip(deep_supervision_weights(len(logits)), logits, strict=True):
        if weight > 0:
            total = total + weight * one_scale(scale, _shrink(target, tuple(scale.shape[2:])))
    return total


def deep_supervision_weights(heads: int) -> tuple[float, ...]:
    """Halved from head to head, none for the coarsest of several, summing to one; finest first."""
    raw = [0.5**i for i in range(heads)]
    if heads > 1:
        raw[-1] = 0.0
    return tuple(weight / sum(raw) for weight in raw)


def mean_entropy(
    entropy: Tensor,
    told: Tensor | None = None,
    *,
    top_k_fraction: float = 1.0,
    group: ProcessGroup = ALONE,
) -> Tensor:
    """Mean cross-entropy over all voxels that are not to be ignored; 0 if all are.

    With a fraction it is the mean over the hardest of those voxels, of which each process takes
    that fraction of its share of the batch.

    Args:
        entropy: It is given for each voxel, ``(B, 1, *patch)``, or each region,
            ``(B, K, *patch)``; it is 0 where a voxel is to be ignored.
        told: ``(B, 1, *patch)``, 0 where a voxel is to be ignored and else 1; None if none is.
        top_k_fraction: See :func:`dice_cross_entropy`.
        group: The processes that have the rest of the batch.
    """
    # Counted without a copy to or from the host, which would wait for all that a GPU has to do.
    count = entropy.new_full((), entropy.numel())
    if told is not None:
        count = told.sum() * entropy.shape[1]
    if top_k_fraction < 1:
        k = max(1, int(top_k_fraction * entropy.numel()))
        entropy = entropy.flatten().topk(k, sorted=told is not None).values
        if told is None:
            count = count.clamp(max=k)
        else:  # those to be ignored have 0, the least there is: they come last, and are cut off
            hardest = (top_k_fraction * count.double()).floor().clamp(min=1).to(count.dtype)
            count = torch.minimum(count, hardest)
            ranks = torch.arange(k, device=entropy.device)
            entropy = entropy.masked_fill(ranks >= count, 0.0)
    total = group.total(torch.stack([entropy.sum(), count]))
    return total[0] / total[1].clamp(min=1)


def soft_dice(
    probabilities: Tensor,
    truth: Tensor,
    *,
    batch_dice: bool,
    background: bool = True,
    group: ProcessGroup = ALONE,
) -> Tensor:
    """Soft Dice averaged over the foreground classes (and over samples unless ``batch_dice``).

    ``(2 tp + s) / (2 tp + fp + fn + s)`` with ``s`` = 1e-5, so a class that is absent from
    prediction and target scores 1. The first public nnU-Net squared the intersection of each sample
    by mistake; not here.

    Args:
        probabilities: ``(B, K, *patch)``.
        truth: Target of the same shape, 0 or 1.
        batch_dice: Dice of the batch as one volume (True), or mean Dice of its samples.
        background: Whether the first of K is the background, which does not count.
        group: The processes that have the rest of the batch.
    """
    voxels = tuple(range(2, probabilities.ndim))
    hits = (probabilities * truth).sum(voxels)[:, int(background) :]  # (B, classes)
    masks = (probabilities.sum(voxels) + truth.sum(voxels))[:, int(background) :]  # 2 tp + fp + fn
    if batch_dice:
        hits, masks = group.total(torch.stack([hits.sum(0), masks.sum(0)]))  # (classes) each
    ratio = (2 * hits + SMOOTH) / (masks + SMOOTH)
    if batch_dice:
        return ratio.mean()
    total = group.total(torch.stack([ratio.sum(), ratio.new_full((), ratio.numel())]))
    return total[0] / total[1]


def one_hot(target: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Labels ``(B, *patch)`` as ``(B, classes, *patch)``: 1 where the label is the class.

    A voxel whose label is none of the classes, as one to be ignored, is 0 in all of them.
    """
    labels = torch.arange(classes, device=target.device, dtype=target.dtype)
    return (target[:, None] == labels.view(-1, *(1,) * (target.ndim - 1))).to(dtype)


def _of_labels(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities and truth of each label ``(B, K, *patch)``, and the entropy of each voxel."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_probabilities = functional.log_softmax(logits, dim=1, dtype=dtype)
    truth = one_hot(target, logits.shape[1], dtype)
    # Not nll_loss, which has no deterministic form on CUDA
    return log_probabilities.exp(), truth, -(log_probabilities * truth).sum(1, keepdim=True)


def _of_regions(
    logits: Tensor, target: Tensor, regions: Sequence[Region]
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, truth and entropy of each region, ``(B, K, *patch)`` each."""
    truth = torch.stack([region.mask(target) for region in regions], 1).to(logits.dtype)
    entropy = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return logits.sigmoid(), truth, entropy


def _shrink(target: Tensor, size: tuple[int, ...]) -> Tensor:
    """The nearest label at each voxel centre of a coarser grid."""
    if target.shape[1:] == size:
        return target
    return functional.interpolate(target[:, None].float(), size=size, mode="nearest-exact")[:, 0]
