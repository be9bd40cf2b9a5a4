"""A page for people: ``write_case`` as each case ends, ``write_index`` at last."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ichseg.files import replacing
from ichseg.model import strict_json
from ichseg.report import page, pictures, viewer
from ichseg.report.case_list import Card, Column, Row, Shown, number
from ichseg.report.framing import Framed, frame
from ichseg.report.html import Html, join, tag
from ichseg.report.page import Section
from ichseg.report.pictures import write_overlay
from ichseg.scan.volume import Volume

__all__ = ["Entry", "read_case", "slug_of", "write_case", "write_index", "write_overlay"]

_MOST_LESIONS = 12  # listed on the page; results.json has more


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


def write_case(
    folder: Path,
    name: str,
    image: Volume,
    masks: Mapping[str, Volume],
    *,
    is_ct: bool = True,
) -> None:
    """Write a case's pictures and volumes, for ``write_index`` to make a page with.

    They lie in ``folder/cases``: ``.jpg`` a strip of slices, ``.js`` the volumes for the viewer, at
    most 8 MB, and ``.json`` what the page has to know of them.

    Args:
        folder: Of the page, made if need be.
        name: Of the case.
        image: The scan.
        masks: ``prediction``, ``reference`` or both, in the scan's grid.
        is_ct: Whether the scan is in HU; else nothing is cut off around it, and it is shown in a
            window that fits it.

    Raises:
        ValueError: A mask has another shape.
        OutputError: The folder cannot be written.
    """
    slug = slug_of(name)
    framed = frame(image, masks, is_ct=is_ct)
    window = pictures.BRAIN if is_ct else pictures.fitting_window(framed)
    cases = folder / "cases"
    slices, panel_px = pictures.write_strip(framed, cases / f"{slug}.jpg", window=window)
    script = viewer.make_script(framed, slug, is_ct=is_ct)
    with replacing(cases / f"{slug}.js", suffix=".js") as temporary:
        temporary.write_text(script.text, encoding="ascii")
    shown = Shown(
        name=name,
        slug=slug,
        is_ct=is_ct,
        masks=tuple(masks),
        slices=tuple(framed.first_slice + index for index in slices),
        present=tuple(
            " ".join(key for key, labels in framed.masks.items() if labels[index].any())
            for index in slices
        ),
        largest_slice=framed.first_slice + _largest_slice(framed, slices),
        first_slice=framed.first_slice,
        all_slices=framed.slices,
        panel_px=panel_px,
        merged=script.merged,
        window=window,
    )
    with replacing(cases / f"{slug}.json", suffix=".json") as temporary:
        temporary.write_text(strict_json.dumps(shown), encoding="utf-8")


def _largest_slice(framed: Framed, slices: Sequence[int]) -> int:
    """With most of the reference, or else of what was found; without any the middle of these."""
    for name in ("reference", "prediction"):
        if name in framed.masks and framed.masks[name].any():
            return int(np.count_nonzero(framed.masks[name], axis=(1, 2)).argmax())
    return slices[len(slices) // 2]


def read_case(folder: Path, name: str) -> Shown | None:
    """What ``write_case`` left of a case; None if it was not called for it.

    Raises:
        PlansError: The file is of something else.
    """
    path = folder / "cases" / f"{slug_of(name)}.json"
    return strict_json.load(Shown, path) if path.is_file() else None


def slug_of(name: str) -> str:
    """A name for a case's files that needs no care in a URL or a file system.

    Names of letters, digits, ``_``, ``-`` and ``.`` are kept; others get a checksum, which tells
    them apart.
    """
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).lstrip(".")[:80]
    if name and safe == name:
        return name
    return f"{safe}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def write_index(folder: Path, entries: Sequence[Entry], *, title: str, subtitle: str) -> Path:
    """Write the page of an inference: the largest bleeds first, after what failed.

    Args:
        folder: That ``write_case`` was given, with the names of the entries.
        entries: Those of all cases, in any order; what is not known of one is left out.
        title: Heading.
        subtitle: One line: what ran.

    Returns:
        The page.

    Raises:
        OutputError: The folder cannot be written.
        PlansError: A file of ``write_case`` has been altered.
    """
    ordered = sorted(entries, key=lambda entry: (not entry.error, -_volume_ml(entry), entry.name))
    return page.write(
        folder,
        title=title,
        subtitle=subtitle,
        sections=[Section("summary", "Summary", _summary(ordered))],
        columns=(
            Column("volume", "Volume, mL", 2, "of all that was found"),
            Column("lesions", "Lesions", 0, "pieces that do not touch"),
            Column("largest", "Largest, mL", 2, "of the largest lesion"),
            Column("doubt", "Doubt", 3, "how much the networks disagree"),
            Column("seconds", "Seconds", 1),
            Column("note", "Notes"),
        ),
        rows=[_row(entry) for entry in ordered],
        cards=[_card(entry, read_case(folder, entry.name)) for entry in ordered],
        order="Failures first, then the largest volume.",
    )


def _volume_ml(entry: Entry) -> float:
    return float(entry.facts.get("volume_ml") or 0.0)


def _warnings(entry: Entry) -> list[str]:
    return [str(warning) for warning in entry.facts.get("warnings") or ()]


def _flags(entry: Entry) -> tuple[str, ...]:
    if entry.error:
        return ("failed",)
    empty = ("nothing found",) if _volume_ml(entry) == 0 else ()
    return (*empty, *(("warnings",) if _warnings(entry) else ()))


def _seconds(entry: Entry) -> float | None:
    total = (entry.facts.get("seconds") or {}).get("total")
    return None if total is None else float(total)


def _summary(entries: Sequence[Entry]) -> Html:
    """How many, how large, how long, and what failed or was warned of."""
    done = [entry for entry in entries if not entry.error]
    with_bleed = [entry for entry in done if _volume_ml(entry) > 0]
    warned = sum(bool(_warnings(entry)) for entry in done)
    volumes = sorted(_volume_ml(entry) for entry in with_bleed)
    seconds = [s for entry in done if (s := _seconds(entry)) is not None]
    failures = [
        tag("li", tag("strong", entry.name), ": ", entry.error) for entry in entries if entry.error
    ]
    largest = f"largest {number(volumes[-1], 1)} mL" if volumes else ""
    return join(
        [
            page.tiles(
                page.tile("Scans", str(len(entries)), f"{len(failures)} failed"),
                page.tile("With something found", str(len(with_bleed)), largest),
                page.tile(
                    "Median volume found",
                    f"{number(_median(volumes), 1)} mL",
                    "of scans with something found",
                ),
                page.tile("Warnings", str(warned), "scans to look at with care" if warned else ""),
                page.tile(
                    "Time a scan",
                    f"{number(_median(sorted(seconds)), 1)} s",
                    f"median; {number(sum(seconds), 0)} s in all",
                ),
            ),
            tag("div", tag("h3", "Failed"), tag("ul", *failures), class_="alert")
            if failures
            else None,
        ]
    )


def _median(ordered: Sequence[float]) -> float | None:
    half = len(ordered) // 2
    if not ordered:
        return None
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _row(entry: Entry) -> Row:
    facts = entry.facts
    lesions = facts.get("lesions")
    return Row(
        entry.name,
        {
            "volume": facts.get("volume_ml"),
            "lesions": None if lesions is None else len(lesions),
            "largest": lesions[0]["volume_ml"] if lesions else None,
            "doubt": facts.get("doubt"),
            "seconds": _seconds(entry),
            "note": entry.error or "; ".join(_warnings(entry)),
        },
        _flags(entry),
    )


def _card(entry: Entry, shown: Shown | None) -> Card:
    facts = entry.facts
    if entry.error:
        return Card(entry.name, None, (), tag("p", entry.error, class_="alert"), ("failed",))
    lesions = facts.get("lesions") or ()
    figures = [
        ("Volume", f"{number(_volume_ml(entry), 2)} mL"),
        ("Lesions", str(len(lesions))),
    ]
    if facts.get("doubt") is not None:
        figures.append(("Doubt", number(float(facts["doubt"]), 3)))
    if (seconds := _seconds(entry)) is not None:
        figures.append(("Time", f"{number(seconds, 1)} s"))
    warnings = [tag("li", warning) for warning in _warnings(entry)]
    body = join(
        [
            tag("ul", *warnings, class_="alert") if warnings else None,
            _lesion_table(lesions) if lesions else None,
            tag(
                "details",
                tag("summary", "What ran, and how long it took"),
                _listing({**(facts.get("ran") or {}), "seconds": facts.get("seconds") or {}}),
            ),
        ]
    )
    return Card(entry.name, shown, figures, body, _flags(entry))


def _lesion_table(lesions: Sequence[Mapping[str, Any]]) -> Html:
    """The largest lesions; positions in words that need no axes."""
    several = len({lesion["label"] for lesion in lesions}) > 1
    rows = []
    for rank, lesion in enumerate(lesions[:_MOST_LESIONS], 1):
        low, high = lesion["box_mm"]
        extent = " × ".join(number(b - a, 0) for a, b in zip(low, high, strict=True))  # noqa: RUF001
        label = [str(lesion["label"])] if several else []
        rows.append(
            [
                str(rank),
                *label,
                number(lesion["volume_ml"], 2),
                extent,
                number(lesion["mean_hu"], 0),
                ", ".join(number(value, 0) for value in lesion["centroid_mm"]),
            ]
        )
    titles = [
        "Lesion",
        *(["Label"] if several else []),
        "Volume, mL",
        "Extent x, y, z, mm",
        "Mean HU",
        "Centre x, y, z, mm LPS",
    ]
    more = len(lesions) - _MOST_LESIONS
    return join(
        [
            page.plain_table(titles, rows),
            tag("p", f"and {more} smaller ones", class_="hint") if more > 0 else None,
        ]
    )


def _listing(facts: Mapping[str, Any]) -> Html:
    """Names and values of facts whose names only the code knows."""
    return tag(
        "dl",
        *(
            tag("div", tag("dt", key.replace("_", " ")), tag("dd", _words(v)))
            for key, v in facts.items()
        ),
        class_="listing",
    )


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_words(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_words(item) for item in value) or "none"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "unknown"
    return "none" if value is None else str(value)
