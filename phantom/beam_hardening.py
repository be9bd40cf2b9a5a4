"""What bone does to the beam: dark bands, cupping, streaks, and noise behind long paths.

Arrays of images are ``(slice, 128, 128)``; those of projections ``(angle * bin, slice)``.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import scipy.sparse
from scipy import ndimage

Array = npt.NDArray[np.float32]

_SIZE = 128  # pixels across in which streaks are computed; they are long and smooth
_ANGLES, _BINS = 120, 192
_LARGEST_STREAK_HU = 60


def beam_artefacts(
    slices: Array,
    height_mm: float,
    rng: np.random.Generator,
    *,
    hardening: float,
    photon_noise: float,
) -> tuple[Array, Array]:
    """Dark bands between bones, cupping and streaks: the projections' error, reconstructed.

    What the beam loses of its soft end grows with the square of the bone it crosses; that error
    alone is filtered and back-projected, at low resolution.

    Args:
        slices: HU, ``(slice, y, x)`` of any matrix.
        height_mm: Length of the image along y.
        rng: Draws the noise of the few photons behind bone.
        hardening: How much water correction leaves over; 1 is usual.
        photon_noise: How noisy long paths through bone are; 1 is usual.

    Returns:
        HU to add, and the relative noise level (about 1).
    """
    small = ndimage.zoom(
        slices,
        (1, _SIZE / slices.shape[1], _SIZE / slices.shape[2]),
        order=1,
        grid_mode=True,
        mode="nearest",
    )
    pixel_cm = height_mm / _SIZE / 10
    bone, body = _paths(small, pixel_cm)
    error = -0.010 * hardening * bone * bone - 0.0012 * hardening * bone * body
    # photon starvation: few photons behind long paths through bone
    path = 0.19 * body + 0.38 * bone
    error += (
        photon_noise
        * 0.0035
        * np.exp(np.clip(path - 5.0, -3, 4) / 2)
        * rng.standard_normal(error.shape, dtype=np.float32)
    )
    streaks = _reconstruct(error, small.shape, pixel_cm)
    upper = _upper_brain(small)
    if upper.any():  # water correction has removed what all slices share
        streaks -= float(np.median(streaks[upper]))
    streaks = np.clip(streaks, -_LARGEST_STREAK_HU, _LARGEST_STREAK_HU)
    fade = np.clip((small + 900) / 300, 0.25, 1)  # streaks in air do not show
    return (streaks * fade).astype(np.float32), _loudness(path, upper)


def _paths(small: Array, pixel_cm: float) -> tuple[Array, Array]:
    """Bone and body that each beam crosses, in cm of about water's density."""
    forward, _, _ = _beam()
    flat = small.reshape(len(small), -1).T  # (pixel, slice)
    bone = forward @ (np.clip(flat - 200, 0, 2000) / 1000) * pixel_cm
    body = forward @ (np.clip(flat + 1000, 0, 1200) / 1000) * pixel_cm
    return bone, body


def _reconstruct(error: Array, shape: tuple[int, ...], pixel_cm: float) -> Array:
    """Filtered back-projection of the projections' error, in HU."""
    _, backward, ramp = _beam()
    spectrum = np.fft.rfft(error.reshape(_ANGLES, -1, shape[0]), axis=1) * ramp[None, :, None]
    filtered = np.fft.irfft(spectrum, error.shape[0] // _ANGLES, axis=1).astype(np.float32)
    streaks: Array = (
        (backward @ filtered.reshape(error.shape)).T.reshape(shape) * (np.pi / _ANGLES) / pixel_cm
    )
    streaks *= 1000.0
    return streaks


def _upper_brain(small: Array) -> npt.NDArray[np.bool_]:
    """Brain above the skull base, where artefacts are weakest."""
    brain = (small > -5) & (small < 80)
    upper: npt.NDArray[np.bool_] = (
        brain & (np.arange(len(small)) > 0.45 * len(small))[:, None, None]
    )
    return upper


def _loudness(path: Array, upper: npt.NDArray[np.bool_]) -> Array:
    """How loud the noise is at each pixel, relative to the upper brain."""
    _, backward, _ = _beam()
    loud = (backward @ np.exp(np.clip(path - 5.0, -2, 2.2) / 2)).T.reshape(upper.shape) / _ANGLES
    usual = float(np.median(loud[upper])) if upper.any() else 1.0
    return np.clip(loud / max(usual, 1e-6), 0.6, 1.8).astype(np.float32)


@functools.lru_cache(maxsize=1)
def _beam() -> tuple[scipy.sparse.csr_matrix, scipy.sparse.csr_matrix, Array]:
    """Parallel projection of a 128x128 image, its transpose, and the ramp filter."""
    n = _SIZE
    y, x = np.meshgrid(*(np.arange(n) - (n - 1) / 2,) * 2, indexing="ij")
    rows, columns, weights = [], [], []
    for index in range(_ANGLES):
        angle = np.pi * (index + 0.5) / _ANGLES
        place = (x * np.cos(angle) + y * np.sin(angle)).ravel() + (_BINS - 1) / 2
        low = np.floor(place).astype(np.int64)
        part = (place - low).astype(np.float32)
        for offset, weight in ((0, 1 - part), (1, part)):
            rows.append(index * _BINS + low + offset)
            columns.append(np.arange(n * n))
            weights.append(weight)
    matrix = scipy.sparse.csr_matrix(
        (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))),
        (_BINS * _ANGLES, n * n),
    )
    frequency = np.fft.rfftfreq(_BINS)
    ramp = (frequency * np.cos(np.pi * frequency) ** 2).astype(np.float32)
    return matrix, matrix.T.tocsr(), ramp
