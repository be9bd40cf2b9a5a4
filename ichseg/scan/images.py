"""What a caller from Python has of a scan, as a ``Scan``: paths, arrays, nibabel, SimpleITK.

The mask of what came from memory has the same axes as the array that was given, so that it can be
laid over it, or put into an image of the same library, as it is.
"""

from __future__ import annotations

import math
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ichseg.errors import InputError
from ichseg.scan import nifti, reader
from ichseg.scan.dicom.files import walk
from ichseg.scan.reader import Scan, scan_of
from ichseg.scan.volume import Volume, triple
from ichseg.wording import counted, times

if TYPE_CHECKING:
    import SimpleITK as sitk

_AXES = ("zyx", "xyz")
_STEPS = "zyx"  # the order of directions in a volume
_TO_LPS = np.diag([-1.0, -1.0, 1.0])  # from nibabel's RAS
_SAME_STEP = 0.02  # a share, by which voxel sizes count as equal


def as_scan(
    image: Any,
    *,
    spacing_mm: Sequence[float] | None = None,
    axes: str = "zyx",
    check_size: Callable[[int], object] = lambda _: None,
) -> Scan:
    """A scan of what a caller has.

    Args:
        image: The path of a file or of a folder of DICOM slices, a ``Volume``, an image of nibabel
            or SimpleITK, or a numpy array of three axes.
        spacing_mm: An array alone needs the size of its voxels along each axis, in its order.
        axes: An array alone needs its order, ``zyx`` or ``xyz``. x grows to the patient's left,
            y to the back, z to the head.
        check_size: Given the number of voxels of a file, nibabel's as well, before any is read;
            may raise.

    Raises:
        InputError: It is none of these, is missing or damaged, is not of three axes, or holds
            values that are not finite real numbers.
    """
    if isinstance(image, np.ndarray):
        return _of_array(image, spacing_mm, axes)
    if spacing_mm is not None:
        raise InputError(
            f"spacing_mm is {spacing_mm!r} for a {type(image).__name__}, expected it for a "
            "numpy array only: other images say it themselves"
        )
    if isinstance(image, str | os.PathLike):
        return reader.read_scan(Path(image), check_size)
    if isinstance(image, Volume):
        _check_voxels(image.voxels, "the volume")
        _check_place(image, "the volume")
        return image if isinstance(image, Scan) else scan_of(image)
    if is_of_simpleitk(image):
        return _of_simpleitk(image)
    if is_of_nibabel(image):
        return _of_nibabel(image, check_size)
    raise InputError(
        f"a scan is a {type(image).__name__}, expected a path, a Volume, a numpy array, or an "
        "image of nibabel or SimpleITK"
    )


def name_of(image: Any) -> str:
    """What messages call it: its path, or "the scan"."""
    return str(image) if isinstance(image, str | os.PathLike) else "the scan"


def is_one(image: Any) -> bool:
    """Whether it is a single scan, though one can iterate over it as over many."""
    return (
        isinstance(image, str | os.PathLike | Volume)
        or (isinstance(image, np.ndarray) and image.ndim == 3)
        or is_of_simpleitk(image)
        or is_of_nibabel(image)
    )


def bytes_of(image: Any) -> int:
    """The bytes that a scan takes on disk; 0 for what is in memory already."""
    if not isinstance(image, str | os.PathLike):
        return 0
    path = Path(image)
    try:
        return sum(file.stat().st_size for file in (walk(path).files if path.is_dir() else [path]))
    except (OSError, InputError):  # which will be said when it is read
        return 0


def _of_array(array: npt.NDArray[Any], spacing_mm: Sequence[float] | None, axes: str) -> Scan:
    if axes not in _AXES:
        raise InputError(f"axes {axes!r}, expected one of {', '.join(_AXES)}")
    if spacing_mm is None:
        raise InputError(
            f"an array of shape {array.shape} without spacing_mm; expected the size of a voxel "
            f"along {', '.join(axes)} in mm"
        )
    try:
        steps = tuple(float(step) for step in spacing_mm)
    except (TypeError, ValueError):
        steps = ()
    if len(steps) != 3 or not all(0 < step < math.inf for step in steps):
        raise InputError(f"spacing_mm {spacing_mm!r}, expected three positive sizes in mm")
    _check_voxels(array, "the array")
    direction = np.zeros((3, 3))
    for axis, letter in enumerate(axes):
        direction[_STEPS.index(letter), axis] = 1
    warnings = tuple(_about_order(array.shape, steps, axes))
    return Scan(array, triple(steps), direction=_flat(direction), warnings=warnings)


def _about_order(shape: Sequence[int], steps: Sequence[float], axes: str) -> list[str]:
    """What speaks against the order of the axes, or of the spacing.

    Of a CT two axes are alike, those of a slice, in their number of voxels and in their size.
    """
    by_size = _odd_one(shape, 0)
    by_step = _odd_one(steps, _SAME_STEP)
    given = f"an array of {times(shape)} voxels of {times(steps, 4)} mm, both taken as {axes}"
    if by_size is not None and by_step is not None and by_size != by_step:
        return [
            f"{given}: axis {by_size} stands out by its number of voxels, axis {by_step} by their "
            "size; is spacing_mm in the order of the array's axes?"
        ]
    between_slices = axes.index("z")
    odd = by_size if by_size is not None else by_step
    if odd is not None and odd != between_slices:
        other = _AXES[1 - _AXES.index(axes)]
        meant = f"; is axes='{other}' meant?" if odd == other.index("z") else ""
        return [
            f"{given}: axis {odd} stands out, where slices lie along axis {between_slices}{meant}"
        ]
    return []


def _odd_one(values: Sequence[float], tolerance: float) -> int | None:
    """Which of three values differs where the two others are alike; None if none does."""
    alike = [
        math.isclose(values[(axis + 1) % 3], values[(axis + 2) % 3], rel_tol=tolerance)
        for axis in range(3)
    ]
    return alike.index(True) if sum(alike) == 1 else None


def is_of_simpleitk(image: Any) -> bool:
    """Whether it is an image of SimpleITK; whoever has one has imported that."""
    library = sys.modules.get("SimpleITK")
    return library is not None and isinstance(image, library.Image)


def is_of_nibabel(image: Any) -> bool:
    """Whether it is an image of nibabel, by what every kind of them has."""
    return hasattr(image, "dataobj") and hasattr(image, "affine")


def _of_simpleitk(image: sitk.Image) -> Scan:
    import SimpleITK as sitk

    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise InputError(
            f"a SimpleITK image of {image.GetDimension()} axes with "
            f"{image.GetNumberOfComponentsPerPixel()} numbers a voxel, expected 3 axes and one "
            "number"
        )
    voxels = sitk.GetArrayFromImage(image)
    _check_voxels(voxels, "the SimpleITK image")
    direction = np.array(image.GetDirection()).reshape(3, 3)[::-1, ::-1]
    return Scan(
        voxels,
        triple(image.GetSpacing()[::-1]),
        triple(image.GetOrigin()[::-1]),
        _flat(_checked_directions(direction, "the SimpleITK image")),
    )


def _of_nibabel(image: Any, check_size: Callable[[int], object]) -> Scan:
    """An image of nibabel; the array's axes stay in their order, as its affine has them."""
    check_size(math.prod(image.shape))
    try:  # its file is read only now
        voxels = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        name = image.get_filename() or "the nibabel image"
        told = " ".join(str(error).split())
        raise InputError(f"{name}: damaged or gone, its voxels cannot be read ({told})") from error
    if voxels.ndim > 3 and all(size == 1 for size in voxels.shape[3:]):
        voxels = voxels.reshape(voxels.shape[:3])
    if voxels.dtype == np.float64:  # what scaled whole numbers become
        voxels = voxels.astype(np.float32)
    _check_voxels(voxels, "the nibabel image")
    if image.affine is None:
        raise InputError("a nibabel image without an affine, expected one that gives its place")
    mm, warnings = _about_header(image)
    affine = np.asarray(image.affine, np.float64)
    columns = (_TO_LPS @ affine[:3, :3] * mm)[::-1]  # rows z, y, x; columns the array's axes
    steps = np.sqrt((columns**2).sum(0))
    if not (np.isfinite(affine).all() and steps.min() > 0):
        raise InputError("a nibabel image with an affine that is no place, expected finite steps")
    origin = (_TO_LPS @ affine[:3, 3] * mm)[::-1]
    return Scan(
        voxels,
        triple(steps),
        triple(origin),
        _flat(_checked_directions(columns / steps, "the nibabel image")),
        warnings=warnings,
    )


def _about_header(image: Any) -> tuple[float, tuple[str, ...]]:
    """Millimetres in a unit of the affine, and what is odd about a NIfTI header."""
    raw = bytes(getattr(image.header, "binaryblock", b""))
    if len(raw) != nifti.HEADER_BYTES or raw[344:348] not in (b"n+1\0", b"ni1\0"):
        return 1.0, ()
    factor, warnings = nifti.mm_per_unit(raw), []
    if nifti.frames_differ(raw) > reader.SAME_FRAME_MM:
        warnings.append(
            f"its sform and qform put a corner {nifti.frames_differ(raw):.1f} mm apart; taken was "
            "its affine"
        )
    if not nifti.has_frame(raw):
        warnings.append(
            "neither sform nor qform says how the head lies; taken was nibabel's affine, the first "
            "axis from right to left, the second from back to front, the third from below to above"
        )
    if factor != 1:
        unit = "metres" if factor > 1 else "micrometres"
        warnings.append(f"its header says sizes in {unit}, read so")
    return factor, tuple(warnings)


def _check_voxels(voxels: npt.NDArray[Any], name: str) -> None:
    """Refuse what is no volume of finite real numbers."""
    if isinstance(voxels, np.ma.MaskedArray):
        raise InputError(f"{name} is a masked array, expected one that says what is masked: air")
    if voxels.ndim != 3 or voxels.size == 0:
        raise InputError(f"{name} has shape {voxels.shape}, expected three axes")
    if voxels.dtype.kind not in "iuf":
        raise InputError(f"{name} is of {voxels.dtype}, expected real numbers")
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        count = int(voxels.size - np.isfinite(voxels).sum())
        where = counted(count, "voxel")
        raise InputError(f"{name}: NaN or infinite in {where}, expected finite HU")


def _check_place(image: Volume, name: str) -> None:
    """Refuse sizes of voxels, a place or directions that are none."""
    steps, origin, direction = image.spacing_mm, image.origin_mm, np.asarray(image.direction)
    if len(steps) != 3 or not all(0 < step < math.inf for step in steps):
        raise InputError(f"{name}: spacing_mm {steps}, expected three positive sizes in mm")
    if len(origin) != 3 or not np.isfinite(origin).all():
        raise InputError(f"{name}: origin_mm {origin}, expected a place in mm")
    if direction.shape != (9,):
        raise InputError(f"{name}: a direction of shape {direction.shape}, expected 9 numbers")
    _checked_directions(direction.reshape(3, 3), name)


def _checked_directions(direction: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
    if not np.allclose(direction @ direction.T, np.eye(3), atol=1e-3):
        raise InputError(f"{name}: its axes are not at right angles, expected a straight grid")
    return direction


def _flat(direction: npt.NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(value) for value in direction.ravel())
