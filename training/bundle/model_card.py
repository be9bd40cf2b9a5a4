"""``MODEL_CARD.md`` beside a bundle: what it is, what it was seen to do, what it is not for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ichseg.errors import IchsegError
from ichseg.files import replacing
from ichseg.model.bundle import Model
from ichseg.model.rules import ComponentRule
from ichseg.wording import counted
from training.crossval import rules, selection
from training.crossval.selection import Selection
from training.data.workspace import evaluation_folder
from training.scoring import summary
from training.scoring.measures import TITLES
from training.scoring.summary import Evaluation, LabelSummary

FILE = "MODEL_CARD.md"
_NOT_MEASURED = "Not measured: `cross-validate` this workspace first."
_OTHER_WEIGHTS = (
    "Not measured: the cross-validation scores the latest checkpoint of each fold, and this bundle "
    "holds the best."
)


def write(model: Model, workspace: Path, out: Path) -> None:
    """Fill the card from the bundle and from what the workspace holds of its evaluation.

    Args:
        model: What the bundle describes.
        workspace: That it was trained in.
        out: The bundle's folder.

    Raises:
        OutputError: The folder cannot be written.
    """
    evaluations: dict[str, Evaluation | None] = dict.fromkeys(model.averaged)
    selected = None
    if _is_validated(model):
        evaluations = {name: _evaluation(workspace, name) for name in model.averaged}
        selected = _selection(workspace, model)
    sections = [
        f"# {model.name}, version {model.version}",
        model.description,
        "**For research. Not for diagnosis, triage, measurement or any clinical use**, unless its "
        "user has shown that it is fit for that.",
        _facts(model),
        "## What it scores",
        *_scores(evaluations, selected, _NOT_MEASURED if _is_validated(model) else _OTHER_WEIGHTS),
        "## Post-processing",
        _rules(model.rules, model.plans.labels, selected),
        "## What is not known",
        "Every figure above is of cases from the dataset that it was trained on. How it does on "
        "other scanners, patients and findings has to be measured there.",
    ]
    with replacing(out / FILE) as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _facts(model: Model) -> str:
    """The table at the top."""
    provenance, planned = model.provenance, model.plans
    rows = [
        ("labels", ", ".join(f"{i} {name}" for i, name in enumerate(planned.labels))),
        ("input", f"{', '.join(planned.channels)}"),
        ("decides", "the mean of " + " and ".join(model.averaged)),
    ]
    for name in model.in_order:
        configuration = planned.configuration(name)
        folds = ", ".join(member.fold for member in model.members_of(name))
        rows.append(
            (
                name,
                f"folds {folds}; {_times(configuration.tile)} voxels at "
                f"{_times(configuration.spacing_mm)} mm, "
                f"{configuration.architecture.features[0]} to "
                f"{max(configuration.architecture.features)} features"
                + (
                    f", after {configuration.previous_stage}"
                    if configuration.previous_stage
                    else ""
                ),
            )
        )
    rows += [
        ("trained on", f"{provenance['dataset']}, {provenance['cases']} cases"),
        ("training", _training(provenance)),
        ("storage", f"fp16; {_rounding(provenance)}"),
        ("made", f"{provenance['date']} with torch {provenance['torch']}"),
    ]
    return _table(("", ""), rows)


def _training(provenance: dict[str, Any] | Any) -> str:
    folds = provenance["folds"].values()
    epochs = sorted({str(fold["epochs"]) for fold in folds}, key=int)
    minutes = sum(fold["minutes"] for fold in folds)
    return (
        f"recipe {provenance['recipe']}, {' or '.join(epochs)} epochs, {minutes:.0f} minutes in "
        f"all, {provenance['checkpoint']} checkpoint"
    )


def _is_validated(model: Model) -> bool:
    """Whether the cross-validation has scored the weights of the bundle."""
    return bool(model.provenance["checkpoint"] == "latest")


def _rounding(provenance: dict[str, Any] | Any) -> str:
    """On how many cases the stored weights were held against those that were trained."""
    checked = sorted({fold["checked_cases"] for fold in provenance["folds"].values()})
    if checked[-1] == 0:
        return "not checked against the weights as trained"
    cases = counted(checked[-1], "validation case")
    cases = cases if len(checked) == 1 else f"{checked[0]} to {cases}"
    return f"checked on {cases} of each fold to change no mean Dice by over 0.001"


def _scores(
    evaluations: dict[str, Evaluation | None], selected: Selection | None, otherwise: str
) -> list[str]:
    blocks = []
    if selected is not None:
        blocks.append(
            f"Mean foreground Dice of {selected.cases} cross-validated cases, each by networks "
            f"that had not seen it, with the rules below: **{selected.mean_dice:.3f}**."
        )
    for name, evaluation in evaluations.items():
        blocks.append(f"### {name}, one network, without rules")
        if evaluation is None:
            blocks.append(otherwise)
            continue
        for found in evaluation.summaries:
            blocks += [_measures(found), _lesions(found), _volumes(found)]
    return blocks


def _measures(found: LabelSummary) -> str:
    rows = [
        (
            TITLES[m.measure],
            _number(m.mean),
            "" if m.low is None else f"{_number(m.low)} to {_number(m.high)}",
            _number(m.median),
            f"{m.finite} of {found.cases}",
        )
        for m in found.measures
    ]
    return _table((found.label, "mean", "95 % interval", "median", "defined"), rows)


def _lesions(found: LabelSummary) -> str:
    rows = [
        (c.size, str(c.reference), _number(c.sensitivity), str(c.false_positives), _number(c.f1))
        for c in found.lesions
    ]
    return _table(("lesions", "in references", "sensitivity", "false positives", "F1"), rows)


def _volumes(found: LabelSummary) -> str:
    agreement, missed = found.volumes, len(found.missed)
    return (
        f"Volume, found less reference: bias {_number(agreement.bias_ml)} mL, 95 % limits "
        f"{_number(agreement.low_ml)} to {_number(agreement.high_ml)} mL. Missed completely: "
        f"{missed} of {found.cases - found.empty_references} cases."
    )


def _rules(
    adopted: tuple[ComponentRule, ...], labels: tuple[str, ...], selected: Selection | None
) -> str:
    if not adopted:
        return "None." + ("" if selected is None else " No rule that was tried gained anything.")
    lines = [f"- {labels[rule.label]}: {rules.words(rule)}" for rule in adopted]
    return "\n".join(lines)


def _evaluation(workspace: Path, name: str) -> Evaluation | None:
    try:
        return summary.load(evaluation_folder(workspace, name))
    except IchsegError:
        return None


def _selection(workspace: Path, model: Model) -> Selection | None:
    """If it is of this ensemble."""
    try:
        selected = selection.load(workspace)
    except IchsegError:
        return None
    same = (selected.configurations, selected.rules) == (model.averaged, model.rules)
    return selected if same else None


def _table(header: tuple[str, ...], rows: list[Any]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _times(values: tuple[float, ...]) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
