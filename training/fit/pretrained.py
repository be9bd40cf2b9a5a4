"""Start a training from the weights of another network, as far as they fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ichseg.errors import TrainingError
from ichseg.wording import times

_LISTED = 4  # names of tensors in a line of the log

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pretrained:
    """Weights to begin with.

    Attributes:
        name: What they are of, such as ``3d_fullres fold 0``.
        file: The file that they lie in.
        tensors: The tensors by our names.
    """

    name: str
    file: Path
    tensors: Mapping[str, Tensor]


def begin_with(network: nn.Module, weights: Pretrained, configuration: str) -> None:
    """Fill a network with the tensors that it has by the same name and shape.

    The log says which weights these are, and what stays as it is.

    Args:
        network: The network as initialised; its tensors are altered.
        weights: The weights to take.
        configuration: The configuration that is to be trained.

    Raises:
        TrainingError: No tensor fits.
    """
    ours, theirs = network.state_dict(), weights.tensors
    fitting = {
        name: theirs[name]
        for name, tensor in ours.items()
        if name in theirs and theirs[name].shape == tensor.shape
    }
    if not fitting:
        raise TrainingError(
            f"{weights.file}: none of its {len(theirs)} tensors has the name and shape of one of "
            f"the {len(ours)} of {configuration}; expected weights of a network like it"
        )
    with torch.no_grad():
        network.load_state_dict(fitting, strict=False)
    _log.info(
        "beginning with %s of %s: %d of %d tensors",
        weights.name, weights.file.parent, len(fitting), len(ours),
    )  # fmt: skip
    other = [name for name in ours if name not in fitting]
    if other:
        _log.warning("not taken, and trained from scratch: %s", _list(ours, theirs, other))


def _list(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], names: Sequence[str]) -> str:
    """The first of these tensors, with both shapes."""
    shown = []
    for name in names[:_LISTED]:
        here = times(ours[name].shape)
        there = times(theirs[name].shape) if name in theirs else "missing"
        shown.append(f"{name} ({here}, in the file {there})")
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(shown) + more
