"""Scans, not voxels: whether a bleed is seen where there is one, and none where there is none.

A scan is called positive where its mask has a voxel; its score ranks it for the ROC curve. Which
scans show a bleed is told by a table, or else by their references. ``detection.json`` keeps all of
it, ``roc.png`` shows the curve.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ichseg.app import results
from ichseg.errors import DatasetError
from ichseg.files import replacing, stem_of
from ichseg.model import strict_json
from training.data.splits import read_table
from training.scoring.lesions import find_lesions
from training.scoring.roc import Area, RocPoint, area_under_roc, roc_curve
from training.scoring.scores import HIGHEST_LABEL, CaseScore, read_labels
from training.scoring.statistics import wilson

DETECTION_FILE, ROC_PICTURE = "detection.json", "roc.png"
BY_SCORE, BY_VOLUME = "case_score", "volume_ml"
_POSITIVES_HEADER = ["case", "positive"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scan:
    """One scan.

    Attributes:
        name: The case's name.
        positive: Whether it shows a bleed.
        volume_ml: The volume that was found in it.
        score: What ranks it, see ``Detection.scored_by``.
        false_lesions: How many lesions were found in it that are none; None where no reference
            tells.
    """

    name: str
    positive: bool
    volume_ml: float
    score: float
    false_lesions: int | None


@dataclass(frozen=True, slots=True)
class Share:
    """A share of scans with its 95 % interval (Wilson 1927).

    Attributes:
        hits: How many scans.
        of: Of how many.
        value: ``hits / of``; None of none.
        low: The lower end of the interval.
        high: The upper end.
    """

    hits: int
    of: int
    value: float | None
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Detection:
    """How well scans with a bleed are told from those without; the layout of ``detection.json``.

    Attributes:
        schema_version: The version of this layout.
        scored_by: What ranks the scans: ``case_score`` of ``results.json``, or ``volume_ml``.
        area: The area under the ROC curve, with DeLong's 95 % interval.
        sensitivity: The share of the scans with a bleed in which anything was found.
        specificity: The share of the scans without one in which nothing was found.
        false_lesions: How many lesions were found that are none.
        false_lesions_in: In how many scans these were counted.
        roc: The curve; empty unless there are scans of both kinds.
        left_out: Scans of which neither the reference nor a table tells whether they show a bleed.
        scans: All others, sorted by name.
    """

    schema_version: int
    scored_by: str
    area: Area
    sensitivity: Share
    specificity: Share
    false_lesions: int
    false_lesions_in: int
    roc: tuple[RocPoint, ...]
    left_out: tuple[str, ...]
    scans: tuple[Scan, ...]

    def __post_init__(self) -> None:
        strict_json.check_schema("detection", self.schema_version, 1)


def of_evaluation(
    cases: Sequence[CaseScore],
    case_scores: Mapping[str, float],
    positives: Mapping[str, bool] | None = None,
) -> Detection | None:
    """Detection in cases that were scored against their references.

    Args:
        cases: The scored cases.
        case_scores: For each case its case score; those that it lacks make all be ranked by volume.
        positives: Whether each case shows a bleed; None where the references tell. Then one whose
            reference has no label, but voxels that nobody could tell, is left out.

    Returns:
        None without a table where every case has a bleed: then there is nothing to tell apart.
    """
    told: dict[str, bool] = {}
    for case in cases:
        bleeds = any(score.reference_ml > 0 for score in case.disjoint)
        if positives is not None:
            told[case.name] = positives[case.name]
        elif bleeds or not case.ignored_ml:
            told[case.name] = bleeds
    if positives is None and all(told.values()):
        return None
    found = {c.name: sum(score.predicted_ml for score in c.disjoint) for c in cases}
    false = {c.name: sum(score.false_lesions for score in c.disjoint) for c in cases}
    left_out = [case.name for case in cases if case.name not in told]
    return make_detection(told, found, case_scores, false, left_out)


def of_masks(
    masks: Mapping[str, Path], case_scores: Mapping[str, float], positives: Mapping[str, bool]
) -> Detection:
    """Detection in scans that have no reference but a row of a table.

    False lesions are counted in scans without a bleed alone.

    Args:
        masks: The mask of each case.
        case_scores: As for ``of_evaluation``.
        positives: Whether each case shows a bleed.

    Raises:
        InputError: A file is not a volume of labels.
    """
    told = {name: positives[name] for name in masks}
    found, false = {}, {}
    for name, path in masks.items():
        mask = read_labels(path, HIGHEST_LABEL)
        bleed = mask.voxels != 0
        found[name] = float(np.count_nonzero(bleed) * mask.voxel_ml)
        if not told[name]:
            false[name] = len(find_lesions(bleed, np.zeros_like(bleed), mask.voxel_ml))
    return make_detection(told, found, case_scores, false)


def make_detection(
    positives: Mapping[str, bool],
    volumes_ml: Mapping[str, float],
    case_scores: Mapping[str, float],
    false_lesions: Mapping[str, int],
    left_out: Iterable[str] = (),
) -> Detection:
    """Put scans together.

    Args:
        positives: For each scan whether it shows a bleed.
        volumes_ml: For each scan the volume found.
        case_scores: For scans their case score; without that of one, volumes rank all.
        false_lesions: For scans how many lesions were found that are none, where that is known.
        left_out: Scans that nobody can tell.
    """
    names = sorted(positives)
    missing = [name for name in names if name not in case_scores]
    if missing and case_scores:
        _log.warning(
            "no case score of %s (%d of %d scans): all are ranked by the volume found",
            missing[0], len(missing), len(names),
        )  # fmt: skip
    ranks = volumes_ml if missing else case_scores
    scans = tuple(
        Scan(name, positives[name], volumes_ml[name], ranks[name], false_lesions.get(name))
        for name in names
    )
    truth, scores = [scan.positive for scan in scans], [scan.score for scan in scans]
    called = [scan.volume_ml > 0 for scan in scans]
    counted = [scan.false_lesions for scan in scans if scan.false_lesions is not None]
    return Detection(
        schema_version=1,
        scored_by=BY_VOLUME if missing else BY_SCORE,
        area=area_under_roc(truth, scores),
        sensitivity=_share([c for c, positive in zip(called, truth, strict=True) if positive]),
        specificity=_share([not c for c, p in zip(called, truth, strict=True) if not p]),
        false_lesions=sum(counted),
        false_lesions_in=len(counted),
        roc=roc_curve(truth, scores) if any(truth) and not all(truth) else (),
        left_out=tuple(sorted(left_out)),
        scans=scans,
    )


def read_positives(path: Path, cases: Iterable[str] = ()) -> dict[str, bool]:
    """Which cases show a bleed, from a CSV table with the header ``case,positive``, 1 or 0.

    Args:
        path: The table.
        cases: The cases that it has to have; others may stand in it.

    Raises:
        DatasetError: No such table, another header or value, or a case that stands twice or lacks.
    """
    found: dict[str, bool] = {}
    for number, (case, positive) in read_table(path, _POSITIVES_HEADER):
        if positive not in ("0", "1"):
            raise DatasetError(f"{path}: row {number} is '{case},{positive}', expected case,0 or 1")
        if case in found:
            raise DatasetError(f"{path}: row {number} has case {case} again")
        found[case] = positive == "1"
    missing = [name for name in cases if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DatasetError(
            f"{path}: no row for case {missing[0]}{more}, expected one for each mask"
        )
    return found


def read_case_scores(folder: Path, *, required: bool = False) -> dict[str, float]:
    """The case scores in ``results.json`` of a folder by case; none without such a file.

    Args:
        folder: Where the file lies.
        required: Whether it has to be there.

    Raises:
        DatasetError: There is no such file, and it is required.
        OutputError: The file is something else than the results of a run.
    """
    if required and not (folder / results.FILE).is_file():
        raise DatasetError(f"{folder / results.FILE}: no such file, expected that of process.py")
    return {
        stem_of(Path(result.mask)): float(result.report["case_score"])
        for result in results.read_results(folder).values()
        if result.mask is not None and result.report.get("case_score") is not None
    }


def save(detection: Detection | None, folder: Path) -> list[str]:
    """Write ``detection.json``, and ``roc.png`` if there is a curve, and give their names.

    What an earlier evaluation has left under a name that this one does not write is removed, as it
    may be of other masks.

    Args:
        detection: What to write; None if there is nothing to tell apart.
        folder: Where to; it is made if need be.

    Raises:
        OutputError: The folder cannot be written.
    """
    written = []
    if detection is not None:
        with replacing(folder / DETECTION_FILE) as temporary:
            temporary.write_text(strict_json.dumps(detection), encoding="utf-8")
        written.append(DETECTION_FILE)
        if detection.roc:
            _draw(detection, folder / ROC_PICTURE)
            written.append(ROC_PICTURE)
    for name in {DETECTION_FILE, ROC_PICTURE}.difference(written):
        (folder / name).unlink(missing_ok=True)
    return written


def describe(detection: Detection) -> str:
    """What the terminal shows: the area, sensitivity, specificity and false lesions."""
    area, false, scans = detection.area, detection.false_lesions, detection.false_lesions_in
    with_bleed = sum(scan.positive for scan in detection.scans)
    lines = [
        f"by case: {len(detection.scans)} scans, {with_bleed} with a bleed, "
        f"{len(detection.scans) - with_bleed} without",
        f"area under the ROC curve ({detection.scored_by}): {_area_in_words(area)}",
        f"sensitivity: {_share_in_words(detection.sensitivity, 'with something found')}",
        f"specificity: {_share_in_words(detection.specificity, 'with nothing found')}",
    ]
    if scans:
        lines.append(f"false lesions: {false / scans:.2f} a scan ({false} in {scans})")
    if detection.left_out:
        lines.append(f"nobody could tell, left out: {', '.join(detection.left_out)}")
    return "\n".join(lines) + "\n"


def _draw(detection: Detection, path: Path) -> None:
    from matplotlib.figure import Figure  # a second to import

    figure = Figure(figsize=(5, 5), dpi=100, layout="constrained")
    axes = figure.subplots()
    false_rates = [point.false_positive_rate for point in detection.roc]
    axes.plot([0, 1], [0, 1], color="tab:gray", linewidth=0.8, linestyle="dashed")
    axes.plot(false_rates, [point.sensitivity for point in detection.roc], color="tab:blue")
    false_rate, sensitivity = detection.specificity.value, detection.sensitivity.value
    if false_rate is not None and sensitivity is not None:
        axes.plot([1 - false_rate], [sensitivity], "o", color="tab:red", label="anything found")
        axes.legend(loc="lower right")
    axes.set(
        title=f"Area {_area_in_words(detection.area)}",
        xlabel="1 - specificity",
        ylabel="sensitivity",
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
        aspect="equal",
    )
    with replacing(path, suffix=".png") as temporary:
        figure.savefig(temporary)


def _share(hits: Sequence[bool]) -> Share:
    count, of = sum(hits), len(hits)
    return Share(count, of, count / of if of else None, *wilson(count, of))


def _area_in_words(area: Area) -> str:
    if area.value is None:
        return "not defined, all scans are of one kind"
    interval = "" if area.low is None else f", 95 % {area.low:.3f} to {area.high:.3f} (DeLong)"
    return f"{area.value:.3f}{interval}"


def _share_in_words(share: Share, which: str) -> str:
    if share.value is None:
        return "not defined"
    return (
        f"{share.value:.3f}, 95 % {share.low:.3f} to {share.high:.3f} "
        f"({share.hits} of {share.of} {which})"
    )
