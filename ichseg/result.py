"""``results.json``: one entry per case, in evalutils' list layout, with our ``report`` added."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ichseg.volume import replacing


@dataclass(frozen=True, slots=True)
class CaseResult:
    """How one case ended.

    Attributes:
        image: Path of the scan as it is named in the file.
        mask: Path of its mask relative to the output folder, or None if the case failed.
        error: The reason of a failure, or an empty string.
        report: volume_ml, warnings, ran, seconds; empty if the case failed.
    """

    image: str
    mask: str | None
    error: str
    report: dict[str, Any]


def write_results(results: Sequence[CaseResult], path: Path) -> None:
    """Write strict JSON, whole or not at all.

    Raises:
        OutputError: The folder cannot be written.
    """
    entries = [
        {
            "outputs": [] if result.mask is None else [_image(result.mask)],
            "inputs": [_image(result.image)],
            "error_messages": [result.error] if result.error else [],
            "report": result.report,
        }
        for result in results
    ]
    with replacing(path, suffix=".json") as temporary:
        temporary.write_text(
            json.dumps(entries, indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )


def _image(name: str) -> dict[str, str]:
    return {"type": "metaio_image", "filename": name}
