"""What lies outside the dura: muscle in bellies between planes of fat, eyes with a lens."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from phantom.head_atlas import FLUID, MUSCLE, load_atlas
from phantom.outside import outside_hu
from phantom.person import draw_head


@pytest.fixture(scope="module")
def person():
    return draw_head(np.random.default_rng(8))


@pytest.fixture(scope="module")
def hu(person):
    return outside_hu(load_atlas(), person, np.random.default_rng(5))


def test_muscle_is_parted_by_fat_and_denser_in_some_bellies(person, hu):
    muscle = hu[load_atlas().tissue == MUSCLE]
    fat = np.mean(muscle < person.muscle_hu - 40)
    assert 0.02 < fat < 0.25
    assert np.median(muscle) == pytest.approx(person.muscle_hu, abs=5)
    assert np.percentile(muscle, 90) > person.muscle_hu + 5


def test_only_muscle_follows_its_density(person, hu):
    denser = dataclasses.replace(person, muscle_hu=person.muscle_hu + 10)
    changed = outside_hu(load_atlas(), denser, np.random.default_rng(5)) != hu
    elsewhere = (load_atlas().tissue != MUSCLE) & (load_atlas().lens == 0)
    assert changed.any()
    assert not (changed & elsewhere).any()


def test_each_eye_has_a_lens_at_its_front(person, hu):
    atlas = load_atlas()
    lenses, count = ndimage.label((atlas.lens > 0.9) & (hu > person.lens_hu - 15))
    assert count == 2
    globes = ndimage.binary_dilation(atlas.tissue == FLUID, iterations=3)
    for index in (1, 2):
        assert globes[lenses == index].all()
        volume_mm3 = np.count_nonzero(lenses == index)
        assert 40 < volume_mm3 < 250  # a lens has about 200 mm3, its edge is soft
        _, y, x = np.nonzero(lenses == index)
        column = np.flatnonzero((atlas.tissue == FLUID)[:, :, round(x.mean())].any(axis=0))
        assert y.mean() < column.mean()
