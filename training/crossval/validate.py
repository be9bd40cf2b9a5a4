"""Segment a fold's validation cases at full volume, as inference does, and score them.

Case by case: the mask, then the record that names it. So an interruption costs one case, and the
same weights segment none twice. The first stage of a cascade leaves its labels for the second.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ichseg.engine import torch_device, torch_engine
from ichseg.engine.arrays import FloatArray
from ichseg.engine.choose import choose_engine
from ichseg.engine.engine import Network, NetworkSpec
from ichseg.errors import DeviceFullError, PlansError, TrainingError
from ichseg.model import strict_json
from ichseg.model.plans import Configuration, Plans
from ichseg.predict import prepare, sliding_window
from ichseg.predict.dice import dice_of_masks
from ichseg.predict.prepare import Placement
from ichseg.predict.restore import one_hot, restore
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from ichseg.wording import clock
from training.crossval import cascade_labels, probabilities
from training.crossval import record as records
from training.data import dataset
from training.data.workspace import (
    LATEST_CHECKPOINT,
    VALIDATION_FILE,
    mask_file,
    probabilities_file,
)
from training.fit import history
from training.fit.checkpoint import load_checkpoint, weights_digest
from training.fit.fold_run import FoldRun
from training.scoring.ignored import leave_out
from training.store import chunks

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GridCase:
    """A case in a configuration's grid.

    Attributes:
        name: The case's name.
        channels: The case's images, one volume each.
        data: What the network is given, float32 ``(C, Z, Y, X)``.
        placement: Where the grid lies in the case.
    """

    name: str
    channels: tuple[Volume, ...]
    data: FloatArray
    placement: Placement


class _InterruptedError(Exception):
    """A signal came while a case was being segmented."""


def validate(
    workspace: Path, run: FoldRun, *, interrupted: Callable[[], bool] = lambda: False
) -> bool:
    """Segment the fold's validation cases with the latest weights, as inference does.

    Writes ``validation/<case>.nii.gz``, ``probabilities/<case>.npz`` and, after each case,
    ``validation.json``. What these weights have segmented already is not done again. If the
    configuration is the first stage of a cascade, its labels go to the second stage's store, as far
    as that holds the cases. Where several processes train together, each segments its share.

    Args:
        workspace: The folder that lists the cases.
        run: A trained fold.
        interrupted: Called after each batch of tiles; where it returns True, validation stops.

    Returns:
        Whether all cases were done.
    """
    path = run.folder / LATEST_CHECKPOINT
    weights = load_checkpoint(path, run.plans, run.configuration, run.cases)["network"]
    digest = weights_digest(weights)
    second = cascade_labels.following(run.plans, run.configuration.name)
    found, waiting = _begin(workspace, run, digest, second)
    data = dataset.load_dataset(workspace)
    cases = {case.name: case for case in data.labelled}
    network = load_network(run, weights)

    def stoppable(tiles: Iterable[Tensor]) -> Generator[Tensor]:
        for scores in network(tiles):
            if interrupted():
                raise _InterruptedError
            yield scores

    def store(given: GridCase, scores: Tensor) -> dict[str, float | None]:
        labels = _write_case(workspace, run, given, scores, second, digest)
        reference = volume.read(cases[given.name].reference).voxels
        return dice_of_labels(labels, reference, run.plans, data.ignore_label)

    began = told = time.monotonic()
    each = _overlapping([cases[n] for n in waiting], run, stoppable, store)
    try:
        for number, (name, scores) in enumerate(each, start=1):
            found = records.extended(run, found, {name: scores})
            records.write(run, found)
            now = time.monotonic()
            _log.info(
                "validation %d/%d  %s  Dice %s  %.1f s  ETA %s",
                number,
                len(waiting),
                name,
                _text(scores),
                now - told,
                clock((now - began) / number * (len(waiting) - number)),
            )
            told = now
    except _InterruptedError as stop:
        _log.info("validation: stopped at case %s", stop)
        run.group.all_done(done=False)
        return False
    if not run.group.all_done(done=True):
        return False
    if run.group.leads:
        found = records.join(run, found)
        _log.info("validation: mean Dice %s", _text(found.mean_dice))
    return True


def _begin(
    workspace: Path, run: FoldRun, digest: str, second: Sequence[Configuration]
) -> tuple[records.Validation, list[str]]:
    """Find what earlier calls have done, and the cases that are left to this process.

    What other weights than the latest have found is removed.

    Args:
        workspace: The folder that lists the cases.
        run: A trained fold.
        digest: The digest of its latest weights.
        second: The stages that follow in a cascade.
    """
    found = records.continued(run, digest)
    if run.group.count > 1:
        run.group.all_done(done=True)  # what is of other weights has gone now
        found = records.continued(run, digest)
    names = run.spec.validation[run.group.rank :: run.group.count]
    waiting = [name for name in names if not _is_done(workspace, run, found, second, name)]
    if run.group.count > 1:
        run.group.all_done(done=True)  # none writes before all know what is done
    if len(waiting) < len(names):
        done = len(names) - len(waiting)
        _log.info("validation: %d of %d cases are done already", done, len(names))
    for stage in second:
        _warn_of_missing(workspace, stage, names)
    return found, waiting


def _overlapping(
    cases: Sequence[dataset.Case],
    run: FoldRun,
    network: Network,
    store: Callable[[GridCase, Tensor], dict[str, float | None]],
) -> Iterator[tuple[str, dict[str, float | None]]]:
    """Names and scores of cases, in their order.

    While the network runs on a case, one thread reads the next one and another stores what was
    found in the one before.
    """
    threads: dict[str, Any] = {
        "initializer": torch.set_num_threads,
        "initargs": (torch.get_num_threads(),),
    }
    with (
        ThreadPoolExecutor(1, "reader", **threads) as reader,
        ThreadPoolExecutor(1, "writer", **threads) as writer,
    ):
        ahead = [reader.submit(prepare_case, case, run) for case in cases[:1]]
        behind: list[tuple[str, Future[dict[str, float | None]]]] = []
        for number, case in enumerate(cases):
            given = ahead.pop().result()
            ahead += [reader.submit(prepare_case, other, run) for other in cases[number + 1 :][:1]]
            stopped = False
            try:
                scores = predict_case(given, run, network)
            except _InterruptedError:
                stopped = True
            for name, stored in behind:
                yield name, stored.result()
            if stopped:
                raise _InterruptedError(case.name)
            behind = [(case.name, writer.submit(store, given, scores))]
            del given, scores
        for name, stored in behind:
            yield name, stored.result()


def is_validated(workspace: Path, run: FoldRun, weights: Mapping[str, Tensor]) -> bool:
    """Whether ``validate`` has done all cases with these weights, as this run asks for."""
    try:
        found = strict_json.load(records.Validation, run.folder / VALIDATION_FILE)
    except PlansError:  # none yet, or of another version
        return False
    mirrors = bool(run.validation_mirror_axes)
    if found.made_by != (weights_digest(weights), mirrors, run.plans.padding):
        return False
    second = cascade_labels.following(run.plans, run.configuration.name)
    return all(_is_done(workspace, run, found, second, name) for name in run.spec.validation)


def load_network(run: FoldRun, weights: Mapping[str, Tensor]) -> Network:
    """The fold's network, from tiles to what is averaged, run by who runs it in inference."""
    if run.device.type == "cpu":
        engine = choose_engine("cpu", threads=run.config.threads)
    else:
        engine = torch_engine.engine_on(run.device)
    spec = NetworkSpec(
        architecture=run.configuration.architecture,
        input_channels=run.plans.input_channels(run.configuration),
        scores=run.plans.scores,
        tile=run.configuration.tile,
        average=run.average,
    )
    network = engine.load(spec, {name: tensor.numpy() for name, tensor in weights.items()})
    return _on_tensors(network) if engine.kind == "openvino" else network


def _on_tensors(network: Network) -> Network:
    """A network of arrays for tiles that are tensors on the host; nothing is copied."""

    def on_tensors(tiles: Iterable[Tensor]) -> Generator[Tensor]:
        for scores in network(tile.numpy() for tile in tiles):
            yield torch.from_numpy(scores)

    return on_tensors


def segment_case(
    given: GridCase, run: FoldRun, network: Network
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Segment one case; the labels have the case's own grid, shape ``(z, y, x)``."""
    scores = predict_case(given, run, network)
    return restore([(scores, given.placement)], run.plans, average=run.average)


def prepare_case(case: dataset.Case, run: FoldRun) -> GridCase:
    """Read a case and bring it into the configuration's grid.

    The second stage of a cascade takes the labels of the first from the store.

    Raises:
        TrainingError: It is the second stage, and the first has not segmented the case.
    """
    channels = tuple(volume.read(path) for path in case.images)
    prepared = prepare.prepare(channels, run.plans, run.configuration)
    data = prepared.data
    if run.spec.previous_labels:
        data = with_first_stage(data, chunks.open_case(run.spec.folder, case.name), run)
    return GridCase(case.name, channels, data, prepared.placement)


def with_first_stage(data: FloatArray, case: chunks.StoredCase, run: FoldRun) -> FloatArray:
    """The channels of a case, and after them one for each label that the first stage found.

    Raises:
        TrainingError: The first stage has not segmented the case.
    """
    if case.previous is None:
        raise TrainingError(
            f"{run.spec.folder}: case {case.name} has no labels of the first stage; train that "
            "first"
        )
    return np.concatenate((data, one_hot(case.previous[:], run.spec.previous_labels)))


def predict_case(given: GridCase, run: FoldRun, network: Network) -> Tensor:
    """Scores ``(K, Z, Y, X)`` of a case in the configuration's grid, by one network.

    Args:
        given: From ``prepare_case``.
        run: The fold.
        network: The fold's network, see ``load_network``.
    """
    return predict_scores(given.data, run, network, run.validation_mirror_axes)


def predict_scores(
    data: FloatArray, run: FoldRun, network: Network, mirror_axes: Sequence[int]
) -> Tensor:
    """Scores ``(K, Z, Y, X)`` of a volume ``(C, Z, Y, X)`` in the configuration's grid.

    Args:
        data: What the network is given.
        run: The fold.
        network: The fold's network, see ``load_network``.
        mirror_axes: The axes over whose mirrorings scores are averaged.

    Returns:
        The scores, on the run's device; on the host where a GPU's memory does not hold them.
    """

    def added_up_on(device: torch.device) -> Tensor:
        scores = sliding_window.predict_tiled(
            network,
            torch.from_numpy(data).to(device),
            run.configuration.tile,
            mirror_axes=mirror_axes,
            padding=run.plans.padding,
        )
        assert isinstance(scores, Tensor)  # as the data are
        return scores

    if run.device.type == "cuda":
        with contextlib.suppress(DeviceFullError), torch_device.guard():
            return added_up_on(run.device)
    return added_up_on(torch.device("cpu"))


def dice_of_labels(
    labels: np.ndarray[Any, Any],
    reference: np.ndarray[Any, Any],
    planned: Plans,
    ignore_label: int | None,
) -> dict[str, float | None]:
    """The Dice of each foreground label or region, by name; None where neither mask has it.

    Args:
        labels: The labels that were found, shape ``(z, y, x)``.
        reference: The labels of the reference, of the same shape.
        planned: The plans, which name the labels.
        ignore_label: The value of the reference's voxels that do not count; None without any.
    """
    found, expected = leave_out(labels, reference, ignore_label)
    scores = {
        region.name: dice_of_masks(region.mask(found), region.mask(expected))
        for region in planned.foreground
    }
    return {name: None if math.isnan(score) else score for name, score in scores.items()}


def _write_case(
    workspace: Path,
    run: FoldRun,
    given: GridCase,
    scores: Tensor,
    second: Sequence[Configuration],
    digest: str,
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Write a case's mask, its probabilities and its labels for a second stage; gives the mask.

    All is computed where the scores are, or on the host where the GPU is full.
    """

    def written(scores: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        labels = restore([(scores, given.placement)], run.plans, average=run.average)
        path = probabilities_file(run.folder, given.name)
        probabilities.save(path, scores, regions=bool(run.plans.regions))
        volume.write(given.channels[0].with_voxels(labels), mask_file(run.folder, given.name))
        for stage in second:
            if cascade_labels.can_store(workspace, stage, given.name):
                cascade_labels.store_labels(
                    workspace,
                    run.plans,
                    stage,
                    given.name,
                    given.channels,
                    scores,
                    given.placement,
                    digest,
                )
        return labels

    with contextlib.suppress(DeviceFullError), torch_device.guard():
        return written(scores)
    return written(scores.cpu())


def _is_done(
    workspace: Path,
    run: FoldRun,
    record: records.Validation,
    second: Sequence[Configuration],
    name: str,
) -> bool:
    if name not in record.dice or not mask_file(run.folder, name).is_file():
        return False
    return all(
        cascade_labels.has_labels(workspace, stage, name, record.weights)
        for stage in second
        if cascade_labels.can_store(workspace, stage, name)
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


def _text(scores: Mapping[str, float | None]) -> str:
    return ", ".join(f"{label} {history.number(score).strip()}" for label, score in scores.items())
