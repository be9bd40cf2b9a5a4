"""What test.sh relies on in the image must itself be able to fail."""

import json

import dicom_slices
import numpy as np
import pytest
import SimpleITK as sitk
from check_output import check, main


def image(voxels=None, *, dtype=np.uint8, origin=(1.0, 2.0, 3.0)):
    made = sitk.GetImageFromArray(np.zeros((4, 10, 10), dtype) if voxels is None else voxels)
    made.SetSpacing((1.0, 1.0, 5.0))
    made.SetOrigin(origin)
    return made


def bleed(count, dtype=np.uint8):
    """A mask of ``count`` voxels, 5 microlitres each."""
    voxels = np.zeros(400, dtype)
    voxels[:count] = 1
    return voxels.reshape(4, 10, 10)


def write(made, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(made, str(path))


def write_results(path, *masks):
    entries = [{"outputs": [{"filename": mask}], "error_messages": []} for mask in masks]
    path.write_text(json.dumps(entries))


@pytest.fixture
def flat(tmp_path):
    given, out, expected = (tmp_path / name for name in ("in", "out", "expected"))
    write(image(dtype=np.int16), given / "a.nii.gz")
    write(image(bleed(100)), expected / "a.nii.gz")
    write(image(bleed(100)), out / "a.nii.gz")
    write_results(out / "results.json", "a.nii.gz")
    return given, out, expected


def wrong(layout, folders):
    return {name: found for name, (_, found) in check(layout, *folders).items() if found}


def test_a_run_that_is_right(flat, capsys):
    assert main("flat", *map(str, flat)) == 0
    assert capsys.readouterr().out == (
        "  a.nii.gz: stored 0.50 mL, found 0.50 mL, Dice 1.0000, ok\n  results.json: ok\n"
    )


def test_dice_by_hand(flat):
    _, out, expected = flat
    write(image(bleed(97)), out / "a.nii.gz")  # 2 * 97 / 197 = 0.985
    assert not wrong("flat", flat)
    write(image(bleed(96)), out / "a.nii.gz")  # 2 * 96 / 196 = 0.9796
    assert wrong("flat", flat) == {"a.nii.gz": ["Dice is under 0.98"]}
    write(image(bleed(5)), expected / "a.nii.gz")  # 25 microlitres, against 20 and 480
    write(image(bleed(9)), out / "a.nii.gz")
    assert not wrong("flat", flat)
    write(image(bleed(96)), out / "a.nii.gz")
    assert wrong("flat", flat) == {"a.nii.gz": ["volumes differ by more than 0.1 mL"]}


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (image(bleed(100, np.int16)), "type is 16-bit signed integer"),
        (image(bleed(100) * 255), r"labels are \[0, 255\], not 0 and 1"),
        (image(bleed(100), origin=(1.0, 2.0, 3.5)), r"origin is \(1.0, 2.0, 3.5\), the scan's"),
        (image(bleed(100)[:3]), "the stored mask's size is"),
    ],
)
def test_masks_that_are_wrong(flat, mask, reason):
    write(mask, flat[1] / "a.nii.gz")
    with pytest.raises(AssertionError, match=reason):
        assert not wrong("flat", flat)


def test_missing_stray_and_unknown_files(flat, tmp_path):
    given, out, expected = flat
    (out / "a.nii.gz").rename(out / ".writing-a.nii.gz")
    (out / "loop").symlink_to(out)
    (out / "empty").mkdir()
    assert wrong("flat", flat) == {
        "a.nii.gz": ["missing"],
        ".writing-a.nii.gz": ["not expected"],
        "loop": ["not expected"],
    }
    (expected / "a.nii.gz").unlink()
    (out / ".writing-a.nii.gz").rename(out / "a.nii.gz")
    assert "no stored mask" in wrong("flat", flat)["a.nii.gz"][0]
    (given / "a.nii.gz").unlink()
    assert wrong("flat", flat)[str(given)] == ["no scans"]
    assert main("flat", *map(str, flat)) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"outputs": [{"filename": "a.nii.gz"}], "error_messages": [], "x": NaN}]', "NaN is not"),
        ("{", "cannot be read"),
        ("[]", r"names \[\], expected \['a.nii.gz'\]"),
        ('[{"outputs": [], "error_messages": ["no CT"]}]', "error of a case: no CT"),
        ('[{"outputs": [{"filename": "b.mha"}], "error_messages": []}]', r"names \['b.mha'\]"),
    ],
)
def test_result_files_that_are_wrong(flat, text, reason):
    (flat[1] / "results.json").write_text(text)
    with pytest.raises(AssertionError, match=reason):
        assert not wrong("flat", flat)


def test_challenge_has_no_result_file(flat):
    assert wrong("challenge", flat) == {"results.json": ["not expected"]}
    (flat[1] / "results.json").unlink()
    assert not wrong("challenge", flat)
    assert list(wrong("flat", flat)) == ["results.json"]


def test_platform(flat, tmp_path):
    _, _, expected = flat
    given, out = tmp_path / "platform-in", tmp_path / "platform-out"
    write(image(dtype=np.int16), given / "images" / "ct" / "1-2.mha")
    entry = {"image": {"name": "a.nii.gz"}, "interface": {"relative_path": "images/ct"}}
    age = {"image": None, "interface": {"relative_path": "age.json"}}
    (given / "inputs.json").write_text(json.dumps([entry, age]))
    write(image(bleed(100)), out / "images" / "bleed" / "1-2.mha")
    write_results(out / "results.json", "images/bleed/1-2.mha")
    assert not wrong("platform", (given, out, expected))
    write(image(bleed(100)), out / "images" / "bleed" / "again.mha")
    assert wrong("platform", (given, out, expected)) == {"images/bleed/again.mha": ["not expected"]}
    (out / "images" / "bleed" / "again.mha").rename(out / "images" / "again.mha")
    assert "images/ONE SOCKET/1-2.mha" in wrong("platform", (given, out, expected))


def test_platform_without_inputs_json(flat, tmp_path):
    _, _, expected = flat
    given, out = tmp_path / "platform-in", tmp_path / "platform-out"
    write(image(dtype=np.int16), given / "images" / "ct" / "a.nii.gz")
    write(image(bleed(100)), out / "images" / "bleed" / "a.mha")
    write_results(out / "results.json", "images/bleed/a.mha")
    assert not wrong("platform", (given, out, expected))


@pytest.mark.parametrize("key", ["socket", "interface"])
@pytest.mark.parametrize("slices", [True, False])
def test_sockets_of_the_platform(tmp_path, key, slices):
    given, out, expected = (tmp_path / name for name in ("in", "out", "expected"))
    scan = image(np.arange(400, dtype=np.int16).reshape(4, 10, 10))
    write(scan, tmp_path / "scan.mha")
    write(image(bleed(100)), expected / "scan.mha")
    place = given / "images" / "ct"
    if slices:
        assert dicom_slices.write(tmp_path / "scan.mha", place) == 4
        names = [path.name for path in sorted(place.iterdir())]
        first = [sitk.ReadImage(str(place / name)).GetOrigin()[2] for name in names]
        assert first != sorted(first)  # their names are not in order
    else:
        write(scan, place / "1-2.mha")
    entry = {"image": {"name": "scan.mha"}, key: {"relative_path": "images/ct"}}
    (given / "inputs.json").write_text(json.dumps([{"image": None}, entry]))
    mask = "images/bleed/ct.mha" if slices else "images/bleed/1-2.mha"
    write(image(bleed(100), origin=(1.0, 2.0, 3.0)), out / mask)
    write_results(out / "results.json", mask)
    assert not wrong("platform", (given, out, expected))
    write(image(bleed(100), origin=(1.0, 2.0, 3.01)), out / mask)
    (found,) = wrong("platform", (given, out, expected))[mask]
    assert found.startswith("origin is")
