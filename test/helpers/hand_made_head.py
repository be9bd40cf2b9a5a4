"""A head made by hand, which bleeds can be drawn into."""

import numpy as np
from scipy import ndimage

SPACING_MM = (5.0, 1.0, 1.0)


def hand_made_head():
    """A ball of brain, 30 HU, with a ventricle, sulci and a shell of bone, in air, with noise."""
    rng = np.random.default_rng(0)
    z, y, x = np.meshgrid(
        np.arange(30) * 5.0 - 72, np.arange(180.0) - 90, np.arange(160.0) - 80, indexing="ij"
    )
    far = np.sqrt((z / 66) ** 2 + (y / 80) ** 2 + (x / 66) ** 2)
    hu = np.full(far.shape, -1000.0)
    hu[far < 1.12] = 40
    hu[far < 1.08] = 1000
    hu[far < 1.0] = 30
    hu[(far < 1.0) & (far > 0.85) & (np.sin(y / 5) * np.cos(z / 9) > 0.6)] = 5
    hu[(np.abs(x) > 4) & (np.hypot((np.abs(x) - 14) / 9, y / 32) < 1) & (np.abs(z) < 16)] = 5
    hu += rng.normal(0, 3, hu.shape)
    return np.round(hu).astype(np.int16)


def blurred_head():
    """The same with the blur of a scanner, by which voxels along the skull hold some bone."""
    blurred = ndimage.gaussian_filter(hand_made_head().astype(float), (0, 0.6, 0.6))
    return np.round(blurred + np.random.default_rng(1).normal(0, 3, blurred.shape)).astype(np.int16)
