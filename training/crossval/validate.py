"""Segment a fold's validation cases at full volume, as inference does, and score them.

Case by case: the mask, then the record that names it. So an interruption costs one case, and the
same weights segment none twice. The first stage of a cascade leaves its labels for the second.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ichseg.engine import torch_engine
from ichseg.engine.engine import Network
from ichseg.errors import PlansError, TrainingError
from ichseg.files import replacing
from ichseg.model import strict_json
from ichseg.model.network import build_network
from ichseg.model.plans import Configuration, Plans
from ichseg.predict import prepare, sliding_window
from ichseg.predict.dice import dice_of_masks
from ichseg.predict.prepare import Placement
from ichseg.predict.restore import one_hot, restore
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from ichseg.wording import clock
from training.crossval import cascade_labels, probabilities
from training.data import dataset
from training.data.workspace import (
    LATEST_CHECKPOINT,
    VALIDATION_FILE,
    mask_file,
    masks_folder,
    probabilities_file,
    probabilities_folder,
)
from training.fit import history
from training.fit.checkpoint import load_checkpoint
from training.fit.fold_run import FoldRun
from training.scoring.ignored import leave_out
from training.store import chunks

SCHEMA_VERSION = 1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Validation:
    """The layout of ``validation.json``.

    Attributes:
        schema_version: The version of this layout.
        weights: The sha256 of the network's tensors.
        mirrored: Whether mirrorings were averaged.
        complete: Whether all of the fold's cases have been segmented.
        mean_dice: The mean Dice of each label over the cases so far that have it; None where no
            case has it.
        dice: The Dice of each label in each case; None where neither mask has the label.
    """

    schema_version: int
    weights: str
    mirrored: bool
    complete: bool
    mean_dice: Mapping[str, float | None]
    dice: Mapping[str, Mapping[str, float | None]]

    def __post_init__(self) -> None:
        strict_json.check_schema("validation", self.schema_version, SCHEMA_VERSION)


class _InterruptedError(Exception):
    """A signal came while a case was being segmented."""


def validate(
    workspace: Path, run: FoldRun, *, interrupted: Callable[[], bool] = lambda: False
) -> bool:
    """Segment the fold's validation cases with the latest weights, as inference does.

    Writes ``validation/<case>.nii.gz``, ``probabilities/<case>.npz`` and, after each case,
    ``validation.json``. What these weights have segmented already is not done again. If the
    configuration is the first stage of a cascade, its labels go to the second stage's store, as far
    as that holds the cases.

    Args:
        workspace: The folder that lists the cases.
        run: A trained fold.
        interrupted: Called after each batch of tiles; where it returns True, validation stops.

    Returns:
        Whether all cases were done.
    """
    weights = load_checkpoint(run.folder / LATEST_CHECKPOINT, run.configuration, run.cases)[
        "network"
    ]
    record = _continue_record(run, weights_digest(weights))
    second = cascade_labels.following(run.plans, run.configuration.name)
    names = run.spec.validation
    waiting = [name for name in names if not _is_done(workspace, run, record, second, name)]
    if len(waiting) < len(names):
        _log.info(
            "validation: %d of %d cases are done already", len(names) - len(waiting), len(names)
        )
    for stage in second:
        _warn_of_missing(workspace, stage, names)
    data = dataset.load_dataset(workspace)
    cases = {case.name: case for case in data.labelled}
    network = load_network(run, weights)

    def stoppable(tiles: Iterable[Tensor]) -> Generator[Tensor]:
        for scores in network(tiles):
            if interrupted():
                raise _InterruptedError
            yield scores

    began = time.monotonic()
    for number, name in enumerate(waiting, start=1):
        started = time.monotonic()
        try:
            labels = _segment_and_store(workspace, run, cases[name], stoppable, second)
        except _InterruptedError:
            _log.info("validation: stopped at case %s; the same command goes on from here", name)
            return False
        reference = volume.read(cases[name].reference).voxels
        scores = score_labels(labels, reference, run.plans, data.ignore_label)
        record = _extended(run, record, name, scores)
        _write(record, run.folder / VALIDATION_FILE)
        now = time.monotonic()
        _log.info(
            "validation %d/%d  %s  Dice %s  %.1f s  ETA %s",
            len(names) - len(waiting) + number,
            len(names),
            name,
            _text(scores),
            now - started,
            clock((now - began) / number * (len(waiting) - number)),
        )
    _log.info("validation: mean Dice %s", _text(record.mean_dice))
    return True


def is_validated(workspace: Path, run: FoldRun, weights: Mapping[str, Tensor]) -> bool:
    """Whether ``validate`` has done all cases with these weights, as this run asks for."""
    try:
        found = strict_json.load(Validation, run.folder / VALIDATION_FILE)
    except PlansError:  # none yet, or of another version
        return False
    if (found.weights, found.mirrored) != (weights_digest(weights), run.config.validation_mirrors):
        return False
    second = cascade_labels.following(run.plans, run.configuration.name)
    return all(_is_done(workspace, run, found, second, name) for name in run.spec.validation)


def load_network(run: FoldRun, weights: Mapping[str, Tensor]) -> Network:
    """The fold's network on its device, from tiles to probabilities, as inference runs it."""
    network = build_network(
        run.configuration.architecture,
        run.plans.input_channels(run.configuration),
        len(run.plans.labels),
    )
    network.load_state_dict(weights)
    size = torch_engine.BatchSize(torch_engine.batch_for(run.configuration.tile, run.device))
    return torch_engine.network_on(network, run.device, size, average="probabilities")


def segment_case(
    case: dataset.Case, run: FoldRun, weights: Mapping[str, Tensor]
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Segment one case; the labels have the case's own grid, shape ``(z, y, x)``."""
    channels = [volume.read(path) for path in case.images]
    return restore([predict_case(case.name, channels, run, load_network(run, weights))], run.plans)


def predict_case(
    name: str, channels: Sequence[Volume], run: FoldRun, network: Network
) -> tuple[Tensor, Placement]:
    """Predict one case with one network.

    The second stage of a cascade takes the labels of the first from the store.

    Args:
        name: The case's name.
        channels: The case's images, one volume each.
        run: The fold.
        network: The fold's network, see ``load_network``.

    Returns:
        Scores of each voxel, shape ``(K, Z, Y, X)``, in the configuration's grid; and where that
        grid lies in the case.
    """
    prepared = prepare.prepare(channels, run.plans, run.configuration)
    data = prepared.data
    if run.spec.previous_labels:
        previous = chunks.open_case(run.spec.folder, name).previous
        if previous is None:
            raise TrainingError(
                f"{run.spec.folder}: case {name} has no labels of the first stage; train that first"
            )
        data = np.concatenate((data, one_hot(previous[:], run.spec.previous_labels)))
    dimensions = run.configuration.architecture.dimensions
    scores = sliding_window.predict_tiled(
        network,
        torch.from_numpy(data).to(run.device),
        run.configuration.tile,
        mirror_axes=tuple(range(3 - dimensions, 3)) if run.config.validation_mirrors else (),
    )
    assert isinstance(scores, Tensor)  # as the data are
    return scores, prepared.placement


def score_labels(
    labels: np.ndarray[Any, Any],
    reference: np.ndarray[Any, Any],
    planned: Plans,
    ignore_label: int | None,
) -> dict[str, float | None]:
    """The Dice of each foreground label, by its name; None where neither mask has the label.

    Args:
        labels: The labels that were found, shape ``(z, y, x)``.
        reference: The labels of the reference, of the same shape.
        planned: The plans, which name the labels.
        ignore_label: The value of the reference's voxels that do not count; None without any.
    """
    found, expected = leave_out(labels, reference, ignore_label)
    scores = {
        name: dice_of_masks(found == value, expected == value)
        for value, name in enumerate(planned.labels)
        if value
    }
    return {name: None if math.isnan(score) else score for name, score in scores.items()}


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """The sha256 over all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _segment_and_store(
    workspace: Path,
    run: FoldRun,
    case: dataset.Case,
    network: Network,
    second: Sequence[Configuration],
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Segment one case, and write its mask, its probabilities and its labels for a second stage."""
    channels = [volume.read(path) for path in case.images]
    scores, placement = predict_case(case.name, channels, run, network)
    labels = restore([(scores, placement)], run.plans)
    probabilities.save(probabilities_file(run.folder, case.name), scores)
    volume.write(channels[0].with_voxels(labels), mask_file(run.folder, case.name))
    for stage in second:
        if cascade_labels.can_store(workspace, stage, case.name):
            cascade_labels.store_labels(
                workspace, run.plans, stage, case.name, channels, scores, placement
            )
    return labels


def _continue_record(run: FoldRun, weights: str) -> Validation:
    """The record of what these weights have done so far; masks of other weights are removed."""
    fresh = Validation(
        SCHEMA_VERSION,
        weights,
        run.config.validation_mirrors,
        complete=False,
        mean_dice={},
        dice={},
    )
    try:
        found = strict_json.load(Validation, run.folder / VALIDATION_FILE)
    except PlansError:  # none yet, or of another version
        found = fresh
    if (found.weights, found.mirrored) == (fresh.weights, fresh.mirrored) and found.dice:
        return found
    (run.folder / VALIDATION_FILE).unlink(missing_ok=True)
    for mask in (masks_folder(run.folder)).glob("*.nii.gz"):
        mask.unlink()
    shutil.rmtree(probabilities_folder(run.folder), ignore_errors=True)
    return fresh


def _is_done(
    workspace: Path,
    run: FoldRun,
    record: Validation,
    second: Sequence[Configuration],
    name: str,
) -> bool:
    if name not in record.dice or not mask_file(run.folder, name).is_file():
        return False
    return all(
        cascade_labels.has_labels(workspace, stage, name)
        for stage in second
        if cascade_labels.can_store(workspace, stage, name)
    )


def _extended(
    run: FoldRun, record: Validation, name: str, scores: Mapping[str, float | None]
) -> Validation:
    known = {**record.dice, name: scores}
    cases = {name: known[name] for name in run.spec.validation if name in known}
    means = {label: _mean([s[label] for s in cases.values()]) for label in run.plans.labels[1:]}
    return dataclasses.replace(
        record, complete=len(cases) == len(run.spec.validation), mean_dice=means, dice=cases
    )


def _warn_of_missing(workspace: Path, stage: Configuration, names: Sequence[str]) -> None:
    missing = [name for name in names if not cascade_labels.can_store(workspace, stage, name)]
    if missing:
        _log.warning(
            "%s is to train on these segmentations, but %d of %d cases have not been preprocessed "
            "for it; run `preprocess %s`, then this command again",
            stage.name,
            len(missing),
            len(names),
            stage.name,
        )


def _write(record: Validation, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(strict_json.dumps(record), encoding="utf-8")


def _text(scores: Mapping[str, float | None]) -> str:
    return ", ".join(f"{label} {history.number(score).strip()}" for label, score in scores.items())


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None
