"""Score a folder of predictions against a folder of references.

``metrics.json`` is made by evalutils, as challenges of Grand Challenge make theirs; no other module
imports it. Beside it stand ``evaluation.json`` and ``cases.csv``, see
``training.scoring.summary``, and where there are scans without a bleed ``detection.json``, see
``training.scoring.detection``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from evalutils.evalutils import ClassificationEvaluation
from evalutils.exceptions import FileLoaderError, ValidationError
from evalutils.io import FileLoader
from evalutils.validators import DataFrameValidator, ExpectedColumnNamesValidator

from ichseg.errors import DatasetError, IchsegError, TrainingError
from ichseg.files import replacing, stem_of
from training.data import parallel
from training.scoring import detection, summary, tables
from training.scoring.detection import Detection
from training.scoring.found import masks_below, masks_by_name
from training.scoring.measures import EMPTY_POLICIES, MEASURES
from training.scoring.scores import CaseScore, Pair, highest_label, score_pair
from training.scoring.summary import Evaluation, LabelSummary

if TYPE_CHECKING:
    from pandas import DataFrame, Series

METRICS_FILE = "metrics.json"
# The first four as INSTANCE 2022 names them.
KEYS = dict(
    zip(
        MEASURES,
        ("DiceCoefficient", "RelativeVolumeDifference", "SurfaceDice", "HausdorffDistance",
         "HausdorffDistance95"),
        strict=True,
    )
)  # fmt: skip
# Peak of one worker: two label volumes, their box, and neighbour codes; and the libraries.
_BYTES_PER_VOXEL, _BYTES_BESIDE = 24, 300_000_000


class _CaseLoader(FileLoader):
    """Takes each of these files for a case, by its name; reads none."""

    def __init__(self, masks: Sequence[Path] = ()) -> None:
        self._masks = frozenset(masks)

    def load(self, *, fname: Path) -> list[dict[str, object]]:
        if fname not in self._masks:
            raise FileLoaderError(f"{fname} is no mask")
        return [{"case": stem_of(fname), "path": fname}]


class _UniqueCasesValidator(DataFrameValidator):
    """Refuses a case that stands twice.

    evalutils' own validators go by the first number in a name, which need not tell cases apart, or
    refuse equal images, as two empty masks are.
    """

    def validate(self, *, df: DataFrame) -> None:
        again = df[df["case"].duplicated(keep=False)]
        if len(again):
            first, second = again[again["case"] == again["case"].iloc[0]]["path"].iloc[:2]
            raise ValidationError(f"{second}: the same case as {first}")


class _Evaluation(ClassificationEvaluation):
    """evalutils' evaluation with our pairing, scores and strict JSON.

    Args:
        predictions: The folder of label volumes to score.
        references: The folder of reference label volumes.
        output: The ``metrics.json`` to write.
        names: As for ``evaluate``.
        empty: As for ``evaluate``.
        ignore_label: As for ``evaluate``.
        held: As for ``evaluate``.
        workers: As for ``evaluate``.
    """

    def __init__(
        self,
        predictions: Path,
        references: Path,
        output: Path,
        names: tuple[str, ...] | None,
        empty: str,
        ignore_label: int | None,
        held: tuple[tuple[int, ...], ...],
        workers: int | None,
    ) -> None:
        super().__init__(
            ground_truth_path=references,
            predictions_path=predictions,
            file_sorter_key=str,
            file_loader=_CaseLoader(),
            validators=(ExpectedColumnNamesValidator(expected=("case", "path")),
                        _UniqueCasesValidator()),
            join_key="case",
            output_file=output,
        )  # fmt: skip
        self._names, self._held, self._empty = names, held, empty
        self._ignore_label, self._workers = ignore_label, workers
        self.evaluation: Evaluation | None = None

    def _load_cases(self, *, folder: Path) -> DataFrame:
        self._file_loader = _CaseLoader(masks_below(folder))
        return super()._load_cases(folder=folder)

    def _raise_missing_predictions_error(self, *, missing: Sequence[str] = ()) -> None:
        raise DatasetError(
            f"{self._predictions_path}: no prediction for {_some(missing)} "
            f"({len(missing)} of {len(self._ground_truth_cases)} cases)"
        )

    def _raise_extra_predictions_error(self, *, extra: Sequence[str] = ()) -> None:
        raise DatasetError(
            f"{self._predictions_path}: predictions without a reference in "
            f"{self._ground_truth_path}: {_some(extra)}"
        )

    def score(self) -> None:
        pairs = [
            Pair(case["case"], case["path_prediction"], case["path_ground_truth"])
            for _, case in self._cases.iterrows()
        ]
        scored = _score_pairs(
            pairs, self._names, self._empty, self._ignore_label, self._held, self._workers
        )
        self.evaluation = summary.make_evaluation(
            scored, self._names, self._empty, self._ignore_label
        )
        self._scored = {case.name: case for case in self.evaluation.cases}
        with np.errstate(invalid="ignore"):  # infinite measures have no deviation
            super().score()

    def score_case(self, *, idx: int, case: Series) -> dict[str, float | str]:
        return case_columns(self._scored[case["case"]])

    def save(self) -> None:
        assert self.evaluation is not None
        labels = {found.label: _count(found) for found in self.evaluation.summaries}
        counts = {"empty": self._empty, "labels": labels}
        write_metrics({**self._metrics, "counts": counts}, Path(self._output_file))


def evaluate(
    predictions: Path,
    references: Path,
    out: Path,
    *,
    names: tuple[str, ...] | None = None,
    empty: str = "instance",
    ignore_label: int | None = None,
    held: tuple[tuple[int, ...], ...] = (),
    made_from: str = "",
    workers: int | None = None,
) -> Evaluation:
    """Score every case of two folders.

    Writes ``metrics.json``, ``evaluation.json`` and ``cases.csv``. Cases are paired by file name
    without suffix; subfolders are searched too.

    Args:
        predictions: The folder of label volumes to score, one for each reference.
        references: The folder of reference label volumes.
        out: The folder for the three files; it is made if need be.
        names: The names of the labels 1, 2, ...; None to take those that occur.
        empty: The policy for empty masks, see ``training.scoring.measures``.
        ignore_label: The value of the references' voxels that are left out of all scores, the one
            above all labels; None if there are none.
        held: For each name the labels that it stands for: those of a region, which may overlap
            others. By default the names are of the labels 1, 2, ...
        made_from: A digest of the networks that found the masks, which is kept.
        workers: How many processes to use; None for as many as cores and memory allow.

    Raises:
        DatasetError: A case has no partner or stands twice, or its files differ in size or place.
        InputError: A file is not a volume of labels.
        TrainingError: The label to ignore is not the one above all labels.
        OutputError: The folder cannot be written.
    """
    logging.getLogger("evalutils").setLevel(logging.ERROR)  # warns of each file that is no volume
    above = range(2, 256) if names is None else [highest_label(names, held) + 1]
    if ignore_label is not None and ignore_label not in above:
        raise TrainingError(f"label {ignore_label} to ignore, expected the one above all labels")
    run = _Evaluation(
        predictions, references, out / METRICS_FILE, names, empty, ignore_label, held, workers
    )
    try:
        run.evaluate()
    except ValidationError as error:
        raise DatasetError(str(error)) from error
    assert run.evaluation is not None
    found = dataclasses.replace(run.evaluation, made_from=made_from)
    summary.save(found, out)
    return found


def case_columns(case: CaseScore) -> dict[str, float | str]:
    """The row of a case in ``metrics.json``; NaN where a measure is not defined.

    With several labels the plain keys hold the mean over those labels for which the measure is
    defined, and each label has keys of its own besides.
    """
    by_label = [
        {key: _number(getattr(score.scores, measure)) for measure, key in KEYS.items()}
        for score in case.labels
    ]
    row: dict[str, float | str] = {
        key: _mean([scores[key] for scores in by_label]) for key in KEYS.values()
    }
    if len(by_label) > 1:
        for score, values in zip(case.labels, by_label, strict=True):
            row |= {f"{key}_{score.label}": value for key, value in values.items()}
    return row | {"pred_fname": case.prediction, "gt_fname": case.reference}


def write_metrics(metrics: Mapping[str, Any], path: Path) -> None:
    """Write evalutils' metrics as strict JSON, with null for NaN and infinity.

    A column's aggregates stand in the order of the platform: short names first, then by alphabet.

    Raises:
        OutputError: The folder cannot be written.
    """
    aggregates = {
        column: dict(sorted(values.items(), key=lambda item: (len(item[0]), item[0])))
        for column, values in metrics["aggregates"].items()
    }
    content = summary.strict({**metrics, "aggregates": aggregates})
    with replacing(path) as temporary:
        temporary.write_text(
            json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the ``evaluate`` command."""
    parser.add_argument("--predictions", type=Path, required=True, metavar="DIR",
                        help="folder of masks, named as the references")  # fmt: skip
    parser.add_argument("--references", type=Path, metavar="DIR",
                        help="folder of reference masks; optional with --positives")  # fmt: skip
    parser.add_argument("--positives", type=Path, metavar="CSV",
                        help="table case,positive (1 or 0) of the scans that show a bleed "
                        "[those whose reference is not empty]")  # fmt: skip
    parser.add_argument("--results", type=Path, metavar="DIR",
                        help="folder with the results.json that has the case scores "
                        "[that of the predictions]")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="folder for metrics.json, evaluation.json and cases.csv; also for "
                        "detection.json, and roc.png where there are scans with a bleed and "
                        "without")  # fmt: skip
    parser.add_argument("--labels", metavar="NAMES",
                        help="names of the labels 1, 2, ..., with commas; of regions with the "
                        "labels that each holds, as bleed=1+2,core=2 [those that occur, by their "
                        "number]")  # fmt: skip
    parser.add_argument("--empty", choices=EMPTY_POLICIES, default="instance",
                        help="what an empty mask scores: as INSTANCE does (infinite distance), "
                        "the volume's diagonal, or nothing where it is not defined "
                        "[%(default)s]")  # fmt: skip
    parser.add_argument("--ignore-label", type=int, metavar="N",
                        help="value of the references' voxels that nobody could tell: they are "
                        "left out [none]")  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N",
                        help="processes [as many as cores and memory allow]")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Run the ``evaluate`` command."""
    names, held = (None, ()) if args.labels is None else parse_labels(args.labels)
    if args.references is None and args.positives is None:
        raise TrainingError("evaluate needs --references DIR, or --positives CSV for scans alone")
    masks = masks_by_name(args.predictions)
    case_scores = detection.read_case_scores(
        args.results or args.predictions, required=args.results is not None
    )
    positives = None if args.positives is None else detection.read_positives(args.positives, masks)
    written: list[str] = []
    by_case: Detection | None
    if args.references is not None:
        found = evaluate(
            args.predictions, args.references, args.out,
            names=names, empty=args.empty, ignore_label=args.ignore_label, held=held,
            workers=args.workers,
        )  # fmt: skip
        sys.stdout.write(tables.describe(found) + "\n")
        written = [METRICS_FILE, summary.EVALUATION_FILE, summary.CASES_FILE]
        by_case = detection.of_evaluation(found.cases, case_scores, positives)
    else:
        by_case = detection.of_masks(masks, case_scores, positives or {})
    written += detection.save(by_case, args.out)
    if by_case is not None:
        sys.stdout.write(detection.describe(by_case) + "\n")
    sys.stdout.write(f"wrote {', '.join(written)} to {args.out}\n")
    return 0


def parse_labels(text: str) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Names, and of regions what each holds: ``ich,oedema`` or ``bleed=1+2,core=2``.

    Raises:
        TrainingError: Names are missing or given twice, or some hold labels and others do not.
    """
    parts = [part.partition("=") for part in text.split(",")]
    names = tuple(name for name, _, _ in parts)
    if len(set(names)) < len(names) or not all(names):
        raise TrainingError(f"--labels {text}: expected different names with commas between")
    if not any(equals for _, equals, _ in parts):
        return names, ()
    values = [held.split("+") for _, _, held in parts]
    if not all(value.isdecimal() and 0 < int(value) < 255 for held in values for value in held):
        raise TrainingError(
            f"--labels {text}: expected the labels that each region holds, as bleed=1+2,core=2"
        )
    return names, tuple(tuple(int(value) for value in held) for held in values)


def _score_pairs(
    pairs: Sequence[Pair],
    names: tuple[str, ...] | None,
    empty: str,
    ignore_label: int | None,
    held: tuple[tuple[int, ...], ...],
    workers: int | None,
) -> list[CaseScore]:
    """Score all cases; what is wrong with the first bad one, by name, is raised."""
    if workers is None:
        references = [pair.reference for pair in pairs]
        workers = parallel.workers_for(references, _BYTES_PER_VOXEL, _BYTES_BESIDE)
    results = parallel.each_case(
        score_pair, pairs, names, empty, ignore_label, held, workers=workers
    )
    scored, failures = [], {}
    for pair, result in parallel.with_progress(results, len(pairs), "evaluate"):
        if isinstance(result, Exception):
            failures[pair.name] = result
        else:
            scored.append(result)
    if failures:
        first = failures[min(failures)]
        if not isinstance(first, IchsegError):
            raise first
        more = f" (and {len(failures) - 1} more cases)" if len(failures) > 1 else ""
        raise type(first)(f"{first}{more}")
    return scored


def _count(found: LabelSummary) -> dict[str, object]:
    return {
        "cases": found.cases,
        "empty_references": found.empty_references,
        "empty_predictions": found.empty_predictions,
        "both_empty": found.both_empty,
        "missed": list(found.missed),
        "finite": {KEYS[measure.measure]: measure.finite for measure in found.measures},
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(names[:5])
    return f"{listed}, ..." if len(names) > 5 else listed
