"""The page: what is said of all cases, a table of them, and each with its pictures.

It is whole without scripts; these sort, filter, and open a case in the viewer. Styles and scripts
lie beside it, so that it opens from a disk, and it may fetch nothing from anywhere else.
"""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ichseg.files import replacing
from ichseg.report.case_list import Card, Column, Row, listing
from ichseg.report.html import Html, tag

ASSETS = Path(__file__).parent / "assets"
FILE = "index.html"
NOTICE = "For research, not for diagnosis."
_POLICY = (
    "default-src 'none'; script-src 'self' file:; style-src 'self' file: 'unsafe-inline'; "
    "img-src 'self' file: data: blob:; connect-src data: blob:; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page.

    Attributes:
        key: Of its link.
        title: Heading.
        body: What it says.
    """

    key: str
    title: str
    body: Html


def write(
    folder: Path,
    *,
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    columns: Sequence[Column],
    rows: Sequence[Row],
    cards: Sequence[Card],
    order: str,
    labels: Sequence[str] = (),
) -> Path:
    """Write ``index.html`` and what it needs beside it.

    Args:
        folder: That has the cases' files.
        title: Heading.
        subtitle: One line below it.
        sections: Before the cases.
        columns: Of the table, after the case's name.
        rows: Of the table, in the order in which they stand at first.
        cards: In the same order.
        order: Says what that is.
        labels: Names for the legend, where there are several.

    Returns:
        The page.

    Raises:
        OutputError: The folder cannot be written.
    """
    cases = Section("cases", "Cases", listing(columns, rows, cards, order, labels))
    everything = [*sections, cases]
    links = [tag("a", s.title, href=f"#{s.key}") for s in everything]
    body = tag(
        "body",
        tag(
            "header",
            tag("div", tag("h1", title), tag("p", subtitle, class_="subtitle"), class_="heading"),
            tag(
                "nav",
                *links,
                tag(
                    "button",
                    "Theme",
                    id="theme",
                    type="button",
                    title="light, dark, or as the system",
                ),
                tag("button", "Print", id="print", type="button"),
            ),
            tag(
                "p",
                tag("strong", NOTICE),
                " Made by software that is not a medical device.",
                class_="notice",
            ),
        ),
        tag("main", *(_section(s) for s in everything)),
        tag(
            "footer",
            tag(
                "p",
                NOTICE,
                " Made by ichseg. The viewer is NiiVue, ",
                tag("a", "licences", href="assets/niivue-LICENSES.txt"),
                ".",
            ),
        ),
        Html((ASSETS / "viewer.html").read_text(encoding="utf-8")),
        tag("script", Html(""), src="assets/report.js"),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="robots", content="noindex"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", title),
        tag("link", rel="icon", href="data:,"),
        tag("link", rel="stylesheet", href="assets/report.css"),
    )
    _write_assets(folder / "assets")
    page = folder / FILE
    with replacing(page, suffix=".html") as temporary:
        temporary.write_text(
            f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n", encoding="utf-8"
        )
    return page


def tile(title: str, value: str, note: str = "", *, more: Html | None = None) -> Html:
    """A figure of the summary, large."""
    return tag(
        "div",
        tag("p", title, class_="tile-title"),
        tag("p", value, class_="tile-value"),
        more,
        tag("p", note, class_="tile-note") if note else None,
        class_="tile",
    )


def tiles(*children: Html) -> Html:
    """Tiles side by side."""
    return tag("div", *children, class_="tiles")


def plain_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    """A small table that needs no sorting; the first column is text, the others are numbers."""
    return tag(
        "div",
        tag(
            "table",
            tag("thead", tag("tr", *(tag("th", title, scope="col") for title in titles))),
            tag("tbody", *(tag("tr", *(tag("td", cell) for cell in row)) for row in rows)),
            class_="plain",
        ),
        class_="scroll",
    )


def _section(section: Section) -> Html:
    return tag("section", tag("h2", section.title), section.body, id=section.key)


def _write_assets(folder: Path) -> None:
    for name in ("report.css", "report.js", "niivue-LICENSES.txt"):
        with replacing(folder / name) as temporary:
            shutil.copyfile(ASSETS / name, temporary)
    with (
        gzip.open(ASSETS / "niivue.umd.js.gz") as packed,
        replacing(folder / "niivue.umd.js") as temporary,
        temporary.open("wb") as script,
    ):
        shutil.copyfileobj(packed, script)
