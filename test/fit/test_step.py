import copy
import dataclasses
import itertools
import math

import pytest
import torch
from helpers import card
from helpers.steps import parameters, some_batch
from helpers.workspaces import QUICK, leaves

from ichseg.errors import TrainingError
from training.batches.stream import Batch
from training.fit import compiling, step
from training.fit.configuration import TRAINING_RECIPES
from training.fit.fold_run import open_run
from training.fit.step import begin, pseudo_dice, train_step, validation_step
from training.jobs.train import run_fold

SGD = dataclasses.replace(
    QUICK, optimiser="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.01, gradient_clip=0.0
)


def gradients(state):
    return torch.cat([p.grad.reshape(-1) for p in state.network.parameters()])


def test_seed_and_fold_decide_the_network(fresh):
    def weights(fold, seed):
        run = open_run(fresh, "3d_fullres", fold, dataclasses.replace(QUICK, seed=seed))
        return leaves(begin(run).network.state_dict())

    assert weights("0", 0) == weights("0", 0)
    assert weights("0", 0) != weights("0", 1)
    assert weights("0", 0) != weights("1", 0)


def test_a_loss_that_is_not_finite_does_not_reach_the_weights(fresh, monkeypatch):
    run = open_run(fresh, "3d_fullres", "0", QUICK)
    state = begin(run)
    before = leaves(state.network.state_dict())
    monkeypatch.setattr(
        step, "dice_cross_entropy", lambda logits, *_, **__: logits.sum() * float("inf")
    )
    batch = Batch(torch.ones(2, 1, 4, 16, 16), torch.zeros(2, 4, 16, 16, dtype=torch.int8))
    assert not math.isfinite(train_step(run, state, batch))
    assert leaves(state.network.state_dict()) == before


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [0.0, 12.0])
def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(fresh, clip, fused):
    """Clipped, one infinite number would make all weights NaN."""
    run = open_run(fresh, "3d_fullres", "0", dataclasses.replace(SGD, gradient_clip=clip))
    state = begin(run)
    state.optimiser = step.make_optimiser(state.network, run.config, fused=fused)
    before = parameters(state)
    parameter = next(state.network.parameters())
    hook = parameter.register_hook(lambda found: torch.full_like(found, math.inf))
    assert math.isnan(train_step(run, state, some_batch()))
    assert torch.equal(parameters(state), before)
    hook.remove()
    assert math.isfinite(train_step(run, state, some_batch()))
    assert not torch.equal(parameters(state), before)


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_a_fused_optimiser_leaves_such_a_step_out_by_itself(fresh, optimiser, monkeypatch):
    """As on CUDA, where nobody waits for the loss; torch has it on the CPU, too."""
    config = dataclasses.replace(SGD, optimiser=optimiser, learning_rate=0.01)
    run = open_run(fresh, "3d_fullres", "0", config)
    state, plain = begin(run), begin(run)
    state.optimiser = step.make_optimiser(state.network, run.config, fused=True)
    real = step.dice_cross_entropy
    for spoilt in (True, False, True, False):
        before = parameters(state)
        with monkeypatch.context() as patch:
            if spoilt:
                patch.setattr(
                    step, "dice_cross_entropy", lambda logits, *_, **__: logits.sum() * math.nan
                )
            loss = train_step(run, state, some_batch())
        assert math.isfinite(loss) != spoilt
        assert torch.equal(parameters(state), before) == spoilt
    assert step.dice_cross_entropy is real
    for _ in range(2):
        train_step(run, plain, some_batch())
    # where a gradient is all but 0, Adam's step of 0.01 has whatever size rounding gives it
    torch.testing.assert_close(parameters(state), parameters(plain), rtol=1e-4, atol=1e-3)


def test_moments_of_another_device_are_taken_over(fresh):
    """A checkpoint of the CPU goes on with a fused optimiser, and the other way round."""
    run = open_run(fresh, "3d_fullres", "0", QUICK)
    plain, fused = begin(run), begin(run)
    fused.optimiser = step.make_optimiser(fused.network, run.config, fused=True)
    train_step(run, plain, some_batch())
    fused.network.load_state_dict(plain.network.state_dict())
    saved = copy.deepcopy(plain.optimiser.state_dict())  # torch would share its tensors
    step.restore_optimiser(fused.optimiser, saved, run.config)
    assert fused.optimiser.param_groups[0]["fused"] is True
    for state in (plain, fused):
        train_step(run, state, some_batch())
    torch.testing.assert_close(parameters(fused), parameters(plain), rtol=1e-4, atol=1e-6)
    step.restore_optimiser(plain.optimiser, fused.optimiser.state_dict(), run.config)
    assert not plain.optimiser.param_groups[0]["fused"]


def test_auto_takes_bfloat16_where_card_or_processor_has_it(fresh, monkeypatch):
    run = open_run(fresh, "3d_fullres", "0", dataclasses.replace(QUICK, precision="auto"))
    card = dataclasses.replace(run, device=torch.device("cuda"))
    for has_it, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_it)  # noqa: B023
        assert card.precision == expected
    for able, expected in (
        ({}, "fp32"),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)  # noqa: B023
        assert run.precision == expected


def test_pseudo_dice_by_hand():
    # two classes: 3 hits of 4 + 6 voxels, and 0 of 5; a third class that does not occur
    counts = torch.tensor([[3, 10], [0, 5], [0, 0]])
    assert pseudo_dice(counts) == (0.6, 0, None)


def test_validation_counts_by_hand(fresh):
    run = open_run(fresh, "3d_fullres", "0", QUICK)
    state = begin(run)
    state.network = state.forward = torch.nn.Conv3d(1, 2, 1)
    with torch.no_grad():
        state.network.weight.copy_(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1, 1))
        state.network.bias.zero_()  # foreground where the image is above 0
    data = torch.tensor([1.0, 1, -1, -1, 1]).reshape(1, 1, 1, 1, 5)
    target = torch.tensor([1, 0, 1, 0, 1], dtype=torch.int8).reshape(1, 1, 1, 5)
    _, counts = validation_step(run, state, Batch(data, target))
    assert counts.tolist() == [[2, 6]]


def test_two_sgd_steps_by_hand(fresh):
    """V2: weight decay joins the gradient g; v = m v + g; Nesterov steps along g + m v."""
    state = begin(run := open_run(fresh, "3d_fullres", "0", SGD))
    expected, velocity = parameters(state), None
    for _ in range(2):
        before = parameters(state)
        train_step(run, state, some_batch())
        g = gradients(state) + 0.01 * before
        velocity = g if velocity is None else 0.9 * velocity + g
        expected = expected - 0.1 * (g + 0.9 * velocity)
    torch.testing.assert_close(parameters(state), expected, rtol=1e-5, atol=1e-7)


def test_a_long_gradient_is_clipped_and_a_short_one_is_not(fresh):
    def moved(clip):
        config = dataclasses.replace(SGD, gradient_clip=clip, momentum=0.0, nesterov=False,
                                     weight_decay=0.0)  # fmt: skip
        state = begin(run := open_run(fresh, "3d_fullres", "0", config))
        before = parameters(state)
        train_step(run, state, some_batch())
        return (parameters(state) - before).norm().item()

    free = moved(0.0) / 0.1  # the gradient's norm
    assert moved(free / 2) == pytest.approx(0.1 * free / 2, rel=1e-4)
    assert moved(free * 2) == pytest.approx(0.1 * free, rel=1e-4)


def test_a_scaled_loss_makes_the_same_step(fresh):
    """What fp16 does, in fp32: gradients are scaled back before they are clipped."""
    config = dataclasses.replace(SGD, gradient_clip=0.05)
    run = open_run(fresh, "3d_fullres", "0", config)
    plain, scaled = begin(run), begin(run)
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for state in (plain, scaled):
        train_step(run, state, some_batch())
    torch.testing.assert_close(parameters(scaled), parameters(plain), rtol=1e-6, atol=1e-8)


def test_an_overflow_leaves_the_step_out_and_halves_the_scale(fresh, monkeypatch):
    state = begin(run := open_run(fresh, "3d_fullres", "0", SGD))
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    monkeypatch.setattr(step, "dice_cross_entropy", lambda logits, *_, **__: 1e30 * logits.mean())
    before = parameters(state)
    assert math.isfinite(train_step(run, state, some_batch()))
    assert torch.equal(parameters(state), before)
    assert state.scaler.get_scale() == 2.0**99


def test_deep_supervision_is_scored_by_its_finest_head(fresh):
    state = begin(run := open_run(fresh, "3d_fullres", "0", QUICK))
    batch = some_batch()
    state.network.eval()
    with torch.no_grad():
        found = state.network(batch.data).argmax(1)
    loss, counts = validation_step(run, state, batch)
    hits = int(((found == 1) & (batch.target == 1)).sum())
    assert counts.tolist() == [[hits, int((found == 1).sum() + (batch.target == 1).sum())]]
    assert math.isfinite(loss)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_lower_and_to_what(fresh, monkeypatch, error):
    def exhausted(*_, **__):
        raise error

    monkeypatch.setattr(step, "dice_cross_entropy", exhausted)
    with pytest.raises(
        TrainingError,
        match=r"fold_0: out of memory on cpu with patch 4x16x16, batch 2, fp32; in this order, try "
        r"torchrun --nproc-per-node 2 .*, plan --gpu-memory-gb 6 \(now 12\)$",
    ):
        run_fold(fresh, "3d_fullres", "0", QUICK)


def test_no_batch_below_two_is_advised(fresh):
    """Of one sample, as of three halved: nothing is planned for so few."""
    run = open_run(fresh, "3d_fullres", "0", QUICK)
    for batch, advice in ((2, ""), (3, "plan --batch 2, "), (8, "plan --batch 4, ")):
        planned = dataclasses.replace(run.configuration, batch=batch)
        with (
            pytest.raises(TrainingError, match=f"GPUs, {advice}plan --gpu-memory-gb"),
            step.memory_advice(dataclasses.replace(run, configuration=planned)),
        ):
            raise MemoryError


def test_refuses_fp16_on_the_cpu(fresh):
    config = dataclasses.replace(QUICK, precision="fp16")
    with pytest.raises(TrainingError, match="precision fp16 on the CPU, expected fp32, bf16"):
        open_run(fresh, "3d_fullres", "0", config)


def test_refuses_bf16_on_a_card_that_does_not_compute_in_it(fresh, monkeypatch):
    config = dataclasses.replace(QUICK, device="cuda", precision="bf16")
    with card.pretended(monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
        with pytest.raises(TrainingError, match=r"bf16: a pretended card does not .* fp16, fp32"):
            open_run(fresh, "3d_fullres", "0", config)


def test_deterministic_is_on_while_training_only(fresh, monkeypatch):
    seen = []
    real = step.dice_cross_entropy

    def loss(*args, **options):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))
        return real(*args, **options)

    monkeypatch.setattr(step, "dice_cross_entropy", loss)
    before = torch.backends.cudnn.benchmark
    for deterministic in (True, False):
        seen.clear()
        config = dataclasses.replace(QUICK, epochs=1, deterministic=deterministic)
        assert run_fold(fresh, "3d_fullres", "0", config, restart=True)
        assert set(seen) == {(deterministic, not deterministic)}
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark == before


def test_voxels_to_ignore_count_neither_in_the_loss_nor_in_dice(fresh):
    run = dataclasses.replace(open_run(fresh, "3d_fullres", "0", QUICK), ignore_label=2)
    state = begin(run)
    state.network.eval()
    torch.manual_seed(0)
    data = torch.randn(2, 1, 4, 16, 16)
    target = torch.randint(0, 2, (2, 4, 16, 16), dtype=torch.int8)
    target[:, :2] = 2
    loss, counts = validation_step(run, state, Batch(data, target))
    found = state.network(data).argmax(1)[:, 2:]
    left = target[:, 2:]
    expected = [int((found & left).sum()), int(found.sum() + left.sum())]
    assert counts.tolist() == [expected]
    assert math.isfinite(loss)
    unaware = dataclasses.replace(run, ignore_label=None)
    _, more = validation_step(unaware, state, Batch(data, target))
    assert more.tolist() != [expected]  # what is found there counts as wrong


def on_cuda(workspace, **changes):
    run = open_run(workspace, "3d_fullres", "0", dataclasses.replace(QUICK, **changes))
    return run, begin(run)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    ("precision", "layout", "compiled"),
    [
        *itertools.product(("fp32", "bf16", "fp16"), ("contiguous", "channels_last"), [False]),
        # what training takes by itself, and one that shares neither; each compiles for long
        ("bf16", "channels_last", True),
        ("fp16", "contiguous", True),
    ],
)
def test_steps_on_cuda_are_those_of_the_cpu(fresh, precision, layout, compiled):
    """Three steps; of the gradient's direction and the loss, which fp32 on the CPU gives."""
    tolerance = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}[precision]
    run, state = on_cuda(fresh, optimiser="sgd", learning_rate=1e-3)
    losses = [train_step(run, state, some_batch()).item() for _ in range(3)]
    card, there = on_cuda(
        fresh, optimiser="sgd", learning_rate=1e-3, device="cuda", precision=precision,
        memory_format=layout, compile=compiled,
    )  # fmt: skip
    there.forward = compiling.forward_of(card, there.network)
    assert (there.forward is not there.network) == compiled  # else it has failed, with a warning
    batch = Batch(*(part.cuda() for part in some_batch()))
    found = [train_step(card, there, batch).item() for _ in range(3)]
    assert there.optimiser.param_groups[0]["fused"]
    assert found == pytest.approx(losses, abs=tolerance)
    moved = parameters(state) - parameters(begin(run))
    also = parameters(there).cpu() - parameters(begin(run))
    assert torch.nn.functional.cosine_similarity(moved, also, dim=0) > 1 - 3 * tolerance


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_nobody_waits_for_the_gpu_within_a_step(fresh, precision):
    run, state = on_cuda(fresh, device="cuda", precision=precision, gradient_clip=12.0)
    batch = Batch(*(part.cuda() for part in some_batch()))
    for _ in range(3):
        train_step(run, state, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step.Reading(train_step(run, state, batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(loss.read())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("recipe", ["msd2018", "nnunetv2", "compact"])
def test_a_fold_is_trained_and_validated_on_cuda(fresh, recipe):
    pytest.importorskip("SimpleITK", reason="validation reads and writes files")
    changes = {"device": "cuda", "epochs": 2, "batches_per_epoch": 4, "validation_batches": 1}
    config = dataclasses.replace(
        TRAINING_RECIPES[recipe], **changes, augmentation=QUICK.augmentation
    )
    assert run_fold(fresh, "3d_fullres", "0", config)
    assert run_fold(fresh, "3d_fullres", "0", dataclasses.replace(config, epochs=3))
    run = open_run(fresh, "3d_fullres", "0", config)
    assert (run.folder / "validation.json").exists()
