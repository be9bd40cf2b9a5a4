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
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from ichseg.errors import TrainingError

_STEP = datetime.timedelta(minutes=15)  # longest wait for another process within a training
_VALIDATION = datetime.timedelta(days=2)  # the same in validation
BUCKET_BYTES = 25_000_000  # of a bucket at least, so that few sums are taken


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

        Validation takes one process longer than another.
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


class _UnderWay(NamedTuple):
    """A sum over the processes that has been asked for.

    Attributes:
        work: Waits for it.
        joined: The bucket's gradients one after another, which become their sums.
        gradients: Where these go.
    """

    work: Any
    joined: Tensor
    gradients: list[Tensor]


class GradientSums:
    """Replaces each gradient of a network by its sum over the processes.

    The sums are taken while the backward pass still goes on. The first step shows which parameters
    have a gradient at all, and in which order these come. From then on they are summed in buckets
    of that order, each as soon as its last gradient is there: what is left to wait for at the end
    is the last bucket.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """Have each gradient announced from now on; the first backward pass is that of a step.

        Args:
            parameters: Those of the network, in the same order in all processes.
        """
        self._parameters = list(parameters)
        self._came: list[int] = []  # numbers of the parameters whose gradients came in this step
        self._buckets: list[list[int]] = []  # numbers of parameters; none before the first step
        self._missing: list[int] = []  # of each bucket, how many gradients are still to come
        self._bucket_of: dict[int, int] = {}
        self._sent = 0  # buckets whose sum has been asked for
        self._under_way: list[_UnderWay] = []
        for number, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(self._hook(number))

    def _hook(self, number: int) -> Any:
        def came(_: Tensor) -> None:
            self._came.append(number)
            if number in self._bucket_of:
                self._missing[self._bucket_of[number]] -= 1
                self._send(whole=True)

        return came

    def finish(self) -> None:
        """Wait for the sums of this step.

        Raises:
            TrainingError: Another process has ended.
        """
        if not self._buckets:
            self._plan()
        assert self._bucket_of.keys() >= set(self._came)  # the graph is the same in each step
        self._send(whole=False)
        for sums in self._under_way:
            with _together():
                sums.work.wait()
            parts = sums.joined.split([gradient.numel() for gradient in sums.gradients])
            for gradient, part in zip(sums.gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        self._under_way, self._sent, self._came = [], 0, []
        self._missing = [len(bucket) for bucket in self._buckets]

    def _plan(self) -> None:
        """Deal the gradients to buckets in the order in which process 0 got them."""
        order = torch.full((len(self._parameters),), -1)
        order[: len(self._came)] = torch.tensor(self._came)
        with _together():
            distributed.broadcast(order, 0)
        self._buckets = list(_dealt([n for n in order.tolist() if n >= 0], self._parameters))
        self._missing = [0] * len(self._buckets)  # all are there
        self._bucket_of = {n: i for i, bucket in enumerate(self._buckets) for n in bucket}

    def _send(self, *, whole: bool) -> None:
        """Ask for the sums of the next buckets, in the same order in all processes.

        Args:
            whole: Only of those whose gradients are all there.
        """
        while self._sent < len(self._buckets) and not (whole and self._missing[self._sent]):
            gradients = [self._gradient(number) for number in self._buckets[self._sent]]
            joined = torch.cat([gradient.reshape(-1) for gradient in gradients])
            with _together():
                work = distributed.all_reduce(joined, async_op=True)
            self._under_way.append(_UnderWay(work, joined, gradients))
            self._sent += 1

    def _gradient(self, number: int) -> Tensor:
        """The gradient of a parameter; zeros where this process has none."""
        parameter = self._parameters[number]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad


def _dealt(order: list[int], parameters: list[nn.Parameter]) -> Iterator[list[int]]:
    """Numbers of parameters in this order, in buckets of at least ``BUCKET_BYTES``."""
    bucket: list[int] = []
    size = 0
    for number in order:
        bucket.append(number)
        size += parameters[number].numel() * parameters[number].element_size()
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


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
            "error says why, and the same command without --restart goes on from the last "
            "checkpoint"
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
