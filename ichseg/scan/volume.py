"""Volumes on disk and in memory. The only module that knows SimpleITK's x-y-z order.

Everywhere else arrays, spacings, positions and direction matrices are in numpy's (z, y, x) order:
``position = origin_mm + direction @ (spacing_mm * index)``, all four in (z, y, x), in the LPS frame
that ITK uses (so a position reads superior, posterior, left).
"""

from __future__ import annotations

import contextlib
import gzip
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from ichseg.errors import InputError, OutputError
from ichseg.files import NIFTI_SUFFIXES, SCAN_SUFFIXES, replacing, suffix_of
from ichseg.scan import headers
from ichseg.scan.headers import NIFTI1_HEADER, Header

_NIFTI1_DATA_OFFSET = 352  # header and the four bytes that say "no extensions"
_UINT8_DATATYPE = 2
_MORE = 1 << 16  # bytes, which a full disk has no room for


@dataclass(frozen=True, slots=True)
class Volume:
    """Voxels with their place in the patient.

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
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    nifti_header: bytes | None = None

    def __post_init__(self) -> None:
        if self.voxels.ndim != 3:
            raise ValueError(f"a volume has 3 axes, got shape {self.voxels.shape}")

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(np.prod(self.spacing_mm)) / 1000.0

    def with_voxels(self, voxels: npt.NDArray[np.generic]) -> Volume:
        """The same geometry around other voxels of the same shape."""
        if voxels.shape != self.voxels.shape:
            raise ValueError(f"geometry is for shape {self.voxels.shape}, got {voxels.shape}")
        return Volume(voxels, self.spacing_mm, self.origin_mm, self.direction, self.nifti_header)


def read(path: Path) -> Volume:
    """Read an ``.mha``, ``.nii`` or ``.nii.gz`` file as a finite 3D volume.

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
        raise InputError(f"{path}: {count} voxels are NaN or infinite, expected finite intensities")
    return channels[0]


def read_channels(path: Path) -> tuple[Volume, ...]:
    """Read the channels of a 4D file, or the one of a 3D file; NaN and infinity are let through.

    Channels are the last axis of a NIfTI file. Their place is that of the first three axes:
    spacing and origin without the fourth, direction the upper left 3x3 of 4x4.

    Raises:
        InputError: The file is missing, of another type, damaged, or neither 3D nor 4D.
    """
    header = _header(path)
    reader = _place(path, header)
    if reader.GetSize() != header.shape[::-1]:
        raise _damaged(path, f"size {reader.GetSize()} by ITK, {header.shape[::-1]} by its header")
    axes = len(header.shape)
    spacing, origin = reader.GetSpacing()[:3][::-1], reader.GetOrigin()[:3][::-1]
    direction = np.array(reader.GetDirection()).reshape(axes, axes)[:3, :3][::-1, ::-1]
    if not (np.isfinite([*spacing, *origin]).all() and min(spacing) > 0):
        raise InputError(
            f"{path}: voxels of {spacing} mm at {origin} mm (z, y, x), expected positive sizes"
        )
    if not np.allclose(direction @ direction.T, np.eye(3), atol=1e-3):
        raise InputError(f"{path}: its axes are not at right angles, expected a straight grid")
    voxels = headers.read_voxels(path, suffix_of(path), header)
    return tuple(
        Volume(
            voxels=channel,
            spacing_mm=_triple(spacing),
            origin_mm=_triple(origin),
            direction=tuple(float(value) for value in direction.ravel()),
            nifti_header=header.raw if header.raw and axes == 3 else None,
        )
        for channel in voxels.reshape(-1, *header.shape[-3:])
    )


def stored_shape(path: Path) -> tuple[int, ...]:
    """Shape ``(z, y, x)`` or ``(channel, z, y, x)`` of a file; its voxels are not read.

    Raises:
        InputError: The file is missing, of another type, has no readable header, or is neither 3D
            nor 4D with one number per voxel.
    """
    return _header(path).shape


def write(volume: Volume, path: Path) -> None:
    """Write a volume; the file appears whole or not at all.

    A uint8 volume that came from a NIfTI-1 file and goes to one keeps that file's header. The
    written geometry is read back and compared before the file gets its name.

    Raises:
        OutputError: The folder cannot be written, or the written geometry differs.
    """
    suffix = suffix_of(path)
    if not suffix:
        raise OutputError(
            f"{path}: cannot write this file type, expected one of {', '.join(SCAN_SUFFIXES)}"
        )
    with replacing(path, suffix=suffix) as temporary:
        if (
            suffix in NIFTI_SUFFIXES
            and volume.nifti_header is not None
            and volume.voxels.dtype == np.uint8
        ):
            _write_nifti1(volume, temporary)
        else:
            _write_image(volume, temporary)
        _check_geometry(volume, temporary, path)


def _why_not_written(path: Path, reason: str) -> OSError:
    """Why a library could not write a file: what the system says to more of it, if it does."""
    try:
        with path.open("ab") as file:
            file.write(bytes(_MORE))
    except OSError as error:
        return error
    return OSError(reason)


def _damaged(path: Path, reason: object) -> InputError:
    return InputError(f"{path}: damaged or not a {suffix_of(path)} volume ({reason})")


def _header(path: Path) -> Header:
    """The checked header of a file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    suffix = suffix_of(path)
    if not suffix:
        raise InputError(f"{path}: unknown file type, expected one of {', '.join(SCAN_SUFFIXES)}")
    return headers.read_header(path, suffix)


def _place(path: Path, header: Header) -> sitk.ImageFileReader:
    """A reader that knows size and place of the file's volume.

    Of a NIfTI file it is shown the header alone: the rest is none of its business, and it goes by
    the name whether that is compressed.
    """
    reader = sitk.ImageFileReader()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    with _beside(path, header) if header.raw else contextlib.nullcontext() as beside:
        shown = beside or path
        reader.SetImageIO("NiftiImageIO" if beside else "MetaImageIO")
        reader.SetFileName(str(shown))
        try:
            reader.ReadImageInformation()
        except RuntimeError as error:
            raise _damaged(path, _itk_reason(error)) from error
    return reader


@contextlib.contextmanager
def _beside(path: Path, header: Header) -> Iterator[Path]:
    """A temporary file that holds a NIfTI header and no voxels."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            shown = Path(folder) / "header.nii"
            shown.write_bytes(headers.place_only(header.raw) + bytes(4))
            yield shown
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"{path}: cannot read without a temporary file of 352 bytes ({reason}); TMPDIR names "
            "another folder for it"
        ) from error


def _itk_reason(error: RuntimeError) -> str:
    """The last line of an ITK exception that says something, without its source position."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or lines[-1].startswith("Reason:"):  # what errno held: "Success"
        return "ITK cannot read it"
    return lines[-1].split("): ", 1)[-1][:160]


def _write_image(volume: Volume, path: Path) -> None:
    image = sitk.GetImageFromArray(volume.voxels)
    image.SetSpacing(volume.spacing_mm[::-1])
    image.SetOrigin(volume.origin_mm[::-1])
    image.SetDirection(
        [float(v) for v in np.array(volume.direction).reshape(3, 3)[::-1, ::-1].ravel()]
    )
    try:
        sitk.WriteImage(image, str(path), useCompression=True)
    except RuntimeError as error:
        raise _why_not_written(path, _itk_reason(error)) from error
    if not headers.is_whole(path, suffix_of(path), volume.voxels.nbytes):  # nothing is said then
        raise _why_not_written(path, "only a part of it was written")


def _endian(header: bytes | bytearray) -> str:
    return "<" if struct.unpack_from("<i", header, 0)[0] == NIFTI1_HEADER else ">"


def _write_nifti1(volume: Volume, path: Path) -> None:
    """Repeat the source's header; only voxel type, scaling and free text are changed."""
    header = bytearray(volume.nifti_header or b"")
    endian = _endian(header)
    struct.pack_into(endian + "hh", header, 70, _UINT8_DATATYPE, 8)  # datatype, bitpix
    struct.pack_into(endian + "f", header, 108, float(_NIFTI1_DATA_OFFSET))  # vox_offset
    struct.pack_into(endian + "ff", header, 112, 1.0, 0.0)  # scl_slope, scl_inter
    struct.pack_into(endian + "ff", header, 124, 0.0, 0.0)  # cal_max, cal_min
    header[4:32] = bytes(28)  # data_type, db_name: like descrip, text that may name the patient
    header[148:228] = bytes(80)  # descrip
    header[228:252] = bytes(24)  # aux_file
    header[328:344] = bytes(16)  # intent_name
    packed = path.name.lower().endswith(".gz")
    # no name and no time: the same mask gives the same bytes; level 3 takes half of 6's time
    with (
        path.open("wb") as file,
        gzip.GzipFile("", "wb", 3, file, mtime=0)
        if packed
        else contextlib.nullcontext(file) as out,
    ):
        out.write(bytes(header) + bytes(4))
        out.write(np.ascontiguousarray(volume.voxels).data)


def _check_geometry(volume: Volume, written: Path, path: Path) -> None:
    """Refuse a file whose size or place differs from what was to be written."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(written))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise OutputError(
            f"{path}: the written file cannot be read back ({_itk_reason(error)})"
        ) from error
    direction = np.array(reader.GetDirection()).reshape(3, 3)[::-1, ::-1].ravel()
    exact = suffix_of(path) == ".mha"
    same = (
        reader.GetSize()[::-1] == volume.voxels.shape
        and np.allclose(
            reader.GetSpacing()[::-1], volume.spacing_mm, rtol=0 if exact else 1e-6, atol=0
        )
        and np.allclose(
            reader.GetOrigin()[::-1], volume.origin_mm, rtol=0, atol=0 if exact else 1e-4
        )
        and np.allclose(direction, volume.direction, rtol=0, atol=0 if exact else 1e-6)
    )
    if not same:
        raise OutputError(f"{path}: the written geometry differs from the volume's")


def _triple(values: tuple[float, ...]) -> tuple[float, float, float]:
    z, y, x = (float(value) for value in values)
    return z, y, x
