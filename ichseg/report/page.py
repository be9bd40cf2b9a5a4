"""The page: what is said of all cases, a table of them, and each with its pictures.

It is whole without scripts; these sort, filter, and open a case in the viewer. Styles and scripts
lie beside it, so that it opens from a disk, and it may fetch nothing from anywhere else. What it
looks like stands in ``templates/``, where ``page.html`` is the frame of every page.
"""

from __future__ import annotations

import gzip
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from ichseg.files import replacing
from ichseg.report import PAGE_FILE
from ichseg.report.case_files import Shown

ASSETS, TEMPLATES = (Path(__file__).parent / name for name in ("assets", "templates"))


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table.

    Attributes:
        key: The name of the column's value in each row.
        title: The heading.
        places: How many decimals its numbers have; None for text.
        hint: What the numbers mean, for the pointer on the heading.
    """

    key: str
    title: str
    places: int | None = None
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        name: The case's name.
        values: The values by the keys of their columns; None where there is none.
        flags: Words to filter by, such as ``missed``.
    """

    name: str
    values: Mapping[str, str | float | None]
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Card:
    """A case with its pictures.

    Attributes:
        name: The case's name.
        shown: What is known of its pictures, or None if it has none.
        about: Whatever the page's own template says of the case.
        flags: Words beside the name, such as ``missed``.
        pair: The slugs of two cases that the viewer shows side by side, this one among them; empty
            where it is shown alone.
    """

    name: str
    shown: Shown | None
    about: object
    flags: tuple[str, ...] = ()
    pair: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CaseList:
    """The cases of a page: a table to sort and filter, and a card for each.

    Attributes:
        columns: The columns of the table after the case's name.
        rows: The lines of the table, in the order in which they stand at first.
        cards: The cases with their pictures, in the same order.
        order: A sentence that says what order that is.
        labels: The names of the labels for the legend, where there are several.
    """

    columns: Sequence[Column]
    rows: Sequence[Row]
    cards: Sequence[Card]
    order: str
    labels: Sequence[str] = ()

    @property
    def flags(self) -> list[tuple[str, int]]:
        """All flags of the rows, in alphabetical order, with the number of cases that have each."""
        flagged = {(row.name, flag) for row in self.rows for flag in row.flags}
        return sorted(Counter(flag for _, flag in flagged).items())

    @property
    def slugs(self) -> dict[str, str]:
        """The slugs of those cases that have pictures, by their names."""
        return {card.name: card.shown.slug for card in self.cards if card.shown is not None}

    @property
    def masks(self) -> set[str]:
        """The names of all masks that the pictures show."""
        return {mask for card in self.cards if card.shown for mask in card.shown.masks}


def environment(*folders: Path) -> jinja2.Environment:
    """Templates of these folders and of this package, in which text cannot become markup.

    What a template prints is escaped in ``.html`` files; a name that nobody gave is an error.
    """
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, TEMPLATES]),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= {"number": number, "sorted_by": _sorted_by}
    return found


def write(
    folder: Path,
    template: jinja2.Template,
    *,
    title: str,
    subtitle: str,
    cases: CaseList,
    **said: object,
) -> Path:
    """Write ``index.html`` and what it needs beside it.

    Args:
        folder: The folder that has the cases' files.
        template: A template that extends ``page.html``.
        title: The heading.
        subtitle: One line below it.
        cases: The cases, which every page lists alike.
        **said: What else the template prints.

    Returns:
        The path of the page.

    Raises:
        OutputError: The folder cannot be written.
    """
    text = template.render(title=title, subtitle=subtitle, cases=cases, **said)
    _write_assets(folder / "assets")
    page = folder / PAGE_FILE
    with replacing(page, suffix=".html") as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return page


def number(value: float | None, places: int) -> str:
    """A number for people; an en dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"  # noqa: RUF001
    return f"{value:z.{places}f}".replace("-", "\N{MINUS SIGN}")


def _sorted_by(value: float | None) -> str:
    """What the script sorts a number by; nothing where none is shown."""
    return "" if value is None or not math.isfinite(value) else repr(float(value))


def _write_assets(folder: Path) -> None:
    for name in ("report.css", "pane.js", "viewer.js", "report.js", "niivue-LICENSES.txt"):
        with replacing(folder / name) as temporary:
            shutil.copyfile(ASSETS / name, temporary)
    with (
        gzip.open(ASSETS / "niivue.umd.js.gz") as packed,
        replacing(folder / "niivue.umd.js") as temporary,
        temporary.open("wb") as script,
    ):
        shutil.copyfileobj(packed, script)
