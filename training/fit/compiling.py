"""The network compiled by ``torch.compile``, where that works and is faster.

Compiling takes a minute or so at the start, and depends on what is installed beside torch: a C
compiler, Triton. A trial on zeros shows whether it works and what it gains; where it does not, the
log says so and training goes on without it.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor, nn

from ichseg.engine import torch_device
from training.fit.fold_run import FoldRun
from training.fit.step import Forward, autocast

_WARM, _TIMED = 3, 10  # steps of a trial: before its clock runs, and by it
_LEAST_GAIN = 1.03  # of speed; less is not worth what may go wrong

_log = logging.getLogger(__name__)


def forward_of(run: FoldRun, network: nn.Module) -> Forward:
    """The network for this run's patch: compiled if that is wanted, works, and is faster.

    With ``--compile`` it need only work, and memory that it lacks ends the training. Left to the
    trial, as it is on a GPU without that flag, it must be faster, too; with ``--deterministic``
    there is no such trial, since what is faster may differ between runs. Where several processes
    train together, all of them compile or none does.
    """
    if not run.compiles:
        return network
    forward = _tried(run, network)
    # Compiled, a head that no loss counts has a gradient of 0 and else none, and processes that
    # train together sum the gradients of the same parameters.
    if any(run.group.any(forward is network)) and forward is not network:
        _log.warning("torch.compile is NOT used: another process goes on without it")
        return network
    return forward


def _tried(run: FoldRun, network: nn.Module) -> Forward:
    """The compiled network if a trial shows that it works and, where that is asked, is faster."""
    try:
        compiled: Any = torch.compile(network)
        data = _zeros(run)
        _step(run, network, compiled, data)
        network.eval()
        with torch.no_grad(), autocast(run):
            compiled(data)
        if run.config.compile is None and not _is_faster(run, network, compiled, data):
            return network
        return compiled
    except Exception as error:  # whatever a compiler may raise
        if run.config.compile and torch_device.is_full(error):
            raise
        reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
        _log.warning("torch.compile failed (%s); training goes on WITHOUT it", reason)
    finally:
        network.zero_grad(set_to_none=True)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()  # of blocks that are of no use to the network as it is
    return network


def _is_faster(run: FoldRun, network: nn.Module, compiled: Forward, data: Tensor) -> bool:
    """Whether steps of the compiled network take less time; the log has the figures."""
    plain_s = _seconds(run, network, network, data)
    compiled_s = _seconds(run, network, compiled, data)
    figures = f"{1000 * compiled_s:.1f} ms a step, {1000 * plain_s:.1f} ms without"
    if plain_s < _LEAST_GAIN * compiled_s:
        _log.warning("torch.compile is NOT used, as it gains too little: %s", figures)
        return False
    _log.info("torch.compile: %s", figures)
    return True


def _seconds(run: FoldRun, network: nn.Module, forward: Forward, data: Tensor) -> float:
    """Seconds of one step, without loss and optimiser."""
    for _ in range(_WARM):
        _step(run, network, forward, data)
    _wait(run.device)
    began = time.perf_counter()
    for _ in range(_TIMED):
        _step(run, network, forward, data)
    _wait(run.device)
    return (time.perf_counter() - began) / _TIMED


def _step(run: FoldRun, network: nn.Module, forward: Forward, data: Tensor) -> None:
    """The forward and the backward pass of a step."""
    network.train()
    with autocast(run):
        logits = forward(data)
    heads: Any = [logits] if isinstance(logits, Tensor) else logits
    torch.stack([head.float().sum() for head in heads]).sum().backward()


def _zeros(run: FoldRun) -> Tensor:
    """A batch of this process: its samples of the plan's batch."""
    samples = range(run.spec.batch)[run.spec.mine]
    shape = (len(samples), run.plans.input_channels(run.configuration), *run.spec.patch)
    return torch.zeros(shape, device=run.device).contiguous(memory_format=run.layout)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
