import dataclasses
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIGURATION, PLANS

from ichseg.model.plans import Normalisation
from ichseg.predict import sliding_window
from ichseg.predict.ensemble import Ensemble
from ichseg.predict.prepare import place
from ichseg.predict.presets import skip_air
from ichseg.scan import volume
from ichseg.scan.volume import Volume

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "test" / "sample" / "input"
TILE = (4, 16, 16)


def skipped(voxels, *, spacing_mm=(5.0, 1.0, 1.0), plans=PLANS, tile=TILE, direction=None):
    scan = Volume(voxels, spacing_mm)
    if direction is not None:
        scan = dataclasses.replace(scan, direction=direction)
    placement = place([scan], plans, CONFIGURATION)
    tiles = sliding_window.cover(placement.grid_shape, tile)
    return skip_air(tiles, [scan], placement, plans)


def air(shape):
    return np.full(shape, -1000, np.int16)


def test_one_voxel_decides_about_the_tiles_that_hold_it():
    """32 voxels along y and x: tiles from 0, 8 and 16 on."""
    voxels = air((4, 32, 32))
    assert len(skipped(voxels).skipped) == 9
    voxels[3, 10, 20] = -500
    found = skipped(voxels)
    held = {(0, y, x) for y in (0, 8) for x in (8, 16)}
    assert set(found.corners()) == held
    voxels[3, 10, 20] = -501
    assert len(skipped(voxels).skipped) == 9


def test_scanner_padding_is_air():
    voxels = air((4, 32, 32))
    voxels[:, :5] = -3024
    assert len(skipped(voxels).skipped) == 9


def test_the_grid_is_the_uncut_volumes():
    voxels = air((9, 40, 50))
    voxels[0, 0, 0] = 40
    found = skipped(voxels)
    assert found.starts == sliding_window.cover((9, 40, 50), TILE).starts
    assert found.corners() == [(0, 0, 0)]


def test_a_resampled_volume_is_judged_where_its_tiles_came_from():
    """Half the size in-plane: tiles from 0, 8, 16 on come from raw voxels 0..31, 16..47, 32..63.

    And from two more on either side, which a spline brings in.
    """
    where = {13: [0], 14: [0, 8], 29: [0, 8], 30: [0, 8, 16], 33: [0, 8, 16], 34: [8, 16], 50: [16]}
    for column, expected in where.items():
        voxels = air((4, 32, 64))
        voxels[:, :, column] = 30
        found = skipped(voxels, spacing_mm=(5.0, 0.5, 0.5))
        assert found.shape == (4, 16, 32)
        assert sorted({x for _, _, x in found.corners()}) == expected


def test_flipped_and_cropped_volumes_are_judged_in_the_plans_order():
    """Zeros at the low end of x are cropped; the direction turns y and x round."""
    voxels = air((4, 32, 40))
    voxels[:, :, :8] = 0
    voxels[2, 1, 9] = 40
    turned = (1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, -1.0)
    found = skipped(voxels, direction=turned)
    assert found.shape == (4, 32, 32)
    assert found.corners() == [(0, 16, 16)]


def test_padding_to_a_tile_is_not_air():
    """It is 0 after normalisation, which is the foreground's mean; so nothing is left out."""
    assert not skipped(air((3, 32, 32))).skipped
    low = dataclasses.replace(
        PLANS, normalisations=(Normalisation("ct", clip_low=-990, clip_high=-600, mean=-700),)
    )
    assert len(skipped(air((3, 32, 32)), plans=low).skipped) == 9


def test_nearest_padding_of_air_is_air():
    """A stack of three slices, tiles of four: what lies beyond it repeats what is judged."""
    nearest = dataclasses.replace(PLANS, padding="nearest")
    voxels = air((3, 32, 32))
    assert len(skipped(voxels, plans=nearest).skipped) == 9
    voxels[2, 0, 0] = 40
    assert skipped(voxels, plans=nearest).corners() == [(0, 0, 0)]


@pytest.mark.parametrize("scheme", ["zscore", "none"])
def test_only_ct_is_in_hu(scheme):
    other = dataclasses.replace(PLANS, normalisations=(Normalisation(scheme),))
    assert not skipped(air((4, 32, 32)), plans=other).skipped


def test_every_channel_has_to_be_air():
    two = dataclasses.replace(PLANS, channels=("CT", "CT"), normalisations=PLANS.normalisations * 2)
    first, second = (Volume(air((4, 32, 32)), (5.0, 1.0, 1.0)) for _ in range(2))
    second.voxels[0, 0, 0] = 0
    placement = place([first, second], two, CONFIGURATION)
    tiles = sliding_window.cover(placement.grid_shape, TILE)
    assert skip_air(tiles, [first, second], placement, two).corners() == [(0, 0, 0)]


@pytest.mark.slow
@pytest.mark.parametrize("beside", [0, 288])
@pytest.mark.parametrize("sample", sorted(path.name for path in SAMPLES.iterdir()))
def test_labels_of_the_samples_are_the_same_bytes(sample, beside, monkeypatch):
    """With one default network; as they are, and in a field of view so wide that tiles are air.

    In tiles of nothing but air a network sees what no training patch showed, and may mark it; the
    skipped tiles' voxels are background. What no skipped tile holds is the same, bit for bit.
    """
    scan = volume.read(SAMPLES / sample)
    wide = np.pad(scan.voxels, ((0, 0), (0, 0), (0, beside)), constant_values=-1024)
    scan = dataclasses.replace(scan, voxels=wide)
    ensemble = Ensemble.load(ROOT / "weights", "cpu")
    second = dataclasses.replace(ensemble.model, members=ensemble.model.members[1:2], rules=())
    ensemble = dataclasses.replace(ensemble, model=second)
    found = ensemble.segment(scan, "fast")
    monkeypatch.setattr("ichseg.predict.presets.skip_air", lambda tiles, *_: tiles)
    plain = ensemble.segment(scan, "fast")
    assert (found.ran["tiles_skipped"] > 0) == (beside > 0)
    assert plain.ran["tiles_skipped"] == 0
    assert found.mask.voxels.any()
    known = slice(0, wide.shape[2] - beside)  # the scan itself
    assert found.mask.voxels[..., known].tobytes() == plain.mask.voxels[..., known].tobytes()
    assert not found.mask.voxels[..., wide.shape[2] - beside // 3 :].any() or not beside
