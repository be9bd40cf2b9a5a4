"""Our half of ``parity.py``: probabilities in the volume's grid, which ``process.py`` never has.

No tile is skipped; beside that, the functions that ``Ensemble`` calls, one after the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ichseg import bundle, engine, preprocess, resample, sliding_window
from ichseg.bundle import Model
from ichseg.engine import Engine, NetworkSpec
from ichseg.plans import Configuration
from ichseg.preprocess import Placement
from ichseg.volume import Volume


def probabilities_of(weights: Path, scan: Volume, device: str = "cpu") -> npt.NDArray[np.float32]:
    """Of labels or regions, ``(K, z, y, x)`` in the volume's grid, by all folds and mirrorings."""
    model = bundle.load_model(weights)
    configuration = model.plans.configuration(model.configurations[-1])  # of a cascade, the second
    scores, placement = scores_of(weights, model, configuration, scan, engine.choose(device))
    apart = None
    if "score" in model.plans.resampling.separate_z:
        apart = resample.coarse_axis(
            placement.grid_spacing_mm, placement.spacing_mm, model.plans.resampling.anisotropy
        )
    leads = resample.resize_leads(
        scores,
        placement.crop_shape,
        slice(0, placement.crop_shape[0]),
        order=model.plans.resampling.score_order,
        apart=apart,
        regions=bool(model.plans.regions),
    )
    inside = np.asarray(leads, np.float64)
    full = np.zeros((model.plans.scores, *placement.full_shape), np.float32)
    if model.plans.regions:
        inside = 1 / (1 + np.exp(-inside))
    else:
        full[0] = 1
        inside = np.concatenate((np.zeros_like(inside[:1]), inside))
        inside = np.exp(inside - inside.max(0))
        inside /= inside.sum(0)
    full[(slice(None), *placement.slices)] = inside
    return np.stack([placement.axes.undo(part) for part in full])


def labels_of(weights: Path, scan: Volume, device: str = "cpu") -> npt.NDArray[np.uint8]:
    """Labels ``(z, y, x)`` in the volume's grid, by all folds and mirrorings."""
    model = bundle.load_model(weights)
    configuration = model.plans.configuration(model.configurations[-1])
    found = scores_of(weights, model, configuration, scan, engine.choose(device))
    return preprocess.restore([found], model.plans)


def scores_of(
    weights: Path, model: Model, configuration: Configuration, scan: Volume, runner: Engine
) -> tuple[Any, Placement]:
    """Mean logits in the network's grid, and where that lies."""
    plans = model.plans
    case = preprocess.prepare([scan], plans, configuration)
    data = case.data
    if configuration.previous_stage is not None:
        first = plans.configuration(configuration.previous_stage)
        labels = preprocess.restore([scores_of(weights, model, first, scan, runner)], plans)
        outside = preprocess.outside_nonzero([scan], case.placement)
        previous = preprocess.prepare_labels(
            scan.with_voxels(labels), case.placement, plans, outside
        )
        data = np.concatenate((data, preprocess.one_hot(previous, len(plans.labels) - 1)))
    total: Any = 0
    members = model.members_of(configuration.name)
    for member in members:
        spec = NetworkSpec(
            architecture=configuration.architecture,
            input_channels=plans.input_channels(configuration),
            scores=plans.scores,
            tile=configuration.tile,
            average=model.average,
        )
        network = runner.load(spec, bundle.load_state(weights, member))
        dimensions = configuration.architecture.dimensions
        total = total + sliding_window.predict_tiled(
            network.run,
            runner.place(data),
            configuration.tile,
            mirror_axes=[axis for axis in model.mirror_axes if axis >= 3 - dimensions],
        )
    return total / len(members), case.placement
