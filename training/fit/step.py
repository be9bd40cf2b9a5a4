"""One update of the weights, and one look at a validation batch."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ichseg.engine import torch_device
from ichseg.errors import TrainingError
from ichseg.model.network import build_network
from ichseg.predict.dice import dice_of_counts
from ichseg.wording import times
from training.batches.stream import Batch
from training.fit import schedule
from training.fit.configuration import TrainingConfig
from training.fit.fold_run import FoldRun
from training.fit.history import EpochRow
from training.fit.losses import dice_cross_entropy, one_hot
from training.fit.process_group import GradientSums
from training.fit.schedule import ScheduleState
from training.planning import recipes

Forward = Callable[[Tensor], Tensor | list[Tensor]]


@dataclass(slots=True)
class TrainingState:
    """What changes, and what a checkpoint holds.

    Attributes:
        network: The network in training.
        forward: The network, or its compiled form.
        optimiser: The optimiser, with its moments.
        scaler: Scales the loss under fp16; does nothing otherwise.
        sums: Adds gradients up over the processes; None alone.
        schedule: Where the schedule stands after the last whole epoch.
        losses: Training losses of the current epoch so far, one for each step.
        seconds: Seconds spent in the current epoch so far.
        data_wait_s: Seconds of them spent waiting for batches.
        elapsed_s: Seconds spent in all, by all sessions of this run.
        history: One row for each whole epoch.
        average_dice: Moving average of the pseudo-Dice; None before there is any.
        best_dice: The best value that the average has had.
    """

    network: nn.Module
    forward: Forward
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: ScheduleState
    sums: GradientSums | None = None
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    data_wait_s: float = 0.0
    elapsed_s: float = 0.0
    history: list[EpochRow] = field(default_factory=list)
    average_dice: float | None = None
    best_dice: float | None = None


def begin(run: FoldRun) -> TrainingState:
    """A freshly initialised network and its optimiser; depends on seed and fold only."""
    words = np.random.SeedSequence([run.config.seed, run.spec.fold])
    torch.manual_seed(int(words.generate_state(1)[0]))
    network = build_network(
        run.configuration.architecture,
        run.plans.input_channels(run.configuration),
        run.plans.scores,
    )
    network = network.to(run.device, memory_format=run.layout)  # type: ignore[call-overload]
    return TrainingState(
        network=network,
        forward=network,
        optimiser=make_optimiser(network, run.config, fused=run.device.type == "cuda"),
        scaler=torch.amp.GradScaler(run.device.type, enabled=run.precision == "fp16"),
        schedule=schedule.start(run.config.rules),
    )


def make_optimiser(
    network: nn.Module, config: TrainingConfig, *, fused: bool
) -> torch.optim.Optimizer:
    """Adam or SGD over all parameters.

    Args:
        network: Has the parameters.
        config: What the user chose.
        fused: In one kernel, which can leave a step out by itself.
    """
    kind = torch.optim.Adam if config.optimiser == "adam" else torch.optim.SGD
    optimiser = kind(
        network.parameters(),
        lr=config.learning_rate,
        fused=fused or None,
        **_optimiser_settings(config),
    )
    if fused and config.optimiser == "sgd" and config.momentum:
        for parameter in network.parameters():  # torch leaves it as it is if step 1 is left out
            optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimiser


def restore_optimiser(
    optimiser: torch.optim.Optimizer, saved: dict[str, Any], config: TrainingConfig
) -> None:
    """Fill an optimiser with the moments of a saved one of its kind; settings stay the config's.

    Args:
        optimiser: The optimiser to fill.
        saved: State of the saved one.
        config: What the user chose, which may differ from what it was saved with.
    """
    fused = optimiser.param_groups[0]["fused"]  # by the device, which may be another one now
    groups = [group | {"fused": fused} for group in saved["param_groups"]]
    optimiser.load_state_dict(saved | {"param_groups": groups})
    for parameter, moments in optimiser.state.items():  # a fused kernel wants them to lie alike
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(value)
    for group in optimiser.param_groups:
        group.update(_optimiser_settings(config))
        if group.get("amsgrad"):
            for moments in (optimiser.state[p] for p in group["params"] if p in optimiser.state):
                moments.setdefault("max_exp_avg_sq", moments["exp_avg_sq"].clone())


def _optimiser_settings(config: TrainingConfig) -> dict[str, Any]:
    """What the config says of its optimiser, but for the learning rate, which the schedule says."""
    if config.optimiser == "adam":
        return {"weight_decay": config.weight_decay, "amsgrad": config.amsgrad}
    return {
        "weight_decay": config.weight_decay,
        "momentum": config.momentum,
        "nesterov": config.nesterov,
    }


def train_step(run: FoldRun, state: TrainingState, batch: Batch) -> Tensor:
    """One update of the weights; the loss of the whole batch before it, where that was computed.

    Under fp16 a step whose loss or gradient overflows is left out, and the scale of the loss
    halved. Otherwise the loss is NaN where only the gradient is not finite. Neither ever reaches
    the weights. On CUDA nobody waits here for what the GPU has to do.
    """
    state.network.train()
    loss = _loss(run, _forward(run, state, batch.data), batch.target)
    state.optimiser.zero_grad(set_to_none=True)
    state.scaler.scale(loss).backward()
    if state.sums is not None:
        state.sums.finish()
    state.scaler.unscale_(state.optimiser)
    longest = run.config.gradient_clip or math.inf
    norm = nn.utils.clip_grad_norm_(state.network.parameters(), longest)
    loss = loss.detach()
    if state.scaler.is_enabled():
        state.scaler.step(state.optimiser)
        state.scaler.update()
    else:
        loss = loss.masked_fill(~norm.isfinite(), math.nan)
        _step_if(loss.isfinite(), state.optimiser)
    return loss


def _step_if(wanted: Tensor, optimiser: torch.optim.Optimizer) -> None:
    """Take a step if a truth value on the device says so; a fused optimiser asks it there."""
    if optimiser.param_groups[0]["fused"]:
        optimiser.found_inf = (~wanted).float()  # type: ignore[attr-defined]  # as a scaler does
        optimiser.step()
    elif wanted:
        optimiser.step()


@torch.no_grad()
def validation_step(run: FoldRun, state: TrainingState, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss, and per foreground class the hits and both masks' voxels, int64 ``(classes, 2)``.

    Both are of the whole batch, whichever process has which samples, and where they were computed.
    """
    logits = _forward(run, state, batch.data)
    assert isinstance(logits, Tensor)  # the network is in evaluation mode: one head
    loss = _loss(run, logits, batch.target)
    target = batch.target
    found = logits > 0 if run.plans.regions else _likeliest(logits)
    if run.ignore_label is not None:  # nothing counts as found there
        found = found.logical_and((target != run.ignore_label)[:, None])
    counts = []
    for ours, region in zip(found.unbind(1), run.plans.foreground, strict=True):
        theirs = region.mask(target)
        counts.append(torch.stack([(ours & theirs).sum(), ours.sum() + theirs.sum()]))
    return loss, run.group.total(torch.stack(counts))


def _likeliest(logits: Tensor) -> Tensor:
    """Whether each foreground label is the likeliest of all, ``(B, K - 1, *patch)``."""
    return one_hot(logits.argmax(1), logits.shape[1], torch.bool)[:, 1:]


class Reading:
    """A number on its way from the device to the host; only who reads it waits for it."""

    def __init__(self, value: Tensor) -> None:
        self._value = value.to("cpu", non_blocking=True)
        self._there: torch.cuda.Event | None = None
        if value.is_cuda:  # what the device is given from now on need not be waited for
            self._there = torch.cuda.Event()
            self._there.record()

    def read(self) -> float:
        """The number."""
        if self._there is not None:
            self._there.synchronize()
        return self._value.item()


def pseudo_dice(counts: Tensor) -> tuple[float | None, ...]:
    """Dice of each foreground class from the sums of ``validation_step``; None where it is absent.

    Validation patches are taken as one volume, so it is no mean over cases (P18, V2).
    """
    return tuple(dice_of_counts(shared, both) if both else None for shared, both in counts.tolist())


def _forward(run: FoldRun, state: TrainingState, data: Tensor) -> Tensor | list[Tensor]:
    with autocast(run):
        return state.forward(data)


def _loss(run: FoldRun, logits: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
    return dice_cross_entropy(
        logits,
        target,
        batch_dice=run.configuration.batch_dice,
        regions=run.plans.foreground if run.plans.regions else (),
        ignore_label=run.ignore_label,
        top_k_fraction=run.config.top_k_fraction,
        group=run.group,
    )


def autocast(run: FoldRun) -> torch.autocast:
    """The precision that convolutions are computed in."""
    dtype = torch.float16 if run.precision == "fp16" else torch.bfloat16
    return torch.autocast(run.device.type, dtype, enabled=run.precision != "fp32")


@contextlib.contextmanager
def determinism(run: FoldRun) -> Iterator[None]:
    """Have CUDA repeat every sum in the same order if the run is to be deterministic.

    This costs some speed. The CPU always does so. Where torch has no such algorithm (average
    pooling's gradient, in residual encoders) it says so once and takes another.
    """
    cudnn, before = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    settings = cudnn.benchmark, cudnn.deterministic
    wanted = run.config.deterministic
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.benchmark, cudnn.deterministic = not wanted, wanted
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        cudnn.benchmark, cudnn.deterministic = settings


@contextlib.contextmanager
def memory_advice(run: FoldRun) -> Iterator[None]:
    """Turn running out of memory into one line that says what to lower, and to what.

    Raises:
        TrainingError: It ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not torch_device.is_full(error):
            raise
        c = run.configuration
        tried = f"patch {times(c.patch)}, batch {c.batch}, {run.precision}"
        advice = []
        if run.config.gpu_cache != "no" and run.device.type == "cuda":
            advice.append("--gpu-cache no")
        if run.compiles:
            advice.append("--no-compile")
        if run.precision == "fp32" and run.device.type == "cuda":
            advice.append("--precision fp16")
        if run.group.count < c.batch:
            advice.append(f"torchrun --nproc-per-node {c.batch} on as many GPUs")
        if c.batch > 2:  # fewer than two are not planned either
            advice.append(f"plan --batch {max(2, c.batch // 2)}")
        planned = recipes.find_recipe(run.plans.recipe, run.plans.architecture).gpu_memory_gb
        chosen = [o.chosen for o in run.plans.overrides if o.name == "gpu-memory-gb"]
        budget = float(chosen[0]) if chosen else planned
        advice.append(f"plan --gpu-memory-gb {budget / 2:g} (now {budget:g})")
        raise TrainingError(
            f"{run.folder}: out of memory on {run.device} with {tried}; in this order, try "
            + ", ".join(advice)
        ) from error
