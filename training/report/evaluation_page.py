"""What the page of an evaluation says: the summary, charts, and the cases from the worst on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup

from ichseg.report import page
from ichseg.report.case_files import Shown, read_case
from ichseg.report.page import Card, CaseList, Column, Row, number
from training.crossval import rules
from training.crossval.selection import Selection
from training.fit.history import EpochRow
from training.report import charts
from training.report.charts import Point
from training.scoring.lesions import ALL_SIZES, LesionCounts
from training.scoring.measures import MEASURES, TITLES
from training.scoring.scores import CaseScore, LabelScore
from training.scoring.statistics import wilson
from training.scoring.summary import Evaluation, LabelSummary, MeasureSummary

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class Context:
    """What there is to say beside the scores.

    Attributes:
        title: The heading of the page.
        subtitle: One line below it.
        curves: The epochs of each fold, by the fold's name.
        folds: The fold that each case was held out by, by the case's name.
        selection: What was compared and what was chosen; None where nothing was.
    """

    title: str
    subtitle: str
    curves: Mapping[str, Sequence[EpochRow]] = field(default_factory=dict)
    folds: Mapping[str, str] = field(default_factory=dict)
    selection: Selection | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """One case with its score of one label.

    Attributes:
        name: The case's name.
        shown: What is known of its pictures, or None if it has none.
        score: The label's score.
    """

    name: str
    shown: Shown | None
    score: LabelScore

    def point(self, x: float, y: float = 0.0) -> Point:
        """The case as a dot of a chart."""
        text = (
            f"{self.name}: Dice {number(self.score.scores.dice, 3)}, "
            f"reference {self.score.reference_ml:.2f} mL, found {self.score.predicted_ml:.2f} mL"
        )
        slug = None if self.shown is None else self.shown.slug
        return Point(slug, text, x, y, bad=self.score.missed)


@dataclass(frozen=True, slots=True)
class LabelPart:
    """What the page shows of one label.

    Attributes:
        found: The label's scores over all cases.
        present: How many references have the label.
        lesions: The counts of its lesions of all sizes.
        missed_95: The 95 % interval of the share of cases that were missed completely.
        found_95: The 95 % interval of the share of lesions that were found.
        charts: Volumes and lesions, as SVG.
        strips: Each measure over the cases, as SVG.
    """

    found: LabelSummary
    present: int
    lesions: LesionCounts
    missed_95: tuple[float, float]
    found_95: tuple[float, float]
    charts: Sequence[Markup]
    strips: Sequence[Markup]


def write(out: Path, evaluation: Evaluation, context: Context) -> Path:
    """Write the page of cases that ``write_case`` has been called for.

    Args:
        out: The folder of the page.
        evaluation: The scores.
        context: What else there is to say.

    Returns:
        The path of the page.

    Raises:
        OutputError: The folder cannot be written.
    """
    shown = {case.name: read_case(out, case.name) for case in evaluation.cases}
    several = len(evaluation.labels) > 1
    return page.write(
        out,
        _environment().get_template("evaluation.html"),
        title=context.title,
        subtitle=context.subtitle,
        cases=_case_list(evaluation, context, shown),
        several=several,
        measures=MEASURES,
        parts=[_label_part(evaluation, i, shown) for i in range(len(evaluation.labels))],
        selection=context.selection,
        curves=[charts.curves(rows, f"Fold {fold}") for fold, rows in context.curves.items()],
        folds=context.folds,
    )


def _environment() -> jinja2.Environment:
    found = page.environment(_TEMPLATES)
    found.filters |= {
        "note": _note,
        "percent": _percent,
        "places": _places,
        "rule_in_words": rules.words,
        "title_of": TITLES.__getitem__,
    }
    found.tests["share"] = charts.SHARES.__contains__
    return found


def _case_list(
    evaluation: Evaluation, context: Context, shown: Mapping[str, Shown | None]
) -> CaseList:
    several = len(evaluation.labels) > 1
    ranked = sorted(evaluation.cases, key=lambda case: (_worst(case), case.name))
    scored = [(case.name, score) for case in ranked for score in case.labels]
    scored.sort(key=lambda item: _dice_or_more(item[1]))
    return CaseList(
        columns=_columns(several=several, folds=bool(context.folds)),
        rows=[_row(name, score, context.folds.get(name)) for name, score in scored],
        cards=[Card(case.name, shown[case.name], case, _case_flags(case)) for case in ranked],
        order="The worst first, by Dice.",
        labels=evaluation.labels if several else (),
    )


def _worst(case: CaseScore) -> float:
    """The lowest Dice of a case's labels."""
    return min(_dice_or_more(score) for score in case.labels)


def _dice_or_more(score: LabelScore) -> float:
    """The Dice, or more than any where it is not defined, which is not bad."""
    return math.inf if score.scores.dice is None else score.scores.dice


def _columns(*, several: bool, folds: bool) -> list[Column]:
    label = [Column("label", "Label")] if several else []
    fold = [Column("fold", "Fold", 0, "that had not seen the case")] if folds else []
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


def _row(name: str, score: LabelScore, fold: str | None) -> Row:
    values = {
        "label": score.label,
        **{measure: getattr(score.scores, measure) for measure in MEASURES},
        "reference_ml": score.reference_ml,
        "predicted_ml": score.predicted_ml,
        "lesions": len(score.reference_lesions),
        "found": score.hits,
        "false": score.false_lesions,
        "fold": None if fold is None else float(fold),
    }
    return Row(name, values, _flags(score))


def _flags(score: LabelScore) -> tuple[str, ...]:
    flags = {
        "missed": score.missed,
        "false lesions": score.false_lesions > 0,
        "no reference": score.reference_ml == 0,
    }
    return tuple(flag for flag, is_so in flags.items() if is_so)


def _case_flags(case: CaseScore) -> tuple[str, ...]:
    return tuple(sorted({flag for score in case.labels for flag in _flags(score)}))


def _label_part(evaluation: Evaluation, index: int, shown: Mapping[str, Shown | None]) -> LabelPart:
    found = evaluation.summaries[index]
    present = found.cases - found.empty_references
    lesions = next(counts for counts in found.lesions if counts.size == ALL_SIZES)
    scored = [Scored(case.name, shown[case.name], case.labels[index]) for case in evaluation.cases]
    return LabelPart(
        found=found,
        present=present,
        lesions=lesions,
        missed_95=wilson(len(found.missed), present),
        found_95=wilson(lesions.found, lesions.reference),
        charts=[
            charts.bland_altman(_agreement(scored), found.volumes),
            charts.dice_by_volume(_dice_by_volume(scored)),
            charts.sensitivity(found.lesions),
        ],
        strips=[_strip(measure, scored) for measure in found.measures],
    )


def _agreement(scored: Sequence[Scored]) -> list[Point]:
    """Found less reference, in mL, against the mean of both."""
    return [
        case.point((case.score.predicted_ml + case.score.reference_ml) / 2,
                   case.score.predicted_ml - case.score.reference_ml)
        for case in scored
    ]  # fmt: skip


def _dice_by_volume(scored: Sequence[Scored]) -> list[Point]:
    """The Dice of cases that have a reference, against its volume in mL."""
    return [
        case.point(case.score.reference_ml, dice)
        for case in scored
        if case.score.reference_ml > 0 and (dice := case.score.scores.dice) is not None
    ]


def _strip(measure: MeasureSummary, scored: Sequence[Scored]) -> Markup:
    name = measure.measure
    values = [(case, getattr(case.score.scores, name)) for case in scored]
    points = [case.point(v) for case, v in values if v is not None and math.isfinite(v)]
    return charts.strip(measure, points, TITLES[name], places=_places(name))


def _note(measure: MeasureSummary, cases: int) -> str:
    """What stands below the mean of a measure."""
    places = _places(measure.measure)
    notes = [f"median {number(measure.median, places)}"]
    if measure.low is not None:
        interval = f"{number(measure.low, places)} to {number(measure.high, places)}"
        notes.insert(0, f"95 %: {interval}")
    if measure.finite < cases:
        notes.append(f"{measure.finite} of {cases} finite")
    return "; ".join(notes)


def _percent(interval: tuple[float, float]) -> str:
    """An interval of shares in per cent."""
    low, high = interval
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def _places(measure: str) -> int:
    """How many decimals a measure is told with."""
    return 1 if measure.endswith("_mm") else 3
