"""The page of an inference: failures first, then the largest bleeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ichseg.report import page
from ichseg.report.case_files import read_case
from ichseg.report.page import Card, CaseList, Column, Row

_COLUMNS = (
    Column("volume", "Volume, mL", 2, "of all that was found"),
    Column("lesions", "Lesions", 0, "pieces that do not touch"),
    Column("largest", "Largest, mL", 2, "of the largest lesion"),
    Column("score", "Case score", 2, "how sure it is that there is a bleed, 0 to 1"),
    Column("disagreement", "Disagreement", 3, "how much the networks disagree"),
    Column("seconds", "Seconds", 1),
    Column("note", "Notes"),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """What the page says of one scan.

    Attributes:
        name: The scan's name, as ``write_case`` was given it.
        error: Why the scan failed; an empty string if it did not.
        facts: What was found in it, as ``report`` in ``results.json`` has it; empty if it failed.
    """

    name: str
    error: str
    facts: Mapping[str, Any]

    @property
    def volume_ml(self) -> float:
        """The volume of all that was found; 0 if it is not known."""
        return float(self.facts.get("volume_ml") or 0.0)

    @property
    def lesions(self) -> Sequence[Mapping[str, Any]]:
        """The lesions, the largest first."""
        return self.facts.get("lesions") or ()

    @property
    def lesion_count(self) -> int | None:
        """How many lesions there are, which may be more than are listed; None if not known."""
        listed = len(self.lesions) if "lesions" in self.facts else None
        count: int | None = self.facts.get("lesion_count", listed)
        return count

    @property
    def disagreement(self) -> float | None:
        """How much the networks disagree; None where only one ran."""
        return self.facts.get("disagreement")

    @property
    def case_score(self) -> float | None:
        """How sure it is that there is a bleed, 0 to 1; None if it is not known."""
        return self.facts.get("case_score")

    @property
    def preset(self) -> str:
        """The preset that ran; an empty string if it is not known."""
        return str((self.facts.get("ran") or {}).get("preset") or "")

    @property
    def warnings(self) -> Sequence[str]:
        """What the scan or the run was warned of."""
        return self.facts.get("warnings") or ()

    @property
    def total_s(self) -> float | None:
        """How many seconds the networks took, with what they need before and after."""
        return (self.facts.get("seconds") or {}).get("total")

    @property
    def ran(self) -> dict[str, Any]:
        """What ran, by names that only the code knows, and how long each part took."""
        return {**(self.facts.get("ran") or {}), "seconds": self.facts.get("seconds") or {}}

    @property
    def flags(self) -> tuple[str, ...]:
        """What the table can be filtered by."""
        if self.error:
            return ("failed",)
        flags = {"nothing found": self.volume_ml == 0, "warnings": bool(self.warnings)}
        return tuple(flag for flag, is_so in flags.items() if is_so)


@dataclass(frozen=True, slots=True)
class Summary:
    """What is said of all scans together.

    Attributes:
        scans: How many scans there are.
        failed: The entries of those that failed.
        with_bleed: In how many scans something was found.
        median_ml: The median volume of those; None if there are none.
        largest_ml: The largest volume; None likewise.
        warned: How many scans have warnings.
        median_s: The median time of a scan in seconds; None if no time is known.
        total_s: The time of all scans together in seconds.
    """

    scans: int
    failed: list[Entry]
    with_bleed: int
    median_ml: float | None
    largest_ml: float | None
    warned: int
    median_s: float | None
    total_s: float


def write(folder: Path, entries: Sequence[Entry], *, title: str, subtitle: str) -> Path:
    """Write the page of an inference.

    Args:
        folder: The folder that ``write_case`` was given, with the names of the entries.
        entries: The scans in any order; what is not known of one is left out.
        title: The heading.
        subtitle: One line below it: what ran.

    Returns:
        The path of the page.

    Raises:
        OutputError: The folder cannot be written.
        PlansError: A file of ``write_case`` has been altered.
    """
    ordered = sorted(entries, key=lambda entry: (not entry.error, -entry.volume_ml, entry.name))
    environment = page.environment()
    environment.filters |= {"extent": _extent, "in_words": _in_words}
    return page.write(
        folder,
        environment.get_template("inference.html"),
        title=title,
        subtitle=subtitle,
        cases=CaseList(
            columns=_COLUMNS,
            rows=[_row(entry) for entry in ordered],
            cards=[_card(entry, folder) for entry in ordered],
            order="Failures first, then the largest volume.",
        ),
        summary=_summary(ordered),
    )


def _summary(entries: Sequence[Entry]) -> Summary:
    done = [entry for entry in entries if not entry.error]
    volumes = [entry.volume_ml for entry in done if entry.volume_ml > 0]
    seconds = [entry.total_s for entry in done if entry.total_s is not None]
    return Summary(
        scans=len(entries),
        failed=[entry for entry in entries if entry.error],
        with_bleed=len(volumes),
        median_ml=statistics.median(volumes) if volumes else None,
        largest_ml=max(volumes, default=None),
        warned=sum(bool(entry.warnings) for entry in done),
        median_s=statistics.median(seconds) if seconds else None,
        total_s=sum(seconds),
    )


def _row(entry: Entry) -> Row:
    values = {
        "volume": entry.facts.get("volume_ml"),
        "lesions": entry.lesion_count,
        "largest": entry.lesions[0]["volume_ml"] if entry.lesions else None,
        "score": entry.case_score,
        "disagreement": entry.disagreement,
        "seconds": entry.total_s,
        "note": entry.error or "; ".join(entry.warnings),
    }
    return Row(entry.name, values, entry.flags)


def _card(entry: Entry, folder: Path) -> Card:
    shown = None if entry.error else read_case(folder, entry.name)
    return Card(entry.name, shown, about=entry, flags=entry.flags)


def _extent(box_mm: tuple[Sequence[float], Sequence[float]]) -> list[float]:
    """The lengths of a box given by its two corners."""
    low, high = box_mm
    return [b - a for a, b in zip(low, high, strict=True)]


def _in_words(value: Any) -> str:
    """A fact of any type, for people."""
    if isinstance(value, dict):
        items = (f"{key.replace('_', ' ')} {_in_words(item)}" for key, item in value.items())
        return ", ".join(items)
    if isinstance(value, list | tuple):
        return ", ".join(_in_words(item) for item in value) or "none"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "unknown"
    return "none" if value is None else str(value)
