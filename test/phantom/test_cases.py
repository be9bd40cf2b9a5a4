"""The phantom generator: labels as large as asked, bleeds where bleeds can be."""

import dataclasses

import numpy as np
import pytest

from phantom import bleeds, scanner
from phantom.cases import SynthesisConfig, draw_lesions, make_phantom
from phantom.person import draw_head


@pytest.mark.parametrize(
    ("kind", "volume_ml"),
    [
        ("intraparenchymal", 0.6),
        ("intraventricular", 3.0),
        ("subdural", 12.0),
        ("epidural", 30.0),
        ("subarachnoid", 6.0),
    ],
)
def test_bleed_has_its_volume_and_stands_out(kind, volume_ml):
    rng = np.random.default_rng(11)
    head = draw_head(rng)
    scan = scanner.draw_scan(head, rng, shrink=1)
    case = make_phantom(head, scan, ((kind, volume_ml),), rng)
    bleed = case.mask > 0
    assert bleed.sum() * np.prod(case.spacing_mm) / 1000 == pytest.approx(volume_ml, rel=0.2)
    assert 45 <= case.voxels[bleed].mean() <= 95
    around = _shell(bleed) & (case.voxels > 0) & (case.voxels < 100)
    assert case.voxels[bleed].mean() > case.voxels[around].mean() + 10


def test_negative_has_calcifications_and_no_label():
    rng = np.random.default_rng(3)
    head = dataclasses.replace(
        draw_head(rng), calcified=("pineal", "left choroid", "right choroid")
    )
    scan = scanner.draw_scan(head, rng, shrink=2)
    case = make_phantom(head, scan, (), rng)
    assert not case.mask.any()
    assert case.volumes_ml == {}
    slices, rows, columns = case.voxels.shape
    middle = case.voxels[
        slices // 3 : 2 * slices // 3,
        rows // 3 : 2 * rows // 3,
        columns * 2 // 5 : columns * 3 // 5,
    ]
    assert (middle > 90).any()  # bright enough to be taken for blood


def test_calcifications_are_not_labelled():
    rng = np.random.default_rng(4)
    head = dataclasses.replace(
        draw_head(rng), calcified=("pineal", "left choroid", "right choroid")
    )
    scan = scanner.draw_scan(head, rng, shrink=2)
    case = make_phantom(head, scan, (("epidural", 10.0),), rng)
    assert case.voxels[case.mask > 0].max() < 110 + 6 * scan.noise_hu


def test_negative_fraction_and_balance_are_kept():
    drawn = [
        draw_lesions(SynthesisConfig(400, 1, negatives=0.25), i, np.random.default_rng([1, i]))
        for i in range(400)
    ]
    assert 0.19 < np.mean([not lesions for lesions in drawn]) < 0.31
    volumes = np.array([sum(ml for _, ml in lesions) for lesions in drawn if lesions])
    assert volumes.min() >= 0.19
    assert volumes.max() <= 155
    assert 1.5 < np.median(volumes) < 9  # log-uniform: the middle of 0.2..155 is 5.6
    config = SynthesisConfig(20, 20221, negatives=0.0, balanced=True)
    kinds = [draw_lesions(config, i, np.random.default_rng([20221, i]))[0][0] for i in range(20)]
    assert all(kinds.count(kind) == 4 for kind in bleeds.KINDS)


def _shell(mask):
    from scipy import ndimage

    return ndimage.binary_dilation(mask, iterations=6) & ~ndimage.binary_dilation(
        mask, iterations=2
    )
