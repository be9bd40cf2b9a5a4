"""What a training takes of its device's memory, by what the planner goes by."""

from __future__ import annotations

from ichseg.model.plans import Configuration, Plans
from training.planning.recipes import RECIPES, find_recipe
from training.planning.topology import MEMORIES


def training_bytes(plans: Plans, configuration: Configuration) -> int:
    """Memory of the device that a training takes, by the planner's estimate.

    The planner holds a count of feature-map elements against a budget that stands for a GPU of so
    many gigabytes; here the same proportion is turned round. 0 for plans of an unknown recipe.
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
    share = elements * configuration.batch / (limits.budget * limits.batch)
    return round(share * recipe.gpu_memory_gb * 1e9)
