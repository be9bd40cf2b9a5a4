import math

import pytest
import torch
from torch.nn import functional

from ichseg.model.plans import Region
from training.fit.losses import (
    deep_supervision_weights,
    dice_cross_entropy,
    mean_entropy,
    one_hot,
    soft_dice,
)

# All of the bleed, labels 1 and 2, and its core, label 2.
REGIONS = (Region("bleed", 1, (1, 2)), Region("core", 2, (2,)))


def logits_of(foreground):
    """Two-class logits ``(B, 2, n)`` whose softmax gives these foreground probabilities."""
    p = torch.tensor(foreground)
    return torch.stack([torch.log(1 - p), torch.log(p)], dim=1)


def test_undecided_network_by_hand():
    # p = 1/2 at 4 voxels, one of them bleeding: CE = ln 2; Dice = 2 * 0.5 / (4 * 0.5 + 1) = 1/3
    loss = dice_cross_entropy(torch.zeros(1, 2, 4), torch.tensor([[0, 0, 1, 0]]), batch_dice=False)
    assert loss.item() == pytest.approx(math.log(2) - 1 / 3, abs=1e-4)


def test_batch_dice_sums_before_the_ratio():
    # sample 1: hits 0.9, both masks 0.9 + 0.1 + 1 -> 0.9; sample 2: hits 0.4, 0.4 + 0.4 + 2 -> 2/7
    probabilities = logits_of([[0.9, 0.1], [0.4, 0.4]]).softmax(1)
    target = torch.tensor([[1, 0], [1, 1]])
    per_sample = soft_dice(
        probabilities, one_hot(target, probabilities.shape[1]), batch_dice=False
    ).item()
    assert per_sample == pytest.approx((2 * 0.9 / 2 + 2 * 0.8 / 2.8) / 2, abs=1e-4)
    whole = soft_dice(
        probabilities, one_hot(target, probabilities.shape[1]), batch_dice=True
    ).item()
    assert whole == pytest.approx(2 * (0.9 + 0.8) / (2 + 2.8), abs=1e-4)


def test_intersection_is_not_squared():
    """The first public nnU-Net computed sum((p g)^2); then this would be 2 * 0.25 / 1.5."""
    value = soft_dice(
        logits_of([[0.5]]).softmax(1), one_hot(torch.tensor([[1]]), 2), batch_dice=False
    )
    assert value.item() == pytest.approx(2 * 0.5 / 1.5, abs=1e-4)


def test_background_does_not_count_in_dice():
    """All background right, all foreground missed: 0, not the mean with the background's."""
    value = soft_dice(
        logits_of([[1e-9, 1e-9, 1e-9]]).softmax(1),
        one_hot(torch.tensor([[0, 0, 1]]), 2),
        batch_dice=True,
    )
    assert value.item() == pytest.approx(0, abs=1e-4)


def test_classes_are_averaged():
    probabilities = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])  # one voxel of each class
    target = torch.tensor([[1, 1]])  # class 1 half found: 2/3; class 2 only invented: 0
    assert soft_dice(
        probabilities, one_hot(target, probabilities.shape[1]), batch_dice=True
    ).item() == pytest.approx(1 / 3, abs=1e-4)


def test_empty_prediction_of_an_empty_target_is_perfect():
    probabilities = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    assert soft_dice(
        probabilities, one_hot(torch.zeros(1, 2), 2), batch_dice=False
    ).item() == pytest.approx(1)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_a_sure_and_right_network_reaches_minus_one(batch_dice):
    target = torch.randint(0, 3, (2, 4, 5, 6), generator=torch.Generator().manual_seed(0))
    logits = 50.0 * functional.one_hot(target, 3).movedim(-1, 1)
    assert dice_cross_entropy(logits, target, batch_dice=batch_dice).item() == pytest.approx(-1)


def test_against_torch_written_another_way():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 3, 4, 5, generator=generator, dtype=torch.float32)
    target = torch.randint(0, 3, (2, 3, 4, 5), generator=generator)
    p, g = logits.softmax(1), functional.one_hot(target, 3).movedim(-1, 1).float()
    axes = (2, 3, 4)
    tp, fp, fn = (p * g).sum(axes), (p * (1 - g)).sum(axes), ((1 - p) * g).sum(axes)
    ratio = ((2 * tp + 1e-5) / (2 * tp + fp + fn + 1e-5))[:, 1:].mean()
    expected = functional.cross_entropy(logits, target) - ratio
    found = dice_cross_entropy(logits, target.to(torch.int8), batch_dice=False)
    torch.testing.assert_close(found, expected)


def test_bf16_logits_are_scored_in_fp32():
    logits = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    target = (torch.arange(64) % 2)[None]
    found = dice_cross_entropy(logits, target, batch_dice=True)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, dice_cross_entropy(logits.float(), target, batch_dice=True))


def test_deep_supervision_weights():
    """nnU-Net v2: six heads."""
    expected = (0.516, 0.258, 0.129, 0.065, 0.032, 0.0)
    assert deep_supervision_weights(6) == pytest.approx(expected, abs=6e-4)
    assert deep_supervision_weights(1) == (1.0,)
    assert deep_supervision_weights(2) == (1.0, 0.0)


def test_deeply_supervised_loss_weighs_the_scales():
    generator = torch.Generator().manual_seed(3)
    target = torch.zeros(1, 1, 8, 8, dtype=torch.int8)
    target[..., :4, :4] = 1
    coarser = target[..., ::2, ::2]  # the box is made of whole 2x2 blocks
    scales = [torch.randn(1, 2, 1, n, n, generator=generator) for n in (8, 4, 2)]
    expected = 2 / 3 * dice_cross_entropy(scales[0], target, batch_dice=True)
    expected = expected + 1 / 3 * dice_cross_entropy(scales[1], coarser, batch_dice=True)
    torch.testing.assert_close(dice_cross_entropy(scales, target, batch_dice=True), expected)


def test_a_coarser_target_is_the_label_at_its_voxels_centres():
    """Three voxels become one, and the middle one counts: 1 0."""
    target = torch.tensor([[[0, 1, 0, 1, 0, 1]]])
    undecided = torch.zeros(1, 2, 1, 6)
    right = torch.tensor([[[[-9.0, 9.0]], [[9.0, -9.0]]]])
    losses = [
        dice_cross_entropy([undecided, coarse, coarse], target, batch_dice=True).item()
        for coarse in (right, -right)
    ]
    assert losses[0] < 0.2 < 2 < losses[1]


@pytest.mark.parametrize("batch_dice", [False, True])
def test_voxels_to_ignore_are_as_if_they_were_not_there(batch_dice):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (2, 4, 6))
    target[:, :, 4:] = 3
    loss = dice_cross_entropy(logits, target, batch_dice=batch_dice, ignore_label=3)
    kept = dice_cross_entropy(logits[..., :4], target[..., :4], batch_dice=batch_dice)
    torch.testing.assert_close(loss, kept)
    loss.backward()
    assert (logits.grad[..., 4:] == 0).all()
    assert (logits.grad[..., :4] != 0).all()


def test_cross_entropy_with_voxels_to_ignore_is_that_of_torch():
    torch.manual_seed(1)
    scores, target = torch.randn(2, 3, 5, 7), torch.randint(0, 4, (2, 5, 7))
    entropy = functional.cross_entropy(scores, target, ignore_index=3, reduction="none")[:, None]
    found = mean_entropy(entropy, (target != 3).float()[:, None])
    torch.testing.assert_close(found, functional.cross_entropy(scores, target, ignore_index=3))


def test_a_patch_of_nothing_but_voxels_to_ignore_teaches_nothing():
    logits = torch.randn(1, 2, 4, requires_grad=True)
    loss = dice_cross_entropy(logits, torch.full((1, 4), 2), batch_dice=False, ignore_label=2)
    loss.backward()
    assert loss.item() == pytest.approx(-1)  # no cross-entropy, and Dice of nothing with nothing
    assert (logits.grad == 0).all()


def test_heads_of_deep_supervision_ignore_alike():
    torch.manual_seed(2)
    target = torch.randint(0, 2, (1, 4, 8))
    target[..., 4:] = 2
    heads = [torch.randn(1, 2, *size) for size in ((4, 8), (2, 4), (1, 2))]
    other = [head.clone() for head in heads]
    for head in other:
        head[..., head.shape[-1] // 2 :] = 9.0
    one, two = (
        dice_cross_entropy(found, target, batch_dice=True, ignore_label=2)
        for found in (heads, other)
    )
    assert one.item() == two.item()


@pytest.mark.parametrize("regions", [(), REGIONS])
@pytest.mark.parametrize("ignore_label", [None, 3])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_no_number_is_copied_from_the_host(batch_dice, ignore_label, regions, monkeypatch):
    """On a GPU each such copy would wait for all that the GPU has to do."""

    def copied(*_):
        raise AssertionError("copied from the host")

    monkeypatch.setattr(torch.Tensor, "new_tensor", copied)
    monkeypatch.setattr(torch, "tensor", copied)
    monkeypatch.setattr(torch.Tensor, "item", copied)
    logits = [torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 2, 2), torch.zeros(2, 2, 1, 1)]
    target = torch.ones(2, 4, 4, dtype=torch.int8)
    dice_cross_entropy(
        logits,
        target,
        batch_dice=batch_dice,
        regions=regions,
        ignore_label=ignore_label,
        top_k_fraction=0.5,
    )


def test_undecided_regions_by_hand():
    """Three voxels of labels 0, 1, 2: the bleed is 2 of them, the core 1; each p is 1/2.

    BCE = ln 2 everywhere; Dice of the bleed 2 * 1 / (1.5 + 2), of the core 2 * 0.5 / (1.5 + 1).
    """
    target = torch.tensor([[0, 1, 2]])
    loss = dice_cross_entropy(torch.zeros(1, 2, 3), target, batch_dice=False, regions=REGIONS)
    assert loss.item() == pytest.approx(math.log(2) - (2 / 3.5 + 1 / 2.5) / 2, abs=1e-4)


def test_a_missed_region_costs_its_own_dice_and_no_other():
    """The bleed is found and the core is not: Dice 1 and 0; the core's one voxel costs -log p."""
    target = torch.tensor([[0, 1, 2, 0]])
    logits = torch.tensor([[[-30.0, 30.0, 30.0, -30.0], [-30.0, -30.0, -8.0, -30.0]]])
    loss = dice_cross_entropy(logits, target, batch_dice=True, regions=REGIONS)
    entropy = math.log(1 + math.exp(8)) / 8  # of eight, two regions in four voxels
    assert loss.item() == pytest.approx(entropy - 0.5, abs=1e-3)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_regions_against_torch_written_another_way(batch_dice):
    """nnU-Net v2's DC_and_BCE_loss: do_bg, sigmoid, mean binary cross-entropy, equal weights."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 2, 3, 4, 5, generator=generator)
    target = torch.randint(0, 3, (2, 3, 4, 5), generator=generator, dtype=torch.int8)
    truth = torch.stack([torch.isin(target, torch.tensor(held)) for held in ([1, 2], [2])], 1)
    truth, p = truth.float(), 1 / (1 + torch.exp(-logits))
    axes = (0, 2, 3, 4) if batch_dice else (2, 3, 4)
    tp, fp, fn = (p * truth).sum(axes), (p * (1 - truth)).sum(axes), ((1 - p) * truth).sum(axes)
    ratio = ((2 * tp + 1e-5) / (2 * tp + fp + fn + 1e-5)).mean()
    entropy = -(truth * p.log() + (1 - truth) * (1 - p).log()).mean()
    found = dice_cross_entropy(logits, target, batch_dice=batch_dice, regions=REGIONS)
    torch.testing.assert_close(found, entropy - ratio)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_regions_ignore_voxels_as_if_they_were_not_there(batch_dice):
    torch.manual_seed(5)
    logits = torch.randn(2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (2, 4, 6))
    target[:, :, 4:] = 3
    common = {"batch_dice": batch_dice, "regions": REGIONS}
    loss = dice_cross_entropy(logits, target, ignore_label=3, **common)
    torch.testing.assert_close(loss, dice_cross_entropy(logits[..., :4], target[..., :4], **common))
    loss.backward()
    assert (logits.grad[..., 4:] == 0).all()
    assert (logits.grad[..., :4] != 0).all()


def test_regions_of_a_coarser_head_are_those_of_its_labels():
    """Of each block of three voxels the middle one counts, as the core lies in the bleed there."""
    target = torch.tensor([[[0, 2, 0, 2, 0, 1]]])
    fine = torch.zeros(1, 2, 1, 6)
    right = torch.tensor([[[[30.0, -30.0]], [[30.0, -30.0]]]])
    loss = dice_cross_entropy([fine, right, right], target, batch_dice=True, regions=REGIONS)
    undecided = dice_cross_entropy(fine, target, batch_dice=True, regions=REGIONS)
    assert loss.item() == pytest.approx((2 * undecided.item() - 1) / 3, abs=1e-4)


def test_top_k_takes_the_hardest_voxels():
    """Cross-entropies 1 to 10: their mean is 5.5, of a fifth 9.5, and of one voxel 10."""
    entropy = torch.arange(1.0, 11).reshape(1, 1, 2, 5)
    for fraction, mean in ((1.0, 5.5), (0.2, 9.5), (0.01, 10.0)):
        assert mean_entropy(entropy, top_k_fraction=fraction).item() == pytest.approx(mean)


def test_top_k_is_a_share_of_the_voxels_that_count():
    """Six of ten are to be ignored: half of the others are the two hardest, with the mean 3.5."""
    told = torch.zeros(1, 1, 10)
    told[..., :4] = 1
    entropy = torch.arange(1.0, 11).reshape(1, 1, 10) * told
    for fraction, mean in ((0.5, 3.5), (0.8, 3.0), (0.1, 4.0)):
        assert mean_entropy(entropy, told, top_k_fraction=fraction).item() == pytest.approx(mean)
    none = torch.zeros(1, 1, 10)
    assert mean_entropy(none, none, top_k_fraction=0.5).item() == 0


@pytest.mark.parametrize("regions", [(), REGIONS])
def test_top_k_ignores_voxels_as_if_they_were_not_there(regions):
    torch.manual_seed(3)
    logits = torch.randn(2, 2, 4, 10, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 2, (2, 4, 10))
    target[:, :, 4:] = 3
    common = {"batch_dice": True, "top_k_fraction": 0.3, "regions": regions}
    loss = dice_cross_entropy(logits, target, ignore_label=3, **common)
    kept = dice_cross_entropy(logits[..., :4], target[..., :4], **common)
    torch.testing.assert_close(loss, kept)
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(kept, logits)
    torch.testing.assert_close(gradient, expected)
    aware = dice_cross_entropy(logits[..., :4], target[..., :4], ignore_label=3, **common)
    torch.testing.assert_close(aware, kept)


def test_easy_voxels_do_not_pull_under_top_k():
    logits = torch.tensor([[[5.0, 0.5, 5.0, 5.0], [0.0, 0.0, 0.0, 0.0]]], requires_grad=True)
    target = torch.zeros(1, 4, dtype=torch.int8)
    dice_cross_entropy(logits, target, batch_dice=False, top_k_fraction=0.25).backward()
    with_dice = logits.grad.clone()
    logits.grad = None
    dice_cross_entropy(logits, target, batch_dice=False).backward()
    # Dice is the same in both: what differs is the cross-entropy of three easy voxels and one hard
    change = (with_dice - logits.grad)[0, 1]
    assert change[1] > 0
    assert (change[[0, 2, 3]] < 0).all()
