"""One fold of one configuration in a workspace: its cases, its settings, its folder."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ichseg.engine import torch_device
from ichseg.errors import PlansError, TrainingError
from ichseg.model.plans import Configuration, Plans
from training.batches.sampling import BatchSpec
from training.data import dataset, splits
from training.data.splits import Split
from training.data.workspace import (
    ALL_FOLD,
    CONFIG_FILE,
    hard_examples_file,
    preprocessed_folder,
    run_folder,
)
from training.fit.configuration import TrainingConfig, differences, load_settings
from training.fit.process_group import ALONE, ProcessGroup
from training.planning.memory import training_bytes
from training.planning.planned import load_plans, what_is_averaged

_ALL_FOLD_NUMBER = 1_000_000


@dataclass(frozen=True, slots=True)
class FoldRun:
    """What stays the same throughout a run.

    Attributes:
        folder: Where the run leaves its files.
        fold: The fold's number, or ``all``.
        plans: What the data decided.
        configuration: The one of the plans' configurations that is trained.
        config: What the user chose.
        spec: What the fold's batches have in common; it names the fold's cases.
        device: Where the network trains.
        ignore_label: The label of voxels that count neither in the loss nor in Dice; None where
            there is none.
        sources: For each stored case a digest of the files that it was made from; empty where that
            is not known.
        first_stage: For each case of a cascade's second stage a digest of the first-stage weights
            whose labels it is trained on; empty for other configurations.
        group: The processes that train this fold together.
    """

    folder: Path
    fold: str
    plans: Plans
    configuration: Configuration
    config: TrainingConfig
    spec: BatchSpec
    device: torch.device
    ignore_label: int | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    first_stage: Mapping[str, str] = field(default_factory=dict)
    group: ProcessGroup = ALONE

    @property
    def cases(self) -> Split:
        """The fold's cases."""
        return Split(self.spec.train, self.spec.validation)

    @property
    def average(self) -> str:
        """What is averaged over tiles and mirrorings: ``probabilities`` or ``logits``."""
        return what_is_averaged(self.plans)

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        """The axes, 0 to 2, that training mirrors, so that prediction may average over them."""
        if self.config.augmentation.mirror_probability == 0:
            return ()
        return tuple(range(3 - self.configuration.architecture.dimensions, 3))

    @property
    def validation_mirror_axes(self) -> tuple[int, ...]:
        """Those of them that validation averages over."""
        return self.mirror_axes if self.config.validation_mirrors else ()

    @property
    def precision(self) -> str:
        """``fp32``, ``bf16`` or ``fp16``."""
        if self.config.precision != "auto":
            return self.config.precision
        if self.device.type == "cpu":
            return "bf16" if torch_device.cpu_computes_bf16() else "fp32"
        return "bf16" if torch_device.gpu_computes_bf16() else "fp16"

    @property
    def compiles(self) -> bool:
        """Whether ``torch.compile`` is tried; by itself not where no timing may decide."""
        if self.config.compile is None:
            return self.device.type == "cuda" and not self.config.deterministic
        return self.config.compile

    @property
    def layout(self) -> torch.memory_format:
        """Memory format of the network and of the data."""
        if self.config.memory_format == "contiguous":
            return torch.contiguous_format
        return torch.channels_last if len(self.spec.patch) == 2 else torch.channels_last_3d


def open_run(
    workspace: Path,
    configuration: str,
    fold: str,
    config: TrainingConfig,
    group: ProcessGroup = ALONE,
) -> FoldRun:
    """Collect what a run needs from the workspace.

    Args:
        workspace: With dataset, plans and splits.
        configuration: Such as ``3d_fullres``.
        fold: Index into the splits, or ``all`` to train on every case.
        config: What the user chose.
        group: The processes that train this fold together.

    Raises:
        IchsegError: Something is missing, the fold is unknown, or fp16 is asked for on the CPU, or
            bf16 on a GPU that does not compute in it.
    """
    device = torch_device.choose_device(config.device)
    if config.precision == "fp16" and device.type == "cpu":
        raise TrainingError("precision fp16 on the CPU, expected fp32, bf16 or auto there")
    on_gpu = device.type == "cuda"
    if config.precision == "bf16" and on_gpu and not torch_device.gpu_computes_bf16():
        raise TrainingError(
            f"precision bf16: {torch.cuda.get_device_name(device)} does not compute in it, "
            "expected fp16, fp32 or auto there"
        )
    planned = load_plans(workspace)
    chosen = planned.configuration(configuration)
    listed = dataset.load_dataset(workspace)
    names = [case.name for case in listed.labelled]
    if fold == ALL_FOLD:
        number, split = _ALL_FOLD_NUMBER, splits.Split(tuple(names), tuple(names))
    else:
        folds = splits.load_or_make_splits(workspace, names)
        if fold not in map(str, range(len(folds))):
            raise TrainingError(f"fold {fold!r}, expected 0 to {len(folds) - 1}, or {ALL_FOLD}")
        number, split = int(fold), folds[int(fold)]
    folder = run_folder(workspace, configuration, fold)
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
        lesion_fraction=config.lesion_fraction,
        hard_fraction=config.hard_fraction,
        hard_examples=hard_examples_file(folder) if config.hard_fraction else None,
        regions=planned.region_labels,
        previous_labels=0 if chosen.previous_stage is None else len(planned.labels) - 1,
        share=(group.rank, group.count),
        training_bytes=training_bytes(planned, chosen, group.count),
    )
    return FoldRun(
        folder=folder,
        fold=fold,
        plans=planned,
        configuration=chosen,
        config=config,
        spec=spec,
        device=device,
        ignore_label=listed.ignore_label,
        group=group,
    )


def changed_settings(run: FoldRun) -> list[tuple[str, Any, Any]]:
    """Name, value and former value of each setting that is another than in the run so far.

    There are none where nothing has been trained, or by a version with other settings.
    """
    with contextlib.suppress(PlansError):
        before = load_settings(run.folder / CONFIG_FILE)
        return list(differences(run.config, before))
    return []
