"""The cases of a page: a table to sort and filter, and a card with pictures for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ichseg.report.html import Html, join, tag

_NTH = ("first", "second", "third")  # colours of a mask, as in ``montage.COLOURS``
_SHOWN_AT_FIRST = 8  # cases with pictures; the rest on demand


@dataclass(frozen=True, slots=True)
class Shown:
    """What the page needs to know of a case's pictures and volumes.

    Attributes:
        name: Of the case.
        slug: Of its files.
        is_ct: Whether window presets in HU make sense.
        masks: ``prediction``, ``reference``.
        slices: Numbers of the slices in the strip, from the lowest, counted from 0.
        present: Of each of these, the masks that have anything in it, with spaces between.
        largest_slice: Number of the slice with most of the masks; where the viewer opens.
        first_slice: Number of the lowest slice that the viewer has.
        all_slices: How many the scan has.
        panel_px: Width and height of one slice in the strip.
        merged: Voxels made one for the viewer, along ``(z, y, x)``.
        window: Width and level of the pictures.
    """

    name: str
    slug: str
    is_ct: bool
    masks: tuple[str, ...]
    slices: tuple[int, ...]
    present: tuple[str, ...]
    largest_slice: int
    first_slice: int
    all_slices: int
    panel_px: tuple[int, int]
    merged: tuple[int, int, int]
    window: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table.

    Attributes:
        key: Of the value in each row.
        title: Heading.
        places: Decimals of a number; None for text.
        hint: What it means.
    """

    key: str
    title: str
    places: int | None = None
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        name: Of the case.
        values: By column; None where there is none.
        flags: What to filter by, such as ``missed``.
    """

    name: str
    values: Mapping[str, str | float | None]
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Card:
    """A case with its pictures.

    Attributes:
        name: Of the case.
        shown: Its pictures, or None if there are none.
        figures: Name and value of what stands beside its name.
        body: What stands below the pictures.
        flags: Such as ``missed``.
    """

    name: str
    shown: Shown | None
    figures: Sequence[tuple[str, str]]
    body: Html | None = None
    flags: tuple[str, ...] = ()


def number(value: float | None, places: int) -> str:
    """A number for people; an en dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"  # noqa: RUF001
    return f"{value:.{places}f}".replace("-", "\N{MINUS SIGN}")


def listing(
    columns: Sequence[Column],
    rows: Sequence[Row],
    cards: Sequence[Card],
    order: str,
    labels: Sequence[str] = (),
) -> Html:
    """Filters, a table, and a card for each case.

    Args:
        columns: After the case's name.
        rows: In the order in which they stand at first.
        cards: In the same order.
        order: Says what that is.
        labels: Names for the legend, where there are several.
    """
    flags = sorted({flag for row in rows for flag in row.flags})
    chips = [
        tag(
            "button",
            f"{flag} ({len({row.name for row in rows if flag in row.flags})})",
            type="button",
            class_="chip",
            data_flag=flag,
            aria_pressed="false",
        )
        for flag in flags
    ]
    slugs = {card.name: card.shown.slug for card in cards if card.shown is not None}
    heads = [Column("name", "Case"), *columns]
    table = tag(
        "table",
        tag("thead", tag("tr", *(_head(column) for column in heads))),
        tag("tbody", *(_row(row, columns, slugs.get(row.name)) for row in rows)),
        id="table",
    )
    return join(
        [
            tag(
                "div",
                tag(
                    "input",
                    type="search",
                    id="filter",
                    placeholder="Find a case",
                    aria_label="Find a case",
                ),
                *chips,
                tag("span", f"{len(cards)} cases", id="count", aria_live="polite"),
                class_="filters",
            ),
            tag("p", order, " A click on a heading sorts; on a case, opens it.", class_="hint"),
            tag("div", table, class_="scroll tall"),
            _legend(cards, labels),
            tag("div", *(_card(card) for card in cards), id="cards", data_step=_SHOWN_AT_FIRST),
            tag(
                "p",
                tag("button", "Show more", id="more", type="button", hidden=True),
                class_="more",
            ),
        ]
    )


def _legend(cards: Sequence[Card], labels: Sequence[str]) -> Html:
    """What the outlines are; with several labels, the colours of each."""
    masks = {mask for card in cards if card.shown is not None for mask in card.shown.masks}
    keys = []
    for mask, title in (("reference", "reference, dashed"), ("prediction", "found")):
        if mask not in masks:
            continue
        colours = [
            join([tag("i", class_=f"key {mask} {_NTH[i % len(_NTH)]}"), label, " "])
            for i, label in enumerate(labels)
        ]
        keys.append(tag("span", *(colours or [tag("i", class_=f"key {mask}")]), f" {title}"))
    return tag(
        "p",
        *keys,
        tag("span", "seen from the feet: the patient’s right is on the left"),  # noqa: RUF001
        class_="legend",
    )


def _head(column: Column) -> Html:
    return tag(
        "th",
        tag("button", column.title, type="button", title=column.hint or None),
        scope="col",
        class_=None if column.places is None else "number",
        aria_sort="none",
    )


def _row(row: Row, columns: Sequence[Column], slug: str | None) -> Html:
    name = tag("button", row.name, type="button", class_="open") if slug else row.name
    cells = [tag("th", name, scope="row", data_value=row.name)]
    for column in columns:
        value = row.values.get(column.key)
        if column.places is None:
            cells.append(
                tag("td", "" if value is None else str(value), data_value=str(value or ""))
            )
        else:
            known = None if value is None else float(value)
            sorted_by = "" if known is None or math.isnan(known) else repr(known)
            cells.append(
                tag("td", number(known, column.places), class_="number", data_value=sorted_by)
            )
    return tag("tr", *cells, data_slug=slug, data_name=row.name, data_flags=" ".join(row.flags))


def _card(card: Card) -> Html:
    shown = card.shown
    figures = [tag("div", tag("dt", name), tag("dd", value)) for name, value in card.figures]
    pictures, button = None, None
    attributes: dict[str, str | int | None] = {}
    if shown is not None:
        pictures = tag("div", *_panels(shown), class_="panels")
        button = tag("button", "Open in viewer", type="button", class_="open")
        attributes = {
            "data_slug": shown.slug,
            "data_ct": int(shown.is_ct),
            "data_masks": " ".join(shown.masks),
            "data_first": shown.first_slice,
            "data_start": shown.largest_slice,
            "data_merged": " ".join(map(str, shown.merged)),
            "data_window": " ".join(f"{value:g}" for value in shown.window),
        }
    flags = [tag("span", flag, class_="flag") for flag in card.flags]
    return tag(
        "article",
        tag("div", tag("h3", card.name), *flags, button, class_="card-head"),
        tag("dl", *figures, class_="figures"),
        pictures,
        card.body,
        class_="card",
        data_name=card.name,
        **attributes,
    )


def _panels(shown: Shown) -> list[Html]:
    """Each slice of the strip as a picture of its own, so that they flow with the page's width."""
    width, height = shown.panel_px
    last = max(1, len(shown.slices) - 1)
    return [
        tag(
            "button",
            tag(
                "img",
                src=f"cases/{shown.slug}.jpg",
                loading="lazy",
                width=width,
                height=height,
                alt=f"slice {at} of {shown.name}",
                style=f"aspect-ratio:{width}/{height};object-position:0 {100 * i / last:.4f}%",
            ),
            tag(
                "span",
                str(at),
                *(tag("i", class_=f"key {name}") for name in shown.present[i].split()),
                class_="slice",
            ),
            tag("span", "R", class_="right"),
            type="button",
            class_="panel",
            data_slice=at,
            title=f"slice {at} of 0..{shown.all_slices - 1}",
        )
        for i, at in enumerate(shown.slices)
    ]
