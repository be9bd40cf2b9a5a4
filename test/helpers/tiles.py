"""What a network makes of tiles."""

from __future__ import annotations

import numpy as np


def scored(network, tiles):
    """The scores of all tiles; each batch is copied before the next one is asked for."""
    return np.concatenate([
        batch.copy() if isinstance(batch, np.ndarray) else batch.cpu().numpy()
        for batch in network(iter(tiles))
    ])  # fmt: skip
