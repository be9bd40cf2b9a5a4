"""The networks of a bundle, loaded when they are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ichseg.engine.engine import Engine, Network, NetworkSpec
from ichseg.errors import WeightsError
from ichseg.model import bundle
from ichseg.model.bundle import Member, Model
from ichseg.model.plans import Configuration

_LONGEST_REASON = 400  # a tensor may have any name, and is quoted


@dataclass(frozen=True, slots=True)
class Networks:
    """Loads networks on demand; each takes memory several times its tensors' size.

    Attributes:
        model: The bundle's description.
        folder: The folder with its tensors.
        engine: Who runs them.
    """

    model: Model
    folder: Path
    engine: Engine
    _alive: dict[str, Network] = field(default_factory=dict, repr=False)  # by file, or none

    def loaded(self) -> list[Member]:
        """The members whose networks are ready now."""
        return [member for member in self.model.members if member.file in self._alive]

    def load_all(self, members: Sequence[Member], threads: int) -> None:
        """Load several, so many at the same time, and keep them ready.

        Raises:
            WeightsError: As ``load``, for one of those that it is true of.
        """
        with ThreadPoolExecutor(threads, "loader") as loader:
            configuration = self.model.plans.configuration
            for loaded in [
                loader.submit(self.load, member, configuration(member.configuration), keep=True)
                for member in members
            ]:
                loaded.result()

    def load(self, member: Member, configuration: Configuration, *, keep: bool) -> Network:
        """A member's network, ready to run.

        Args:
            member: Which network.
            configuration: Its configuration.
            keep: Whether those before stay ready, too; otherwise they are given up first.

        Raises:
            WeightsError: The network's file cannot be read or does not fit its plan.
        """
        if not keep:
            for other in self._alive.keys() - {member.file}:
                del self._alive[other]
        if member.file not in self._alive:
            spec = spec_of(self.model, configuration)
            state = bundle.load_state(self.folder, member)
            try:
                self._alive[member.file] = self.engine.load(spec, state)
            except ValueError as error:
                reason = str(error)[:_LONGEST_REASON]
                raise WeightsError(
                    f"{self.folder / member.file}: does not fit its plan ({reason})"
                ) from error
        return self._alive[member.file]


def spec_of(model: Model, configuration: Configuration) -> NetworkSpec:
    """What an engine has to know of a configuration's networks."""
    return NetworkSpec(
        architecture=configuration.architecture,
        input_channels=model.plans.input_channels(configuration),
        scores=model.plans.scores,
        tile=configuration.tile,
        average=model.average,
    )
