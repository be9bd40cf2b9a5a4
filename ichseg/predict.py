"""An ensemble of trained networks: a volume goes in, a segmentation comes out.

In three steps, which a pipeline of many volumes may overlap: ``prepare``, ``predict``, ``finish``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ichseg import air, bundle, engine, postprocess, preprocess, sliding_window, units
from ichseg.bundle import Member, Model
from ichseg.engine import Engine, LoadedNetwork, NetworkSpec
from ichseg.errors import InputError, WeightsError
from ichseg.plans import Configuration
from ichseg.preprocess import FloatArray, Placement
from ichseg.resample import Grid
from ichseg.sliding_window import Tiles
from ichseg.units import Clock, Count
from ichseg.volume import Volume

# What a voxel that no network saw scores as background, above every label: for certain.
_CERTAIN = {"probabilities": 1.0, "logits": 10.0}
_RESTORING_S_PER_SCORE = 4e-8  # on two cores, twice what was measured


@dataclass(frozen=True, slots=True)
class Preset:
    """How much of an ensemble runs: how many folds (None: all) and whether tiles are mirrored."""

    folds: int | None
    mirror: bool


PRESETS = {
    "full": Preset(folds=None, mirror=True),
    "balanced": Preset(folds=None, mirror=False),
    "fast": Preset(folds=1, mirror=False),
}


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
            all agree, also that there is none; None where only one network ran. Before rules.
        warnings: Anything a reader of the result should know.
    """

    mask: Volume
    volume_ml: float
    ran: dict[str, object]
    seconds: dict[str, float]
    doubt: float | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Work:
    """What one configuration has to do for one volume.

    Attributes:
        configuration: Whose networks.
        placement: Of the volume in its grid.
        tiles: In that grid.
        mirrors: Axes to mirror, for each pass over the tiles.
        members: The networks.
    """

    configuration: Configuration
    placement: Placement
    tiles: Tiles
    mirrors: list[tuple[int, ...]]
    members: tuple[Member, ...]

    @property
    def unit_passes(self) -> int:
        """Tiles that are not skipped: forward passes of one network with one mirroring."""
        return self.tiles.total - len(self.tiles.skipped)

    @property
    def forward_passes(self) -> int:
        """Tiles that are not skipped, times mirrorings, times networks."""
        return self.unit_passes * len(self.mirrors) * len(self.members)


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
    def load(cls, folder: Path, device: str = "auto") -> Ensemble:
        """Open a weights bundle.

        Args:
            folder: A folder with ``model.json``.
            device: ``auto``, ``cpu``, ``cuda`` or ``torch-cpu``, see ``engine.choose``.

        Raises:
            WeightsError: The bundle is missing, incomplete or altered.
            DeviceError: CUDA was asked for and is not usable.
        """
        return cls(bundle.load_model(folder), folder, engine.choose(device))

    def segment(
        self,
        volume: Volume,
        preset: str = "full",
        progress: Count | None = None,
        budget_s: float | None = None,
    ) -> Segmentation:
        """Segment one volume.

        Args:
            volume: A CT in HU, any orientation and spacing.
            preset: ``full``, ``balanced`` or ``fast``.
            progress: Called with (forward passes done, all of them) after each.
            budget_s: Seconds that all of it may take, see ``predict``.

        Raises:
            InputError: The volume does not fit the model.
            WeightsError: A network's file does not fit its plan.
            BudgetError: The time does not suffice for one network without mirroring.
        """
        prepared = self.prepare(volume, preset)
        left_s = None if budget_s is None else budget_s - prepared.seconds
        return self.finish(self.predict(prepared, progress, left_s))

    def prepare(self, volume: Volume, preset: str = "full") -> Prepared:
        """Bring a volume into the configurations' grids; may run in any thread.

        Raises:
            InputError: The volume does not fit the model, or there is no such preset.
        """
        began = time.perf_counter()
        works = tuple(self.work(volume, preset))
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
            on_host: Add up the scores there, for volumes that a GPU's memory does not hold.

        Raises:
            WeightsError: A network's file does not fit its plan.
            BudgetError: Not even one unit of each configuration fits.
        """
        works = prepared.works
        clock = Clock(
            progress=progress,
            total=sum(work.forward_passes for work in works),
            deadline=None
            if budget_s is None
            else time.perf_counter() + budget_s - self._restoring_s(prepared.volume),
            to_come=[units.Load(w.unit_passes, w.tiles.tile, w.forward_passes) for w in works],
        )
        parts: dict[str, tuple[Grid, Placement]] = {}
        doubts: list[float] = []
        ran_units: list[list[units.Unit]] = []
        place = self.engine.keep if on_host else self.engine.place
        for work, data in zip(works, prepared.data, strict=True):
            name, first = work.configuration.name, work.configuration.previous_stage
            if first is not None:
                previous = self._previous(prepared.volume, parts[first], work)
                data = np.concatenate((data, previous))
                if first not in self.model.averaged:
                    parts.pop(first)
            done = self._run(place(data), work, clock)
            parts[name] = (done.scores, work.placement)
            doubts += done.doubts
            ran_units.append(done.units)
        return Predicted(
            volume=prepared.volume,
            parts=[parts[name] for name in self.model.averaged],
            ran=self._ran(prepared, ran_units, budget_s),
            seconds={
                "prepare": prepared.seconds,
                "compile": clock.compiling_s,
                "predict": clock.predicting_s,
            },
            doubt=sum(doubts) / len(doubts) if doubts else None,
        )

    def finish(self, predicted: Predicted) -> Segmentation:
        """Restore the scores to the volume's grid and decide; may run in any thread."""
        began = time.perf_counter()
        volume, model = predicted.volume, self.model
        labels = preprocess.restore(predicted.parts, model.plans, average=model.average)
        labels = postprocess.apply_rules(labels, model.rules, volume.voxel_ml)
        seconds = predicted.seconds | {"restore": time.perf_counter() - began}
        seconds["total"] = sum(seconds.values())
        return Segmentation(
            mask=volume.with_voxels(labels),
            volume_ml=float(np.count_nonzero(labels) * volume.voxel_ml),
            ran=predicted.ran,
            seconds={step: round(value, 3) for step, value in seconds.items()},
            doubt=predicted.doubt,
        )

    def work(self, volume: Volume, preset: str) -> list[Work]:
        """What ``segment`` will do, for each configuration, first stages of cascades first.

        Raises:
            InputError: The volume does not fit the model, or there is no such preset.
        """
        if preset not in PRESETS:
            raise InputError(f"preset {preset!r}, expected one of {', '.join(PRESETS)}")
        chosen, plans = PRESETS[preset], self.model.plans
        works = []
        for name in self.model.in_order:
            configuration = plans.configuration(name)
            placement = preprocess.place([volume], plans, configuration)
            tiles = sliding_window.cover(placement.grid_shape, configuration.tile)
            dimensions = configuration.architecture.dimensions
            axes = [a for a in self.model.mirror_axes if a >= 3 - dimensions]
            works.append(
                Work(
                    configuration,
                    placement,
                    air.skip_air(tiles, [volume], placement, plans),
                    sliding_window.mirrorings(axes if chosen.mirror else ()),
                    self.model.members_of(name)[: chosen.folds],
                )
            )
        return works

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

    def _run(self, data: Grid, work: Work, clock: Clock) -> units.Done:
        """One configuration's networks."""
        plans, tiles = self.model.plans, work.tiles
        certain = _CERTAIN[self.model.average]
        background = [certain] + [0.0] * (plans.scores - 1)
        if plans.regions:
            background = [-certain] * len(plans.regions)
        return units.run(
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

    def _ran(
        self, prepared: Prepared, ran: Sequence[Sequence[units.Unit]], budget_s: float | None
    ) -> dict[str, object]:
        works, preset = prepared.works, prepared.preset
        record: dict[str, object] = {
            "model": self.model.name,
            "version": self.model.version,
            "preset": preset,
            "networks": [
                f"{work.configuration.name} fold {member.fold}"
                for work, done in zip(works, ran, strict=True)
                for member in dict.fromkeys(unit.member for unit in done)
            ],
            "mirrored": any(unit.mirror for done in ran for unit in done),
            "tiles": sum(work.tiles.total for work in works),
            "tiles_skipped": sum(len(work.tiles.skipped) for work in works),
            "forward_passes": sum(
                work.unit_passes * len(done) for work, done in zip(works, ran, strict=True)
            ),
            "engine": self.engine.name,
        }
        if budget_s is not None:
            record["time_budget_s"] = round(budget_s, 3)
            record["units"] = sum(map(len, ran))
            record["units_planned"] = sum(len(w.mirrors) * len(w.members) for w in works)
        return record
