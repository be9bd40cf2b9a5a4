"""What a caller has of a scan: it lies where ITK and nibabel say, and its order is questioned."""

import dataclasses

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from ichseg.errors import InputError
from ichseg.scan import volume
from ichseg.scan.images import as_scan
from ichseg.scan.orientation import orient_axes
from ichseg.scan.reader import Scan
from ichseg.scan.volume import Volume

TURNED = sitk.Image([4, 3, 2], sitk.sitkInt16)  # x, y, z
TURNED.SetSpacing((0.5, 0.75, 5.0))
TURNED.SetOrigin((10.0, -20.0, 30.0))
TURNED.SetDirection((0.0, 0.6, 0.8, 1.0, 0.0, 0.0, 0.0, 0.8, -0.6))
for number in range(24):
    TURNED[number % 4, number // 4 % 3, number // 12] = number


def positions(scan):
    """Where each value lies, ``{value: (x, y, z) in mm}``, by the definition of a ``Volume``."""
    direction = np.reshape(scan.direction, (3, 3))
    return {
        int(value): np.round(
            (np.array(scan.origin_mm) + direction @ (np.array(scan.spacing_mm) * index))[::-1], 3
        ).tolist()
        for index, value in np.ndenumerate(scan.voxels)
    }


def by_itk():
    return {
        number: np.round(
            TURNED.TransformIndexToPhysicalPoint((number % 4, number // 4 % 3, number // 12)), 3
        ).tolist()
        for number in range(24)
    }


def as_nibabel(tmp_path):
    sitk.WriteImage(TURNED, str(tmp_path / "turned.nii"))
    return nibabel.load(tmp_path / "turned.nii")


def test_simpleitk_and_nibabel_images_lie_where_itk_says(tmp_path):
    of_itk, of_nibabel = as_scan(TURNED), as_scan(as_nibabel(tmp_path))
    assert positions(of_itk) == by_itk()
    found = positions(of_nibabel)
    np.testing.assert_allclose([found[n] for n in range(24)], [*by_itk().values()], atol=2e-3)
    np.testing.assert_array_equal(of_itk.voxels, sitk.GetArrayFromImage(TURNED))
    np.testing.assert_array_equal(of_nibabel.voxels, of_itk.voxels.T)  # nibabel's own order
    assert of_itk.warnings == of_nibabel.warnings == ()


def test_paths_are_read_whether_str_or_path(tmp_path):
    sitk.WriteImage(TURNED, str(tmp_path / "turned.mha"))
    for path in (tmp_path / "turned.mha", str(tmp_path / "turned.mha")):
        assert positions(as_scan(path)) == by_itk()
    plain = volume.read(tmp_path / "turned.mha")
    assert as_scan(plain).voxels is plain.voxels
    scan = as_scan(tmp_path / "turned.mha")
    assert as_scan(scan) is scan


def test_arrays_in_either_order_are_one_scan():
    """x to the left, y to the back, z to the head: what a volume in no special place has."""
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    plain = as_scan(array, spacing_mm=(5, 0.5, 0.75))
    assert (plain.spacing_mm, plain.direction) == (
        (5.0, 0.5, 0.75),
        Volume(array, (1, 1, 1)).direction,
    )
    turned = as_scan(array.T, spacing_mm=(0.75, 0.5, 5), axes="xyz")
    assert turned.voxels.shape == (4, 3, 2)
    assert positions(turned) == positions(plain)
    axes = orient_axes(turned)
    np.testing.assert_array_equal(axes.apply(turned.voxels), array)
    assert turned.voxels.base is array.base  # no copy of a scan


@pytest.mark.parametrize(
    ("shape", "spacing_mm", "axes", "said"),
    [
        ((30, 512, 512), (5, 0.45, 0.45), "zyx", None),
        ((512, 512, 30), (0.45, 0.45, 5), "xyz", None),
        ((30, 512, 512), (0.45, 0.45, 5), "zyx", "axis 0 stands out by its number of voxels"),
        ((512, 512, 30), (5, 0.45, 0.45), "zyx", "axis 2 stands out by its number of voxels"),
        ((512, 512, 30), (0.45, 0.45, 5), "zyx", "is axes='xyz' meant?"),
        ((30, 512, 512), (5, 0.45, 0.45), "xyz", "is axes='zyx' meant?"),
        ((512, 30, 512), (0.45, 5, 0.45), "zyx", "axis 1 stands out, where slices lie"),
        ((256, 256, 256), (0.45, 0.45, 5), "zyx", "is axes='xyz' meant?"),
        ((256, 256, 256), (1, 1, 1), "zyx", None),  # cannot be told
        ((30, 512, 430), (5, 0.45, 0.5), "zyx", None),
        ((30, 512, 512), (1, 1, 1), "zyx", None),
    ],
)  # fmt: skip
def test_an_order_that_does_not_fit_is_told(shape, spacing_mm, axes, said):
    array = np.broadcast_to(np.int16(0), shape)
    warnings = as_scan(array, spacing_mm=spacing_mm, axes=axes).warnings
    assert len(warnings) == (said is not None)
    assert said is None or said in warnings[0]


def framed(sform=1, qform=1, unit="mm", affine=None):
    plain = np.diag([2.0, 2, 5, 1])
    image = nibabel.Nifti1Image(np.zeros((4, 3, 2), np.int16), plain)
    image.set_sform(plain if affine is None else affine, sform)
    image.set_qform(plain, qform)
    image.header.set_xyzt_units(unit)
    return image


def test_what_a_nibabel_header_leaves_open_is_told():
    assert as_scan(framed()).warnings == ()
    assert "taken was nibabel's affine" in as_scan(framed(0, 0)).warnings[0]
    moved = np.diag([2.0, 2, 5, 1])
    moved[0, 3] = 3
    assert "put a corner 3.0 mm apart" in as_scan(framed(affine=moved)).warnings[0]
    in_metres = as_scan(framed(unit="meter"))
    assert in_metres.spacing_mm == (2000.0, 2000.0, 5000.0)
    assert "metres" in in_metres.warnings[0]


def test_what_nibabel_cannot_read_any_more_is_refused_by_its_name(tmp_path):
    nibabel.save(framed(), tmp_path / "scan.nii")
    image = nibabel.load(tmp_path / "scan.nii")
    whole = (tmp_path / "scan.nii").read_bytes()
    (tmp_path / "scan.nii").write_bytes(whole[:-20])
    with pytest.raises(InputError, match=r"scan\.nii: damaged or gone") as refused:
        as_scan(image)
    assert "\n" not in str(refused.value)


def test_a_size_that_is_refused_is_refused_before_nibabel_reads(tmp_path):
    nibabel.save(framed(), tmp_path / "scan.nii")
    image = nibabel.load(tmp_path / "scan.nii")
    (tmp_path / "scan.nii").unlink()

    def refuse(voxels):
        raise InputError(f"{voxels} voxels")

    with pytest.raises(InputError, match=r"^24 voxels"):
        as_scan(image, check_size=refuse)


def test_scaled_whole_numbers_of_nibabel_are_float32():
    header = framed().header.copy()
    header.set_slope_inter(2, -1024)
    header["vox_offset"] = 352
    stored = np.full(24, 512, np.int16).tobytes()
    scan = as_scan(nibabel.Nifti1Image.from_bytes(header.binaryblock + bytes(4) + stored))
    assert scan.voxels.dtype == np.float32
    assert not scan.voxels.any()


SQUARE = np.zeros((2, 3, 4), np.int16)


@pytest.mark.parametrize(
    ("image", "given", "said"),
    [
        (SQUARE, {}, "without spacing_mm; expected the size of a voxel along z, y, x in mm"),
        (SQUARE, {"spacing_mm": (1, 1)}, r"spacing_mm \(1, 1\), expected three positive sizes"),
        (SQUARE, {"spacing_mm": (1, 0, 1)}, "expected three positive sizes in mm"),
        (SQUARE, {"spacing_mm": (1, 1, 1), "axes": "yxz"}, "axes 'yxz', expected one of zyx, xyz"),
        (SQUARE[0], {"spacing_mm": (1, 1, 1)}, r"has shape \(3, 4\), expected three axes"),
        (SQUARE > 0, {"spacing_mm": (1, 1, 1)}, "is of bool, expected real numbers"),
        (SQUARE + np.nan, {"spacing_mm": (1, 1, 1)}, "NaN or infinite in 24 voxels"),
        (Volume(SQUARE + np.inf, (1, 1, 1)), {}, "the volume: NaN or infinite in 24 voxels"),
        (TURNED, {"spacing_mm": (1, 1, 1)}, "for a Image, expected it for a numpy array only"),
        (sitk.Image([4, 4], sitk.sitkInt16), {}, "of 2 axes with 1 numbers a voxel, expected 3"),
        (sitk.Image([4, 4, 4], sitk.sitkVectorInt16), {}, "3 axes with 3 numbers a voxel"),
        ([[1, 2]], {}, "a scan is a list, expected a path, a Volume, a numpy array"),
        (
            framed(affine=np.array([[2.0, 1, 0, 0], [0, 2, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1]])),
            {},
            "its axes are not at right angles",
        ),
        ("nowhere.mha", {}, "nowhere.mha: no such file"),
        (SQUARE, {"spacing_mm": 1.0}, "spacing_mm 1.0, expected three positive sizes"),
        (SQUARE, {"spacing_mm": "abc"}, "spacing_mm 'abc', expected three positive sizes"),
        (np.ma.masked_equal(SQUARE, 0), {"spacing_mm": (1, 1, 1)}, "is a masked array"),
        (Volume(SQUARE, (1, np.nan, 1)), {}, r"spacing_mm \(1, nan, 1\), expected three positive"),
        (Volume(SQUARE, (1, 1)), {}, r"spacing_mm \(1, 1\), expected three positive sizes"),
        (Volume(SQUARE, (1, 1, 1), (0, np.nan, 0)), {}, "origin_mm .* expected a place"),
        (Volume(SQUARE, (1, 1, 1), direction=(1, 0, 0, 1)), {}, r"\(4,\), expected 9 numbers"),
        (Volume(SQUARE, (1, 1, 1), direction=np.eye(3)), {}, r"\(3, 3\), expected 9 numbers"),
        (Volume(SQUARE, (1, 1, 1), direction=(0,) * 9), {}, "not at right angles"),
        (Volume(SQUARE, (1, 1, 1), direction=(2, 0, 0, 0, 2, 0, 0, 0, 2)), {}, "right angles"),
    ],
)  # fmt: skip
def test_what_is_no_scan_is_refused(image, given, said):
    with pytest.raises(InputError, match=said):
        as_scan(image, **given)


def test_a_mask_has_the_axes_of_what_was_given(tmp_path):
    """So that nibabel's affine fits it, and SimpleITK's geometry."""
    image = as_nibabel(tmp_path)
    scan = as_scan(image)
    mask = scan.with_voxels((scan.voxels > 11).astype(np.uint8))
    assert mask.voxels.shape == image.shape
    volume.write(mask, tmp_path / "mask.nii.gz")
    expected = {value: int(value > 11) for value in range(24)}
    places = positions(dataclasses.replace(scan))
    written = volume.read(tmp_path / "mask.nii.gz")
    found = {}
    direction = np.reshape(written.direction, (3, 3))
    for index, value in np.ndenumerate(written.voxels):
        at = np.array(written.origin_mm) + direction @ (np.array(written.spacing_mm) * index)
        (number,) = [n for n, place in places.items() if np.allclose(place, at[::-1], atol=1e-2)]
        found[number] = int(value)
    assert found == expected


@pytest.mark.parametrize("kind", [Volume, Scan])
def test_two_volumes_can_be_compared(kind):
    """Arrays have no one answer to whether they are equal; volumes are looked up in lists."""
    one, other = (kind(np.zeros((2, 3, 4), np.int16), (1.0, 1.0, 1.0)) for _ in range(2))
    assert [one, other].index(other) == 1
    assert one != other
