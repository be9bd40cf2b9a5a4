"""The frame of every page: text stays text, and unknown numbers are dashes."""

import jinja2
import pytest
from helpers.pages import Page
from hypothesis import given
from hypothesis import strategies as st

from ichseg.report import page
from ichseg.report.case_files import Shown
from ichseg.report.page import Card, CaseList, Column, Row

SHOWN = Shown(
    name="n", slug="n", is_ct=True, masks=("prediction", "reference"), slices=(1, 2),
    present=("", "prediction"), largest_slice=2, first_slice=0, all_slices=3, panel_px=(20, 10),
    merged=(1, 2, 2), window=(80.0, 40.0),
)  # fmt: skip


TEMPLATE = page.environment().get_template("page.html")


def read(cases, **said):
    return Page(TEMPLATE.render(cases=cases, **{"title": "t", "subtitle": "s"} | said))


@given(*[st.text()] * 7)
def test_any_text_comes_back_as_it_was(title, name, flag, text, hint, label, order):
    cases = CaseList(
        columns=[Column("a", title, hint=hint or "hint")],
        rows=[Row(name, {"a": text}, (flag,))],
        cards=[Card(name, SHOWN, None, (flag,))],
        order=order,
        labels=[label],
    )
    found = read(cases, title=title, subtitle=label)
    empty = read(CaseList([Column("a", "")], [Row("", {})], [Card("", SHOWN, None)], ""))
    for_flags_and_labels = ("button", "span", "i")
    assert [tag for tag, _ in found.elements if tag not in for_flags_and_labels] == [
        tag for tag, _ in empty.elements if tag not in for_flags_and_labels
    ]
    (card,) = found.cards
    assert card["data-name"] == name
    assert found.rows == [["Case", title], [name, text]]
    row = next(a for a in found.with_tag("tr") if "data-flags" in a)
    assert (row["data-name"], row["data-flags"]) == (name, flag)
    assert [a["data-value"] for tag, a in found.elements if "data-value" in a] == [name, text]
    buttons = found.with_tag("button")
    assert [a["data-flag"] for a in buttons if "data-flag" in a] == [flag]
    assert any(a.get("title") == (hint or "hint") for a in buttons)
    for each in (title, name, flag, text, label, order):
        assert each in found.text


def test_values_that_are_unknown_are_dashes_and_sort_as_such():
    rows = [Row("x", {"a": value}) for value in (None, float("nan"), float("inf"), -1.0)]
    found = read(CaseList([Column("a", "A", 2)], rows, [], ""))
    assert [row[1] for row in found.rows[1:]] == ["–", "–", "–", "−1.00"]  # noqa: RUF001
    sorted_by = [a["data-value"] for a in found.with_tag("td")]
    assert sorted_by == ["", "", "", "-1.0"]


def test_flags_count_cases_and_not_rows():
    rows = [Row("a", {}, ("missed",)), Row("a", {}, ("missed",)), Row("b", {}, ("missed", "x"))]
    assert CaseList([], rows, [], "").flags == [("missed", 2), ("x", 1)]


def test_panels_of_a_strip_stand_at_their_heights():
    found = read(CaseList([], [], [Card("a", SHOWN, None)], ""))
    styles = [a["style"] for a in found.with_tag("img")]
    assert styles == [f"aspect-ratio:20/10;object-position:0 {at:.4f}%" for at in (0, 100)]
    assert [a["data-slice"] for a in found.with_tag("button") if "data-slice" in a] == ["1", "2"]
    assert found.cards[0]["data-window"] == "80 40"


def test_slices_are_counted_from_1_for_people():
    found = read(CaseList([], [], [Card("a", SHOWN, None)], ""))
    titles = [a["title"] for a in found.with_tag("button") if "data-slice" in a]
    assert titles == ["slice 2 of 3", "slice 3 of 3"]
    assert found.cards[0]["data-slices"] == "3"


def test_a_pair_is_opened_side_by_side():
    found = read(CaseList([], [], [Card("a", SHOWN, None, pair=("n", "m"))], ""))
    assert found.cards[0]["data-pair"] == "n m"
    assert "Open side by side" in found.text


def test_a_name_that_is_not_given_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="'subtitle' is undefined"):
        TEMPLATE.render(title="t", cases=None)
