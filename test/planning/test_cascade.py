"""When a low resolution comes first, worked by hand; nnunetv2's search also stands in
test_nnunetv2_plans.py."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.planning import HEAD, dataset_of, decide_alike, fingerprint_of, plan_heads

from ichseg.errors import PlansError
from ichseg.wording import times
from training.planning.cascade import CAPACITY
from training.planning.overrides import Overrides
from training.planning.patch import fit_patch
from training.planning.planner import decide

TASKS = json.loads((Path(__file__).parents[1] / "helpers" / "nnunetv2_plans.json").read_text())[
    "tasks"
]


def names(plans):
    return {configuration.name for configuration in plans.configurations}


@pytest.mark.parametrize("slices", [28, 29, 30])
def test_msd2018_has_no_cascade_up_to_30_slices(slices):
    # 30 x 512 x 512 = 7 864 320 voxels are 4 x 1 966 080 to the voxel: not more
    plans = plan_heads(slices)
    assert names(plans) == {"2d", "3d_fullres"}
    assert plans.configuration("3d_fullres").batch_dice is False


def test_msd2018_has_one_at_31_slices():
    assert "3d_lowres" in names(plan_heads(31))


def test_msd2018_doubles_the_fine_axes():
    # 32 x 512 x 512 is 4.27 times the capacity. In-plane 0.84 mm is finer than 5 mm: both axes are
    # doubled, and 32 x 256 x 256 is 1.07 times.
    plans = plan_heads(32, 0.42)
    assert names(plans) == {"2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"}
    low = plans.configuration("3d_lowres")
    assert low.spacing_mm == (5.0, 0.84, 0.84)
    assert low.median_shape == (32, 256, 256)
    assert (low.batch_dice, low.previous_stage) == (False, None)
    full = plans.configuration("3d_fullres")
    assert (full.patch, full.batch_dice, full.previous_stage) == ((20, 320, 256), True, None)
    second = plans.configuration("3d_cascade_fullres")
    assert (second.batch_dice, second.previous_stage) == (True, "3d_lowres")
    assert (second.patch, second.spacing_mm) == (full.patch, full.spacing_mm)
    assert second.architecture == full.architecture


@pytest.mark.parametrize(
    ("spacing", "shape", "low_spacing", "low_shape"),
    [
        # 104 857 600 voxels are 53.3 times the capacity, an eighth of them 6.7, a 64th 0.8
        ((0.8, 0.8, 0.8), (400, 512, 512), (3.2, 3.2, 3.2), (100, 128, 128)),
        # 13.3 times. 1.6 mm are finer than 3 mm: in-plane first, and 6 553 600 voxels are 3.3 times
        ((3.0, 0.8, 0.8), (100, 512, 512), (3.0, 1.6, 1.6), (100, 256, 256)),
        # 21.3 times, 5.3 in-plane; 2.8 mm would be coarser than 2.5 mm, so then all axes: 0.7
        ((2.5, 0.7, 0.7), (160, 512, 512), (5.0, 2.8, 2.8), (80, 128, 128)),
        # 26.7 times, 6.7 in-plane; 1 mm doubled matches 2 mm exactly and goes alone again: 1.7
        ((2.0, 0.5, 0.5), (200, 512, 512), (2.0, 2.0, 2.0), (200, 128, 128)),
        # the same, as 32-bit headers have it: 2.0000000001 is no coarser than 1.9999999
        ((1.9999999, 0.5, 0.5), (200, 512, 512), (1.9999999, 2.0, 2.0), (200, 128, 128)),
        # only one axis is fine
        ((2.0, 2.0, 0.5), (200, 250, 512), (2.0, 2.0, 2.0), (200, 250, 128)),
    ],
)
def test_msd2018_by_hand(spacing, shape, low_spacing, low_shape):
    plans, reasons = decide_alike(spacing, shape)
    low = plans.configuration("3d_lowres")
    assert low.spacing_mm == pytest.approx(low_spacing)
    assert low.median_shape == low_shape
    voxels = [resolution.voxels for resolution in reasons.cascade.considered]
    assert [v > 4 * 64 * 192 * 160 for v in voxels] == [True] * (len(voxels) - 1) + [False]
    assert voxels[-1] == math.prod(low_shape)


def test_the_capacity_of_msd2018_is_fixed():
    # a GPU of 48 GB holds a patch that covers more than a quarter, and the paper asks for it anyway
    plans, reasons = decide_alike((5.0, 0.42, 0.42), (32, 512, 512), gpu_memory_gb=48.0)
    assert 4 * math.prod(reasons.full.patch) > 32 * 512 * 512
    assert "3d_lowres" in names(plans)


def test_nnunetv2_drops_what_saves_less_than_half():
    # 4.48 patches at 28 slices: steps of 3 % in-plane end after (1 / 1.03)^2 or so
    plans, reasons = decide_alike((5.0, 0.45, 0.45), (28, 512, 512), recipe="nnunetv2")
    assert names(plans) == {"2d", "3d_fullres"}
    assert plans.configuration("3d_fullres").batch_dice is False
    assert len(reasons.cascade.considered) > 1
    assert reasons.cascade.considered[1].spacing_mm == pytest.approx((5.0, 0.4635, 0.4635))
    assert reasons.cascade.lowres is None


def test_nnunetv2_compares_with_the_planned_patch():
    plans, reasons = decide_alike((0.8, 0.8, 0.8), (400, 512, 512), recipe="nnunetv2")
    steps = reasons.cascade.considered
    assert [step.too_large for step in steps] == [True] * (len(steps) - 1) + [False]
    for before, after in itertools.pairwise(steps):
        assert after.spacing_mm == pytest.approx([1.03 * s for s in before.spacing_mm])
    low = plans.configuration("3d_lowres")
    assert steps[-1].capacity == math.prod(low.patch)
    assert low.spacing_mm == steps[-1].spacing_mm


def test_a_chosen_patch_counts_for_nnunetv2_and_is_the_lowres_patch():
    plans, _ = decide_alike(
        (1.0, 1.0, 1.0), (128, 128, 128), recipe="nnunetv2", patch=(64, 64, 64), batch=3
    )
    low = plans.configuration("3d_lowres")
    # 8 patches; 1.03^n is 1.26 or more (half the voxels) at n = 8
    assert low.spacing_mm == pytest.approx((1.03**8,) * 3)
    assert (low.patch, low.batch) == ((64, 64, 64), 3)
    assert plans.configuration("3d_cascade_fullres").batch == 3


def test_batch_dice_can_be_chosen():
    for choice in (True, False):
        plans = plan_heads(32, 0.42, batch_dice=choice)
        volumes = [c for c in plans.configurations if c.name != "2d"]
        assert [c.batch_dice for c in volumes] == [choice] * 3
        assert plans.configuration("2d").batch_dice is True
        assert plans.overrides[0].automatic == "yes"
        assert plans.overrides[0].chosen == ("yes" if choice else "no")


def test_deep_supervision_can_be_chosen():
    for choice in (True, False):
        plans = plan_heads(32, 0.42, deep_supervision=choice)
        volumes = [c for c in plans.configurations if c.name != "2d"]
        assert [c.architecture.deep_supervision for c in volumes] == [choice] * 3
        assert plans.configuration("2d").architecture.deep_supervision is False


def test_choices_that_do_not_fit_the_low_resolution_are_refused():
    # 48 voxels are halved three times; at 5 x 0.5 x 0.5 mm the slices get a fourth level to
    # themselves, at 5 x 2.5 x 2.5 mm they are halved along with the others
    with pytest.raises(PlansError, match=r"^3d_lowres: features .* name 5 levels, but .* to 4"):
        decide_alike(
            (5.0, 0.5, 0.5),
            (64, 512, 512),
            recipe="nnunetv2",
            patch=(16, 48, 48),
            features=(8, 16, 32, 64, 128),
        )


PAGE = Path(__file__).parents[2] / "docs" / "decisions" / "0015-cascade-threshold.md"
ROWS = [
    [cell.strip() for cell in line.strip("| \n").split("|")]
    for line in PAGE.read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| task")
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_page_on_the_threshold_is_right(row):
    """Both readings of the paper's sentence, for the tasks of nnunetv2_plans.json."""
    task = TASKS[row[0]]
    spacings, shapes = (
        values * (task["cases"] // len(values)) for values in (task["spacings_mm"], task["shapes"])
    )
    _, reasons = decide(
        fingerprint_of(spacings, shapes, intensities=(HEAD,) * len(task["channels"])),
        dataset_of(task["cases"], task["channels"], task["labels"]),
        recipe="msd2018",
        overrides=Overrides(),
    )
    full, cascade = reasons.full, reasons.cascade
    fixed = "none" if cascade.lowres is None else times(map(round, cascade.lowres.grid.shape))
    assert row[1:6] == [
        times(map(round, full.grid.shape)),
        times(full.patch),
        f"{full.grid.case_voxels / CAPACITY:.2f}",
        fixed,
        f"{full.grid.case_voxels / math.prod(full.patch):.2f}",
    ]
    assert row[6] == literal_low_resolution(full.grid)


def literal_low_resolution(grid):
    """Voxels doubled, the fine axes first, until the patch planned there is a quarter or more."""
    spacing = grid.spacing_mm
    found = grid
    while found.case_voxels > 4 * math.prod(fit_patch(found, Overrides()).patch):
        fine = [2 * s <= max(spacing) for s in spacing]
        spacing = tuple(
            2 * s if f or not any(fine) else s for s, f in zip(spacing, fine, strict=True)
        )
        shape = tuple(
            float(round(old / new * size))
            for old, new, size in zip(grid.spacing_mm, spacing, grid.shape, strict=True)
        )
        found = replace(grid, spacing_mm=spacing, shape=shape, case_voxels=math.prod(shape))
    return "none" if found is grid else times(map(round, found.shape))
