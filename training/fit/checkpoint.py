"""What a training leaves on disk so that it goes on as if it had never stopped."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ichseg.errors import OutputError, TrainingError
from ichseg.files import replacing
from ichseg.model import strict_json
from ichseg.model.plans import Configuration, Plans
from ichseg.wording import counted
from training.data.sources import corrected_since
from training.data.splits import Split
from training.data.workspace import BEST_CHECKPOINT, LATEST_CHECKPOINT
from training.fit import schedule
from training.fit.fold_run import FoldRun, changed_settings
from training.fit.history import EpochRow
from training.fit.schedule import ScheduleState
from training.fit.step import TrainingState, restore_optimiser

SCHEMA_VERSION = 3
_WAY_OUT = (
    f"put a copy in its place, go on from {BEST_CHECKPOINT} by renaming that, or begin anew with "
    "--restart"
)
LOWEST_SCALE = 2.0**-16  # of the loss under fp16: thirty halvings below where it starts
# What of the plans decides a network's input and what its scores mean, whatever its configuration.
_DECISIVE = (
    "channels", "labels", "regions", "region_labels", "orientation", "transpose", "crop",
    "normalise_first", "normalisations", "resampling",
)  # fmt: skip

_log = logging.getLogger(__name__)


def checkpoint_of(run: FoldRun, state: TrainingState) -> dict[str, Any]:
    """Tensors and plain values, so that it loads with ``weights_only=True``."""
    return {
        "schema_version": SCHEMA_VERSION,
        "configuration": strict_json.dumps(run.configuration),
        "plans": _decisive(run.plans),
        "network": state.network.state_dict(),
        "optimiser": state.optimiser.state_dict(),
        "scaler": state.scaler.state_dict(),
        "optimiser_name": run.config.optimiser,
        "learning_rate": run.config.learning_rate,
        "cases": {"train": run.cases.train, "validation": run.cases.validation},
        "sources": dict(run.sources),
        "first_stage": dict(run.first_stage),
        "schedule": dataclasses.asdict(state.schedule),
        "losses": state.losses,
        "seconds": state.seconds,
        "data_wait_s": state.data_wait_s,
        "elapsed_s": state.elapsed_s,
        "history": [dataclasses.asdict(row) for row in state.history],
        "average_dice": state.average_dice,
        "best_dice": state.best_dice,
        "finished": reason_to_end(run, state),
    }


def reason_to_end(run: FoldRun, state: TrainingState) -> str | None:
    """Why training is over, in words; None when it goes on, if only to end the epoch in hand."""
    if state.losses:
        return None
    return schedule.end_reason(run.config.rules, state.schedule, state.elapsed_s)


def require_sound(run: FoldRun, state: TrainingState) -> None:
    """Refuse to keep what nothing can be trained from any more.

    Raises:
        TrainingError: The weights are not finite, or no scale of the loss suits fp16.
    """
    finite = torch.stack([p.isfinite().all() for p in state.network.parameters()])
    if not bool(finite.all()):
        raise diverged(run, "the weights are no longer finite")
    if state.scaler.is_enabled() and state.scaler.get_scale() < LOWEST_SCALE:
        raise diverged(run, "every step's gradient overflows fp16")


def write(run: FoldRun, checkpoint: dict[str, Any], name: str) -> None:
    """Write what ``checkpoint_of`` gave into the run's folder; the old one is replaced whole.

    Raises:
        OutputError: It cannot be written; the old checkpoint stays.
    """
    try:
        with (
            replacing(run.folder / name, suffix=".pt", durable=True) as temporary,
            temporary.open("wb") as stream,
        ):
            save(checkpoint, stream)
    except OutputError as error:
        raise OutputError(
            f"{error}; make room there, and the same command without --restart goes on from the "
            "last checkpoint that was written"
        ) from error


def save(checkpoint: dict[str, Any], stream: BinaryIO) -> None:
    """Write a checkpoint, ours or nnU-Net's, to an open file.

    Raises:
        OSError: It cannot be written, which torch reports as an error of its own.
    """
    try:
        torch.save(checkpoint, stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def diverged(run: FoldRun, what: str) -> TrainingError:
    """What went wrong and what to change; the last checkpoint is from before it."""
    precision = " or with --precision fp32" if run.precision != "fp32" else ""
    return TrainingError(
        f"{run.folder}: {what}; go on from the last checkpoint by the same command without "
        f"--restart, with a --learning-rate below {run.config.learning_rate:g}{precision}"
    )


def resume(run: FoldRun, state: TrainingState) -> None:
    """Fill the state from the latest checkpoint, and say which settings are no longer the same.

    Raises:
        TrainingError: It is damaged, or of other plans, cases or another optimiser.
    """
    path = run.folder / LATEST_CHECKPOINT
    raw = load_checkpoint(path, run.plans, run.configuration, run.cases, run.device)
    state.network.load_state_dict(raw["network"])
    if raw["optimiser_name"] != run.config.optimiser:
        raise TrainingError(
            f"{path}: trained with {raw['optimiser_name']} so far, but "
            f"--optimiser is {run.config.optimiser}; leave it as it was, or begin anew with "
            "--restart"
        )
    restore_optimiser(state.optimiser, raw["optimiser"], run.config)
    if raw["scaler"]:  # else it was not fp16 so far, and the scale is found anew
        state.scaler.load_state_dict(raw["scaler"])
    state.schedule = schedule.adopt(
        run.config.rules,
        ScheduleState(**raw["schedule"]),
        old_rate=raw["learning_rate"],
        elapsed_s=raw["elapsed_s"],
    )
    state.losses = list(raw["losses"])
    state.seconds, state.data_wait_s = raw["seconds"], raw["data_wait_s"]
    state.elapsed_s = raw["elapsed_s"]
    state.history = [EpochRow(**row) for row in raw["history"]]
    state.average_dice, state.best_dice = raw["average_dice"], raw["best_dice"]
    for name, new, old in changed_settings(run):
        if name != "pretrained":
            _log.warning("going on with %s %s, so far it was %s", name, new, old)
        elif new is not None:
            _log.warning("--pretrained %s is not used: to begin with it takes --restart", new)
    _log.info("going on after epoch %d, step %d", state.schedule.epoch, len(state.losses))


def load_checkpoint(
    path: Path,
    plans: Plans,
    configuration: Configuration,
    cases: Split,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Read a checkpoint of these plans and configuration, trained and validated on these cases.

    Args:
        path: The checkpoint.
        plans: The plans as they are now.
        configuration: Its configuration as they have it now.
        cases: The fold as the splits have it now.
        device: Where its tensors are wanted; the CPU by default.

    Raises:
        TrainingError: It is missing, damaged, of other plans, or of other cases.
    """
    raw = read_checkpoint(path, configuration, device)
    if "plans" in raw:  # which earlier versions did not note
        _require_plans(path, raw["plans"], plans)
    require_cases(path, Split(**raw["cases"]), cases)
    return raw


def has_ended(run: FoldRun, checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is that of a training's end, as the run's settings define it."""
    if checkpoint["finished"] is None:
        return False
    state = ScheduleState(**checkpoint["schedule"])
    return schedule.end_reason(run.config.rules, state, checkpoint["elapsed_s"]) is not None


def digest_of(path: Path, plans: Plans, configuration: Configuration, cases: Split) -> str:
    """The digest of a checkpoint's weights, read once as long as the file stays the same.

    Arguments and errors are those of ``load_checkpoint``.
    """
    found = path.stat() if path.exists() else None
    file = found and (found.st_ino, found.st_size, found.st_mtime_ns)
    return _digest_of(path, file, plans, configuration, cases)


@functools.cache
def _digest_of(
    path: Path, file: object, plans: Plans, configuration: Configuration, cases: Split
) -> str:
    del file  # only tells one file at this place from the next
    return weights_digest(load_checkpoint(path, plans, configuration, cases)["network"])


def require_sources(run: FoldRun) -> None:
    """Refuse to train a network further that was trained on files that were corrected since.

    One whose training has ended stays as it is, with a warning: it may still segment cases.

    Raises:
        TrainingError: They were, and the training would go on; says which, and what to do.
    """
    path = run.folder / LATEST_CHECKPOINT
    if not path.exists():
        return
    checkpoint = load_checkpoint(path, run.plans, run.configuration, run.cases)
    changed = corrected_since(checkpoint["sources"], run.sources)
    if not changed:
        return
    found = (
        f"{path}: was trained with {counted(len(changed), 'case')} whose image or label has been "
        f"corrected since, such as {changed[0]}"
    )
    if not has_ended(run, checkpoint):
        raise TrainingError(
            f"{found}; begin anew with --restart, or leave the fold as it is and go on with the "
            "commands after `train`"
        )
    _log.warning("%s; --restart trains anew", found)


def _decisive(plans: Plans) -> dict[str, str]:
    """What of the plans a network depends on, each as JSON."""
    read = strict_json.from_json(Plans, strict_json.to_json(plans), where="plans")  # 1 becomes 1.0
    whole = strict_json.to_json(read)
    return {name: json.dumps(whole.get(name)) for name in _DECISIVE}


def _require_plans(path: Path, seen: Mapping[str, str], plans: Plans) -> None:
    """Refuse a network whose scans were prepared in another way, or whose labels were others.

    Raises:
        TrainingError: It is one; says what differs.
    """
    now = _decisive(plans)
    different = [name for name in now if seen.get(name) != now[name]]
    if different:
        raise TrainingError(
            f"{path}: trained by plans with other {', '.join(different)} than plans.json has now; "
            "put that back as it was, or begin anew with --restart"
        )


def require_cases(path: Path, seen: Split, now: Split) -> None:
    """Refuse a checkpoint whose cases are no longer those of its fold.

    A network that had trained on a case of the validation would be scored on what it knows.

    Args:
        path: The checkpoint.
        seen: The cases that it was trained and validated on.
        now: The fold as the splits have it now.

    Raises:
        TrainingError: They differ; says how, and what to do.
    """
    advice = (
        "expected the splits that it was trained with; put splits.json and groups.csv back as they "
        "were, or begin anew with --restart"
    )
    if known := sorted(set(seen.train) & set(now.validation) - set(now.train)):
        raise TrainingError(
            f"{path}: was trained on {len(known)} of the {len(now.validation)} cases that its fold "
            f"validates now, such as {known[0]}; {advice}"
        )
    for what, old, new in (
        ("trained", set(seen.train), set(now.train)),
        ("validated", set(seen.validation), set(now.validation)),
    ):
        if old != new:
            raise TrainingError(
                f"{path}: {what} on {len(old)} cases, of which {len(old & new)} are among the "
                f"{len(new)} that its fold has now; {advice}"
            )


def read_checkpoint(
    path: Path, configuration: Configuration, device: torch.device | None = None
) -> dict[str, Any]:
    """Read a checkpoint of this configuration, whatever its cases.

    Args:
        path: The checkpoint.
        configuration: The configuration as the plans have it now.
        device: Where its tensors are wanted; the CPU by default.

    Raises:
        TrainingError: It is missing, damaged, or of another configuration.
    """
    try:
        _check_sums(path)
        raw: dict[str, Any] = torch.load(path, map_location=device or "cpu", weights_only=True)
        found, version = raw["configuration"], raw["schema_version"]
    except FileNotFoundError as error:
        raise TrainingError(f"{path}: no such file; run `train` first") from error
    except PermissionError as error:
        raise TrainingError(f"{path}: cannot read ({error.strerror})") from error
    except Exception as error:  # torch raises a dozen types on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(
            f"{path}: damaged or not a checkpoint ({reason}); {_WAY_OUT}"
        ) from error
    if version != SCHEMA_VERSION:
        raise TrainingError(
            f"{path}: checkpoint schema {version!r}, this code reads {SCHEMA_VERSION}; begin anew "
            "with --restart, or go on with the version that wrote it"
        )
    if found != strict_json.dumps(configuration):
        raise TrainingError(
            f"{path}: of other plans than {configuration.name} has now; begin anew with --restart"
        )
    return raw


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """The sha256 over all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_sums(path: Path) -> None:
    """Hold each record against its checksum, which torch writes and does not look at.

    Raises:
        ValueError: One does not fit.
    """
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {damaged} does not fit")
