"""The planner against the plans of the real ones, against worked examples, and its refusals."""

import argparse
from dataclasses import replace

import numpy as np
import pytest
from helpers.datasets import contents
from helpers.planning import (
    HEAD,
    dataset_of,
    decide_alike,
    fingerprint_of,
    plan,
    plan_heads,
)

from ichseg.errors import DatasetError, PlansError
from ichseg.model import plans as plans_module
from ichseg.model import strict_json
from training.data.dataset import save_dataset
from training.data.workspace import LATEST_CHECKPOINT, run_folder
from training.planning import planner
from training.planning import topology as rules
from training.planning.overrides import Overrides
from training.planning.patch import Grid, first_patch
from training.planning.recipes import RECIPES, find_recipe
from training.planning.spacing import target_spacing

ONE, FLAT, FULL = (1, 1, 1), (1, 2, 2), (2, 2, 2)
KERNELS = ((1, 3, 3),) * 3 + ((3, 3, 3),) * 4
STRIDES = {
    "msd2018": (ONE, FLAT, FLAT, FLAT, FLAT, FULL, FULL),
    "nnunetv2": (ONE, FLAT, FLAT, FLAT, FULL, FULL, FLAT),
}
FEATURES = {
    "msd2018": ((30, 60, 120, 240, 320, 320, 320), (30, 60, 120, 240, 480, 480, 480, 480)),
    "nnunetv2": ((32, 64, 128, 256, 320, 320, 320), (32, 64, 128, 256, 512, 512, 512, 512)),
}


@pytest.mark.parametrize("recipe", ["msd2018", "nnunetv2"])
@pytest.mark.parametrize(
    ("slices", "in_plane", "patch"),
    [
        (28, 0.45, (16, 320, 320)),
        (29, 0.45, (16, 320, 320)),
        (30, 0.45, (16, 320, 320)),
        (32, 0.42, (20, 320, 256)),
    ],
)
def test_instance_like_data(recipe, slices, in_plane, patch):
    plans = plan_heads(slices, in_plane, recipe=recipe)
    full = plans.configuration("3d_fullres")
    assert full.patch == patch
    assert full.batch == 2
    assert full.spacing_mm == (5.0, in_plane, in_plane)
    assert full.median_shape == (slices, 512, 512)
    assert full.dummy_2d is True
    assert full.previous_stage is None
    assert full.architecture.kernels == KERNELS
    assert full.architecture.strides == STRIDES[recipe]
    assert full.architecture.features == FEATURES[recipe][0]
    assert full.architecture.encoder_convs == (2,) * 7
    assert full.architecture.decoder_convs == (2,) * 6
    flat = plans.configuration("2d")
    assert (flat.patch, flat.batch, flat.batch_dice, flat.dummy_2d) == ((512, 512), 12, True, False)
    assert flat.architecture.strides == ((1, 1),) + ((2, 2),) * 7
    assert flat.architecture.kernels == ((3, 3),) * 8
    assert flat.architecture.features == FEATURES[recipe][1]
    assert plans.transpose == (0, 1, 2)
    assert plans.orientation == "LPS"


def test_recipes_differ_as_published():
    paper, v2 = plan_heads(recipe="msd2018"), plan_heads(recipe="nnunetv2")
    network = paper.configuration("3d_fullres").architecture
    assert not any((network.upsampling_bias, network.head_bias, network.deep_supervision))
    assert paper.normalise_first is False
    assert (paper.resampling.image_order, paper.resampling.label_order) == (3, 0)
    assert paper.resampling.score_order == 1
    network = v2.configuration("3d_fullres").architecture
    assert network.upsampling_bias
    assert network.head_bias
    assert network.deep_supervision
    assert v2.normalise_first is True
    assert v2.resampling.label_order == 1


def test_hippocampus_like_data():
    # 203 cases, one of nnU-Net's standard tasks: patch 40 x 56 x 40, and 5 % of the dataset is
    # 0.05 * 36 * 50 * 35 * 203 / (40 * 56 * 40) = 7.1 patches
    fingerprint = fingerprint_of([(1.0, 1.0, 1.0)] * 203, [(36, 50, 35)] * 203)
    for recipe in RECIPES:
        plans = plan(fingerprint, dataset_of(203, ("MRI",)), recipe=recipe, overrides=Overrides())
        full = plans.configuration("3d_fullres")
        assert (full.patch, full.batch, full.dummy_2d) == ((40, 56, 40), 7, False)
        assert full.architecture.strides == (ONE, FULL, FULL, FULL)
        assert full.architecture.kernels == ((3, 3, 3),) * 4
        assert plans.configuration("2d").patch == (56, 40)


def test_half_voxels_of_a_median_count_in_nnunetv2_only():
    # two cases of 32 and 33 slices: 32.5 pads to 40 there, round(32.5) = 32 needs no padding here
    fingerprint = fingerprint_of([(1.0, 1.0, 1.0)] * 2, [(32, 48, 48), (33, 48, 48)])
    patches = {
        recipe: plan(fingerprint, dataset_of(2), recipe=recipe, overrides=Overrides())
        .configuration("3d_fullres")
        .patch
        for recipe in RECIPES
    }
    assert patches == {"msd2018": (32, 48, 48), "nnunetv2": (40, 48, 48)}


def test_shapes_are_rounded_before_the_median_in_nnunetv2_only():
    # 32 slices of 1.01 mm are 32.32 of 1 mm: 32 once rounded
    fingerprint = fingerprint_of([(1.01, 1.0, 1.0)] * 2, [(32, 48, 48)] * 2)
    chosen = Overrides(spacing_mm=(1.0, 1.0, 1.0))
    plans = plan(fingerprint, dataset_of(2), recipe="nnunetv2", overrides=chosen)
    assert plans.configuration("3d_fullres").patch == (32, 48, 48)


def test_voxels_a_tenth_of_what_was_meant_are_refused():
    """Centimetres for millimetres: a thousand times the voxels; four times finer is a choice."""
    fingerprint = fingerprint_of([(5.0, 0.4, 0.4)] * 3, [(30, 256, 256)] * 3)
    finer = Overrides(spacing_mm=(1.25, 0.1, 0.1))
    plans = plan(fingerprint, dataset_of(3), recipe="msd2018", overrides=finer)
    assert plans.configuration("3d_fullres").median_shape == (120, 1024, 1024)
    wrong = Overrides(spacing_mm=(0.5, 0.04, 0.04))
    with pytest.raises(
        PlansError,
        match=r"spacing 0\.5x0\.04x0\.04 mm makes the median case 300x2560x2560 voxels, 1000 times "
        "those of its file; expected the sizes of voxels in mm",
    ):
        plan(fingerprint, dataset_of(3), recipe="msd2018", overrides=wrong)


@pytest.mark.parametrize("recipe", ["msd2018", "nnunetv2"])
def test_shrinking_by_hand(recipe):
    # 10x512x512 pools 1, 7, 7 times. All axes cover the whole case, and the last gives way: a step
    # of 128 would leave 384, which pools 6 times, so the step is 64: 448. Then the same in y. Then
    # z covers most: 8. Only that fits the memory.
    plans, reasons = decide_alike((5.0, 0.45, 0.45), (10, 512, 512), cases=50, recipe=recipe)
    full = plans.configuration("3d_fullres")
    assert full.patch == (8, 448, 448)
    constants = find_recipe(recipe, "plain")
    fit = [
        rules.MEMORIES[constants.memory](patch, full.architecture, 1, 2)
        <= constants.limits_3d.budget
        for patch in ((10, 448, 448), (8, 448, 448))
    ]
    assert fit == [False, True]
    assert [attempt.patch for attempt in reasons.full.attempts] == [
        (10, 512, 512),
        (10, 512, 448),
        (10, 448, 448),
        (8, 448, 448),
    ]
    assert [attempt.shortened for attempt in reasons.full.attempts] == [None, 2, 1, 0]


@pytest.mark.parametrize(
    ("spacing", "recipe", "expected"),
    [
        ((1.0, 1.0, 1.0), "nnunetv2", (256, 256, 256)),
        ((2.0, 1.0, 1.0), "nnunetv2", (161, 323, 323)),  # 256^3 voxels, half as many along z
        ((2.0, 1.0), "nnunetv2", (1448, 2896)),  # 2048^2 pixels
        ((5.0, 0.5, 1.0), "msd2018", (512, 5120, 2560)),
        ((0.5, 0.5), "msd2018", (300, 200)),  # the slice, whatever its size
    ],
)
def test_first_patch(spacing, recipe, expected):
    grid = Grid(
        recipe=find_recipe(recipe, "plain"),
        spacing_mm=spacing,
        shape=(300.0, 200.0, 100.0)[: len(spacing)],
        case_voxels=6e6,
        cases=1,
        channels=1,
        classes=2,
    )
    assert first_patch(grid) == expected


def test_plans_survive_json(tmp_path):
    plans = plan_heads()
    (tmp_path / "plans.json").write_text(strict_json.dumps(plans))
    assert plans_module.load(tmp_path / "plans.json") == plans


def test_the_coarsest_axis_comes_first():
    fingerprint = fingerprint_of([(0.45, 5.0, 0.5)] * 100, [(512, 29, 480)] * 100)
    plans = plan(
        fingerprint,
        dataset_of(100),
        recipe="msd2018",
        overrides=Overrides(patch=(64, 16, 128)),
    )
    assert plans.transpose == (1, 0, 2)
    full = plans.configuration("3d_fullres")
    assert full.spacing_mm == (5.0, 0.45, 0.5)
    assert full.median_shape == (29, 512, 480)
    assert full.patch == (16, 64, 128)


def test_target_spacing_is_the_median():
    spacings = np.array([(4.0, 0.4, 0.5), (5.0, 0.6, 0.5), (6.0, 0.5, 0.7)])
    shapes = np.array([(30, 512, 512)] * 3)
    found = target_spacing(spacings, shapes, find_recipe("msd2018", "plain"))
    assert found.spacing_mm == (5.0, 0.5, 0.5)


@pytest.mark.parametrize(
    ("slices", "others", "expected"),
    [
        ((4.0, 5.0, 6.0), 30, 4.2),  # 10th percentile: 4 + 0.2 * (5 - 4)
        ((0.1, 5.0, 6.0), 30, 0.5 + 0.58),  # 0.1 + 0.2 * 4.9
        ((0.0001, 2.0, 6.0), 30, 0.50001),  # 0.4, but no finer than the other axes
        ((4.0, 5.0, 6.0), 200, 5.0),  # not few slices
        ((1.4, 1.5, 1.6), 30, 1.5),  # not thick slices: 1.5 is not more than 3 x 0.5
    ],
)
def test_thick_slices_are_kept_fine_in_nnunetv2(slices, others, expected):
    spacings = np.array([(s, 0.5, 0.5) for s in slices])
    shapes = np.array([(others, 512, 512)] * 3)
    found = target_spacing(spacings, shapes, find_recipe("nnunetv2", "plain"))
    assert found.spacing_mm == pytest.approx((expected, 0.5, 0.5))
    found = target_spacing(spacings, shapes, find_recipe("msd2018", "plain"))
    assert found.spacing_mm == (slices[1], 0.5, 0.5)


@pytest.mark.parametrize("recipe", ["msd2018", "nnunetv2"])
@pytest.mark.parametrize("shape", [(200, 300, 250), (24, 640, 640), (9, 512, 512), (1, 256, 256)])
def test_patches_fit_the_memory_and_the_network(recipe, shape):
    fingerprint = fingerprint_of([(4.0, 1.0, 1.2)] * 10, [shape] * 10)
    plans = plan(fingerprint, dataset_of(10), recipe=recipe, overrides=Overrides())
    full = plans.configuration("3d_fullres")
    a, constants = full.architecture, find_recipe(recipe, "plain")
    used = rules.MEMORIES[constants.memory](full.patch, a, 1, 2)
    assert used <= constants.limits_3d.budget
    for size, stride, whole in zip(full.patch, a.total_stride, full.median_shape, strict=True):
        assert size % stride == 0
        assert size // stride >= 4 or stride == 1
        assert size < whole + stride


def test_batch_never_covers_more_than_its_share_but_two_patches():
    fingerprint = fingerprint_of([(1.0, 1.0, 1.0)] * 4, [(32, 32, 32)] * 4)
    plans = plan(fingerprint, dataset_of(4), recipe="msd2018", overrides=Overrides())
    assert plans.configuration("3d_fullres").batch == 2  # 5 % of 4 cases is less than one
    assert plans.configuration("2d").batch == round(0.05 * 4 * 32)


def test_normalisation_of_ct():
    (scheme,) = plan_heads().normalisations
    assert (scheme.scheme, scheme.clip_low, scheme.clip_high) == ("ct", 15.0, 90.0)
    assert (scheme.mean, scheme.deviation, scheme.masked) == (55.0, 12.0, False)


@pytest.mark.parametrize(("relative_size", "masked"), [(0.74, True), (0.75, False)])
def test_normalisation_of_other_modalities(relative_size, masked):
    fingerprint = fingerprint_of(
        [(1.0, 1.0, 1.0)] * 5, [(32, 32, 32)] * 5, relative_size, (HEAD, HEAD, HEAD)
    )
    dataset = dataset_of(5, ("ct", "T1", "noNorm"))
    plans = plan(fingerprint, dataset, recipe="msd2018", overrides=Overrides())
    assert [n.scheme for n in plans.normalisations] == ["ct", "zscore", "none"]
    assert [n.masked for n in plans.normalisations] == [False, masked, False]


def test_a_normalisation_of_nnunet_that_there_is_not_is_refused():
    """It would be taken for a modality's name, and z-scored without a word."""
    fingerprint = fingerprint_of([(1.0, 1.0, 1.0)] * 5, [(32, 32, 32)] * 5)
    with pytest.raises(DatasetError, match="channel rescale_to_0_1: no such normalisation"):
        plan(
            fingerprint,
            dataset_of(5, ("rescale_to_0_1",)),
            recipe="msd2018",
            overrides=Overrides(),
        )


def test_a_flat_ct_foreground_is_refused():
    flat = replace(HEAD, deviation=0.0, percentile_00_5=1.0, percentile_99_5=1.0, median=1.0)
    fingerprint = fingerprint_of([(1.0, 1.0, 1.0)] * 5, [(32, 32, 32)] * 5, intensities=(flat,))
    with pytest.raises(DatasetError, match="channel CT: nearly all foreground voxels are 1"):
        plan(fingerprint, dataset_of(5), recipe="msd2018", overrides=Overrides())


def test_slices_beyond_the_memory_have_no_2d_configuration(caplog):
    fingerprint = fingerprint_of([(5.0, 0.2, 0.2)] * 5, [(20, 2048, 2048)] * 5)
    plans = plan(fingerprint, dataset_of(5), recipe="msd2018", overrides=Overrides())
    assert "2d" not in {c.name for c in plans.configurations}
    assert "no 2d configuration: two patches of 2048x2048 exceed 12 GB" in caplog.text


def test_slices_too_small_to_pool_have_no_2d_configuration(caplog):
    plans, _ = decide_alike((5.0, 1.0, 1.0), (30, 7, 7))
    assert [c.name for c in plans.configurations] == ["3d_fullres"]
    assert "no 2d configuration: patch 7x7 is too small to pool" in caplog.text


@pytest.mark.parametrize(
    ("spacing", "shape", "reason"),
    [
        ((5.563, 0.436, 0.488), (2, 407, 31), "stuck at 1x192x14"),
        ((0.901, 5.528, 2.672), (36, 37, 40), "patch 12x11x12 is too small to pool"),
    ],
)
def test_too_little_memory_is_refused(spacing, shape, reason):
    with pytest.raises(PlansError, match=f"no patch fits 0.01 GB of GPU memory: {reason}"):
        decide_alike(spacing, shape, recipe="nnunetv2", architecture="resenc_m", gpu_memory_gb=0.01)


def test_volumes_too_small_to_pool_are_refused():
    fingerprint = fingerprint_of([(1.0, 1.0, 1.0)] * 5, [(4, 6, 6)] * 5)
    with pytest.raises(PlansError, match="patch 4x6x6 is too small to pool"):
        plan(fingerprint, dataset_of(5), recipe="msd2018", overrides=Overrides())


def parse(*words):
    parser = argparse.ArgumentParser()
    planner.add_arguments(parser)
    return parser.parse_args(["--workspace", *words])


def test_command(tmp_path, capsys):
    save_dataset(dataset_of(100), tmp_path)
    fingerprint = fingerprint_of([(5.0, 0.45, 0.45)] * 100, [(29, 512, 512)] * 100)
    (tmp_path / "fingerprint.json").write_text(strict_json.dumps(fingerprint))
    words = ["--spacing", "5,0.9,0.9", "--patch", "16,96,96", "--batch", "3", "--batch-dice"]
    words += ["--features", "8,16,32,64,128", "--gpu-memory-gb", "6", "--ct-clip=-20,120"]
    words += ["--deep-supervision"]
    assert planner.main(parse(str(tmp_path), *words)) == 0
    plans = plans_module.load(tmp_path / "plans.json")
    full = plans.configuration("3d_fullres")
    assert (full.patch, full.batch, full.spacing_mm) == ((16, 96, 96), 3, (5.0, 0.9, 0.9))
    assert full.batch_dice is True
    assert plans.normalisations[0].clip_low == -20.0
    names = ["spacing", "patch", "batch", "features", "gpu-memory-gb", "ct-clip", "batch-dice"]
    assert [override.name for override in plans.overrides] == [*names, "deep-supervision"]
    assert (plans.overrides[-1].automatic, plans.overrides[-1].chosen) == ("no", "yes")
    printed = capsys.readouterr().out
    assert "3d_fullres: spacing 5x0.9x0.9 mm" in printed
    assert "chosen: patch 16,96,96 (automatic: 16,320,320)" in printed
    assert planner.main(parse(str(tmp_path))) == 0
    plans = plans_module.load(tmp_path / "plans.json")
    assert (plans.recipe, plans.configuration("3d_fullres").patch) == ("msd2018", (16, 320, 320))
    words = ["--recipe", "nnunetv2", "--architecture", "resenc_l", "--no-batch-dice"]
    assert planner.main(parse(str(tmp_path), *words)) == 0
    plans = plans_module.load(tmp_path / "plans.json")
    assert (plans.recipe, plans.architecture) == ("nnunetv2", "resenc_l")
    assert plans.configuration("3d_fullres").architecture.block == "residual"


@pytest.fixture
def trained(tmp_path):
    """A workspace with plans, by which a fold has been trained."""
    save_dataset(dataset_of(100), tmp_path)
    fingerprint = fingerprint_of([(5.0, 0.45, 0.45)] * 100, [(29, 512, 512)] * 100)
    (tmp_path / "fingerprint.json").write_text(strict_json.dumps(fingerprint))
    assert planner.main(parse(str(tmp_path), "--batch", "3")) == 0
    run = run_folder(tmp_path, "3d_fullres", "0")
    run.mkdir(parents=True)
    (run / LATEST_CHECKPOINT).touch()
    return tmp_path


def test_explain_writes_nothing(trained, capsys):
    before = contents(trained)
    words = ["--recipe", "nnunetv2", "--architecture", "resenc_l", "--explain"]
    assert planner.main(parse(str(trained), *words)) == 0
    assert contents(trained) == before
    printed = capsys.readouterr().out
    assert "3D_FULLRES patch 24x448x384, batch 2" in printed
    assert "nothing was written" in printed
    (trained / "plans.json").unlink()
    (trained / "fingerprint.json").unlink()
    before = contents(trained)
    with pytest.raises(DatasetError, match="100 of 100 cases failed"):  # they are asked for
        planner.main(parse(str(trained), "--explain", "--workers", "1"))
    assert contents(trained) == before


def test_plans_of_trained_networks_are_not_replaced(trained):
    before = (trained / "plans.json").read_bytes()
    assert planner.main(parse(str(trained), "--batch", "3")) == 0  # they come out the same
    assert (trained / "plans.json").read_bytes() == before
    with pytest.raises(PlansError, match=r"fold_0 was trained by these plans.*--restart"):
        planner.main(parse(str(trained)))
    assert (trained / "plans.json").read_bytes() == before
    assert planner.main(parse(str(trained), "--restart")) == 0
    assert plans_module.load(trained / "plans.json").configuration("3d_fullres").batch == 2


def test_plans_of_a_training_that_never_got_anywhere_are_replaced(trained):
    """As one that ran out of memory at once, and said to plan with a smaller batch."""
    run = run_folder(trained, "3d_fullres", "0")
    (run / LATEST_CHECKPOINT).rename(run / "train.log")
    assert planner.main(parse(str(trained))) == 0
    assert plans_module.load(trained / "plans.json").configuration("3d_fullres").batch == 2


def test_command_refuses_an_architecture_before_anything_long(tmp_path):
    save_dataset(dataset_of(100), tmp_path)  # whose images do not exist
    with pytest.raises(PlansError, match="architecture resenc_m with recipe msd2018"):
        planner.main(parse(str(tmp_path), "--architecture", "resenc_m"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--patch", "16,96"], "expected 3 whole numbers separated by commas"),
        (["--spacing", "5,a,1"], "expected 3 numbers separated by commas"),
        (["--ct-clip", "20"], "expected 2 numbers separated by commas"),
        (["--architecture", "resenc"], "invalid choice: 'resenc'"),
        (["--features", ""], "expected whole numbers separated by commas"),
    ],
)
def test_command_refuses(words, message, capsys):
    with pytest.raises(SystemExit):
        parse("w", *words)
    assert message in capsys.readouterr().err
