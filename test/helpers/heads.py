"""A box-shaped head in air, over the thin shell of a headrest."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SPACING_MM = (5.0, 1.0, 1.0)
HEAD = (slice(2, 9), slice(20, 71), slice(30, 66))
BOX = ((0, 11), (11, 80), (20, 74))  # worked out in test_head.py


def head_in_air(seed: int = 0) -> npt.NDArray[np.int16]:
    """HU, ``(12, 100, 100)``, with noise; no voxel is 0."""
    noise = np.random.default_rng(seed).integers(1, 20, (12, 100, 100)).astype(np.int16)
    voxels = noise - 1000
    voxels[HEAD] = noise[HEAD] + 20
    voxels[:, 84:88, 10:90] = 100  # headrest
    return voxels
