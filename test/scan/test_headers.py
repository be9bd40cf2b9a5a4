"""What a file says of itself is held against what is in it."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ichseg.errors import InputError
from ichseg.scan import metaimage, reader, volume
from ichseg.scan.nifti import frames_differ
from ichseg.scan.volume import Volume

VOXELS = np.random.default_rng(1).integers(-1000, 2000, (3, 4, 5)).astype(np.int16)
MHA = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = {big}
CompressedData = {packed}
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = 1 2 3
ElementSpacing = 0.5 0.6 5
DimSize = {size}
ElementType = {kind}
ElementDataFile = {where}
"""
FIELDS = {
    "big": False, "packed": False, "size": "5 4 3", "kind": "MET_SHORT", "where": "LOCAL",
}  # fmt: skip


def mha(folder: Path, voxels: bytes = VOXELS.tobytes(), **fields: object) -> Path:
    path = folder / "case.mha"
    path.write_bytes(MHA.format(**(FIELDS | fields)).encode() + voxels)
    return path


def nifti(folder: Path, *changes: tuple[int, str, object], name: str = "case.nii") -> Path:
    nib.Nifti1Image(VOXELS.T, np.diag([0.5, 0.6, 5, 1])).to_filename(folder / "whole.nii")
    content = bytearray((folder / "whole.nii").read_bytes())
    for offset, kind, value in changes:
        struct.pack_into("<" + kind, content, offset, value)
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("kind", "dtype"), [(k, d) for k, d in metaimage.TYPES.items() if k != "MET_CHAR"]
)
@pytest.mark.parametrize("big", [False, True])
def test_mha_of_every_type_and_order_as_itk_reads_it(tmp_path, kind, dtype, big, packed):
    voxels = VOXELS.astype((">" if big else "<") + dtype).tobytes()
    if packed:  # without its size ITK takes the packed bytes for voxels
        voxels = zlib.compress(voxels)
        kind += f"\nCompressedDataSize = {len(voxels)}"
    path = mha(tmp_path, voxels, kind=kind, big=big, packed=packed)
    found = volume.read(path).voxels
    theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    assert found.dtype == theirs.dtype
    np.testing.assert_array_equal(found, theirs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"where": "other.raw"}, "its voxels are in 'other.raw', expected in the file itself"),
        ({"where": "/etc/passwd"}, "voxels are in '/etc/passwd'"),
        ({"where": "LIST"}, "voxels are in 'LIST'"),
        ({"size": "5 4 30"}, "120 bytes of voxels, its header says 1200"),
        ({"size": "5 4 2"}, "more voxels than the 80 bytes"),
        ({"size": "99999 99999 99999"}, "voxels of size .* expected at most 1,000,000,000"),
        ({"size": "5 4 -3"}, "'-3' where a number is expected"),
        ({"size": "5 4 0"}, "empty volume"),
        ({"size": "5 4"}, "NDims 3 with DimSize '5 4'"),
        ({"size": "9" * 5000}, "where a number is expected"),
        ({"kind": "MET_LONG"}, "element type MET_LONG, expected one of"),
        ({"kind": "MET_STRING"}, "element type MET_STRING"),
        ({"packed": "maybe"}, "CompressedData 'maybe', expected True or False"),
        ({"packed": True}, "damaged"),
        ({"kind": "MET_SHORT\nHeaderSize = 10"}, "HeaderSize 10, expected none"),
        ({"kind": "MET_SHORT\nElementNumberOfChannels = 3"}, "3 components per voxel"),
        ({"kind": "MET_SHORT\nDimSize = 1 1 1"}, "no MetaImage header"),
        ({"kind": "MET_SHORT\nBinaryData"}, "no MetaImage header"),
        ({"kind": "MET_SHORT\nDistanceUnits = um"}, "DistanceUnits um, expected mm"),
        ({"kind": "MET_SHORT\nElementToIntensityFunctionSlope = 2"}, "Slope 2, expected 1"),
        ({"kind": "MET_SHORT\nElementToIntensityFunctionOffset = -1024"}, "Offset -1024, expec"),
        ({"kind": "MET_SHORT\nElementToIntensityFunctionSlope = a"}, "where a number is expected"),
    ],
)
def test_mha_that_is_not_what_it_says_is_refused(tmp_path, change, reason):
    with pytest.raises(InputError, match=reason):
        volume.read(mha(tmp_path, **change))


def without(path: Path, field: str) -> Path:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in lines if not line.startswith(field.encode())))
    return path


def test_mha_without_the_size_of_its_voxels_is_refused(tmp_path):
    """ITK would take 1 mm, as for voxels of 0.45 x 0.45 x 5 mm nobody could."""
    with pytest.raises(InputError, match=r"case.mha: no ElementSpacing, expected the size of its"):
        volume.read(without(mha(tmp_path), "ElementSpacing"))


def test_mha_that_does_not_say_how_the_head_lies_is_read_with_a_warning(tmp_path):
    assert reader.read(mha(tmp_path)).warnings == ()
    (warning,) = reader.read(without(mha(tmp_path), "TransformMatrix")).warnings
    assert "does not say how the head lies; taken was the first axis from right to left" in warning


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ([(40, "h", 3), (42, "h", -5)], "empty volume"),
        ([(42, "h", 32767), (44, "h", 32767), (46, "h", 32767)], "expected at most 1,000,000,000"),
        ([(46, "h", 30)], "120 bytes of voxels, its header says 1200"),
        ([(40, "h", 9)], "9 axes"),
        ([(40, "h", 2)], "2D image of size"),
        ([(70, "h", 1792)], "datatype 1792, expected one real number per voxel"),
        ([(72, "h", 8)], "datatype 4 of 8 bits"),
        ([(108, "f", 1e30)], "voxels from byte"),
        ([(344, "i", 0)], "no NIfTI-1 header"),
        ([(4, "4s", b"n+2\0")], "NIfTI-2, expected NIfTI-1"),
        ([(0, "i", 347)], "no NIfTI-1 header"),
        # ITK never comes back from these
        ([(254, "h", 1), (280, "f", float("nan"))], "nan mm as a size or place"),
        ([(254, "h", 1), (300, "f", 5e8)], r"5e\+08 mm as a size or place, expected up to 100000"),
        ([(252, "h", 1), (268, "f", float("inf"))], "inf mm"),
    ],
)
def test_nifti_that_is_not_what_it_says_is_refused(tmp_path, changes, reason):
    for name in ("case.nii", "case.nii.gz"):
        with pytest.raises(InputError, match=reason):
            volume.read(nifti(tmp_path, *changes, name=name))


def test_a_frame_that_is_not_in_use_may_hold_anything(tmp_path):
    nan = float("nan")
    path = nifti(tmp_path, (252, "h", 0), (256, "f", nan), (254, "h", 0), (280, "f", nan))
    assert volume.read(path).spacing_mm == pytest.approx((5, 0.6, 0.5))


def test_a_bomb_takes_no_memory(tmp_path):
    """600 MB of zeros in 600 kB, behind a header that speaks of 120 bytes, or of much more."""
    zeros = zlib.compress(bytes(600_000_000), 9)
    path = mha(tmp_path, zeros, packed=True)
    tracemalloc.start()
    with pytest.raises(InputError, match="more voxels than the 120 bytes"):
        volume.read(path)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_nifti_of_one_volume_in_four_axes_is_read(tmp_path):
    nib.Nifti1Image(VOXELS.T[..., None], np.eye(4)).to_filename(tmp_path / "case.nii.gz")
    np.testing.assert_array_equal(volume.read(tmp_path / "case.nii.gz").voxels, VOXELS)


def test_gzip_needs_no_name_and_may_have_two_members(tmp_path):
    content = nifti(tmp_path).read_bytes()
    path = tmp_path / "zipped.nii"
    path.write_bytes(gzip.compress(content[:200]) + gzip.compress(content[200:]) + bytes(500))
    np.testing.assert_array_equal(volume.read(path).voxels, VOXELS)


def test_a_sheared_nifti_is_not_called_damaged(tmp_path):
    """As converters leave the slices of a tilted gantry."""
    path = tmp_path / "tilted.nii.gz"
    sheared = np.diag([0.5, 0.6, 5.0, 1.0])
    sheared[1, 2] = 0.04  # 0.5 degrees, which makes no voxel longer
    nib.Nifti1Image(VOXELS.T, sheared).to_filename(path)
    with pytest.raises(InputError) as refused:
        volume.read(path)
    said = f"{path}: its axes are not at right angles, expected a straight grid"
    assert str(refused.value) == said


def test_scaled_nifti_is_as_nibabel_reads_it(tmp_path):
    path = nifti(tmp_path, (112, "f", 2.5), (116, "f", -1024.0))
    found = volume.read(path).voxels
    np.testing.assert_allclose(found.T, nib.load(path).get_fdata(), rtol=1e-6)
    assert found.dtype == np.float32


def test_axes_that_are_not_at_right_angles_are_refused(tmp_path):
    affine = np.array([[1, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1.0]])
    image = nib.Nifti1Image(VOXELS.T, affine)
    image.header.set_qform(None, 0)
    image.header.set_sform(affine, 1)
    image.to_filename(tmp_path / "case.nii")
    with pytest.raises(InputError, match=r"case\.nii"):
        volume.read(tmp_path / "case.nii")


def test_frames_that_disagree_are_told(tmp_path):
    """The sform lies 10 mm beside the qform; with one of them unset there is nothing to tell."""
    image = nib.Nifti1Image(VOXELS.T, np.diag([0.5, 0.6, 5, 1]))
    image.set_qform(np.diag([0.5, 0.6, 5, 1]), 1)
    moved = np.diag([0.5, 0.6, 5, 1])
    moved[0, 3] = 10
    for code, expected in ((1, 10.0), (0, 0.0)):
        image.set_sform(moved, code)
        image.to_filename(tmp_path / "case.nii")
        raw = (tmp_path / "case.nii").read_bytes()[:348]
        assert frames_differ(raw) == pytest.approx(expected, abs=1e-4)
        warnings = reader.read_scan(tmp_path / "case.nii").warnings
        told = any("sform and qform put a corner 10.0 mm apart" in w for w in warnings)
        assert told == bool(code)


def framed(folder: Path, *, pixdim=None, units=2, codes=(1, 1), factor=1.0) -> Path:
    """A file of 0.5 x 0.6 x 5 mm, whose first voxel lies at 250, 20, 30."""
    affine = np.diag([0.5 * factor, 0.6 * factor, 5 * factor, 1])
    affine[:3, 3] = np.array([250, 20, 30]) * factor
    image = nib.Nifti1Image(VOXELS.T, affine)
    image.set_sform(affine, codes[0])
    image.set_qform(affine, codes[1])
    image.header["xyzt_units"] = units
    path = folder / "case.nii"
    image.to_filename(path)
    if pixdim:
        content = bytearray(path.read_bytes())
        struct.pack_into("<3f", content, 80, *pixdim)
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("codes", [(1, 1), (3, 0)])
@pytest.mark.parametrize("pixdim", [(0.4, 0.6, 5), (0.5, 0.6, 1), (0.49, 0.6, 5), (1, 1, 1)])
def test_a_sform_of_other_voxels_than_pixdim_is_refused(tmp_path, codes, pixdim):
    """A pixdim of 0.9 mm for a true 1.2 mm halves each volume in mL."""
    path = framed(tmp_path, codes=codes, pixdim=pixdim)
    with pytest.raises(
        InputError, match=r"voxels of 5x0\.6x0\.5 mm by its sform, of .* expected one"
    ):
        volume.read(path)


@pytest.mark.parametrize("codes", [(0, 0), (0, 1), (1, 0)])
def test_a_voxel_without_a_size_is_refused(tmp_path, codes):
    """ITK takes 0 for 1 mm, which makes each volume in mL a fifth."""
    with pytest.raises(InputError, match=r"voxels of 0x0\.6x0\.5 mm, expected more than 0"):
        volume.read(framed(tmp_path, codes=codes, pixdim=(0.5, 0.6, 0)))


def test_a_single_slice_without_a_thickness_is_refused(tmp_path):
    """Of a single slice, too, its volume in mL is what it says of a voxel's size."""
    path = tmp_path / "slice.nii"
    volume.write(Volume(np.zeros((1, 20, 30), np.int16), (5.0, 0.6, 0.5)), path)
    content = bytearray(path.read_bytes())
    struct.pack_into("<f", content, 88, 0.0)
    struct.pack_into("<h", content, 254, 0)  # no sform, which would tell another size
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"slice\.nii: .*voxels of 0x0\.6x0\.5 mm, expected more"):
        volume.read(path)


def test_lengths_that_are_rounded_or_not_in_use_are_let_through(tmp_path):
    assert reader.read_scan(framed(tmp_path, pixdim=(0.502, 0.598, 5))).warnings == ()
    found = reader.read_scan(framed(tmp_path, pixdim=(0.4, 0.6, 5), codes=(0, 1)))
    assert found.spacing_mm == pytest.approx((5, 0.6, 0.4))


@pytest.mark.parametrize(
    ("units", "factor", "word"),
    [(1, 1e-3, "in metres"), (3, 1e3, "in micrometres"), (2, 1, ""), (0, 1, "")],
)
def test_units_of_a_nifti_header_count(tmp_path, units, factor, word):
    path = framed(tmp_path, units=units, factor=factor)
    found = reader.read_scan(path)
    assert found.spacing_mm == pytest.approx((5, 0.6, 0.5))
    assert found.origin_mm == pytest.approx((30, -20, -250))
    assert len(found.warnings) == bool(word)
    assert word in " ".join(found.warnings)
    moved = bytearray(path.read_bytes())
    (x,) = struct.unpack_from("<f", moved, 292)
    struct.pack_into("<f", moved, 292, x + 10 * factor)  # the sform, 10 mm aside
    assert frames_differ(bytes(moved[:348])) == pytest.approx(10, abs=1e-3)


def test_a_nifti_without_a_frame_is_told(tmp_path):
    (warning,) = reader.read_scan(framed(tmp_path, codes=(0, 0))).warnings
    assert warning.startswith("neither sform nor qform says how the head lies")


def test_frames_that_agree_when_turned_are_equal(tmp_path):
    rng = np.random.default_rng(4)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = turn * (0.5, 0.6, 5)
    affine[:3, 3] = 5, 6, 7
    image = nib.Nifti1Image(VOXELS.T, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    image.to_filename(tmp_path / "case.nii")
    assert frames_differ((tmp_path / "case.nii").read_bytes()[:348]) < 1e-3


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    voxels=arrays.arrays(
        st.sampled_from([np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64]),
        st.tuples(*[st.integers(1, 7)] * 3),
    ),
    spacing=st.tuples(*[st.floats(0.05, 20)] * 3),
    suffix=st.sampled_from([".mha", ".nii", ".nii.gz"]),
)
def test_whatever_is_written_is_read_again(tmp_path, voxels, spacing, suffix):
    voxels = np.nan_to_num(voxels, posinf=0, neginf=0)
    path = tmp_path / f"case{suffix}"
    volume.write(volume.Volume(voxels, spacing), path)
    found = volume.read(path)
    assert found.voxels.dtype == voxels.dtype
    np.testing.assert_array_equal(found.voxels, voxels)
    np.testing.assert_allclose(found.spacing_mm, spacing, rtol=1e-6)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=600), suffix=st.sampled_from([".mha", ".nii", ".nii.gz"]))
def test_any_bytes_are_refused_in_one_line(tmp_path, content, suffix):
    path = tmp_path / f"case{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        volume.read(path)
    assert "\n" not in str(caught.value)
