"""The anatomy that every phantom starts from: tissues at 1 mm, and noise that varies over them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

Array = npt.NDArray[np.float32]

AIR, FAT, MUSCLE, BONE, SPONGY, SINUS, MASTOID, FLUID, INSIDE = range(9)
# z up, y to posterior, x to left: LPS of voxel (0, 0, 0)
ATLAS_ORIGIN_MM = np.array((-71.0, -91.0, -90.0), np.float32)
_ATLAS_DIR = Path(__file__).parent / "atlas"


@dataclass(frozen=True)
class Atlas:
    """The unbent anatomy; arrays ``(z, y, x)`` at 1 mm."""

    tissue: npt.NDArray[np.uint8]
    """One of the nine labels above in each voxel."""
    grey: tuple[Array, Array]
    """Fraction of grey matter in Colin 27 and in the ICBM152 average."""
    fluid: tuple[Array, Array]
    """Fraction of cerebrospinal fluid, likewise."""
    ventricles: tuple[Array, Array]
    """Fraction of ventricle, likewise."""
    ventricle_distance_mm: Array
    """Distance to the ventricles, at every second voxel."""
    depth_mm: Array
    """Distance to the inner table, at every second voxel."""
    lens: Array
    """Share of each voxel that the lens of an eye takes."""


@functools.lru_cache(maxsize=1)
def load_atlas() -> Atlas:
    """The atlas from ``phantom/atlas``, unpacked once a process."""
    with np.load(_ATLAS_DIR / "head.npz") as file:
        tissue = file["tissue"]
    brains = []
    for name in ("colin27", "icbm152"):
        with np.load(_ATLAS_DIR / f"{name}.npz") as file:
            packed = file["brain"]
            wet = (
                np.unpackbits(file["ventricles"])[: tissue.size]
                .reshape(tissue.shape)
                .astype(np.float32)
            )
        fluid = (packed >> 4).astype(np.float32) / 15
        grey = (packed & 15).astype(np.float32) / 15
        if name == "icbm152":  # an average's sulci are washed out
            fluid = np.clip((fluid - 0.12) * 1.7, 0, 1)
        brains.append((np.minimum(grey, 1 - fluid), fluid, ndimage.gaussian_filter(wet, 0.6)))
    union = (brains[0][2] > 0.5)[::2, ::2, ::2]
    return Atlas(
        tissue=tissue,
        grey=(brains[0][0], brains[1][0]),
        fluid=(brains[0][1], brains[1][1]),
        ventricles=(brains[0][2], brains[1][2]),
        ventricle_distance_mm=ndimage.distance_transform_edt(~union, sampling=2.0).astype(
            np.float32
        ),
        depth_mm=ndimage.distance_transform_edt(
            tissue[::2, ::2, ::2] == INSIDE, sampling=2.0
        ).astype(np.float32),
        lens=_lenses(tissue),
    )


def _lenses(tissue: npt.NDArray[np.uint8]) -> Array:
    """A lens 9 mm wide and 4 mm thick at the front of each globe, the two largest fluid spaces."""
    labels, count = ndimage.label(tissue == FLUID)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    share = np.zeros(tissue.shape, np.float32)
    for globe in np.argsort(sizes)[-2:] + 1:
        z, y, x = np.nonzero(labels == globe)
        centre, half_mm = (z.mean(), y.min() + 3.0, x.mean()), (4.5, 2.2, 4.5)
        axes: tuple[npt.NDArray[np.int64], ...] = np.indices(tissue.shape, sparse=True)
        far = sum(((n - c) / h) ** 2 for n, c, h in zip(axes, centre, half_mm, strict=True))
        lens = np.clip((1 - np.sqrt(far)) * 2.5 + 0.5, 0, 1)
        share = np.maximum(share, lens, dtype=np.float32)
    return share


def smooth_noise(shape: tuple[int, ...], scale: float, rng: np.random.Generator) -> Array:
    """Unit-variance noise that varies over ``scale`` voxels, made on a coarse grid and enlarged."""
    step = max(scale / 1.5, 1.0)
    small = tuple(int(np.ceil(n / step)) + 2 for n in shape)
    noise = torch.from_numpy(rng.standard_normal(small, dtype=np.float32))[None, None]
    noise = torch.from_numpy(ndimage.gaussian_filter(noise[0, 0].numpy(), 1.0))[None, None]
    full = torch.nn.functional.interpolate(noise, shape, mode="trilinear", align_corners=True)
    noise_full: Array = full[0, 0].numpy()
    return noise_full / np.float32(max(float(noise_full.std()), 1e-6))
