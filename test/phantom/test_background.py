"""Bleeds drawn into real scans; a head made by hand stands for them."""

import csv
import json

import numpy as np
import pytest
import SimpleITK as sitk
from helpers.hand_made_head import SPACING_MM, blurred_head, hand_made_head
from scipy import ndimage

from ichseg.errors import DatasetError, InputError
from ichseg.scan.volume import read
from phantom import background, bleeds
from phantom.background import Background, find_backgrounds, insert_bleed, paint
from phantom.cases import SynthesisConfig
from phantom.synthesize import write_dataset
from training.__main__ import main as command


@pytest.fixture(scope="module")
def scan():
    return hand_made_head()


def write(path, voxels):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(SPACING_MM[::-1])
    sitk.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize("kind", bleeds.KINDS)
def test_inserted_bleed_has_its_volume_and_only_changes_its_place(scan, kind):
    after, mask = insert_bleed(
        scan, SPACING_MM, kind=kind, volume_ml=8.0, rng=np.random.default_rng(2)
    )
    bleed = mask > 0
    assert bleed.sum() * np.prod(SPACING_MM) / 1000 == pytest.approx(8.0, rel=0.2)
    assert 45 <= after[bleed].mean() <= 95
    assert (after[bleed].astype(int) - scan[bleed]).mean() > 10
    bone = scan > 500
    clear = bleed & ~ndimage.binary_dilation(bone, np.ones((1, 3, 3)), iterations=2)
    apart = after - ndimage.uniform_filter(after.astype(float), (0, 3, 3))
    assert 2.0 < apart[clear].std() < 8
    np.testing.assert_array_equal(after[scan < -500], scan[scan < -500])
    assert np.abs(after[bone].astype(int) - scan[bone]).mean() < 5


@pytest.mark.parametrize("window", [None, (-20, 100)])
@pytest.mark.parametrize("kind", ["subdural", "epidural"])
def test_bleeds_at_the_skull_touch_it_and_stay_out_of_it(kind, window, tmp_path):
    voxels = blurred_head()
    bone = voxels > 500
    path = write(tmp_path / "scan.nii.gz", voxels if window is None else voxels.clip(*window))
    for seed in (3, 7, 8):
        made = paint(Background("a", "a", path), ((kind, 20.0),), np.random.default_rng(seed))
        bleed = made.labels == 1
        if kind == "subdural" and np.abs(np.argwhere(bleed)[:, 2].mean() - 80) < 15:
            continue  # along the falx
        off_mm = [
            ndimage.distance_transform_edt(voxels[z] < 100)[bleed[z]].min()
            for z in np.flatnonzero(bleed.any(axis=(1, 2)))
        ]
        assert np.median(off_mm) <= 2.0
        assert not (voxels[bleed] > 90).any()
        assert made.volumes_ml[kind] == pytest.approx(20.0, rel=0.05)
        skull = made.voxels[bone].astype(int) - voxels[bone].clip(*(window or (None, None)))
        assert np.abs(skull).max() <= 30
        assert np.abs(skull).mean() < 1


def test_a_label_of_at_least_half_blood_falls_short_of_its_volume():
    fraction = np.array([0.9, 0.8, 0.6, 0.48, 0.46, 0.3, 0.0], np.float32)
    np.testing.assert_array_equal(bleeds.label(fraction, 1.0, 5.0), [1, 1, 1, 1, 1, 0, 0])
    half = bleeds.label(fraction, 1.0, 5.0, least=0.5)
    np.testing.assert_array_equal(half, [1, 1, 1, 0, 0, 0, 0])


def test_labels_in_real_scans_hold_at_least_half_blood(scan, monkeypatch):
    least = []

    def spying(fraction, *rest, **named):
        mask = bleeds.label(fraction, *rest, **named)
        least.append(fraction[mask == 1].min())
        return mask

    monkeypatch.setattr(background, "label", spying)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        insert_bleed(scan, SPACING_MM, kind="subarachnoid", volume_ml=30.0, rng=rng)
    assert min(least) >= 0.5


def test_ventricular_blood_stays_in_the_ventricles(scan):
    _, mask = insert_bleed(
        scan, SPACING_MM, kind="intraventricular", volume_ml=6.0, rng=np.random.default_rng(1)
    )
    assert (scan[mask > 0] < 18).mean() > 0.9  # it lies where fluid was


def test_same_generator_same_bleed(scan):
    runs = [
        insert_bleed(scan, SPACING_MM, kind="epidural", volume_ml=4.0, rng=np.random.default_rng(9))
        for _ in range(2)
    ]
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    np.testing.assert_array_equal(runs[0][1], runs[1][1])


def test_unknown_kind_and_volume_are_refused(scan):
    with pytest.raises(ValueError, match="'stroke', expected one of"):
        insert_bleed(scan, SPACING_MM, kind="stroke", volume_ml=4.0, rng=np.random.default_rng(9))
    with pytest.raises(ValueError, match="at most 155"):
        insert_bleed(
            scan, SPACING_MM, kind="subdural", volume_ml=400.0, rng=np.random.default_rng(9)
        )


def test_a_scan_without_brain_is_refused():
    air = np.full((10, 64, 64), -1000, np.int16)
    with pytest.raises(ValueError, match="no brain found"):
        insert_bleed(air, SPACING_MM, kind="subdural", volume_ml=4.0, rng=np.random.default_rng(9))


@pytest.mark.parametrize("window", [(-20, 100), (0, 80)])
def test_a_scan_cut_to_a_window_is_drawn_into_as_well(scan, window, tmp_path):
    cut = write(tmp_path / "cut.nii.gz", np.clip(scan, *window))
    whole = write(tmp_path / "whole.nii.gz", scan)
    made = [
        paint(Background("a", "a", path), (("subdural", 20.0),), np.random.default_rng(4))
        for path in (cut, whole)
    ]
    found, expected = (each.labels == 1 for each in made)
    assert 2 * (found & expected).sum() / (found.sum() + expected.sum()) > 0.85
    both = found & expected
    apart = made[0].voxels[both].astype(int) - made[1].voxels[both].clip(*window)
    assert np.abs(apart).mean() < 4
    assert (made[0].voxels.min(), made[0].voxels.max()) == window
    bone = (scan > 500) & ~ndimage.binary_dilation(found, iterations=3)
    assert (made[0].voxels[bone] == window[1]).all()
    assert made[0].volumes_ml["subdural"] == pytest.approx(found.sum() * 0.005)


def test_labels_of_the_scan_are_kept(scan, tmp_path):
    labels = np.zeros(scan.shape, np.uint8)
    labels[14:16, 60:70, 60:70] = 1
    labels[10:20, 80:170, 120:150] = 2
    background = Background(
        "a", "a", write(tmp_path / "a.nii.gz", scan), write(tmp_path / "b.nii.gz", labels)
    )
    painted = paint(background, (("epidural", 25.0),), np.random.default_rng(9))
    drawn = (painted.labels == 1) & (labels != 1)
    assert drawn.sum() * 0.005 == pytest.approx(25, rel=0.2)
    np.testing.assert_array_equal(painted.labels[~drawn], labels[~drawn])


def test_values_that_are_no_window_are_refused(scan, tmp_path):
    path = write(tmp_path / "a.nii.gz", np.clip(scan, 0, 255))
    with pytest.raises(InputError, match=r"a\.nii\.gz: values from 0 to 255, expected HU"):
        paint(Background("a", "a", path), (("epidural", 25.0),), np.random.default_rng(9))


def test_a_scan_without_brain_is_named(tmp_path):
    path = write(tmp_path / "air.nii.gz", np.full((10, 64, 64), -1000, np.int16))
    with pytest.raises(InputError, match=r"air\.nii\.gz: no brain found"):
        paint(Background("a", "a", path), (("subdural", 4.0),), np.random.default_rng(9))


@pytest.fixture
def backgrounds(scan, tmp_path):
    """Two scans of one patient, and one in which no brain is found."""
    folder = tmp_path / "real"
    air = np.full(scan.shape, -1000, np.int16)
    for name, voxels in (("p_1", scan), ("p_2", scan), ("q", air)):
        write(folder / "imagesTr" / f"{name}.nii.gz", voxels)
        write(folder / "labelsTr" / f"{name}.nii.gz", np.zeros(scan.shape, np.uint8))
    entries = ", ".join(
        f'{{"image": "./imagesTr/{n}.nii.gz", "label": "./labelsTr/{n}.nii.gz"}}'
        for n in ("p_1", "p_2", "q")
    )
    (folder / "dataset.json").write_text(f'{{"training": [{entries}]}}')
    (folder / "groups.csv").write_text("case,group\np_1,p\np_2,p\nq,q\n")
    return folder


def test_a_dataset_of_real_scans_becomes_one_with_bleeds(backgrounds, tmp_path, caplog):
    found = find_backgrounds(backgrounds)
    config = SynthesisConfig(6, 3, negatives=0.0, balanced=True, backgrounds=found)
    write_dataset(config, tmp_path / "out")
    with (tmp_path / "out" / "groups.csv").open() as stream:
        groups = {row["case"]: row["group"] for row in csv.DictReader(stream)}
    assert groups == dict.fromkeys(("p_1_bled", "p_2_bled", "p_1_bled2", "p_2_bled2"), "p")
    assert caplog.text.count("q.nii.gz: no brain found") == 2
    for name in groups:
        assert read(tmp_path / "out" / "labelsTr" / f"{name}.nii.gz").voxels.any()


def test_a_patient_without_a_group_is_refused(backgrounds):
    (backgrounds / "groups.csv").write_text("case,group\np_1,p\n")
    with pytest.raises(DatasetError, match=r"groups\.csv: no group for case 'p_2'"):
        find_backgrounds(backgrounds)
    for text in ("name,group\np_1,p\n", b"case,group\np_1,\xff\n", "case,group\n\0,\0\n"):
        content = text if isinstance(text, bytes) else text.encode()
        (backgrounds / "groups.csv").write_bytes(content)
        with pytest.raises(DatasetError, match=r"groups\.csv: (expected a table|no group)"):
            find_backgrounds(backgrounds)


def test_a_patient_in_two_groups_is_refused(backgrounds):
    (backgrounds / "groups.csv").write_text("case,group\np_1,p\np_2,p\nq,q\np_2,r\n")
    with pytest.raises(DatasetError, match=r"groups\.csv: case 'p_2' is in two groups"):
        find_backgrounds(backgrounds)
    (backgrounds / "groups.csv").write_text("\ufeffcase,group\np_1,p\np_2,p\nq,q\nq,q\n")
    assert [each.group for each in find_backgrounds(backgrounds)] == ["p", "p", "q"]


def test_copies_of_one_scan_are_one_patients(scan, tmp_path):
    path = write(tmp_path / "scan.nii.gz", scan)
    config = SynthesisConfig(2, 3, negatives=1.0, backgrounds=find_backgrounds(path))
    write_dataset(config, tmp_path / "out")
    table = (tmp_path / "out" / "groups.csv").read_text()
    assert table == "case,group\nICH_0001,scan.nii.gz\nICH_0002,scan.nii.gz\n"


def test_a_dataset_of_one_scan_is_a_dataset(backgrounds, tmp_path):
    """Its case keeps its name, its patient and the declaration of what it ignores."""
    listing = backgrounds / "dataset.json"
    first = json.loads(listing.read_text())["training"][:1]
    listing.write_text(json.dumps({"training": first}))
    line = ["synthesize", "--background", str(backgrounds), "--out", str(tmp_path / "out")]
    assert command([*line, "--workers", "1", "--negatives", "0"]) == 0
    described = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert [case["image"] for case in described["training"]] == ["./imagesTr/p_1_bled.nii.gz"]
    assert described["labels"] == {"0": "background", "1": "hemorrhage", "2": "ignore"}
    assert (tmp_path / "out" / "groups.csv").read_text() == "case,group\np_1_bled,p\n"


def test_a_dataset_without_scans_does_not_become_phantoms(backgrounds):
    for training, message in (
        ([], "dataset.json: no training cases"),
        ([{"image": f"{n}/a.nii", "label": "b.nii"} for n in "xy"], "two images are called 'a'"),
        (["a.nii"], "expected a scan or a folder"),
    ):
        (backgrounds / "dataset.json").write_text(json.dumps({"training": training}))
        with pytest.raises(DatasetError, match=message):
            find_backgrounds(backgrounds)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((2, 3, 4), np.uint8), r"b\.nii\.gz: 2x3x4 voxels, expected 30x180x160"),
        (np.full((30, 180, 160), 7, np.uint8), r"b\.nii\.gz: expected the labels 0, 1 and 2"),
        (np.full((30, 180, 160), 257, np.int16), r"b\.nii\.gz: expected the labels 0, 1 and 2"),
    ],
)
def test_labels_that_are_not_of_the_scan_are_refused(scan, tmp_path, labels, message):
    files = write(tmp_path / "a.nii.gz", scan), write(tmp_path / "b.nii.gz", labels)
    with pytest.raises(InputError, match=message):
        paint(Background("a", "a", *files), (("epidural", 25.0),), np.random.default_rng(9))


@pytest.mark.parametrize("value", [np.nan, 40_000.0])
def test_values_that_16_bits_do_not_hold_are_refused(scan, tmp_path, value):
    voxels = scan.astype(np.float32)
    voxels[0, 0, 0] = value
    path = write(tmp_path / "a.nii.gz", voxels)
    with pytest.raises(InputError, match=r"a\.nii\.gz: "):
        paint(Background("a", "a", path), (("epidural", 25.0),), np.random.default_rng(9))


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="expected a scan or a folder in MSD layout"):
        find_backgrounds(tmp_path)


@pytest.mark.parametrize("name", ["absent.nii.gz", "x" * 5000])
def test_a_scan_that_the_listing_names_and_that_is_not_there_is_refused(tmp_path, name):
    listed = {"training": [{"image": f"imagesTr/{name}", "label": "labelsTr/a.nii.gz"}]}
    (tmp_path / "dataset.json").write_text(json.dumps(listed))
    with pytest.raises(DatasetError, match=r"dataset.json: names .*, which is no file"):
        find_backgrounds(tmp_path)
