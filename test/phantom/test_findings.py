"""Findings: where they lie, how dense they are, and that they move nothing else."""

import argparse
import csv

import numpy as np
import pytest
import torch
from scipy import ndimage

from ichseg.errors import DatasetError
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from phantom import scanner, synthesize
from phantom.brain import tentorium_mm
from phantom.cases import SynthesisConfig, _coarse_position, coarse_anatomy, make_phantom
from phantom.findings import inside, mouth, outside, subdurals
from phantom.findings.choose import (
    NOTHING,
    Findings,
    add_findings,
    draw_findings,
    with_hydrocephalus,
)
from phantom.head import lowest_mm, make_head, sample
from phantom.head_atlas import ATLAS_ORIGIN_MM, BONE, INSIDE, SPONGY, load_atlas
from phantom.person import draw_head
from phantom.synthesize import write_dataset


@pytest.fixture(scope="module")
def head():
    rng = np.random.default_rng(8)
    parameters = draw_head(rng)
    scan = scanner.draw_scan(parameters, rng, shrink=4)
    made = make_head(parameters, rng)
    return made, scan, coarse_anatomy(made, scan)


def plain():
    """An atlas with brain of 30 HU inside, bone of 1500 HU and air around."""
    tissue = load_atlas().tissue
    hu = np.where(np.isin(tissue, (BONE, SPONGY)), 1500, -1000).astype(np.float32)
    return np.where(tissue == INSIDE, 30, hu).astype(np.float32), tissue


def scanned(seed, lesion, findings, shrink):
    """A person, the scan that is asked for, and the phantom with this bleed and these findings."""
    rng = np.random.default_rng(seed)
    parameters = draw_head(rng)
    scan = scanner.draw_scan(parameters, rng, shrink=shrink)
    apart = np.random.default_rng(2)
    return (
        parameters,
        scan,
        make_phantom(parameters, scan, (lesion,), rng, findings, findings_rng=apart),
    )


def test_findings_move_no_other_draw():
    """The same person, scanner and noise, and as many random numbers."""
    rng = np.random.default_rng(5)
    parameters = draw_head(rng)
    scan = scanner.draw_scan(parameters, rng, shrink=8)
    state = rng.bit_generator.state
    cases, following = [], []
    for findings in (None, Findings(scalp_haematoma=True)):
        rng.bit_generator.state = state
        apart = np.random.default_rng(1)
        cases.append(
            make_phantom(parameters, scan, (("epidural", 9.0),), rng, findings, findings_rng=apart)
        )
        following.append(rng.random())
    before, scalp = cases
    assert following[0] == following[1]
    np.testing.assert_array_equal(before.mask, scalp.mask)
    assert 0 < (before.voxels != scalp.voxels).mean() < 0.5
    assert (before.findings.names, scalp.findings.names) == ((), ("scalp_haematoma",))


def test_a_scalp_haematoma_lies_between_skull_and_skin():
    hu, tissue = plain()
    before = hu.copy()
    outside.add_scalp_haematoma(hu, -95.0, np.random.default_rng(2))
    changed = hu != before
    assert not changed[np.isin(tissue, (BONE, SPONGY, INSIDE))].any()
    blood = changed & (hu > 40) & (hu < 90)
    assert 1_000 < blood.sum() < 60_000  # 1 to 60 mL
    assert (changed & (hu == -95)).sum() > 500  # fat above it


def test_a_fracture_is_a_thin_gap_in_bone_alone():
    hu, tissue = plain()
    before = hu.copy()
    outside.add_fracture(hu, np.random.default_rng(3))
    gap = hu < before - 300
    assert gap.any()
    assert np.isin(tissue[gap], (BONE, SPONGY)).all()
    places = np.argwhere(gap)
    assert (places.max(0) - places.min(0)).max() > 15  # mm long
    assert ndimage.distance_transform_edt(gap).max() < 3.5  # and thin


def test_a_flap_has_plates_of_metal_on_the_skull():
    hu, tissue = plain()
    outside.add_flap(hu, np.random.default_rng(4))
    metal = hu > 2000
    assert 10 < metal.sum() < 2000
    assert not (metal & (tissue == INSIDE)).any()
    assert (np.isin(tissue, (BONE, SPONGY)) & (hu < 500)).sum() > 200


def test_a_drain_leads_through_the_skull_into_the_brain():
    outer, tissue = plain()
    within = np.full(outer.shape, 30, np.float32)
    inside.add_drain(outer, within, np.random.default_rng(5))
    tube = within > 90
    depth = load_atlas().depth_mm[tuple((np.argwhere(tube) // 2).T)]
    assert depth.max() > 30
    assert (tube & np.isin(tissue, (BONE, SPONGY))).any()
    assert (np.isin(tissue, (BONE, SPONGY)) & (outer < 100)).any()


def test_contrast_is_brightest_in_the_vessels_and_calcium_in_the_falx():
    shape, brain = load_atlas().tissue.shape, load_atlas().tissue == INSIDE
    hu = np.full(shape, 30, np.float32)
    inside.add_contrast(hu, np.random.default_rng(6))
    assert 31 < np.median(hu[brain]) < 35
    bright = np.argwhere((hu > 80) & brain) + ATLAS_ORIGIN_MM
    assert len(bright) > 300
    basilar = (np.abs(bright - (-28, 14, 1)) < (12, 4, 4)).all(1)
    assert basilar.sum() > 30
    hu = np.full(shape, 30, np.float32)
    inside.add_calcified_dura(hu, np.random.default_rng(10))
    plate = np.argwhere(hu > 100) + ATLAS_ORIGIN_MM
    assert len(plate) > 50
    assert np.median(np.abs(plate[:, 2])) < 2.5  # in the midline


def test_dense_veins_fill_confluence_straight_sinus_and_deep_veins_and_nothing_else():
    brain = load_atlas().tissue == INSIDE
    hu = np.full(brain.shape, 30, np.float32)
    inside.add_dense_veins(hu, np.random.default_rng(6))
    assert 55 <= hu.max() < 80
    dense = hu > 50
    assert 0.005 < (dense & brain).sum() / brain.sum() < 0.05
    at = np.argwhere(dense) + ATLAS_ORIGIN_MM
    for site in ((7, 36, 0), (-5, 70, 0), (11, 25, 2.5)):  # vein of Galen, straight, internal
        assert (np.abs(at - site) < 3).all(1).any(), site
    assert np.abs(at[at[:, 1] < 95, 2]).min() < 1.5
    # away from midline and inner table there is none
    deep = load_atlas().depth_mm[tuple((np.argwhere(dense) // 2).T)] > 15
    assert np.abs(at[deep, 2]).max() < 12


def test_a_mouth_lies_below_the_head_and_moves_nothing_in_it():
    parameters = draw_head(np.random.default_rng(3))
    made = make_head(parameters, np.random.default_rng(4))
    lower = add_findings(made, Findings(mouth=True), np.random.default_rng(5))
    depth = mouth.DEPTH_MM
    assert lower.maps.shape[2] == made.maps.shape[2] + depth
    at = torch.from_numpy(np.random.default_rng(6).uniform(-60, 60, (7, 8, 9, 3))).float()
    np.testing.assert_allclose(sample(lower.maps, at), sample(made.maps, at), atol=0.2)
    assert (lower.maps[0, 1, :depth] == made.maps[0, 1, 0]).all()  # no more brain than there was

    hu = lower.maps[0, 0, :depth].numpy()
    tongue = hu[5:40, 55:68, 88:93]  # 23 to 36 mm in front of the atlas's middle
    assert 30 < np.median(tongue) < 85
    jaw = hu[5:30] > 400
    in_front = jaw[:, :50].any(axis=1)[:, 80:100]
    assert in_front.mean() > 0.8  # bone before the tongue, all along it
    assert (hu[:, 0] == -1000).all()  # and air before the chin
    assert (hu > 1800).any()  # teeth


def test_a_scan_with_a_mouth_goes_on_below_with_the_same_slices_above():
    parameters, scan, case = scanned(5, ("intraparenchymal", 9.0), Findings(mouth=True), shrink=8)
    more = len(case.voxels) - scan.shape[0]
    reach_mm = scan.top_mm - (len(case.voxels) - 1) * scan.spacing_mm[0]
    assert more >= 0
    assert lowest_mm(parameters) - 60 < reach_mm < lowest_mm(parameters) - 4
    assert case.mask.any()
    assert not case.mask[:more].any()


def test_a_clip_is_metal_at_the_base():
    hu = np.full(load_atlas().tissue.shape, 30, np.float32)
    inside.add_clip(hu, np.random.default_rng(7))
    metal = np.argwhere(hu > 2000) + ATLAS_ORIGIN_MM
    assert 5 < len(metal) < 800
    assert np.abs(metal.mean(0) - (-15, -6, 0)).max() < 35


def test_fresh_blood_lies_within_the_old_collection_and_is_what_was_wanted(head):
    _, _, anatomy = head
    old, fresh = subdurals.acute_on_chronic(anatomy, 10.0, np.random.default_rng(2))
    assert (old.labelled, fresh.labelled) == (False, True)
    assert not ((fresh.field > 0) & ~(old.field > 0)).any()
    assert fresh.volume_ml == 10.0
    assert old.volume_ml > 1.6 * 10
    voxel_ml = np.prod(anatomy.spacing_mm) / 1000
    assert (fresh.field > 0).sum() * voxel_ml == pytest.approx(10.0, rel=0.3)
    within = old.field > 0
    assert old.hu[within].mean() < 35 < 45 < fresh.hu[within].mean()


def test_a_tentorial_layer_lies_on_one_half_of_the_tentorium(head):
    made, scan, anatomy = head
    at = _coarse_position(made, scan)
    bleed = subdurals.tentorial(anatomy, at, 6.0, np.random.default_rng(3))
    z, y, x = at[bleed.field > 0].T
    assert len(z) > 50
    assert len(set(np.sign(x))) == 1
    assert np.abs(z - tentorium_mm(y, x)).max() < 16
    assert np.median(np.abs(z - tentorium_mm(y, x))) < 8


def test_only_the_fresh_blood_is_labelled():
    _, _, case = scanned(12, ("subdural", 15.0), Findings(acute_on_chronic=True), shrink=4)
    labelled_ml = case.mask.sum() * np.prod(case.spacing_mm) / 1000
    assert labelled_ml == pytest.approx(15.0, rel=0.3)  # voxels of 2 mm
    assert case.voxels[case.mask > 0].mean() > 45


def test_findings_come_with_the_bleeds_they_belong_to():
    rng = np.random.default_rng(1)
    alone = [draw_findings((), rng) for _ in range(300)]
    assert not any(each.acute_on_chronic or each.tentorial for each in alone)
    assert 0.1 < np.mean([each.scalp_haematoma for each in alone]) < 0.3
    after = [draw_findings((("subdural", 10.0),), rng) for _ in range(300)]
    assert 0.3 < np.mean([each.acute_on_chronic for each in after]) < 0.5
    assert not any(each.acute_on_chronic and each.tentorial for each in after)
    wet = [draw_findings((("intraventricular", 10.0),), rng) for _ in range(300)]
    assert 0.5 < np.mean([each.hydrocephalus for each in wet]) < 0.7


def test_hydrocephalus_widens_ventricles_and_narrows_sulci():
    rng = np.random.default_rng(1)
    person = draw_head(rng)
    ill = with_hydrocephalus(person, Findings(hydrocephalus=True), rng)
    assert ill.ventricle_growth_mm > person.ventricle_growth_mm + 2
    assert ill.fluid_exponent > person.fluid_exponent
    assert with_hydrocephalus(person, NOTHING, rng) is person


def test_the_table_lists_findings_only_where_they_were_asked_for(tmp_path):
    tables = []
    for findings in (False, True):
        config = SynthesisConfig(1, 5, negatives=0.0, balanced=True, shrink=8, findings=findings)
        write_dataset(config, tmp_path / str(findings))
        with (tmp_path / str(findings) / "cases.csv").open() as stream:
            tables.append(next(csv.DictReader(stream)))
    without, asked_for = tables
    assert asked_for.keys() - without.keys() == {"findings"}
    for column in ("case", "kinds", "lesions", "spacing_mm", "seed"):
        assert without[column] == asked_for[column]


def test_no_findings_into_real_scans(tmp_path):
    parser = argparse.ArgumentParser()
    synthesize.add_arguments(parser)
    volume.write(Volume(np.zeros((4, 8, 8), np.int16), (5.0, 1.0, 1.0)), tmp_path / "a.nii.gz")
    args = [
        "--out",
        str(tmp_path / "out"),
        "--findings",
        "--background",
        str(tmp_path / "a.nii.gz"),
    ]
    with pytest.raises(DatasetError, match="not with --background"):
        synthesize.main(parser.parse_args(args))
    assert not (tmp_path / "out").exists()
