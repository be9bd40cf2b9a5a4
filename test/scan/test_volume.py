"""Volumes on disk: geometry there and back, headers kept, damage refused."""

import gzip
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from ichseg.errors import InputError, OutputError
from ichseg.scan import volume
from ichseg.scan.volume import Volume, read, stored_shape, write

# tmp_path is shared by the examples of one property: each overwrites the same file.
EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
QFORM_AND_SFORM = slice(252, 328)  # codes, quaternion, offsets, three rows of the affine
PIXDIM = slice(76, 108)


@st.composite
def directions(draw: st.DrawFn) -> tuple[float, ...]:
    """Identity, a permutation of axes, or any rotation; each with flips of any axes."""
    kind = draw(st.sampled_from(["identity", "permutation", "tilt", "rotation"]))
    if kind == "identity":
        matrix = np.eye(3)
    elif kind == "permutation":
        matrix = np.eye(3)[:, draw(st.permutations(range(3)))]
    elif kind == "tilt":
        angle = draw(st.floats(-30, 30))
        matrix = Rotation.from_euler("x", angle, degrees=True).as_matrix()
    else:
        matrix = Rotation.random(None, draw(st.integers(0, 10**6))).as_matrix()
    signs = draw(st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3))
    return tuple(float(v) for v in (matrix * signs).ravel())


@st.composite
def volumes(draw: st.DrawFn) -> Volume:
    """A small volume of any odd shape, place and voxel type that CTs and masks come in."""
    shape = draw(st.tuples(*[st.integers(1, 7)] * 3))
    dtype = draw(st.sampled_from([np.uint8, np.int16, np.int32, np.float32]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    spacing = st.floats(0.05, 12.0)
    origin = st.floats(-1000.0, 1000.0, allow_subnormal=False)
    return Volume(
        rng.integers(0, 200, shape).astype(dtype),
        draw(st.tuples(spacing, spacing, spacing)),
        draw(st.tuples(origin, origin, origin)),
        draw(directions()),
    )


@EXAMPLES
@given(volumes())
def test_mha_keeps_everything_to_the_bit(tmp_path: Path, original: Volume) -> None:
    path = tmp_path / "case.mha"
    write(original, path)
    found = read(path)
    assert found.spacing_mm == original.spacing_mm
    assert found.origin_mm == original.origin_mm
    assert found.direction == original.direction
    assert found.voxels.dtype == original.voxels.dtype
    np.testing.assert_array_equal(found.voxels, original.voxels)


@EXAMPLES
@given(volumes(), st.sampled_from([".nii", ".nii.gz"]))
def test_nifti_keeps_geometry_to_float32(tmp_path: Path, original: Volume, suffix: str) -> None:
    path = tmp_path / f"case{suffix}"
    write(original, path)
    found = read(path)
    np.testing.assert_allclose(found.spacing_mm, original.spacing_mm, rtol=1e-6)
    np.testing.assert_allclose(found.origin_mm, original.origin_mm, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.direction, original.direction, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found.voxels, original.voxels)


def test_axes_are_z_y_x_and_positions_are_lps(tmp_path: Path) -> None:
    image = sitk.Image(4, 3, 2, sitk.sitkInt16)
    image.SetPixel(3, 1, 0, 77)
    image.SetSpacing((0.4, 0.5, 6.0))
    image.SetOrigin((-10.0, -20.0, 30.0))
    cosine, sine = (
        np.cos(0.3),
        np.sin(0.3),
    )  # the gantry's tilt, about the patient's left-right axis
    image.SetDirection((1, 0, 0, 0, cosine, -sine, 0, sine, cosine))
    sitk.WriteImage(image, str(tmp_path / "case.mha"))

    found = read(tmp_path / "case.mha")

    assert found.voxels.shape == (2, 3, 4)
    assert found.voxels[0, 1, 3] == 77
    assert found.spacing_mm == (6.0, 0.5, 0.4)
    index = np.array([0, 1, 3])
    direction = np.array(found.direction).reshape(3, 3)
    position = found.origin_mm + direction @ (found.spacing_mm * index)
    x, y, z = image.TransformIndexToPhysicalPoint((3, 1, 0))
    np.testing.assert_allclose(position, (z, y, x))
    assert found.voxel_ml == pytest.approx(6.0 * 0.5 * 0.4 / 1000)


# NIfTI headers


def affine(seed: int, *, left_handed: bool = False) -> npt.NDArray[np.float64]:
    """A rotated RAS affine with 0.45 x 0.47 x 5 mm voxels."""
    matrix = np.eye(4)
    flip = -1.0 if left_handed else 1.0
    spacing_mm = np.diag([0.45 * flip, 0.47, 5.0])
    matrix[:3, :3] = Rotation.random(None, seed).as_matrix() @ spacing_mm
    matrix[:3, 3] = (-100.1, 33.3, 250.7)
    return matrix


def write_nifti(
    path: Path,
    *,
    sform: npt.NDArray[np.float64],
    qform: npt.NDArray[np.float64],
    codes: tuple[int, int] = (1, 1),
    endian: str = "<",
    dtype: str = "i2",
    scaling: tuple[float, float] | None = None,
) -> npt.NDArray[Any]:
    """Write an image with nibabel; its scaled voxels ``(z, y, x)``."""
    stored = np.arange(5 * 4 * 3).reshape(5, 4, 3)
    header = nib.Nifti1Header(endianness=endian)
    header.set_data_dtype(np.dtype(dtype).newbyteorder(endian))
    image = nib.Nifti1Image(stored.astype(dtype), None, header)
    image.set_sform(sform, code=codes[0])
    image.set_qform(qform, code=codes[1])
    image.header["descrip"] = b"a name"
    image.to_filename(path)
    if scaling is not None:  # nibabel writes scaled voxels; here they stay as they are
        content = bytearray(path.read_bytes())
        struct.pack_into(endian + "ff", content, 112, *scaling)
        path.write_bytes(content)
    return np.asarray(nib.load(path).dataobj).transpose(2, 1, 0)


HEADERS: dict[str, dict[str, Any]] = {
    "usual": {},
    "sform and qform differ": {"qform": affine(2), "codes": (2, 1)},
    "the other code is higher": {"qform": affine(2), "codes": (1, 4)},
    "sform only": {"codes": (3, 0)},
    "qform only": {"codes": (0, 1)},
    "big-endian": {"endian": ">"},
    "big-endian floats": {"endian": ">", "dtype": "f4"},
    "qfac -1": {"sform": affine(1, left_handed=True), "qform": affine(1, left_handed=True)},
    "scaled": {"scaling": (2.0, -1024.0)},
    "scaled, big-endian": {"scaling": (2.0, -1024.0), "endian": ">"},
    "shifted": {"scaling": (1.0, -1024.0)},
    "slope 0": {"scaling": (0.0, 7.0)},
    "double": {"dtype": "f8"},
    "unsigned": {"dtype": "u2"},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_mask_repeats_the_scans_nifti_header(tmp_path: Path, header: dict[str, Any]) -> None:
    source = tmp_path / "scan.nii"
    expected = write_nifti(source, **{"sform": affine(1), "qform": affine(1)} | header)

    scan = read(source)
    np.testing.assert_array_equal(scan.voxels, expected)
    mask = scan.with_voxels((expected % 3 == 0).astype(np.uint8))
    write(mask, tmp_path / "mask.nii.gz")

    before = source.read_bytes()
    after = gzip.decompress((tmp_path / "mask.nii.gz").read_bytes())
    if header is HEADERS["qfac -1"]:
        assert struct.unpack_from("<f", before, 76) == (-1.0,)
    assert after[QFORM_AND_SFORM] == before[QFORM_AND_SFORM]
    assert after[PIXDIM] == before[PIXDIM]
    assert after[123] == before[123]  # units
    assert after[148:228] == bytes(80)  # free text does not travel

    found = read(tmp_path / "mask.nii.gz")
    assert (found.spacing_mm, found.origin_mm, found.direction) == (
        scan.spacing_mm,
        scan.origin_mm,
        scan.direction,
    )
    assert found.voxels.dtype == np.uint8
    np.testing.assert_array_equal(found.voxels, mask.voxels)
    other_reader = nib.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(other_reader.affine, nib.load(source).affine)
    np.testing.assert_array_equal(np.asarray(other_reader.dataobj).T, mask.voxels)


def test_nifti_position_is_the_affines(tmp_path: Path) -> None:
    write_nifti(tmp_path / "scan.nii", sform=affine(1), qform=affine(1))
    scan = read(tmp_path / "scan.nii")
    index = np.array([2, 3, 4])  # z, y, x
    direction = np.array(scan.direction).reshape(3, 3)
    z, y, x = scan.origin_mm + direction @ (scan.spacing_mm * index)
    right, anterior, superior = (affine(1) @ [4, 3, 2, 1])[:3]
    np.testing.assert_allclose((-x, -y, z), (right, anterior, superior), atol=1e-4)


def test_same_mask_gives_the_same_bytes(tmp_path: Path) -> None:
    write_nifti(tmp_path / "scan.nii", sform=affine(1), qform=affine(1))
    scan = read(tmp_path / "scan.nii")
    mask = scan.with_voxels(np.ones(scan.voxels.shape, np.uint8))
    for name in ("a.nii.gz", "b.nii.gz", "a.mha", "b.mha"):
        write(mask, tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert (tmp_path / "a.mha").read_bytes() == (tmp_path / "b.mha").read_bytes()
    assert (tmp_path / "a.nii.gz").read_bytes()[4:8] == bytes(4)  # no time of day


def test_voxels_come_from_the_file_that_was_named(tmp_path: Path) -> None:
    small = Volume(np.full((3, 4, 5), 1, np.int16), (5.0, 0.5, 0.5))
    write(small, tmp_path / "case.nii")
    write(small.with_voxels(small.voxels * 2), tmp_path / "case.nii.gz")
    assert (read(tmp_path / "case.nii.gz").voxels == 2).all()
    assert (read(tmp_path / "case.nii").voxels == 1).all()


# Refusals


def some_volume(dtype: npt.DTypeLike = np.int16) -> Volume:
    rng = np.random.default_rng(0)
    return Volume(rng.integers(-1000, 2000, (6, 20, 30)).astype(dtype), (5.0, 0.5, 0.5))


def cut(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


@pytest.mark.parametrize("suffix", [".mha", ".nii", ".nii.gz"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.999])
def test_truncated_file_is_refused(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"case{suffix}"
    write(some_volume(), path)
    cut(path, keep)
    with pytest.raises(InputError, match=rf"case\{suffix}: damaged or not a \{suffix} volume"):
        read(path)


def test_truncated_mha_of_unstated_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "case.mha"
    write(some_volume(), path)
    content = re.sub(rb"CompressedDataSize = \d+\n", b"", path.read_bytes())
    path.write_bytes(content[:-100])
    with pytest.raises(InputError, match="the compressed voxels end early"):
        read(path)


def test_truncated_uncompressed_mha_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "case.mha"
    sitk.WriteImage(sitk.GetImageFromArray(some_volume().voxels), str(path), useCompression=False)
    cut(path, 0.9)
    with pytest.raises(InputError, match=r"damaged or not a \.mha volume"):
        read(path)


@pytest.mark.parametrize("suffix", [".mha", ".nii.gz"])
def test_altered_byte_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"case{suffix}"
    write(some_volume(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        read(path)


@pytest.mark.parametrize("suffix", [".mha", ".nii", ".nii.gz"])
def test_other_content_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"case{suffix}"
    path.write_bytes(b"not an image, but of some length " * 40)
    with pytest.raises(InputError, match="damaged or not a"):
        read(path)


@pytest.mark.parametrize("suffix", [".mha", ".nii.gz"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda image: image[:, :, 0], r"2D image of size \(30, 20\), expected a 3D volume"),
        (lambda image: sitk.JoinSeries([image, image]), r"4D image of size \(30, 20, 6, 2\)"),
        (lambda image: sitk.Compose([image] * 3), "3 components per voxel, expected a scalar"),
    ],
    ids=["2D", "4D", "vectors"],
)
def test_other_than_a_scalar_volume_is_refused(
    tmp_path: Path, suffix: str, change: Callable[[sitk.Image], sitk.Image], reason: str
) -> None:
    path = tmp_path / f"case{suffix}"
    sitk.WriteImage(change(sitk.GetImageFromArray(some_volume().voxels)), str(path))
    with pytest.raises(InputError, match=reason):
        read(path)


@pytest.mark.parametrize("suffix", [".mha", ".nii", ".nii.gz"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(tmp_path: Path, suffix: str, value: float) -> None:
    scan = some_volume(np.float32)
    scan.voxels[0, 1, 2] = value
    scan.voxels[5, 1, 2] = value
    write(scan, tmp_path / f"case{suffix}")
    with pytest.raises(InputError, match="NaN or infinite in 2 voxels, expected finite"):
        read(tmp_path / f"case{suffix}")


def test_nifti_of_an_unknown_voxel_type_is_refused(tmp_path: Path) -> None:
    colours = np.zeros((3, 4, 5), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.Nifti1Image(colours, np.eye(4)).to_filename(tmp_path / "case.nii")
    with pytest.raises(InputError, match="datatype 128, expected one real number per voxel"):
        read(tmp_path / "case.nii")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"case\.mha: no such file"):
        read(tmp_path / "case.mha")


def test_unknown_suffix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "case.png").touch()
    with pytest.raises(InputError, match=r"case\.png: unknown file type, expected one of \.mha"):
        read(tmp_path / "case.png")
    with pytest.raises(OutputError, match=r"case\.jpg: cannot write this file type, expected"):
        write(some_volume(), tmp_path / "case.jpg")
    assert [p.name for p in tmp_path.iterdir()] == ["case.png"]


def test_voxels_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"geometry is for shape \(6, 20, 30\), got \(6, 20, 1\)"):
        some_volume().with_voxels(np.zeros((6, 20, 1), np.uint8))
    with pytest.raises(ValueError, match=r"3 axes, got shape \(2, 2\)"):
        Volume(np.zeros((2, 2)), (1.0, 1.0, 1.0))


# Nothing half-written


@pytest.mark.parametrize("suffix", [".mha", ".nii.gz"])
def test_unwritable_folder_is_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match=rf"case\{suffix}: cannot write \(.*(exists|Not a dir)"):
        write(some_volume(), tmp_path / "file" / f"case{suffix}")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_geometry_that_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    far = Volume(np.zeros((3, 4, 5), np.uint8), (1.0, 1.0, 1.0), (1e6 + 0.0123, 0.0, 0.0))
    with pytest.raises(OutputError, match=r"case\.nii: the written geometry differs"):
        write(far, tmp_path / "case.nii")
    assert list(tmp_path.iterdir()) == []
    write(far, tmp_path / "case.mha")


@pytest.mark.parametrize("suffix", [".mha", ".nii.gz"])
def test_interrupted_write_leaves_nothing(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(volume, "_check_geometry", break_off)  # by now all bytes are written
    with pytest.raises(KeyboardInterrupt):
        write(some_volume(), tmp_path / f"case{suffix}")
    assert list(tmp_path.iterdir()) == []


# Names


@pytest.mark.parametrize("suffix", [".mha", ".nii", ".nii.gz"])
@pytest.mark.parametrize("name", [b"\xff", b"\xed\xa0\x80", "Schädel".encode()])
def test_names_that_are_not_utf8_are_read_and_written(
    tmp_path: Path, suffix: str, name: bytes
) -> None:
    """SimpleITK ends the process on such a name."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/folder" + name + b"/a" + name)).with_suffix(
        suffix
    )
    scan = some_volume()
    write(scan, path)
    found = read(path)
    np.testing.assert_array_equal(found.voxels, scan.voxels)
    write(found.with_voxels((found.voxels > 0).astype(np.uint8)), path)
    assert read(path).voxels.sum() == (scan.voxels > 0).sum()
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged or not a"):
        read(path)


def test_names_under_a_locale_without_umlauts(tmp_path: Path) -> None:
    """The bytes of the name are UTF-8, but Python's text of it is not what the system has."""
    write(some_volume(), tmp_path / "Schädel.mha")
    code = (
        "import sys, pathlib; from ichseg.scan.volume import read, write\n"
        "(path,) = pathlib.Path(sys.argv[1]).glob('*.mha')\n"
        "write(read(path), path.with_suffix('.nii.gz')); print(read(path).voxels.sum())"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], env=os.environ | plain, check=True,
        capture_output=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert int(done.stdout) == some_volume().voxels.sum()
    assert read(tmp_path / "Schädel.nii.gz").voxels.sum() == some_volume().voxels.sum()


@pytest.mark.parametrize("kind", ["?", "<f2", ">f4", ">i2"])
def test_kinds_of_numbers_that_itk_does_not_know_are_written(tmp_path: Path, kind: str) -> None:
    voxels = (np.arange(24).reshape(2, 3, 4) % 2).astype(kind)
    of_numpy = tuple(np.float32([5, 0.5, 0.5]))  # as nibabel gives sizes of voxels
    write(Volume(voxels, of_numpy, np.array([1, 2, 3])), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read(tmp_path / "a.nii.gz").voxels, voxels)
    assert read(tmp_path / "a.nii.gz").spacing_mm == of_numpy


def test_what_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    for odd in (
        Volume(np.zeros((2, 2, 2), "O"), (1, 1, 1)),
        Volume(np.zeros((2, 2, 2)), (1, 1, 1), direction=(0.0,) * 9),
    ):
        with pytest.raises(OutputError, match=r"a\.mha: not a volume that can be written"):
            write(odd, tmp_path / "a.mha")
    assert list(tmp_path.iterdir()) == []


def test_paths_may_be_text(tmp_path: Path) -> None:
    name = str(tmp_path / "case.mha")
    write(some_volume(), name)
    assert stored_shape(name) == read(name).voxels.shape == (6, 20, 30)
