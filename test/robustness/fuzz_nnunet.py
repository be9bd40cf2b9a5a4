"""Trained nnU-Net folders with values, tensors or bytes exchanged for others."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from helpers import nnunet_folders

HELPERS = Path(nnunet_folders.__file__).parent
Change = Callable[[bytes, random.Random], bytes]
_NETWORKS = json.loads((HELPERS / "nnunetv2_networks.json").read_text())["networks"]


def folder(home: Path, rng: random.Random, change_json: Change, change_bytes: Change) -> Path:
    """Write a model folder of which one to three things are not as nnU-Net leaves them.

    Args:
        home: Where.
        rng: Decides all.
        change_json: Exchanges values of a JSON file.
        change_bytes: Exchanges bytes of any file.
    """
    described = next(d for d in _NETWORKS if d["name"] == "residual_2d")
    described = described | {"input": [1, 1, 16, 24]}
    weights = nnunet_folders.weights(described)
    changes: dict[str, object] = {}
    files = [rng.choice(("plans.json", "dataset.json", "checkpoint", "tensor", "bytes"))]
    files += [rng.choice(("plans.json", "dataset.json")) for _ in range(rng.randrange(3))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of kinds of tensors that are new or old
        if "tensor" in files:
            name = rng.choice(sorted(weights))
            weights[name] = rng.choice(_TENSORS)(weights[name])
        if "checkpoint" in files:
            changes[rng.choice(_KEYS)] = rng.choice(_VALUES)
        model = nnunet_folders.write(
            home, described, "2d", **({"network_weights": weights} | changes)
        )
    for file in dict.fromkeys(files):
        path = model / file
        if file.endswith(".json"):
            path.write_bytes(change_json(path.read_bytes(), rng))
        elif file == "bytes":
            path = model / "fold_0" / "checkpoint_final.pth"
            path.write_bytes(change_bytes(path.read_bytes(), rng))
    return model


_KEYS = ("network_weights", "trainer_name", "init_args", "inference_allowed_mirroring_axes")
_VALUES: tuple[object, ...] = (
    None, -1, 10**400, float("nan"), "", "a\nb", "../../x", [], {}, [[]] * 3, (0, 0),
    (float("nan"),), {"configuration": "../x"}, {"configuration": 2}, {1: 2}, torch.zeros(2),
)  # fmt: skip
_TENSORS: tuple[Callable[[torch.Tensor], object], ...] = (
    lambda t: t.to_sparse(),
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda t: t.to("meta"),
    lambda t: t.to(torch.complex64),
    lambda t: t.bool(),
    lambda t: t * float("nan"),
    lambda t: t * 1e300,
    lambda t: torch.zeros(1).expand(10**6, 10**6),
    lambda t: t[..., :0],
    lambda t: t.reshape(-1),
    lambda t: t.half(),
    lambda t: [1.0],
)
