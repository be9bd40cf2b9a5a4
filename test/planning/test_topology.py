"""Where networks pool and what patches cost: by hand, and against the network itself."""

from dataclasses import replace

import pytest
import torch
from helpers.planning import plan_heads
from torch import nn

from ichseg.model.architecture import Architecture
from ichseg.model.network import UNet
from training.planning import topology as rules
from training.planning.topology import Topology

ONE, FLAT, FULL = (1, 1, 1), (1, 2, 2), (2, 2, 2)


def network_of(strides, features, convs=2, block="plain"):
    levels = len(features)
    return Architecture(
        features=features,
        kernels=((3,) * len(strides[0]),) * levels,
        strides=strides,
        encoder_convs=(convs,) * levels,
        decoder_convs=(convs,) * (levels - 1),
        upsampling_bias=True,
        head_bias=True,
        deep_supervision=True,
        block=block,
    )


def test_pool_late_by_hand():
    # 9 and 40 voxels: halved once and three times with 4 or more left
    topology = rules.pool_late((9, 40, 40), (3.0, 1.0, 1.0), 99)
    assert topology.strides == (ONE, FLAT, FLAT, FULL)
    # 1 mm and not 2 mm is below half of 3 mm
    assert topology.kernels == ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    assert topology.divisor == (2, 8, 8)
    assert rules.pool_late((3, 5, 7), (1.0, 1.0, 1.0), 99) == Topology((ONE,), ((3, 3, 3),))


def test_pool_by_spacing_by_hand():
    # 1, 2, then within a factor 2 of 3 mm: all axes; 6 and 10 voxels are too few after that
    topology = rules.pool_by_spacing((12, 40), (3.0, 1.0), 99)
    assert topology.strides == ((1, 1), (1, 2), (2, 2), (1, 2))
    assert topology.kernels[-1] == (3, 3)
    # two groups of one axis each at first: the first axis' wins
    assert topology.kernels == ((3, 1), (3, 3), (3, 3), (3, 3))


def test_pool_by_spacing_v2_by_hand():
    topology = rules.pool_by_spacing_v2((12, 40), (3.0, 1.0), 99)
    # the last single axis has 10 voxels, fewer than 12: it is not pooled alone
    assert topology.strides == ((1, 1), (1, 2), (2, 2))
    assert topology.kernels == ((1, 3), (3, 3), (3, 3))


def test_pool_by_spacing_v2_rounds_up_and_never_forgets():
    # 15 -> 8 -> 4: half an odd size is rounded up
    assert rules.pool_by_spacing_v2((15, 15), (1.0, 1.0), 99).divisor == (4, 4)
    # the second axis falls behind by a factor of 8 and keeps its kernel of 3 all the same
    topology = rules.pool_by_spacing_v2((100, 7), (1.0, 1.0), 99)
    assert topology.divisor == (16, 1)
    assert topology.kernels == ((3, 3),) * 5


def test_approximate_elements_by_hand():
    network = network_of(((1, 1), (2, 2), (2, 1)), (2, 4, 8))
    # 5*64*2 + (1+3)*64 at the top, 5*16*4 in the middle, 2*8*8 at the bottom
    assert rules.approximate_elements((8, 8), network, 1, 3) == 640 + 256 + 320 + 128


def test_exact_elements_of_a_residual_encoder_by_hand():
    network = replace(
        network_of(((1, 1), (2, 2)), (2, 4), block="residual"),
        encoder_convs=(1, 3),
        decoder_convs=(1,),
    )
    # 64 voxels of 2 features: stem 128, block 2 * 128. 16 voxels of 4: three blocks 3 * 2 * 64, and
    # 64 on the shortcut of the first. Decoder: upsampling 128, convolution 128, head 3 * 64.
    encoder, decoder = 128 + 256 + 384 + 64, 128 + 128 + 192
    assert rules.exact_elements((8, 8), network, 1, 3) == encoder + decoder


@pytest.mark.parametrize("name", ["3d_fullres", "2d"])
def test_exact_elements_count_the_network(name):
    """Against the outputs of all convolutions of the network itself."""
    configuration = plan_heads(recipe="nnunetv2").configuration(name)
    architecture = replace(configuration.architecture, deep_supervision=False)
    total = 0

    def count(_module, _inputs, output):
        nonlocal total
        total += output.numel()

    with torch.device("meta"):
        network = UNet(architecture, 1, 2).eval()
        convolutions = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        for module in network.modules():
            if isinstance(module, convolutions):
                module.register_forward_hook(count)
        network(torch.empty(1, 1, *configuration.patch))
    assert rules.exact_elements(configuration.patch, configuration.architecture, 1, 2) == total
