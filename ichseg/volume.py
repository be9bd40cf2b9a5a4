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
_FLOAT_DATATYPES = {16: "f4", 64: "f8"}


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
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    suffix = suffix_of(path)
    if not suffix:
        raise InputError(f"{path}: unknown file type, expected one of {', '.join(SUFFIXES)}")
    # ITK reads damaged files as zeros or noise without an error, so they are looked at before.
    nifti_header = None
    try:
        if suffix in NIFTI_SUFFIXES:
            nifti_header = _check_nifti1(path)
        else:
            _check_mha(path)
    except (OSError, EOFError, ValueError, OverflowError, struct.error, zlib.error) as error:
        raise InputError(f"{path}: damaged or not a {suffix} volume ({error})") from error
    image = _read_image(path)
    if image.GetDimension() != 3:
        raise InputError(
            f"{path}: {image.GetDimension()}D image of size {image.GetSize()}, expected a 3D volume"
        )
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise InputError(
            f"{path}: {image.GetNumberOfComponentsPerPixel()} components per voxel, "
            "expected a scalar volume"
        )
    voxels = sitk.GetArrayFromImage(image)  # (z, y, x)
    if min(voxels.shape) < 1:
        raise InputError(f"{path}: empty volume of shape {voxels.shape}")
    if voxels.dtype.kind not in "iuf":
        raise InputError(f"{path}: {voxels.dtype} voxels, expected real numbers")
    _check_finite(voxels, path)
    direction = np.array(image.GetDirection()).reshape(3, 3)[::-1, ::-1]
    return Volume(
        voxels=voxels,
        spacing_mm=_triple(image.GetSpacing()[::-1]),
        origin_mm=_triple(image.GetOrigin()[::-1]),
        direction=tuple(float(value) for value in direction.ravel()),
        nifti_header=nifti_header,
    )


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


def _read_image(path: Path) -> sitk.Image:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("MetaImageIO" if suffix_of(path) == ".mha" else "NiftiImageIO")
    reader.SetFileName(str(path))
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        image: sitk.Image = reader.Execute()
    except RuntimeError as error:
        raise InputError(
            f"{path}: damaged or not a {suffix_of(path)} volume ({_itk_reason(error)})"
        ) from error
    return image


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


def _check_finite(voxels: npt.NDArray[np.generic], path: Path) -> None:
    if voxels.dtype.kind == "f" and not (finite := np.isfinite(voxels)).all():
        count = voxels.size - int(finite.sum())
        raise InputError(f"{path}: {count} voxels are NaN or infinite, expected finite intensities")


def _check_mha(path: Path) -> None:
    """Inflate the voxels, which end with a checksum. What is not compressed ITK measures itself."""
    content = path.read_bytes()
    end = re.search(rb"^ElementDataFile\s*=\s*LOCAL\s*?\n", content, re.MULTILINE)
    if end and re.search(rb"^CompressedData\s*=\s*[Tt]", content[: end.start()], re.MULTILINE):
        stream = zlib.decompressobj(zlib.MAX_WBITS | 32)  # zlib or gzip, as MetaIO takes both
        stream.decompress(content[end.end() :])
        if not stream.eof:
            raise EOFError("the compressed voxels end early")


def _check_nifti1(path: Path) -> bytes:
    """Look for missing bytes and for NaN, both of which ITK turns into 0; the header's bytes."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    header = content[:_NIFTI1_HEADER]
    if len(header) < _NIFTI1_HEADER or header[344:348] != b"n+1\0":
        raise ValueError("no NIfTI-1 header")
    endian = _endian(header)
    dim = struct.unpack_from(endian + "8h", header, 40)
    datatype, bitpix = struct.unpack_from(endian + "hh", header, 70)
    (offset,) = struct.unpack_from(endian + "f", header, 108)
    start, count = max(int(offset), _NIFTI1_HEADER), math.prod(dim[1 : dim[0] + 1])
    if len(content) < start + count * bitpix // 8:
        raise EOFError(f"{len(content)} bytes, its header says {start + count * bitpix // 8}")
    if datatype in _FLOAT_DATATYPES:
        stored = np.frombuffer(content, endian + _FLOAT_DATATYPES[datatype], count, start)
        _check_finite(stored, path)
    return header


def _endian(header: bytes | bytearray) -> str:
    return "<" if struct.unpack_from("<i", header, 0)[0] == _NIFTI1_HEADER else ">"


def _write_nifti1(volume: Volume, path: Path) -> None:
    """Repeat the source's header with only the voxel type and what scales it changed."""
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
    content = bytes(header) + bytes(4) + np.ascontiguousarray(volume.voxels).tobytes()
    # mtime=0: the same mask gives the same bytes
    path.write_bytes(
        gzip.compress(content, 6, mtime=0) if path.name.lower().endswith(".gz") else content
    )


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
