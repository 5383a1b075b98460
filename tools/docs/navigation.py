"""The tree of all pages that stands beside each of them, made once.

Furo asks Sphinx for the whole tree on every page, and reads what it gets as HTML: with 300 pages that is half of the time of a
build. All that differs is where links start from, and which entries lead to the page.
"""
from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from typing import Any

from bs4 import BeautifulSoup, Tag
from furo.navigation import get_navigation_tree
from sphinx.util.osutil import relative_uri

_MARK = re.compile(r' (?:checked|class)="@@(?P<attribute>open|list) (?P<numbers>[^@]*)@@"|@@(?P<kind>\w+) (?P<what>[^@]*)@@')


@dataclass
class Navigation:
    "The tree, with marks in place of what differs from page to page"
    marked: str
    paths: dict[str, list[int]]  # page -> numbers of its entry and of those around it, the outermost first

    @classmethod
    def read(cls, html: str, page: str) -> Navigation:    # page: an address such as charts/06_page.html
        "From the tree as Sphinx makes it for a page"
        soup, paths = BeautifulSoup(get_navigation_tree(html), "html.parser"), dict[str, list[int]]()
        entries = soup.find_all("li")
        number = {id(entry): i for i, entry in enumerate(entries)}
        for i, entry in enumerate(entries):
            link: Any = entry.find("a")
            box: Any = entry.find("input", recursive=False)
            at = page if link["href"] == "#" else posixpath.normpath(posixpath.join(posixpath.dirname(page), link["href"]))
            around = [number[id(p)] for p in entry.parents if isinstance(p, Tag) and p.name == "li"]
            paths.setdefault(at, [*reversed(around), i])
            level, *others = [c for c in entry["class"] if not c.startswith("current")]
            entry["class"] = " ".join([f"{level}@@entry {i}@@", *others]) + f"@@page {i}@@"
            link["href"], link["class"] = f"@@href {at}@@", f"@@link {at}@@reference internal"
            if box is not None: box["checked"] = f"@@open {i}@@"
        for part in soup.find_all("ul"):
            inside = [number[id(entry)] for entry in part.find_all("li")]
            part["class"] = f"@@list {inside[0]} {inside[-1]}@@"
        return cls(str(soup), paths)

    def of(self, page: str) -> str:
        "The tree as it stands beside a page"
        path = self.paths.get(page, [])

        def put(m: re.Match[str]) -> str:
            if m["attribute"] == "open": return ' checked=""' if int(m["numbers"]) in path else ""
            if m["attribute"] == "list":
                first, last = map(int, m["numbers"].split())
                return ' class="current"' if any(first <= i <= last for i in path) else ""
            if m["kind"] == "href": return "#" if m["what"] == page else relative_uri(page, m["what"])
            if m["kind"] == "link": return "current " if m["what"] == page else ""
            if m["kind"] == "entry": return " current" if int(m["what"]) in path else ""
            return " current-page" if path[-1:] == [int(m["what"])] else ""
        return _MARK.sub(put, self.marked)


_made: dict[int, Navigation] = {}    # for each build in this process


def before_furo(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    "Make the tree for the first page, and leave nothing for the theme to make"
    if "toctree" not in context: return
    if id(app) not in _made:
        html = context["toctree"](collapse=False, titles_only=True, maxdepth=-1, includehidden=True)
        _made[id(app)] = Navigation.read(html, app.builder.get_target_uri(pagename))
    context["toctree"] = lambda **how: ""


def after_furo(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    "Put it where the theme's template looks"
    if id(app) in _made: context["furo_navigation_tree"] = _made[id(app)].of(app.builder.get_target_uri(pagename))
