"""The engines against each other: OpenVINO's graph is another way to write the same network."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURE
from helpers.tiles import scored

from ichseg.engine import choose, openvino_engine, openvino_graph, torch_engine
from ichseg.engine.choose import choose_engine
from ichseg.engine.engine import NetworkSpec
from ichseg.errors import DeviceError
from ichseg.model.architecture import NORM_EPSILON, Architecture
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


@pytest.mark.parametrize("many", [1, openvino_graph.MANY], ids=["by slabs", "whole"])
def test_in_bfloat16_only_convolutions_are(spec, many, monkeypatch):
    """Mean difference 0.4 % of the range: numbers round differently after other orders of sums."""
    monkeypatch.setattr(openvino_graph, "MANY", many)
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


@pytest.mark.parametrize("many", [1, 2**30], ids=["by slabs", "whole"])
@pytest.mark.parametrize("size", [(16, 48, 96), (7, 66, 33), (5, 7, 11), (240, 320)])
def test_what_is_in_bfloat16_is_normalised_in_float32(size, many, monkeypatch):
    """Against float64, from what the convolution gave: four fifths of it are alike, as air is."""
    monkeypatch.setattr(openvino_graph, "MANY", many)
    random = np.random.default_rng(3)
    given = random.normal(1, 3, (1, 4, *size)).astype(np.float32)
    given[..., : size[-1] * 4 // 5] = -7.3
    weight, bias = random.normal(size=(2, 4)).astype(np.float32)
    openvino = openvino_graph.import_openvino()
    state = {"norm.weight": weight, "norm.bias": bias}
    graph = openvino_graph._Graph(openvino, state, len(size), half=True)
    entry = graph.op.parameter(list(given.shape), np.float32)
    result = graph.normalise(graph.narrow(entry), "norm", 4)
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Model([result], [entry], "norm")
    found = openvino_engine._core().compile_model(model, "CPU", settings)([given])[0]
    x = torch.from_numpy(given).bfloat16().double().numpy()
    axes, shape = tuple(range(2, x.ndim)), (1, 4, *(1,) * len(size))
    deviation = np.sqrt(x.var(axes, keepdims=True) + NORM_EPSILON)
    expected = (x - x.mean(axes, keepdims=True)) / deviation * weight.reshape(shape)
    np.testing.assert_allclose(found, expected + bias.reshape(shape), rtol=0, atol=2e-6)


def test_slabs_by_hand():
    assert openvino_graph.slab_axis([16, 192, 192]) == (0, 4)
    assert openvino_graph.slab_axis([6, 10, 9]) == (0, 3)
    assert openvino_graph.slab_axis([11, 30, 28]) == (2, 4)
    assert openvino_graph.slab_axis([13, 7]) == (0, 1)  # nothing divides it


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
    monkeypatch.setattr(openvino_engine, "streams", lambda *_: 1)
    expected = scored(openvino_engine.engine(3).load(spec, state_of(spec)), tiles)
    monkeypatch.setattr(openvino_engine, "streams", lambda *_: streams)
    network = openvino_engine.engine(3).load(spec, state_of(spec))
    np.testing.assert_array_equal(scored(network, tiles), expected)
    assert list(network(iter([]))) == []


@pytest.mark.parametrize(
    ("threads", "tile", "expected"),
    [
        (2, (16, 96, 96), 2),  # 29 float32 maps of 147 456 voxels, 16.3 MiB: 7 fit
        (1, (16, 96, 96), 1),
        (16, (16, 96, 96), 4),  # 5, 6 or 7 would leave threads without a tile
        (7, (16, 96, 96), 7),
        (16, (16, 192, 192), 1),  # 65 MiB each
        (4, (16, 160, 160), 2),  # 45 MiB each
        (3, (16, 160, 160), 1),
    ],
)
def test_small_tiles_are_computed_side_by_side(threads, tile, expected):
    architecture = dataclasses.replace(SPECS["plain 3d"].architecture, features=(8, 16))
    assert openvino_engine.streams(threads, architecture, tile) == expected


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
