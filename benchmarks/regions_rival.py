"""nnunetv2's own loss of regions, and its gradient; runs in the rival's environment.

    python regions_rival.py GIVEN.npz FOUND.npz

GIVEN has ``logits`` ``(B, 2, z, y, x)`` and ``target`` ``(B, z, y, x)`` of labels 0 to 3, of which
3 is ignored. FOUND gets a loss and a gradient for each combination of Dice over the batch and
ignoring; the cross-entropy under ignoring is weighed by a half, see docs/decisions/0024-regions.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss


def main(given: Path, out: Path) -> None:
    """Write the losses and gradients."""
    with np.load(given) as file:
        logits, target = torch.from_numpy(file["logits"]), torch.from_numpy(file["target"])
    found = {}
    for batch_dice in (False, True):
        for ignoring in (False, True):
            labels = target if ignoring else target.clamp(max=2)
            channels = [(labels == 1) | (labels == 2), labels == 2, *[labels == 3] * ignoring]
            loss = DC_and_BCE_loss(
                {},
                {"batch_dice": batch_dice, "do_bg": True, "smooth": 1e-5, "ddp": False},
                weight_ce=0.5 if ignoring else 1,
                use_ignore_label=ignoring,
                dice_class=MemoryEfficientSoftDiceLoss,
            )
            given_logits = logits.clone().requires_grad_()
            value = loss(given_logits, torch.stack(channels, 1))
            value.backward()
            name = f"{int(batch_dice)}{int(ignoring)}"
            found[f"loss{name}"] = value.detach().numpy()
            found[f"gradient{name}"] = given_logits.grad.numpy()
    np.savez(out, **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
