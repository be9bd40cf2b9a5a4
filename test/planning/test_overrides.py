"""What the user chooses in place of the planner: its effect, its record and its refusals."""

import dataclasses
import math

import pytest
from helpers.planning import (
    HEAD,
    dataset_of,
    decide_alike,
    fingerprint_of,
    plan,
    plan_heads,
)

from ichseg.errors import PlansError
from ichseg.model.plans import Override
from training.planning.explain import explain
from training.planning.overrides import Overrides
from training.planning.planner import decide

ONE, FLAT, FULL = (1, 1, 1), (1, 2, 2), (2, 2, 2)


def test_coarse_compact_network():
    """The default weights' configuration: 5 x 0.9 x 0.9 mm, patch 16 x 96 x 96, five levels."""
    plans = plan_heads(
        spacing_mm=(5.0, 0.9, 0.9), patch=(16, 96, 96), batch=2, features=(8, 16, 32, 64, 128)
    )
    chosen = plans.configuration("3d_fullres")
    assert chosen.spacing_mm == (5.0, 0.9, 0.9)
    assert chosen.median_shape == (29, 256, 256)
    assert (chosen.patch, chosen.batch) == ((16, 96, 96), 2)
    assert chosen.architecture.features == (8, 16, 32, 64, 128)
    # 16 slices pool twice, 96 voxels four times, the slices last
    assert chosen.architecture.strides == (ONE, FLAT, FLAT, FULL, FULL)
    # 0.9 and 1.8 mm are finer than half of 5 mm, 3.6 mm is not
    assert chosen.architecture.kernels == ((1, 3, 3),) * 2 + ((3, 3, 3),) * 3
    assert plans.configuration("2d").spacing_mm == (5.0, 0.9, 0.9)


def test_fewer_features_stop_the_pooling():
    plans = plan_heads(patch=(16, 96, 96), features=(8, 16, 32))
    assert plans.configuration("3d_fullres").architecture.strides == (ONE, FULL, FULL)
    plans = plan_heads(features=(8, 16, 32))
    full = plans.configuration("3d_fullres")
    assert full.architecture.total_stride == (4, 4, 4)
    assert math.prod(full.patch) > 16 * 320 * 320  # a smaller network leaves room


def test_clip_limits_can_be_chosen():
    fingerprint = fingerprint_of([(5.0, 1.0, 1.0)] * 5, [(32, 64, 64)] * 5, 1.0, (HEAD, HEAD))
    dataset = dataset_of(5, ("CT", "MR"))
    chosen = Overrides(ct_clip=(-5.0, 120.0))
    plans = plan(fingerprint, dataset, recipe="msd2018", overrides=chosen)
    ct, mr = plans.normalisations
    assert (ct.clip_low, ct.clip_high) == (-5.0, 120.0)
    assert (ct.mean, ct.deviation) == (55.0, 12.0)  # still the foreground's
    assert mr.scheme == "zscore"
    assert plans.overrides == (Override("ct-clip", "15,90", "-5,120"),)


def test_memory_scales_the_budgets():
    # by hand, the limit is 560e6 elements at 8 GB: 40 GB hold the largest patch of a head
    plans, reasons = decide_alike(
        (5.0, 0.45, 0.45), (28, 512, 512), recipe="nnunetv2", gpu_memory_gb=40.0
    )
    assert reasons.full.limit == 5 * 560e6
    assert plans.configuration("3d_fullres").patch == (28, 512, 512)
    # a slice costs 82 624 512 elements: 12 * 85e6 of them hold 12.3 slices, five times as many 61.7
    assert plans.configuration("2d").batch == 62
    assert plans.overrides == (Override("gpu-memory-gb", "8", "40"),)
    assert plan_heads(gpu_memory_gb=12.0).configurations == plan_heads().configurations


def test_overrides_are_recorded_beside_what_the_planner_finds():
    chosen = {
        "spacing_mm": (0.9, 5.0, 0.9),
        "patch": (96, 16, 80),
        "batch": 4,
        "features": (8, 16, 32, 64, 128),
    }
    plans, _ = decide_alike((0.45, 5.0, 0.5), (512, 29, 480), **chosen)
    assert plans.overrides == (
        # in the order of axes of the command line, whatever the transpose
        Override("spacing", "0.45,5,0.5", "0.9,5,0.9"),
        Override("patch", "320,16,320", "96,16,80"),
        Override("batch", "2", "4"),
        Override("features", "30,60,120,240,320,320,320", "8,16,32,64,128"),
    )
    assert plan_heads().overrides == ()


def test_what_was_chosen_may_be_all_that_fits():
    plans, _ = decide_alike((1.0, 1.0, 1.0), (4, 6, 6), patch=(8, 8, 8))
    assert plans.overrides == (Override("patch", "", "8,8,8"),)


@pytest.mark.parametrize(
    ("chosen", "warning"),
    [
        ({"patch": (32, 512, 512)}, "batch 2 of patch 32x512x512 needs 4.7 times the 12 GB"),
        ({"batch": 10}, "batch 10 of patch 16x320x320 needs 4.6 times the 12 GB"),
        ({"patch": (16, 96, 96)}, None),
        ({}, None),
    ],
)
def test_choices_beyond_the_memory_are_warned_of(chosen, warning, caplog):
    plan_heads(**chosen)
    assert (warning or "") in caplog.text
    assert (warning is None) == ("needs" not in caplog.text)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"patch": (16, 100, 96)},
            "patch 16x100x96 is not a multiple of 4x16x16, .* 16x96x96 or 16x112x96 would fit",
        ),
        ({"patch": (4, 7, 7)}, "patch 4x7x7 is too small to pool"),
        ({"patch": (0, 96, 96)}, "expected three positive sizes"),
        (
            {"patch": (16, 96, 96), "features": (8, 16, 32, 64, 128, 256)},
            "name 6 levels, but a patch of 16x96x96 pools to 5: give 5 numbers",
        ),
        ({"features": (8,)}, "expected two or more positive numbers"),
        ({"features": (8, 0)}, "expected two or more positive numbers"),
        ({"batch": 0}, "batch 0, expected at least 1"),
        ({"spacing_mm": (5.0, 0.0, 0.9)}, "expected three positive numbers"),
        ({"spacing_mm": (5.0, math.nan, 0.9)}, "expected three positive numbers"),
        ({"gpu_memory_gb": 0.0}, "GPU memory 0.0 GB, expected a positive number"),
        ({"gpu_memory_gb": math.inf}, "GPU memory inf GB, expected a positive number"),
        ({"ct_clip": (90.0, 20.0)}, "expected a lower and a higher number"),
        ({"ct_clip": (20.0, math.nan)}, "expected a lower and a higher number"),
        ({"crop": "body"}, "crop 'body', expected one of"),
        ({"padding": "mirror"}, "padding 'mirror', expected one of"),
        ({"crop": "head"}, "the fingerprint does not say where heads are"),
        ({"ct_clip": (60.0, 90.0)}, "CT clip 60 to 90 HU leaves out .* CT, whose mean is 55.0 HU"),
        ({"recipe": "v3"}, "recipe 'v3', expected one of msd2018, nnunetv2"),
        ({"architecture": "resenc_m"}, "architecture resenc_m with recipe msd2018, expected plain"),
    ],
)
def test_refusals(overrides, message):
    with pytest.raises(PlansError, match=message):
        plan_heads(**overrides)


def test_padding_is_a_field_of_the_plan():
    plans = plan_heads(padding="nearest")
    assert (plans.padding, plan_heads().padding) == ("nearest", "zero")
    assert plans.overrides == (Override("padding", "zero", "nearest"),)


def heads(beyond=(0,) * 100):
    """100 cases of 29 x 512 x 512 whose heads are 29 x 400 x 320."""
    whole = fingerprint_of([(5.0, 0.45, 0.45)] * 100, [(29, 512, 512)] * 100)
    return dataclasses.replace(whole, head_shapes=((29, 400, 320),) * 100, beyond_head=beyond)


def test_a_cut_to_the_head_plans_for_its_size():
    chosen = Overrides(crop="head")
    plans, reasons = decide(heads(), dataset_of(100), recipe="msd2018", overrides=chosen)
    same = decide_alike((5.0, 0.45, 0.45), (29, 400, 320))[0]
    assert plans.configurations == same.configurations
    assert plans.configuration("3d_fullres").median_shape == (29, 400, 320)
    assert (plans.crop, same.crop) == ("head", "nonzero")
    assert plans.overrides == (Override("crop", "nonzero", "head"),)
    text = " ".join(explain(plans, reasons).split())
    # 400 x 320 of 512 x 512
    assert "cut to the head, which leaves 49 to 49 % of their voxels (median 49 %)" in text


def test_the_head_is_left_alone_where_it_is_not_asked_for():
    plans = plan(heads((5,) * 100), dataset_of(100), recipe="msd2018", overrides=Overrides())
    assert plans == plan_heads()


def test_a_cut_that_loses_foreground_is_refused():
    lost = heads((0,) * 97 + (12, 0, 3))
    message = r"2 of 100 cases have foreground outside .*: c097 \(12 voxels\), c099 \(3 voxels\)$"
    with pytest.raises(PlansError, match=message):
        plan(lost, dataset_of(100), recipe="msd2018", overrides=Overrides(crop="head"))


def test_a_cut_to_the_head_without_ct_is_refused():
    fingerprint = fingerprint_of([(1.0, 1.0, 1.0)] * 5, [(32, 32, 32)] * 5, 1.0, (HEAD, HEAD))
    with pytest.raises(PlansError, match="not every channel is CT: CT, MR"):
        plan(
            fingerprint,
            dataset_of(5, ("CT", "MR")),
            recipe="msd2018",
            overrides=Overrides(crop="head"),
        )


def test_a_clip_without_ct_is_refused():
    fingerprint = fingerprint_of([(1.0, 1.0, 1.0)] * 5, [(32, 32, 32)] * 5)
    chosen = Overrides(ct_clip=(0.0, 80.0))
    with pytest.raises(PlansError, match="no channel is CT: MR"):
        plan(fingerprint, dataset_of(5, ("MR",)), recipe="msd2018", overrides=chosen)


def test_the_patches_a_refusal_names_do_fit():
    for patch in ((16, 96, 96), (16, 112, 96)):
        assert plan_heads(patch=patch).configuration("3d_fullres").patch == patch
