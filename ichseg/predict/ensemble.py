"""An ensemble of trained networks: a volume goes in, a segmentation comes out.

In four steps, which a pipeline of many volumes may overlap: ``plan``, ``prepare``, ``predict``,
``finish``; see ``many``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ichseg import ndimage
from ichseg.engine import machine
from ichseg.engine.arrays import FloatArray, Grid, on_host
from ichseg.engine.choose import choose_engine
from ichseg.engine.engine import Engine
from ichseg.engine.networks import Networks, spec_of
from ichseg.errors import DeviceFullError, WeightsError
from ichseg.model import bundle
from ichseg.model.bundle import Model
from ichseg.model.default_weights import default_weights
from ichseg.predict import components, memory, passes, prepare, sliding_window
from ichseg.predict.budget import Clock, Count, check_seconds
from ichseg.predict.components import Segmentation
from ichseg.predict.memory import Need
from ichseg.predict.passes import MeanScores, Pass
from ichseg.predict.prepare import Placement
from ichseg.predict.presets import (
    Plan,
    Planned,
    budget_record,
    plan_passes,
    preset_members,
    ran_record,
)
from ichseg.predict.restore import check_threshold, previous_channels, restore
from ichseg.scan import images, reader
from ichseg.scan.dicom import straighten
from ichseg.scan.reader import Scan
from ichseg.scan.volume import Volume

# What a voxel that no network saw scores as background, above every label: for certain.
_CERTAIN = {"probabilities": 1.0, "logits": 10.0}
Kept = Literal["uint8", "float16"]  # how probabilities are kept
_AHEAD = 16  # so many times what networks take has to be free for them to be loaded early
_RESTORING_S_PER_SCORE = 4e-8  # on two cores, twice what was measured


@dataclass(frozen=True, slots=True)
class Prepared:
    """A volume in the grid of each configuration.

    Attributes:
        plan: What will be done for it.
        data: The volume in the grid of each part of the plan, float32 ``(C, Z, Y, X)``.
        seconds: The time that this has taken, planning included.
    """

    plan: Plan
    data: tuple[FloatArray, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Predicted:
    """What the networks have found, in their own grids.

    Attributes:
        volume: The volume.
        parts: Mean scores ``(K, Z, Y, X)`` of each configuration that counts, with its placement.
        ran: See ``Segmentation.ran``.
        seconds: Wall time so far, by step.
        disagreement: See ``Segmentation.disagreement``.
    """

    volume: Volume
    parts: list[tuple[Grid, Placement]]
    ran: dict[str, object]
    seconds: dict[str, float]
    disagreement: float | None


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Networks of one bundle, loaded once and used for many volumes.

    Attributes:
        model: The bundle's description.
        folder: The folder with its tensors.
        engine: Who runs them.
    """

    model: Model
    folder: Path
    engine: Engine
    _networks: Networks = field(init=False, repr=False)
    _running: threading.Lock = field(init=False, repr=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_networks", Networks(self.model, self.folder, self.engine))

    @classmethod
    def load(
        cls, folder: str | Path | None = None, device: str = "auto", precision: str = "auto"
    ) -> Ensemble:
        """Open a weights bundle.

        Args:
            folder: A folder with ``model.json``; by default that of the weights that come with this
                software.
            device: ``auto``, ``cpu``, ``cuda`` or ``torch-cpu``, see ``choose_engine``.
            precision: ``auto``, ``float32`` or ``bfloat16``, see ``choose_engine``.

        Raises:
            WeightsError: The bundle is missing, incomplete or altered.
            DeviceError: CUDA was asked for and is not usable.
        """
        folder = default_weights() if folder is None else Path(folder)
        model = bundle.load_model(folder)
        if len(model.plans.channels) > 1:
            raise WeightsError(
                f"{folder}: networks of {len(model.plans.channels)} channels, "
                f"{', '.join(model.plans.channels)}; expected one, since a case is one scan"
            )
        return cls(model, folder, choose_engine(device, precision))

    def segment(
        self,
        image: Any,
        preset: str = "full",
        progress: Count | None = None,
        budget_s: float | None = None,
        *,
        spacing_mm: Sequence[float] | None = None,
        axes: str = "zyx",
        probabilities: bool = False,
        threshold: float | None = None,
    ) -> Segmentation:
        """Segment one scan.

        What a model of CT is given is held against what HU look like, as ``process.py`` does: HU
        with an offset are mended, and what else cannot be a head CT in HU is refused.

        Args:
            image: A CT in HU, any orientation and spacing: the path of a file or of a folder of
                DICOM slices, a ``Volume``, an image of nibabel or SimpleITK, or a numpy array. The
                mask has the axes of what was given.
            preset: ``full``, ``balanced`` or ``fast``.
            progress: Called with (forward passes done, all of them) after each; what it raises ends
                the work.
            budget_s: Seconds that all of it may take, see ``predict``.
            spacing_mm: A numpy array needs the size of its voxels along each axis, in its order.
            axes: The order of a numpy array is ``zyx`` or ``xyz``, see ``images.as_scan``.
            probabilities: Whether the result has the probabilities of each label, as float16.
            threshold: See ``finish``.

        Raises:
            InputError: It cannot be read, does not fit the model or is no head CT in HU, or the
                threshold or the time budget is none.
            WeightsError: A network's file is not finite or does not fit its plan.
            BudgetError: The time does not suffice for one network without mirroring.
            PredictionError: A network gives scores that are not finite.
            DeviceError: A GPU's memory does not even hold one tile, or the GPU is lost.
        """
        check_threshold(threshold)
        check_seconds(budget_s)
        began = time.perf_counter()
        scan = images.as_scan(image, spacing_mm=spacing_mm, axes=axes)
        scan = self.in_hu(scan, images.name_of(image))
        prepared = self.prepare(self.plan(scan, preset))
        left_s = None if budget_s is None else budget_s - (time.perf_counter() - began)
        predicted = self.predict(prepared, progress, left_s)
        kept: Kept | None = "float16" if probabilities else None
        return of_scan(self.finish(predicted, probabilities=kept, threshold=threshold), scan)

    def load_ahead(self, preset: str) -> None:
        """Load the networks that a preset runs, for whoever opens the first volume meanwhile.

        On the CPU by OpenVINO, where they take little of the memory. What is wrong with one of them
        is raised where it runs.
        """
        free = machine.free_memory_bytes()
        if self.engine.kind != "openvino" or free is None:
            return
        members = preset_members(self.model, preset)
        with contextlib.suppress(WeightsError, MemoryError):
            needed = memory.of_networks(self.model, self.folder, self.engine, members)
            if _AHEAD * needed <= free:
                self._networks.load_all(members, machine.cpu_threads())

    def program_bytes(self) -> int:
        """What the program takes beside the networks, which each scan's ``need`` counts."""
        return memory.program_bytes(self._networks)

    def need(
        self,
        plan: Plan,
        *,
        file_bytes: int,
        singly: bool,
        probabilities: Kept | None = None,
    ) -> Need:
        """The memory that a scan takes, and how the networks run in it.

        Args:
            plan: What will be done for it.
            file_bytes: Its size on disk.
            singly: Whether passes run one by one, as under a time budget.
            probabilities: How those of each label are kept, see ``finish``.
        """
        return memory.of_scan(
            plan,
            self.model,
            self.folder,
            self.engine,
            file_bytes=file_bytes,
            singly=singly,
            bytes_kept=np.dtype(probabilities).itemsize if probabilities else 0,
        )

    def plan(self, volume: Volume, preset: str = "full") -> Plan:
        """Find out what has to be done for a volume; may run in any thread.

        Raises:
            InputError: The volume does not fit the model, or there is no such preset.
        """
        began = time.perf_counter()
        parts = plan_passes(self.model, volume, preset)
        return Plan(volume, preset, parts, time.perf_counter() - began)

    def prepare(self, plan: Plan) -> Prepared:
        """Bring the volume of a plan into the configurations' grids; may run in any thread."""
        began = time.perf_counter()
        data = tuple(
            prepare.to_grid([plan.volume], self.model.plans, part.placement) for part in plan.parts
        )
        ndimage.load()  # for ``finish``; the first scan's networks are still being compiled
        return Prepared(plan, data, plan.seconds + time.perf_counter() - began)

    def predict(
        self,
        prepared: Prepared,
        progress: Count | None = None,
        budget_s: float | None = None,
        need: Need | None = None,
    ) -> Predicted:
        """Run the networks; may be called in any thread, and waits while another one runs them.

        Args:
            prepared: From ``prepare``; it can be used again.
            progress: Called with (forward passes done, all of them) after each.
            budget_s: Seconds for this and ``finish``. The passes then run one by one, a pass being
                one network with one mirroring: all networks plain, then mirrored along one axis and
                so on, as many as fit. Finished passes of a configuration weigh equally, one that
                is late is dropped. Each configuration, a cascade's first stage too, gets its share
                of the time by its work, and at least one pass.
            need: Whether networks stay ready for the next volume, and scores are added up on the
                host, for volumes that a GPU's memory does not hold; by default as ``self.need``
                finds. Where a GPU turns out to be full, all begins again with scores on the host.

        Raises:
            InputError: The time budget is none.
            WeightsError: A network's file is not finite or does not fit its plan.
            BudgetError: Not even one pass of each configuration fits.
            PredictionError: A network gives scores that are not finite.
            DeviceError: A GPU's memory does not even hold one tile, or the GPU is lost.
        """
        check_seconds(budget_s)
        plan = prepared.plan
        deadline = None
        if budget_s is not None:
            deadline = time.perf_counter() + budget_s - self._restoring_s(plan.volume)
        efforts = [part.passes.effort for part in plan.parts]
        need = need or self.need(plan, file_bytes=0, singly=budget_s is not None)
        keep = need.keeps_networks
        clock = Clock(progress, sum(e.forward_passes for e in efforts), deadline, efforts)
        if not need.on_host:
            with contextlib.suppress(DeviceFullError), self._running, self.engine.guard():
                counted = dataclasses.replace(clock)
                return self._predict(prepared, counted, budget_s, on_host=False, keep=keep)
        with self._running, self.engine.guard():
            return self._predict(prepared, clock, budget_s, on_host=True, keep=keep)

    def finish(
        self,
        predicted: Predicted,
        *,
        probabilities: Kept | None = None,
        threshold: float | None = None,
    ) -> Segmentation:
        """Restore the scores to the volume's grid and decide; may run in any thread.

        Args:
            predicted: From ``predict``.
            probabilities: How those of each label are kept, if they are.
            threshold: A voxel is foreground where the probability of that is above this, 0.01 to
                0.99, and then has its likeliest label; regions are decided each for itself. By
                default the likeliest label of all counts, which for one label is a half.

        Raises:
            InputError: The threshold is another number.
            DeviceError: The GPU that holds the scores is lost.
        """
        began = time.perf_counter()
        check_threshold(threshold)
        volume = predicted.volume
        labels, foreground, each = self._restore(predicted.parts, probabilities, threshold)
        labels = components.apply_rules(labels, self.model.rules, volume.voxel_ml, foreground)
        lesions = components.lesions(labels, volume, foreground)
        doubtful: tuple[str, ...] = ()
        if self.model.expects_hu:
            doubtful = components.doubts(labels, volume, foreground, lesions)
        seconds = predicted.seconds | {"restore": time.perf_counter() - began}
        seconds["total"] = sum(seconds.values())
        decided = {} if threshold is None else {"threshold": float(threshold)}
        return Segmentation(
            mask=volume.with_voxels(labels),
            volume_ml=float(np.count_nonzero(labels) * volume.voxel_ml),
            ran=predicted.ran | decided,
            seconds={step: round(value, 3) for step, value in seconds.items()},
            disagreement=predicted.disagreement,
            warnings=doubtful,
            foreground=foreground,
            case_score=components.case_score(foreground, volume.voxel_ml),
            lesions=lesions,
            probabilities=each,
        )

    def in_hu(self, scan: Scan, name: str) -> Scan:
        """The scan, checked where the model is one of CT."""
        return reader.in_hu(scan, name) if self.model.expects_hu else scan

    def _predict(
        self,
        prepared: Prepared,
        clock: Clock,
        budget_s: float | None,
        *,
        on_host: bool,
        keep: bool,
    ) -> Predicted:
        """Run all configurations, one after another."""
        place = self.engine.keep if on_host else self.engine.place
        plan, averaged = prepared.plan, self.model.averaged
        found: dict[str, tuple[Grid, Placement]] = {}
        ran: list[Sequence[Pass]] = []
        disagreements: list[float] = []
        for number, (part, data) in enumerate(zip(plan.parts, prepared.data, strict=True), start=1):
            first = part.configuration.previous_stage
            if first is not None:
                previous = previous_channels(self.model, plan.volume, *found[first], part.placement)
                data = np.concatenate((data, previous))
            later = {other.configuration.previous_stage for other in plan.parts[number:]}
            for served in found.keys() - later - {*averaged}:
                del found[served]  # a first stage's scores: their memory is of use to others
            mean = self._run(place(data), part, clock, keep=keep)
            found[part.configuration.name] = (mean.scores, part.placement)
            ran.append(mean.ran)
            disagreements += mean.disagreements
        record = ran_record(self.model, plan.preset, plan.parts, ran)
        record["engine"] = self.engine.name
        record["tiles_at_once"] = {
            part.configuration.name: self.engine.batch_of(spec_of(self.model, part.configuration))
            for part in plan.parts
        }
        if on_host:
            record["scores_on_host"] = True
        if budget_s is not None:
            record |= budget_record(plan.parts, ran, budget_s)
        seconds = {
            "prepare": prepared.seconds,
            "compile": clock.compiling_s,
            "predict": clock.predicting_s,
        }
        return Predicted(
            plan.volume, [found[name] for name in averaged], record, seconds, _mean(disagreements)
        )

    def _run(self, data: Grid, part: Planned, clock: Clock, *, keep: bool) -> MeanScores:
        """Run one configuration's networks on its data ``(C, Z, Y, X)``."""
        plans, certain = self.model.plans, _CERTAIN[self.model.average]
        background = [certain] + [0.0] * (plans.scores - 1)
        if plans.regions:
            background = [-certain] * len(plans.regions)
        return passes.run(
            load=lambda member: self._networks.load(member, part.configuration, keep=keep),
            passes=part.passes,
            padded=sliding_window.pad(data, part.passes.tiles, plans.padding),
            background=background,
            regions=bool(plans.regions),
            clock=clock,
        )

    def _restore(
        self,
        parts: list[tuple[Grid, Placement]],
        probabilities: Kept | None,
        threshold: float | None,
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], npt.NDArray[Any] | None]:
        """Labels, foreground and what is asked for of each label, in the volume's grid.

        On the host where the GPU is full.
        """
        plans, placement = self.model.plans, parts[0][1]
        shape = placement.axes.undo(np.broadcast_to(np.uint8(), placement.full_shape)).shape
        foreground = np.zeros(shape, np.uint8)
        each = None
        if probabilities is not None:
            labels = len(plans.regions) or len(plans.labels) - 1
            each = np.zeros((labels, *shape), probabilities)
        decide = functools.partial(
            restore,
            plans=plans,
            average=self.model.average,
            foreground=foreground,
            probabilities=each,
            threshold=threshold,
        )
        with contextlib.suppress(DeviceFullError), self.engine.guard():
            return decide(parts), foreground, each
        with self.engine.guard():
            on_the_host = [(on_host(scores), placement) for scores, placement in parts]
        return decide(on_the_host), foreground, each

    def _restoring_s(self, volume: Volume) -> float:
        """What ``finish`` will take, reserved of a time budget; generous."""
        scores = volume.voxels.size * self.model.plans.scores * len(self.model.averaged)
        return 0.3 + _RESTORING_S_PER_SCORE * scores


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def of_scan(found: Segmentation, scan: Scan) -> Segmentation:
    """What was found, with what is known of the scan; of DICOM the volume is that on the slices."""
    volume_ml = found.volume_ml
    if scan.series is not None:
        labels = found.mask.voxels.astype(np.uint8, copy=False)
        stack = scan.series.stack
        volume_ml = straighten.volume_ml(stack, straighten.onto_slices(stack, labels))
    warnings = (*scan.warnings, *found.warnings)
    return dataclasses.replace(found, volume_ml=volume_ml, warnings=warnings)
