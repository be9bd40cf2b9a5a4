"""What is said of a GPU: there is none here, so torch's answers stand in for it."""

import pytest
import torch

from ichseg.engine import choose, torch_device
from ichseg.engine.choose import choose_engine
from ichseg.engine.torch_device import has_code_for
from ichseg.errors import DeviceError, DeviceFullError

WHEEL = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((8, 0), WHEEL, True),
        ((8, 9), WHEEL, True),  # by sm_86
        ((7, 0), WHEEL, False),  # V100: sm_75 is later
        ((9, 0), ("sm_80", "sm_86"), False),  # another major version
        ((9, 0), ("sm_80", "compute_80"), True),  # by PTX
        ((12, 1), WHEEL, True),
        ((13, 0), WHEEL, True),  # by PTX of 12.0
        ((13, 0), ("sm_120", "compute_120a"), False),
        ((9, 0), ("sm_90a",), True),
        ((10, 3), ("sm_100a",), False),
        ((10, 3), ("sm_100f",), True),
        ((9, 0), (), False),
        ((9, 0), ("gfx942",), True),  # AMD's: not ours to judge
    ],
)
def test_which_cards_a_build_has_code_for(capability, architectures, expected):
    assert has_code_for(capability, architectures) is expected


@pytest.fixture
def old_card(monkeypatch):
    """A V100 in a machine whose torch is built for later cards."""
    for name, answer in {
        "is_available": True,
        "get_device_capability": (7, 0),
        "get_device_name": "Tesla V100",
        "get_arch_list": list(WHEEL),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)


def test_a_card_without_code_is_left_for_the_cpu_and_that_is_said(old_card, monkeypatch, caplog):
    assert torch_device.choose_device("auto").type == "cpu"
    said = f"torch {torch.__version__} has no code for Tesla V100 (sm_70), only for sm_75, sm_80"
    assert f"the GPU is NOT used: {said}" in caplog.text
    monkeypatch.setattr(choose, "gpu_is_there", lambda: True)
    chosen = choose_engine("auto")
    assert chosen.kind == "openvino"
    assert f"; the GPU is NOT used: {said}" in chosen.name
    for ask in (torch_device.choose_device, choose_engine):
        with pytest.raises(DeviceError, match=r"--device cuda: torch .* Tesla V100 \(sm_70\)"):
            ask("cuda")


def test_a_gpu_that_fails_at_once_is_left_for_the_cpu(old_card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(choose, "gpu_is_there", lambda: True)

    def broken(*_, **__):
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr(torch, "ones", broken)
    assert "the GPU is NOT used: the GPU was lost or failed (CUDA error: uncorrectable ECC" in (
        choose_engine("auto").name
    )
    with pytest.raises(DeviceError, match="uncorrectable ECC"):
        choose_engine("cuda")


def test_what_torch_holds_back_is_free_and_its_tensors_are_allowed(monkeypatch):
    """Of 10 GB: 2 taken by others, 5 by torch, which uses 3 of them."""
    for name, answer in {
        "mem_get_info": (3 * 10**9, 10**10),
        "memory_reserved": 5 * 10**9,
        "memory_allocated": 3 * 10**9,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    assert torch_device.free_bytes(torch.device("cuda")) == 5 * 10**9
    assert torch_device.allowed_bytes(torch.device("cuda")) == 8 * 10**9
    assert torch_device.allowed_bytes(torch.device("cpu")) is None


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 20.00 MiB",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_a_full_memory_is_not_a_lost_gpu(words):
    with pytest.raises(DeviceFullError, match="memory is full") as caught, torch_device.guard():
        raise RuntimeError(words)
    assert "\n" not in str(caught.value)


def test_the_hosts_memory_is_not_the_gpus():
    error = RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    )
    assert not torch_device.is_full(error)
    with pytest.raises(RuntimeError) as caught, torch_device.guard():
        raise error
    assert caught.value is error
