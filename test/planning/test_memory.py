"""What a training takes of its device's memory, worked out by hand."""

import dataclasses

import pytest
from conftest import CONFIGURATION, PLANS

from training.planning.memory import training_bytes
from training.planning.recipes import RECIPES


def test_memory_is_the_planners_estimate_turned_round():
    """A batch that the planner can just afford takes the memory that the planner plans for."""
    recipe = RECIPES["msd2018"]["plain"]
    # by hand: level 0 puts out 4 * 1024 elements, level 1 8 * 256; 5 * 4096 + 2 * 2048 + 3 * 1024
    elements = 27_648
    afforded = recipe.limits_3d.budget * recipe.limits_3d.batch / elements
    share = CONFIGURATION.batch / afforded
    expected = share * recipe.gpu_memory_gb * 1e9
    assert training_bytes(PLANS, CONFIGURATION) == pytest.approx(expected, abs=1)
    double = dataclasses.replace(CONFIGURATION, batch=2 * CONFIGURATION.batch)
    assert training_bytes(PLANS, double) == pytest.approx(2 * expected, abs=1)
    imported = dataclasses.replace(PLANS, architecture="resenc_m")  # the recipe has no such one
    assert training_bytes(imported, CONFIGURATION) == 0
