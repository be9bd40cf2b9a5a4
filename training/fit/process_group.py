"""One fold on several GPUs: the processes that ``torchrun`` starts share each batch.

Each process makes its samples of the global batch and computes the loss of the whole, because all
sums over voxels are added up before their ratio. Gradients are then summed, not averaged, and every
process takes the same step. ``torchrun``'s environment variables are read here and nowhere else.

A process that fails ends, and its connections with it: the others, which wait for it in a sum, end
with an error, too.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ichseg.errors import TrainingError

_STEP = datetime.timedelta(minutes=15)  # that processes wait for each other within a training
_VALIDATION = datetime.timedelta(days=2)  # that the others wait for the leading process


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """The processes that train one fold together. Alone, each sum is the value itself.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of processes.
        patient: What the processes meet in where one of them may take hours; None alone.
    """

    rank: int = 0
    count: int = 1
    patient: distributed.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files and logs."""
        return self.rank == 0

    def total(self, value: Tensor) -> Tensor:
        """Sum over the processes.

        Its gradient passes straight through: what each process differentiates is one and the same
        loss, with respect to its own part of the sum.
        """
        return value if self.count == 1 else _Total.apply(value)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        joined = torch.cat([gradient.reshape(-1) for gradient in gradients])
        with _together():
            distributed.all_reduce(joined)
        parts = joined.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag whether it is set in any process; all processes get the same answer."""
        if self.count == 1:
            return flags
        values = torch.tensor(flags, dtype=torch.uint8)
        with _together():
            distributed.all_reduce(values, distributed.ReduceOp.MAX)
        return tuple(bool(value) for value in values)

    def of_leader(self, value: float) -> float:
        """The value that process 0 has."""
        if self.count == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        with _together():
            distributed.broadcast(shared, 0)
        return float(shared)

    def all_done(self, done: bool) -> bool:
        """Wait for all processes, for hours if need be; whether all of them are done.

        The others wait so while the leading process validates a fold.
        """
        if self.count == 1:
            return done
        value = torch.tensor(done, dtype=torch.uint8)
        with _together():
            distributed.all_reduce(value, distributed.ReduceOp.MIN, group=self.patient)
        return bool(value)


ALONE = ProcessGroup()


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:  # type: ignore[override]
        """Sum over the processes."""
        total = value.detach().clone()
        with _together():
            distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        """Pass the gradient straight through, see ``ProcessGroup.total``."""
        return gradient


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Say in one line that another process has not come.

    Raises:
        TrainingError: It has ended, or has not answered in time.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise TrainingError(
            f"another process of this training has ended or does not answer ({reason}); its own "
            "error says why, and the same command goes on from the last checkpoint"
        ) from error


@contextlib.contextmanager
def joined(device: str) -> Iterator[ProcessGroup]:
    """Join the processes that ``torchrun`` started; alone when it did not start this one.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``. On CUDA this process takes the GPU of its number.

    Raises:
        TrainingError: There are more processes than GPUs.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    # Numbers on the host are exchanged by gloo, so that they don't wait for what the GPU has to do
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        _take_gpu(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    distributed.init_process_group(backend, timeout=_STEP)
    patient = distributed.new_group(backend="gloo", timeout=_VALIDATION)
    group = ProcessGroup(distributed.get_rank(), distributed.get_world_size(), patient)
    yield group  # a failure leaves from here: the end of this process closes its connections
    group.all_done(done=True)  # none closes its connections while another still uses them
    distributed.destroy_process_group()


def leave(status: int) -> None:
    """End this process if ``torchrun`` started it, at once and with this status.

    An orderly end aborts now and then: gloo still has threads when C++ takes its statics apart. And
    after a failure it would wait for the other processes, which wait for this one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _take_gpu(index: int, processes: int) -> None:
    gpus = torch.cuda.device_count()
    if processes > gpus:
        raise TrainingError(
            f"{processes} processes for {gpus} GPU(s); start one a GPU: "
            f"torchrun --nproc-per-node {gpus}"
        )
    torch.cuda.set_device(index)
