"""Markup in which text stays text."""

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from ichseg.report.html import Html, join, tag


class Parsed(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.data = [], {}, ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= dict(attrs)

    def handle_data(self, data):
        self.data += data


@given(st.text(), st.text())
def test_any_text_comes_back_as_it_was(inside, value):
    found = Parsed(tag("p", tag("b", "bold"), inside, title=value))
    assert found.tags == ["p", "b"]
    assert found.data == "bold" + inside
    assert found.attributes == {"title": value}


def test_markup_by_hand():
    assert tag("p", "a < b & c") == "<p>a &lt; b &amp; c</p>"
    assert tag("br") == "<br>"
    assert tag("input", data_value=0, hidden=True, min=None, checked=False, class_="x") == (
        '<input data-value="0" hidden class="x">'
    )
    assert join(["<", Html("<"), None, 3], between="&") == "&lt;&amp;<&amp;3"
