"""torch: on CUDA in half precision unless told otherwise, on the CPU as the reference."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping

import torch

from ichseg.engine.arrays import FloatArray
from ichseg.engine.engine import Engine, Network, NetworkSpec, in_batches, tiles_at_once
from ichseg.engine.machine import cpu_threads
from ichseg.errors import DeviceError
from ichseg.model.network import build_network
from ichseg.wording import counted

MOST_GPU_VOXELS = 16_000_000  # 10 tiles of 16x320x320: larger batches are no faster
_GPU_SHARE = 0.7  # of the free memory for a batch; the volume's scores need some too

_GPU_FAILED = re.compile(r"CUDA (driver )?error|CUDNN_STATUS_|CUBLAS_STATUS_|CUFFT_")

_HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": None}

TensorCallable = Callable[[torch.Tensor], torch.Tensor]


def engine_on(device: torch.device, precision: str = "auto") -> Engine:
    """The engine; on the CPU with the threads that this process may really use.

    Args:
        device: Where it runs.
        precision: Of convolutions, see ``choose_engine``.

    Raises:
        DeviceError: bfloat16 on the CPU, where torch is the reference.
    """
    if device.type == "cpu" and precision == "bfloat16":
        raise DeviceError("precision bfloat16: torch on the CPU is the reference, in float32 only")
    if precision == "auto":
        precision = "float16" if device.type == "cuda" else "float32"
    if device.type == "cpu":
        torch.set_num_threads(cpu_threads())
    return Engine(
        name=f"{describe(device)}, {precision}",
        place=lambda data: torch.from_numpy(data).to(device),
        load=functools.partial(_load, device, _HALVES[precision]),
        kind="cuda" if device.type == "cuda" else "torch-cpu",
        keep=torch.from_numpy,
        precision=precision,
        free_bytes=functools.partial(_free_bytes, device),
        memory_full=(torch.cuda.OutOfMemoryError, DeviceError),
        guard=gpu_guard,
    )


@contextlib.contextmanager
def gpu_guard() -> Iterator[None]:
    """Say so if the GPU is lost in the block.

    After such an error no call of CUDA succeeds in this process any more: to try again, or to try
    the next case, is of no use.

    Raises:
        DeviceError: A call of CUDA has failed, and not for want of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        if not isinstance(error, torch.AcceleratorError) and not _GPU_FAILED.search(reason):
            raise
        raise DeviceError(
            f"the GPU was lost or failed ({reason}); what is finished is kept: check nvidia-smi, "
            "then --resume does what is left, if need be with --device cpu"
        ) from error


def cuda_is_usable() -> bool:
    """Whether this build of torch can use a GPU of this machine."""
    return torch.cuda.is_available()


def choose_device(name: str) -> torch.device:
    """The device for ``auto`` (CUDA if it works, else CPU), ``cpu`` or ``cuda``.

    Raises:
        DeviceError: CUDA was asked for and is not usable.
    """
    if name == "cpu" or (name == "auto" and not cuda_is_usable()):
        return torch.device("cpu")
    if not cuda_is_usable():
        raise DeviceError(
            f"--device cuda: no usable GPU (torch {torch.__version__} is built for CUDA "
            f"{torch.version.cuda or 'none'}); check nvidia-smi, or use --device cpu"
        )
    return torch.device("cuda")


def describe(device: torch.device) -> str:
    """One phrase for the log."""
    version = torch.__version__.split("+")[0]
    if device.type == "cuda":
        return f"torch {version} on {torch.cuda.get_device_name(device)}"
    return f"torch {version} on the CPU, {counted(torch.get_num_threads(), 'thread')}"


def tensors(state: Mapping[str, FloatArray]) -> dict[str, torch.Tensor]:
    """A bundle's arrays for ``load_state_dict``."""
    return {name: torch.from_numpy(array) for name, array in state.items()}


def on_tiles(
    network: torch.nn.Module,
    device: torch.device,
    *,
    average: str,
    half: torch.dtype | None = torch.float16,
) -> TensorCallable:
    """A network as a callable on tiles: ``(B, C, Z, Y, X)`` to float32 scores ``(B, K, Z, Y, X)``.

    A 2D network gets its one-slice tiles without the slice axis. On CUDA it runs in autocast, and
    the tiles whose logits are not finite are redone in fp32; a batch that does not fit the
    memory is halved.

    Args:
        network: A ``UNet`` with its weights; moved to ``device`` and set to evaluation.
        device: The device to run on. Tiles may be elsewhere; their scores are returned to there.
        average: ``probabilities`` (softmax is applied here) or ``logits``.
        half: What autocast computes in on CUDA; None for float32. On the CPU it is float32.
    """
    two_dimensional = next(p for p in network.parameters() if p.ndim > 2).ndim == 4
    layout = torch.contiguous_format
    if device.type == "cpu":
        half = None
    else:
        layout = torch.channels_last if two_dimensional else torch.channels_last_3d
    network = network.to(device).eval().to(memory_format=layout)  # type: ignore[call-overload]

    def run(tiles: torch.Tensor) -> torch.Tensor:
        x = tiles.squeeze(2) if two_dimensional else tiles
        logits = forward(network, x.to(device).contiguous(memory_format=layout), device, half)
        scores = logits.softmax(1) if average == "probabilities" else logits
        return (scores.unsqueeze(2) if two_dimensional else scores).to(tiles.device)

    return torch.inference_mode()(functools.partial(in_halves, run))


def forward(
    network: torch.nn.Module, tiles: torch.Tensor, device: torch.device, half: torch.dtype | None
) -> torch.Tensor:
    """Logits, float32; with autocast to ``half``, tiles that are not finite are redone in full."""
    if half is None:
        full: torch.Tensor = network(tiles)
        return full
    with torch.autocast(device.type, half):
        logits: torch.Tensor = network(tiles).float()
    broken = ~torch.isfinite(logits).flatten(1).all(1)
    if broken.any():
        logits[broken] = network(tiles[broken])
    return logits


def in_halves(run: TensorCallable, tiles: torch.Tensor) -> torch.Tensor:
    """Run all tiles at once, or in two halves where the GPU's memory does not hold that.

    Raises:
        DeviceError: It does not hold one tile.
    """
    try:
        return run(tiles)
    except torch.cuda.OutOfMemoryError as error:
        if len(tiles) == 1:
            raise DeviceError(
                f"the GPU's memory does not hold one tile of {tuple(tiles.shape[2:])} voxels; "
                "use --device cpu"
            ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return torch.cat([in_halves(run, part) for part in tiles.chunk(2)])


def _free_bytes(device: torch.device) -> int | None:
    """The free bytes of a GPU's memory; None for the CPU."""
    if device.type != "cuda":
        return None
    with gpu_guard():
        free: int = torch.cuda.mem_get_info(device)[0]
    return free


def _load(
    device: torch.device,
    half: torch.dtype | None,
    spec: NetworkSpec,
    state: Mapping[str, FloatArray],
) -> Network:
    with torch.device("meta"):  # its own first weights would be drawn for nothing
        network = build_network(spec.architecture, spec.input_channels, spec.scores)
    try:
        network.load_state_dict(tensors(state), assign=True)
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[-1].strip()) from error
    try:
        run = on_tiles(network, device, average=spec.average, half=half)
        if device.type == "cpu":
            return in_batches(run, tiles_at_once(spec.tile))
        return in_batches(run, _batch_that_fits(run, spec, device))
    except torch.cuda.OutOfMemoryError as error:
        raise DeviceError("the GPU's memory does not hold the network; use --device cpu") from error


def _batch_that_fits(run: TensorCallable, spec: NetworkSpec, device: torch.device) -> int:
    """How many tiles the GPU takes at once, by the memory that one has needed."""
    tile = torch.zeros((1, spec.input_channels, *spec.tile), device=device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run(tile)
    needed = max(1, torch.cuda.max_memory_allocated(device) - before)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    most = MOST_GPU_VOXELS // (spec.tile[0] * spec.tile[1] * spec.tile[2])
    return max(1, min(most, int(_GPU_SHARE * free / needed)))
