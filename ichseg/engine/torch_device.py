"""The device that torch computes on: whether a GPU can be used, its memory, what its errors mean.

A GPU may be there and yet be of no use, it may be full, or it may be lost in mid-run. The three are
told apart here and nowhere else.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence

import torch

from ichseg.errors import DeviceError, DeviceFullError
from ichseg.wording import counted

_GPU_FAILED = re.compile(r"CUDA (driver )?error|CUDNN_STATUS_|CUBLAS_STATUS_|CUFFT_")
# What CUDA and its libraries say where memory is all that they lack. cuDNN finds no engine, or no
# algorithm, where none of them gets its workspace.
_GPU_FULL = re.compile(
    r"CUDA.*out of memory|CU(BLAS|DNN|FFT)_\w*ALLOC\w*_FAILED"
    r"|unable to find an engine|a valid cuDNN algorithm"
)

_log = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """The device for ``auto`` (CUDA if it can be used, else the CPU), ``cpu`` or ``cuda``.

    A GPU that ``auto`` leaves idle is named in the log, with the reason.

    Raises:
        DeviceError: CUDA was asked for and is not usable.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    reason = why_unusable()
    if reason is None:
        return torch.device("cuda")
    if name == "auto":
        _log.warning("the GPU is NOT used: %s", reason)
        return torch.device("cpu")
    raise DeviceError(f"--device cuda: {reason}; check nvidia-smi, or use --device cpu")


def why_unusable() -> str | None:
    """Why torch cannot compute on the GPU; None if nothing speaks against it."""
    version = torch.__version__
    if not torch.cuda.is_available():
        return f"no usable GPU (torch {version} is built for CUDA {torch.version.cuda or 'none'})"
    try:
        capability, name = torch.cuda.get_device_capability(), torch.cuda.get_device_name()
    except RuntimeError as error:
        return f"the GPU does not answer ({_first_line(error)})"
    architectures = torch.cuda.get_arch_list()
    if not has_code_for(capability, architectures):
        return (
            f"torch {version} has no code for {name} (sm_{capability[0]}{capability[1]}), only for "
            f"{', '.join(architectures)}"
        )
    return None


def cpu_computes_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself; others are slower in it than in float32."""
    able: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def gpu_computes_bf16() -> bool:
    """Whether the GPU multiplies bfloat16 itself; others take other numbers in its place."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def has_code_for(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a build of torch has code that a card runs.

    Machine code runs on cards of the same major version and of the same or a later minor one; PTX
    is compiled by the driver for its own version and all later ones.

    Args:
        capability: The card's compute capability, such as (9, 0).
        architectures: What the build has code for: ``sm_90`` is machine code, ``compute_90`` PTX. A
            letter at the end, as in ``sm_90a``, binds the code to that very version.
    """
    for word in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", word)
        if found is None:
            return True  # not NVIDIA's, and not ours to judge
        kind, major, minor, bound = found[1], int(found[2]), int(found[3]), found[4]
        if bound == "a":
            fits = capability == (major, minor)
        elif kind == "sm" or bound:
            fits = capability[0] == major and capability[1] >= minor
        else:
            fits = capability >= (major, minor)
        if fits:
            return True
    return False


def warm_up(device: torch.device) -> None:
    """Open the GPU and compute a convolution on it, so that what fails fails here.

    What CUDA and cuDNN take of the host's memory is taken by then, and counts as the program's own.

    Raises:
        DeviceError: It cannot even do that.
    """
    if device.type == "cuda":
        with guard():
            ones = torch.ones(1, 1, 4, 4, 4, device=device)
            torch.nn.functional.conv3d(ones, ones).sum().item()


def describe(device: torch.device) -> str:
    """One phrase for the log."""
    version = torch.__version__.split("+")[0]
    if device.type == "cuda":
        return f"torch {version} on {torch.cuda.get_device_name(device)}"
    return f"torch {version} on the CPU, {counted(torch.get_num_threads(), 'thread')}"


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still allocate of a GPU's memory; None for the CPU.

    What torch holds back for later use counts as free: the driver calls that taken.

    Raises:
        DeviceError: The GPU is lost.
    """
    if device.type != "cuda":
        return None
    with guard():
        free: int = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def allowed_bytes(device: torch.device) -> int | None:
    """Bytes that this process can have of a GPU's memory in all; None for the CPU.

    That is what is free and what its own tensors take, so it is the same for the first case of many
    and for the later ones.

    Raises:
        DeviceError: The GPU is lost.
    """
    free = free_bytes(device)
    return None if free is None else free + torch.cuda.memory_allocated(device)


def is_full(error: BaseException) -> bool:
    """Whether an error says that a GPU's memory is full, in whichever library's words."""
    if isinstance(error, torch.OutOfMemoryError | DeviceFullError):
        return True
    return isinstance(error, RuntimeError) and bool(_GPU_FULL.search(_first_line(error)))


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Say what has become of the GPU if CUDA fails in the block.

    Once it is lost no call of CUDA succeeds in this process any more: to try again, or to try the
    next case, is of no use. Where its memory is full, less may still fit.

    Raises:
        DeviceFullError: The memory is full.
        DeviceError: A call of CUDA has failed, and not for want of memory.
    """
    try:
        yield
    except RuntimeError as error:
        reason = _first_line(error)
        if is_full(error):
            raise DeviceFullError(
                f"the GPU's memory is full ({reason}); use --device cpu"
            ) from error
        if not isinstance(error, torch.AcceleratorError) and not _GPU_FAILED.search(reason):
            raise
        raise DeviceError(
            f"the GPU was lost or failed ({reason}); what is finished is kept: check nvidia-smi, "
            "then --resume does what is left, if need be with --device cpu"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
