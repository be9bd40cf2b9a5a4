"""Stands in for nnunetv2 where it cannot be installed: network, loss, optimiser in plain torch.

    python benchmarks/gpu_plain.py PLANS.json --device cuda

Written apart from ``ichseg`` and ``training``. Contiguous tensors, fp16 autocast with a scaled
loss, compiled, as nnunetv2 trains on CUDA; on the CPU fp32, not compiled. It trains on one batch
that lies on the device from the beginning: it is spared reading, augmenting and waiting for data.
Answers like ``hippocampus_rival.py``, step ``blocks``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WARM_UP = 3  # iterations that are not timed


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

    def __init__(self, plans: Path, device: torch.device, *, compiled: bool) -> None:
        raw = json.loads(plans.read_text())
        planned = next(c for c in raw["configurations"] if c["name"] == "3d_fullres")
        batch, patch = planned["batch"], planned["patch"]
        classes, channels = len(raw["labels"]), len(raw["channels"])
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
        if compiled:
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


def main() -> int:
    """Answer requests until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plans", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True  # as nnunetv2 sets it
    trainer = begin(args.plans, device)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        cpu, began = time.process_time(), time.perf_counter()
        for _ in range(int(line)):
            trainer.step()
        answer = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
        print(json.dumps({**answer, "wait": 0.0}), flush=True)
    return 0


def begin(plans: Path, device: torch.device) -> Trainer:
    """Build, compile where the machine has a C compiler, and warm up."""
    for compiled in (True, False) if device.type == "cuda" else (False,):
        trainer = Trainer(plans, device, compiled=compiled)
        try:
            for _ in range(WARM_UP):
                print(f"compiled {compiled}, loss {trainer.step():.4f}", file=sys.stderr)
        except Exception as error:  # of the compiler: any type
            if not compiled:
                raise
            print(f"not compiled: {error}", file=sys.stderr)
        else:
            break
    return trainer


if __name__ == "__main__":
    sys.exit(main())
