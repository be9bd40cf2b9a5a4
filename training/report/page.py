"""What the page of an evaluation says: the summary, charts, and the cases from the worst on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ichseg.report import page, report
from ichseg.report.case_list import Card, Column, Row, Shown, number
from ichseg.report.html import Html, join, tag
from ichseg.report.page import Section
from training.crossval import rules
from training.crossval.selection import Selection
from training.fit.history import EpochRow
from training.report import charts
from training.report.charts import Point
from training.scoring.lesions import ALL_SIZES
from training.scoring.measures import MEASURES, TITLES
from training.scoring.scores import CaseScore, LabelScore
from training.scoring.summary import Evaluation, LabelSummary, MeasureSummary

_SHARES = ("dice", "surface_dice")


@dataclass(frozen=True, slots=True)
class Context:
    """What there is to say beside the scores.

    Attributes:
        title, subtitle: Of the page.
        curves: Epochs of each fold.
        folds: By which fold each case was held out.
        selection: What was compared, and what chosen.
    """

    title: str
    subtitle: str
    curves: Mapping[str, Sequence[EpochRow]] = field(default_factory=dict)
    folds: Mapping[str, str] = field(default_factory=dict)
    selection: Selection | None = None


def write(out: Path, evaluation: Evaluation, context: Context) -> Path:
    """Write the page of cases that ``report.write_case`` has been called for.

    Raises:
        OutputError: The folder cannot be written.
    """
    shown = {case.name: report.read_case(out, case.name) for case in evaluation.cases}
    ranked = sorted(evaluation.cases, key=lambda case: (_worst(case), case.name))
    several = len(evaluation.labels) > 1
    sections = [
        Section(
            "summary",
            "Summary",
            join(_summary(found, shown, several=several) for found in evaluation.summaries),
        )
    ]
    if context.selection is not None:
        sections.append(Section("selection", "Selection", _selection(context.selection)))
    sections.append(
        Section(
            "charts",
            "Scores and volumes",
            join(_charts(evaluation, i, shown) for i in range(len(evaluation.labels))),
        )
    )
    if context.curves:
        figures = [charts.curves(rows, f"Fold {fold}") for fold, rows in context.curves.items()]
        body = join([charts.curve_legend(), tag("div", *figures, class_="charts")])
        sections.append(Section("training", "Training", body))
    return page.write(
        out,
        title=context.title,
        subtitle=context.subtitle,
        sections=sections,
        columns=_columns(evaluation, context),
        rows=_rows(ranked, context, several=several),
        cards=[_card(case, shown[case.name], context, several=several) for case in ranked],
        order="The worst first, by Dice.",
        labels=evaluation.labels if several else (),
    )


def _worst(case: CaseScore) -> float:
    """The lowest Dice of a case's labels; what is not defined is not bad."""
    known = [s.scores.dice for s in case.labels if s.scores.dice is not None]
    return min(known, default=math.inf)


def _summary(found: LabelSummary, shown: Mapping[str, Shown | None], *, several: bool) -> Html:
    """Means with their intervals, misses, lesions and volumes of one label."""
    present = found.cases - found.empty_references
    every = next(lesions for lesions in found.lesions if lesions.size == ALL_SIZES)
    low, high = charts.wilson(every.found, every.reference)
    volumes = found.volumes
    miss_low, miss_high = charts.wilson(len(found.missed), present)
    measures = {m.measure: _measure_tile(m, found.cases) for m in found.measures}
    tiles = [
        measures.pop("dice"),
        page.tile(
            "Missed completely",
            f"{len(found.missed)} of {present}",
            f"95 % interval {100 * miss_low:.0f} to {100 * miss_high:.0f} %" if present else "",
        ),
        page.tile(
            "Lesions found",
            "–" if every.sensitivity is None else f"{100 * every.sensitivity:.0f} %",  # noqa: RUF001
            f"{every.found} of {every.reference}, {100 * low:.0f} to {100 * high:.0f} %",
            more=charts.interval_bar(every.sensitivity, low, high),
        ),
        page.tile(
            "False lesions",
            str(every.false_positives),
            f"{every.false_positives / max(1, found.cases):.2f} a case; F1 {number(every.f1, 3)}",
        ),
        page.tile(
            "Volume, bias",
            f"{number(volumes.bias_ml, 2)} mL",
            f"95 % limits {number(volumes.low_ml, 1)} to {number(volumes.high_ml, 1)} mL; "
            f"ICC {number(volumes.correlation, 3)}",
        ),
        *measures.values(),
    ]
    missed = [
        tag("button", name, type="button", data_slug=case.slug, data_open=True)
        if (case := shown.get(name)) is not None
        else tag("span", f"{name} ")
        for name in found.missed
    ]
    return join(
        [
            tag("h3", found.label) if several else None,
            page.tiles(*tiles),
            tag("p", "Missed completely: ", *missed, class_="alert links") if missed else None,
            tag(
                "p",
                f"{found.cases} cases, {present} with the label by their reference, "
                f"{found.empty_predictions} with nothing found. Intervals of means are bootstrap "
                "95 % intervals over cases, those of shares Wilson’s.",  # noqa: RUF001
                class_="hint",
            ),
        ]
    )


def _measure_tile(found: MeasureSummary, cases: int) -> Html:
    places = _places(found.measure)
    notes = []
    if found.low is not None:
        notes.append(f"95 %: {number(found.low, places)} to {number(found.high, places)}")
    notes.append(f"median {number(found.median, places)}")
    if found.finite < cases:
        notes.append(f"{found.finite} of {cases} finite")
    share = found.measure in _SHARES
    return page.tile(
        f"Mean {TITLES[found.measure]}",
        number(found.mean, places),
        "; ".join(notes),
        more=charts.interval_bar(found.mean, found.low, found.high) if share else None,
    )


def _selection(found: Selection) -> Html:
    """What was compared, and the rules tried."""
    candidates = [
        [
            " + ".join(candidate.configurations),
            number(candidate.mean_dice, 4),
            *(number(dice, 4) for dice in candidate.dice),
            "chosen" if candidate.configurations == found.configurations else "",
        ]
        for candidate in found.candidates
    ]
    tried = [
        [
            found.labels[trial.rule.label - 1],
            rules.words(trial.rule),
            number(trial.dice, 4),
            str(trial.better),
            str(trial.worse),
            trial.reason,
        ]
        for trial in found.trials
    ]
    return join(
        [
            page.plain_table(
                ["Configurations", "Mean Dice", *(f"Dice of {n}" for n in found.labels), ""],
                candidates,
            ),
            tag(
                "details",
                tag(
                    "summary", f"Rules about components: {len(found.rules)} of {len(tried)} adopted"
                ),
                page.plain_table(["Label", "Rule", "Dice", "Better", "Worse", "Why"], tried),
            ),
        ]
    )


def _charts(evaluation: Evaluation, index: int, shown: Mapping[str, Shown | None]) -> Html:
    """Of one label."""
    found = evaluation.summaries[index]
    scored = [(case.name, case.labels[index]) for case in evaluation.cases]

    def point(name: str, score: LabelScore, x: float, y: float = 0.0) -> Point:
        case = shown.get(name)
        text = (
            f"{name}: Dice {number(score.scores.dice, 3)}, reference {score.reference_ml:.2f} mL, "
            f"found {score.predicted_ml:.2f} mL"
        )
        return Point(None if case is None else case.slug, text, x, y, bad=score.missed)

    strips = []
    for measure in found.measures:
        points = [
            point(name, score, value)
            for name, score in scored
            if (value := getattr(score.scores, measure.measure)) is not None
            and math.isfinite(value)
        ]
        strips.append(
            charts.strip(measure, points, TITLES[measure.measure], places=_places(measure.measure))
        )
    agreement = [
        point(name, s, (s.predicted_ml + s.reference_ml) / 2, s.predicted_ml - s.reference_ml)
        for name, s in scored
    ]
    by_volume = [
        point(name, s, s.reference_ml, s.scores.dice)
        for name, s in scored
        if s.reference_ml > 0 and s.scores.dice is not None
    ]
    figures = [
        charts.bland_altman(agreement, found.volumes),
        charts.dice_by_volume(by_volume),
        charts.sensitivity(found.lesions),
    ]
    return join(
        [
            tag("h3", found.label) if len(evaluation.labels) > 1 else None,
            tag("div", *figures, class_="charts"),
            tag("div", *strips, class_="charts"),
            tag(
                "p",
                "Each dot is a case and opens it; misses are red. Boxes reach from the lower to "
                "the upper quartile, whiskers to the extremes; below them the mean with its 95 % "
                "interval.",
                class_="hint",
            ),
        ]
    )


def _columns(evaluation: Evaluation, context: Context) -> list[Column]:
    label = [Column("label", "Label")] if len(evaluation.labels) > 1 else []
    fold = [Column("fold", "Fold", 0, "that had not seen the case")] if context.folds else []
    return [
        *label,
        *(Column(m, TITLES[m].split(" at ")[0], _places(m), TITLES[m]) for m in MEASURES),
        Column("reference_ml", "Ref., mL", 2, "volume by the reference"),
        Column("predicted_ml", "Found, mL", 2, "volume found"),
        Column("lesions", "Lesions", 0, "of the reference"),
        Column("found", "Hit", 0, "lesions of the reference that were found"),
        Column("false", "False", 0, "lesions found that are none"),
        *fold,
    ]


def _rows(cases: Sequence[CaseScore], context: Context, *, several: bool) -> list[Row]:
    """One for each label of each case."""
    scored = [(case.name, score) for case in cases for score in case.labels]
    scored.sort(key=lambda item: math.inf if item[1].scores.dice is None else item[1].scores.dice)
    return [_row(name, score, context, several=several) for name, score in scored]


def _row(name: str, score: LabelScore, context: Context, *, several: bool) -> Row:
    return Row(
        name,
        {
            "label": score.label if several else None,
            **{measure: getattr(score.scores, measure) for measure in MEASURES},
            "reference_ml": score.reference_ml,
            "predicted_ml": score.predicted_ml,
            "lesions": len(score.reference_lesions),
            "found": _found(score),
            "false": _false(score),
            "fold": float(context.folds[name]) if name in context.folds else None,
        },
        _flags(score),
    )


def _card(case: CaseScore, shown: Shown | None, context: Context, *, several: bool) -> Card:
    figures = []
    for score in case.labels:
        name = f"{score.label}: " if several else ""
        figures += [
            (f"{name}Dice", number(score.scores.dice, 3)),
            (f"{name}Reference", f"{number(score.reference_ml, 2)} mL"),
            (f"{name}Found", f"{number(score.predicted_ml, 2)} mL"),
        ]
        if not several:
            figures += [
                (TITLES[measure], number(getattr(score.scores, measure), _places(measure)))
                for measure in MEASURES[1:]
            ]
            figures.append(("Lesions found", f"{_found(score)} of {len(score.reference_lesions)}"))
            figures.append(("False", str(_false(score))))
    if case.name in context.folds:
        figures.append(("Fold", context.folds[case.name]))
    flags = tuple(sorted({flag for score in case.labels for flag in _flags(score)}))
    return Card(case.name, shown, figures, flags=flags)


def _flags(score: LabelScore) -> tuple[str, ...]:
    flags = {
        "missed": score.missed,
        "false lesions": _false(score) > 0,
        "no reference": score.reference_ml == 0,
    }
    return tuple(flag for flag, is_so in flags.items() if is_so)


def _found(score: LabelScore) -> int:
    return sum(lesion.overlap_ml > 0 for lesion in score.reference_lesions)


def _false(score: LabelScore) -> int:
    return sum(lesion.overlap_ml == 0 for lesion in score.predicted_lesions)


def _places(measure: str) -> int:
    return 1 if measure.endswith("_mm") else 3
