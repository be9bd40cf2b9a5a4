"""The U-Nets of nnU-Net in two or three dimensions, built from ``Architecture``.

Each level: convolutions, each followed by instance normalisation and a leaky ReLU. The first
convolution of a level downsamples by its stride, transposed convolutions upsample, skips are
concatenated. A residual encoder has a stem of one convolution, and blocks of two with a shortcut in
place of its other convolutions; its decoder is the plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ichseg.model.architecture import LEAKY_SLOPE, NORM_EPSILON, Architecture
from ichseg.model.instance_norm import InstanceNorm2d, InstanceNorm3d

_CONV: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_POOL: dict[int, Any] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}


_NORM: dict[int, Any] = {2: InstanceNorm2d, 3: InstanceNorm3d}


class UNet(nn.Module):
    """Encoder, decoder and heads.

    Attributes:
        stem: One convolution before a residual encoder, and nothing before a plain one.
        encoder: The blocks of the levels, finest first.
        upsampling: The transposed convolution into each decoder level, finest first.
        decoder: The blocks of the decoder levels, finest first.
        heads: 1x1 convolutions to class logits: one, or with deep supervision one for each decoder
            level.
    """

    def __init__(self, architecture: Architecture, input_channels: int, classes: int) -> None:
        super().__init__()
        a, dimensions = architecture, architecture.dimensions
        levels = len(a.features)
        ones = (1,) * dimensions
        level: Callable[..., nn.Sequential] = _block
        self.stem: nn.Module = nn.Identity()
        if a.block == "residual":
            self.stem = _block(dimensions, input_channels, a.features[0], a.kernels[0], ones, 1)
            input_channels, level = a.features[0], _residual_blocks
        inputs = (input_channels, *a.features[:-1])
        self.encoder = nn.ModuleList(
            level(
                dimensions, inputs[i], a.features[i], a.kernels[i], a.strides[i], a.encoder_convs[i]
            )
            for i in range(levels)
        )
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
        """Logits ``(B, K, *patch)``; a list, finest first, in training with deep supervision."""
        x = self.stem(x)
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


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut around them (V2, after arXiv:1812.01187).

    The shortcut pools by the mean where the block has a stride, and goes through a 1x1 convolution
    and a normalisation where it changes the number of features.
    """

    def __init__(
        self,
        dimensions: int,
        inputs: int,
        features: int,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> None:
        super().__init__()
        ones = (1,) * dimensions
        self.first = _block(dimensions, inputs, features, kernel, stride, 1)
        norm = _NORM[dimensions](features, eps=NORM_EPSILON, affine=True)
        nn.init.zeros_(norm.weight)  # with its bias, 0 as well: begins as the shortcut alone
        self.second = nn.Sequential(
            _convolution(dimensions, features, features, kernel, ones), norm
        )
        shortcut: list[nn.Module] = []
        if stride != ones:
            shortcut.append(_POOL[dimensions](stride, stride))
        if inputs != features:
            shortcut.append(_CONV[dimensions](inputs, features, kernel_size=1, bias=False))
            shortcut.append(_NORM[dimensions](features, eps=NORM_EPSILON, affine=True))
        self.shortcut = nn.Sequential(*shortcut)
        self.activation = nn.LeakyReLU(LEAKY_SLOPE, inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``(B, C, *size)`` to ``(B, features, *size / stride)``."""
        y: torch.Tensor = self.activation(self.second(self.first(x)).add_(self.shortcut(x)))
        return y


def build_network(architecture: Architecture, input_channels: int, classes: int) -> UNet:
    """A freshly initialised network.

    Args:
        architecture: The network's shape, from the plan's configuration.
        input_channels: The image's channels, and in a cascade's second stage one more per label.
        classes: The number of scores of each voxel, labels including the background.
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
            _convolution(
                dimensions,
                inputs if index == 0 else features,
                features,
                kernel,
                stride if index == 0 else (1,) * dimensions,
            ),
            _NORM[dimensions](features, eps=NORM_EPSILON, affine=True),
            nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
        ]
    return nn.Sequential(*layers)


def _convolution(
    dimensions: int,
    inputs: int,
    features: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
) -> nn.Module:
    convolution: nn.Module = _CONV[dimensions](
        inputs, features, kernel, stride, padding=tuple(k // 2 for k in kernel)
    )
    return convolution


def _residual_blocks(
    dimensions: int,
    inputs: int,
    features: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    blocks: int,
) -> nn.Sequential:
    ones = (1,) * dimensions
    return nn.Sequential(
        ResidualBlock(dimensions, inputs, features, kernel, stride),
        *(ResidualBlock(dimensions, features, features, kernel, ones) for _ in range(blocks - 1)),
    )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=LEAKY_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
