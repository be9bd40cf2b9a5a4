"""Probabilities of a validated case, by which ``select`` judges means of configurations.

One ``.npz`` a case, tensors only: uint8 steps of 1/255, without the background, which is what is
left to 1, and cropped to where any of them is more than 0. They lie in the configuration's own
grid, as an ensemble averages them. A label's lead over the background is off by at most
(K + 1) / 510 of K foreground labels, so only near-ties are decided otherwise. Of regions, which may
overlap, there is no background, and the logits are stored, in steps of 1/8 from -16 to 16: an
ensemble brings these to the volume's grid, and probabilities would cross a half elsewhere.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from ichseg.errors import TrainingError
from ichseg.files import replacing
from training.data.workspace import VALIDATION_FILE
from training.scoring.surface import bounding_box

_STEPS = 255
_LOGIT_STEPS, _MIDDLE = 8, 128  # of a logit of 1; the step of a logit of 0
_SURE, _NEAR_VOXELS = 64, 5  # the step of a logit of -8; the width of a voxel's surroundings


def save(path: Path, scores: Tensor, *, regions: bool) -> None:
    """Write the probabilities of a case; whole or not at all.

    Args:
        path: Where to.
        scores: Probabilities ``(K, Z, Y, X)``, the background first, or logits of K regions.
        regions: Whether they are of regions.
    """
    if regions:
        steps = [(logit * _LOGIT_STEPS + _MIDDLE).clamp_(0, 255) for logit in scores]
    else:
        steps = [label * _STEPS for label in scores[1:]]
    found = np.stack([each.round_().to(torch.uint8).cpu().numpy() for each in steps])
    if regions:  # far from every voxel that is near a half, how sure it is decides nothing
        for each in found:
            each[ndimage.maximum_filter(each, _NEAR_VOXELS) < _SURE] = 0
    where = bounding_box(np.asarray(found.any(axis=0), np.bool_))
    with replacing(path, suffix=".npz") as temporary:
        arrays: dict[str, Any] = {
            _key(regions): found[(slice(None), *where)],
            "start": np.array([part.start for part in where]),
            "shape": np.array(found.shape),
        }
        np.savez_compressed(temporary, **arrays)


def load(path: Path, *, regions: bool) -> npt.NDArray[np.float32]:
    """Read probabilities of shape ``(K, Z, Y, X)``, the background first, or logits of K regions.

    They are in the grid of the configuration that made them.

    Raises:
        TrainingError: The file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            steps, start, shape = stored[_key(regions)], stored["start"], stored["shape"]
        labels, *size = (int(n) for n in shape)
        first = 0 if regions else 1
        scores = np.zeros((labels + first, *size), np.float32)
        where = tuple(slice(a, a + n) for a, n in zip(start, steps.shape[1:], strict=True))
        scores[(slice(first, None), *where)] = steps
    except FileNotFoundError as error:
        raise TrainingError(f"{path}: no such file") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise TrainingError(
            f"{path}: damaged ({error}); delete {path.parent.parent / VALIDATION_FILE} and `train` "
            "this fold, which then only validates"
        ) from error
    if regions:
        scores -= _MIDDLE
        scores /= _LOGIT_STEPS
        return scores
    scores /= _STEPS
    scores[0] = np.maximum(1 - scores[1:].sum(axis=0), 0)
    return scores


def are_stored(path: Path, *, regions: bool) -> bool:
    """Whether there is a file of such scores; those of regions were others in earlier versions."""
    try:
        with zipfile.ZipFile(path) as stored:
            return f"{_key(regions)}.npy" in stored.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def _key(regions: bool) -> str:
    return "logits" if regions else "steps"
