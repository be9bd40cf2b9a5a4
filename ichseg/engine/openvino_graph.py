"""A plan's U-Net as an OpenVINO graph, straight from its tensors: torch is not needed.

The same network as ``network.UNet``, whose names the tensors have; a test compares the two.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ichseg.engine.arrays import FloatArray
from ichseg.engine.engine import NetworkSpec
from ichseg.model.architecture import LEAKY_SLOPE, NORM_EPSILON

POOLED_VOXELS = 64
# A layer with so many values is normalised by slabs, in bfloat16. For fewer, which fit the
# processor's caches, it would not be worth the time to compile that.
MANY, SLABS = 2**20, 4
# Imported with the package, brings its telemetry along, and is not needed: without it, OpenVINO
# neither loads nor sends anything, and starts faster.
_CONVERTER = "openvino.tools.ovc"


def import_openvino() -> ModuleType:
    """The package without its model converter.

    Raises:
        ImportError: It is not installed.
    """
    blocked = "openvino" not in sys.modules and _CONVERTER not in sys.modules
    if blocked:
        sys.modules[_CONVERTER] = None  # type: ignore[assignment]  # an import of it fails at once
    try:
        import openvino
    finally:
        if blocked:
            del sys.modules[_CONVERTER]
    module: ModuleType = openvino
    return module


def build(spec: NetworkSpec, state: Mapping[str, FloatArray], precision: str = "float32") -> Any:
    """An ``openvino.Model`` from one tile ``(1, C, *patch)`` to its scores ``(1, K, *patch)``.

    Args:
        spec: The network; its scores are probabilities if these are to be averaged.
        state: The network's tensors, by the names of ``network.UNet``.
        precision: The convolutions compute in it, ``float32`` or ``bfloat16``. All between
            them, the means of the normalisation above all, and the scores stay in float32.

    Raises:
        ValueError: A tensor is missing, left over or of another shape.
    """
    a = spec.architecture
    graph = _Graph(import_openvino(), state, a.dimensions, half=precision == "bfloat16")
    ones = (1,) * a.dimensions
    entry = graph.op.parameter([1, spec.input_channels, *spec.tile[-a.dimensions :]], np.float32)
    x, inputs = entry, spec.input_channels
    if a.block == "residual":
        x = graph.block(x, "stem", inputs, a.features[0], a.kernels[0], ones, 1)
        inputs = a.features[0]
    level = graph.residual_blocks if a.block == "residual" else graph.block
    skips = []
    for i, features in enumerate(a.features):
        x = level(
            x, f"encoder.{i}", inputs, features, a.kernels[i], a.strides[i], a.encoder_convs[i]
        )
        skips.append(x)
        inputs = features
    for i in reversed(range(len(a.features) - 1)):
        deeper, features = a.features[i + 1], a.features[i]
        x = graph.upsample(
            x, f"upsampling.{i}", deeper, features, a.strides[i + 1], a.upsampling_bias
        )
        both = [x, skips[i]]
        x = graph.block(
            both, f"decoder.{i}", 2 * features, features, a.kernels[i], ones, a.decoder_convs[i]
        )
    graph.half = False  # what decides
    x = graph.convolution(x, "heads.0", a.features[0], spec.scores, ones, ones)
    if a.head_bias:
        x = graph.add_bias(x, "heads.0.bias", spec.scores)
    if spec.average == "probabilities":
        x = graph.op.softmax(x, 1)
    # heads of deeper levels serve training alone
    left = sorted(name for name in graph.state if not name.startswith("heads."))
    if left:
        raise ValueError(f"{len(left)} tensors too many, {left[0]} the first")
    return graph.openvino.Model([x], [entry], "unet")


def pooling_window(size: Sequence[int]) -> list[int]:
    """The largest window that divides this size evenly and has at most 64 voxels.

    One axis goes after another, the last one first. Where nothing divides it: the whole size.
    """
    window = [1] * len(size)
    for axis in reversed(range(len(size))):
        most = min(size[axis], POOLED_VOXELS // math.prod(window))
        window[axis] = max(n for n in range(1, most + 1) if size[axis] % n == 0)
    return window if math.prod(window) > 1 else list(size)


def slab_axis(size: Sequence[int]) -> tuple[int, int]:
    """The axis that can be cut into the most equal slabs, the first of several, and how many."""
    counts = [max(n for n in range(1, SLABS + 1) if voxels % n == 0) for voxels in size]
    return counts.index(max(counts)), max(counts)


class _Graph:
    """Layers, which take their tensors out of ``state``."""

    def __init__(
        self,
        openvino: ModuleType,
        state: Mapping[str, FloatArray],
        dimensions: int,
        *,
        half: bool,
    ) -> None:
        self.openvino: Any = openvino
        self.op: Any = openvino.opset13
        self.state = dict(state)
        self.dimensions = dimensions
        self.half = half
        self.zeros = [0] * dimensions

    def take(self, name: str, *shape: int) -> FloatArray:
        """A tensor, which then is no longer left."""
        tensor = self.state.pop(name, None)
        if tensor is None:
            raise ValueError(f"no tensor {name}")
        if tensor.shape != shape:
            raise ValueError(f"{name} is {tensor.shape}, expected {shape}")
        return tensor

    def channels(self, values: FloatArray) -> Any:
        """A constant with a value for each channel."""
        return self.op.constant(values.reshape(1, -1, *(1,) * self.dimensions))

    def narrow(self, x: Any) -> Any:
        """What goes into a convolution, in its precision."""
        return self.op.convert(x, "bf16") if self.half else x

    def wide(self, x: Any) -> Any:
        """What comes out of a convolution, in float32."""
        return self.op.convert(x, "f32") if self.half else x

    def wide_anew(self, x: Any) -> Any:
        """As ``wide``, for a second use: OpenVINO makes one of two conversions, and stores it."""
        like = self.op.constant(np.zeros(1, np.float32))
        return self.op.convert_like(x, like) if self.half else x

    def convolution(
        self,
        x: Any,
        name: str,
        inputs: int,
        features: int,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> Any:
        """A convolution of one input, or of two side by side; the result is in its precision.

        Of two it is the sum of each one's, which saves putting them together.
        """
        weight = self.take(f"{name}.weight", features, inputs, *kernel)
        padding, dilations = [k // 2 for k in kernel], [1] * self.dimensions
        parts, first = [], 0
        for part in x if isinstance(x, list) else [x]:
            last = first + part.get_output_shape(0)[1]
            own = self.narrow(self.op.constant(np.ascontiguousarray(weight[:, first:last])))
            part = self.narrow(part)
            part = self.op.convolution(part, own, list(stride), padding, padding, dilations)
            parts.append(part)
            first = last
        return parts[0] if len(parts) == 1 else self.op.add(*parts)  # in the second's registers

    def add_bias(self, x: Any, name: str, features: int) -> Any:
        return self.op.add(x, self.channels(self.take(name, features)))

    def upsample(
        self, x: Any, name: str, inputs: int, features: int, stride: tuple[int, ...], bias: bool
    ) -> Any:
        weight = self.take(f"{name}.weight", inputs, features, *stride)
        own = self.narrow(self.op.constant(weight))
        x = self.wide(self.op.convolution_backprop_data(self.narrow(x), own, list(stride)))
        return self.add_bias(x, f"{name}.bias", features) if bias else x

    def normalise(self, x: Any, name: str, features: int) -> Any:
        """Instance normalisation, from means that are exact to a few roundings.

        OpenVINO's own (``MVN``, ``GroupNormalization``) and its ``ReduceMean`` add up a channel's
        voxels one after another in float32. Where many are alike, as air is, every addition rounds
        the same way, and probabilities come out wrong by up to 0.16 (docs/decisions/0009).
        """
        weight = self.channels(self.take(f"{name}.weight", features))
        slabs = self.slabs(x)
        mean = self.mean([self.wide(slab) for slab in slabs])
        slabs = [self.wide_anew(slab) for slab in slabs]
        variance = self.mean([self.op.squared_difference(slab, mean) for slab in slabs])
        deviation = self.op.sqrt(self.op.add(variance, self.op.constant(np.float32(NORM_EPSILON))))
        x = self.op.subtract(self.wide(x), mean)
        x = self.op.multiply(x, self.op.divide(weight, deviation))
        return self.add_bias(x, f"{name}.bias", features)

    def slabs(self, x: Any) -> list[Any]:
        """A large tile in bfloat16 as equal slabs, any other as it is.

        What has to be added up is then widened and added slab to slab in one pass. Of a whole
        tile, float32 would be written, twice as many bytes as were read, and read again.
        """
        shape = list(x.get_output_shape(0))
        axis, count = slab_axis(shape[2:])
        if not self.half or math.prod(shape) < MANY or count == 1:
            return [x]
        return list(self.op.split(x, 2 + axis, count).outputs())

    def mean(self, slabs: Sequence[Any]) -> Any:
        """The mean of each channel: that of few voxels, then of few such means, and so on."""
        x = functools.reduce(self.op.add, slabs)
        while max(size := list(x.get_output_shape(0))[2:]) > 1:
            window = pooling_window(size)
            x = self.op.avg_pool(x, window, self.zeros, self.zeros, window, True)
        if len(slabs) == 1:
            return x
        return self.op.multiply(x, self.op.constant(np.float32(1 / len(slabs))))

    def activate(self, x: Any) -> Any:
        return self.op.prelu(x, self.op.constant(np.array([LEAKY_SLOPE], np.float32)))

    def block(
        self,
        x: Any,
        name: str,
        inputs: int,
        features: int,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        convolutions: int,
        *,
        activate_last: bool = True,
    ) -> Any:
        """Convolutions, each normalised and activated."""
        for index in range(convolutions):
            first, layer = index == 0, 3 * index
            step = stride if first else (1,) * self.dimensions
            x = self.convolution(
                x, f"{name}.{layer}", inputs if first else features, features, kernel, step
            )
            # The normalisation subtracts the mean, and with it any bias.
            self.take(f"{name}.{layer}.bias", features)
            x = self.normalise(x, f"{name}.{layer + 1}", features)
            if activate_last or index + 1 < convolutions:
                x = self.activate(x)
        return x

    def residual_blocks(
        self,
        x: Any,
        name: str,
        inputs: int,
        features: int,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        blocks: int,
    ) -> Any:
        ones = (1,) * self.dimensions
        for index in range(blocks):
            own = f"{name}.{index}"
            step, given = (stride, inputs) if index == 0 else (ones, features)
            y = self.block(x, f"{own}.first", given, features, kernel, step, 1)
            y = self.block(
                y, f"{own}.second", features, features, kernel, ones, 1, activate_last=False
            )
            layer = 0
            if step != ones:
                x = self.op.avg_pool(x, list(step), self.zeros, self.zeros, list(step), True)
                layer += 1
            if given != features:
                x = self.convolution(x, f"{own}.shortcut.{layer}", given, features, ones, ones)
                x = self.normalise(x, f"{own}.shortcut.{layer + 1}", features)
            x = self.activate(self.op.add(y, x))
        return x
