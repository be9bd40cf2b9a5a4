"""Start a training from the weights of a bundle, as far as they fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ichseg.engine import torch_engine
from ichseg.errors import TrainingError
from ichseg.model import bundle
from ichseg.model.bundle import Member, Model
from ichseg.wording import times

_LISTED = 4  # names of tensors in a line of the log

_log = logging.getLogger(__name__)


def load_pretrained(network: nn.Module, folder: Path, configuration: str, fold: str) -> None:
    """Fill a network with what a bundle's network has by the same name and shape.

    Taken is the network of the same configuration and fold if the bundle has it; else the first of
    that configuration, else the first of all. The log says which, and what stays as it is.

    Args:
        network: The network as initialised; its tensors are altered.
        folder: A weights bundle.
        configuration: The configuration that is to be trained.
        fold: The fold that is to be trained.

    Raises:
        TrainingError: No tensor fits.
        WeightsError: The bundle is missing, damaged or of another version.
    """
    member = choose_member(bundle.load_model(folder), configuration, fold)
    theirs = torch_engine.tensors(bundle.load_state(folder, member))
    ours = network.state_dict()
    fitting = {
        name: theirs[name]
        for name, tensor in ours.items()
        if name in theirs and theirs[name].shape == tensor.shape
    }
    if not fitting:
        raise TrainingError(
            f"{folder / member.file}: none of its {len(theirs)} tensors has the name and shape of "
            f"one of the {len(ours)} of {configuration}; expected weights of a network like it"
        )
    with torch.no_grad():
        network.load_state_dict(fitting, strict=False)
    _log.info(
        "beginning with %s fold %s of %s: %d of %d tensors",
        member.configuration, member.fold, folder, len(fitting), len(ours),
    )  # fmt: skip
    other = [name for name in ours if name not in fitting]
    if other:
        _log.warning("not taken, and trained from scratch: %s", _list(ours, theirs, other))


def choose_member(model: Model, configuration: str, fold: str) -> Member:
    """Which of a bundle's networks to begin with."""
    alike = model.members_of(configuration) or model.members
    return next((member for member in alike if member.fold == fold), alike[0])


def _list(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], names: Sequence[str]
) -> str:
    """The first of these tensors, with both shapes."""
    shown = []
    for name in names[:_LISTED]:
        here = times(ours[name].shape)
        there = times(theirs[name].shape) if name in theirs else "missing"
        shown.append(f"{name} ({here}, in the bundle {there})")
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(shown) + more
