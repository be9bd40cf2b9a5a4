"""NRRD and detached MetaImage files: as ITK reads them, and what is refused at the door."""

import gzip
import zlib

import numpy as np
import pytest
import SimpleITK as sitk

from ichseg.errors import InputError
from ichseg.scan import nrrd, reader, volume
from ichseg.scan.volume import Volume

VOXELS = np.random.default_rng(1).integers(-1000, 2000, (3, 4, 5)).astype(np.int16)
STORED = VOXELS.tobytes()
NRRD = """NRRD0004
# Complete NRRD file format specification at:
type: {type}
dimension: 3
space: {space}
sizes: {sizes}
space directions: {directions}
kinds: domain domain domain
endian: {endian}
encoding: {encoding}
space origin: {origin}
key:=value
{more}
"""
FIELDS = {
    "type": "short", "space": "left-posterior-superior", "sizes": "5 4 3", "endian": "little",
    "directions": "(0,0.3,0.4) (0.6,0,0) (0,4,-3)", "encoding": "raw", "origin": "(1.5,-2,30)",
    "more": "",
}  # fmt: skip


def write_nrrd(folder, voxels=STORED, **fields):
    path = folder / "case.nrrd"
    lines = NRRD.format(**(FIELDS | fields)).splitlines()
    text = "\n".join(line for line in lines if line and "REMOVED" not in line) + "\n\n"
    path.write_bytes(text.encode() + voxels)
    return path


def as_itk_reads_it(path):
    """Voxels, spacing, origin and direction, all in (z, y, x)."""
    image = sitk.ReadImage(str(path))
    return (
        sitk.GetArrayFromImage(image),
        image.GetSpacing()[::-1],
        image.GetOrigin()[::-1],
        np.reshape(image.GetDirection(), (3, 3))[::-1, ::-1].ravel(),
    )


def assert_is_what_itk_reads(path):
    found, (voxels, spacing_mm, origin_mm, direction) = volume.read(path), as_itk_reads_it(path)
    assert found.voxels.dtype == voxels.dtype
    np.testing.assert_array_equal(found.voxels, voxels)
    np.testing.assert_allclose(found.spacing_mm, spacing_mm)
    np.testing.assert_allclose(found.origin_mm, origin_mm)
    np.testing.assert_allclose(found.direction, direction, atol=1e-12)


@pytest.mark.parametrize(
    "space", ["left-posterior-superior", "right-anterior-superior", "LPS", "RAS"]
)
def test_places_in_every_space_are_as_itk_has_them(tmp_path, space):
    assert_is_what_itk_reads(write_nrrd(tmp_path, space=space))


@pytest.mark.parametrize("space", ["left-anterior-superior", "LAS"])
def test_of_left_anterior_superior_y_is_turned_round(tmp_path, space):
    """Worked by hand: older releases of ITK take another place."""
    found = volume.read(
        write_nrrd(tmp_path, space=space, directions="(0,-0.3,0.4) (0.6,0,0) (0,-4,-3)",
                   origin="(1.5,2,30)")
    )  # fmt: skip
    same = volume.read(write_nrrd(tmp_path))
    assert found.spacing_mm == same.spacing_mm
    assert found.origin_mm == (30, -2, 1.5)
    assert found.direction == same.direction


@pytest.mark.parametrize("kind", sorted(set(nrrd._TYPES)))
def test_every_type_by_every_name(tmp_path, kind):
    code = nrrd._TYPES[kind]
    for endian, order in (("little", "<"), ("big", ">")):
        voxels = VOXELS.astype(order + code)
        path = write_nrrd(tmp_path, voxels.tobytes(), type=kind, endian=endian)
        np.testing.assert_array_equal(volume.read(path).voxels, voxels)
        if code not in ("i8", "u8"):  # of which ITK has its own opinion
            assert_is_what_itk_reads(path)


@pytest.mark.parametrize("encoding", ["gzip", "gz"])
def test_compressed(tmp_path, encoding):
    assert_is_what_itk_reads(
        write_nrrd(tmp_path, gzip.compress(VOXELS.tobytes()), encoding=encoding)
    )


def test_line_ends_of_windows(tmp_path):
    path = write_nrrd(tmp_path, b"")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + VOXELS.tobytes())
    np.testing.assert_array_equal(volume.read(path).voxels, VOXELS)


def test_without_a_space_the_axes_are_the_patients_and_that_is_told(tmp_path):
    path = write_nrrd(
        tmp_path, space="REMOVED", directions="REMOVED", origin="REMOVED",
        more="spacings: 0.5 0.6 5",
    )  # fmt: skip
    found = reader.read_scan(path)
    assert found.spacing_mm == (5.0, 0.6, 0.5)
    np.testing.assert_array_equal(np.reshape(found.direction, (3, 3)), np.eye(3))
    (warning,) = found.warnings
    assert "does not say how the head lies" in warning
    assert reader.read_scan(write_nrrd(tmp_path)).warnings == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"more": "data file: other.raw"}, "its voxels are in 'other.raw', expected in the file"),
        ({"more": "datafile: LIST"}, "its voxels are in 'LIST'"),
        ({"more": "byte skip: 10"}, "byte skip 10, expected none"),
        ({"more": "line skip: 1"}, "line skip 1, expected none"),
        ({"more": 'space units: "m" "m" "m"'}, "space units m, expected mm"),
        ({"more": "type: short"}, "no NRRD header: line 'type: short'"),
        ({"more": "nonsense"}, "no NRRD header: line 'nonsense'"),
        ({"encoding": "ascii"}, "encoding ascii, expected raw or gzip"),
        ({"encoding": "bzip2"}, "encoding bzip2"),
        ({"encoding": "gzip"}, "damaged"),
        ({"type": "block"}, "type block, expected one real number per voxel"),
        ({"type": "REMOVED"}, "type none"),
        ({"endian": "REMOVED"}, "endian 'none', expected little or big"),
        ({"endian": "middle"}, "endian 'middle'"),
        ({"space": "scanner-xyz"}, "space scanner-xyz, expected left-posterior-superior"),
        ({"sizes": "5 4"}, "dimension 3 with sizes '5 4'"),
        ({"sizes": "5 4 30"}, "120 bytes of voxels, its header says 1200"),
        ({"sizes": "5 4 2"}, "more voxels than the 80 bytes"),
        ({"sizes": "5 4 0"}, "empty volume"),
        ({"sizes": "5 -4 3"}, "'-4' where a number is expected"),
        ({"sizes": "99999 99999 99999"}, "expected at most 1,000,000,000"),
        ({"directions": "(1,0,0) (0,1,0)"}, "expected 3 vectors of three numbers"),
        ({"directions": "none (1,0,0) (0,1,0)"}, "expected 3 vectors of three numbers"),
        ({"directions": "(1,0,0) (0,1,0) (0,0,x)"}, "'x' where a number is expected"),
        ({"directions": "(1,0,0) (0,1,0) (0,0,0)"}, "no sizes in mm"),
        ({"directions": "(1,0,0) (0,1,0) (0,0,nan)"}, "no sizes in mm"),
        ({"directions": "(1,0,0) (1,1,0) (0,0,1)"}, "its axes are not at right angles"),
        ({"directions": "(1,0,0) (0,1,0) (0,0,1e9)"}, "beyond 100000 mm"),
        ({"origin": "(inf,0,0)"}, "beyond 100000 mm"),
        ({"directions": "REMOVED", "more": "spacings: 1 1"}, "no sizes in mm"),
        (
            {"space": "RAS", "directions": "REMOVED", "more": "spacings: 1 1 1"},
            "a space but no space directions, expected both",
        ),
        ({"more": "axis mins: 1 2 3"}, "axis mins, expected a space origin"),
    ],
)  # fmt: skip
def test_nrrd_that_is_not_what_it_says_is_refused(tmp_path, change, reason):
    path = write_nrrd(tmp_path, **change)
    with pytest.raises(InputError, match=reason) as refused:
        volume.read(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


def test_four_axes_are_refused(tmp_path):
    path = write_nrrd(tmp_path, sizes="3 5 4 1")
    path.write_bytes(path.read_bytes().replace(b"dimension: 3", b"dimension: 4"))
    with pytest.raises(InputError, match=r"4D image of size \(3, 5, 4, 1\), expected a 3D volume"):
        volume.read(path)


@pytest.mark.parametrize("content", [b"", b"NRRD0004", b"NRRD0004\ntype: short\n", b"NRRD9\n\n"])
def test_what_is_no_nrrd_is_refused(tmp_path, content):
    (tmp_path / "case.nrrd").write_bytes(content)
    with pytest.raises(InputError, match="no NRRD header"):
        volume.read(tmp_path / "case.nrrd")


def test_masks_are_written_as_nrrd(tmp_path):
    scan = volume.read(write_nrrd(tmp_path))
    mask = Volume((VOXELS > 0).astype(np.uint8), scan.spacing_mm, scan.origin_mm, scan.direction)
    for name in ("a", "b"):
        volume.write(mask, tmp_path / f"{name}.nrrd")
    found = volume.read(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(found.voxels, mask.voxels)
    np.testing.assert_allclose(found.origin_mm, mask.origin_mm)
    np.testing.assert_allclose(found.direction, mask.direction, atol=1e-12)
    assert (tmp_path / "a.nrrd").read_bytes() == (tmp_path / "b.nrrd").read_bytes()


def write_mhd(folder, where="case.raw", voxels=STORED, packed=False, more=""):
    (folder / "case.mhd").write_text(
        f"ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = {packed}\n{more}"
        "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 1 2 3\nElementSpacing = 0.5 0.6 5\n"
        f"DimSize = 5 4 3\nElementType = MET_SHORT\nElementDataFile = {where}\n"
    )
    if voxels is not None:
        (folder / "case.raw").write_bytes(voxels)
    return folder / "case.mhd"


@pytest.mark.parametrize("packed", [False, True])
def test_a_detached_metaimage_is_as_itk_reads_it(tmp_path, packed):
    voxels, more = VOXELS.tobytes(), ""
    if packed:
        voxels = zlib.compress(voxels)
        more = f"CompressedDataSize = {len(voxels)}\n"
    assert_is_what_itk_reads(write_mhd(tmp_path, voxels=voxels, packed=packed, more=more))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"where": "/etc/passwd"}, "'/etc/passwd', expected in one file in the same folder"),
        ({"where": "../case.raw"}, "expected in one file in the same folder"),
        ({"where": "LIST"}, "expected in one file in the same folder"),
        ({"where": "slice%03d.raw 1 3 1"}, "expected in one file in the same folder"),
        ({"where": ".."}, "expected in one file in the same folder"),
        ({"where": "other.raw"}, "its voxels are in 'other.raw', which is not there"),
        ({"voxels": VOXELS.tobytes()[:-1]}, "119 bytes of voxels, its header says 120"),
        ({"voxels": VOXELS.tobytes() + b"x"}, "more voxels than the 120 bytes"),
        ({"more": "HeaderSize = -1\n"}, "HeaderSize -1, expected none"),
        ({"packed": True}, "damaged"),
    ],
)
def test_a_detached_metaimage_that_leads_elsewhere_is_refused(tmp_path, given, reason):
    with pytest.raises(InputError, match=reason):
        volume.read(write_mhd(tmp_path, **given))


def test_voxels_that_are_a_link_out_of_the_folder_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(VOXELS.tobytes())
    path = write_mhd(tmp_path / "in", voxels=None)
    (tmp_path / "in" / "case.raw").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="a link that leads out of the folder"):
        volume.read(path)
    (tmp_path / "link.mhd").symlink_to(path)
    (tmp_path / "in" / "case.raw").unlink()
    (tmp_path / "in" / "case.raw").write_bytes(VOXELS.tobytes())
    np.testing.assert_array_equal(volume.read(tmp_path / "link.mhd").voxels, VOXELS)
