"""A trained nnU-Net v2 folder becomes a weights bundle, which the container runs as it runs ours.

Weights stay fp32, and what the container does is what nnU-Net's own prediction does.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ichseg.errors import OutputError, WeightsError
from ichseg.files import make_folder, remove_unfinished, unfinished_folder
from ichseg.model import bundle
from ichseg.model.bundle import Member, Model
from ichseg.model.folder import MODEL_FILE
from ichseg.model.plans import Configuration, Plans
from training.bundle.identity import (
    BY_DEFAULT,
    Identity,
    add_identity_arguments,
    identity_from,
    warn_of_channels,
)
from training.bundle.nnunet_checkpoint import mirrored_axes, read_checkpoint, rename
from training.bundle.nnunet_plans import read_plans
from training.data.workspace import PLANS_FILE

CHECKPOINTS = {"final": "checkpoint_final.pth", "best": "checkpoint_best.pth"}
DESCRIPTION = "Imported from a trained nnU-Net; for research, not for any clinical use."

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Part:
    """What one model folder brings into the bundle.

    Attributes:
        folder: The model folder.
        plans: Its plans, with the one configuration that it trained.
        members: Its folds, whose weights are written already.
        mirror_axes: The axes that prediction may mirror, 0, 1, 2 for z, y, x.
        source: What the bundle's provenance says about the folder.
    """

    folder: Path
    plans: Plans
    members: tuple[Member, ...]
    mirror_axes: tuple[int, ...]
    source: Mapping[str, object]

    @property
    def configuration(self) -> Configuration:
        """The only configuration of the plans."""
        return self.plans.configurations[0]


def import_folders(
    folders: Sequence[Path],
    out: Path,
    *,
    folds: Sequence[str] | None = None,
    checkpoint: str = "final",
    identity: Identity = BY_DEFAULT,
) -> Model:
    """Write a bundle of the networks of one or several model folders.

    Args:
        folders: The folders as nnU-Net v2 leaves them, ``Trainer__Plans__configuration``. A
            cascade needs those of both stages, an ensemble those of all its configurations.
        out: The bundle's folder, which must not hold a bundle yet.
        folds: The folds to take, ``all`` for ``fold_all``. None takes all numbered ones that have
            the checkpoint, or ``fold_all`` where there is no numbered one.
        checkpoint: Whose weights to take, ``final`` or ``best``.
        identity: What the bundle is called; without a name it takes the dataset's.

    Returns:
        What was written to ``model.json``.

    Raises:
        WeightsError: A checkpoint is missing, holds something else, or does not fit its plans; a
            stage of a cascade is missing; the folders do not belong together.
        PlansError: The plans ask for something that this code does otherwise or not at all.
        OutputError: There is a bundle already.
    """
    if (out / MODEL_FILE).exists():
        raise OutputError(f"{out}: holds a bundle already, expected a new or empty folder")
    if out.is_dir():
        remove_unfinished(out)
        if any(out.iterdir()):
            raise OutputError(f"{out}: holds other files, expected a new or empty folder")
    make_folder(out)
    with _empty_if_it_fails(out), unfinished_folder(out) as beside:
        parts = [
            _import_folder(folder, folds, CHECKPOINTS[checkpoint], beside) for folder in folders
        ]
        plans = _together(parts)
        warn_of_channels(plans.channels)
        model = Model(
            schema_version=bundle.SCHEMA_VERSION,
            name=identity.name or plans.dataset,
            version=identity.version,
            description=identity.description or DESCRIPTION,
            input_slug=identity.input_slug,
            output_slug=identity.output_slug,
            licence=identity.licence,
            average="logits",
            mirror_axes=_same_mirrors(parts),
            plans=plans,
            members=tuple(member for part in parts for member in part.members),
            provenance={
                "imported": [part.source for part in parts],
                "torch": torch.__version__,
                "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            },
            cascade="labels",
        )
        for member in model.members:
            (beside / member.file).replace(out / member.file)
    bundle.save_model(out, model)
    return model


@contextlib.contextmanager
def _empty_if_it_fails(out: Path) -> Iterator[None]:
    """Take an empty folder away where what should have filled it fails."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it is not empty
            out.rmdir()
        raise


def find_folds(folder: Path, wanted: Sequence[str] | None, checkpoint: str) -> dict[str, Path]:
    """Find the checkpoints of a model folder, by fold.

    Raises:
        WeightsError: There is no checkpoint, or one of the wanted folds has none.
    """
    there = {path.parent.name[5:]: path for path in sorted(folder.glob(f"fold_*/{checkpoint}"))}
    if wanted is None:
        chosen = {fold: path for fold, path in there.items() if fold != "all"} or there
    else:
        chosen = {fold: there[fold] for fold in wanted if fold in there}
    missing = [fold for fold in wanted or [] if fold not in there]
    if missing or not chosen:
        other = next((o for o in CHECKPOINTS.values() if any(folder.glob(f"fold_*/{o}"))), None)
        hint = f"; there is a {other}" if other not in (None, checkpoint) else ""
        which = f"fold_{missing[0]}" if missing else "fold_0, fold_1, ..."
        raise WeightsError(f"{folder}: no {which}/{checkpoint}{hint or _elsewhere(folder)}")
    return chosen


def _folds_without(folder: Path, checkpoint: str) -> list[str]:
    """The numbered folds that were begun and have no such checkpoint."""
    begun = sorted(path for path in folder.glob("fold_*") if path.is_dir())
    return [p.name for p in begun if p.name != "fold_all" and not (p / checkpoint).exists()]


def _elsewhere(folder: Path) -> str:
    """What to give in place of a folder without folds, if anything around it tells."""
    if not folder.is_dir():
        return "; there is no such folder"
    inner = sorted(path.parent.name for path in folder.glob(f"*/{PLANS_FILE}"))
    if inner:
        return f"; give a folder in it, such as {inner[0]}"
    if folder.name.startswith("fold_") and (folder.parent / PLANS_FILE).exists():
        return f"; give the folder around it, {folder.parent}"
    return ""


def _import_folder(folder: Path, folds: Sequence[str] | None, checkpoint: str, out: Path) -> _Part:
    """Write the weights of a model folder's folds, with one fold in memory at a time.

    Raises:
        WeightsError: See ``import_folders``; or the folds differ in more than their weights.
        PlansError: See ``import_folders``.
    """
    members: list[Member] = []
    common: tuple[Plans, tuple[int, ...], str] | None = None
    for fold, path in find_folds(folder, folds, checkpoint).items():
        found = read_checkpoint(path)
        plans = read_plans(folder, found.configuration)
        axes = mirrored_axes(found, plans.configurations[0])
        common = common or (plans, axes, found.trainer)
        if common != (plans, axes, found.trainer):
            raise WeightsError(
                f"{path}: {found.trainer} of {found.configuration}, mirroring axes {axes}, unlike "
                f"fold {members[0].fold}"
            )
        state = rename(found, plans)
        members.append(bundle.save_member(out, found.configuration, fold, state, dtype=np.float32))
        _log.info("%s fold %s: %d tensors", found.configuration, fold, len(state))
    assert common is not None
    if folds is None and (without := _folds_without(folder, checkpoint)):
        _log.warning("%s: no %s in %s; left out", folder, checkpoint, ", ".join(without))
    plans, axes, trainer = common
    if trainer != "nnUNetTrainer":
        _log.warning(
            "%s: %s is taken to differ from nnUNetTrainer in its training alone; the network is "
            "that of the plans",
            folder,
            trainer,
        )
    source = {
        "folder": folder.resolve().name,
        "trainer": trainer,
        "checkpoint": checkpoint,
        "folds": [member.fold for member in members],
    }
    return _Part(folder, plans, tuple(members), axes, source)


def _together(parts: Sequence[_Part]) -> Plans:
    """Join the plans of all folders into one with all their configurations.

    Raises:
        WeightsError: The folders differ in something that a bundle has once, two are of the same
            configuration, or a stage of a cascade is missing.
    """
    first = parts[0].plans
    configurations: dict[str, Configuration] = {}
    for part in parts:
        for field in dataclasses.fields(Plans):
            one, two = getattr(first, field.name), getattr(part.plans, field.name)
            if field.name not in ("configurations", "architecture") and one != two:
                raise WeightsError(
                    f"{part.folder}: {field.name} {two}, unlike {one} of {parts[0].folder}; a "
                    "bundle has one"
                )
        if part.configuration.name in configurations:
            raise WeightsError(
                f"{part.folder}: a second {part.configuration.name}; a bundle has one"
            )
        configurations[part.configuration.name] = part.configuration
    for name, configuration in configurations.items():
        previous = configuration.previous_stage
        if previous is not None and previous not in configurations:
            raise WeightsError(f"{name} needs its first stage: give {previous}'s folder as well")
    architectures = {part.plans.architecture for part in parts}
    return dataclasses.replace(
        first,
        configurations=tuple(configurations.values()),
        architecture=architectures.pop() if len(architectures) == 1 else "plain",
    )


def _same_mirrors(parts: Sequence[_Part]) -> tuple[int, ...]:
    """The axes that all configurations mirror; 2D ones cannot mirror the first.

    Raises:
        WeightsError: The configurations mirror different axes.
    """
    every = tuple(sorted({axis for part in parts for axis in part.mirror_axes}))
    for part in parts:
        first = 3 - part.configuration.architecture.dimensions
        if part.mirror_axes != tuple(axis for axis in every if axis >= first):
            raise WeightsError(
                f"{part.folder}: mirrors axes {part.mirror_axes}, all together {every}; a bundle "
                "has one set"
            )
    return every


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the ``import-nnunet`` command."""
    parser.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="MODEL_FOLDER",
        help="nnU-Net v2's results of one configuration, Trainer__Plans__configuration with "
        "plans.json, dataset.json and fold_*; of a cascade both stages",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the bundle's folder"
    )
    parser.add_argument(
        "--folds",
        metavar="K,K,...",
        help="such as 0,1,2 or all, which is fold_all [all numbered ones]",
    )
    parser.add_argument(
        "--checkpoint", choices=CHECKPOINTS, default="final", help="which weights [%(default)s]"
    )
    add_identity_arguments(
        parser, name="the dataset's", description="imported, for research, not for clinical use"
    )


def main(args: argparse.Namespace) -> int:
    """Run the ``import-nnunet`` command."""
    model = import_folders(
        args.folders,
        args.out,
        folds=args.folds and [fold.strip() for fold in args.folds.split(",")],
        checkpoint=args.checkpoint,
        identity=identity_from(args),
    )
    for name in model.configurations:
        folds = ", ".join(member.fold for member in model.members_of(name))
        _log.info("%s: %s, folds %s", args.out, name, folds)
    return 0
