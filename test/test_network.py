import dataclasses

import pytest
import torch
from conftest import ARCHITECTURE
from torch import nn
from torch.nn import functional as F

from ichseg.network import build_network
from ichseg.plans import Architecture

# nnU-Net v2's plan for INSTANCE (16x320x320): strides, kernels and features
STRIDES = ((1, 1, 1), *[(1, 2, 2)] * 3, *[(2, 2, 2)] * 2, (1, 2, 2))
KERNELS = (*[(1, 3, 3)] * 3, *[(3, 3, 3)] * 4)
INSTANCE_3D = Architecture(
    features=(32, 64, 128, 256, 320, 320, 320),
    kernels=KERNELS,
    strides=STRIDES,
    encoder_convs=(2,) * 7,
    decoder_convs=(2,) * 6,
    upsampling_bias=True,
    head_bias=True,
    deep_supervision=True,
)
INSTANCE_2D = Architecture(
    features=(32, 64, 128, 256, 512, 512, 512, 512),
    kernels=((3, 3),) * 8,
    strides=((1, 1), *[(2, 2)] * 7),
    encoder_convs=(2,) * 8,
    decoder_convs=(2,) * 7,
    upsampling_bias=True,
    head_bias=True,
    deep_supervision=True,
)


@pytest.mark.parametrize(("architecture", "millions"), [(INSTANCE_3D, 43.5), (INSTANCE_2D, 46.3)])
def test_parameter_count_is_nnunets(architecture, millions):
    with torch.device("meta"):
        network = build_network(architecture, 1, 2)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


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
