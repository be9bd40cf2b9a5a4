"""Two scans of one head: by which rotation and shift one lies on the other.

The skull stays as it is between two scans, a bleed does not. So intensities are cut off well above
those of blood, bone counts for more than tissue, and nothing but a rotation and a shift is looked
for: whatever has grown is not pulled back to its earlier shape.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import SimpleITK as sitk

from ichseg.errors import InputError
from ichseg.scan.volume import Volume, to_itk

AIR_HU = -1000
_LOW_HU, _HIGH_HU = -100, 1000  # what is compared; below and above all is alike
_GRID_MM = 3.0  # finer changes the shift by less than a tenth of a voxel of 0.5 mm
_ANGLES_DEG = (0, -15, 15, -30, 30)  # of nodding, bending to a side and turning to a side
_STEPS_MM = (2.0, 0.005)  # the first and the last
_SHORTER = 0.6  # a step after one that turned back
_MOST_STEPS = 200
_LEAST_GRADIENT = 1e-8  # that of a correlation by millimetres is small long before the end


@dataclass(frozen=True, slots=True)
class Alignment:
    """How the second of two scans lies on the first.

    Attributes:
        transform: Takes a position in the first scan to that in the second; ``(x, y, z)`` in mm,
            LPS.
        rotation_deg: By which angle it turns.
        shift_mm: How far the middle of the first scan moves.
        agreement: The correlation of both scans' intensities in the first one's head, 1 where they
            are the same. Two scans of one patient have 0.9 and more, of two patients less.
    """

    transform: sitk.Transform
    rotation_deg: float
    shift_mm: float
    agreement: float

    @property
    def inverse(self) -> Alignment:
        """How the first scan lies on the second."""
        return replace(self, transform=self.transform.GetInverse())

    def to_first(self, position_mm: tuple[float, float, float]) -> tuple[float, float, float]:
        """A position of the second scan in the first one, ``(x, y, z)`` in mm, LPS."""
        x, y, z = self.inverse.transform.TransformPoint(position_mm)
        return x, y, z


def register(first: Volume, second: Volume) -> Alignment:
    """Find the rotation and the shift that bring the second scan onto the first.

    The same two scans give the same numbers each time: one thread adds them up.

    Args:
        first: A head CT in HU.
        second: Another of the same head.

    Raises:
        InputError: One of them has no head in it, or they cannot be brought together.
    """
    fixed, moving = (_prepared(volume) for volume in (first, second))
    with _one_thread():
        transform = _found(fixed, moving)
    return _alignment(transform, fixed, moving)


def _found(fixed: sitk.Image, moving: sitk.Image) -> sitk.Euler3DTransform:
    """The transform under which two prepared scans agree best."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsCorrelation()  # both are CT
    # Of all voxels: samples leave it millimetres off.
    method.SetMetricSamplingStrategy(method.NONE)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetShrinkFactorsPerLevel([2, 1])
    method.SetSmoothingSigmasPerLevel([_GRID_MM, 0])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetOptimizerAsRegularStepGradientDescent(
        *_STEPS_MM, _MOST_STEPS, _SHORTER, _LEAST_GRADIENT
    )
    method.SetOptimizerScalesFromPhysicalShift()
    try:
        transform = _best_start(method, fixed, moving)
        method.SetInitialTransform(transform, inPlace=True)
        method.Execute(fixed, moving)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"the scans cannot be brought onto each other ({reason[:160]})") from error
    return transform


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums of several threads differ in their last digit, and what follows from them in more."""
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def mirrored(volume: Volume) -> Volume:
    """The scan with its left and right exchanged, about the middle of the frame."""
    z_mm, y_mm, x_mm = volume.origin_mm
    direction = (*volume.direction[:6], *(-cosine for cosine in volume.direction[6:]))
    return Volume(volume.voxels, volume.spacing_mm, (z_mm, y_mm, -x_mm), direction)


def onto(first: Volume, second: Volume, alignment: Alignment, *, labels: bool = False) -> Volume:
    """The second scan, or what was found in it, in the grid of the first.

    Args:
        first: Gives the grid.
        second: A volume in the place of the second scan.
        alignment: From ``register``.
        labels: Whether its values are labels, which are never mixed; 0 where it does not reach.
            Otherwise air is there.
    """
    image = sitk.Resample(
        to_itk(second),
        to_itk(first),
        alignment.transform,
        sitk.sitkNearestNeighbor if labels else sitk.sitkLinear,
        0 if labels else AIR_HU,
    )
    return first.with_voxels(sitk.GetArrayFromImage(image))


def _prepared(volume: Volume) -> sitk.Image:
    """The scan on a coarse even grid, 0 in air."""
    image = sitk.Cast(to_itk(volume), sitk.sitkFloat32)
    image = sitk.Clamp(image, sitk.sitkFloat32, _LOW_HU, _HIGH_HU) - _LOW_HU
    size = [
        max(1, round(n * step / _GRID_MM))
        for n, step in zip(image.GetSize(), image.GetSpacing(), strict=True)
    ]
    # Blurred where several voxels become one, along each axis by itself.
    for axis, step in enumerate(image.GetSpacing()):
        if step < _GRID_MM and image.GetSize()[axis] >= 4:
            image = sitk.RecursiveGaussian(image, _GRID_MM / 2, direction=axis)
    grid = sitk.Image(size, sitk.sitkFloat32)
    spacing = [n * s / m for n, s, m in zip(image.GetSize(), image.GetSpacing(), size, strict=True)]
    grid.SetSpacing(spacing)
    grid.SetDirection(image.GetDirection())
    half = [(a - b) / (2 * b) for a, b in zip(spacing, image.GetSpacing(), strict=True)]
    grid.SetOrigin(image.TransformContinuousIndexToPhysicalPoint(half))
    return sitk.Resample(image, grid, sitk.Transform(), sitk.sitkLinear, 0.0)


def _best_start(
    method: sitk.ImageRegistrationMethod, fixed: sitk.Image, moving: sitk.Image
) -> sitk.Euler3DTransform:
    """Middle on middle, and the angles at which the scans agree best, one after another."""
    start = sitk.Euler3DTransform(
        sitk.CenteredTransformInitializer(
            fixed,
            moving,
            sitk.Euler3DTransform(),
            sitk.CenteredTransformInitializerFilter.MOMENTS,
        )
    )
    angles = [0.0, 0.0, 0.0]

    def disagreement() -> float:
        start.SetRotation(*angles)
        method.SetInitialTransform(start, inPlace=False)
        return float(method.MetricEvaluate(fixed, moving))

    for axis in range(3):
        tried = []
        for degrees in _ANGLES_DEG:
            angles[axis] = math.radians(degrees)
            tried.append((disagreement(), abs(degrees), angles[axis]))
        angles[axis] = min(tried)[2]
    start.SetRotation(*angles)
    return start


def _alignment(
    transform: sitk.Euler3DTransform, fixed: sitk.Image, moving: sitk.Image
) -> Alignment:
    matrix = np.reshape(transform.GetMatrix(), (3, 3))
    angle = math.acos(min(1.0, max(-1.0, (float(np.trace(matrix)) - 1) / 2)))
    middle = fixed.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in fixed.GetSize()])
    shift = math.dist(middle, transform.TransformPoint(middle))
    laid = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkLinear, -1.0))
    kept = sitk.GetArrayFromImage(fixed)
    inside = (laid >= 0) & (kept > 0)
    if inside.sum() < 2 or not (laid[inside].std() and kept[inside].std()):
        raise InputError("the scans have no part of a head in common")
    agreement = float(np.corrcoef(laid[inside], kept[inside])[0, 1])
    return Alignment(transform, math.degrees(angle), shift, agreement)
