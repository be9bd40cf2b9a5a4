"""Whether one of two evaluations of the same cases is better than the other, and where."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ichseg.errors import TrainingError
from ichseg.files import replacing
from ichseg.model import strict_json
from training.scoring import summary
from training.scoring.measures import MEASURES, TITLES
from training.scoring.scores import LabelScore
from training.scoring.statistics import bootstrap_mean, wilcoxon
from training.scoring.summary import Evaluation

_HIGHER_IS_BETTER = ("dice", "surface_dice")
_SHOWN = 5  # cases with the largest change that the terminal lists
_SAME_VOLUME = 1e-6  # relative, of a reference


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of one measure of one label, B less A, over cases where both are finite.

    Attributes:
        label: The label's name.
        measure: One of ``training.scoring.measures.MEASURES``.
        pairs: In how many cases both are finite.
        left_out: In how many cases either is infinite or not defined.
        mean_a: The mean of A over the pairs.
        mean_b: The mean of B over the pairs.
        mean: The mean of the differences.
        low: The lower end of the bootstrap 95 % interval of ``mean``.
        high: The upper end of that interval.
        p: The p of Wilcoxon's signed-rank test; None if no pair differs.
        better: In how many pairs B is better.
        worse: In how many pairs B is worse.
        equal: In how many pairs they are equal.
    """

    label: str
    measure: str
    pairs: int
    left_out: int
    mean_a: float | None
    mean_b: float | None
    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    better: int
    worse: int
    equal: int


def compare(a: Evaluation, b: Evaluation) -> tuple[Difference, ...]:
    """Compare every label and measure of two evaluations, case by case.

    Raises:
        TrainingError: The two differ in cases, labels, references or policy for empty masks.
    """
    _check_same(a, b)
    return tuple(
        _differ(label, measure, pairs)
        for i, label in enumerate(a.labels)
        for pairs in [_paired(a, b, i)]
        for measure in MEASURES
    )


def describe(a: Evaluation, b: Evaluation, differences: Sequence[Difference]) -> str:
    """What the terminal shows of a comparison."""
    lines = []
    for i, label in enumerate(a.labels):
        lines += [
            f"label {label}: {len(a.cases)} cases; p by Wilcoxon's signed-rank test, not corrected "
            "for the number of measures",
            "",
            f"{'':14}  {'A':>8}  {'B':>8}  {'B - A':>8}  {'95 % interval':>20}  {'p':>8}  "
            f"better/equal/worse",
            *(_line(difference) for difference in differences if difference.label == label),
            "",
            "largest changes of Dice",
            *_largest_changes(a, b, i),
            "",
        ]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the ``compare`` command."""
    parser.add_argument("a", type=Path, metavar="A", help="folder that evaluate wrote")
    parser.add_argument("b", type=Path, metavar="B", help="another, of the same cases")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table as JSON too")


def main(args: argparse.Namespace) -> int:
    """Run the ``compare`` command."""
    a, b = summary.load(args.a), summary.load(args.b)
    try:
        differences = compare(a, b)
    except TrainingError as error:
        raise TrainingError(f"A, {args.a}, and B, {args.b}: {error}") from error
    sys.stdout.write(f"A: {args.a}\nB: {args.b}\n\n{describe(a, b, differences)}")
    if args.out is not None:
        content = {"a": str(args.a), "b": str(args.b), "differences": differences}
        with replacing(args.out) as temporary:
            temporary.write_text(strict_json.dumps(content), encoding="utf-8")
        sys.stdout.write(f"wrote {args.out}\n")
    return 0


def _check_same(a: Evaluation, b: Evaluation) -> None:
    if a.empty != b.empty:
        raise TrainingError(f"A scores empty masks by {a.empty}, B by {b.empty}, expected the same")
    if a.ignore_label != b.ignore_label:
        raise TrainingError(
            f"A leaves out the voxels of label {a.ignore_label}, B those of {b.ignore_label}, "
            "expected the same"
        )
    if a.labels != b.labels:
        raise TrainingError(
            f"A has the labels {', '.join(a.labels)}, B {', '.join(b.labels)}, expected the same; "
            "`evaluate --labels` names them"
        )
    lone = sorted({case.name for case in a.cases} ^ {case.name for case in b.cases})
    if lone:
        raise TrainingError(f"{len(lone)} cases are in one evaluation only, such as {lone[0]}")
    for first, second in zip(a.cases, b.cases, strict=True):
        for x, y in zip(first.labels, second.labels, strict=True):
            if not math.isclose(x.reference_ml, y.reference_ml, rel_tol=_SAME_VOLUME):
                raise TrainingError(
                    f"case {first.name}: its reference has {x.reference_ml:.6g} mL in A and "
                    f"{y.reference_ml:.6g} mL in B, expected the same reference"
                )


def _paired(a: Evaluation, b: Evaluation, index: int) -> list[tuple[LabelScore, LabelScore]]:
    return [
        (first.labels[index], second.labels[index])
        for first, second in zip(a.cases, b.cases, strict=True)
    ]


def _differ(label: str, measure: str, pairs: Sequence[tuple[LabelScore, LabelScore]]) -> Difference:
    values = [(getattr(x.scores, measure), getattr(y.scores, measure)) for x, y in pairs]
    known = [(x, y) for x, y in values if _is_finite(x) and _is_finite(y)]
    changes = [y - x for x, y in known]
    mean = bootstrap_mean(changes)
    up, down = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    better, worse = (up, down) if measure in _HIGHER_IS_BETTER else (down, up)
    return Difference(
        label=label,
        measure=measure,
        pairs=len(known),
        left_out=len(values) - len(known),
        mean_a=sum(x for x, _ in known) / len(known) if known else None,
        mean_b=sum(y for _, y in known) / len(known) if known else None,
        mean=mean.mean,
        low=mean.low,
        high=mean.high,
        p=wilcoxon(changes),
        better=better,
        worse=worse,
        equal=len(known) - up - down,
    )


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _line(found: Difference) -> str:
    a, b, mean, low, high = (
        "-" if value is None else f"{value:.4f}"
        for value in (found.mean_a, found.mean_b, found.mean, found.low, found.high)
    )
    interval = "-" if found.low is None else f"{low} to {high}"
    p = "-" if found.p is None else f"{found.p:.2g}"
    note = f", {found.left_out} left out" if found.left_out else ""
    return (
        f"{TITLES[found.measure]:14}  {a:>8}  {b:>8}  {mean:>8}  {interval:>20}  {p:>8}  "
        f"{found.better}/{found.equal}/{found.worse}{note}"
    )


def _largest_changes(a: Evaluation, b: Evaluation, index: int) -> list[str]:
    changes = []
    for case, (first, second) in zip(a.cases, _paired(a, b, index), strict=True):
        before, after = first.scores.dice, second.scores.dice
        if before is not None and after is not None and before != after:
            changes.append((abs(after - before), case.name, before, after))
    changes.sort(key=lambda change: (-change[0], change[1]))
    width = max((len(name) for _, name, _, _ in changes[:_SHOWN]), default=0)
    return [
        f"  {name:{width}}  {before:.4f} to {after:.4f}"
        for _, name, before, after in changes[:_SHOWN]
    ] or ["  none"]
