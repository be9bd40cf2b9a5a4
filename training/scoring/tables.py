"""An evaluation as text for the terminal: a table for each label, and the worst cases."""

from __future__ import annotations

from collections.abc import Sequence

from ichseg.wording import counted
from training.scoring.measures import TITLES
from training.scoring.scores import LabelScore
from training.scoring.summary import Evaluation, MeasureSummary

_WORST = 5  # cases that the terminal lists


def describe(evaluation: Evaluation) -> str:
    """What the terminal shows of an evaluation."""
    blocks = [_describe_label(evaluation, i) for i in range(len(evaluation.labels))]
    return "\n\n".join(blocks) + "\n"


def _describe_label(evaluation: Evaluation, index: int) -> str:
    found = evaluation.summaries[index]
    scored = [(case.name, case.labels[index]) for case in evaluation.cases]
    present = found.cases - found.empty_references
    if found.both_empty == found.cases:
        return (
            f"label {found.label}: in none of the {counted(found.cases, 'reference')} and nowhere "
            f"found, which scores as --empty {evaluation.empty} has it. "
            "Is it the label that was meant?"
        )
    lines = [
        f"label {found.label}: {found.cases} cases, {present} with it; empty masks: "
        f"references {found.empty_references}, predictions {found.empty_predictions}, "
        f"both {found.both_empty} (--empty {evaluation.empty})",
        "",
        f"{'':14}  {'mean':>8}  {'95 % interval':>18}  {'median':>8}  {'min':>8}  {'max':>8}  "
        f"finite",
        *(_describe_measure(measure, found.cases) for measure in found.measures),
        "",
        f"missed completely: {len(found.missed)} of {present}"
        + (f": {', '.join(found.missed)}" if found.missed else ""),
        "",
        f"{'lesions':10}  {'reference':>9}  {'found':>6}  {'sensitivity':>11}  "
        f"{'false positives':>15}  {'F1':>6}",
    ]
    lines += [
        f"{c.size:10}  {c.reference:9}  {c.found:6}  {_cell(c.sensitivity, 3):>11}  "
        f"{c.false_positives:15}  {_cell(c.f1, 3):>6}"
        for c in found.lesions
    ]
    volumes = found.volumes
    lines += [
        "",
        f"volume, found less reference: bias {_cell(volumes.bias_ml, 2)} mL, 95 % limits "
        f"{_cell(volumes.low_ml, 2)} to {_cell(volumes.high_ml, 2)} mL, "
        f"ICC(2,1) {_cell(volumes.correlation, 3)}",
    ]
    return "\n".join(lines + _describe_worst(scored))


def _describe_measure(found: MeasureSummary, cases: int) -> str:
    places = 2 if found.measure.endswith("_mm") else 4
    mean, low, high, median, least, most = (
        _cell(value, places)
        for value in (found.mean, found.low, found.high, found.median, found.minimum, found.maximum)
    )
    interval = "-" if found.low is None else f"{low} to {high}"
    note = f", {found.infinite} infinite and not in the mean" if found.infinite else ""
    return (
        f"{TITLES[found.measure]:14}  {mean:>8}  {interval:>18}  {median:>8}  {least:>8}  "
        f"{most:>8}  {found.finite} of {cases}{note}"
    )


def _describe_worst(scored: Sequence[tuple[str, LabelScore]]) -> list[str]:
    known = [(name, s) for name, s in scored if s.scores.dice is not None]
    worst = sorted(known, key=lambda item: (item[1].scores.dice or 0.0, item[0]))[:_WORST]
    width = max([len(name) for name, _ in worst], default=0)
    return ["", "lowest Dice"] + [
        f"  {name:{width}}  {_cell(score.scores.dice, 4)}  reference {score.reference_ml:.2f} mL, "
        f"found {score.predicted_ml:.2f} mL"
        for name, score in worst
    ]


def _cell(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"
