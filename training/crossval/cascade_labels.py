"""From the first stage of a cascade to the second: labels of networks that had not seen the case.

Each fold of the first stage segments its validation cases, at the end of its training. Together the
folds segment all cases, and every case by a network that was not trained on it: on such labels the
second stage trains, and with them it is validated. They lie in the store, in the second stage's
grid, beside the case.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ichseg.errors import TrainingError
from ichseg.model.plans import Configuration, Plans
from ichseg.predict.prepare import Placement, place
from ichseg.predict.restore import regrid
from ichseg.scan.volume import Volume
from training.data import splits
from training.data.workspace import preprocessed_folder
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

    Raises:
        DatasetError: The case has not been preprocessed for the second stage, or on another grid.
    """
    wanted = place(channels, plans, configuration)
    labels = regrid(scores, placement, wanted, plans)
    chunks.write_previous(preprocessed_folder(workspace, configuration.name), name, labels)


def has_labels(workspace: Path, configuration: Configuration, name: str) -> bool:
    """Whether the store holds the first stage's labels of a case."""
    folder = preprocessed_folder(workspace, configuration.name)
    return chunks.is_complete(folder, name) and chunks.open_case(folder, name).previous is not None


def can_store(workspace: Path, configuration: Configuration, name: str) -> bool:
    """Whether a case has been preprocessed for the second stage."""
    return chunks.is_complete(preprocessed_folder(workspace, configuration.name), name)


def require_labels(
    workspace: Path, configuration: Configuration, needed: Sequence[str], names: Sequence[str]
) -> None:
    """Refuse the second stage while cases lack labels of the first, and say how to get them.

    Args:
        workspace: The folder with the store and the splits.
        configuration: The second stage.
        needed: The names of the cases that must have labels.
        names: The names of all labelled cases.

    Raises:
        TrainingError: Cases lack labels; names the folds and the commands that make them.
    """
    first, second = configuration.previous_stage, configuration.name
    unstored = [name for name in needed if not can_store(workspace, configuration, name)]
    if unstored:
        raise TrainingError(
            f"{preprocessed_folder(workspace, second)}: {len(unstored)} of {len(needed)} cases are "
            f"not there, such as {unstored[0]}; run `preprocess {second}` first"
        )
    missing = {name for name in needed if not has_labels(workspace, configuration, name)}
    if not missing:
        return
    folds = splits.find_splits(workspace, names)
    numbers = [str(k) for k, split in enumerate(folds) if missing & set(split.validation)]
    if not numbers:
        raise TrainingError(
            f"{second}: no fold validates case {min(missing)}, so {first} cannot segment it unseen"
        )
    raise TrainingError(
        f"{second}: {len(missing)} of {len(needed)} cases lack the labels of {first}, which its "
        f"folds {', '.join(numbers)} have yet to make; run "
        f"`train {first} --fold K` for each (one that is trained only validates)"
    )
