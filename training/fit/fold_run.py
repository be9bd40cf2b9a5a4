"""One fold of one configuration in a workspace: its cases, its folder, its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ichseg.engine import torch_engine
from ichseg.errors import TrainingError
from ichseg.model import plans, strict_json
from ichseg.model.plans import Configuration, Plans
from training.batches.sampling import BatchSpec
from training.crossval import cascade_labels
from training.data import dataset, splits
from training.data.workspace import ALL_FOLD, plans_file, preprocessed_folder, run_folder
from training.fit.configuration import TrainingConfig
from training.fit.process_group import ALONE, Peers

SCHEMA_VERSION = 2
_ALL_FOLD_NUMBER = 1_000_000


@dataclass(frozen=True, slots=True)
class FoldRun:
    """What stays the same throughout a run.

    Attributes:
        folder: Of the run.
        plans, configuration, config: What the data decided, and what the user chose.
        spec: Of the batches.
        device: Where the network trains.
        peers: The processes that train this fold together.
    """

    folder: Path
    plans: Plans
    configuration: Configuration
    config: TrainingConfig
    spec: BatchSpec
    device: torch.device
    peers: Peers = ALONE

    @property
    def precision(self) -> str:
        """``fp32``, ``bf16`` or ``fp16``."""
        if self.config.precision == "auto":
            return "fp16" if self.device.type == "cuda" else "fp32"
        return self.config.precision

    @property
    def layout(self) -> torch.memory_format:
        """Memory format of network and data."""
        if self.config.memory_format == "contiguous":
            return torch.contiguous_format
        return torch.channels_last if len(self.spec.patch) == 2 else torch.channels_last_3d


def open_run(
    workspace: Path, configuration: str, fold: str, config: TrainingConfig, peers: Peers = ALONE
) -> FoldRun:
    """Collect what a run needs from the workspace.

    Raises:
        IchsegError: Something is missing, the fold is unknown, or fp16 is asked for on the CPU.
    """
    device = torch_engine.choose_device(config.device)
    if config.precision == "fp16" and device.type == "cpu":
        raise TrainingError("precision fp16 on the CPU, expected fp32, bf16 or auto there")
    planned = plans.load(plans_file(workspace))
    chosen = planned.configuration(configuration)
    names = [case.name for case in dataset.load_dataset(workspace).labelled]
    if fold == ALL_FOLD:
        number, split = _ALL_FOLD_NUMBER, splits.Split(tuple(names), tuple(names))
    else:
        folds = splits.load_or_make_splits(workspace, names)
        if not fold.isdecimal() or int(fold) >= len(folds):
            raise TrainingError(f"fold {fold!r}, expected 0 to {len(folds) - 1}, or {ALL_FOLD}")
        number, split = int(fold), folds[int(fold)]
    previous_labels = 0
    if chosen.previous_stage is not None:
        needed = sorted({*split.train, *split.validation})
        cascade_labels.require_labels(workspace, chosen, needed, names)
        previous_labels = len(planned.labels) - 1
    spec = BatchSpec(
        folder=preprocessed_folder(workspace, configuration),
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
        centre_jitter=config.centre_jitter,
        previous_labels=previous_labels,
        share=(peers.rank, peers.count),
    )
    return FoldRun(
        folder=run_folder(workspace, configuration, fold),
        plans=planned,
        configuration=chosen,
        config=config,
        spec=spec,
        device=device,
        peers=peers,
    )


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
    if found != strict_json.dumps(configuration):
        raise TrainingError(
            f"{path}: of other plans than {configuration.name} has now; begin anew with --restart"
        )
    return raw
