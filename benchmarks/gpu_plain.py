"""Stands in for nnunetv2, which a GPU machine without network does not have, in plain torch.

Written apart from ``ichseg`` and ``training``; of a plan it takes what its JSON says. It does as
nnunetv2 does: contiguous tensors, fp16 autocast, compiled on CUDA, and on the CPU fp32 and not
compiled. In training the loss is scaled, and one batch lies on the device from the beginning: it is
spared reading, augmenting and waiting for data. In inference one tile goes at a time, each
mirroring is a pass of its own, sums are in half precision on the device, and one network follows
the other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional


def block(inputs: int, outputs: int, kernel: list[int], stride: list[int]) -> nn.Sequential:
    """Convolution, instance normalisation, leaky ReLU."""
    padding = [size // 2 for size in kernel]
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, kernel, stride, padding),
        nn.InstanceNorm3d(outputs, affine=True),
        nn.LeakyReLU(0.01, inplace=True),
    )


class PlainUNet(nn.Module):
    """A U-Net of two blocks a level, and a head at each level of the decoder."""

    def __init__(self, planned: dict[str, Any], channels: int, classes: int) -> None:
        super().__init__()
        features, kernels, strides = (planned[key] for key in ("features", "kernels", "strides"))
        inputs = [channels, *features[:-1]]
        levels = range(len(features))
        self.down = nn.ModuleList(
            nn.Sequential(
                block(inputs[i], features[i], kernels[i], strides[i]),
                block(features[i], features[i], kernels[i], [1, 1, 1]),
            )
            for i in levels
        )
        self.up, self.merge, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i in levels[:-1]:
            stride = strides[i + 1]
            self.up.append(nn.ConvTranspose3d(features[i + 1], features[i], stride, stride))
            self.merge.append(
                nn.Sequential(
                    block(2 * features[i], features[i], kernels[i], [1, 1, 1]),
                    block(features[i], features[i], kernels[i], [1, 1, 1]),
                )
            )
            self.heads.append(nn.Conv3d(features[i], classes, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits ``(B, K, Z, Y, X)``, finest first."""
        skips = []
        for level in self.down:
            x = level(x)
            skips.append(x)
        found = []
        for i in reversed(range(len(self.up))):
            x = self.merge[i](torch.cat((self.up[i](x), skips[i]), 1))
            found.append(self.heads[i](x))
        return found[::-1]


def loss_of(logits: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Cross-entropy less soft Dice of each sample; weights 1, 1/2, ..., none for the coarsest."""
    weights = [0.5**i for i in range(len(logits))]
    weights[-1] = 0.0 if len(weights) > 1 else 1.0
    total = logits[0].new_zeros((), dtype=torch.float32)
    for weight, scores, target in zip(weights, logits, targets, strict=True):
        if weight:
            probabilities = functional.softmax(scores.float(), 1)
            truth = functional.one_hot(target, scores.shape[1]).movedim(-1, 1)  # (B, K, Z, Y, X)
            hits = (probabilities * truth).sum((2, 3, 4))[:, 1:]
            both = (probabilities.sum((2, 3, 4)) + truth.sum((2, 3, 4)))[:, 1:]
            dice = ((2 * hits + 1e-5) / (both + 1e-5).clip(1e-8)).mean()
            total = total + weight * (functional.cross_entropy(scores, target) - dice)
    return total / sum(weights)


class Trainer:
    """A network, its optimiser, and the one batch."""

    def __init__(self, plan: Mapping[str, Any], device: torch.device) -> None:
        """Draw network and batch.

        Args:
            plan: The content of ``plans.json``.
            device: Where the network trains.
        """
        planned = next(c for c in plan["configurations"] if c["name"] == "3d_fullres")
        batch, patch = planned["batch"], planned["patch"]
        classes, channels = len(plan["labels"]), len(plan["channels"])
        torch.manual_seed(0)
        self.device = device
        self.network: Any = PlainUNet(planned["architecture"], channels, classes).to(device)
        self.optimiser = torch.optim.SGD(
            self.network.parameters(), lr=0.01, momentum=0.99, nesterov=True, weight_decay=3e-5
        )
        self.data = torch.randn(batch, channels, *patch, device=device)
        with torch.no_grad():
            sizes = [scores.shape[2:] for scores in self.network(self.data)]
        labels = torch.randint(0, classes, (batch, 1, *patch), device=device).float()
        self.targets = [functional.interpolate(labels, size)[:, 0].long() for size in sizes]
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")

    def compile(self) -> None:
        """Compile the network from now on."""
        self.network = torch.compile(self.network)

    def step(self) -> float:
        """Train one iteration; its loss."""
        self.optimiser.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            loss = loss_of(self.network(self.data), self.targets)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimiser)
        nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return loss.item()


class Predictor:
    """One network, which takes the weights of each fold in turn."""

    def __init__(self, plan: Mapping[str, Any], device: torch.device) -> None:
        """Build the network.

        Args:
            plan: The content of ``plans.json``.
            device: Where it runs.
        """
        (planned,) = plan["configurations"]
        self.patch, self.device = planned["patch"], device
        self.scheme = plan["normalisations"][0]
        plain = PlainUNet(planned["architecture"], len(plan["channels"]), len(plan["labels"]))
        for level in range(1, len(plain.heads)):  # only training needs them
            plain.heads[level] = nn.Identity()
        self.plain = plain.to(device).eval()
        self.network: Any = self.plain

    def compile(self) -> None:
        """Compile the network from now on."""
        self.network = torch.compile(self.plain)

    def segment(
        self, voxels: npt.NDArray[Any], folds: Iterable[Mapping[str, Tensor]]
    ) -> tuple[npt.NDArray[np.uint8], int]:
        """Find the labels ``(z, y, x)`` of a scan that needs no resampling.

        Args:
            voxels: Its HU, ``(z, y, x)``.
            folds: The tensors of each fold, named as those of ``ichseg.model.network``.

        Returns:
            The labels, and the number of forward passes.
        """
        data = normalised(voxels, self.scheme)
        total, passes = None, 0
        for state in folds:
            found = renamed(state).items()
            self.plain.load_state_dict(
                {name: t for name, t in found if not name.startswith("heads.") or "heads.0" in name}
            )
            logits, count = self._logits(data)
            total = logits if total is None else total + logits
            passes += count
        assert total is not None
        labels: npt.NDArray[np.uint8] = total.argmax(0).to("cpu", torch.uint8).numpy()
        return labels, passes

    @torch.inference_mode()
    def _logits(self, data: Tensor) -> tuple[Tensor, int]:
        """The weighted mean of the logits of all tiles, each averaged over its mirrorings."""
        shape, device = data.shape[1:], self.device
        starts = [
            np.rint(np.linspace(0, n - tile, 1 + math.ceil((n - tile) / (tile / 2)))).astype(int)
            for n, tile in zip(shape, self.patch, strict=True)
        ]
        weight = torch.from_numpy(importance(self.patch)).to(device, torch.half)
        data = data.to(device)
        sums = torch.zeros((2, *shape), dtype=torch.half, device=device)
        weights = torch.zeros(shape, dtype=torch.half, device=device)
        flips = [c for n in range(4) for c in itertools.combinations((2, 3, 4), n)]
        passes = 0
        for corner in itertools.product(*starts):
            where = tuple(slice(a, a + n) for a, n in zip(corner, self.patch, strict=True))
            # strides as those of a mirrored one, else it is compiled a second time for these
            tile = data[(slice(None), *where)][None].contiguous()
            found = None
            for axes in flips:
                with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
                    logits = self.network(tile.flip(axes) if axes else tile)[0]
                logits = logits.flip(axes) if axes else logits
                found = logits if found is None else found + logits
                passes += 1
            assert found is not None
            sums[(slice(None), *where)] += (found[0] / len(flips)).half() * weight
            weights[where] += weight
        return sums / weights, passes


def normalised(voxels: npt.NDArray[Any], scheme: Mapping[str, Any]) -> Tensor:
    """The CT clipped and brought to mean 0 and deviation 1; ``(1, z, y, x)``."""
    clipped = np.clip(voxels.astype(np.float32), scheme["clip_low"], scheme["clip_high"])
    return torch.from_numpy((clipped - scheme["mean"]) / max(scheme["deviation"], 1e-8))[None]


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that ``PlainUNet`` has for them."""
    parts = {"encoder": "down", "decoder": "merge", "upsampling": "up", "heads": "heads"}
    layers = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1"}  # convolution, norm, and again
    found = {}
    for name, tensor in state.items():
        part, level, *layer, kind = name.split(".")
        found[".".join((parts[part], level, *(layers[key] for key in layer), kind))] = tensor
    return found


def importance(patch: Sequence[int]) -> npt.NDArray[np.float32]:
    """A Gaussian of an eighth of the tile, 10 at its centre, never 0 in half precision."""
    point = np.zeros(patch)
    point[tuple(size // 2 for size in patch)] = 1
    bell = ndimage.gaussian_filter(point, [size / 8 for size in patch], mode="constant")
    bell = (bell / bell.max() * 10).astype(np.float16)
    return np.maximum(bell, bell[bell > 0].min()).astype(np.float32)
