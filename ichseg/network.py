"""The plain U-Net of nnU-Net in two or three dimensions, built from ``Architecture``.

Each level: convolutions, each followed by instance normalisation and a leaky ReLU. The first
convolution of a level downsamples by its stride, transposed convolutions upsample, skips are
concatenated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ichseg.errors import PlansError
from ichseg.plans import Architecture

_CONV: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORM: dict[int, Any] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
LEAKY_SLOPE = 0.01


class UNet(nn.Module):
    """Encoder, decoder and heads.

    Attributes:
        encoder: One block per level, finest first.
        upsampling: Transposed convolution into each decoder level, finest first.
        decoder: One block per decoder level, finest first.
        heads: 1x1 convolutions to class logits; one, or one per decoder level with deep
            supervision.
    """

    def __init__(self, architecture: Architecture, input_channels: int, classes: int) -> None:
        super().__init__()
        if architecture.block != "plain":
            raise PlansError(
                f"the plans ask for a {architecture.block} encoder, this code builds plain ones; "
                "plan with --architecture plain"
            )
        a, dimensions = architecture, architecture.dimensions
        levels = len(a.features)
        inputs = (input_channels, *a.features[:-1])
        self.encoder = nn.ModuleList(
            _block(
                dimensions, inputs[i], a.features[i], a.kernels[i], a.strides[i], a.encoder_convs[i]
            )
            for i in range(levels)
        )
        ones = (1,) * dimensions
        self.upsampling = nn.ModuleList(
            _TRANSPOSED[dimensions](
                a.features[i + 1],
                a.features[i],
                kernel_size=a.strides[i + 1],
                stride=a.strides[i + 1],
                bias=a.upsampling_bias,
            )
            for i in range(levels - 1)
        )
        self.decoder = nn.ModuleList(
            _block(
                dimensions, 2 * a.features[i], a.features[i], a.kernels[i], ones, a.decoder_convs[i]
            )
            for i in range(levels - 1)
        )
        self.heads = nn.ModuleList(
            _CONV[dimensions](a.features[i], classes, kernel_size=1, bias=a.head_bias)
            for i in range(levels - 1 if a.deep_supervision else 1)
        )
        self.apply(_initialise)

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Logits ``(B, K, *patch)``; training with deep supervision: a list, finest first."""
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
        levels = len(self.decoder)
        logits: list[torch.Tensor] = []
        for level in reversed(range(levels)):
            x = self.upsampling[level](x)
            x = self.decoder[level](torch.cat((x, skips[level]), dim=1))
            if level == 0 or (self.training and level < len(self.heads)):
                logits.insert(0, self.heads[level](x))
        return logits if self.training and len(self.heads) > 1 else logits[0]


def build_network(architecture: Architecture, input_channels: int, classes: int) -> UNet:
    """A freshly initialised network.

    Args:
        architecture: From the plan's configuration.
        input_channels: Image channels, plus one per label for a cascade's second stage.
        classes: Labels including background.
    """
    return UNet(architecture, input_channels, classes)


def _block(
    dimensions: int,
    inputs: int,
    features: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    convolutions: int,
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(convolutions):
        layers += [
            _CONV[dimensions](
                inputs if index == 0 else features,
                features,
                kernel_size=kernel,
                stride=stride if index == 0 else 1,
                padding=tuple(k // 2 for k in kernel),
            ),
            _NORM[dimensions](features, eps=1e-5, affine=True),
            nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
        ]
    return nn.Sequential(*layers)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=LEAKY_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
