"""What a CT scanner makes of a head: thick slices, blur, streaks, correlated noise, headrest.

Arrays are ``(z, y, x)`` in HU; the fine grid has half the in-plane resolution of the image and
several sub-slices to a slice.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from phantom.anatomy import enlarge
from phantom.beam_hardening import beam_artefacts
from phantom.head import vertex_mm
from phantom.person import HeadParameters

Array = npt.NDArray[np.float32]

AIR_HU = -1000.0


@dataclass(frozen=True, slots=True)
class ScanParameters:
    """One scanner and one protocol."""

    shape: tuple[int, int, int]
    """Voxels ``(z, y, x)``."""
    spacing_mm: tuple[float, float, float]
    """Voxel size ``(z, y, x)``."""
    top_mm: float
    """Height of the last slice's middle in the head's frame."""
    centre_mm: tuple[float, float]
    """How far the head's middle lies off the image's, ``(y, x)``."""
    parts: int
    """Sub-slices to a slice."""
    noise_hu: float
    """Standard deviation of the noise in the brain."""
    noise_width_mm: float
    """Standard deviation of the Gaussian that correlates the noise in-plane."""
    blur_mm: float
    """Standard deviation of the Gaussian that stands for detector and reconstruction kernel."""
    hardening: float
    """Strength of what water correction leaves over of beam hardening; 1 is usual."""
    photon_noise: float
    """How noisy long paths through bone are; 1 is usual."""
    padding_hu: float
    """Value outside the circle that the scanner reconstructs; -1000 where there is none."""
    headrest: tuple[float, float, float]
    """Half width, depth behind the head (mm) and shell density (HU); half width 0 for no
    headrest."""


def draw_scan(head: HeadParameters, rng: np.random.Generator, *, shrink: int = 1) -> ScanParameters:
    """Geometry spread as INSTANCE 2022's, noise and artefacts around those of a real scan.

    Args:
        head: The person that is scanned; the slices end a little above the vertex.
        rng: Draws the geometry, the noise and the artefacts.
        shrink: Divides the in-plane matrix, for tests.
    """
    kind = rng.random()
    thickness = (
        5.0 if kind < 0.75 else rng.uniform(4.4, 6.5) if kind < 0.95 else rng.uniform(7.0, 10.0)
    )
    pixel = float(np.clip(rng.normal(0.45, 0.045), 0.37, 0.60))
    size = 512 if rng.random() < 0.85 else int(rng.integers(215, 281)) * 2
    pixel = max(pixel, 0.41 * 512 / size) if size < 512 else pixel
    slices = int(np.clip(round(rng.uniform(130, 165) / thickness), 24, 40))
    height = vertex_mm(head)
    return ScanParameters(
        shape=(slices, size // shrink, size // shrink),
        spacing_mm=(round(thickness, 3), round(pixel * shrink, 4), round(pixel * shrink, 4)),
        top_mm=float(height + rng.uniform(-0.3, 1.2) * thickness),
        centre_mm=(float(rng.normal(-4, 5)), float(rng.normal(0, 4))),
        parts=max(round(thickness / 1.25), 1),
        noise_hu=float(np.clip(rng.normal(2.6, 0.6), 1.4, 5.0)),
        noise_width_mm=float(np.clip(rng.normal(0.48, 0.06), 0.34, 0.66)),
        blur_mm=float(rng.uniform(0.35, 0.7)),
        hardening=float(rng.uniform(0.5, 1.5)),
        photon_noise=float(rng.uniform(0.5, 1.5)),
        padding_hu=float(rng.choice([-1000.0, -1024.0, -1024.0, -2000.0])),
        headrest=(
            float(rng.uniform(88, 112)),
            float(rng.uniform(4, 16)),
            float(rng.uniform(-150, 150)),
        )
        if rng.random() < 0.9
        else (0.0, 0.0, 0.0),
    )


def reach_down(scan: ScanParameters, bottom_mm: float) -> ScanParameters:
    """The same scan with as many slices more as reach this height in the head's frame."""
    slices = round((scan.top_mm - bottom_mm) / scan.spacing_mm[0]) + 1
    return dataclasses.replace(scan, shape=(max(scan.shape[0], slices), *scan.shape[1:]))


def fine_shape(scan: ScanParameters) -> tuple[int, int, int]:
    """Shape of the grid on which head and bleeds are drawn before averaging."""
    return scan.shape[0] * scan.parts, (scan.shape[1] + 1) // 2, (scan.shape[2] + 1) // 2


def grid_axes_mm(scan: ScanParameters, shape: tuple[int, int, int]) -> tuple[Array, Array, Array]:
    """Coordinates in the head's frame of any grid that covers the scan's box."""
    extent = [n * s for n, s in zip(scan.shape, scan.spacing_mm, strict=True)]
    first = (scan.top_mm + scan.spacing_mm[0] / 2 - extent[0],
             -extent[1] / 2 - scan.centre_mm[0], -extent[2] / 2 - scan.centre_mm[1])  # fmt: skip
    return tuple(  # type: ignore[return-value]
        (low + (np.arange(n) + 0.5) * e / n).astype(np.float32)
        for low, n, e in zip(first, shape, extent, strict=True)
    )


def add_headrest(hu: Array, scan: ScanParameters, back_mm: float) -> Array:
    """A trough of thin shell and foam, in air only; ``back_mm`` is the skin's rearmost y."""
    half_width, gap, shell_hu = scan.headrest
    if not half_width:
        return hu
    _, y, x = grid_axes_mm(scan, hu.shape)  # type: ignore[arg-type]
    y, x = y[:, None], x[None, :]
    bottom = back_mm + gap
    reach = half_width * np.clip(1 - ((y - (bottom - 115)) / 115) ** 2, 0, None) ** 0.42
    inside = np.clip(reach - np.abs(x), -30, 30)
    inside = np.where(y > bottom - 95, inside, -30)
    # a wall of about 2.5 mm; the slope of `inside` is steep at the bottom, so measure it
    # along the normal
    slope = np.hypot(*np.gradient(inside, float(y[1, 0] - y[0, 0]), float(x[0, 1] - x[0, 0])))
    away = np.abs(inside) / np.clip(slope, 1, None)
    shell = np.clip(1.9 - away, 0, 1) * (y > bottom - 92) * (y < bottom + 2)
    foam = np.clip(inside - 1, 0, 1) * (y > bottom - 60)
    rest = np.maximum(AIR_HU + foam * 45, AIR_HU + shell * (shell_hu - AIR_HU)).astype(np.float32)
    return np.where(hu < -900, np.maximum(hu, rest[None]), hu)


def acquire(fine: Array, scan: ScanParameters, rng: np.random.Generator) -> npt.NDArray[np.int16]:
    """The scan of a head given on the fine grid.

    Args:
        fine: HU on the grid of ``fine_shape``.
        scan: The scanner and its protocol.
        rng: Draws the noise.
    """
    slices = fine.reshape(scan.shape[0], scan.parts, *fine.shape[1:]).mean(axis=1)
    fine_pixel = scan.spacing_mm[1] * scan.shape[1] / fine.shape[1]
    slices = ndimage.gaussian_filter(
        slices, (0, scan.blur_mm / fine_pixel, scan.blur_mm / fine_pixel), truncate=3
    )
    streaks, loudness = beam_artefacts(
        slices,
        scan.spacing_mm[1] * scan.shape[1],
        rng,
        hardening=scan.hardening,
        photon_noise=scan.photon_noise,
    )
    hu = enlarge(slices, scan.shape)
    hu += enlarge(streaks, scan.shape)
    hu += correlated_noise(scan, rng) * enlarge(loudness, scan.shape)
    hu = np.clip(np.round(hu), -1024, 3071)
    if scan.padding_hu != AIR_HU:
        y, x = (np.arange(n) - (n - 1) / 2 for n in scan.shape[1:])
        hu[:, np.hypot(y[:, None], x[None]) > scan.shape[1] / 2] = scan.padding_hu
    return hu.astype(np.int16)


def correlated_noise(scan: ScanParameters, rng: np.random.Generator) -> Array:
    """Noise of ``noise_hu``: grains of ``noise_width_mm``, little power at long wavelengths."""
    white = rng.standard_normal(scan.shape, dtype=np.float32)
    sigma = scan.noise_width_mm / scan.spacing_mm[1]
    fine = ndimage.gaussian_filter1d(white, 1.1 * sigma, axis=1, truncate=3.0)
    fine = ndimage.gaussian_filter1d(fine, 0.9 * sigma, axis=2, truncate=3.0)
    coarse = enlarge(ndimage.uniform_filter(fine, (1, 6, 6))[:, 2::4, 2::4], scan.shape)
    fine -= 0.7 * coarse
    return fine * np.float32(scan.noise_hu / max(float(fine[:, ::3, ::3].std()), 1e-6))
