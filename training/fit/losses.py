"""Soft Dice plus cross-entropy, never in less than float32.

Both are ratios of sums over voxels. Where several processes share a batch, the sums are added over
them before the ratio, so that loss and gradient are those of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from training.fit.process_group import ALONE, ProcessGroup

SMOOTH = 1e-5


def dice_cross_entropy(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    batch_dice: bool,
    ignoring: bool = False,
    group: ProcessGroup = ALONE,
) -> Tensor:
    """Mean cross-entropy minus mean soft Dice of the foreground classes; the best is -1.

    Args:
        logits: ``(B, K, *patch)``, or a list of such, finest first, under deep supervision.
        target: Labels ``(B, *patch)``, integer.
        batch_dice: Dice of the batch as one volume (True), or mean Dice of its samples.
        ignoring: Whether voxels whose label is K or more are left out, as nnU-Net v2 does with
            those of its label ``ignore``.
        group: The processes that have the rest of the batch.

    Returns:
        A scalar, float32 (float64 for logits in float64), the same in every process. The sum of its
        gradients over the processes is the gradient of the whole batch.
    """
    if isinstance(logits, Tensor):
        return _one_scale(logits, target, batch_dice, ignoring, group)
    total = torch.zeros((), device=target.device)
    for weight, scale in zip(deep_supervision_weights(len(logits)), logits, strict=True):
        if weight > 0:
            total = total + weight * _one_scale(
                scale, _shrink(target, tuple(scale.shape[2:])), batch_dice, ignoring, group
            )
    return total


def deep_supervision_weights(heads: int) -> tuple[float, ...]:
    """Halved from head to head, none for the coarsest of several, summing to one; finest first."""
    raw = [0.5**i for i in range(heads)]
    if heads > 1:
        raw[-1] = 0.0
    return tuple(weight / sum(raw) for weight in raw)


def cross_entropy(
    log_probabilities: Tensor,
    truth: Tensor,
    *,
    ignoring: bool = False,
    group: ProcessGroup = ALONE,
) -> Tensor:
    """Mean over all voxels that are not to be ignored, background included; 0 if all are.

    Args:
        log_probabilities: ``(B, K, *patch)``.
        truth: Target of the same shape, 0 or 1, as :func:`one_hot` gives it.
        ignoring: See :func:`dice_cross_entropy`.
        group: The processes that have the rest of the batch.
    """
    # Not nll_loss, which has no deterministic form on CUDA
    likelihood = (log_probabilities * truth).sum()
    if ignoring:
        voxels = truth.count_nonzero().to(likelihood.dtype)  # each voxel has one label, or none
    else:
        voxels = likelihood.new_full((), truth.numel() // truth.shape[1])  # no copy to wait for
    total = group.total(torch.stack([likelihood, voxels]))
    return -total[0] / total[1].clamp(min=1)


def soft_dice(
    probabilities: Tensor, truth: Tensor, *, batch_dice: bool, group: ProcessGroup = ALONE
) -> Tensor:
    """Soft Dice averaged over the foreground classes (and over samples unless ``batch_dice``).

    ``(2 tp + s) / (2 tp + fp + fn + s)`` with ``s`` = 1e-5, so a class that is absent from
    prediction and target scores 1. The first public nnU-Net squared the intersection of each sample
    by mistake; not here.

    Args:
        probabilities: ``(B, K, *patch)``, summing to one over K.
        truth: Target of the same shape, 0 or 1, as :func:`one_hot` gives it.
        batch_dice: Dice of the batch as one volume (True), or mean Dice of its samples.
        group: The processes that have the rest of the batch.
    """
    voxels = tuple(range(2, probabilities.ndim))
    hits = (probabilities * truth).sum(voxels)[:, 1:]  # (B, K - 1)
    masks = (probabilities.sum(voxels) + truth.sum(voxels))[:, 1:]  # 2 tp + fp + fn
    if batch_dice:
        hits, masks = group.total(torch.stack([hits.sum(0), masks.sum(0)]))  # (K - 1) each
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


def _one_scale(
    logits: Tensor, target: Tensor, batch_dice: bool, ignoring: bool, group: ProcessGroup
) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_probabilities = functional.log_softmax(logits, dim=1, dtype=dtype)
    truth = one_hot(target, logits.shape[1], dtype)
    probabilities = log_probabilities.exp()
    if ignoring:
        probabilities = probabilities * truth.sum(1, keepdim=True)  # nothing is found there, either
    dice = soft_dice(probabilities, truth, batch_dice=batch_dice, group=group)
    return cross_entropy(log_probabilities, truth, ignoring=ignoring, group=group) - dice


def _shrink(target: Tensor, size: tuple[int, ...]) -> Tensor:
    """The nearest label at each voxel centre of a coarser grid."""
    if target.shape[1:] == size:
        return target
    return functional.interpolate(target[:, None].float(), size=size, mode="nearest-exact")[:, 0]
