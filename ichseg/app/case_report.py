"""What is said of a finished case: its ``report`` in ``results.json`` and its line in the log."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ichseg.predict.components import Segmentation
from ichseg.wording import counted

MOST_LESIONS = 100  # in results.json; noise has hundreds of thousands


def facts(
    segmentation: Segmentation,
    of_scan: Sequence[str] = (),
    of_writing: Sequence[str] = (),
) -> dict[str, Any]:
    """The ``report`` of a case in ``results.json``.

    Args:
        segmentation: What was found.
        of_scan: Warnings about the scan.
        of_writing: Warnings about what could not be made of the mask.
    """
    lesions = segmentation.lesions
    said = [*of_scan, *segmentation.warnings, *of_writing]
    if len(lesions) > MOST_LESIONS:
        said.append(f"{len(lesions)} lesions, the {MOST_LESIONS} largest are listed")
    disagreement = segmentation.disagreement
    return {
        "volume_ml": round(segmentation.volume_ml, 3),
        "case_score": _rounded(segmentation.case_score),
        "lesion_count": len(lesions),
        "lesions": [_rounded(dataclasses.asdict(lesion)) for lesion in lesions[:MOST_LESIONS]],
        "disagreement": None if disagreement is None else round(disagreement, 4),
        "warnings": said,
        "ran": segmentation.ran,
        "seconds": dict(segmentation.seconds),
    }


def summary(report: dict[str, Any]) -> str:
    """What was found, how long it took and what was left out, in one line, of ``facts``."""
    ran, took = report["ran"], report["seconds"]
    in_time = ""
    if "units" in ran:
        in_time = f"{ran['units']} of {ran['units_planned']} networks x mirrorings ran in time; "
    return (
        f"{report['volume_ml']:.2f} mL in {counted(report['lesion_count'], 'lesion')}, "
        f"{took['total']:.1f} s, of it {took['compile']:.1f} s for compiling; "
        f"{in_time}{ran['tiles_skipped']} of {ran['tiles']} tiles skipped as air"
    )


def _rounded(value: Any) -> Any:
    """Numbers to a thousandth, through dictionaries and tuples."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_rounded(item) for item in value]
    return None if value is None else round(value, 3)
