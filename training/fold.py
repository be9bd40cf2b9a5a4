"""One fold of one configuration in a workspace: its cases, its folder, its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ichseg import engine, plans, schema
from ichseg.errors import TrainingError
from ichseg.plans import Configuration, Plans
from training import dataset, splits
from training.config import TrainingConfig
from training.sampling import BatchSpec

SCHEMA_VERSION = 1
LATEST, BEST = "checkpoint_latest.pt", "checkpoint_best.pt"
ALL_FOLD = "all"
_ALL_FOLD_NUMBER = 1_000_000


@dataclass(frozen=True, slots=True)
class FoldRun:
    """What stays the same throughout a run.

    Attributes:
        folder: Of the run.
        plans, configuration, config: What the data decided, and what the user chose.
        spec: Of the batches.
        device: Where the network trains.
    """

    folder: Path
    plans: Plans
    configuration: Configuration
    config: TrainingConfig
    spec: BatchSpec
    device: torch.device

    @property
    def layout(self) -> torch.memory_format:
        """Memory format of network and data."""
        if self.config.memory_format == "contiguous":
            return torch.contiguous_format
        return torch.channels_last if len(self.spec.patch) == 2 else torch.channels_last_3d


def open_run(workspace: Path, configuration: str, fold: str, config: TrainingConfig) -> FoldRun:
    """Collect what a run needs from the workspace.

    Raises:
        IchsegError: Something is missing, or the fold is unknown.
    """
    planned = plans.load(workspace / "plans.json")
    chosen = planned.configuration(configuration)
    if chosen.previous_stage is not None:
        raise TrainingError(
            f"{configuration}: training a cascade's second stage is not possible yet"
        )
    names = [case.name for case in dataset.load_dataset(workspace).labelled]
    if fold == ALL_FOLD:
        number, split = _ALL_FOLD_NUMBER, splits.Split(tuple(names), tuple(names))
    else:
        folds = splits.load_or_make_splits(workspace, names)
        if not fold.isdecimal() or int(fold) >= len(folds):
            raise TrainingError(f"fold {fold!r}, expected 0 to {len(folds) - 1}, or {ALL_FOLD}")
        number, split = int(fold), folds[int(fold)]
    spec = BatchSpec(
        folder=workspace / "preprocessed" / configuration,
        train=split.train,
        validation=split.validation,
        patch=chosen.patch,
        batch=chosen.batch,
        in_plane=chosen.dummy_2d,
        masked=tuple(n.masked for n in planned.normalisations),
        foreground_fraction=config.foreground_fraction,
        augmentation=config.augmentation,
        seed=config.seed,
        fold=number,
    )
    return FoldRun(
        folder=run_folder(workspace, configuration, fold),
        plans=planned,
        configuration=chosen,
        config=config,
        spec=spec,
        device=engine.choose_device(config.device),
    )


def run_folder(workspace: Path, configuration: str, fold: str) -> Path:
    """Where a fold's run lies."""
    return workspace / "runs" / configuration / f"fold_{fold}"


def load_checkpoint(
    path: Path, configuration: Configuration, device: torch.device | None = None
) -> dict[str, Any]:
    """Read a checkpoint of this configuration.

    Raises:
        TrainingError: Missing, damaged, or of another configuration.
    """
    try:
        raw: dict[str, Any] = torch.load(path, map_location=device or "cpu", weights_only=True)
        found, version = raw["configuration"], raw["schema_version"]
    except FileNotFoundError as error:
        raise TrainingError(f"{path}: no such file; run `train` first") from error
    except Exception as error:  # torch raises a dozen types on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(f"{path}: damaged or not a checkpoint ({reason})") from error
    if version != SCHEMA_VERSION:
        raise TrainingError(
            f"{path}: checkpoint schema {version!r}, this code reads {SCHEMA_VERSION}"
        )
    if found != schema.dumps(configuration):
        raise TrainingError(
            f"{path}: of other plans than {configuration.name} has now; begin anew with --restart"
        )
    return raw
