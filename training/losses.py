"""Soft Dice plus cross-entropy, in float32 always."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

SMOOTH = 1e-5


def dice_cross_entropy(
    logits: Tensor | Sequence[Tensor], target: Tensor, *, batch_dice: bool
) -> Tensor:
    """Mean cross-entropy minus mean soft Dice of the foreground classes; the best is -1.

    Args:
        logits: ``(B, K, *patch)``, or a list of such, finest first, under deep supervision.
        target: Labels ``(B, *patch)``, integer.
        batch_dice: Dice of the batch as one volume (True), or mean Dice of its samples.

    Returns:
        A float32 scalar.
    """
    if isinstance(logits, Tensor):
        return _one_scale(logits, target, batch_dice)
    total = torch.zeros((), device=target.device)
    for weight, scale in zip(deep_supervision_weights(len(logits)), logits, strict=True):
        if weight > 0:
            total = total + weight * _one_scale(
                scale, _shrink(target, tuple(scale.shape[2:])), batch_dice
            )
    return total


def deep_supervision_weights(heads: int) -> tuple[float, ...]:
    """Halved from head to head, none for the coarsest of several, summing to one; finest first."""
    raw = [0.5**i for i in range(heads)]
    if heads > 1:
        raw[-1] = 0.0
    return tuple(weight / sum(raw) for weight in raw)


def soft_dice(probabilities: Tensor, target: Tensor, *, batch_dice: bool) -> Tensor:
    """Soft Dice averaged over the foreground classes (and over samples unless ``batch_dice``).

    ``(2 tp + s) / (2 tp + fp + fn + s)`` with ``s`` = 1e-5, so a class that is absent from
    prediction and target scores 1. The first public nnU-Net squared the intersection of each sample
    by mistake; not here.

    Args:
        probabilities: ``(B, K, *patch)``, float32, summing to one over K.
        target: Labels ``(B, *patch)``, integer.
        batch_dice: See :func:`dice_cross_entropy`.
    """
    voxels = tuple(range(1, target.ndim))
    intersection, total = [], []
    for label in range(1, probabilities.shape[1]):
        here = (target == label).to(probabilities.dtype)
        foreground = probabilities[:, label]
        intersection.append((foreground * here).sum(voxels))
        total.append(foreground.sum(voxels) + here.sum(voxels))  # 2 tp + fp + fn
    both, either = torch.stack(intersection, 1), torch.stack(total, 1)  # (B, K - 1)
    if batch_dice:
        both, either = both.sum(0), either.sum(0)
    return ((2 * both + SMOOTH) / (either + SMOOTH)).mean()


def _one_scale(logits: Tensor, target: Tensor, batch_dice: bool) -> Tensor:
    target = target.long()
    log_probabilities = functional.log_softmax(logits.float(), dim=1)
    cross_entropy = functional.nll_loss(log_probabilities, target)
    return cross_entropy - soft_dice(log_probabilities.exp(), target, batch_dice=batch_dice)


def _shrink(target: Tensor, size: tuple[int, ...]) -> Tensor:
    """The nearest label at each voxel centre of a coarser grid."""
    if target.shape[1:] == size:
        return target
    return functional.interpolate(target[:, None].float(), size=size, mode="nearest-exact")[:, 0]
