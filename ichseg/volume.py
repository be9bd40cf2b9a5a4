"""Volumes on disk and in memory. The only module that knows SimpleITK's x-y-z order.

Everywhere else arrays, spacings, positions and direction matrices are in numpy's (z, y, x) order:
``position = origin_mm + direction @ (spacing_mm * index)``, all four in (z, y, x), in the LPS frame
that ITK uses (so a position reads superior, posterior, left).
"""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from ichseg.errors import InputError, OutputError

NIFTI_SUFFIXES = (".nii.gz", ".nii")
SUFFIXES = (".mha", *NIFTI_SUFFIXES)
_NIFTI1_HEADER = 348
_NIFTI1_DATA_OFFSET = 352  # header and the four bytes that say "no extensions"
_UINT8_DATATYPE = 2
_NIFTI_DATATYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8",
    256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip


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


def suffix_of(path: Path) -> str:
    """The supported suffix of a file name (``.nii.gz`` as one), lower case, or an empty string."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def stem_of(path: Path) -> str:
    """File name without its supported suffix."""
    return path.name[: len(path.name) - len(suffix_of(path))]


def read(path: Path) -> Volume:
    """Read an ``.mha``, ``.nii`` or ``.nii.gz`` file as a finite 3D volume.

    Raises:
        InputError: The file is missing, of another type, damaged, not 3D, or holds NaN or infinity.
    """
    shape = stored_shape(path)
    if len(shape) != 3:
        raise InputError(f"{path}: {len(shape)}D image of size {shape[::-1]}, expected a 3D volume")
    (volume,) = read_channels(path)
    voxels = volume.voxels
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        count = int(voxels.size - np.isfinite(voxels).sum())
        raise InputError(f"{path}: {count} voxels are NaN or infinite, expected finite intensities")
    return volume


def read_channels(path: Path) -> tuple[Volume, ...]:
    """Read the channels of a 4D file, or the one of a 3D file; NaN and infinity are let through.

    Channels are the last axis of a NIfTI file. Their place is that of the first three axes:
    spacing and origin without the fourth, direction the upper left 3x3 of 4x4.

    Raises:
        InputError: The file is missing, of another type, damaged, or neither 3D nor 4D.
    """
    reader, shape = _examine(path)
    content = _content(path)
    nifti = suffix_of(path) in NIFTI_SUFFIXES
    voxels = _nifti1_voxels(content, shape, path) if nifti else _itk_voxels(reader, path)
    axes = len(shape)
    direction = np.array(reader.GetDirection()).reshape(axes, axes)[:3, :3][::-1, ::-1]
    return tuple(
        Volume(
            voxels=channel,
            spacing_mm=_triple(reader.GetSpacing()[:3][::-1]),
            origin_mm=_triple(reader.GetOrigin()[:3][::-1]),
            direction=tuple(float(value) for value in direction.ravel()),
            nifti_header=content[:_NIFTI1_HEADER] if nifti and axes == 3 else None,
        )
        for channel in voxels.reshape(-1, *shape[-3:])
    )


def stored_shape(path: Path) -> tuple[int, ...]:
    """Shape ``(z, y, x)`` or ``(channel, z, y, x)`` of a file; its voxels are not read.

    Raises:
        InputError: The file is missing, of another type, has no readable header, or is neither 3D
            nor 4D with one number per voxel.
    """
    return _examine(path)[1]


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
            f"{path}: cannot write this file type, expected one of {', '.join(SUFFIXES)}"
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


@contextlib.contextmanager
def replacing(path: Path, *, suffix: str = "") -> Iterator[Path]:
    """A temporary name beside ``path`` that replaces it when the block ends well, else vanishes.

    Raises:
        OutputError: The folder cannot be created or written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-", suffix=suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise OutputError(f"{path}: cannot write ({reason})") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _content(path: Path) -> bytes:
    """The file's bytes, inflated if NIfTI, and seen to be undamaged where a checksum says so.

    ITK itself reads a truncated ``.nii.gz`` or an altered ``.mha`` without an error.
    """
    try:
        content = path.read_bytes()
        if suffix_of(path) in NIFTI_SUFFIXES:
            return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        end = re.search(rb"^ElementDataFile\s*=\s*LOCAL\s*?\n", content, re.MULTILINE)
        if end and re.search(rb"^CompressedData\s*=\s*[Tt]", content[: end.start()], re.MULTILINE):
            stream = zlib.decompressobj(zlib.MAX_WBITS | 32)  # zlib or gzip, as MetaIO takes both
            stream.decompress(content[end.end() :])
            if not stream.eof:
                raise EOFError("the compressed voxels end early")
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, error) from error
    return content


def _damaged(path: Path, reason: object) -> InputError:
    return InputError(f"{path}: damaged or not a {suffix_of(path)} volume ({reason})")


def _examine(path: Path) -> tuple[sitk.ImageFileReader, tuple[int, ...]]:
    """A reader of a file with three or four axes, and its shape."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if not suffix_of(path):
        raise InputError(f"{path}: unknown file type, expected one of {', '.join(SUFFIXES)}")
    reader = _open(path)
    size = reader.GetSize()
    if len(size) not in (3, 4):
        raise InputError(f"{path}: {len(size)}D image of size {size}, expected a 3D volume")
    if reader.GetNumberOfComponents() != 1:
        raise InputError(
            f"{path}: {reader.GetNumberOfComponents()} components per voxel, "
            "expected a scalar volume"
        )
    if min(size) < 1:
        raise InputError(f"{path}: empty volume of size {size}")
    return reader, tuple(size[::-1])


def _open(path: Path) -> sitk.ImageFileReader:
    """A reader that knows size and place of the file's volume."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("MetaImageIO" if suffix_of(path) == ".mha" else "NiftiImageIO")
    reader.SetFileName(str(path))
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _damaged(path, _itk_reason(error)) from error
    return reader


def _itk_voxels(reader: sitk.ImageFileReader, path: Path) -> npt.NDArray[np.generic]:
    try:
        voxels: npt.NDArray[np.generic] = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise _damaged(path, _itk_reason(error)) from error
    return voxels


def _nifti1_voxels(content: bytes, shape: tuple[int, ...], path: Path) -> npt.NDArray[np.generic]:
    """Voxels of an inflated NIfTI-1 file.

    Not left to ITK, whose NIfTI library fills what is missing with zeros, turns NaN into 0, and
    asked for ``a.nii.gz`` takes the voxels of ``a.nii`` if there is one.
    """
    if len(content) < _NIFTI1_HEADER or content[344:348] != b"n+1\0":
        raise _damaged(path, "no NIfTI-1 header")
    endian = _endian(content)
    (datatype,) = struct.unpack_from(endian + "h", content, 70)
    offset, slope, inter = struct.unpack_from(endian + "fff", content, 108)
    if datatype not in _NIFTI_DATATYPES:
        raise InputError(f"{path}: NIfTI datatype {datatype}, expected real numbers")
    dtype = np.dtype(endian + _NIFTI_DATATYPES[datatype])
    start = max(int(offset), _NIFTI1_HEADER) if math.isfinite(offset) else _NIFTI1_DATA_OFFSET
    end = start + math.prod(shape) * dtype.itemsize
    if len(content) < end:
        raise _damaged(path, f"{len(content)} bytes, its header says {end}")
    stored = np.frombuffer(content, dtype, math.prod(shape), start).reshape(shape)
    voxels = stored.astype(dtype.newbyteorder("="))
    if not math.isfinite(slope) or slope == 0:  # the standard's word for "not scaled"
        return voxels
    inter = inter if math.isfinite(inter) else 0.0
    return voxels if (slope, inter) == (1, 0) else voxels.astype(np.float32) * slope + inter


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
        raise OutputError(f"{path}: cannot write ({_itk_reason(error)})") from error


def _endian(header: bytes | bytearray) -> str:
    return "<" if struct.unpack_from("<i", header, 0)[0] == _NIFTI1_HEADER else ">"


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
