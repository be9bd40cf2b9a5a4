"""The step of a training on a GPU, by a pretended one: see ``helpers.card``."""

import contextlib
import dataclasses
import itertools
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURE
from helpers import card
from helpers.workspaces import QUICK
from torch import distributed

from training.batches.stream import Batch
from training.data.workspace import LATEST_CHECKPOINT
from training.fit import process_group
from training.fit.checkpoint import load_checkpoint
from training.fit.fold_run import open_run
from training.fit.loop import train_fold
from training.fit.process_group import ALONE, GradientSums, ProcessGroup
from training.fit.step import Reading, begin, train_step, validation_step
from training.jobs.train import run_fold

DEEP = dataclasses.replace(
    ARCHITECTURE,
    features=(4, 8, 8),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    encoder_convs=(1, 1, 1),
    decoder_convs=(1, 1),
    deep_supervision=True,
)


def batch_on(device, labels=2):
    rng = np.random.default_rng(3)
    data = torch.from_numpy(rng.normal(size=(2, 1, 4, 16, 16)).astype(np.float32))
    target = torch.from_numpy(rng.integers(labels, size=(2, 4, 16, 16)).astype(np.int8))
    return Batch(data.to(device), target.to(device))


def run_on(
    workspace, device, *, architecture=DEEP, ignore_label=None, batch_dice=False, plans=None,
    group=ALONE, **given,
):  # fmt: skip
    config = dataclasses.replace(QUICK, device=device, **given)
    run = open_run(workspace, "3d_fullres", "0", config, group)
    configuration = dataclasses.replace(
        run.configuration, architecture=architecture, batch_dice=batch_dice
    )
    plans = dataclasses.replace(run.plans, configurations=(configuration,), **plans or {})
    return dataclasses.replace(
        run, configuration=configuration, plans=plans, ignore_label=ignore_label
    )


def gradients(state):
    return [p.grad.cpu() for p in state.network.parameters() if p.grad is not None]


CHOICES = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "SGD": {"optimiser": "sgd", "momentum": 0.9},
    "SGD fp16": {"optimiser": "sgd", "momentum": 0.9, "precision": "fp16"},
    "clipped": {"gradient_clip": 0.01},
    "channels-last": {"memory_format": "channels_last"},
    "channels-last fp16 SGD": {
        "memory_format": "channels_last", "precision": "fp16", "optimiser": "sgd",
        "gradient_clip": 12.0,
    },
    "one head": {"architecture": ARCHITECTURE},
    "residual": {
        "architecture": dataclasses.replace(DEEP, block="residual"),
        "memory_format": "channels_last",
    },
    "batch Dice": {"batch_dice": True},
    "ignore": {"ignore_label": 2},
    "top-k": {"top_k_fraction": 0.1, "ignore_label": 2},
    "regions": {
        "plans": {
            "labels": ("background", "a", "b"), "regions": (2, 1),
            "region_labels": ((1, 2), (1,)),
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_a_step_waits_for_nothing_and_does_what_the_cpu_does(fresh, monkeypatch, choice):
    given = CHOICES[choice]
    labels = 3 if choice in ("regions", "top-k", "ignore") else 2
    run = run_on(fresh, "cpu", **given | {"precision": "fp32"})
    state = begin(run)
    losses, expected = [], []
    for _ in range(2):
        losses.append(float(train_step(run, state, batch_on("cpu", labels))))
        expected = expected or gradients(state)
    state.network.eval()
    validated, counts = validation_step(run, state, batch_on("cpu", labels))
    with card.pretended(monkeypatch) as there:
        run = run_on(fresh, "cuda", **given)
        state = begin(run)
        assert state.optimiser.param_groups[0]["fused"]
        batch = batch_on("cuda", labels)
        found, moved = [], []
        for _ in range(2):
            with there.unwaited():
                reading = Reading(train_step(run, state, batch))
            assert math.isnan(reading._value)  # it is under way
            found.append(reading.read())
            moved = moved or gradients(state)
        state.network.eval()
        with there.unwaited():
            loss, hits = validation_step(run, state, batch)
        loss, hits = float(loss), hits.cpu()
    exact = run.precision == "fp32"
    tolerance = 1e-4 if exact else 2e-2
    assert found == pytest.approx(losses, abs=tolerance)
    assert loss == pytest.approx(float(validated), abs=tolerance)
    assert (hits - counts).abs().max() <= (0 if exact else 60)
    for ours, theirs in zip(moved, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 if exact else 2e-2)


class Work:
    """A sum over two processes that have the same, there once it is waited for."""

    def __init__(self, value):
        self.value = value

    def wait(self):
        self.value.mul_(2)


def test_two_processes_sum_on_their_cards_and_tell_numbers_on_the_host(fresh, monkeypatch):
    def summed(value, *, async_op=False):
        assert value.is_cuda
        return Work(value) if async_op else Work(value).wait()

    def told(value, _):
        assert not value.is_cuda

    monkeypatch.setattr(distributed, "all_reduce", summed)
    monkeypatch.setattr(distributed, "broadcast", told)
    monkeypatch.setattr(process_group, "BUCKET_BYTES", 2000)
    given = {"optimiser": "sgd", "learning_rate": 0.1, "batch_dice": True}
    alone = run_on(fresh, "cpu", **given)
    state = begin(alone)
    twice = Batch(*(torch.cat([part, part]) for part in batch_on("cpu")))
    losses = [float(train_step(alone, state, twice)) for _ in range(3)]
    with card.pretended(monkeypatch) as there:
        run = run_on(
            fresh, "cuda", memory_format="channels_last", group=ProcessGroup(0, 2), **given
        )  # fmt: skip
        state = begin(run)
        state.sums = GradientSums(state.network.parameters())
        batch = batch_on("cuda")
        found = []
        for _ in range(3):
            with there.unwaited():
                reading = Reading(train_step(run, state, batch))
            found.append(reading.read())
        assert len(state.sums._buckets) > 1
    assert found == pytest.approx(losses, abs=1e-4)


def test_a_fold_is_trained_and_goes_on_in_another_layout(fresh, monkeypatch):
    """With checkpoints, which are copied in the background, and cases segmented at the end."""
    config = dataclasses.replace(
        QUICK, device="cuda", compile=False, optimiser="sgd", precision="fp16", epochs=1,
        validation=True, validation_mirrors=False,
    )  # fmt: skip
    with card.pretended(monkeypatch):
        assert run_fold(fresh, "3d_fullres", "0", config)
        config = dataclasses.replace(config, epochs=2, memory_format="channels_last")
        assert run_fold(fresh, "3d_fullres", "0", config)
    run = open_run(fresh, "3d_fullres", "0", dataclasses.replace(QUICK, epochs=2))
    latest = load_checkpoint(
        run.folder / LATEST_CHECKPOINT, run.plans, run.configuration, run.cases
    )
    assert len(latest["history"]) == 2
    assert all(tensor.isfinite().all() for tensor in latest["network"].values())
    assert (run.folder / "validation.json").exists()


@pytest.mark.parametrize(
    "real",
    [
        False,
        pytest.param(
            True,
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_a_training_that_is_interrupted_goes_on_in_another_layout(
    fresh, monkeypatch, optimiser, real
):
    """In mid-epoch, with the moments of a fused optimiser; on a GPU, too, without SimpleITK."""
    config = dataclasses.replace(
        QUICK, device="cuda", optimiser=optimiser, amsgrad=optimiser == "adam", precision="fp32",
        momentum=0.9, compile=False, epochs=3,
    )  # fmt: skip
    losses = []
    with contextlib.nullcontext() if real else card.pretended(monkeypatch):
        for interrupted in (False, True):
            run = open_run(fresh, "3d_fullres", "0", config)
            shutil.rmtree(run.folder, ignore_errors=True)
            if interrupted:
                steps = itertools.count()
                assert not train_fold(run, interrupted=lambda steps=steps: next(steps) == 4)
                other = dataclasses.replace(config, memory_format="channels_last")
                run = open_run(fresh, "3d_fullres", "0", other)
            assert train_fold(run)
            latest = run.folder / LATEST_CHECKPOINT
            ended = load_checkpoint(latest, run.plans, run.configuration, run.cases)
            assert all(tensor.isfinite().all() for tensor in ended["network"].values())
            losses.append([row["train_loss"] for row in ended["history"]])
    assert len(losses[0]) == 3
    # a card computes by other kernels in another layout, in TF32 where it has that
    assert losses[1] == pytest.approx(losses[0], abs=2e-2 if real else 1e-3)
