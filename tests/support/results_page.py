"""The results page, read as its rows and headings."""

import re
from html.parser import HTMLParser

from tvaprune.stages.report import report


class Reader(HTMLParser):
    """The page's headings, its rows as lists of cells, and whatever could fetch or run."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.rows, self.fetches, self.opened = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link", "path", "rect", "circle", "img"):
            self.opened.append(tag)
        if tag in ("script", "iframe", "object", "embed", "form", "base"):
            self.fetches.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "xlink:href", "action", "data") and not value.startswith("data:"):
                self.fetches.append(value)
            if name.startswith("on") or (name == "style" and "url(" in value):
                self.fetches.append(name)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag in ("h1", "h2"):
            self.headings.append("")

    def handle_endtag(self, tag):
        if tag not in ("path", "rect", "circle"):
            assert self.opened.pop() == tag

    def handle_data(self, data):
        inside = self.opened[-1] if self.opened else ""
        if inside in ("th", "td"):
            self.rows[-1][-1] += data
        if inside in ("h1", "h2"):
            self.headings[-1] += data
        if inside == "style" and re.search(r"url\(|@import|@font-face", data):
            self.fetches.append("style")


def page(*folders, **options):
    path = report(folders, **options)
    return Reader(path.read_text(encoding="utf-8")), path.read_text(encoding="utf-8")
