"""Segment a fold's validation cases at full volume, as inference does, and score them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ichseg import engine, preprocess, schema, sliding_window, volume
from ichseg.network import build_network
from ichseg.plans import Plans
from training import dataset
from training.fold import LATEST, FoldRun, load_checkpoint
from training.metrics import dice

_log = logging.getLogger(__name__)


def validate(
    workspace: Path, run: FoldRun, *, interrupted: Callable[[], bool] = lambda: False
) -> bool:
    """Segment the fold's validation cases with the latest weights, as inference does.

    Writes ``validation/<case>.nii.gz``, and ``validation.json`` with the Dice by case and label.

    Args:
        workspace: Where the cases are listed.
        run: A trained fold.
        interrupted: Asked before each case whether to stop.

    Returns:
        Whether all cases were done.
    """
    checkpoint = load_checkpoint(run.folder / LATEST, run.configuration)
    cases = {case.name: case for case in dataset.load_dataset(workspace).labelled}
    scores: dict[str, dict[str, float | None]] = {}
    for name in run.spec.validation:
        if interrupted():
            return False
        labels = segment_case(cases[name], run, checkpoint["network"], run.folder / "validation")
        reference = volume.read(cases[name].label or Path()).voxels
        scores[name] = score_labels(labels, reference, run.plans)
        text = ", ".join(f"{k} {'-' if v is None else f'{v:.3f}'}" for k, v in scores[name].items())
        _log.info("validation case %s: Dice %s", name, text)
    means = {label: _mean([s[label] for s in scores.values()]) for label in run.plans.labels[1:]}
    with volume.replacing(run.folder / "validation.json") as temporary:
        temporary.write_text(schema.dumps({"mean_dice": means, "dice": scores}), encoding="utf-8")
    _log.info("validation Dice: %s", ", ".join(f"{k} {v}" for k, v in means.items()))
    return True


def segment_case(
    case: dataset.Case, run: FoldRun, weights: dict[str, Tensor], folder: Path | None = None
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Labels ``(z, y, x)`` of a case in its own grid, written to ``folder`` if given."""
    network = build_network(
        run.configuration.architecture, len(run.plans.channels), len(run.plans.labels)
    )
    network.load_state_dict(weights)
    channels = [volume.read(path) for path in case.images]
    prepared = preprocess.prepare(channels, run.plans, run.configuration)
    dimensions = run.configuration.architecture.dimensions
    scores = sliding_window.predict_tiled(
        engine.torch_engine(network, run.device, average="probabilities"),
        torch.from_numpy(prepared.data).to(run.device),
        run.configuration.tile,
        mirror_axes=tuple(range(3 - dimensions, 3)) if run.config.validation_mirrors else (),
    )
    labels = preprocess.restore([(scores, prepared.placement)], run.plans)
    if folder is not None:
        volume.write(channels[0].with_voxels(labels), folder / f"{case.name}.nii.gz")
    return labels


def score_labels(
    labels: np.ndarray[Any, Any], reference: np.ndarray[Any, Any], planned: Plans
) -> dict[str, float | None]:
    """Dice of each foreground label; None where neither mask has it."""
    scores = {
        name: dice(labels == value, reference == value)
        for value, name in enumerate(planned.labels)
        if value
    }
    return {name: None if math.isnan(score) else score for name, score in scores.items()}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None
