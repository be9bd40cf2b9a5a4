"""The shape of a network, by numbers."""

from __future__ import annotations

from dataclasses import dataclass

from ichseg.model import strict_json

BLOCKS = ("plain", "residual")
# of every network: the activation's slope below 0, and what keeps its normalisation from 1 / 0
LEAKY_SLOPE, NORM_EPSILON = 0.01, 1e-5


@dataclass(frozen=True, slots=True)
class Architecture:
    """A U-Net by numbers, one entry per level, finest first.

    Attributes:
        features: The number of feature maps of each level.
        kernels: The kernel size of each level, of two or three axes.
        strides: The downsampling on entering each level; the first is all ones.
        encoder_convs: The number of convolutions of each encoder level; in a residual encoder the
            number of blocks, of two convolutions each.
        decoder_convs: The number of convolutions of each decoder level: one entry fewer than there
            are levels, finest first.
        upsampling_bias: Whether the transposed convolutions have a bias.
        head_bias: Whether the 1x1 convolution to the scores has a bias.
        deep_supervision: Whether training attaches a head to every decoder level.
        block: The encoder is made of ``plain`` convolutions, or of ``residual`` blocks after a stem
            of one convolution. The decoder is plain in either case.
    """

    features: tuple[int, ...]
    kernels: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    encoder_convs: tuple[int, ...]
    decoder_convs: tuple[int, ...]
    upsampling_bias: bool
    head_bias: bool
    deep_supervision: bool
    block: str = strict_json.optional("plain")

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise ValueError(f"block {self.block!r}, expected one of {BLOCKS}")
        levels = len(self.features)
        found = (
            len(self.kernels),
            len(self.strides),
            len(self.encoder_convs),
            len(self.decoder_convs),
        )
        if levels < 2 or found != (levels, levels, levels, levels - 1):
            raise ValueError(
                f"{levels} levels, but kernels, strides, encoder and decoder list {found}"
            )
        if {len(axes) for axes in self.kernels + self.strides} not in ({2}, {3}):
            raise ValueError("kernels and strides must all have two axes, or all three")
        if set(self.strides[0]) != {1}:
            raise ValueError(f"the first level's stride is {self.strides[0]}, expected ones")
        _require("features", self.features, most=100_000)
        _require("convolutions", self.encoder_convs + self.decoder_convs, most=100)
        _require("strides", sum(self.strides, ()), most=1000)
        _require("kernel sizes", sum(self.kernels, ()), most=99)
        if any(size % 2 == 0 for size in sum(self.kernels, ())):
            raise ValueError(f"kernel sizes {self.kernels}, expected odd ones")

    @property
    def dimensions(self) -> int:
        """The number of spatial axes, 2 or 3."""
        return len(self.kernels[0])

    @property
    def total_stride(self) -> tuple[int, ...]:
        """The downsampling of all levels together; a patch is a multiple of it along each axis."""
        total = [1] * self.dimensions
        for stride in self.strides:
            total = [a * b for a, b in zip(total, stride, strict=True)]
        return tuple(total)


def _require(what: str, sizes: tuple[int, ...], *, most: int) -> None:
    """Refuse sizes of which no network can be built."""
    if min(sizes) < 1 or max(sizes) > most:
        raise ValueError(f"{what} from {min(sizes)} to {max(sizes)}, expected 1 to {most}")
