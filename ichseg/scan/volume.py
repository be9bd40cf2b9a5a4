"""Volumes on disk and in memory. The only module that knows SimpleITK's x-y-z order.

Everywhere else arrays, spacings, positions and direction matrices are in numpy's (z, y, x) order:
``position = origin_mm + direction @ (spacing_mm * index)``, all four in (z, y, x), in the LPS frame
that ITK uses (so a position reads superior, posterior, left).
"""

from __future__ import annotations

import contextlib
import gzip
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ichseg.errors import InputError, OutputError
from ichseg.files import (
    NIFTI_SUFFIXES,
    SCAN_SUFFIXES,
    WRITTEN_SUFFIXES,
    replacing,
    suffix_of,
)
from ichseg.scan import headers, nifti
from ichseg.scan.stored import Header
from ichseg.wording import counted, times

if TYPE_CHECKING:  # imported where a file is read or written: who has arrays does not need it
    import SimpleITK as sitk

Triple = tuple[float, float, float]
_MORE = 1 << 16  # bytes, which a full disk has no room for


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """Voxels with their place in the patient. Two are equal only if they are one object.

    Attributes:
        voxels: Shape ``(z, y, x)``; any real dtype (HU for CT, labels for masks).
        spacing_mm: Voxel size along ``(z, y, x)``.
        origin_mm: Position of the centre of voxel (0, 0, 0), ``(z, y, x)``, LPS.
        direction: 3x3, row-major tuple; column j is the unit vector of array axis j, rows are ``(z,
            y, x)``.
        nifti_header: The 348 header bytes of the NIfTI-1 file this came from, or None. A mask
            written as NIfTI repeats them, so sform, qform, codes and units survive to the byte.
    """

    voxels: npt.NDArray[np.generic]
    spacing_mm: Triple
    origin_mm: Triple = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    nifti_header: bytes | None = None

    def __post_init__(self) -> None:
        if self.voxels.ndim != 3:
            raise ValueError(f"a volume has 3 axes, got shape {self.voxels.shape}")

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(np.prod(self.spacing_mm)) / 1000.0

    @property
    def grid(self) -> str:
        """Its size in words."""
        return f"{times(self.voxels.shape)} voxels of {times(self.spacing_mm, digits=3)} mm"

    def with_voxels(self, voxels: npt.NDArray[np.generic]) -> Volume:
        """A plain volume of the same geometry around other voxels of the same shape."""
        if voxels.shape != self.voxels.shape:
            raise ValueError(f"geometry is for shape {self.voxels.shape}, got {voxels.shape}")
        return Volume(voxels, self.spacing_mm, self.origin_mm, self.direction, self.nifti_header)


def read(path: Path | str) -> Volume:
    """Read a file, by its name one of ``files.SCAN_SUFFIXES``, as a finite 3D volume.

    Raises:
        InputError: The file is missing, of another type, damaged, not 3D, or holds NaN or infinity.
    """
    channels = read_channels(path)
    if len(channels) != 1:
        shape = (len(channels), *channels[0].voxels.shape)
        raise InputError(f"{path}: 4D image of size {shape[::-1]}, expected a 3D volume")
    voxels = channels[0].voxels
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        count = int(voxels.size - np.isfinite(voxels).sum())
        where = counted(count, "voxel")
        raise InputError(f"{path}: NaN or infinite in {where}, expected finite intensities")
    return channels[0]


def read_channels(path: Path | str) -> tuple[Volume, ...]:
    """Read the channels of a 4D file, or the one of a 3D file; NaN and infinity are let through.

    Channels are the last axis of a NIfTI file. Their place is that of the first three axes:
    spacing and origin without the fourth, direction the upper left 3x3 of 4x4.

    Raises:
        InputError: The file is missing, of another type, damaged, or neither 3D nor 4D.
    """
    path = Path(path)
    header = _header(path)
    spacing_mm, origin_mm, direction = _place(path, header)
    voxels = headers.read_voxels(path, suffix_of(path), header)
    repeats = suffix_of(path) in NIFTI_SUFFIXES and len(header.shape) == 3
    return tuple(
        Volume(
            voxels=channel,
            spacing_mm=spacing_mm,
            origin_mm=origin_mm,
            direction=direction,
            nifti_header=header.raw if repeats else None,
        )
        for channel in voxels.reshape(-1, *header.shape[-3:])
    )


def has_frame(path: Path | str) -> bool:
    """Whether a file's header says how the patient lies; of NIfTI ask ``nifti.has_frame``.

    Raises:
        InputError: The file has no readable header.
    """
    return _header(Path(path)).has_frame


def stored_shape(path: Path | str) -> tuple[int, ...]:
    """Shape ``(z, y, x)`` or ``(channel, z, y, x)`` of a file; its voxels are not read.

    Raises:
        InputError: The file is missing, of another type, has no readable header, or is neither 3D
            nor 4D with one number per voxel.
    """
    return _header(Path(path)).shape


def write(volume: Volume, path: Path | str, *, level: int = -1) -> None:
    """Write a volume as an ``.mha``, ``.nii``, ``.nii.gz`` or ``.nrrd`` file, or not at all.

    A uint8 volume that came from a NIfTI-1 file and goes to one keeps that file's header. The
    written geometry is read back and compared before the file gets its name.

    Args:
        volume: What to write.
        path: The file.
        level: How hard to compress, 1 to 9; -1 leaves it to the format.

    Raises:
        OutputError: The folder cannot be written, or the written geometry differs.
    """
    path = Path(path)
    suffix = suffix_of(path)
    if suffix not in WRITTEN_SUFFIXES:
        raise OutputError(
            f"{path}: cannot write this file type, expected one of {', '.join(WRITTEN_SUFFIXES)}"
        )
    volume = volume.with_voxels(_of_itk_type(volume.voxels))
    repeated = volume.nifti_header if suffix in NIFTI_SUFFIXES else None
    with replacing(path, suffix=suffix) as temporary:
        if repeated is not None and volume.voxels.dtype == np.uint8:
            _write_nifti1(volume, temporary, repeated)
        else:
            _write_image(volume, temporary, path, level)
        _check_geometry(volume, temporary, path)


def to_itk(volume: Volume) -> sitk.Image:
    """The volume as an image of SimpleITK, with its place."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(volume.voxels)
    image.SetSpacing(triple(volume.spacing_mm[::-1]))  # which may be numbers of numpy
    image.SetOrigin(triple(volume.origin_mm[::-1]))
    image.SetDirection(
        [float(v) for v in np.array(volume.direction).reshape(3, 3)[::-1, ::-1].ravel()]
    )
    return image


def _of_itk_type(voxels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The voxels as SimpleITK takes them: not as bool, in half precision or another byte order."""
    if voxels.dtype == bool:
        return voxels.astype(np.uint8)
    if voxels.dtype == np.float16:
        return voxels.astype(np.float32)
    return voxels.astype(voxels.dtype.newbyteorder("="), copy=False)


def _why_not_written(path: Path, reason: str) -> OSError:
    """Why a library could not write a file: what the system says to more of it, if it does."""
    try:
        with path.open("ab") as file:
            file.write(bytes(_MORE))
    except OSError as error:
        return error
    return OSError(reason)


def _header(path: Path) -> Header:
    """The checked header of a file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    suffix = suffix_of(path)
    if not suffix:
        raise InputError(f"{path}: unknown file type, expected one of {', '.join(SCAN_SUFFIXES)}")
    return headers.read_header(path, suffix)


def _place(path: Path, header: Header) -> tuple[Triple, Triple, tuple[float, ...]]:
    """Spacing, origin and direction of a file's first three axes, as ITK takes them.

    Of a NIfTI file ITK is shown the header alone: the rest is none of its business, and it goes by
    the name whether that is compressed.
    """
    if header.place is not None:
        found = header.place
        return _checked_place(path, found.spacing_mm, found.origin_mm, np.array(found.direction))
    import SimpleITK as sitk

    is_nifti = suffix_of(path) in NIFTI_SUFFIXES
    reader = sitk.ImageFileReader()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader.SetImageIO("NiftiImageIO" if is_nifti else "MetaImageIO")
    try:
        with _nifti_header_alone(header) if is_nifti else _named_for_itk(path) as shown:
            reader.SetFileName(str(shown))
            reader.ReadImageInformation()
    except RuntimeError as error:
        if "orthonormal" in str(error):
            raise _not_straight(path) from error
        raise headers.damaged(path, suffix_of(path), _itk_reason(error)) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"{path}: cannot read without a temporary file of {nifti.VOXELS_AT} bytes ({reason}); "
            "TMPDIR names another folder for it"
        ) from error
    if reader.GetSize() != header.shape[::-1]:
        reason = f"size {reader.GetSize()} by ITK, {header.shape[::-1]} by its header"
        raise headers.damaged(path, suffix_of(path), reason)
    axes = len(header.shape)
    spacing_mm, origin_mm = reader.GetSpacing()[:3][::-1], reader.GetOrigin()[:3][::-1]
    direction = np.array(reader.GetDirection()).reshape(axes, axes)[:3, :3][::-1, ::-1]
    return _checked_place(path, spacing_mm, origin_mm, direction)


def _checked_place(
    path: Path,
    spacing_mm: tuple[float, ...],
    origin_mm: tuple[float, ...],
    direction: npt.NDArray[np.float64],
) -> tuple[Triple, Triple, tuple[float, ...]]:
    """What can be a place; all of it in the order ``(z, y, x)``."""
    direction = direction.reshape(3, 3)
    if not (np.isfinite([*spacing_mm, *origin_mm]).all() and min(spacing_mm) > 0):
        raise InputError(
            f"{path}: voxels of {spacing_mm} mm at {origin_mm} mm (z, y, x), expected positive "
            "sizes"
        )
    if not np.allclose(direction @ direction.T, np.eye(3), atol=1e-3):
        raise _not_straight(path)
    cosines = tuple(float(value) for value in direction.ravel())
    return triple(spacing_mm), triple(origin_mm), cosines


def _not_straight(path: Path) -> InputError:
    """The error for a file whose axes are not at right angles."""
    return InputError(f"{path}: its axes are not at right angles, expected a straight grid")


@contextlib.contextmanager
def _nifti_header_alone(header: Header) -> Iterator[Path]:
    """A temporary file that holds a NIfTI header and no voxels."""
    with temporary_folder() as folder:
        shown = folder / "header.nii"
        shown.write_bytes(nifti.place_only(header.raw) + bytes(4))
        yield shown


@contextlib.contextmanager
def _named_for_itk(path: Path) -> Iterator[Path]:
    """The path, or a link to it where its name is not UTF-8: on such a name SimpleITK aborts."""
    if _is_utf8(path):
        yield path
        return
    with temporary_folder() as folder:
        link = folder / f"volume{suffix_of(path)}"
        link.symlink_to(path.absolute())
        yield link


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for what ITK is shown in place of a file, with a name that ITK takes.

    Raises:
        OSError: It cannot be made.
    """
    with tempfile.TemporaryDirectory() as folder:
        if not _is_utf8(Path(folder)):
            raise OSError(f"the name of {tempfile.gettempdir()!r} is not UTF-8")
        yield Path(folder)


def _is_utf8(path: Path) -> bool:
    """Whether SimpleITK can be given the name: as text, and as the bytes that the system has."""
    try:
        if os.fsencode(path) != str(path).encode("utf-8"):  # by a locale that is not UTF-8
            return False
    except UnicodeEncodeError:
        return False
    return True


def _itk_reason(error: Exception) -> str:
    """The last line of an ITK exception that says something, without its source position."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or lines[-1].startswith("Reason:"):  # what errno held: "Success"
        return "ITK cannot read it"
    return lines[-1].split("): ", 1)[-1][:160]


def _write_image(volume: Volume, path: Path, final: Path, level: int) -> None:
    """Write by ITK, compressed, what will get another name."""
    import SimpleITK as sitk

    try:
        image = to_itk(volume)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = _itk_reason(error)
        raise OutputError(f"{final}: not a volume that can be written ({reason})") from error
    try:
        with _named_for_itk(path) as shown:
            sitk.WriteImage(image, str(shown), useCompression=True, compressionLevel=level)
    except RuntimeError as error:
        raise _why_not_written(path, _itk_reason(error)) from error
    if not headers.is_whole(path, suffix_of(path), volume.voxels.nbytes):  # nothing is said then
        raise _why_not_written(path, "only a part of it was written")


def _write_nifti1(volume: Volume, path: Path, header: bytes) -> None:
    """Write a mask behind the header of the scan that it belongs to."""
    packed = path.name.lower().endswith(".gz")
    # no name and no time: the same mask gives the same bytes; level 1 takes a third of 3's time,
    # and a mask of a few lesions is no larger
    with (
        path.open("wb") as file,
        gzip.GzipFile("", "wb", 1, file, mtime=0)
        if packed
        else contextlib.nullcontext(file) as out,
    ):
        out.write(nifti.mask_header(header) + bytes(4))
        out.write(np.ascontiguousarray(volume.voxels).data)


def _check_geometry(volume: Volume, written: Path, path: Path) -> None:
    """Refuse a file whose size or place differs from what was to be written."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    try:
        with _named_for_itk(written) as shown:
            reader.SetFileName(str(shown))
            reader.ReadImageInformation()
    except RuntimeError as error:
        raise OutputError(
            f"{path}: the written file cannot be read back ({_itk_reason(error)})"
        ) from error
    direction = np.array(reader.GetDirection()).reshape(3, 3)[::-1, ::-1].ravel()
    exact = suffix_of(path) == ".mha"
    place = reader.GetSpacing()[::-1], reader.GetOrigin()[::-1], direction
    same_size = reader.GetSize()[::-1] == volume.voxels.shape
    if not (same_size and _same_place(place, volume, exact=exact)):
        raise OutputError(f"{path}: the written geometry differs from the volume's")


def check_place(grid: Volume, written: Path, path: Path, *, labels: int) -> None:
    """Refuse a NIfTI file of one or several labels whose size or place differs from a volume's.

    Args:
        grid: The volume.
        written: The file.
        path: The name that it will get, for messages.
        labels: How many there are; more than one are its fourth axis.

    Raises:
        OutputError: It differs, or cannot be read back.
    """
    try:
        header = headers.read_header(written, suffix_of(written))
        place = _place(written, header)
    except InputError as error:
        raise OutputError(f"{path}: the written file cannot be read back ({error})") from error
    same_size = header.shape == ((labels,) if labels > 1 else ()) + grid.voxels.shape
    if not (same_size and _same_place(place, grid)):
        raise OutputError(f"{path}: the written geometry differs from the volume's")


def _same_place(
    found: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike],
    wanted: Volume,
    *,
    exact: bool = False,
) -> bool:
    """Whether a spacing, an origin and a direction are a volume's, as a file's numbers can be."""
    return all(
        np.allclose(of_file, of_volume, rtol=0 if exact else rtol, atol=0 if exact else atol)
        for of_file, of_volume, rtol, atol in (
            (found[0], wanted.spacing_mm, 1e-6, 0),
            (found[1], wanted.origin_mm, 0, 1e-4),
            (found[2], wanted.direction, 0, 1e-6),
        )
    )


def triple(values: Iterable[float]) -> Triple:
    """Three values, no more and no fewer, as plain numbers."""
    first, second, third = (float(value) for value in values)
    return first, second, third
