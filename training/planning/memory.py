"""How much device memory a training takes, estimated as the planner does."""

from __future__ import annotations

import math

from ichseg.model.plans import Configuration, Plans
from training.planning.recipes import RECIPES, find_recipe
from training.planning.topology import MEMORIES


def training_bytes(plans: Plans, configuration: Configuration, processes: int = 1) -> int:
    """Memory of the device that a training takes, by the planner's estimate.

    The planner holds a count of feature-map elements against a budget that stands for a GPU of so
    many gigabytes; here the same proportion is turned round. 0 where the recipe has no such
    architecture. Of several processes that share the batch it is what the one with most samples
    takes.
    """
    if plans.architecture not in RECIPES.get(plans.recipe, {}):
        return 0
    recipe = find_recipe(plans.recipe, plans.architecture)
    limits = recipe.limits_2d if len(configuration.patch) == 2 else recipe.limits_3d
    elements = MEMORIES[recipe.memory](
        configuration.patch,
        configuration.architecture,
        plans.input_channels(configuration),
        1 + len(plans.foreground),
    )
    samples = math.ceil(configuration.batch / processes)
    share = elements * samples / (limits.budget * limits.batch)
    return round(share * recipe.gpu_memory_gb * 1e9)
