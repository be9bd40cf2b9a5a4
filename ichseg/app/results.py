"""``results.json``: one entry per case, in evalutils' list layout, with our ``report`` added."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from ichseg.app.cases import InputCase
from ichseg.errors import InputError, OutputError
from ichseg.files import replacing, sha256
from ichseg.scan.dicom import files as dicom_files

FILE = "results.json"


class Stamp(TypedDict):
    """By what a scan is known again: its bytes on disk, and the latest date of its files, in ns."""

    bytes: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class CaseResult:
    """How one case ended.

    Attributes:
        image: Path of the scan as it is named in the file.
        mask: Path of its mask relative to the output folder, or None if the case failed.
        error: The reason of a failure, or an empty string.
        report: What was found (see ``case_report``), and for ``--resume`` made_from and
            mask_sha256; empty if the case failed.
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


def read_results(path: Path) -> tuple[CaseResult, ...]:
    """What ``write_results`` wrote; nothing if there is no such file.

    Raises:
        OutputError: There is one, and it is something else.
    """
    try:
        return tuple(
            CaseResult(
                image=entry["inputs"][0]["filename"],
                mask=next((output["filename"] for output in entry["outputs"]), None),
                error=next(iter(entry["error_messages"]), ""),
                report=dict(entry["report"]),
            )
            for entry in json.loads(path.read_text(encoding="utf-8"))
        )
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise OutputError(
            f"{path}: not the results of an earlier run ({error!r}), from which --resume could go "
            "on; move it away"
        ) from error


def stamp_of(image: Path) -> Stamp:
    """Size and date of a scan.

    Not a checksum, so that going on with a folder of a thousand takes no time; a scan that has been
    copied since is segmented again.

    Raises:
        InputError: The scan cannot be looked at.
    """
    try:
        files = dicom_files.walk(image).files if image.is_dir() else [image]
        stats = [path.stat() for path in files]
    except OSError as error:
        raise InputError(f"{image}: cannot read ({error.strerror})") from error
    return Stamp(
        bytes=sum(stat.st_size for stat in stats),
        modified_ns=max((stat.st_mtime_ns for stat in stats), default=0),
    )


def finished(
    case: InputCase, output: Path, earlier: Sequence[CaseResult], made: dict[str, Any]
) -> CaseResult | None:
    """The case's earlier result, if it is what would be made now and its mask is unaltered."""
    mask = str(case.output.relative_to(output))
    for result in earlier:
        same = (result.image, result.mask) == (case.name, mask)
        if same and result.report.get("made_from") == made:
            digest = digest_of(case.output)
            return result if digest and digest == result.report.get("mask_sha256") else None
    return None


def without_lost(results: Sequence[CaseResult], output: Path) -> list[CaseResult]:
    """The results, in which a mask that is no longer there is an error.

    Somebody may have removed the output folder in the meantime; the later masks made it again.
    """
    return [
        result
        if result.mask is None or (output / result.mask).is_file()
        else CaseResult(
            image=result.image,
            mask=None,
            error=f"{output / result.mask}: was removed during the run; --resume does it again",
            report={},
        )
        for result in results
    ]


def digest_of(mask: Path) -> str | None:
    """The mask file's SHA-256; None if it cannot be read, since somebody may have removed it."""
    try:
        return sha256(mask)
    except OSError:
        return None


def _image(name: str) -> dict[str, str]:
    return {"type": "metaio_image", "filename": name}
