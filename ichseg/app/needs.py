"""The memory that a scan takes with an ensemble, held against what is allowed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from ichseg.engine import machine
from ichseg.engine.engine import Engine
from ichseg.errors import InputError
from ichseg.model import bundle
from ichseg.predict import memory
from ichseg.predict.ensemble import Ensemble, Plan
from ichseg.wording import byte_size


def of_scan(
    plan: Plan, file_bytes: int, ensemble: Ensemble, *, singly: bool
) -> tuple[memory.Need, bool]:
    """Bytes that a scan takes with an ensemble.

    Args:
        plan: What the ensemble will do for the scan.
        file_bytes: The size of the scan on disk.
        ensemble: The networks.
        singly: Whether passes run one by one, as under a time budget.

    Returns:
        The bytes, and whether the scores are added up on the host, since the GPU's memory does not
        hold them.
    """
    parts = []
    for part in plan.parts:
        members, mirrors = part.passes.members, part.passes.mirrors
        parts.append(
            memory.Part(
                configuration=part.configuration,
                placement=part.placement,
                weights=bundle.weights_bytes(ensemble.folder, members[0]),
                sums=2 if (singly and len(mirrors) > 1) or len(members) > 1 else 1,
                networks=len(members),
            )
        )
    estimate = functools.partial(
        memory.estimate,
        ensemble.engine.kind,
        ensemble.model.plans,
        parts,
        file_bytes=file_bytes,
        scan_bytes=plan.volume.voxels.nbytes,
    )
    need, free = _with_networks(estimate, ensemble.engine), ensemble.engine.device_bytes()
    if free is None or need.device <= free:
        return need, False
    return estimate(on_host=True), True


def _with_networks(estimate: Callable[..., memory.Need], engine: Engine) -> memory.Need:
    """All networks stay where that leaves half of the memory free, of the host and of a GPU."""
    if engine.kind != "torch-cpu":
        every, allowed, device = (
            estimate(keeps_networks=True),
            machine.memory_limit(),
            engine.device_bytes(),
        )
        on_host = allowed is None or 2 * every.alone <= allowed.total
        if on_host and (device is None or 2 * every.device <= device):
            return every
    return estimate()


def refuse_beyond_memory(image: Path, needed: int, what: str) -> machine.MemoryLimit | None:
    """Refuse a scan that needs more memory than is allowed.

    Args:
        image: The scan, for the message.
        needed: Bytes, those of the program among them.
        what: Which of the scan's properties needs so much, such as ``voxels``.

    Returns:
        What is allowed, which suffices; None where that cannot be found out.

    Raises:
        InputError: It does not suffice.
    """
    allowed = machine.memory_limit()
    if allowed is not None and needed > allowed.total:
        raise InputError(
            f"{image}: its {what} need at least {byte_size(needed)} of memory, "
            f"{allowed.by} allows {byte_size(allowed.total)}"
        )
    return allowed


def gpu_holds_two(need: memory.Need, ensemble: Ensemble) -> bool:
    """Whether a GPU holds two such cases at once; true for one that takes none of its memory."""
    allowed = ensemble.engine.device_bytes() if need.device else None
    return allowed is None or 2 * need.device <= allowed


def both_fit(need: memory.Need, factor: float, base: int) -> bool:
    """Whether the next case may be opened while the networks run on one.

    Args:
        need: What the one that the networks run on needs.
        factor: The size of the next one's files beside that of the one's.
        base: Bytes that everything else takes.
    """
    allowed = machine.memory_limit()
    if allowed is None:
        return True
    return base + need.network + need.predicting + factor * need.opening <= allowed.total
