"""torch: on CUDA in half precision unless told otherwise, on the CPU as the reference."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ichseg.engine import torch_device
from ichseg.engine.arrays import FloatArray
from ichseg.engine.engine import Engine, Network, NetworkSpec, in_batches, tiles_at_once
from ichseg.engine.machine import cpu_threads
from ichseg.engine.torch_copies import Copies
from ichseg.errors import DeviceError, DeviceFullError
from ichseg.model.network import build_network

MOST_GPU_VOXELS = 8_000_000  # of a batch: 4 tiles of 16x320x320, which keep a large card busy

_HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": None}

Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(slots=True)
class BatchSize:
    """How many tiles a GPU is given at once.

    Attributes:
        tiles: The number; halved for good where the memory does not hold that.
        most: The number at first, and again once not even one tile is held: the case then goes on
            with its scores on the host, which leaves the card room.
    """

    tiles: int
    most: int = field(init=False)

    def __post_init__(self) -> None:
        self.most = self.tiles


def engine_on(device: torch.device, precision: str = "auto", threads: int = 0) -> Engine:
    """The engine.

    Args:
        device: Where it runs.
        precision: Of convolutions, see ``choose_engine``.
        threads: On the CPU; 0 for as many as this process may really use.

    Raises:
        DeviceError: bfloat16 on the CPU, where torch is the reference, or on a GPU that does not
            compute in it; or the GPU fails at once.
    """
    if device.type == "cpu" and precision == "bfloat16":
        raise DeviceError("precision bfloat16: torch on the CPU is the reference, in float32 only")
    if device.type == "cuda" and precision == "bfloat16" and not torch_device.gpu_computes_bf16():
        raise DeviceError(
            f"precision bfloat16: {torch.cuda.get_device_name(device)} does not compute in it, "
            "expected float16, float32 or auto there"
        )
    if precision == "auto":
        precision = "float16" if device.type == "cuda" else "float32"
    if device.type == "cpu":
        torch.set_num_threads(threads or cpu_threads())
    else:
        torch_device.warm_up(device)
        # the shapes of batches are few, and come again; what is measured may differ between runs
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic
    sizes: dict[NetworkSpec, BatchSize] = {}

    def size_of(spec: NetworkSpec) -> BatchSize:
        return sizes.setdefault(spec, BatchSize(batch_for(spec.tile, device)))

    return Engine(
        name=f"{torch_device.describe(device)}, {precision}",
        place=lambda data: torch.from_numpy(data).to(device),
        load=functools.partial(_load, device, _HALVES[precision], size_of),
        kind="cuda" if device.type == "cuda" else "torch-cpu",
        keep=torch.from_numpy,
        precision=precision,
        device_bytes=functools.partial(torch_device.allowed_bytes, device),
        batch_of=lambda spec: size_of(spec).tiles,
        guard=torch_device.guard,
    )


def batch_for(tile: Sequence[int], device: torch.device) -> int:
    """How many tiles of these sizes a device is given at once, if its memory holds that.

    That the memory is not asked beforehand lets one case be computed in the same way whatever else
    is on the GPU.
    """
    if device.type == "cpu":
        return tiles_at_once(tile)
    return max(1, MOST_GPU_VOXELS // math.prod(tile))


def tensors(state: Mapping[str, FloatArray]) -> dict[str, torch.Tensor]:
    """A bundle's arrays for ``load_state_dict``."""
    return {name: torch.from_numpy(array) for name, array in state.items()}


def network_on(
    module: torch.nn.Module,
    device: torch.device,
    size: BatchSize,
    *,
    average: str,
    half: torch.dtype | None = torch.float16,
) -> Network:
    """A network, ready to run on tiles; a 2D network gets its one-slice tiles without that axis.

    Args:
        module: A ``UNet`` with its weights; moved to ``device`` and set to evaluation.
        device: The device to run on. Tiles may be on the host; scores are where the tiles are.
        size: How many tiles it is given at once.
        average: ``probabilities`` (softmax is applied here) or ``logits``.
        half: What autocast computes in on CUDA; None for float32. On the CPU it is float32.
    """
    two_dimensional = next(p for p in module.parameters() if p.ndim > 2).ndim == 4
    layout = torch.contiguous_format
    if device.type == "cpu":
        half = None
    else:
        layout = torch.channels_last if two_dimensional else torch.channels_last_3d
    module = module.to(device).eval().to(memory_format=layout)  # type: ignore[call-overload]

    def logits(tiles: torch.Tensor, half: torch.dtype | None) -> torch.Tensor:
        x = tiles.squeeze(2) if two_dimensional else tiles
        found = forward(module, x.contiguous(memory_format=layout), device, half)
        return found.unsqueeze(2) if two_dimensional else found

    def scores(found: torch.Tensor) -> torch.Tensor:
        return found.softmax(1) if average == "probabilities" else found

    if device.type == "cpu":
        return in_batches(
            torch.inference_mode()(lambda tiles: scores(logits(tiles, None))), size.tiles
        )
    return looking_ahead(
        lambda tiles: logits(tiles, half),
        None if half is None else lambda tiles: logits(tiles, None),
        scores,
        size,
        device,
    )


def forward(
    module: torch.nn.Module, tiles: torch.Tensor, device: torch.device, half: torch.dtype | None
) -> torch.Tensor:
    """Logits, float32, of a module that computes in ``half`` by autocast, or in true float32."""
    if half is None:
        with _true_float32(device):
            full: torch.Tensor = module(tiles)
        return full
    with torch.autocast(device.type, half):
        found: torch.Tensor = module(tiles)
    return found.float()


def looking_ahead(
    logits: Logits, exact: Logits | None, scores: Logits, size: BatchSize, device: torch.device
) -> Network:
    """A network whose next batch is under way on a GPU while the scores of one are used.

    So the host never waits for the GPU to be idle. Whether the logits of a batch are finite is
    found out on the GPU, and read once the next batch has been given to it. Batches have few
    shapes, since cuDNN measures which algorithm is the fastest for each: the last ones are filled
    up with zeros.

    Args:
        logits: Maps tiles ``(B, C, *tile)`` on the device to ``(B, K, *tile)``.
        exact: The same in float32, for the tiles whose logits are not finite; None if ``logits`` is
            that already.
        scores: Maps logits to scores of the same shape.
        size: How many tiles there are in a batch.
        device: The device.
    """
    copies = Copies(device)

    @torch.inference_mode()
    def launched(tiles: list[torch.Tensor]) -> _Launched:
        given = copies.bring(tiles, _filled_up(len(tiles), size.tiles))
        found = logits(given)
        finite = None if exact is None else found.isfinite().flatten(1).all(1)[: len(tiles)]
        found = scores(found)[: len(tiles)]
        away = tiles[0].device != given.device
        return _Launched(given, *copies.take(found, finite, found_too=away))

    def redone(tile: torch.Tensor) -> torch.Tensor:
        assert exact is not None
        with _without_search():
            try:
                return scores(exact(tile))
            except RuntimeError as error:
                if not torch_device.is_full(error):
                    raise
            if torch.cuda.is_available():  # the next batch is on the card, too
                torch.cuda.empty_cache()
            return scores(exact(tile))

    @torch.inference_mode()
    def settled(batch: _Launched) -> torch.Tensor:
        batch.wait()
        if batch.finite is not None:
            for index in (~batch.finite).nonzero().flatten().tolist():
                again = redone(batch.tiles[index : index + 1])[0]
                batch.scores[index] = again.to(batch.scores.device)
        return batch.scores

    def network(tiles: Iterable[torch.Tensor]) -> Generator[torch.Tensor]:
        ahead: _Launched | None = None
        for batch in _in_working_batches(tiles, size, launched):
            if ahead is not None:
                yield settled(ahead)
            ahead = batch
        if ahead is not None:
            yield settled(ahead)

    return network


@dataclass(frozen=True, slots=True)
class _Launched:
    """A batch that a device has been given.

    Attributes:
        tiles: The batch on the device, filled up.
        scores: Scores of its tiles, where these came from; there once ``wait`` has returned.
        finite: Whether the logits of each tile are finite, on the host; None if nobody asks.
        wait: Waits for what goes to the host.
    """

    tiles: torch.Tensor
    scores: torch.Tensor
    finite: torch.Tensor | None
    wait: Callable[[], None]


def _in_working_batches(
    tiles: Iterable[torch.Tensor],
    size: BatchSize,
    launch: Callable[[list[torch.Tensor]], _Launched],
) -> Iterator[_Launched]:
    """Batches of as many tiles as the GPU holds at once, which is found out by trying.

    Raises:
        DeviceFullError: It does not hold one tile.
    """
    waiting = iter(tiles)
    batch: list[torch.Tensor] = []
    while batch or (batch := list(itertools.islice(waiting, size.tiles))):
        given = batch[: size.tiles]
        try:
            launched = launch(given)
        except RuntimeError as error:
            if not torch_device.is_full(error):
                raise
            if len(given) == 1:
                size.tiles = size.most
                raise DeviceFullError(
                    f"the GPU's memory does not hold one tile of {tuple(given[0].shape[1:])} "
                    f"voxels ({str(error).strip().partition(chr(10))[0]}); use --device cpu"
                ) from error
            size.tiles = math.ceil(min(size.tiles, len(given)) / 2)
        else:
            batch = batch[len(given) :]
            yield launched
            del launched  # lest its memory be held while the next one is computed
            continue
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # of blocks that are too small for what comes now


def _filled_up(count: int, size: int) -> int:
    """The least of ``size``, half of it, a quarter and so on that holds so many tiles."""
    while count <= (half := math.ceil(size / 2)) < size:
        size = half
    return size


@contextlib.contextmanager
def _true_float32(device: torch.device) -> Iterator[None]:
    """Have CUDA multiply float32 as such, and not with the 10 bits of TF32's fraction."""
    if device.type == "cpu":
        yield
        return
    switches = _tf32_switches()
    before = [getattr(owner, name) for owner, name, _ in switches]
    for owner, name, off in switches:
        setattr(owner, name, off)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


def _tf32_switches() -> list[tuple[Any, str, object]]:
    """What decides whether CUDA takes TF32, and the value with which it does not.

    From torch 2.9 on there are old and new switches. An old one cannot be read where a new one says
    otherwise, as in a process that has used the new ones; the new ones decide. The old ones are
    turned as well where that goes, since parts of torch still read them.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    found: list[tuple[Any, str, object]] = []
    for owner in (cudnn, matmul):
        with contextlib.suppress(RuntimeError):
            owner.allow_tf32  # noqa: B018 (whether it can be read)
            found.append((owner, "allow_tf32", False))
    convolution = getattr(cudnn, "conv", None)
    if hasattr(convolution, "fp32_precision"):
        found += [(convolution, "fp32_precision", "ieee"), (matmul, "fp32_precision", "ieee")]
    return found


@contextlib.contextmanager
def _without_search() -> Iterator[None]:
    """Have cuDNN take the algorithm that it expects to be the fastest: for a shape that is rare.

    To measure all of them, layer by layer, takes longer than one tile.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _load(
    device: torch.device,
    half: torch.dtype | None,
    size_of: Callable[[NetworkSpec], BatchSize],
    spec: NetworkSpec,
    state: Mapping[str, FloatArray],
) -> Network:
    with torch.device("meta"):  # its own first weights would be drawn for nothing
        module = build_network(spec.architecture, spec.input_channels, spec.scores)
    try:
        module.load_state_dict(tensors(state), assign=True)
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[-1].strip()) from error
    return network_on(module, device, size_of(spec), average=spec.average, half=half)
