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
import numpy.typing as npt
import SimpleITK as sitk

from ichseg.errors import InputError
from ichseg.scan.volume import Volume, to_itk

AIR_HU = -1000
_LOW_HU, _HIGH_HU = -100, 1000  # what is compared; below and above all is alike
_GRID_MM = 3.0  # finer changes the shift by less than a tenth of a voxel of 0.5 mm
_ANGLES_DEG = (0, -15, 15, -30, 30)  # of nodding, bending to a side and turning to a side
_SHIFTS_MM = (0, -20, 20, -40, 40, -60, 60)  # along the body: one scan may begin farther down
_LEAST_SHARED = 0.5  # of the smaller head: a smaller part of it may agree by chance
_HEAD = 20  # of what is compared, which is 0 in air
_LINE_STEPS = {"numberOfIterations": 6, "maximumLineIterations": 20, "stepLength": 1,
               "stepTolerance": 5e-3, "valueTolerance": 1e-5}  # fmt: skip
_STEPS_MM = (2.0, 0.005)  # the first and the last along the gradient
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
        # A part is found in the whole. The other way about, most of the whole has nothing to lie
        # on, and can leave the part's frame for the better.
        if _head_mm3(fixed) <= _head_mm3(moving):
            transform = _found(fixed, moving)
        else:
            transform = _inverse(_found(moving, fixed))
    return _alignment(transform, fixed, moving)


def _head_mm3(image: sitk.Image) -> float:
    """How much head a prepared scan has."""
    voxels = np.count_nonzero(sitk.GetArrayViewFromImage(image) > _HEAD)
    return float(voxels * math.prod(image.GetSpacing()))


def _inverse(transform: sitk.Euler3DTransform) -> sitk.Euler3DTransform:
    """The way back, as a transform of the same kind."""
    back = sitk.Euler3DTransform()
    back.SetMatrix(np.reshape(transform.GetMatrix(), (3, 3)).T.ravel().tolist())
    back.SetTranslation(transform.GetInverse().TransformPoint((0.0, 0.0, 0.0)))
    return back


def _found(fixed: sitk.Image, moving: sitk.Image) -> sitk.Euler3DTransform:
    """The transform under which two prepared scans agree best, found on half the grid first.

    There one axis goes after another, which needs no gradient and gets over what lies between. A
    rotation about the middle of what both scans have does not shift it, so that neither has to be
    found anew for each step of the other.
    """
    try:
        tried: list[tuple[float, int, sitk.Euler3DTransform]] = []
        for start in _starts(fixed, moving):
            transform = _about_common_middle(start, fixed, moving)
            coarse = _method(transform)
            coarse.SetShrinkFactorsPerLevel([2])
            coarse.SetSmoothingSigmasPerLevel([_GRID_MM])
            coarse.SetOptimizerAsPowell(**_LINE_STEPS)
            coarse.Execute(fixed, moving)
            tried.append((-_agreement(fixed, moving, transform)[0], len(tried), transform))
        transform = _about_common_middle(min(tried)[2], fixed, moving)
        fine = _method(transform)
        fine.SetOptimizerAsRegularStepGradientDescent(
            *_STEPS_MM, _MOST_STEPS, _SHORTER, _LEAST_GRADIENT
        )
        fine.Execute(fixed, moving)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"the scans cannot be brought onto each other ({reason[:160]})") from error
    return transform


def _method(transform: sitk.Euler3DTransform) -> sitk.ImageRegistrationMethod:
    """What changes a transform in place until two scans correlate most."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsCorrelation()  # both are CT
    # Of all voxels: samples leave it millimetres off.
    method.SetMetricSamplingStrategy(method.NONE)
    method.SetInterpolator(sitk.sitkLinear)
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(transform, inPlace=True)
    return method


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
    # A window that somebody has cut out, such as 0 to 80 HU, ends above the values of air.
    low = max(_LOW_HU, float(np.min(volume.voxels)))
    image = sitk.Clamp(image, sitk.sitkFloat32, low, _HIGH_HU) - low
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


def _starts(fixed: sitk.Image, moving: sitk.Image) -> list[sitk.Euler3DTransform]:
    """Middle on middle; and the angles and the shift along the body at which both agree best."""
    small = [
        sitk.Shrink(sitk.SmoothingRecursiveGaussian(image, _GRID_MM), [min(2, n) for n in size])
        for image, size in ((fixed, fixed.GetSize()), (moving, moving.GetSize()))
    ]
    start = sitk.Euler3DTransform(
        sitk.CenteredTransformInitializer(
            fixed,
            moving,
            sitk.Euler3DTransform(),
            sitk.CenteredTransformInitializerFilter.MOMENTS,
        )
    )
    x, y, z = start.GetTranslation()
    least = _LEAST_SHARED * min(map(_head_mm3, small)) / math.prod(small[0].GetSpacing())
    best: tuple[tuple[float, ...], float] = (0.0, 0.0, 0.0), 0.0  # degrees, mm

    def disagreement(tried: tuple[tuple[float, ...], float]) -> tuple[float, float]:
        angles, shift = tried
        start.SetRotation(*map(math.radians, angles))
        start.SetTranslation((x, y, z + shift))
        correlation, voxels = _agreement(small[0], small[1], start)
        return (2.0 if voxels < least else -correlation), sum(map(abs, angles))

    for axis, shifts in ((0, _SHIFTS_MM), (1, (0,)), (2, (0,)), (0, (-10, 0, 10))):
        angles, shift = best
        best = min(
            (
                ((*angles[:axis], float(angle), *angles[axis + 1 :]), shift + more)
                for more in shifts
                for angle in _ANGLES_DEG
            ),
            key=disagreement,
        )
    plain = sitk.Euler3DTransform(start)
    plain.SetRotation(0.0, 0.0, 0.0)
    plain.SetTranslation((x, y, z))
    disagreement(best)
    return [plain] if best == ((0.0, 0.0, 0.0), 0.0) else [plain, start]


def _about_common_middle(
    transform: sitk.Euler3DTransform, fixed: sitk.Image, moving: sitk.Image
) -> sitk.Euler3DTransform:
    """The same transform, as a rotation about the middle of what is head in both, and a shift."""
    where = np.argwhere(_in_both(fixed, moving, transform)[0])
    if not len(where):
        return transform
    middle = fixed.TransformContinuousIndexToPhysicalPoint(where.mean(0)[::-1].tolist())
    same = sitk.Euler3DTransform()
    same.SetCenter(middle)
    same.SetMatrix(transform.GetMatrix())
    target = transform.TransformPoint(middle)
    same.SetTranslation([a - b for a, b in zip(target, middle, strict=True)])
    return same


def _in_both(
    fixed: sitk.Image, moving: sitk.Image, transform: sitk.Transform
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Where the first has a head and the second reaches, and both scans' values, ``(z, y, x)``."""
    laid = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkLinear, -1.0))
    kept = sitk.GetArrayFromImage(fixed)
    return (laid >= 0) & (kept > 0), kept, laid


def _agreement(
    fixed: sitk.Image, moving: sitk.Image, transform: sitk.Transform
) -> tuple[float, int]:
    """The correlation of what is in both, -1 where there is none, and its number of voxels."""
    inside, kept, laid = _in_both(fixed, moving, transform)
    count = int(inside.sum())
    if count < 2 or not (laid[inside].std() and kept[inside].std()):
        return -1.0, count
    return float(np.corrcoef(laid[inside], kept[inside])[0, 1]), count


def _alignment(
    transform: sitk.Euler3DTransform, fixed: sitk.Image, moving: sitk.Image
) -> Alignment:
    matrix = np.reshape(transform.GetMatrix(), (3, 3))
    angle = math.acos(min(1.0, max(-1.0, (float(np.trace(matrix)) - 1) / 2)))
    middle = fixed.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in fixed.GetSize()])
    shift = math.dist(middle, transform.TransformPoint(middle))
    agreement, _ = _agreement(fixed, moving, transform)
    if agreement == -1.0:
        raise InputError("the scans have no part of a head in common")
    return Alignment(transform, math.degrees(angle), shift, agreement)
