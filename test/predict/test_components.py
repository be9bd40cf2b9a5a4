"""Component rules and the lesion table; drawn and worked out by hand."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from scipy import ndimage

from ichseg import pieces
from ichseg.errors import PlansError
from ichseg.model import strict_json
from ichseg.model.rules import ComponentRule
from ichseg.predict import components
from ichseg.predict.components import apply_rules, case_score, lesions
from ichseg.scan.volume import Volume


def drawn(*slices):
    """Labels from slices of text, a digit a voxel, ``.`` for background."""
    rows = [[list(line.replace(".", "0")) for line in text.split()] for text in slices]
    return np.array(rows, dtype=np.uint8)


THREE = drawn("11.... ...... ....1.", "...... ...... .....1", "...... ...... 1....1")  # 2, 3, 1


def test_components_touch_by_corners():
    corner = drawn("1. ..", ".. .1")
    assert len(lesions(corner, Volume(corner, (1.0, 1.0, 1.0)))) == 1


def test_keep_largest_keeps_the_largest_of_that_label_only():
    labels = THREE.copy()
    labels[0, 1, 0] = 2
    kept = apply_rules(labels, [ComponentRule(1, keep_largest=True)], 1.0)
    expected = drawn("...... 2..... ....1.", "...... ...... .....1", "...... ...... .....1")
    np.testing.assert_array_equal(kept, expected)


def test_of_equals_the_first_stays():
    labels = drawn("11.. .... ..11")
    kept = apply_rules(labels, [ComponentRule(1, keep_largest=True)], 1.0)
    np.testing.assert_array_equal(kept, drawn("11.. .... ...."))


@pytest.mark.parametrize(
    ("drop_below_ml", "voxels_left"), [(0.0, 6), (0.1, 6), (0.11, 5), (0.2, 5), (0.3, 3), (0.31, 0)]
)
def test_what_is_smaller_goes_and_what_is_just_as_large_stays(drop_below_ml, voxels_left):
    kept = apply_rules(THREE, [ComponentRule(1, drop_below_ml=drop_below_ml)], 0.1)
    assert kept.sum() == voxels_left


def test_both_conditions_hold():
    rule = ComponentRule(1, keep_largest=True, drop_below_ml=4.0)
    assert not apply_rules(THREE, [rule], 1.0).any()


def test_rules_leave_their_input_alone_and_pass_over_labels_that_do_not_occur():
    before = THREE.copy()
    apply_rules(THREE, [ComponentRule(1, keep_largest=True)], 1.0)
    np.testing.assert_array_equal(THREE, before)
    np.testing.assert_array_equal(apply_rules(THREE, [ComponentRule(2, True)], 1.0), THREE)
    empty = np.zeros((2, 3, 4), np.uint8)
    np.testing.assert_array_equal(apply_rules(empty, [ComponentRule(1, True, 1.0)], 1.0), empty)


def test_a_component_is_as_likely_as_its_voxels_are_in_the_mean():
    """Of three components of 2, 3 and 1 voxels: means 0.5, 0.8 and 1, highest 0.6, 1 and 1."""
    chance = np.zeros(THREE.shape, np.uint8)
    chance[0, 0, :2] = 102, 153
    chance[THREE == 1] = np.where(chance[THREE == 1] == 0, 255, chance[THREE == 1])
    found, _ = ndimage.label(THREE, np.ones((3, 3, 3)))
    sizes = np.bincount(found.ravel())[1:]
    three = found == 1 + int(np.flatnonzero(sizes == 3)[0])
    chance[three] = 102, 255, 255
    scan = Volume(THREE, (1.0, 1.0, 1.0))
    likely = [(x.mean_probability, x.max_probability) for x in lesions(THREE, scan, chance)]
    assert likely == [pytest.approx(p) for p in ((0.8, 1.0), (0.5, 0.6), (1.0, 1.0))]
    for limit, voxels in ((0.5, 6), (0.51, 4), (0.8, 4), (0.81, 1)):
        rule = ComponentRule(1, drop_below_probability=limit)
        assert apply_rules(THREE, [rule], 1.0, chance).sum() == voxels
    with pytest.raises(ValueError, match="a rule about probabilities needs them"):
        apply_rules(THREE, [rule], 1.0)
    assert lesions(THREE, scan)[0].mean_probability is None


def test_the_score_of_a_case_is_the_mean_of_its_likeliest_voxels():
    chance = np.zeros((4, 10, 10), np.uint8)
    assert case_score(chance, 0.01) == 0
    chance[1, 2, :8] = 255
    chance[3, 3, 3] = 51
    # 20 voxels are 0.2 mL: eight of 1, one of 0.2, the rest 0
    assert case_score(chance, 0.01) == pytest.approx((8 + 0.2) / 20)
    chance[2] = 255
    assert case_score(chance, 0.01) == 1
    assert case_score(chance[3:], 5.0) == pytest.approx(0.2)  # a voxel is larger
    assert case_score(chance[:2, :2, :2], 0.01) == 0


def test_slabs_change_nothing(monkeypatch):
    labels = (np.random.default_rng(0).random((9, 20, 20)) < 0.1).astype(np.uint8)
    scan = Volume(labels * np.float32(7), (2.0, 1.0, 1.0))
    rules = [ComponentRule(1, drop_below_ml=0.006)]
    whole = apply_rules(labels, rules, 0.002), lesions(labels, scan)
    assert 0 < whole[0].sum() < labels.sum()
    monkeypatch.setattr(components, "_SLAB_VOXELS", 401)
    monkeypatch.setattr(pieces, "_SLAB_VOXELS", 401)
    np.testing.assert_array_equal(apply_rules(labels, rules, 0.002), whole[0])
    assert lesions(labels, scan) == whole[1]


def test_a_lesion_of_half_the_volume_takes_no_number_a_voxel(monkeypatch):
    """The rules' copy is a byte a voxel; numbers for all of the box would be four more."""
    labels = np.zeros((64, 128, 128), np.uint8)
    labels[:32] = 1
    labels[60, ::2, ::64] = 1
    scan = Volume(labels.view(np.int8), (1.0, 1.0, 1.0))
    monkeypatch.setattr(pieces, "_SLAB_VOXELS", 60_000)
    monkeypatch.setattr(pieces, "_MEASURED_VOXELS", 20_000)
    tracemalloc.start()
    try:
        kept = apply_rules(labels, [ComponentRule(1, keep_largest=True)], 1.0)
        found = lesions(kept, scan, labels)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [each.volume_ml for each in found] == [kept.sum() / 1000] == [32 * 128 * 128 / 1000]
    assert peak < 3 * labels.size


def test_the_table_of_a_straight_scan():
    # 5 mm slices, 1 mm rows, 2 mm columns; the first voxel at x 10, y 20, z 30
    scan = Volume(np.zeros(THREE.shape, np.int16), (5.0, 1.0, 2.0), (30.0, 20.0, 10.0))
    scan.voxels[THREE > 0] = 60
    scan.voxels[2, 2, 0], scan.voxels[0, 0, 1] = 40, 70
    largest, second, third = lesions(THREE, scan)
    assert [round(lesion.volume_ml, 6) for lesion in (largest, second, third)] == [0.03, 0.02, 0.01]
    # (z, y, x) = (0, 2, 4), (1, 2, 5), (2, 2, 5)
    assert largest.centroid_mm == pytest.approx((10 + 2 * 14 / 3, 22, 35))
    assert largest.box_mm == ((17.0, 21.5, 27.5), (21.0, 22.5, 42.5))
    assert second.centroid_mm == pytest.approx((11, 20, 30))
    assert [lesion.mean_hu for lesion in (largest, second, third)] == [60, 65, 40]


def test_positions_follow_the_scans_axes():
    """The same bleed in a scan stored from the head down and from left to right."""
    plain = Volume(THREE.astype(np.int16), (5.0, 1.0, 2.0), (30.0, 20.0, 10.0))
    flipped = dataclasses.replace(
        plain,
        voxels=plain.voxels[::-1, :, ::-1],
        origin_mm=(40.0, 20.0, 20.0),
        direction=(-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, -1.0),
    )
    for here, there in zip(
        lesions(np.ascontiguousarray(THREE[::-1, :, ::-1]), flipped),
        lesions(THREE, plain),
        strict=True,
    ):
        assert here.volume_ml == there.volume_ml
        assert here.centroid_mm == pytest.approx(there.centroid_mm)
        assert np.array(here.box_mm) == pytest.approx(np.array(there.box_mm))


def test_an_oblique_box_holds_every_voxel():
    c, s = np.cos(0.4), np.sin(0.4)
    scan = Volume(
        THREE.astype(np.int16), (5.0, 1.0, 2.0), (3.0, 2.0, 1.0), (c, -s, 0, s, c, 0, 0, 0, 1)
    )
    largest = lesions(THREE, scan)[0]
    (low, high), step = largest.box_mm, np.reshape(scan.direction, (3, 3)) * scan.spacing_mm
    corners = [
        np.array(scan.origin_mm) + step @ (np.array(voxel) + shift)
        for voxel in ((0, 2, 4), (1, 2, 5), (2, 2, 5))
        for shift in np.array(np.meshgrid(*[[-0.5, 0.5]] * 3)).reshape(3, -1).T
    ]
    xyz = np.array(corners)[:, ::-1]
    assert (xyz >= np.array(low) - 1e-9).all()
    assert (xyz <= np.array(high) + 1e-9).all()
    assert largest.centroid_mm == pytest.approx(xyz.mean(0))


def test_labels_are_told_apart_though_they_touch():
    labels = drawn("112")
    found = lesions(labels, Volume(labels, (10.0, 10.0, 10.0)))
    assert [(lesion.label, lesion.volume_ml) for lesion in found] == [(1, 2.0), (2, 1.0)]


def test_nothing_found_is_an_empty_table():
    empty = np.zeros((2, 3, 4), np.uint8)
    assert lesions(empty, Volume(empty, (1.0, 1.0, 1.0))) == ()


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 3, 6\).*\(1, 1, 1\)"):
        lesions(THREE, Volume(np.zeros((1, 1, 1)), (1.0, 1.0, 1.0)))


def test_rules_survive_json_and_refuse_what_makes_no_sense():
    rule = ComponentRule(2, True, 0.5)
    assert strict_json.from_json(ComponentRule, strict_json.to_json(rule), where="here") == rule
    for label, ml in ((0, 0.0), (1, -1.0), (1, float("nan"))):
        with pytest.raises(ValueError, match="expected"):
            ComponentRule(label, drop_below_ml=ml)
    with pytest.raises(PlansError, match="rule for label 0"):
        strict_json.from_json(
            ComponentRule,
            {"label": 0, "keep_largest": True, "drop_below_ml": 0.0},
            where="here",
        )


def speck_warning(labels, scan, foreground):
    return components.speck_warning(labels, scan, foreground, lesions(labels, scan, foreground))


def skull_with(*places, sure=0.6, bone=900, plane=2):
    """A head of 5 x 1 x 1 mm in a ring of bone, labels at these places, and how likely they are."""
    y, x = np.indices((80, 80)) - 39.5
    radius = np.hypot(y, x)
    voxels = np.full((10, 80, 80), 30, np.int16)
    voxels[:, radius > 30] = bone  # the inner table; 360 mL of bone in all
    voxels[:, radius > 36] = -1000 if bone > 200 else -20
    labels = np.zeros(voxels.shape, np.uint8)
    for rows, columns in places:
        labels[plane, rows, columns] = 1
    chance = np.where(labels, round(255 * sure), 0).astype(np.uint8)
    return labels, Volume(voxels, (5.0, 1.0, 1.0)), chance


SPECK = (slice(35, 45), slice(11, 14))  # 10 x 3 mm, 0.15 mL, at the skull's right side
CENTRAL = (slice(35, 45), slice(38, 41))
BLEED = (slice(30, 50), slice(25, 50))  # 2.5 mL


def test_what_is_as_dense_as_bone_is_told():
    labels, scan, chance = skull_with(BLEED)
    labels[2, 35:45, 6:8] = 1  # 0.1 mL in the skull
    assert components.density_warning(lesions(labels, scan)) is None
    labels[:, 5:9, 36:43] = labels[:, 71:75, 36:43] = 1  # more of it than of the bleed
    found = lesions(labels, scan)
    said = components.density_warning(found)
    assert said.startswith("2.90 of 5.40 mL that were found have 900 HU on average, where blood")
    assert said in components.doubts(labels, scan, chance, found)
    assert components.density_warning(()) is None


def test_what_is_as_thin_as_air_or_fat_is_told():
    labels, scan, _ = skull_with(BLEED)
    labels[:, 70:75, 36:43], scan.voxels[:, 70:75] = 1, -80
    found = lesions(labels, scan)
    assert components.density_warning(found) is None  # less of it than of the bleed
    labels[:, 70:75, 20:60] = 1
    said = components.density_warning(lesions(labels, scan))
    assert said.startswith("10.00 of 12.50 mL that were found have -80 HU on average")
    assert said.endswith("it may well be air or fat")


def test_more_than_a_skull_can_bleed_is_told():
    labels, scan, _ = skull_with(BLEED)
    scan = Volume(scan.voxels, (5.0, 14.0, 14.0))
    found = lesions(labels, scan)  # 490 mL
    assert components.size_warning(found) is None
    labels[:, 60, 30:34] = 1  # 4 voxels of 0.98 mL in each of 10 slices
    said = components.size_warning(lesions(labels, scan))
    assert said.startswith("529 mL were found, and no bleed within a skull")


def test_specks_at_the_inner_table_are_told():
    said = speck_warning(*skull_with(SPECK))
    assert said is not None
    assert "all that was found (0.15 of 0.15 mL)" in said
    assert "mean probability of 0.60" in said
    assert speck_warning(*skull_with(SPECK, bone=100)) is not None  # in a window of HU
    said = speck_warning(*skull_with(SPECK, (slice(38, 42), slice(38, 41))))
    assert said is not None
    assert "most of what was found (0.15 of 0.21 mL)" in said


@pytest.mark.parametrize(
    ("places", "sure"),
    [
        ([], 0.6),
        ([SPECK], 0.85),  # the networks are sure
        ([CENTRAL], 0.6),  # not beside bone
        ([(slice(35, 45), slice(10, 19))], 0.6),  # 9 mm thick
        ([SPECK, CENTRAL, (slice(50, 60), slice(38, 41))], 0.6),  # the lesser part
        ([SPECK, BLEED], 0.6),
    ],
)
def test_what_is_no_speck_is_not_told(places, sure):
    assert speck_warning(*skull_with(*places, sure=sure)) is None


def test_a_thick_sheet_of_slices_is_no_speck_and_without_a_skull_there_are_none():
    labels, scan, chance = skull_with(SPECK)
    bare = scan.with_voxels(np.where(scan.voxels > 100, 0, scan.voxels).astype(np.int16))
    bare.voxels[2, 35, 11] = 70
    assert speck_warning(labels, bare, chance) is None
    labels[:] = labels[2]  # 10 slices: 1.5 mL, still 3 mm thin
    chance[:] = chance[2]
    assert speck_warning(labels, scan, chance) is not None
    labels[:, 30:50, 11:14], chance[:, 30:50, 11:14] = 1, 150  # 3 mL
    assert speck_warning(labels, scan, chance) is None
