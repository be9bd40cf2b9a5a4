"""The scores of all cases together: what the tables say, and the files that keep them.

``evaluation.json`` holds every case and the summary and is read back; ``cases.csv`` holds a line
for each case and label, for a spreadsheet.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ichseg.errors import TrainingError
from ichseg.files import replacing
from ichseg.model import strict_json
from ichseg.wording import repeated
from training.scoring.lesions import LesionCounts, count_lesions
from training.scoring.measures import MEASURES
from training.scoring.scores import CaseScore, LabelScore, absent
from training.scoring.statistics import VolumeAgreement, bootstrap_mean, volume_agreement

SCHEMA_VERSION = 1
EVALUATION_FILE, CASES_FILE = "evaluation.json", "cases.csv"
_VOLUMES = ("reference_ml", "predicted_ml", "overlap_ml")
_LESIONS = ("reference_lesions", "found_lesions", "predicted_lesions", "false_lesions")


@dataclass(frozen=True, slots=True)
class MeasureSummary:
    """One measure over all cases in which it is finite; a figure is None where too few are.

    Attributes:
        measure: One of ``training.scoring.measures.MEASURES``.
        finite: In how many cases the measure is finite.
        infinite: In how many cases it is infinite; in all others it is not defined.
        mean: The mean of the finite values.
        low: The lower end of the mean's bootstrap 95 % interval.
        high: The upper end of that interval.
        minimum: The smallest finite value.
        lower_quartile: A quarter of the finite values lies below this.
        median: Half of the finite values lies below this.
        upper_quartile: Three quarters of the finite values lie below this.
        maximum: The largest finite value.
    """

    measure: str
    finite: int
    infinite: int
    mean: float | None
    low: float | None
    high: float | None
    minimum: float | None
    lower_quartile: float | None
    median: float | None
    upper_quartile: float | None
    maximum: float | None


@dataclass(frozen=True, slots=True)
class LabelSummary:
    """One label over all cases.

    Attributes:
        label: The label's name.
        cases: How many cases there are.
        empty_references: How many references do not have the label.
        empty_predictions: How many predictions do not have the label.
        both_empty: In how many cases neither has it; they count in the two others too.
        missed: The names of the cases whose reference has the label and whose prediction shares no
            voxel with it.
        measures: One summary for each of ``training.scoring.measures.MEASURES``.
        lesions: The counts of lesions by size, and last of all sizes.
        volumes: How found volumes agree with those of the references.
    """

    label: str
    cases: int
    empty_references: int
    empty_predictions: int
    both_empty: int
    missed: tuple[str, ...]
    measures: tuple[MeasureSummary, ...]
    lesions: tuple[LesionCounts, ...]
    volumes: VolumeAgreement


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The scores of a set of cases, and their summary; the layout of ``evaluation.json``.

    Attributes:
        schema_version: The version of this layout.
        empty: The policy for empty masks that the cases were scored with.
        labels: The names of the foreground labels.
        summaries: One summary for each label.
        cases: The cases, sorted by name, each with the scores of all labels.
        ignore_label: The value of the references' voxels that were left out; None if none were.
        made_from: A digest of the networks that found the masks; empty where that is not known.
    """

    schema_version: int
    empty: str
    labels: tuple[str, ...]
    summaries: tuple[LabelSummary, ...]
    cases: tuple[CaseScore, ...]
    ignore_label: int | None = strict_json.optional(None)
    made_from: str = strict_json.optional("")

    def __post_init__(self) -> None:
        strict_json.check_schema("evaluation", self.schema_version, SCHEMA_VERSION)


def make_evaluation(
    cases: Iterable[CaseScore],
    labels: Sequence[str] | None,
    empty: str,
    ignore_label: int | None = None,
) -> Evaluation:
    """Put cases together and summarise them.

    Args:
        cases: The scored cases in any order, each name once.
        labels: The names of the labels; None for those that occur, which are then numbers.
        empty: The policy for empty masks that the cases were scored with.
        ignore_label: The value of the references' voxels that were left out; None if none were.

    Raises:
        TrainingError: A case is given twice, or no case is given.
    """
    ordered = sorted(cases, key=lambda case: case.name)
    twice = repeated(case.name for case in ordered)
    if twice or not ordered:
        raise TrainingError(f"cases scored twice: {', '.join(twice)}" if twice else "no cases")
    if labels is None:
        labels = sorted({s.label for case in ordered for s in case.labels}, key=int) or ["1"]
    complete = tuple(
        dataclasses.replace(case, labels=tuple(_find(case, label, empty) for label in labels))
        for case in ordered
    )
    summaries = tuple(
        summarise(label, [(case.name, case.labels[i]) for case in complete])
        for i, label in enumerate(labels)
    )
    return Evaluation(SCHEMA_VERSION, empty, tuple(labels), summaries, complete, ignore_label)


def summarise(label: str, scored: Sequence[tuple[str, LabelScore]]) -> LabelSummary:
    """Summarise one label from the name and the score of each case."""
    scores = [score for _, score in scored]
    bare = [(s.reference_ml == 0, s.predicted_ml == 0) for s in scores]
    return LabelSummary(
        label=label,
        cases=len(scores),
        empty_references=sum(reference for reference, _ in bare),
        empty_predictions=sum(prediction for _, prediction in bare),
        both_empty=sum(reference and prediction for reference, prediction in bare),
        missed=tuple(name for name, score in scored if score.missed),
        measures=tuple(_summarise_measure(m, [getattr(s.scores, m) for s in scores])
                       for m in MEASURES),
        lesions=count_lesions((s.reference_lesions, s.predicted_lesions) for s in scores),
        volumes=volume_agreement(
            [s.predicted_ml for s in scores], [s.reference_ml for s in scores]
        ),
    )  # fmt: skip


def save(evaluation: Evaluation, folder: Path) -> None:
    """Write ``cases.csv`` and last, as whoever finds it takes all for done, ``evaluation.json``.

    Raises:
        OutputError: The folder cannot be written.
    """
    with (
        replacing(folder / CASES_FILE) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as stream,
    ):
        table = csv.writer(stream)
        table.writerow(["case", "label", *MEASURES, *_VOLUMES, *_LESIONS, "missed"])
        for case in evaluation.cases:
            table.writerows(_row(case.name, score) for score in case.labels)
    with replacing(folder / EVALUATION_FILE) as temporary:
        temporary.write_text(
            strict_json.dumps(strict(strict_json.to_json(evaluation))), encoding="utf-8"
        )


def load(folder: Path) -> Evaluation:
    """Read ``evaluation.json`` of a folder; infinite measures come back as None.

    Raises:
        TrainingError: The folder has no such file.
        PlansError: The file does not have the schema that this code reads.
    """
    path = folder / EVALUATION_FILE
    if not path.is_file():
        raise TrainingError(f"{path}: no such file; make it with `evaluate ... --out {folder}`")
    return strict_json.load(Evaluation, path)


def strict(value: Any) -> Any:
    """Values of JSON with null in the place of NaN and infinity."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _find(case: CaseScore, label: str, empty: str) -> LabelScore:
    found = next((score for score in case.labels if score.label == label), None)
    return absent(label, empty) if found is None else found


def _summarise_measure(measure: str, values: Sequence[float | None]) -> MeasureSummary:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    mean = bootstrap_mean(finite)
    quartiles = np.percentile(finite, [0, 25, 50, 75, 100]).tolist() if finite else [None] * 5
    infinite = sum(value is not None and math.isinf(value) for value in values)
    return MeasureSummary(
        measure, len(finite), infinite, mean.mean, mean.low, mean.high, *quartiles
    )


def _row(case: str, score: LabelScore) -> list[str | int]:
    measures = (getattr(score.scores, measure) for measure in MEASURES)
    return [
        case,
        score.label,
        *("" if value is None else f"{value:.10g}" for value in measures),
        *(f"{getattr(score, name):.10g}" for name in _VOLUMES),
        len(score.reference_lesions),
        score.hits,
        len(score.predicted_lesions),
        score.false_lesions,
        int(score.missed),
    ]
