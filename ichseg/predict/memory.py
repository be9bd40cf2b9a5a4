"""How much memory a case will take: said before the work, not by a kill.

The platform limits a job by its cgroup and, per process, by ``RLIMIT_DATA``; the first kills with
status 137 and no word. So what a case needs is added up from its shapes before it is prepared. The
constants are measured; ``benchmarks/large_volume.py`` compares sums with peaks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ichseg import ndimage
from ichseg.engine import machine, openvino_engine
from ichseg.engine.engine import Engine, tiles_at_once
from ichseg.engine.networks import Networks, spec_of
from ichseg.errors import InputError
from ichseg.model import bundle
from ichseg.model.bundle import Member, Model
from ichseg.model.plans import Configuration, Plans
from ichseg.predict import sliding_window
from ichseg.predict.prepare import Placement
from ichseg.predict.presets import Plan
from ichseg.wording import byte_size

_MB = 2**20
_FLOAT = 4  # bytes
_RUNTIME = 55 * _MB  # of OpenVINO, with whatever number of networks
_WORKSPACE = 512 * _MB  # of cuDNN and cuBLAS on a GPU; not measured


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that a case takes, beside what the program takes without any.

    Attributes:
        opening: What it takes while it is read and prepared.
        predicting: What it takes while the networks run on it.
        writing: What it takes while it is restored, measured and written.
        network: What the networks take that stay from the first case on: the largest, or all.
        device: What it takes of a GPU's memory with one tile at a time; batches take more.
        keeps_networks: Whether all networks stay, so that the next case need not load them.
        on_host: Whether the scores are added up on the host though the networks run on a GPU.
    """

    opening: int
    predicting: int
    writing: int
    network: int
    device: int = 0
    keeps_networks: bool = False
    on_host: bool = False

    @property
    def alone(self) -> int:
        """What the case takes with no other one under way.

        Networks of the case before are there while it is opened, or are loaded meanwhile.
        """
        return self.network + max(self.opening, self.predicting, self.writing)


@dataclass(frozen=True, slots=True)
class Part:
    """What one configuration does for a case.

    Attributes:
        configuration: The configuration.
        placement: Where the case lies in its grid.
        weights: The bytes of one of its networks as fp32.
        sums: How many volumes of scores are held at once: one, or two where several networks or
            passes add up.
        networks: How many networks run.
        at_once: How many tiles go through a network at once, on the CPU.
    """

    configuration: Configuration
    placement: Placement
    weights: int
    sums: int
    networks: int
    at_once: int = 1


def estimate(
    kind: str,
    plans: Plans,
    parts: Sequence[Part],
    *,
    on_host: bool = False,
    keeps_networks: bool = False,
    file_bytes: int,
    scan_bytes: int,
    bytes_kept: int = 0,
) -> Need:
    """What a case will take.

    Args:
        kind: The kind of the engine, see ``Engine.kind``.
        plans: Say how many channels and labels there are.
        parts: The configurations, those of a cascade in order.
        on_host: Whether the scores are added up on the host though the networks run on a GPU.
        keeps_networks: Whether all networks stay in memory, and not only the largest.
        file_bytes: The size of the scan on disk; it is read whole, checked and inflated.
        scan_bytes: The size of its voxels in memory.
        bytes_kept: Bytes of each label's probability in a voxel, where those are kept.
    """
    on_gpu = kind == "cuda" and not on_host
    data = scores = running = device = largest = together = resting = 0
    for part in parts:
        shape, configuration = part.placement.grid_shape, part.configuration
        grid = math.prod(shape)
        padded = math.prod(sliding_window.cover(shape, configuration.tile).padded)
        data += _FLOAT * len(plans.channels) * grid
        channels = plans.input_channels(configuration)
        joined = _FLOAT * channels * grid * (2 if configuration.previous_stage else 0)
        own = joined + (_FLOAT * channels * padded if padded != grid else 0)
        summed = _FLOAT * plans.scores * padded
        at_once = own + part.sums * summed + (part.networks * padded if part.networks > 1 else 0)
        host, on_device = network_bytes(kind, configuration, part.weights, part.at_once)
        largest = max(largest, host)
        together += max(host - _RUNTIME, 0) * part.networks
        resting += resting_bytes(kind, configuration, part.weights, part.at_once) * part.networks
        if on_gpu:
            device = max(device, scores + _FLOAT * channels * grid + at_once + on_device)
            running = max(running, joined)
        else:
            device = max(device, on_device)
            running = max(running, scores + at_once)
        scores += summed
    if kind == "cuda":
        device += resting if keeps_networks else 0
    held = 0 if on_gpu else scores
    voxels = math.prod(parts[0].placement.full_shape)
    kept = bytes_kept * (len(plans.regions) or len(plans.labels) - 1) * voxels
    return Need(
        opening=scan_bytes + max(2 * file_bytes + scan_bytes, data + 30 * _MB),
        predicting=scan_bytes + data + running,
        # labels, and again without what the rules drop; the foreground's probability; and a slab
        # that is restored, or whose pieces are numbered
        writing=scan_bytes + held + 3 * voxels + kept + 40 * _MB,
        network=together + _RUNTIME if keeps_networks and kind == "openvino" else largest,
        device=device,
        keeps_networks=keeps_networks,
        on_host=on_host,
    )


def resting_bytes(kind: str, configuration: Configuration, weights: int, at_once: int) -> int:
    """Bytes that a loaded network takes while another one runs; on a GPU those of its memory."""
    return weights if kind == "cuda" else network_bytes(kind, configuration, weights, at_once)[0]


def network_bytes(
    kind: str, configuration: Configuration, weights: int, at_once: int
) -> tuple[int, int]:
    """Bytes on the host and on the GPU of one network with its activations.

    Measured for U-Nets with 8 to 32 first features, of two and three dimensions; on CUDA not, and
    there for one tile, since batches that do not fit are halved.
    """
    architecture, tile = configuration.architecture, configuration.tile
    if kind == "openvino":
        loading = 3.05 * weights + _RUNTIME
        tiles = at_once * openvino_engine.tile_bytes(architecture, tile)
        return int(max(loading, 2.05 * weights + _RUNTIME + tiles)), 0
    activations = (8 * architecture.features[0] + 10) * _FLOAT * math.prod(tile)
    if kind == "cuda":
        return 2 * weights, int(1.5 * weights + activations + _WORKSPACE)
    batch = tiles_at_once(tile)
    return weights + 70 * _MB + activations * batch, 0


def of_scan(
    plan: Plan,
    model: Model,
    folder: Path,
    engine: Engine,
    *,
    file_bytes: int,
    singly: bool,
    bytes_kept: int = 0,
) -> Need:
    """What a scan takes with an ensemble; of a GPU that does not hold its scores less.

    Args:
        plan: What the ensemble will do for the scan.
        model: The ensemble's description.
        folder: The folder with its tensors.
        engine: Who runs its networks.
        file_bytes: The size of the scan on disk.
        singly: Whether passes run one by one, as under a time budget.
        bytes_kept: Bytes of each label's probability in a voxel, where those are kept.
    """
    parts = []
    for part in plan.parts:
        members, mirrors = part.passes.members, part.passes.mirrors
        parts.append(
            Part(
                configuration=part.configuration,
                placement=part.placement,
                weights=bundle.weights_bytes(folder, members[0]),
                sums=2 if (singly and len(mirrors) > 1) or len(members) > 1 else 1,
                networks=len(members),
                at_once=at_once(engine, model, part.configuration),
            )
        )
    wanted = functools.partial(
        estimate,
        engine.kind,
        model.plans,
        parts,
        file_bytes=file_bytes,
        scan_bytes=plan.volume.voxels.nbytes,
        bytes_kept=bytes_kept,
    )
    need, free = _with_networks(wanted, engine), engine.device_bytes()
    if free is None or need.device <= free:
        return need
    return wanted(on_host=True)


def of_networks(model: Model, folder: Path, engine: Engine, members: Sequence[Member]) -> int:
    """Bytes that loaded networks take together; on a GPU those of its memory."""
    together = sum(
        resting_bytes(
            engine.kind,
            configuration := model.plans.configuration(member.configuration),
            bundle.weights_bytes(folder, member),
            at_once(engine, model, configuration),
        )
        for member in members
    )
    # each of OpenVINO's was taken with the runtime, which all of them share
    shared = max(0, len(members) - 1) * _RUNTIME if engine.kind == "openvino" else 0
    return together - shared


def at_once(engine: Engine, model: Model, configuration: Configuration) -> int:
    """Tiles that go through a network at once on the CPU; 1 on a GPU, where batches may shrink."""
    return 1 if engine.kind == "cuda" else engine.batch_of(spec_of(model, configuration))


def _with_networks(estimate: Callable[..., Need], engine: Engine) -> Need:
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


def refuse_beyond_memory(image: Path | str, needed: int, what: str) -> machine.MemoryLimit | None:
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


def gpu_holds_two(need: Need, engine: Engine) -> bool:
    """Whether a GPU holds two such cases at once; true for one that takes none of its memory."""
    allowed = engine.device_bytes() if need.device else None
    return allowed is None or 2 * need.device <= allowed


def program_bytes(networks: Networks) -> int:
    """What the program takes by itself: what it holds now, and what it has yet to import.

    Networks that stay from an earlier case are left out: each case's own need counts them.
    """
    loaded = networks.loaded() if networks.engine.kind == "openvino" else []
    held = of_networks(networks.model, networks.folder, networks.engine, loaded)
    return max(0, machine.resident_bytes() + ndimage.bytes_to_come() - held)


def may_open(
    need: Need | None,
    behind: Need | None,
    base: int,
    *,
    file_bytes: int | None,
    next_bytes: int | None,
) -> bool:
    """Whether the next case may be opened while the networks run on one.

    The next one's files say how large it is beside that one.

    Args:
        need: What the one that the networks run on needs; None if it could not be opened.
        behind: What the one needs that is being written meanwhile; None if there is none.
        base: Bytes that the program takes by itself.
        file_bytes: The size of the first one's files; None or 0 where that is not known.
        next_bytes: The size of the next one's files, likewise.
    """
    allowed = machine.memory_limit()
    if need is None or allowed is None:
        return True
    base += behind.writing if behind else 0
    factor = next_bytes / file_bytes if file_bytes and next_bytes else 1.0
    return base + need.network + need.predicting + factor * need.opening <= allowed.total
