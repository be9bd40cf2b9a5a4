"""Pages read back: their elements, their table and their cards."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Elements with their attributes, and the text of the tables' rows."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.rows, self.cards, self._inside, self.text = [], [], [], False, ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._inside = True
        if tag == "article":
            self.cards.append(attributes)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._inside = False

    def handle_data(self, data):
        self.text += data
        if self._inside:
            self.rows[-1][-1] += data

    @property
    def words(self):
        """The text as a browser runs it together."""
        return " ".join(self.text.split())

    def with_tag(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_in(folder):
    """The page in a folder."""
    return Page((folder / "index.html").read_text(encoding="utf-8"))
