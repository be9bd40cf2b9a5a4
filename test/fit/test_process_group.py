"""Two processes with a part of each batch take the steps that one takes with the whole."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURE, CONFIGURATION, PLANS
from helpers.workspaces import QUICK, planned
from torch import distributed

from ichseg.errors import TrainingError
from ichseg.model import strict_json
from training.__main__ import main as command
from training.batches.sampling import BatchKey
from training.batches.stream import Batch, open_batches
from training.data.workspace import LATEST_CHECKPOINT
from training.fit import loop, process_group
from training.fit.checkpoint import read_checkpoint
from training.fit.fold_run import open_run
from training.fit.process_group import ALONE, GradientSums, ProcessGroup
from training.fit.step import begin, train_step, validation_step
from training.planning.memory import training_bytes

ROOT = Path(__file__).parents[2]
VARIANTS = [
    (batch_dice, optimiser) for batch_dice in (False, True) for optimiser in ("adam", "sgd")
]


def five_steps(workspace, batch_dice, optimiser, group, device="cpu"):
    """Parameters after five steps in float64, the losses, and what a validation batch counts."""
    config = dataclasses.replace(
        QUICK, optimiser=optimiser, learning_rate=0.001, gradient_clip=0.5, momentum=0.9,
        device=device, augmentation_engine="host",
    )  # fmt: skip
    run = open_run(workspace, "3d_fullres", "0", config, group)
    run = dataclasses.replace(
        run, configuration=dataclasses.replace(run.configuration, batch_dice=batch_dice)
    )
    state = begin(run)
    if group.count > 1:
        state.sums = GradientSums(state.network.parameters())
    state.network.double()
    for moments in state.optimiser.state.values():  # which a fused one has from the beginning
        moments.update({name: value.double() for name, value in moments.items()})
    keys = [*(BatchKey(0, number) for number in range(5)), BatchKey(0, 0, validation=True)]
    losses = []
    with open_batches(run.spec, iter(keys), config.stream, run.device) as stream:
        for _ in range(5):
            data, target = next(stream)
            losses.append(train_step(run, state, Batch(data.double(), target)))
        state.network.eval()
        data, target = next(stream)
        losses.append(validation_step(run, state, Batch(data.double(), target))[0])
        counts = validation_step(run, state, Batch(data.double(), target))[1]
    weights = torch.cat([p.detach().reshape(-1) for p in state.network.parameters()])
    return weights.cpu(), torch.tensor(losses, dtype=torch.float64), counts.cpu()


def one_of_two(workspace, out, device):
    """What each of the two processes does; at the end of this file."""
    torch.set_num_threads(1)
    process_group.BUCKET_BYTES = 1000  # several sums under way at once
    with process_group.joined("cpu") as group:  # gloo, which lets both have one GPU
        found = {variant: five_steps(workspace, *variant, group, device) for variant in VARIANTS}
        said = group.any(group.rank == 1, False), group.of_leader(float(group.rank))
    torch.save((found, said), out / f"{group.rank}.pt")


def fail_in_one(workspace):
    """Train two folds in two processes, the second of which fails in its second step."""
    torch.set_num_threads(1)
    real, steps = loop.train_step, []

    def step(run, state, batch):
        steps.append(run.group.rank)
        if steps == [1, 1]:
            raise TrainingError("this process fails")
        return real(run, state, batch)

    loop.train_step = step
    line = f"""
        train 3d_fullres --workspace {workspace} --folds 0,1 --epochs 1 --batches-per-epoch 3
        --validation-batches 2 --threads 1 --workers 0 --device cpu
    """
    return command(line.split())


def torchrun(*words, status=0):
    """Run two processes of a command, and return what they wrote to stderr."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*run, *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'test'}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done.stderr


@pytest.fixture(params=[4])
def larger(fresh, request):
    """A workspace whose batch of 4 has 1 oversampled one, in the second process' half.

    Of a batch of 3 the second process has 2, one of them oversampled.
    """
    (fresh / "plans.json").unlink()
    (fresh / "plans.json").write_text(strict_json.dumps(planned(batch=request.param)))
    return fresh


ON_A_GPU = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("larger", [4, 3], indirect=True)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
def test_two_processes_equal_one(larger, tmp_path, device):
    alone = {variant: five_steps(larger, *variant, ALONE, device) for variant in VARIANTS}
    torchrun(__file__, "compare", str(larger), str(tmp_path), device)
    for rank in (0, 1):
        found, said = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert said == ((True, False), 0.0)
        for variant in VARIANTS:
            for part, expected in zip(found[variant], alone[variant], strict=True):
                torch.testing.assert_close(part, expected, rtol=0, atol=1e-9)
    first, second = alone[False, "sgd"][0], alone[True, "sgd"][0]
    assert (first - second).abs().max() > 1e-7  # the two losses are not one and the same


@pytest.mark.slow
def test_torchrun_trains_one_fold(larger):
    line = f"""
        -m training train 3d_fullres --workspace {larger} --fold 0 --recipe nnunetv2 --epochs 1
        --batches-per-epoch 3 --validation-batches 2 --threads 1 --workers 0 --device cpu
    """
    told = torchrun(*line.split())
    assert "2 processes" in told
    assert told.count("epoch 1/1") == 1  # one of them tells
    end = read_checkpoint(larger / "runs" / "3d_fullres" / "fold_0" / LATEST_CHECKPOINT,
                          dataclasses.replace(CONFIGURATION, batch=4))  # fmt: skip
    assert end["finished"] == "all 1 epochs done"
    folder = larger / "runs" / "3d_fullres" / "fold_0"
    found = json.loads((folder / "validation.json").read_text())
    assert found["complete"] is True
    assert len(found["dice"]) == 2  # of which each process has segmented one
    assert not list(folder.glob("validation.part*"))


class Sent:
    """A sum over three processes that have the same gradients, asked for and waited for."""

    def __init__(self, events, joined):
        self.events, self.joined = events, joined
        events.append(("sent", joined.numel()))

    def wait(self):
        self.events.append(("waited", self.joined.numel()))
        self.joined *= 3


def test_gradients_are_sent_while_the_backward_pass_goes_on(monkeypatch):
    """Layers of 6 numbers each, of which the last one has its gradient first; one has none."""
    events = []
    monkeypatch.setattr(process_group, "BUCKET_BYTES", 40)  # two layers of 24 bytes
    monkeypatch.setattr(distributed, "broadcast", lambda *_: None)
    monkeypatch.setattr(distributed, "all_reduce", lambda joined, async_op: Sent(events, joined))
    torch.manual_seed(0)
    layers = [torch.nn.Parameter(torch.randn(6)) for _ in range(6)]
    sums = GradientSums(layers)
    for number, layer in enumerate(layers):
        layer.register_hook(lambda _, number=number: events.append(number))
    for step in range(3):
        events.clear()
        for layer in layers:
            layer.grad = None
        x = torch.ones(6)
        for layer in layers[:5]:  # the sixth is not used
            x = (x * layer).tanh()
        x.sum().backward()
        own = [layer.grad.clone() for layer in layers[:5]]
        sums.finish()
        for layer, gradient in zip(layers, own, strict=False):
            torch.testing.assert_close(layer.grad, 3 * gradient)
        assert layers[5].grad is None
        if step > 0:
            assert events[:8] == [4, 3, ("sent", 12), 2, 1, ("sent", 12), 0, ("sent", 6)]
    assert events[8:] == [
        ("waited", 12), ("waited", 12), ("waited", 6),
    ]  # fmt: skip


def test_after_a_trial_no_bucket_waits_for_a_head_that_no_loss_counts(fresh, monkeypatch):
    """The trial of ``torch.compile`` goes back through all heads, the loss not the coarsest."""
    architecture = dataclasses.replace(
        ARCHITECTURE, features=(4, 8, 8), kernels=((1, 3, 3),) * 3,
        strides=((1, 1, 1), (1, 2, 2), (1, 2, 2)), encoder_convs=(1, 1, 1), decoder_convs=(1, 1),
        deep_supervision=True,
    )  # fmt: skip
    (fresh / "plans.json").unlink()
    (fresh / "plans.json").write_text(strict_json.dumps(planned(architecture=architecture)))
    monkeypatch.setattr(torch, "compile", lambda network: lambda data: network(data))
    monkeypatch.setattr(process_group, "BUCKET_BYTES", 40)
    monkeypatch.setattr(distributed, "broadcast", lambda *_: None)
    monkeypatch.setattr(
        distributed,
        "all_reduce",
        lambda value, *_, async_op=False: Sent([], value) if async_op else None,
    )
    config = dataclasses.replace(QUICK, compile=True)
    run = open_run(fresh, "3d_fullres", "0", config, ProcessGroup(0, 2))
    state = loop._state_of(run, None, None)
    sums, sent = state.sums, []
    finish = sums.finish
    monkeypatch.setattr(
        GradientSums, "finish", lambda _: (sent.append(len(sums._under_way)), finish())
    )
    data = torch.randn(1, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        train_step(run, state, Batch(data, (data[:, 0] > 0).to(torch.int8)))
    assert len(sums._buckets) > 4
    assert sent == [0, len(sums._buckets), len(sums._buckets)]
    *_, unused = state.network.heads
    assert unused.weight.grad is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_sums_by_nccl_wait_for_the_gradients(tmp_path, monkeypatch):
    """One process, as NCCL has no second one on a card: each sum is the gradient itself."""
    monkeypatch.setattr(process_group, "BUCKET_BYTES", 1000)
    meeting = f"file://{tmp_path / 'meeting'}"
    distributed.init_process_group("cpu:gloo,cuda:nccl", meeting, rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(512, 512, device="cuda") for _ in range(8)]
        network = torch.nn.Sequential(*layers)
        sums = GradientSums(network.parameters())
        for _ in range(3):
            x = torch.randn(4096, 512, device="cuda")
            expected = torch.autograd.grad(network(x).square().sum(), list(network.parameters()))
            network.zero_grad()
            network(x).square().sum().backward()
            sums.finish()
            for parameter, gradient in zip(network.parameters(), expected, strict=True):
                torch.testing.assert_close(parameter.grad, gradient)
    finally:
        distributed.destroy_process_group()


def test_refuses_a_batch_that_cannot_be_shared(fresh):
    with pytest.raises(TrainingError, match="batch of 2 over 3 processes, expected at most 2"):
        open_run(fresh, "3d_fullres", "0", QUICK, ProcessGroup(0, 3))


def test_a_process_needs_memory_for_its_own_samples(fresh):
    alone = open_run(fresh, "3d_fullres", "0", QUICK).spec.training_bytes
    assert alone == training_bytes(PLANS, CONFIGURATION) > 0
    one_of_two = open_run(fresh, "3d_fullres", "0", QUICK, ProcessGroup(1, 2))
    assert one_of_two.spec.training_bytes == pytest.approx(alone / 2, abs=1)


@pytest.mark.slow
def test_where_one_process_fails_the_others_end_at_once_and_say_so(larger):
    told = torchrun(__file__, "fail", str(larger), status=1)
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert "error: this process fails" in errors
    assert any(line.startswith("error: another process of this training") for line in errors)
    assert "SIGABRT" not in told
    assert not (larger / "runs" / "3d_fullres" / "fold_1").exists()


if __name__ == "__main__":
    if sys.argv[1] == "compare":
        one_of_two(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
        process_group.leave(0)
    process_group.leave(fail_in_one(Path(sys.argv[2])))
