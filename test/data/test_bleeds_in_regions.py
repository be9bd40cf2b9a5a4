"""Bleeds of CT-ICH are marked where they were seen, up to the skull and not into it."""

import csv
import re

import numpy as np
import pytest
import SimpleITK as sitk

from ichseg.errors import DatasetError
from training.data import downloads, real_heads, windowed
from training.data.windowed import Region

SIZE = 240  # 0.76 mm a pixel: the head is 220 pixels wide
IN_PLANE_MM = 0.76
ROWS, COLUMNS = np.mgrid[:SIZE, :SIZE] - SIZE / 2 + 0.5
RADIUS = np.hypot(ROWS, COLUMNS)
LATERAL = (np.abs(ROWS) < 40) & (COLUMNS > 0)
BRAIN, BLOOD, EDGE, BONE = 30.0, 62.0, 80.0, 100.0
RIGHT = Region(((0.7, 0.2), (1.0, 0.2), (1.0, 0.8), (0.7, 0.8)))


def head(slices=3):
    """Brain in a skull 10 pixels thick, between them one pixel that is partly bone; air outside."""
    plane = np.full((SIZE, SIZE), -20.0)
    plane[RADIUS < 110] = BONE
    plane[RADIUS < 100] = EDGE
    plane[RADIUS < 99] = BRAIN
    return np.repeat(plane[None], slices, axis=0).astype(np.float32)


def box(x0, y0, x1, y1, sure=True):
    """A region from pixel to pixel, the last ones included."""
    left, top, right, bottom = x0 / SIZE, y0 / SIZE, (x1 + 1) / SIZE, (y1 + 1) / SIZE
    return Region(((left, top), (right, top), (right, bottom), (left, bottom)), sure)


def test_a_bleed_beside_the_skull_reaches_it_and_not_into_it():
    hu = head()
    blood = (RADIUS >= 90) & (RADIUS < 99) & LATERAL
    hu[1][blood] = BLOOD
    rim = (RADIUS >= 88) & (RADIUS < 90) & LATERAL
    hu[1][rim] = BRAIN + 9
    hu[1, 140:143, 190:193] = BLOOD  # 5 mm2
    bleed, doubtful = windowed.mark_in_regions(hu, [(), (RIGHT,), ()], IN_PLANE_MM)
    assert bleed[1][blood & (RADIUS > 91) & (RADIUS < 97.5) & (np.abs(ROWS) < 38)].all()
    assert not bleed[1][RADIUS >= 99].any()  # bone, and the pixel that is partly bone
    assert not bleed[1][RADIUS < 89].any()
    assert doubtful[1][rim & (RADIUS > 88.6) & ~bleed[1] & (np.abs(ROWS) < 38)].all()
    assert doubtful[1, 141, 191]
    assert not bleed[[0, 2]].any()
    edge = (RADIUS >= 99) & (RADIUS < 100)
    assert doubtful[1][edge & (np.abs(ROWS) < 35) & (COLUMNS > 0)].all()  # along the bleed
    assert not doubtful[1][edge & (COLUMNS < 0)].any()  # the skull elsewhere is background
    assert not (bleed & doubtful).any()
    assert not doubtful[1][RADIUS >= 100].any()


def test_bone_makes_brain_beside_it_no_bleed():
    bleed, doubtful = windowed.mark_in_regions(head(), [(), (RIGHT,), ()], IN_PLANE_MM)
    assert not bleed.any()
    assert not doubtful[:, RADIUS < 98].any()
    assert doubtful.sum() < 100  # of the ring's 600 pixels in the region and those beside them


def test_what_nobody_can_tell_is_ignored_and_the_rest_is_background():
    hu = head(4)
    hu[:, 110:130, 110:130] = BLOOD  # as dense, in no region
    hu[:, 112:118, 3:8] = BLOOD  # the scalp
    hu[:, 60:70, 150:170] = BRAIN + 11  # faint, in the region
    seen = (box(140, 50, 180, 80), box(60, 100, 79, 119, sure=False))
    bleed, doubtful = windowed.mark_in_regions(hu, [(), seen, (), ()], IN_PLANE_MM)
    assert not bleed.any()
    expected = np.zeros((SIZE, SIZE), bool)
    expected[110:130, 110:130] = expected[100:120, 60:80] = expected[60:70, 150:170] = True
    assert not doubtful[1][~expected].any()
    assert (expected & ~doubtful[1])[:90].sum() == 56  # the faint one's rim, by the smoothing
    assert (expected & ~doubtful[1])[90:].sum() == 4  # the corners of the dense one
    assert not doubtful[[0, 2, 3]].any()


def test_a_pocket_between_bleed_and_skull_is_ignored():
    hu = head()
    hu[1][(RADIUS >= 80) & (RADIUS < 99) & LATERAL] = BLOOD
    pocket = (RADIUS >= 92) & (RADIUS < 98) & (np.abs(ROWS) < 6) & (COLUMNS > 0)
    hu[1][pocket] = BRAIN - 20
    bleed, doubtful = windowed.mark_in_regions(hu, [(), (RIGHT,), ()], IN_PLANE_MM)
    assert not bleed[1][pocket].any()
    assert doubtful[1][pocket].all()
    hole = np.hypot(ROWS - 20, COLUMNS - 84) < 2  # enclosed by blood
    hu[1][hole] = BRAIN
    bleed, _ = windowed.mark_in_regions(hu, [(), (RIGHT,), ()], IN_PLANE_MM)
    assert bleed[1][hole].all()


def test_a_calcification_is_no_blood():
    hu = head()
    hu[1, 110:130, 110:130] = BLOOD
    hu[1, 117:122, 117:122] = BONE
    bleed, _ = windowed.mark_in_regions(hu, [(), (box(100, 100, 140, 140),), ()], IN_PLANE_MM)
    assert not bleed[1, 116:123, 117:122].any()
    assert bleed[1, 112:115, 112:128].all()


def test_a_fracture_does_not_open_the_skull():
    hu = head()
    hu[1][(np.abs(ROWS) < 4) & (COLUMNS < 0) & (RADIUS >= 99) & (RADIUS < 110)] = BRAIN
    hu[1][(RADIUS >= 90) & (RADIUS < 99) & LATERAL] = BLOOD
    hu[1][(RADIUS > 112) & LATERAL] = BLOOD  # the scalp, which the region holds too
    alone = hu[1:2]  # no slice beside it tells
    bleed, _ = windowed.mark_in_regions(alone, [(RIGHT,)], IN_PLANE_MM)
    assert bleed[0][(RADIUS > 91) & (RADIUS < 97.5) & LATERAL & (np.abs(ROWS) < 38)].all()
    assert not bleed[0][RADIUS > 100].any()


@pytest.mark.parametrize("coarse", [1, 2])
def test_outlines_are_fractions_of_the_picture(coarse):
    hu = head()
    hu[1, 90:150, 90:150] = BLOOD
    hu = hu[:, ::coarse, ::coarse]
    outline = ((0.5, 0.4), (0.6, 0.4), (0.6, 0.5), (0.5, 0.5))
    seen = [(), (Region(outline),), ()]
    bleed, _ = windowed.mark_in_regions(hu, seen, IN_PLANE_MM * coarse)
    rows, columns = (np.flatnonzero(bleed[1].any(axis)) * coarse for axis in (1, 0))
    assert (rows[0], columns[0]) == (96, 120)
    assert (rows[-1], columns[-1]) == pytest.approx((119, 143), abs=coarse)


def picture(folder, name, plane):
    folder.mkdir(parents=True, exist_ok=True)
    grey = np.rint((plane + 20) / 120 * 255).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(grey), str(folder / f"{name}.png"))


@pytest.fixture
def trauma(tmp_path, monkeypatch):
    """A scan of four slices, three of which show a bleed; in two of these it was seen."""
    hu = head(4)
    hu[:, 100:120, 130:150] = BLOOD
    table = ["PatientNumber,SliceNumber,No_Hemorrhage"]
    for number, plane in enumerate(hu, 1):
        picture(tmp_path / "ich" / "brain", f"061_{number:02d}", plane)
        table.append(f"61,{number},{int(number == 4)}")
    (tmp_path / "ich" / "hemorrhage_diagnosis.csv").write_text("\n".join(table) + "\n")
    seen = "0.5 0.4 0.65 0.4 0.65 0.52 0.5 0.52"
    regions = ["slice,kind,sure,outline", *(f"061_{n:02d},epidural,1,{seen}" for n in (1, 2, 4))]
    (tmp_path / "regions.csv").write_text("\n".join(regions) + "\n")
    monkeypatch.setattr(downloads, "REGIONS", tmp_path / "regions.csv")
    return tmp_path


def test_a_scan_is_marked_where_its_bleeds_were_seen(trauma):
    real_heads.write_dataset(trauma / "out", ct_ich=trauma / "ich", copies=False, workers=1)
    path = trauma / "out" / "labelsTr" / "ctich_061.nii.gz"
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    assert (labels[:2, 102:118, 132:148] == 1).all()
    assert (labels[:2, 40:90] == 0).mean() > 0.99  # the slice teaches what is no bleed
    assert (labels[2] == 2).all()  # listed, but nobody saw where
    assert not labels[3].any()  # listed as none, whatever was seen
    (row,) = csv.DictReader((trauma / "out" / "record.csv").open())
    assert row["mask"] == (
        "derived by a rule in regions that no radiologist drew; ignored: slices 03"
    )


def test_pictures_twice_as_fine_give_the_same_labels(trauma):
    (scan,) = downloads.find_ct_ich(trauma / "ich")
    expected = real_heads.load(scan)
    for file in scan.files:
        plane = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        sitk.WriteImage(sitk.GetImageFromArray(np.kron(plane, np.ones((2, 2), np.uint8))), file)
    found = real_heads.load(scan)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.spacing_mm, expected.spacing_mm)


def test_the_regions_that_ship_fit_their_pictures():
    seen = downloads.read_regions(downloads.REGIONS)
    assert len({patient for patient, _ in seen}) == 13
    left_of_71 = [region for region in seen[71, 20] if region.sure]
    assert min(x for region in left_of_71 for x, _ in region.outline) > 0.6
    assert not any(region.sure for (patient, _), all_ in seen.items() if patient == 70
                   for region in all_)  # fmt: skip


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("61_01,epidural,1,0.1 0.1 0.2 0.2 0.3 0.3", "slice '61_01'"),
        ("061_01,epidural,yes,0.1 0.1 0.2 0.2 0.3 0.3", "sure 'yes'"),
        ("061_01,epidural,1,0.1 0.1 0.2 0.2", "region '0.1 0.1 0.2 0.2'"),
        ("061_01,epidural,1,0.1 0.1 0.2 0.2 0.3", "region '0.1 0.1 0.2 0.2 0.3'"),
        ("061_01,epidural,1,0.1 0.1 0.2 0.2 0.3 30", "region '0.1 0.1 0.2 0.2 0.3 30'"),
        ("061_01,epidural,1,a b c d e f", "region 'a b c d e f'"),
    ],
)
def test_damaged_tables_of_regions_are_refused(tmp_path, row, told):
    path = tmp_path / "regions.csv"
    path.write_text(f"slice,kind,sure,outline\n{row}\n")
    with pytest.raises(DatasetError, match=rf"regions\.csv: .*{re.escape(told)}.*expected x y"):
        downloads.read_regions(path)
