"""The planner against the plans of the real ones, against worked examples, and its refusals."""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ichseg import plans as plans_module
from ichseg import schema
from ichseg.errors import DatasetError, PlansError
from ichseg.network import UNet
from training import planner
from training import topology as rules
from training.dataset import Case, Dataset, save_dataset
from training.fingerprint import Fingerprint, Intensities
from training.planner import Overrides, plan
from training.recipes import RECIPES
from training.topology import Topology

HEAD = Intensities(1000, 55.0, 12.0, -20.0, 15.0, 56.0, 90.0, 130.0)
LABELS = ("background", "bleed")


def dataset_of(count, channels=("CT",)):
    cases = tuple(Case(f"c{i:03d}", (Path("x"),) * len(channels), Path("y")) for i in range(count))
    return Dataset("Heads", channels, LABELS, cases)


def fingerprint_of(spacings, shapes, relative_size=1.0, intensities=(HEAD,)):
    return Fingerprint(
        schema_version=1,
        names=tuple(f"c{i:03d}" for i in range(len(shapes))),
        spacings_mm=tuple(spacings),
        shapes=tuple(shapes),
        relative_size=relative_size,
        intensities=intensities,
    )


def plan_heads(slices=29, in_plane=0.45, recipe="msd2018", **overrides):
    """100 cases of 512 x 512, 5 mm, as INSTANCE's."""
    fingerprint = fingerprint_of([(5.0, in_plane, in_plane)] * 100, [(slices, 512, 512)] * 100)
    return plan(fingerprint, dataset_of(100), recipe=recipe, overrides=Overrides(**overrides))


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
    plans = plan_heads(slices, in_plane, recipe)
    full = plans.configuration("3d_fullres")
    assert full.patch == patch
    assert full.batch == 2
    assert full.spacing_mm == (5.0, in_plane, in_plane)
    assert full.median_shape == (slices, 512, 512)
    assert full.dummy_2d is True
    assert full.batch_dice is False
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


@pytest.mark.parametrize("recipe", ["msd2018", "nnunetv2"])
def test_shrinking_by_hand(recipe):
    # 10x512x512 pools 1, 7, 7 times. All axes cover the whole case, and the last gives way: a step
    # of 128 would leave 384, which pools 6 times, so the step is 64: 448. Then the same in y. Then
    # z covers most: 8. Only that fits the memory.
    fingerprint = fingerprint_of([(5.0, 0.45, 0.45)] * 50, [(10, 512, 512)] * 50)
    plans = plan(fingerprint, dataset_of(50), recipe=recipe, overrides=Overrides())
    full = plans.configuration("3d_fullres")
    assert full.patch == (8, 448, 448)
    elements = {"approximate": rules.approximate_elements, "exact": rules.exact_elements}
    topology = Topology(full.architecture.strides, full.architecture.kernels)
    fit = [
        elements[RECIPES[recipe].memory](patch, topology, full.architecture.features, 1, 2)
        <= RECIPES[recipe].budget_3d
        for patch in ((10, 448, 448), (8, 448, 448))
    ]
    assert fit == [False, True]


@pytest.mark.parametrize(
    ("spacing", "rule", "expected"),
    [
        ((1.0, 1.0, 1.0), "volume", [256, 256, 256]),
        ((2.0, 1.0, 1.0), "volume", [161, 323, 323]),  # 256^3 voxels, half as many along z
        ((2.0, 1.0), "volume", [1448, 2896]),  # 2048^2 pixels
        ((5.0, 0.5, 1.0), "edge", [512, 5120, 2560]),
    ],
)
def test_first_patch(spacing, rule, expected):
    assert planner.first_patch(spacing, rule) == expected


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


def test_plans_survive_json(tmp_path):
    plans = plan_heads()
    (tmp_path / "plans.json").write_text(schema.dumps(plans))
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
    np.testing.assert_array_equal(
        planner.target_spacing(spacings, shapes, RECIPES["msd2018"]), (5.0, 0.5, 0.5)
    )


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
    found = planner.target_spacing(spacings, shapes, RECIPES["nnunetv2"])
    np.testing.assert_allclose(found, (expected, 0.5, 0.5))
    found = planner.target_spacing(spacings, shapes, RECIPES["msd2018"])
    np.testing.assert_allclose(found, (slices[1], 0.5, 0.5))


def test_pool_late_by_hand():
    # 9 and 40 voxels: halved once and three times with 4 or more left
    topology = rules.pool_late((9, 40, 40), (3.0, 1.0, 1.0), 99)
    assert topology.strides == (ONE, FLAT, FLAT, FULL)
    # 1 mm and not 2 mm is below half of 3 mm
    assert topology.kernels == ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    assert topology.divisor == (2, 8, 8)
    assert rules.pool_late((3, 5, 7), (1.0, 1.0, 1.0), 99) == Topology((ONE,), ((3, 3, 3),))


def test_pool_by_spacing_by_hand():
    # 1, 2, then within a factor 2 of 3 mm: all axes; 6 and 10 voxels are too few after that
    topology = rules.pool_by_spacing((12, 40), (3.0, 1.0), 99)
    assert topology.strides == ((1, 1), (1, 2), (2, 2), (1, 2))
    assert topology.kernels[-1] == (3, 3)
    # two groups of one axis each at first: the first axis' wins
    assert topology.kernels == ((3, 1), (3, 3), (3, 3), (3, 3))


def test_pool_by_spacing_v2_by_hand():
    topology = rules.pool_by_spacing_v2((12, 40), (3.0, 1.0), 99)
    # the last single axis has 10 voxels, fewer than 12: it is not pooled alone
    assert topology.strides == ((1, 1), (1, 2), (2, 2))
    assert topology.kernels == ((1, 3), (3, 3), (3, 3))


def test_pool_by_spacing_v2_rounds_up_and_never_forgets():
    # 15 -> 8 -> 4: half an odd size is rounded up
    assert rules.pool_by_spacing_v2((15, 15), (1.0, 1.0), 99).divisor == (4, 4)
    # the second axis falls behind by a factor of 8 and keeps its kernel of 3 all the same
    topology = rules.pool_by_spacing_v2((100, 7), (1.0, 1.0), 99)
    assert topology.divisor == (16, 1)
    assert topology.kernels == ((3, 3),) * 5


def test_approximate_elements_by_hand():
    topology = Topology(((1, 1), (2, 2), (2, 1)), ((3, 3),) * 3)
    # 5*64*2 + (1+3)*64 at the top, 5*16*4 in the middle, 2*8*8 at the bottom
    assert rules.approximate_elements((8, 8), topology, (2, 4, 8), 1, 3) == 640 + 256 + 320 + 128


def test_exact_elements_count_the_network():
    """Against the outputs of all convolutions of the network itself."""
    for recipe, name in (("nnunetv2", "3d_fullres"), ("nnunetv2", "2d")):
        configuration = plan_heads(recipe=recipe).configuration(name)
        architecture = replace(configuration.architecture, deep_supervision=False)
        total = 0

        def count(_module, _inputs, output):
            nonlocal total
            total += output.numel()

        with torch.device("meta"):
            network = UNet(architecture, 1, 2).eval()
            convolutions = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
            for module in network.modules():
                if isinstance(module, convolutions):
                    module.register_forward_hook(count)
            network(torch.empty(1, 1, *configuration.patch))
        topology = Topology(architecture.strides, architecture.kernels)
        features = architecture.features
        assert rules.exact_elements(configuration.patch, topology, features, 1, 2) == total


@pytest.mark.parametrize("recipe", ["msd2018", "nnunetv2"])
@pytest.mark.parametrize("shape", [(200, 300, 250), (24, 640, 640), (9, 512, 512), (1, 256, 256)])
def test_patches_fit_the_memory_and_the_network(recipe, shape):
    fingerprint = fingerprint_of([(4.0, 1.0, 1.2)] * 10, [shape] * 10)
    plans = plan(fingerprint, dataset_of(10), recipe=recipe, overrides=Overrides())
    full = plans.configuration("3d_fullres")
    a = full.architecture
    memory = {"approximate": rules.approximate_elements, "exact": rules.exact_elements}
    used = memory[RECIPES[recipe].memory](
        full.patch, Topology(a.strides, a.kernels), a.features, 1, 2
    )
    assert used <= RECIPES[recipe].budget_3d
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


def test_a_flat_ct_foreground_is_refused():
    flat = replace(HEAD, deviation=0.0, percentile_00_5=1.0, percentile_99_5=1.0, median=1.0)
    fingerprint = fingerprint_of([(1.0, 1.0, 1.0)] * 5, [(32, 32, 32)] * 5, intensities=(flat,))
    with pytest.raises(DatasetError, match="channel CT: nearly all foreground voxels are 1"):
        plan(fingerprint, dataset_of(5), recipe="msd2018", overrides=Overrides())


def test_slices_beyond_the_memory_have_no_2d_configuration(caplog):
    fingerprint = fingerprint_of([(5.0, 0.2, 0.2)] * 5, [(20, 2048, 2048)] * 5)
    plans = plan(fingerprint, dataset_of(5), recipe="msd2018", overrides=Overrides())
    assert [c.name for c in plans.configurations] == ["3d_fullres"]
    assert "no 2d configuration: slices of 2048x2048" in caplog.text


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
        ({"recipe": "v3"}, "recipe 'v3', expected one of msd2018, nnunetv2"),
    ],
)
def test_refusals(overrides, message):
    with pytest.raises(PlansError, match=message):
        plan_heads(**overrides)


def test_the_patches_a_refusal_names_do_fit():
    for patch in ((16, 96, 96), (16, 112, 96)):
        assert plan_heads(patch=patch).configuration("3d_fullres").patch == patch


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
    (tmp_path / "fingerprint.json").write_text(schema.dumps(fingerprint))
    words = ["--spacing", "5,0.9,0.9", "--patch", "16,96,96", "--batch", "3"]
    words += ["--features", "8,16,32,64,128"]
    assert planner.main(parse(str(tmp_path), *words)) == 0
    full = plans_module.load(tmp_path / "plans.json").configuration("3d_fullres")
    assert (full.patch, full.batch, full.spacing_mm) == ((16, 96, 96), 3, (5.0, 0.9, 0.9))
    assert "3d_fullres: spacing 5x0.9x0.9 mm" in capsys.readouterr().out
    assert planner.main(parse(str(tmp_path))) == 0
    plans = plans_module.load(tmp_path / "plans.json")
    assert (plans.recipe, plans.configuration("3d_fullres").patch) == ("msd2018", (16, 320, 320))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--patch", "16,96"], "expected 3 whole numbers separated by commas"),
        (["--spacing", "5,a,1"], "expected 3 numbers separated by commas"),
        (["--features", ""], "expected whole numbers separated by commas"),
    ],
)
def test_command_refuses(words, message, capsys):
    with pytest.raises(SystemExit):
        parse("w", *words)
    assert message in capsys.readouterr().err
