"""Pages read back: their elements, their table and their cards."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Elements with their attributes, and the text of the table's rows."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.rows, self.cards, self._inside, self.text = [], [], [], False, ""
        self.feed(path.read_text(encoding="utf-8"))

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

    def with_tag(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]
