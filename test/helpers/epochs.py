"""Two epochs of a training, and what shows them."""

from __future__ import annotations

from pathlib import Path

import torch

from training.fit.configuration import TrainingConfig
from training.fit.history import EpochRow
from training.fit.progress import Watch

CPU = torch.device("cpu")
CONFIG = TrainingConfig(epochs=4, batches_per_epoch=8, validation_batches=2)
ROWS = (
    EpochRow(1, 0.5, 0.25, None, 3e-4, 12.5, 0.5, (None, None)),
    EpochRow(2, 0.25, 0.125, 0.75, 3e-4, 12.0, 0.0, (0.5, 1.0)),
)


def watch(folder: Path, config: TrainingConfig = CONFIG, **options: object) -> Watch:
    """What shows a training that leaves its files in a folder."""
    options = {"labels": ("edema", "tumour"), "title": "tiny, fold 0", "device": CPU} | options
    return Watch(folder, config=config, **options)
