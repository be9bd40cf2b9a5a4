"""``plan --explain``: a newcomer finds the reason of each number in it."""

import re

import pytest
from helpers.planning import HEAD, dataset_of, decide_alike, fingerprint_of

from training.planning.explain import explain
from training.planning.overrides import Overrides
from training.planning.planner import decide


def explained(*args, **choices):
    """The text, its line breaks and alignment taken out."""
    return " ".join(explain(*decide_alike(*args, **choices)).split())


def test_why_16x320x320():
    text = explained((5.0, 0.45, 0.45), (29, 512, 512))
    assert "VOXEL SIZE 5x0.45x0.45 mm" in text
    assert "the median of the cases: as many are made finer as coarser" in text
    assert "clipped to 15 to 90 HU, less 55.00, over 12.00" in text
    assert "the limits are their 0.5 and 99.5 percentile" in text
    assert "recipe allows one patch 520,000,000 values" in text
    # isotropic in mm: 512 voxels of 5 mm are 5689 of 0.45 mm
    assert "(512x5689x5689 voxels), cut to the median case" in text
    # the last step: 20 of 29 slices, 320 of 512 columns; z covers most and loses a quarter
    assert re.search(r"20x320x320 y 69, 62, 62 2, 6, 6 596,624,000 115 %", text)
    assert re.search(r"16x320x320 z 55, 62, 62 2, 6, 6 477,299,200 92 % Each step", text)
    # deepest level: 16 slices halved twice, 320 voxels six times
    assert "6 z y x 4x5x5 20x28.8x28.8 3x3x3 320" in text
    assert "0 16x320x320 5x0.45x0.45 1x3x3 30" in text
    assert "Features: 30, doubled per level up to 320." in text
    # 520e6 / 477 299 200 x 2 = 2.179; 5 % of 100 cases of 7 602 176 voxels are 23.2 patches
    assert "Batch 2: the memory holds 2.179 patches, 5 % of the dataset is 23;" in text
    assert "in-plane only: their longest edge is 20 times the first, the limit is 3" in text
    assert "NO CASCADE: the median case has not more than 4 times a patch's voxels" in text
    assert "5x0.45x0.45 29x512x512 7,602,176 1,966,080 3.87" in text
    assert "2D patch 512x512, batch 12" in text
    assert "CHOSEN" not in text


def test_the_cascade_of_msd2018():
    text = explained((5.0, 0.42, 0.42), (32, 512, 512))
    assert "CASCADE: the median case has more than 4 times a patch's voxels" in text
    assert "5x0.42x0.42 32x512x512 8,388,608 1,966,080 4.27" in text
    assert "5x0.84x0.84 32x256x256 2,097,152 1,966,080 1.07" in text
    assert "Voxel edges are doubled" in text
    assert "3D_LOWRES patch 32x224x224" in text
    assert "Dice is taken over the batch as one volume" in text


def test_nnunetv2_and_its_architectures():
    text = explained((5.0, 0.45, 0.45), (28, 512, 512), recipe="nnunetv2", architecture="resenc_m")
    assert "11.1 times as long as the longer of the others (more than 3)" in text
    assert "the 10th percentile, 5 mm" in text
    assert "NO CASCADE: low resolution would not save a factor 2 of voxels" in text
    assert "The levels of the encoder have 1, 3, 4, 6, 6, 6, 6 residual blocks of two" in text
    assert "12 patches have to fit 8 GB" in text  # in 2D


@pytest.mark.parametrize(
    ("spacing", "shape", "words"),
    [
        ((2.0, 1.0, 1.0), (30, 200, 200), "2 times as long as the longer of the others, not more"),
        ((5.0, 1.0, 1.0), (100, 200, 200), "5 times .* and the median case does not have so many"),
    ],
)
def test_why_thick_slices_are_not_made_finer(spacing, shape, words):
    text = explained(spacing, shape, recipe="nnunetv2")
    assert re.search(f"Along z too: its voxels are {words}", text)


def test_axes_keep_their_names_after_the_transpose():
    text = explained((0.9, 4.0, 0.9), (208, 42, 230), recipe="nnunetv2")
    assert "y 4 4 4 4" in text
    assert "the axes stand in the order y, z, x" in text
    assert "1 z x 40x96x112" in text


def test_long_searches_are_shortened():
    text = explained((0.8, 0.8, 0.8), (400, 512, 512), recipe="nnunetv2")
    assert "... ... ... ... ... " in text
    assert "The patch is planned anew at each voxel size. Voxel edges grow by 3 %" in text


def test_what_was_chosen():
    text = explained(
        (5.0, 0.45, 0.45),
        (29, 512, 512),
        spacing_mm=(5.0, 0.9, 0.9),
        patch=(16, 96, 96),
        batch=3,
        features=(8, 16, 32, 64, 128),
        ct_clip=(-20.0, 120.0),
    )
    assert "Chosen; the planner takes 5x0.45x0.45 mm." in text
    assert "clipped to -20 to 120 HU" in text
    assert "the limits are chosen" in text
    assert "batch 3 The patch was chosen." in text
    assert "Features: 30, doubled per level up to 480." in text  # in 2D
    assert "Features: chosen, and with them the number of levels" in text
    assert "Batch 3 was chosen; the memory holds" in text
    assert "CHOSEN in place of what the planner finds option automatic chosen" in text
    assert "patch 16,320,320 16,96,96" in text
    assert "features 30,60,120,240,320,320,320 8,16,32,64,128" in text


def test_other_modalities_and_no_2d():
    fingerprint = fingerprint_of([(1.0, 1.0, 1.0)] * 5, [(64, 7, 7)] * 5, 0.5, (HEAD,) * 2)
    dataset = dataset_of(5, ("MR", "noNorm"))
    text = explain(*decide(fingerprint, dataset, recipe="msd2018", overrides=Overrides()))
    text = " ".join(text.split())
    assert "Channel MR: each image by itself, less the mean of the region that is not zero" in text
    assert "Channel noNorm: as they are." in text
    assert "2D patch" not in text
