"""The weights that a training begins with: of a bundle, or of a trained nnU-Net v2 folder."""

from __future__ import annotations

import logging
from pathlib import Path

from ichseg.engine import torch_engine
from ichseg.errors import TrainingError, WeightsError
from ichseg.model import bundle
from ichseg.model.bundle import Member, Model
from ichseg.model.folder import MODEL_FILE
from training.bundle.import_nnunet import CHECKPOINTS, find_folds
from training.bundle.nnunet_checkpoint import read_checkpoint, rename
from training.bundle.nnunet_plans import read_plans
from training.data.splits import digest_names, fold_key
from training.data.workspace import ALL_FOLD, PLANS_FILE
from training.fit.fold_run import FoldRun
from training.fit.pretrained import Pretrained

_FOLD = "fold_"

_log = logging.getLogger(__name__)


def read_pretrained(folder: Path, configuration: str, fold: str) -> Pretrained:
    """The weights of a folder that fit a training best.

    Of a bundle that is the network of the same configuration and fold if it has that; else the
    first of that configuration, else the first of all. Of nnU-Net's folder of a configuration it is
    the same fold, else the first, by the final checkpoint or else the best. One of its ``fold_K``
    folders may be named as well.

    Args:
        folder: A weights bundle, or nnU-Net v2's ``Trainer__Plans__configuration``.
        configuration: The configuration that is to be trained.
        fold: The fold that is to be trained.

    Raises:
        WeightsError: The folder is neither, or it is damaged or of another version.
        PlansError: nnU-Net's plans are of a network that cannot be built here.
    """
    if (folder / MODEL_FILE).exists():
        model = bundle.load_model(folder)
        member = choose_member(model, configuration, fold)
        tensors = torch_engine.tensors(bundle.load_state(folder, member))
        return Pretrained(
            f"{member.configuration} fold {member.fold}", folder / member.file, tensors
        )
    if (folder / PLANS_FILE).exists():
        return _of_nnunet(folder, fold)
    if folder.name.startswith(_FOLD) and (folder.parent / PLANS_FILE).exists():
        return _of_nnunet(folder.parent, folder.name.removeprefix(_FOLD))
    raise WeightsError(
        f"{folder}: expected a weights bundle, with {MODEL_FILE}, or a folder of nnU-Net v2's "
        f"results, with {PLANS_FILE} and fold_0, fold_1, ..."
    )


def require_unseen(folder: Path, run: FoldRun) -> None:
    """Refuse a bundle's network that is known to have seen cases that a fold validates.

    Of the same dataset the network must have been trained on the very cases that train the fold.
    Where it is not known on which it was, there is a warning: of a dataset of another name, which
    may hold some of the cases too, and of nnU-Net's folders, which do not say.

    Args:
        folder: What ``read_pretrained`` is given.
        run: The fold that is to begin with it.

    Raises:
        TrainingError: It was trained on other cases of the dataset.
        WeightsError: It is a bundle that is damaged or of another version.
    """
    if run.fold == ALL_FOLD:
        return
    what = "does not say on which cases it was trained"
    if (folder / MODEL_FILE).exists():
        model = bundle.load_model(folder)
        member = choose_member(model, run.configuration.name, run.fold)
        seen = _trained_on(model, member)
        if seen == digest_names(run.cases.train):
            return
        if model.plans.dataset != run.plans.dataset:
            what = f"was trained on {model.plans.dataset}"
        elif seen is not None:
            raise TrainingError(
                f"{folder / member.file}: was trained on other cases of {model.plans.dataset} than "
                f"those that train fold {run.fold}, so it may know cases that this fold validates; "
                "expected a network of the same fold, weights of another dataset, or --fold "
                f"{ALL_FOLD}"
            )
    _log.warning(
        "%s: %s; if it knows cases that fold %s validates, their scores are too good",
        folder,
        what,
        run.fold,
    )


def _trained_on(model: Model, member: Member) -> str | None:
    """The digest of the names of the cases that a network was trained on, if the bundle has it."""
    try:
        record = model.provenance["folds"][fold_key(member.configuration, member.fold)]
        return str(record["trained_on"])
    except (KeyError, TypeError):
        return None


def choose_member(model: Model, configuration: str, fold: str) -> Member:
    """Which of a bundle's networks to begin with."""
    alike = model.members_of(configuration) or model.members
    return next((member for member in alike if member.fold == fold), alike[0])


def _of_nnunet(folder: Path, fold: str) -> Pretrained:
    """The weights of one fold of a model folder, the same or else the first."""
    final, best = (any(folder.glob(f"{_FOLD}*/{name}")) for name in CHECKPOINTS.values())
    kind = "best" if best and not final else "final"
    folds = find_folds(folder, None, CHECKPOINTS[kind])
    taken = fold if fold in folds else next(iter(folds))
    found = read_checkpoint(folds[taken])
    tensors = rename(found, read_plans(folder, found.configuration))
    return Pretrained(f"nnU-Net's {found.configuration} fold {taken}", folds[taken], tensors)
