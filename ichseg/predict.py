"""An ensemble of trained networks: a volume goes in, a segmentation comes out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ichseg import air, bundle, engine, preprocess, sliding_window
from ichseg.bundle import Member, Model
from ichseg.engine import Engine, LoadedNetwork, NetworkSpec
from ichseg.errors import InputError, WeightsError
from ichseg.plans import Configuration
from ichseg.preprocess import Placement
from ichseg.resample import Grid
from ichseg.sliding_window import Tiles
from ichseg.volume import Volume

Progress = Callable[[int, int], None]
# What a voxel that no network saw scores as background, above every label: for certain.
_CERTAIN = {"probabilities": 1.0, "logits": 10.0}


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
        warnings: Anything a reader of the result should know.
    """

    mask: Volume
    volume_ml: float
    ran: dict[str, object]
    seconds: dict[str, float]
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
    def forward_passes(self) -> int:
        """Tiles that are not skipped, times mirrorings, times networks."""
        tiles = self.tiles.total - len(self.tiles.skipped)
        return tiles * len(self.mirrors) * len(self.members)


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
        model = bundle.load_model(folder)
        for name in model.configurations:
            previous = model.plans.configuration(name).previous_stage
            if previous is not None:
                raise WeightsError(
                    f"{folder}: {name} needs the segmentation of {previous}, which cannot be run "
                    "before it yet"
                )
        return cls(model, folder, engine.choose(device))

    def segment(
        self, volume: Volume, preset: str = "full", progress: Progress | None = None
    ) -> Segmentation:
        """Segment one volume.

        Args:
            volume: A CT in HU, any orientation and spacing.
            preset: ``full``, ``balanced`` or ``fast``.
            progress: Called with (forward passes done, all of them) after each.

        Raises:
            InputError: The volume does not fit the model.
            WeightsError: A network's file does not fit its plan.
        """
        began = time.perf_counter()
        works = self.work(volume, preset)
        total, done = sum(work.forward_passes for work in works), 0

        def count(tiles: int) -> None:
            nonlocal done
            done += tiles
            if progress is not None:
                progress(done, total)

        seconds = {"prepare": time.perf_counter() - began, "compile": 0.0, "predict": 0.0}
        parts = []
        for work in works:
            start = time.perf_counter()
            case = preprocess.prepare([volume], self.model.plans, work.configuration)
            data = self.engine.place(case.data)
            seconds["prepare"] += time.perf_counter() - start
            scores = self._predict(data, work, count, seconds)
            parts.append((scores, case.placement))
        start = time.perf_counter()
        labels = preprocess.restore(parts, self.model.plans)
        seconds["restore"] = time.perf_counter() - start
        seconds["total"] = time.perf_counter() - began
        return Segmentation(
            mask=volume.with_voxels(labels),
            volume_ml=float(np.count_nonzero(labels) * volume.voxel_ml),
            ran=self._ran(preset, works),
            seconds={step: round(value, 3) for step, value in seconds.items()},
        )

    def work(self, volume: Volume, preset: str) -> list[Work]:
        """What ``segment`` will do, for each configuration.

        Raises:
            InputError: The volume does not fit the model, or there is no such preset.
        """
        if preset not in PRESETS:
            raise InputError(f"preset {preset!r}, expected one of {', '.join(PRESETS)}")
        chosen, plans = PRESETS[preset], self.model.plans
        works = []
        for name in self.model.configurations:
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

    def _predict(
        self, data: Grid, work: Work, count: Callable[[int], None], seconds: dict[str, float]
    ) -> Grid:
        """Mean scores ``(K, Z, Y, X)`` over the configuration's networks: folds outermost."""
        plans, tiles = self.model.plans, work.tiles
        padded = sliding_window.pad(data, tiles)
        total = sliding_window.zeros_like(padded, (plans.scores, *tiles.padded))
        for member in work.members if work.forward_passes else ():
            self._add_member(member, work, padded, total, count, seconds)
        certain = _CERTAIN[self.model.average]
        if plans.regions:
            background = [-certain] * len(plans.regions)
        else:
            background = [certain] + [0.0] * (plans.scores - 1)
        passes = len(work.members) * len(work.mirrors)
        return sliding_window.average(total, tiles, passes, background)

    def _add_member(
        self,
        member: Member,
        work: Work,
        padded: Grid,
        total: Grid,
        count: Callable[[int], None],
        seconds: dict[str, float],
    ) -> None:
        """Add one network's scores to ``total``; after that nothing here holds the network."""
        start = time.perf_counter()
        network = self._network(member, work.configuration)
        loaded = time.perf_counter()

        def counted(batch: Grid) -> Grid:
            scores = network.run(batch)
            count(len(batch))
            return scores

        sliding_window.add_tiles(
            counted, padded, work.tiles, total, mirrors=work.mirrors, batch=network.batch
        )
        seconds["compile"] += loaded - start
        seconds["predict"] += time.perf_counter() - loaded

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

    def _ran(self, preset: str, works: list[Work]) -> dict[str, object]:
        return {
            "model": self.model.name,
            "version": self.model.version,
            "preset": preset,
            "networks": [
                f"{member.configuration} fold {member.fold}"
                for work in works
                for member in work.members
            ],
            "mirrored": PRESETS[preset].mirror,
            "tiles": sum(work.tiles.total for work in works),
            "tiles_skipped": sum(len(work.tiles.skipped) for work in works),
            "forward_passes": sum(work.forward_passes for work in works),
            "engine": self.engine.name,
        }
