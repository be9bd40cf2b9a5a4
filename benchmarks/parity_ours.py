"""Our half of ``parity.py``: probabilities in the volume's grid, which ``process.py`` never has.

No tile is skipped; beside that, ``Ensemble``'s own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ichseg.model.bundle import Model
from ichseg.predict import resample
from ichseg.predict.ensemble import Ensemble
from ichseg.predict.prepare import Placement
from ichseg.predict.restore import resize_margins
from ichseg.scan.volume import Volume


def probabilities_of(weights: Path, scan: Volume, device: str = "cpu") -> npt.NDArray[np.float32]:
    """Probabilities ``(K, z, y, x)`` in the volume's grid, by all folds and mirrorings."""
    model, scores, placement = scores_of(weights, scan, device)
    separate_axis = None
    if "score" in model.plans.resampling.separate_z:
        separate_axis = resample.coarse_axis(
            placement.grid_spacing_mm, placement.spacing_mm, model.plans.resampling.anisotropy
        )
    found = resize_margins(
        scores,
        placement.crop_shape,
        slice(0, placement.crop_shape[0]),
        order=model.plans.resampling.score_order,
        separate_axis=separate_axis,
        regions=bool(model.plans.regions),
    )
    inside = np.asarray(found, np.float64)
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


def scores_of(weights: Path, scan: Volume, device: str) -> tuple[Model, Any, Placement]:
    """The bundle, its mean logits in the network's grid, and where that lies."""
    ensemble = Ensemble.load(weights, device, "float32")
    plan = ensemble.plan(scan)
    (part,) = plan.parts
    tiles = replace(part.passes.tiles, skipped=frozenset())
    part = replace(part, passes=replace(part.passes, tiles=tiles))
    prepared = ensemble.prepare(replace(plan, parts=(part,)))
    ((scores, placement),) = ensemble.predict(prepared).parts
    return ensemble.model, scores, placement
