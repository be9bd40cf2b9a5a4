"""Stands in for ``nnUNetv2_predict`` where it cannot be installed: tiles in plain torch.

    python benchmarks/gpu_plain_predict.py BUNDLE SCAN.nii.gz MASK.nii.gz --device cuda

Works as nnunetv2 does: one tile at a time, each mirroring a pass of its own, fp16 autocast on CUDA,
sums in half precision on the device, one network after the other. It only takes scans that need no
resampling. Written apart from ``ichseg``; reads its bundle, whose tensors have the names of
``ichseg.model.network``, into a network of its own. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from gpu_plain import PlainUNet
from safetensors.torch import load_file
from scipy import ndimage
from torch import nn


def main() -> int:
    """Segment the scan and write its mask."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("scan", type=Path)
    parser.add_argument("mask", type=Path)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True  # as nnunetv2 sets it
    model = json.loads((args.bundle / "model.json").read_text())
    plans = model["plans"]
    (planned,) = plans["configurations"]
    scan = sitk.ReadImage(str(args.scan))
    data = normalised(sitk.GetArrayFromImage(scan), plans["normalisations"][0])
    total, passes = None, 0
    for member in model["members"]:
        network = PlainUNet(planned["architecture"], len(plans["channels"]), len(plans["labels"]))
        take(network, load_file(args.bundle / member["file"]))
        logits, count = predict(network.to(device).eval(), data, planned["patch"], device)
        total = logits if total is None else total + logits
        passes += count
    assert total is not None
    mask = sitk.GetImageFromArray(total.argmax(0).to("cpu", torch.uint8).numpy())
    mask.CopyInformation(scan)
    sitk.WriteImage(mask, str(args.mask))
    print(json.dumps({"passes": passes}))
    return 0


def normalised(voxels: np.ndarray, scheme: dict[str, Any]) -> torch.Tensor:
    """The CT clipped and brought to mean 0 and deviation 1; ``(1, z, y, x)``."""
    clipped = np.clip(voxels.astype(np.float32), scheme["clip_low"], scheme["clip_high"])
    return torch.from_numpy((clipped - scheme["mean"]) / max(scheme["deviation"], 1e-8))[None]


def take(network: PlainUNet, state: dict[str, torch.Tensor]) -> None:
    """Load the bundle's tensors, and leave out the heads that only training needs."""
    parts = {"encoder": "down", "decoder": "merge", "upsampling": "up", "heads": "heads"}
    layers = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1"}  # convolution, norm, and again
    renamed = {}
    for name, tensor in state.items():
        part, level, *layer, kind = name.split(".")
        renamed[".".join((parts[part], level, *(layers[key] for key in layer), kind))] = tensor
    network.load_state_dict(renamed)
    for level in range(1, len(network.heads)):
        network.heads[level] = nn.Identity()


@torch.inference_mode()
def predict(
    network: PlainUNet, data: torch.Tensor, patch: list[int], device: torch.device
) -> tuple[torch.Tensor, int]:
    """The weighted mean of the logits of all tiles, each averaged over its mirrorings."""
    shape = data.shape[1:]
    starts = [
        np.rint(np.linspace(0, size - tile, 1 + math.ceil((size - tile) / (tile / 2)))).astype(int)
        for size, tile in zip(shape, patch, strict=True)
    ]
    weight = torch.from_numpy(importance(patch)).to(device, torch.half)
    data = data.to(device)
    sums = torch.zeros((2, *shape), dtype=torch.half, device=device)
    weights = torch.zeros(shape, dtype=torch.half, device=device)
    flips = [c for n in range(4) for c in itertools.combinations((2, 3, 4), n)]
    passes = 0
    for corner in itertools.product(*starts):
        where = tuple(slice(a, a + n) for a, n in zip(corner, patch, strict=True))
        tile = data[(slice(None), *where)][None]
        found = None
        for axes in flips:
            with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
                logits = network(tile.flip(axes) if axes else tile)[0]
            logits = logits.flip(axes) if axes else logits
            found = logits if found is None else found + logits
            passes += 1
        assert found is not None
        sums[(slice(None), *where)] += (found[0] / len(flips)).half() * weight
        weights[where] += weight
    return sums / weights, passes


def importance(patch: list[int]) -> np.ndarray:
    """A Gaussian of an eighth of the tile, 10 at its centre, never 0."""
    point = np.zeros(patch)
    point[tuple(size // 2 for size in patch)] = 1
    bell = ndimage.gaussian_filter(point, [size / 8 for size in patch], mode="constant")
    bell = bell / bell.max() * 10
    return np.maximum(bell, bell[bell > 0].min()).astype(np.float32)


if __name__ == "__main__":
    sys.exit(main())
