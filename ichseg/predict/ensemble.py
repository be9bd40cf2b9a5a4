"""An ensemble of trained networks: a volume goes in, a segmentation comes out.

In three steps, which a pipeline of many volumes may overlap: ``prepare``, ``predict``, ``finish``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ichseg.engine.arrays import FloatArray, Grid, on_host
from ichseg.engine.choose import choose_engine
from ichseg.engine.engine import Engine, LoadedNetwork, NetworkSpec
from ichseg.errors import WeightsError
from ichseg.model import bundle
from ichseg.model.bundle import Member, Model
from ichseg.model.default_weights import default_weights
from ichseg.model.plans import Configuration
from ichseg.predict import components, passes, sliding_window
from ichseg.predict import prepare as preprocess
from ichseg.predict.passes import Clock, Count
from ichseg.predict.prepare import Placement
from ichseg.predict.work import Work, plan_works, record, units_record
from ichseg.scan import plausibility
from ichseg.scan.volume import Volume

# What a voxel that no network saw scores as background, above every label: for certain.
_CERTAIN = {"probabilities": 1.0, "logits": 10.0}
_RESTORING_S_PER_SCORE = 4e-8  # on two cores, twice what was measured


@dataclass(frozen=True, slots=True)
class Segmentation:
    """What was found.

    Attributes:
        mask: Labels, uint8, in the geometry of the input volume.
        volume_ml: Total volume of all foreground labels.
        ran: What was computed: preset, networks, mirrorings, tiles, engine.
        seconds: Wall time of preparation, compilation, prediction and restoration.
        doubt: How much the networks disagree about the foreground: the mean, over networks, of 1 -
            Dice of what one of them found and what all of its configuration did together. 0 where
            all agree, also that there is none; None where no configuration ran two. Before rules.
        warnings: Anything a reader of the result should know.
    """

    mask: Volume
    volume_ml: float
    ran: dict[str, object]
    seconds: dict[str, float]
    doubt: float | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A volume in the grid of each configuration: ``data`` float32 ``(C, Z, Y, X)`` of each."""

    volume: Volume
    preset: str
    works: tuple[Work, ...]
    data: tuple[FloatArray, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Predicted:
    """Mean scores ``(K, Z, Y, X)`` of each configuration that counts, with its placement."""

    volume: Volume
    parts: list[tuple[Grid, Placement]]
    ran: dict[str, object]
    seconds: dict[str, float]
    doubt: float | None


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Networks of one bundle, loaded once and used for many volumes.

    Attributes:
        model: The bundle's description.
        folder: Where its tensors are.
        engine: Who runs them.
    """

    model: Model
    folder: Path
    engine: Engine
    # By file, and never more than one: each takes memory several times its tensors' size.
    _alive: dict[str, LoadedNetwork] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, folder: Path | None = None, device: str = "auto") -> Ensemble:
        """Open a weights bundle.

        Args:
            folder: A folder with ``model.json``; by default that of the weights that come with this
                software.
            device: ``auto``, ``cpu``, ``cuda`` or ``torch-cpu``, see ``choose_engine``.

        Raises:
            WeightsError: The bundle is missing, incomplete or altered.
            DeviceError: CUDA was asked for and is not usable.
        """
        folder = default_weights() if folder is None else folder
        return cls(bundle.load_model(folder), folder, choose_engine(device))

    def segment(
        self,
        volume: Volume,
        preset: str = "full",
        progress: Count | None = None,
        budget_s: float | None = None,
    ) -> Segmentation:
        """Segment one volume.

        What a model of CT is given is held against what HU look like, as ``process.py`` does: HU
        with an offset are mended, and what else cannot be a head CT in HU is refused.

        Args:
            volume: A CT in HU, any orientation and spacing.
            preset: ``full``, ``balanced`` or ``fast``.
            progress: Called with (forward passes done, all of them) after each.
            budget_s: Seconds that all of it may take, see ``predict``.

        Raises:
            InputError: The volume does not fit the model, or is no head CT in HU.
            WeightsError: A network's file does not fit its plan.
            BudgetError: The time does not suffice for one network without mirroring.
            DeviceError: A GPU's memory does not even hold one tile, or the GPU is lost.
        """
        warnings: tuple[str, ...] = ()
        if self.model.expects_hu:
            volume, warnings = plausibility.check(volume, "the volume")
        prepared = self.prepare(volume, preset)
        left_s = None if budget_s is None else budget_s - prepared.seconds
        found = self.finish(self.predict(prepared, progress, left_s))
        return dataclasses.replace(found, warnings=(*warnings, *found.warnings))

    def prepare(self, volume: Volume, preset: str = "full") -> Prepared:
        """Bring a volume into the configurations' grids; may run in any thread.

        Raises:
            InputError: The volume does not fit the model, or there is no such preset.
        """
        began = time.perf_counter()
        works = plan_works(self.model, volume, preset)
        plans = self.model.plans
        data = tuple(preprocess.prepare([volume], plans, w.configuration).data for w in works)
        return Prepared(volume, preset, works, data, time.perf_counter() - began)

    def predict(
        self,
        prepared: Prepared,
        progress: Count | None = None,
        budget_s: float | None = None,
        *,
        on_host: bool = False,
    ) -> Predicted:
        """Run the networks; in one thread at a time.

        Args:
            prepared: From ``prepare``; it can be used again.
            progress: Called with (forward passes done, all of them) after each.
            budget_s: Seconds for this and ``finish``. The networks then run unit by unit, one
                network with one mirroring each: all networks plain, then mirrored along one axis
                and so on, as many as fit. Finished units of a configuration weigh equally, one
                that is late is dropped. Each configuration, a cascade's first stage too, gets its
                share of the time by its work, and at least one unit.
            on_host: Add up the scores there, for volumes that a GPU's memory does not hold. Where
                it turns out to be full, all begins again so.

        Raises:
            WeightsError: A network's file does not fit its plan.
            BudgetError: Not even one unit of each configuration fits.
            DeviceError: A GPU's memory does not even hold one tile, or the GPU is lost.
        """
        works = prepared.works
        clock = Clock(
            progress=progress,
            total=sum(work.forward_passes for work in works),
            deadline=None
            if budget_s is None
            else time.perf_counter() + budget_s - self._restoring_s(prepared.volume),
            to_come=[passes.Load(w.unit_passes, w.tiles.tile, w.forward_passes) for w in works],
        )
        with self.engine.guard():
            if not on_host:
                with contextlib.suppress(*self.engine.memory_full):
                    return self._predict(prepared, dataclasses.replace(clock), budget_s)
            return self._predict(prepared, clock, budget_s, on_host=True)

    def _predict(
        self, prepared: Prepared, clock: Clock, budget_s: float | None, *, on_host: bool = False
    ) -> Predicted:
        place = self.engine.keep if on_host else self.engine.place
        parts: dict[str, tuple[Grid, Placement]] = {}
        doubts: list[float] = []
        ran_units: list[list[passes.Unit]] = []
        wanted = [work.configuration.previous_stage for work in prepared.works]
        for work, data in zip(prepared.works, prepared.data, strict=True):
            name, first = work.configuration.name, wanted.pop(0)
            if first is not None:
                previous = self._previous(prepared.volume, parts[first], work)
                data = np.concatenate((data, previous))
                if first not in (*self.model.averaged, *wanted):
                    parts.pop(first)
            done = self._run(place(data), work, clock)
            parts[name] = (done.scores, work.placement)
            doubts += done.doubts
            ran_units.append(done.units)
        ran = record(self.model, prepared.preset, prepared.works, ran_units)
        ran["engine"] = self.engine.name
        if on_host:
            ran["scores_on_host"] = True
        if budget_s is not None:
            ran |= units_record(prepared.works, ran_units, budget_s)
        return Predicted(
            volume=prepared.volume,
            parts=[parts[name] for name in self.model.averaged],
            ran=ran,
            seconds={
                "prepare": prepared.seconds,
                "compile": clock.compiling_s,
                "predict": clock.predicting_s,
            },
            doubt=sum(doubts) / len(doubts) if doubts else None,
        )

    def finish(self, predicted: Predicted) -> Segmentation:
        """Restore the scores to the volume's grid and decide; may run in any thread.

        Raises:
            DeviceError: The GPU that holds the scores is lost.
        """
        began = time.perf_counter()
        volume, model = predicted.volume, self.model
        with self.engine.guard():
            labels = self._restored(predicted.parts)
        labels = components.apply_rules(labels, model.rules, volume.voxel_ml)
        seconds = predicted.seconds | {"restore": time.perf_counter() - began}
        seconds["total"] = sum(seconds.values())
        return Segmentation(
            mask=volume.with_voxels(labels),
            volume_ml=float(np.count_nonzero(labels) * volume.voxel_ml),
            ran=predicted.ran,
            seconds={step: round(value, 3) for step, value in seconds.items()},
            doubt=predicted.doubt,
        )

    def _restored(self, parts: list[tuple[Grid, Placement]]) -> npt.NDArray[np.uint8]:
        """Labels in the volume's grid; on the host where the GPU's memory is full."""
        plans, average = self.model.plans, self.model.average
        with contextlib.suppress(*self.engine.memory_full):
            return preprocess.restore(parts, plans, average=average)
        parts = [(on_host(scores), placement) for scores, placement in parts]
        return preprocess.restore(parts, plans, average=average)

    def _previous(self, volume: Volume, found: tuple[Grid, Placement], work: Work) -> FloatArray:
        """What a cascade's first stage found, as channels ``(labels, Z, Y, X)`` of the second."""
        plans, wanted = self.model.plans, work.placement
        if self.model.cascade == "scores":
            labels = preprocess.regrid(*found, wanted, plans)
        else:
            decided = preprocess.restore([found], plans, average=self.model.average)
            outside = preprocess.outside_nonzero([volume], wanted)
            labels = preprocess.prepare_labels(volume.with_voxels(decided), wanted, plans, outside)
        return preprocess.one_hot(labels, len(plans.labels) - 1)

    def _run(self, data: Grid, work: Work, clock: Clock) -> passes.Done:
        """One configuration's networks."""
        plans, tiles = self.model.plans, work.tiles
        certain = _CERTAIN[self.model.average]
        background = [certain] + [0.0] * (plans.scores - 1)
        if plans.regions:
            background = [-certain] * len(plans.regions)
        return passes.run(
            load=lambda member: self._network(member, work.configuration),
            members=work.members if work.unit_passes else (),
            mirrors=work.mirrors,
            padded=sliding_window.pad(data, tiles),
            tiles=tiles,
            background=background,
            regions=bool(plans.regions),
            clock=clock,
        )

    def _network(self, member: Member, configuration: Configuration) -> LoadedNetwork:
        """The member's network; the one before is given up first."""
        if member.file not in self._alive:
            self._alive.clear()
            plans = self.model.plans
            spec = NetworkSpec(
                architecture=configuration.architecture,
                input_channels=plans.input_channels(configuration),
                scores=plans.scores,
                tile=configuration.tile,
                average=self.model.average,
            )
            state = bundle.load_state(self.folder, member)
            try:
                self._alive[member.file] = self.engine.load(spec, state)
            except ValueError as error:
                raise WeightsError(
                    f"{self.folder / member.file}: does not fit its plan ({error})"
                ) from error
        return self._alive[member.file]

    def _restoring_s(self, volume: Volume) -> float:
        """What ``finish`` will take, reserved of a time budget; generous."""
        scores = volume.voxels.size * self.model.plans.scores * len(self.model.averaged)
        return 0.3 + _RESTORING_S_PER_SCORE * scores
