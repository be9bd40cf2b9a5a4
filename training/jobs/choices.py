"""What the user of ``run`` chose, and what follows from it once there are plans and folds."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ichseg.model.plans import Plans
from training.data import splits
from training.data.dataset import load_dataset
from training.data.workspace import bundles_folder
from training.fit.configuration import GivenSettings, TrainingConfig, settings_from
from training.planning import overrides
from training.planning.planned import load_plans

SELECTED = "selected"  # the bundle of what was selected


@dataclass(frozen=True, slots=True)
class Choices:
    """What the user of ``run`` chose.

    Attributes:
        dataset: The folder that ``convert`` reads.
        workspace: Where everything is made.
        configurations: Those asked for, such as ``3d_fullres``.
        folds: The folds to train; None for all of them.
        out: The folder for bundles; None for the workspace's own.
        groups: A table of cases that stay together in a fold, or None.
        recipe: The recipe of ``plan`` and ``train``; None for the planner's default, and then the
            plans' recipe.
        architecture: The architecture to plan for; None for the planner's default.
        overrides: What replaces the planner's choice: values by flag, as its command line takes
            them.
        settings: The settings of the training that were given.
        labels: Names of the labels' values, for a dataset that does not name them.
    """

    dataset: Path
    workspace: Path
    configurations: tuple[str, ...]
    folds: tuple[str, ...] | None
    out: Path | None
    groups: Path | None
    recipe: str | None
    architecture: str | None
    overrides: Mapping[str, str]
    settings: GivenSettings
    labels: tuple[str, ...] = ()

    def bundle_folder(self, name: str) -> Path:
        """The folder of a bundle."""
        return (bundles_folder(self.workspace) if self.out is None else self.out) / name


@dataclass(frozen=True, slots=True)
class Scope:
    """What a run has to train, compare and export.

    Attributes:
        choices: What the user chose.
        plans: The workspace's plans.
        all_folds: All folds of the workspace's splits.
    """

    choices: Choices
    plans: Plans
    all_folds: tuple[str, ...]

    @property
    def config(self) -> TrainingConfig:
        """The settings of the training, with the plans' recipe if no other was chosen."""
        return self.choices.settings.over(self.choices.recipe or self.plans.recipe)

    @property
    def trained(self) -> tuple[str, ...]:
        """The configurations to train: those asked for, and first stages of cascades."""
        return self.plans.with_first_stages(self.choices.configurations)

    @property
    def chosen_folds(self) -> tuple[str, ...]:
        """The folds that were asked for."""
        return self.all_folds if self.choices.folds is None else self.choices.folds

    def second_stages(self, name: str) -> tuple[str, ...]:
        """The configurations to train that take this one's segmentations."""
        return tuple(
            other
            for other in self.trained
            if self.plans.configuration(other).previous_stage == name
        )

    def folds_of(self, name: str) -> tuple[str, ...]:
        """The folds of a configuration to train; all, where a second stage needs all cases."""
        return self.all_folds if self.second_stages(name) else self.chosen_folds

    @property
    def compared(self) -> tuple[str, ...]:
        """The configurations to choose from, in the order of the plans.

        There are none where not all folds are trained and validated: then each configuration is
        exported by itself. A cascade's first stage is one of them only where it was asked for.
        """
        if not self.config.validation or set(self.chosen_folds) != set(self.all_folds):
            return ()
        order = [configuration.name for configuration in self.plans.configurations]
        return tuple(sorted(self.choices.configurations, key=order.index))

    @property
    def bundles(self) -> tuple[str, ...]:
        """The bundles to write: the one of what was selected, or one a configuration."""
        return (SELECTED,) if self.compared else self.trained


def find_scope(choices: Choices) -> Scope:
    """What a run comes to in a workspace that has been planned.

    Raises:
        IchsegError: The workspace lacks plans or cases, or its splits are of other cases.
    """
    names = [case.name for case in load_dataset(choices.workspace).labelled]
    folds = splits.find_splits(choices.workspace, names)
    found = load_plans(choices.workspace)
    return Scope(choices, found, tuple(map(str, range(len(folds)))))


def choices_from(args: argparse.Namespace) -> Choices:
    """What the flags of ``run`` say.

    Raises:
        PlansError: A value for the planner is out of range.
    """
    replaced = overrides.record(overrides.overrides_from(args), None, 0.0)
    return Choices(
        dataset=args.dataset,
        workspace=args.workspace,
        configurations=tuple(args.configurations),
        folds=args.folds,
        out=args.out,
        groups=args.groups,
        recipe=args.recipe,
        architecture=args.architecture,
        overrides={override.name: override.chosen for override in replaced},
        settings=settings_from(args),
        labels=args.labels,
    )
