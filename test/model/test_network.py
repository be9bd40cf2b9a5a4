import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURE, PLANS
from torch import nn
from torch.nn import functional as F

from ichseg.model.architecture import Architecture
from ichseg.model.instance_norm import (
    InstanceNorm2d,
    InstanceNorm3d,
    RunningNorm,
    normalise_at_once,
)
from ichseg.model.network import build_network

HELPERS = Path(__file__).parents[1] / "helpers"
# made by benchmarks/nnunetv2_networks.py, of nnunetv2's own planners and networks
THEIRS = json.loads((HELPERS / "nnunetv2_networks.json").read_text())
PLANNED = json.loads((HELPERS / "nnunetv2_plans.json").read_text())["tasks"]


def architecture_of(theirs):
    """Of a network that nnunetv2 describes; its decoder is listed coarsest first."""
    return Architecture(
        features=tuple(theirs["features"]),
        kernels=tuple(tuple(kernel) for kernel in theirs["kernels"]),
        strides=tuple(tuple(stride) for stride in theirs["strides"]),
        encoder_convs=tuple(theirs["encoder"]),
        decoder_convs=tuple(theirs["decoder"][::-1]),
        upsampling_bias=True,
        head_bias=True,
        deep_supervision=True,
        block="residual" if theirs["network"] == "ResidualEncoderUNet" else "plain",
    )


@pytest.mark.parametrize(
    "row", THEIRS["parameters"], ids=lambda row: f"{row['task']}-{row['planner']}"
)
def test_parameter_counts_are_nnunetv2s(row):
    task = PLANNED[row["task"]]
    theirs = task["planners"][row["planner"]]["configurations"][row["configuration"]]
    configuration = SimpleNamespace(previous_stage=theirs["previous_stage"])
    plans = dataclasses.replace(
        PLANS,
        channels=("CT",) * len(task["channels"]),
        normalisations=PLANS.normalisations * len(task["channels"]),
        labels=tuple(map(str, range(task["labels"]))),
    )
    with torch.device("meta"):
        network = build_network(
            architecture_of(theirs), plans.input_channels(configuration), len(plans.labels)
        )
    assert sum(p.numel() for p in network.parameters()) == row["parameters"]


def test_parameter_counts_of_the_paper():
    found = {
        row["configuration"]: row["parameters"] / 1e6
        for row in THEIRS["parameters"]
        if (row["task"], row["planner"]) == ("instance_28", "ExperimentPlanner")
    }
    assert found == {
        "2d": pytest.approx(46.3, abs=0.05),
        "3d_fullres": pytest.approx(43.5, abs=0.05),
    }


@pytest.mark.parametrize("theirs", THEIRS["networks"], ids=lambda theirs: theirs["name"])
def test_logits_are_nnunetv2s(theirs):
    """In float64, the weights sin(0), sin(1), ... in the order of our modules."""
    network = build_network(architecture_of(theirs), theirs["input"][1], theirs["classes"]).double()
    first = 0
    with torch.no_grad():
        for parameter in network.parameters():
            index = torch.arange(first, first + parameter.numel(), dtype=torch.float64)
            parameter.copy_(index.sin().reshape(parameter.shape))
            first += parameter.numel()
    count = torch.Size(theirs["input"]).numel()
    x = torch.arange(count, dtype=torch.float64).cos().reshape(theirs["input"])
    heads = network.train()(x)
    assert len(heads) == len(theirs["logits"])
    for ours, expected in zip(heads, theirs["logits"], strict=True):
        found = ours.flatten()[:: theirs["stride"]][: len(expected)].tolist()
        assert found == pytest.approx(expected, abs=1e-9)


def test_residual_blocks_begin_as_their_shortcut():
    """The second normalisation is 0 at first, so a block without a stride changes nothing."""
    network = build_network(architecture_of(THEIRS["networks"][1]), 1, 2)
    x = torch.randn(1, 8, 4, 8, 8)
    block = network.encoder[1][1]
    torch.testing.assert_close(block(x), F.leaky_relu(x, 0.01))
    with torch.no_grad():
        block.second[1].weight.fill_(1)
    assert not torch.allclose(block(x), F.leaky_relu(x, 0.01), atol=0.1)


def test_forward_equals_the_same_network_written_out():
    """One convolution a level, two levels: the whole forward pass by torch.nn.functional."""
    torch.manual_seed(3)
    network = build_network(ARCHITECTURE, 1, 2).eval()
    w = network.state_dict()
    assert not {"heads.0.bias", "upsampling.0.bias"} & w.keys()
    x = torch.randn(1, 1, 4, 8, 8)

    def block(x, name, stride, padding):
        x = F.conv3d(x, w[f"{name}.0.weight"], w[f"{name}.0.bias"], stride, padding)
        x = F.instance_norm(x, weight=w[f"{name}.1.weight"], bias=w[f"{name}.1.bias"], eps=1e-5)
        return F.leaky_relu(x, 0.01)

    fine = block(x, "encoder.0", 1, (0, 1, 1))
    coarse = block(fine, "encoder.1", (1, 2, 2), 1)
    up = F.conv_transpose3d(coarse, w["upsampling.0.weight"], stride=(1, 2, 2))
    merged = block(torch.cat((up, fine), 1), "decoder.0", 1, (0, 1, 1))
    expected = F.conv3d(merged, w["heads.0.weight"])
    torch.testing.assert_close(network(x), expected)


def test_initialisation_is_he_normal_with_zero_biases():
    torch.manual_seed(0)
    network = build_network(dataclasses.replace(ARCHITECTURE, features=(64, 64)), 1, 2)
    convolution = network.decoder[0][0]
    fan_in = 128 * 9
    assert convolution.weight.std().item() == pytest.approx((2 / 1.0001 / fan_in) ** 0.5, rel=0.03)
    for module in network.modules():
        if isinstance(module, nn.Conv3d) and module.bias is not None:
            assert not module.bias.any()


def test_deep_supervision_gives_one_head_per_decoder_level_in_training_only():
    three = Architecture(
        features=(4, 4, 4),
        kernels=((3, 3),) * 3,
        strides=((1, 1), (2, 2), (2, 2)),
        encoder_convs=(1,) * 3,
        decoder_convs=(1,) * 2,
        upsampling_bias=True,
        head_bias=True,
        deep_supervision=True,
    )
    network = build_network(three, 2, 3)
    x = torch.randn(1, 2, 16, 8)
    assert [tuple(y.shape) for y in network(x)] == [(1, 3, 16, 8), (1, 3, 8, 4)]
    training = network(x)[0]
    torch.testing.assert_close(network.eval()(x), training)


def test_each_parameter_is_registered_once():
    names = list(build_network(ARCHITECTURE, 1, 2).state_dict())
    pointers = [t.data_ptr() for t in build_network(ARCHITECTURE, 1, 2).state_dict().values()]
    assert len(set(pointers)) == len(names)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("size", [(5, 6), (3, 5, 6)])
def test_normalisation_is_torchs_own_and_keeps_the_layout(size, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    ours = (InstanceNorm2d if len(size) == 2 else InstanceNorm3d)(4, affine=True)
    theirs = (nn.InstanceNorm2d if len(size) == 2 else nn.InstanceNorm3d)(4, affine=True)
    torch.manual_seed(1)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    layout = torch.channels_last if len(size) == 2 else torch.channels_last_3d
    x = 3 + 2 * torch.randn(3, 4, *size, dtype=torch.float64).contiguous(memory_format=layout)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = ours.double()(mine), theirs.double()(other)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.is_contiguous(memory_format=layout)
    found.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "channels last, compiled"])
@pytest.mark.parametrize("size", [(192, 192), (16, 96, 96)])
def test_normalisation_is_exact_where_most_voxels_are_alike(size, layout, monkeypatch):
    """A tile of air: four fifths of a channel are one number, which no rounding may favour."""
    norm = (InstanceNorm2d if len(size) == 2 else InstanceNorm3d)(8, affine=True)
    torch.manual_seed(2)
    x = torch.randn(2, 8, *size)
    x[..., : size[-1] * 4 // 5] = -70.3
    given = torch.randn(x.shape)
    # what a compiler is given, here without one
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: "compiled" in layout)
    if layout != "contiguous":
        kept = torch.channels_last if len(size) == 2 else torch.channels_last_3d
        x, given = x.contiguous(memory_format=kept), given.contiguous(memory_format=kept)
    exact = x.double().requires_grad_()
    axes = tuple(range(2, x.ndim))
    centred = exact - exact.mean(axes, keepdim=True)
    expected = centred / (centred.square().mean(axes, keepdim=True) + norm.eps).sqrt()
    expected.backward(given.double())
    x.requires_grad_()
    found = norm(x)
    found.backward(given)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=0, atol=2e-6)


def stats(voxels, eps):
    """``torch.batch_norm_stats``, which torch has on CUDA alone."""
    return voxels.mean(0), (voxels.var(0, correction=0) + eps).rsqrt()


def normalised(voxels, weight, bias, mean, inverse, eps, *, out):
    out.copy_((voxels - mean) * inverse * weight + bias)


def reduced(given, voxels, mean, inverse, weight, *_):
    """Sums of the gradient and of it times the deviation, and the gradients of weight and bias."""
    first, second = given.sum(0), (given * (voxels - mean)).sum(0)
    return first, second, second * inverse, first


def backward(given, voxels, mean, inverse, weight, first, second, count):
    slope = (voxels - mean) * inverse.square() * second / count
    return (given - first / count - slope) * weight * inverse


@pytest.mark.parametrize("size", [(5, 6), (3, 5, 6)])
def test_what_normalises_on_cuda_puts_torchs_bricks_together_rightly(size, monkeypatch):
    """The bricks are written out here, as torch has them on CUDA alone."""
    for name, brick in {
        "batch_norm_stats": stats,
        "batch_norm_elemt": normalised,
        "batch_norm_backward_reduce": reduced,
        "batch_norm_backward_elemt": backward,
    }.items():
        monkeypatch.setattr(torch, name, brick)
    torch.manual_seed(3)
    layout = torch.channels_last if len(size) == 2 else torch.channels_last_3d
    x = (3 + 2 * torch.randn(3, 4, *size).double()).contiguous(memory_format=layout)
    weight, bias = torch.randn(2, 4, dtype=torch.float64).unbind()
    given = torch.randn(3, 4, *size, dtype=torch.float64)  # in another layout
    leaves = []

    def theirs(x, weight, bias, eps):
        return F.instance_norm(x, weight=weight, bias=bias, eps=eps)

    for normalise in (RunningNorm.apply, theirs):
        own = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        found = normalise(*own, 1e-5)
        found.backward(given)
        leaves.append([found, *(leaf.grad for leaf in own)])
    assert leaves[0][0].is_contiguous(memory_format=layout)
    for mine, other in zip(*leaves, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def air(dtype, size):
    """Three samples in channels-last, apart in all: noise, air but for some voxels, air alone."""
    torch.manual_seed(2)
    x = torch.randn(3, 8, *size)
    x[0] = 3 + 2 * x[0]
    x[1, ..., : size[-1] * 4 // 5] = -70.3
    x[2] = torch.linspace(-70.3, 70.3, 8).reshape(-1, *(1 for _ in size))
    layout = torch.channels_last if len(size) == 2 else torch.channels_last_3d
    return x.to(dtype).contiguous(memory_format=layout)


def normalised_exactly(x, weight, bias, eps):
    exact, axes = x.double(), tuple(range(2, x.ndim))
    centred = exact - exact.mean(axes, keepdim=True)
    normal = centred / (centred.square().mean(axes, keepdim=True) + eps).sqrt()
    shape = (-1, *(1 for _ in axes))
    return normal * weight.double().view(shape) + bias.double().view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(191, 193), (15, 96, 97)])
def test_samples_that_are_normalised_at_once_are_each_normalised_exactly(size, dtype):
    """To 2e-3, beside what the type itself rounds; each by its own mean, in its own layout."""
    weight, bias = (1 + torch.rand(2, 8)).unbind()
    x = air(dtype, size)
    found = normalise_at_once(x, weight, bias, 1e-5)
    assert (found.dtype, found.stride()) == (x.dtype, x.stride())
    expected = normalised_exactly(x, weight, bias, 1e-5)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=2e-3)
    torch.testing.assert_close(found[2], expected[2].to(dtype), rtol=0, atol=0)
    alone = normalise_at_once(x[1:2], weight, bias, 1e-5)
    torch.testing.assert_close(found[1:2], alone, rtol=rounding, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(320, 320), (16, 320, 320)])
def test_samples_that_are_normalised_at_once_on_cuda_are_exact(size, dtype):
    """As on the CPU, and under the autocast that inference runs in."""
    norm = (InstanceNorm2d if len(size) == 2 else InstanceNorm3d)(8, affine=True).cuda()
    x = air(dtype, size).cuda()
    half = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    with torch.inference_mode(), torch.autocast("cuda", half, enabled=dtype != torch.float32):
        found = norm(x)
    assert (found.dtype, found.stride()) == (x.dtype, x.stride())
    expected = normalised_exactly(x, norm.weight, norm.bias, norm.eps)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=2e-3)
    assert not found[2].any()  # of one number nothing is left, and the bias is 0


def test_a_sample_with_infinity_in_it_has_no_number_and_its_neighbour_has():
    """It has to be seen that it was not finite, which redoes it in float32."""
    x = air(torch.float16, (15, 16))
    expected = normalise_at_once(x, torch.ones(8), torch.zeros(8), 1e-5)
    x[0, 3, 2, 2] = torch.inf
    found = normalise_at_once(x, torch.ones(8), torch.zeros(8), 1e-5)
    assert found[0, 3].isnan().all()
    torch.testing.assert_close(found[1:], expected[1:], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("size", [(320, 320), (16, 320, 320)])
def test_normalisation_on_cuda_is_exact_where_most_voxels_are_alike(size, layout, dtype):
    """A tile of air: 2e-3, beside what the type itself rounds."""
    norm = (InstanceNorm2d if len(size) == 2 else InstanceNorm3d)(8, affine=True).cuda()
    torch.manual_seed(2)
    x = torch.randn(2, 8, *size)
    x[..., : size[-1] * 4 // 5] = -70.3
    x, given = x.to("cuda", dtype), torch.randn(x.shape).to("cuda", dtype)
    if layout != "contiguous":
        kept = torch.channels_last if len(size) == 2 else torch.channels_last_3d
        x = x.contiguous(memory_format=kept)
    exact = x.double().requires_grad_()
    axes = tuple(range(2, x.ndim))
    centred = exact - exact.mean(axes, keepdim=True)
    expected = centred / (centred.square().mean(axes, keepdim=True) + norm.eps).sqrt()
    expected.backward(given.double())
    x.requires_grad_()
    found = norm(x)
    found.backward(given)
    rounding = torch.finfo(dtype).eps
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=2e-3)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=rounding, atol=2e-3)
