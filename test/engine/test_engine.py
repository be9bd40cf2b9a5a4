"""The engines against each other: OpenVINO's graph is another way to write the same network."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURE

from ichseg.engine import choose, openvino_engine, openvino_graph, torch_device, torch_engine
from ichseg.engine.choose import choose_engine
from ichseg.engine.engine import NetworkSpec
from ichseg.engine.torch_engine import BatchSize
from ichseg.errors import DeviceError, DeviceFullError
from ichseg.model.architecture import Architecture
from ichseg.model.network import build_network

FLAT = Architecture(
    features=(6, 10, 12),
    kernels=((3, 3), (3, 3), (1, 3)),
    strides=((1, 1), (2, 2), (1, 2)),
    encoder_convs=(2, 1, 3),
    decoder_convs=(1, 2),
    upsampling_bias=True,
    head_bias=True,
    deep_supervision=True,
)
DEEP = Architecture(
    features=(4, 8, 6),
    kernels=((1, 3, 3), (3, 3, 3), (3, 1, 3)),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 1)),
    encoder_convs=(2, 2, 1),
    decoder_convs=(2, 1),
    upsampling_bias=False,
    head_bias=True,
    deep_supervision=False,
)
RESIDUAL = dataclasses.replace(DEEP, block="residual", encoder_convs=(1, 3, 2))
FLAT_RESIDUAL = dataclasses.replace(FLAT, block="residual", features=(6, 6, 12))
SPECS = {
    "plain 3d": NetworkSpec(ARCHITECTURE, 1, 2, (4, 16, 16), "probabilities"),
    "3d, logits": NetworkSpec(DEEP, 2, 3, (4, 12, 20), "logits"),
    "2d": NetworkSpec(FLAT, 1, 4, (1, 16, 24), "probabilities"),
    "residual 3d": NetworkSpec(RESIDUAL, 1, 2, (4, 12, 20), "probabilities"),
    "residual 2d, logits": NetworkSpec(FLAT_RESIDUAL, 3, 2, (1, 16, 24), "logits"),
}


def state_of(spec, seed=0):
    """Every tensor random, so that none may be forgotten: norms, biases and unused heads too."""
    torch.manual_seed(seed)
    network = build_network(spec.architecture, spec.input_channels, spec.scores)
    state = {}
    for name, tensor in network.state_dict().items():
        scale = 0.3 if tensor.ndim == 1 else 1.0
        offset = 1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0
        values = torch.randn(tensor.shape) * scale + offset if tensor.ndim == 1 else tensor
        state[name] = values.numpy()
    return state


def tiles_of(spec, count=3):
    random = np.random.default_rng(1)
    return random.normal(size=(count, spec.input_channels, *spec.tile)).astype(np.float32)


def scored(network, tiles):
    """The scores of all tiles; each batch is copied before the next one is asked for."""
    return np.concatenate([
        batch.copy() if isinstance(batch, np.ndarray) else batch.cpu().numpy()
        for batch in network(iter(tiles))
    ])  # fmt: skip


@pytest.fixture(params=SPECS.values(), ids=SPECS.keys())
def spec(request):
    return request.param


def test_openvino_equals_torch(spec):
    """Largest difference of probabilities 1e-4; of logits 1e-4 of their range."""
    state, tiles = state_of(spec), tiles_of(spec)
    reference = torch_engine.engine_on(torch.device("cpu"))
    expected = scored(reference.load(spec, state), reference.place(tiles))
    network = openvino_engine.engine(2, "float32").load(spec, state)
    found = scored(network, tiles)
    assert found.shape == expected.shape == (3, spec.scores, *spec.tile)
    assert found.dtype == np.float32
    assert expected.std() > 0.05
    tolerance = 1e-4 * (1 if spec.average == "probabilities" else np.ptp(expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(scored(network, tiles[1:2]), found[1:2])


def in_bfloat16(spec, state):
    """The network in float64, but that convolutions take and give numbers of bfloat16."""
    network = build_network(spec.architecture, spec.input_channels, spec.scores).double().eval()
    network.load_state_dict(torch_engine.tensors(state))

    def rounded(tensor):
        return tensor.bfloat16().double()

    for name, module in network.named_modules():
        if "Conv" in type(module).__name__ and not name.startswith("heads"):
            module.weight.data = rounded(module.weight.data)
            module.register_forward_pre_hook(lambda _, inputs: tuple(map(rounded, inputs)))
            module.register_forward_hook(lambda _, inputs, output: rounded(output))
    return network


def test_in_bfloat16_only_convolutions_are(spec):
    """Mean difference 0.4 % of the range: numbers round differently after other orders of sums."""
    spec = dataclasses.replace(spec, average="logits")
    state, tiles = state_of(spec), tiles_of(spec)
    with torch.inference_mode():
        given = torch.from_numpy(tiles).double()
        flat = spec.architecture.dimensions == 2
        expected = in_bfloat16(spec, state)(given.squeeze(2) if flat else given).numpy()
    expected = expected[:, :, None] if flat else expected
    found = scored(openvino_engine.engine(2, "bfloat16").load(spec, state), tiles)
    assert found.dtype == np.float32
    assert np.abs(found - expected).mean() < 0.004 * np.ptp(expected)
    full = scored(openvino_engine.engine(2, "float32").load(spec, state), tiles)
    assert np.abs(found - full).max() > 0  # it is another precision


def test_the_precision_is_the_one_that_was_asked_for_or_the_faster_one(monkeypatch):
    assert choose_engine("cpu", "bfloat16").precision == "bfloat16"
    assert choose_engine("cpu", "bfloat16").name.endswith(", bfloat16")
    assert choose_engine("cpu", "float32").precision == "float32"
    for can, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(openvino_engine, "computes_bfloat16", lambda *_, can=can: can)
        assert choose_engine("cpu").precision == expected
    assert choose_engine("torch-cpu").precision == "float32"
    with pytest.raises(DeviceError, match="torch on the CPU is the reference, in float32 only"):
        choose_engine("torch-cpu", "bfloat16")
    with pytest.raises(DeviceError, match="precision 'int8', expected one of auto, float32"):
        choose_engine("cpu", "int8")


@pytest.mark.parametrize("device", ["cpu", "torch-cpu"])
def test_normalisation_is_exact_where_most_of_a_tile_is_air(device):
    """147,456 voxels, 80 % of them alike: added up one by one in float32, their mean is off."""
    spec = NetworkSpec(ARCHITECTURE, 1, 2, (16, 96, 96), "probabilities")
    state, tiles = state_of(spec), 3 * tiles_of(spec, 2)
    tiles[..., :77] = -7.3
    network = build_network(ARCHITECTURE, 1, 2).double().eval()
    network.load_state_dict(torch_engine.tensors(state))
    with torch.inference_mode():
        expected = network(torch.from_numpy(tiles).double()).softmax(1).numpy()
    chosen = choose_engine(device, "float32")
    found = scored(chosen.load(spec, state), chosen.place(tiles))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_pooling_windows_by_hand():
    window = openvino_graph.pooling_window
    assert window([16, 192, 192]) == [1, 1, 64]
    assert window([16, 192, 3]) == [1, 16, 3]
    assert window([16, 12, 1]) == [4, 12, 1]
    assert window([4, 1, 1]) == [4, 1, 1]
    assert window([5, 7, 9]) == [1, 7, 9]
    assert window([67, 71]) == [67, 71]  # nothing divides it


def test_logits_or_probabilities(spec):
    logits, probabilities = (
        scored(
            openvino_engine.engine(1).load(dataclasses.replace(spec, average=kind), state_of(spec)),
            tiles_of(spec, 1),
        )
        for kind in ("logits", "probabilities")
    )
    np.testing.assert_allclose(torch.from_numpy(logits).softmax(1), probabilities, atol=1e-6)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)


def test_the_same_tile_gives_the_same_bytes():
    spec = SPECS["residual 3d"]
    tiles = tiles_of(spec, 1)
    runs = [
        scored(openvino_engine.engine(2).load(spec, state_of(spec)), tiles).tobytes()
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_tiles_under_way_at_the_same_time_keep_their_order_and_bytes(streams, monkeypatch):
    spec = SPECS["plain 3d"]
    tiles = tiles_of(spec, 7)
    expected = scored(openvino_engine.engine(3).load(spec, state_of(spec)), tiles)
    monkeypatch.setattr(openvino_engine, "_STREAMS", streams)
    network = openvino_engine.engine(3).load(spec, state_of(spec))
    np.testing.assert_array_equal(scored(network, tiles), expected)
    assert list(network(iter([]))) == []


def test_a_network_that_is_left_in_mid_way_can_be_used_again():
    spec = SPECS["plain 3d"]
    tiles = tiles_of(spec, 5)
    network = openvino_engine.engine(2).load(spec, state_of(spec))
    begun = network(iter(tiles))
    first = next(begun).copy()
    begun.close()
    np.testing.assert_array_equal(scored(network, tiles)[:1], first)

    def broken():
        yield tiles[0]
        raise OSError("the volume is gone")

    with pytest.raises(OSError, match="the volume is gone"):
        scored(network, broken())
    np.testing.assert_array_equal(scored(network, tiles)[:1], first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("encoder.1.0.weight"), r"encoder\.1\.0\.weight"),
        (lambda s: s.update({"upsampling.0.weight": np.zeros((8, 4, 1, 1, 1))}), "upsampling"),
        (lambda s: s.update({"decoder.0.9.weight": np.zeros(3)}), r"decoder\.0\.9\.weight"),
        (lambda s: s.pop("encoder.0.0.bias"), r"encoder\.0\.0\.bias"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "torch-cpu"])
def test_tensors_that_do_not_fit_are_named(change, message, device):
    spec = SPECS["plain 3d"]
    state = {name: array.astype(np.float32) for name, array in state_of(spec).items()}
    change(state)
    state = {name: np.asarray(array, np.float32) for name, array in state.items()}
    with pytest.raises(ValueError, match=message):
        choose_engine(device).load(spec, state)


def test_choices_on_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(choose, "gpu_is_there", lambda: False)
    monkeypatch.setattr(choose, "cpu_threads", lambda: 1)
    assert choose_engine("auto").name == choose_engine("cpu").name
    assert choose_engine("cpu").name.startswith("OpenVINO ")
    assert choose_engine("cpu", "float32").name.endswith(" on the CPU, 1 thread, float32")
    assert choose_engine("torch-cpu").name.startswith("torch ")
    with pytest.raises(DeviceError, match="'gpu', expected one of auto, cpu, cuda, torch-cpu"):
        choose_engine("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_cannot_use_leaves_the_cpu(monkeypatch):
    monkeypatch.setattr(choose, "gpu_is_there", lambda: True)
    name = choose_engine("auto").name
    assert name.startswith("OpenVINO ")
    assert "; the GPU is NOT used: no usable GPU (torch " in name
    with pytest.raises(DeviceError, match="no usable GPU"):
        choose_engine("cuda")


def test_without_openvino_torch_stands_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    name = choose_engine("cpu").name
    assert name.startswith("torch ")
    assert "; not by OpenVINO, which cannot be loaded (" in name


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


def test_the_batch_is_known_by_the_tile_and_not_by_what_memory_is_free():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert torch_engine.batch_for((16, 320, 320), cuda) == 4
    assert torch_engine.batch_for((128, 320, 320), cuda) == 1
    assert torch_engine.batch_for((16, 96, 96), cpu) == 8
    chosen = choose_engine("torch-cpu")
    assert chosen.batch_of(SPECS["plain 3d"]) == 1_200_000 // (4 * 16 * 16)
    assert chosen.batch_of(SPECS["plain 3d"]) == chosen.batch_of(SPECS["plain 3d"])


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
    assert chosen.batch_of(SPECS["plain 3d"]) == 8_000_000 // (4 * 16 * 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_equals_torch_on_the_cpu(spec):
    state, tiles = state_of(spec), tiles_of(spec)
    expected, found = (
        torch.from_numpy(scored(chosen.load(spec, state), chosen.place(tiles)))
        for chosen in (choose_engine("torch-cpu"), choose_engine("cuda"))
    )
    tolerance = 0.02 * (1 if spec.average == "probabilities" else expected.std())
    torch.testing.assert_close(found, expected, rtol=0, atol=float(tolerance))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_scores_kept_on_the_host_are_the_same(spec):
    chosen = choose_engine("cuda")
    network, tiles = chosen.load(spec, state_of(spec)), tiles_of(spec)
    found = torch.from_numpy(scored(network, chosen.keep(tiles)))
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, torch.from_numpy(scored(network, chosen.place(tiles))))
    assert chosen.device_bytes() > 0


def test_importing_openvino_leaves_its_converter_importable():
    openvino_graph.import_openvino()
    assert sys.modules.get("openvino.tools.ovc", "not there") is not None
