"""Probabilities of a validated case, by which ``select`` judges means of configurations.

One ``.npz`` a case, tensors only: uint8 steps of 1/255, without the background, which is what is
left to 1, and cropped to where any of them is more than 0. They lie in the configuration's own
grid, as an ensemble averages them. A label's lead over the background is off by at most
(K + 1) / 510 of K foreground labels, so only near-ties are decided otherwise. Of regions, which may
overlap, each has its own probability, and there is no background.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ichseg.errors import TrainingError
from ichseg.files import replacing
from training.scoring.surface import bounding_box

_STEPS = 255


def save(path: Path, scores: Tensor, *, regions: bool) -> None:
    """Write the probabilities of a case; whole or not at all.

    Args:
        path: Where to.
        scores: Probabilities ``(K, Z, Y, X)``, the background first, or logits of K regions.
        regions: Whether they are of regions.
    """
    found = np.stack([_quantised(p) for p in (scores.sigmoid() if regions else scores[1:])])
    where = bounding_box(np.asarray(found.any(axis=0), np.bool_))
    with replacing(path, suffix=".npz") as temporary:
        np.savez_compressed(
            temporary,
            steps=found[(slice(None), *where)],
            start=np.array([part.start for part in where]),
            shape=np.array(found.shape),
        )


def load(path: Path, *, regions: bool) -> npt.NDArray[np.float32]:
    """Read probabilities of shape ``(K, Z, Y, X)``, the background first.

    Those of regions come as ``restore`` takes them: 2p - 1, by how much each exceeds its absence.
    They are in the grid of the configuration that made them.

    Raises:
        TrainingError: The file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            steps, start, shape = stored["steps"], stored["start"], stored["shape"]
        labels, *size = (int(n) for n in shape)
        first = 0 if regions else 1
        scores = np.zeros((labels + first, *size), np.float32)
        where = tuple(slice(a, a + n) for a, n in zip(start, steps.shape[1:], strict=True))
        scores[(slice(first, None), *where)] = steps / np.float32(_STEPS)
    except FileNotFoundError as error:
        raise TrainingError(f"{path}: no such file") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise TrainingError(
            f"{path}: damaged ({error}); delete it, and it is made again"
        ) from error
    if regions:
        return 2 * scores - 1
    scores[0] = np.maximum(1 - scores[1:].sum(axis=0), 0)
    return scores


def _quantised(label: Tensor) -> npt.NDArray[np.uint8]:
    return (label * _STEPS).round_().to(torch.uint8).cpu().numpy()
