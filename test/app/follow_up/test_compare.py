"""``compare-scans`` run as a user runs it, with masks given, so that no network is needed."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from helpers.dicom_files import write_stack

from ichseg.app.follow_up import arguments, compare, growth, page
from ichseg.app.main import main
from ichseg.errors import InputError, OutputError
from ichseg.scan import reader, register, volume
from ichseg.scan.volume import Volume, to_itk

SAMPLE = Path(__file__).parents[2] / "sample" / "input" / "ge_negative.mha"


def head() -> Volume:
    """Every third voxel of a real head's slices, ``(29, 144, 144)``."""
    scan = volume.read(SAMPLE)
    z_mm, y_mm, x_mm = scan.spacing_mm
    voxels = scan.voxels[:, ::3, ::3]
    return Volume(voxels, (z_mm, 3 * y_mm, 3 * x_mm), scan.origin_mm, scan.direction)


def with_bleed(scan: Volume, where: tuple[slice, slice, slice]) -> tuple[Volume, Volume]:
    """The scan with a bleed in a block, and its mask."""
    voxels, mask = scan.voxels.copy(), np.zeros(scan.voxels.shape, np.uint8)
    voxels[where], mask[where] = 70, 1
    return scan.with_voxels(voxels), scan.with_voxels(mask)


def turned(given: Volume, *, labels: bool) -> Volume:
    """Another position in the scanner: nodded by 8 degrees and 7 mm lower."""
    image = to_itk(given)
    way = sitk.Euler3DTransform()
    way.SetCenter(image.TransformContinuousIndexToPhysicalPoint([n / 2 for n in image.GetSize()]))
    way.SetRotation(np.radians(8), 0.0, 0.0)
    way.SetTranslation((2.0, 3.0, -7.0))
    how = sitk.sitkNearestNeighbor if labels else sitk.sitkLinear
    moved = sitk.Resample(image, image, way.GetInverse(), how, 0.0 if labels else -1000.0)
    return given.with_voxels(sitk.GetArrayFromImage(moved))


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head whose bleed of 6 x 20 x 20 voxels becomes 6 x 28 x 28, and a new one, turned."""
    folder = tmp_path_factory.mktemp("studies")
    scan, mask = with_bleed(head(), np.s_[11:17, 60:80, 80:100])
    volume.write(scan, folder / "monday.nii.gz")
    volume.write(mask, folder / "monday_mask.nii.gz")
    scan, mask = with_bleed(head(), np.s_[11:17, 56:84, 76:104])
    scan.voxels[14:17, 100:108, 40:48], mask.voxels[14:17, 100:108, 40:48] = 70, 1
    volume.write(turned(scan, labels=False), folder / "tuesday.mha")
    volume.write(turned(mask, labels=True), folder / "tuesday_mask.mha")
    return folder


@pytest.fixture(scope="module")
def compared(studies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the command wrote."""
    out = tmp_path_factory.mktemp("compared")
    assert main(command(studies, out)) == 0
    return out


def command(folder: Path, out: Path) -> list[str]:
    return [
        arguments.NAME, str(folder / "monday.nii.gz"), str(folder / "tuesday.mha"),
        "--masks", str(folder / "monday_mask.nii.gz"), str(folder / "tuesday_mask.mha"),
        "--output", str(out),
    ]  # fmt: skip


def test_growth_is_told_in_all_and_lesion_by_lesion(studies, compared):
    found = json.loads((compared / compare.FILE).read_text())
    after = volume.read(studies / "tuesday_mask.mha").voxels
    voxel_ml = head().voxel_ml
    before_ml, after_ml = 2400 * voxel_ml, np.count_nonzero(after) * voxel_ml
    assert found["before"] == "monday.nii.gz"
    assert found["before_ml"] == pytest.approx(before_ml, abs=1e-3)
    assert found["after_ml"] == pytest.approx(after_ml, abs=1e-3)
    assert found["growth_ml"] == pytest.approx(after_ml - before_ml, abs=2e-3)
    assert found["growth_percent"] == pytest.approx(100 * (after_ml / before_ml - 1), abs=0.01)
    assert found["expansion"]["is_expansion"] is True
    assert len(found["expansion"]["limits_passed"]) == 2
    assert "Neurology 2011" in found["expansion"]["definition"]
    assert [(each["before"], each["after"], each["state"]) for each in found["lesions"]] == [
        ([1], [1], "larger"),
        ([], [2], "new"),
    ]
    assert sum(each["after_ml"] for each in found["lesions"]) == pytest.approx(after_ml, abs=1e-2)
    assert found["registration"]["rotation_deg"] == pytest.approx(8, abs=0.7)
    assert found["registration"]["agreement"] > 0.9
    assert found["warnings"] == []


def test_the_second_scan_lies_on_the_first(compared):
    first = head()
    laid = volume.read(compared / "after_on_before.nii.gz")
    assert laid.voxels.shape == first.voxels.shape
    np.testing.assert_allclose(laid.origin_mm, first.origin_mm, atol=1e-4)
    brain_or_bone = first.voxels > 0
    within = (np.clip(scan.voxels[brain_or_bone], -100, 1000) for scan in (laid, first))
    assert np.corrcoef(*within)[0, 1] > 0.8
    mask = volume.read(compared / "after_mask_on_before.nii.gz").voxels
    wanted = np.zeros(first.voxels.shape, bool)
    wanted[11:17, 56:84, 76:104] = wanted[14:17, 100:108, 40:48] = True
    assert 2 * (wanted & (mask > 0)).sum() / (wanted.sum() + (mask > 0).sum()) > 0.85


def test_masks_keep_the_grids_of_their_scans(studies, compared):
    for name, given in (("before_mask.nii.gz", "monday_mask.nii.gz"),
                        ("after_mask.mha", "tuesday_mask.mha")):  # fmt: skip
        np.testing.assert_array_equal(
            volume.read(compared / name).voxels, volume.read(studies / given).voxels
        )


def test_page_names_both_scans_and_every_lesion(compared):
    text = (compared / "report" / "index.html").read_text()
    for words in ("monday.nii.gz", "tuesday.mha", "Neurology 2011", 'data-pair="before after"'):
        assert words in text
    assert text.count("data-mm=") == 2


def test_scans_of_two_heads_are_warned_of(studies, tmp_path):
    rng = np.random.default_rng(9)
    other = volume.read(studies / "tuesday.mha")
    inside = other.voxels > -200
    voxels = np.where(inside, 35 + rng.normal(0, 5, inside.shape), -1000)
    part = np.s_[10:18, 40:100, 40:100]
    voxels[part][inside[part]] = 900
    volume.write(other.with_voxels(voxels.astype(np.int16)), tmp_path / "tuesday.mha")
    given = command(studies, tmp_path / "out")
    given[2] = str(tmp_path / "tuesday.mha")
    assert main(given) == 0
    warning, *_ = json.loads((tmp_path / "out" / compare.FILE).read_text())["warnings"]
    assert "of one patient" in warning


def test_a_failed_page_is_a_warning(studies, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    alignment = register.Alignment(sitk.Euler3DTransform(), 0.0, 0.0, 1.0)
    monkeypatch.setattr(register, "register", lambda *_: alignment)
    monkeypatch.setattr(page, "write", fail)
    assert main(command(studies, tmp_path)) == 0
    found = json.loads((tmp_path / compare.FILE).read_text())
    assert found["warnings"] == ["no page (the disk is full)"]
    assert (tmp_path / "after_mask.mha").is_file()


@pytest.mark.parametrize("stage", ["masks", "page"])
def test_nothing_of_an_earlier_pair_stays_where_a_later_one_fails(
    studies, tmp_path, monkeypatch, stage
):
    alignment = register.Alignment(sitk.Euler3DTransform(), 0.0, 0.0, 1.0)
    monkeypatch.setattr(register, "register", lambda *_: alignment)
    assert main(command(studies, tmp_path)) == 0
    (tmp_path / "before_mask.mha").write_bytes(b"of another pair, which had this suffix")
    earlier = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert {"after_mask.mha", "after_on_before.nii.gz", "follow_up.json"} < earlier

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(*(volume, "write") if stage == "masks" else (page, "write"), fail)
    main(command(studies, tmp_path))
    assert not (tmp_path / "report" / "index.html").exists()
    left = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert left == (set() if stage == "masks" else earlier - {"before_mask.mha"})


def test_a_new_bleed_is_not_called_no_expansion(tmp_path, monkeypatch, capsys):
    """22 mL where nothing was pass the limits, of which the page said that neither is passed."""
    change = growth.Change(0.0, 22.0)
    assert change.is_new
    assert not growth.Change(0.0, 0.0).is_new
    assert not growth.Change(1.0, 22.0).is_new
    alignment = register.Alignment(sitk.Euler3DTransform(), 0.0, 0.0, 1.0)
    found = page.FollowUp(("monday", "tuesday"), change, (), alignment, ())
    assert compare._facts(found)["expansion"]["is_expansion"] is None
    compare._say(found)
    said = capsys.readouterr().err
    assert "a new bleed, not judged as haematoma expansion" in said
    assert "no haematoma expansion" not in said


def test_expansion_is_not_judged_where_a_scan_ends_at_a_lesion(tmp_path, monkeypatch, capsys):
    alignment = register.Alignment(sitk.Euler3DTransform(), 0.0, 0.0, 1.0)
    monkeypatch.setattr(register, "register", lambda *_: alignment)
    scan, mask = with_bleed(head(), np.s_[20:24, 60:70, 60:70])
    for name, given in (("monday", scan), ("monday_mask", mask)):
        volume.write(given, tmp_path / f"{name}.nii.gz")
    for name, given in (("tuesday", scan), ("tuesday_mask", mask)):
        cut = Volume(given.voxels[:18], given.spacing_mm, given.origin_mm, given.direction)
        volume.write(cut, tmp_path / f"{name}.mha")
    assert main(command(tmp_path, tmp_path / "out")) == 0
    found = json.loads((tmp_path / "out" / compare.FILE).read_text())
    assert found["expansion"]["is_expansion"] is None
    assert [each["state"] for each in found["lesions"]] == ["not covered"]
    assert "haematoma expansion cannot be told" in capsys.readouterr().err
    page_text = (tmp_path / "out" / "report" / "index.html").read_text()
    assert "a lesion is not covered by both scans" in page_text
    assert "neither limit is passed" not in page_text


def test_masks_that_an_earlier_comparison_wrote_may_be_given(studies, compared, tmp_path):
    given = command(studies, compared)
    masks = [compared / "before_mask.nii.gz", compared / "after_mask.mha"]
    given[4:6] = map(str, masks)
    before = [volume.read(path).voxels for path in masks]
    assert main(given) == 0
    for path, voxels in zip(masks, before, strict=True):
        np.testing.assert_array_equal(volume.read(path).voxels, voxels)


@pytest.mark.parametrize(
    ("position", "name", "said"),
    [
        (1, "none.mha", "none.mha: no such file or folder, expected a scan"),
        (4, "tuesday_mask.mha", "tuesday_mask.mha: lies in another grid, expected that of"),
        (4, "monday.nii.gz", "monday.nii.gz: holds -1.* to .*, expected labels from 0 to 255"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(studies, tmp_path, position, name, said):
    other = volume.read(studies / "tuesday_mask.mha")
    volume.write(Volume(other.voxels, other.spacing_mm), tmp_path / "tuesday_mask.mha")
    folder = tmp_path if name == "tuesday_mask.mha" else studies
    given = command(studies, tmp_path / "out")
    given[position] = str(folder / name)
    with pytest.raises(InputError, match=said):
        compare.run(arguments.parse(given[1:]))
    assert not list((tmp_path / "out").glob("*"))
    assert main(given) == 1


def test_an_output_that_cannot_be_used_is_refused_before_the_work(studies, tmp_path, monkeypatch):
    monkeypatch.setattr(register, "register", lambda *_: pytest.fail("the scans were compared"))
    taken, others = tmp_path / "taken", tmp_path / "others"
    taken.write_bytes(b"a file")
    others.mkdir()
    (others / "results.json").write_text("[]")
    for output, said in (
        (taken, r"taken: cannot write results there \(.*taken is a file, expected a folder\)"),
        (
            taken / "deeper",
            r"deeper: cannot write results there \(.*taken is a file, expected a folder\)",
        ),
        (others, r"results\.json: what was found in other scans, .* expected another --output"),
    ):
        with pytest.raises(OutputError, match=said):
            compare.run(arguments.parse(command(studies, output)[1:]))
    left = {path.name for path in tmp_path.rglob("*")}
    assert left == {"taken", "others", "results.json"}


def test_a_scan_in_the_folder_at_hand_has_that_folders_name(studies, monkeypatch):
    monkeypatch.chdir(studies)
    named = [compare.Study(Path(p), None, None, ()).name for p in (".", "..", "monday.nii.gz")]
    assert named == [studies.name, studies.parent.name, "monday.nii.gz"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"StudyDate": "20240102", "StudyTime": "120000"}, []),
        ({"StudyDate": "20240101", "StudyTime": "090000"}, ["the first scan was taken after the"]),
        ({"StudyDate": "20231231", "StudyTime": "235959"}, ["the first scan was taken after the"]),
        ({"StudyDate": None}, []),
        ({"StudyTime": None}, []),
        ({"StudyTime": "10"}, []),
        ({"StudyTime": "0959"}, ["the first scan was taken after the second, by the dates"]),
        ({"PatientID": "2"}, ["the scans are of two patients, by the numbers in their headers"]),
        ({"PatientID": ""}, []),
    ],
)
def test_what_dicom_headers_have_against_it_is_told(tmp_path, changes, words):
    first = {"StudyDate": "20240101", "StudyTime": "100000"}
    scans = []
    for name, own in (("before", first), ("after", first | changes)):
        places = [(0.0, 0.0, z) for z in (0.0, 5.0, 10.0)]
        write_stack(tmp_path / name, places, lambda at: at[..., 0], **own)
        scans.append(reader.read(tmp_path / name))
    told = compare.about_headers(*scans)
    assert len(told) == len(words)
    assert all(warning.startswith(word) for warning, word in zip(told, words, strict=True))
    assert compare.about_headers(scans[0], reader.scan_of(head())) == []


def test_a_second_scan_whose_sides_are_exchanged_is_told(studies, tmp_path):
    """As files have it whose frame says left where right is; a head's halves are much alike."""
    scan = head()
    volume.write(scan.with_voxels(scan.voxels[:, :, ::-1].copy()), tmp_path / "mirrored.mha")
    mask = np.zeros(scan.voxels.shape, np.uint8)
    mask[12, 70, 90] = 1
    volume.write(scan.with_voxels(mask), tmp_path / "mask.mha")
    words = command(studies, tmp_path / "out")
    words[2], words[5] = str(tmp_path / "mirrored.mha"), str(tmp_path / "mask.mha")
    assert main(words) == 0
    found = json.loads((tmp_path / "out" / compare.FILE).read_text())
    assert 0.87 < found["registration"]["agreement"] < 0.97
    (warning,) = found["warnings"]
    assert "agree by 0.94 as they are, and by 1.00 with the sides of the second" in warning
    assert "left and right are the same in both" in warning


def test_one_scan_given_twice_is_told(studies, tmp_path):
    words = command(studies, tmp_path / "out")
    volume.write(volume.read(studies / "monday.nii.gz"), tmp_path / "copy.mha")
    words[2], words[5] = str(tmp_path / "copy.mha"), words[4]
    assert main(words) == 0
    found = json.loads((tmp_path / "out" / compare.FILE).read_text())
    assert found["warnings"] == ["both scans have the same voxels: they are one scan, given twice"]


@pytest.mark.parametrize("flags", [["--output", ""], ["--weights", ""], ["--masks", "a.mha", ""]])
def test_an_empty_path_is_refused_and_is_not_the_current_folder(capsys, flags):
    with pytest.raises(SystemExit) as caught:
        arguments.parse(["a.mha", "b.mha", *flags])
    assert caught.value.code == 2
    assert f"argument {flags[0]}: an empty name, expected a path" in capsys.readouterr().err
