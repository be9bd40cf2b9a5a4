"""From the first stage of a cascade to the second: labels of networks that had not seen the case.

Each fold of the first stage segments its validation cases, at the end of its training. Together the
folds segment all cases, and every case by a network that was not trained on it: on such labels the
second stage trains, and with them it is validated. They lie in the store, in the second stage's
grid, beside the case, and say which weights found them: those of a first stage that has been
trained further or anew since are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ichseg.errors import TrainingError
from ichseg.model.plans import Configuration, Plans
from ichseg.predict.prepare import Placement, place
from ichseg.predict.restore import regrid
from ichseg.scan.volume import Volume
from training.data import dataset, splits
from training.data.workspace import LATEST_CHECKPOINT, preprocessed_folder, run_folder, run_folders
from training.fit.checkpoint import digest_of
from training.store import chunks


def following(plans: Plans, name: str) -> tuple[Configuration, ...]:
    """The second stages of the configuration of this name; without a cascade there are none."""
    return tuple(c for c in plans.configurations if c.previous_stage == name)


def store_labels(
    workspace: Path,
    plans: Plans,
    configuration: Configuration,
    name: str,
    channels: Sequence[Volume],
    scores: Tensor,
    placement: Placement,
    weights: str,
) -> None:
    """Store what the first stage found in a case, for the second.

    Args:
        workspace: The folder where the case has been preprocessed for the second stage.
        plans: The plans that have both stages.
        configuration: The second stage.
        name: The case's name.
        channels: The case's images, one volume each.
        scores: The first stage's scores of each voxel, shape ``(K, Z, Y, X)``, in its own grid.
        placement: Where that grid lies in the case.
        weights: The digest of the first stage's weights, see ``checkpoint.weights_digest``.

    Raises:
        DatasetError: The case has not been preprocessed for the second stage, or on another grid.
    """
    wanted = place(channels, plans, configuration)
    labels = regrid(scores, placement, wanted, plans)
    chunks.write_previous(preprocessed_folder(workspace, configuration.name), name, labels, weights)


def has_labels(workspace: Path, configuration: Configuration, name: str, weights: str) -> bool:
    """Whether the store holds what first-stage weights of this digest found in a case."""
    return _weights_noted(workspace, configuration, name) == weights


def can_store(workspace: Path, configuration: Configuration, name: str) -> bool:
    """Whether a case has been preprocessed for the second stage."""
    return chunks.is_complete(preprocessed_folder(workspace, configuration.name), name)


def require_labels(
    workspace: Path, plans: Plans, configuration: Configuration, needed: Sequence[str]
) -> None:
    """Refuse the second stage while cases lack labels of the first as it is now; say what to do.

    Where a fold of the first stage has been removed, the labels that it left are taken as they are.

    Args:
        workspace: The folder with the store, the splits and the first stage's runs.
        plans: The plans that have both stages.
        configuration: The second stage.
        needed: The names of the cases that must have labels.

    Raises:
        TrainingError: Cases lack labels, or have those of other weights; names the folds and the
            commands that make them.
    """
    first, second = configuration.previous_stage, configuration.name
    unstored = [name for name in needed if not can_store(workspace, configuration, name)]
    if unstored:
        raise TrainingError(
            f"{preprocessed_folder(workspace, second)}: {len(unstored)} of {len(needed)} cases are "
            f"not there, such as {unstored[0]}; run `preprocess {second}` first"
        )
    noted = {name: _weights_noted(workspace, configuration, name) for name in needed}
    again = f"run `train {first} --fold K` for each (one that is trained only validates)"
    if missing := {name for name, weights in noted.items() if weights is None}:
        folds = enumerate(splits.find_splits(workspace, _labelled(workspace)))
        numbers = [str(k) for k, split in folds if missing & set(split.validation)]
        if not numbers:
            raise TrainingError(
                f"{second}: no fold validates case {min(missing)}, so {first} cannot segment it "
                "unseen"
            )
        raise TrainingError(
            f"{second}: {len(missing)} of {len(needed)} cases lack the labels of {first}, which "
            f"its folds {', '.join(numbers)} have yet to make; {again}"
        )
    now = _first_stage_weights(workspace, plans, configuration)
    other = [name for name in needed if name in now and noted[name] != now[name].weights]
    if other:
        numbers = sorted({now[name].fold for name in other})
        raise TrainingError(
            f"{second}: {len(other)} of {len(needed)} cases, such as {other[0]}, have labels of "
            f"other weights than {first} has now in its folds {', '.join(numbers)}; {again}"
        )


def weights_of_labels(
    workspace: Path, configuration: Configuration, names: Iterable[str]
) -> dict[str, str]:
    """The digests of the first-stage weights whose labels the store holds, by case."""
    found = {name: _weights_noted(workspace, configuration, name) for name in names}
    return {name: weights for name, weights in found.items() if weights}


def require_same_first_stage(
    workspace: Path,
    plans: Plans,
    configuration: Configuration,
    path: Path,
    checkpoint: Mapping[str, Any],
) -> None:
    """Refuse a second stage that was trained on labels of weights that its first no longer has.

    Args:
        workspace: See ``of_other_first_stage``, as for the next two and the last.
        plans: The plans that have both stages.
        configuration: The configuration that was trained.
        path: Its checkpoint.
        checkpoint: What that holds.

    Raises:
        TrainingError: The first stage has been trained further or anew since.
    """
    if other := of_other_first_stage(workspace, plans, configuration, checkpoint):
        raise TrainingError(
            f"{path}: was trained on labels of {configuration.previous_stage} of which "
            f"{len(other)} of {len(checkpoint['first_stage'])}, such as that of {other[0]}, are of "
            f"other weights than its folds have now; put those back, or begin {configuration.name} "
            "anew with --restart"
        )


def of_other_first_stage(
    workspace: Path, plans: Plans, configuration: Configuration, checkpoint: Mapping[str, Any]
) -> list[str]:
    """The cases on labels of which a second stage was trained whose first has other weights now.

    Args:
        workspace: The folder with the splits and the first stage's runs.
        plans: The plans that have both stages.
        configuration: The configuration that was trained; of any but a second stage there are none.
        checkpoint: Its checkpoint. Older ones do not say on which labels they were trained.
    """
    seen: Mapping[str, str] = checkpoint.get("first_stage", {})
    if configuration.previous_stage is None or not seen:
        return []
    now = _first_stage_weights(workspace, plans, configuration)
    return [name for name in sorted(seen) if name in now and now[name].weights != seen[name]]


@dataclass(frozen=True, slots=True)
class _Stranger:
    """The fold of the first stage that has not seen a case, and the digest of its weights."""

    fold: str
    weights: str


def _first_stage_weights(
    workspace: Path, plans: Plans, configuration: Configuration
) -> dict[str, _Stranger]:
    """Who segments each case for the second stage, as far as folds have weights.

    Raises:
        TrainingError: A checkpoint of the first stage is damaged, or of other plans or cases.
    """
    assert configuration.previous_stage is not None
    first = plans.configuration(configuration.previous_stage)
    found: dict[str, _Stranger] = {}
    if not run_folders(workspace, first.name):
        return found
    for number, split in enumerate(splits.find_splits(workspace, _labelled(workspace))):
        path = run_folder(workspace, first.name, str(number)) / LATEST_CHECKPOINT
        if path.exists():
            weights = digest_of(path, plans, first, split)
            found |= {name: _Stranger(str(number), weights) for name in split.validation}
    return found


def _labelled(workspace: Path) -> list[str]:
    return [case.name for case in dataset.load_dataset(workspace).labelled]


def _weights_noted(workspace: Path, configuration: Configuration, name: str) -> str | None:
    """The digest that a case's stored labels have; empty if none is noted, None without labels."""
    folder = preprocessed_folder(workspace, configuration.name)
    if not chunks.is_complete(folder, name):
        return None
    case = chunks.open_case(folder, name)
    return None if case.previous is None else case.previous_weights
