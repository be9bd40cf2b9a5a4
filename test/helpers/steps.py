"""A batch for single steps of a training, and the weights that they are compared by."""

from __future__ import annotations

import numpy as np
import torch

from training.batches.stream import Batch
from training.fit.step import TrainingState


def some_batch() -> Batch:
    """Two samples of the tiny workspace's patch, always the same."""
    rng = np.random.default_rng(3)
    data = torch.from_numpy(rng.normal(size=(2, 1, 4, 16, 16)).astype(np.float32))
    return Batch(data, (data[:, 0] > 0.5).to(torch.int8))


def parameters(state: TrainingState) -> torch.Tensor:
    """A copy of all weights, one after another."""
    return torch.cat([p.detach().reshape(-1) for p in state.network.parameters()])
