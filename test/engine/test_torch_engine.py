"""Batches on a GPU, on the CPU in its place: how many tiles at once, and in which precision."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURE
from helpers.tiles import scored

from ichseg.engine import torch_device, torch_engine
from ichseg.engine.choose import choose_engine
from ichseg.engine.engine import NetworkSpec
from ichseg.engine.torch_engine import BatchSize
from ichseg.errors import DeviceFullError

SPEC = NetworkSpec(ARCHITECTURE, 1, 2, (4, 16, 16), "probabilities")


class _Overflowing(torch.nn.Module):
    """Answers with infinity under autocast where a tile holds a number above 10."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 2, 1)
        self.seen = []

    def forward(self, x):
        self.seen.append((len(x), torch.is_autocast_enabled("cpu")))
        y = self.conv(x)
        if torch.is_autocast_enabled("cpu"):
            y = torch.where(x.amax((1, 2, 3, 4), keepdim=True) > 10, torch.inf, y)
        return y


def as_on_a_gpu(module, size, scores=lambda logits: logits):
    """What runs on a GPU, on the CPU."""
    device = torch.device("cpu")
    return torch_engine.looking_ahead(
        lambda tiles: torch_engine.forward(module, tiles, device, torch.bfloat16),
        lambda tiles: torch_engine.forward(module, tiles, device, None),
        scores,
        size,
        device,
    )


def test_only_tiles_that_are_not_finite_are_redone_in_full():
    network = _Overflowing()
    tiles = torch.zeros(3, 1, 2, 4, 4)
    tiles[1, 0, 0, 0, 0] = 11
    found = scored(as_on_a_gpu(network, BatchSize(4)), tiles)
    assert network.seen == [(4, True), (1, False)]  # the first is filled up
    with torch.no_grad():
        np.testing.assert_array_equal(found[1:2], network.conv(tiles[1:2]))
    assert found.shape == (3, 2, 2, 4, 4)
    assert found.dtype == np.float32


def test_a_tile_is_redone_without_a_search_for_algorithms(monkeypatch):
    """cuDNN would measure them for a shape and a precision that may not come again."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    searched = []

    def noted(tiles):
        searched.append(torch.backends.cudnn.benchmark)
        return torch.full_like(tiles, torch.inf)

    network = torch_engine.looking_ahead(
        noted, noted, lambda x: x, BatchSize(2), torch.device("cpu")
    )
    scored(network, torch.zeros(2, 1, 1, 1, 1))
    assert searched == [True, False, False]
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize("times", [1, 2])
def test_a_tile_that_finds_the_memory_full_is_redone_once_more(times):
    errors = [torch.OutOfMemoryError("CUDA out of memory")] * times

    def exact(tiles):
        if errors:
            raise errors.pop()
        return torch.ones_like(tiles)

    network = torch_engine.looking_ahead(
        lambda tiles: torch.full_like(tiles, torch.inf), exact, lambda x: x, BatchSize(1),
        torch.device("cpu"),
    )  # fmt: skip
    tiles = torch.zeros(2, 1, 1, 1, 1)
    if times == 1:
        assert scored(network, tiles).sum() == 2
    else:
        with pytest.raises(torch.OutOfMemoryError):
            scored(network, tiles)


def test_infinite_logits_are_noticed_though_their_probabilities_are_finite():
    """The softmax of minus infinity is 0."""
    network = _Overflowing()
    tiles = torch.full((1, 1, 2, 4, 4), 11.0)
    scored(as_on_a_gpu(network, BatchSize(1), lambda x: torch.zeros_like(x)), tiles)
    assert network.seen == [(1, True), (1, False)]


def test_the_next_batch_is_given_to_the_gpu_before_the_scores_of_one_are_used():
    events = []

    def logits(tiles):
        events.append(f"computes {int(tiles[0, 0, 0, 0, 0])}")
        return tiles

    network = torch_engine.looking_ahead(
        logits, logits, lambda x: x, BatchSize(2), torch.device("cpu")
    )
    tiles = torch.arange(5.0).reshape(5, 1, 1, 1, 1)
    for scores in network(iter(tiles)):
        events.append(f"uses {int(scores[0])}")
    assert events == ["computes 0", "computes 2", "uses 0", "computes 4", "uses 2", "uses 4"]


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [(1, 1, 1), (5, 5, 5), (4, 5, 5), (3, 5, 3), (2, 5, 2), (1, 5, 1), (13, 54, 14)],
)
def test_a_batch_is_filled_up_to_one_of_few_sizes(count, size, expected):
    """Of 5: to 5, 3, 2 or 1; of 54: to 54, 27, 14, 7, 4, 2 or 1."""
    seen = []
    network = torch_engine.looking_ahead(
        lambda tiles: seen.append(tiles.clone()) or tiles,
        None, lambda x: x, BatchSize(size), torch.device("cpu"),
    )  # fmt: skip
    tiles = torch.arange(1.0, count + 1).reshape(count, 1, 1, 1, 1)
    np.testing.assert_array_equal(scored(network, tiles), tiles)
    assert [len(batch) for batch in seen] == [expected]
    assert seen[0][count:].abs().sum() == 0


FULL = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
)


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_batch_that_does_not_fit_is_halved_and_the_size_remembered(error):
    sizes, size = [], BatchSize(5)

    def small(tiles):
        sizes.append(len(tiles))
        if len(tiles) > 2:
            raise error
        return tiles * 2

    network = torch_engine.looking_ahead(small, None, lambda x: x, size, torch.device("cpu"))
    tiles = torch.arange(7.0).reshape(7, 1, 1, 1, 1)
    np.testing.assert_array_equal(scored(network, tiles), tiles * 2)
    assert sizes == [5, 3, 2, 2, 1, 2]  # five, and then the other two
    assert size.tiles == 2
    np.testing.assert_array_equal(scored(network, tiles), tiles * 2)
    assert sizes[6:] == [2, 2, 2, 1]

    def full(_):
        raise error

    network = torch_engine.looking_ahead(full, None, lambda x: x, size, torch.device("cpu"))
    with pytest.raises(DeviceFullError, match=r"does not hold one tile of \(1, 1, 1\) voxels \("):
        scored(network, tiles)
    assert size.tiles == 5  # for the scores are on the host from now on


def test_what_is_no_full_memory_is_not_tried_again():
    calls = []

    def broken(tiles):
        calls.append(len(tiles))
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    network = torch_engine.looking_ahead(
        broken, None, lambda x: x, BatchSize(4), torch.device("cpu")
    )
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        scored(network, torch.zeros(4, 1, 1, 1, 1))
    assert calls == [4]


def test_true_float32_is_asked_for_where_no_half_is():
    seen = []

    def module(x):
        seen.append((torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cuda")))
        return x

    before = torch.backends.cudnn.allow_tf32
    for half in (None, torch.bfloat16):
        torch_engine.forward(module, torch.zeros(1), torch.device("cuda"), half)
    assert seen[0] == (False, False)
    assert seen[1][0] == torch.backends.cudnn.allow_tf32 == before


# ways in which a process may have chosen how float32 is multiplied, before we do
CHOSEN = (
    "__version__",  # none
    "backends.cuda.matmul.allow_tf32 = True",
    "backends.cudnn.allow_tf32 = False",
    "set_float32_matmul_precision('high')",
    "backends.fp32_precision = 'tf32'",
    "backends.cuda.matmul.fp32_precision = 'tf32'",
    "backends.cudnn.conv.fp32_precision = 'tf32'",
    "backends.cudnn.fp32_precision = 'tf32'",
)
ASKED = """
import os, sys, torch
from ichseg.engine.torch_engine import _true_float32

cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul


def said():
    found = []
    for owner, name in (
        (torch.backends, "fp32_precision"), (matmul, "fp32_precision"), (cudnn, "fp32_precision"),
        (cudnn.conv, "fp32_precision"), (cudnn.rnn, "fp32_precision"), (matmul, "allow_tf32"),
        (cudnn, "allow_tf32"),
    ):
        try:
            found.append(getattr(owner, name))
        except RuntimeError:
            found.append("cannot be read")
    return found


def ask(chosen):
    exec("torch." + chosen)
    before = said()
    with _true_float32(torch.device("cuda")):
        assert cudnn.conv.fp32_precision == matmul.fp32_precision == "ieee"
        assert matmul.allow_tf32 is False
        torch.nn.functional.conv3d(torch.ones(2, 2, 4, 4, 4), torch.ones(2, 2, 3, 3, 3))
        torch.ones(3, 3) @ torch.ones(3, 3)
    assert said() == before, (before, said())
    if "'high'" in chosen:  # the compiler reads the switches, too
        product = torch.compile(lambda x: torch.relu(x @ x) + 1)
        assert product(torch.ones(4, 4)).sum() == 80


for chosen in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        ask(chosen)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, chosen
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="needs torch 2.9")
def test_true_float32_however_tf32_was_chosen_before():
    """Each in a process of its own: torch does not forget which of its ways were taken."""
    done = subprocess.run(
        [sys.executable, "-c", ASKED, *CHOSEN],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
        env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_batch_is_known_by_the_tile_and_not_by_what_memory_is_free():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert torch_engine.batch_for((16, 320, 320), cuda) == 4
    assert torch_engine.batch_for((128, 320, 320), cuda) == 1
    assert torch_engine.batch_for((16, 96, 96), cpu) == 8
    chosen = choose_engine("torch-cpu")
    assert chosen.batch_of(SPEC) == 1_200_000 // (4 * 16 * 16)
    assert chosen.batch_of(SPEC) == chosen.batch_of(SPEC)


def test_a_deterministic_training_validates_so(monkeypatch):
    """No algorithm is chosen by measuring then; there is no card here, and none is asked."""
    monkeypatch.setattr(torch_device, "warm_up", lambda _: None)
    monkeypatch.setattr(torch_device, "describe", lambda _: "a card")
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    try:
        for deterministic in (True, False):
            cudnn.deterministic = deterministic
            chosen = torch_engine.engine_on(torch.device("cuda"))
            assert cudnn.benchmark is not deterministic
    finally:
        cudnn.benchmark, cudnn.deterministic = before
    assert (chosen.kind, chosen.precision, chosen.name) == ("cuda", "float16", "a card, float16")
    assert chosen.batch_of(SPEC) == 8_000_000 // (4 * 16 * 16)
