"""An ensemble of trained networks: a volume goes in, a segmentation comes out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ichseg import bundle, engine, preprocess, sliding_window
from ichseg.bundle import Member, Model
from ichseg.errors import InputError, WeightsError
from ichseg.network import UNet, build_network
from ichseg.plans import Configuration
from ichseg.volume import Volume

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]


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
        ran: What was computed: preset, networks, mirrorings, tiles.
        seconds: Wall time of preparation, prediction and restoration.
        warnings: Anything a reader of the result should know.
    """

    mask: Volume
    volume_ml: float
    ran: dict[str, object]
    seconds: dict[str, float]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ensemble:
    """Networks of one bundle, loaded once and used for many volumes.

    Attributes:
        model: The bundle's description.
        folder: Where its tensors are.
        device: Where it runs.
        networks: One network per configuration; each fold's weights are swapped into it.
    """

    model: Model
    folder: Path
    device: torch.device
    networks: dict[str, UNet]
    _seconds_per_forward: dict[str, float] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, folder: Path, device: str = "auto") -> Ensemble:
        """Open a weights bundle.

        Args:
            folder: A folder with ``model.json``.
            device: ``auto``, ``cpu`` or ``cuda``.

        Raises:
            WeightsError: The bundle is missing, incomplete, altered or does not fit its plan.
            DeviceError: CUDA was asked for and is not usable.
        """
        chosen = engine.choose_device(device)
        model = bundle.load_model(folder)
        networks = {
            name: build_network(
                model.plans.configuration(name).architecture,
                len(model.plans.channels),
                len(model.plans.labels),
            )
            for name in model.configurations
        }
        return cls(model, folder, chosen, networks)

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
        total, done = self.forwards(volume, preset), 0

        def count(tiles: int) -> None:
            nonlocal done
            done += tiles
            if progress is not None:
                progress(done, total)

        seconds = {"prepare": 0.0, "predict": 0.0}
        parts = []
        for name in self.model.configurations:
            configuration = self.model.plans.configuration(name)
            start = time.perf_counter()
            case = preprocess.prepare([volume], self.model.plans, configuration)
            seconds["prepare"] += time.perf_counter() - start
            start = time.perf_counter()
            data = torch.from_numpy(case.data).to(self.device)
            parts.append((self._predict(data, configuration, preset, count), case.placement))
            seconds["predict"] += time.perf_counter() - start
        start = time.perf_counter()
        labels = preprocess.restore(parts, self.model.plans)
        seconds["restore"] = time.perf_counter() - start
        seconds["total"] = time.perf_counter() - began
        mask = volume.with_voxels(labels)
        return Segmentation(
            mask=mask,
            volume_ml=float(np.count_nonzero(labels) * volume.voxel_ml),
            ran=self._ran(preset, total),
            seconds={step: round(value, 3) for step, value in seconds.items()},
        )

    def forwards(self, volume: Volume, preset: str) -> int:
        """Forward passes that ``segment`` will make: tiles x mirrorings x networks."""
        return sum(count for count in self._forwards_by_configuration(volume, preset).values())

    def estimate_seconds(self, volume: Volume, preset: str) -> float:
        """Expected duration of the prediction, from a timed forward pass of each network."""
        counts = self._forwards_by_configuration(volume, preset)
        return sum(count * self._time_forward(name) for name, count in counts.items())

    def _forwards_by_configuration(self, volume: Volume, preset: str) -> dict[str, int]:
        counts = {}
        for name in self.model.configurations:
            configuration = self.model.plans.configuration(name)
            shape = preprocess.place([volume], self.model.plans, configuration).grid_shape
            tiles = sliding_window.tile_count(shape, configuration.tile)
            mirrors = len(sliding_window.mirrorings(self._mirror_axes(configuration, preset)))
            counts[name] = tiles * mirrors * len(self._members(name, preset))
        return counts

    def _time_forward(self, name: str) -> float:
        if name not in self._seconds_per_forward:
            configuration = self.model.plans.configuration(name)
            run = self._engine(self.model.members_of(name)[0])
            count = sliding_window.tiles_at_once(configuration.tile)
            shape = (count, len(self.model.plans.channels), *configuration.tile)
            tiles = torch.zeros(shape, device=self.device)
            for _ in range(2):  # the first call also allocates and tunes
                start = time.perf_counter()
                run(tiles).cpu()
                elapsed = time.perf_counter() - start
            self._seconds_per_forward[name] = elapsed / count
        return self._seconds_per_forward[name]

    def _predict(
        self,
        data: torch.Tensor,
        configuration: Configuration,
        preset: str,
        count: Callable[[int], None],
    ) -> torch.Tensor:
        """Mean scores ``(K, Z, Y, X)`` over the configuration's networks."""
        members = self._members(configuration.name, preset)
        total: torch.Tensor | None = None
        for member in members:
            run = self._engine(member)

            def counted(tile: torch.Tensor, run: sliding_window.Network = run) -> torch.Tensor:
                scores = run(tile)
                count(len(tile))
                return scores

            scores = sliding_window.predict_tiled(
                counted,
                data,
                configuration.tile,
                mirror_axes=self._mirror_axes(configuration, preset),
            )
            total = scores if total is None else total.add_(scores)
        assert total is not None
        return total.div_(len(members))

    def _engine(self, member: Member) -> sliding_window.Network:
        network = self.networks[member.configuration]
        state = bundle.load_state(self.folder, member)
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise WeightsError(
                f"{self.folder / member.file}: does not fit its plan ({reason})"
            ) from error
        return engine.torch_engine(network, self.device, average=self.model.average)

    def _members(self, name: str, preset: str) -> tuple[Member, ...]:
        return self.model.members_of(name)[: _preset(preset).folds]

    def _mirror_axes(self, configuration: Configuration, preset: str) -> tuple[int, ...]:
        if not _preset(preset).mirror:
            return ()
        return tuple(
            a for a in self.model.mirror_axes if a >= 3 - configuration.architecture.dimensions
        )

    def _ran(self, preset: str, forwards: int) -> dict[str, object]:
        networks = [
            f"{member.configuration} fold {member.fold}"
            for name in self.model.configurations
            for member in self._members(name, preset)
        ]
        return {
            "model": self.model.name,
            "version": self.model.version,
            "preset": preset,
            "networks": networks,
            "mirrored": _preset(preset).mirror,
            "forward_passes": forwards,
            "engine": engine.describe(self.device),
        }


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise InputError(f"preset {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
