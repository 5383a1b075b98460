"How Sphinx builds the site; build.py calls it, and says where things are"
from __future__ import annotations

import os
import re
from datetime import date
from pathlib import Path
from typing import Any

from navigation import after_furo, before_furo
from objects import QuickPython
from stage import settings

HERE = Path(__file__).resolve().parent
about = settings(Path(os.environ["LONGLENS_ROOT"]))
project, author = about["title"], about["author"]
version = release = about["version"]
copyright = f"{date.today().year}, {author}"
extensions = ["myst_parser", "sphinx.ext.mathjax"]
source_suffix = {".md": "markdown"}
exclude_patterns: list[str] = []
suppress_warnings = [
    "ref.python",     # a public name has two entries: in the reference, and on the page of its module
    "myst.header",    # a notebook may go from its title to a third level
]

myst_enable_extensions = ["attrs_block", "attrs_inline", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 4
myst_update_mathjax = False
mathjax_path = "tex-svg.js"    # one file, fonts included: from the package sphinx-mathjax-offline
mathjax3_config = {"svg": {"fontCache": "global"}}

add_module_names = False
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
pygments_style, pygments_dark_style = "friendly", "native"

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = [str(HERE / "static"), os.environ["LONGLENS_STATIC"]]
html_css_files = ["site.css"]
html_js_files = [("reach.js", {"defer": "defer"})]
html_favicon = "static/favicon.svg"
html_theme_options = {"sidebar_hide_name": False, "navigation_with_keys": True}
html_copy_source = False
html_show_sphinx = False
html_baseurl = about["doc_host"] + about["doc_baseurl"]


def lines(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    "Each printed line is an element, so that it can be seen where one ends that had to be wrapped"
    printed = re.compile(r'(<div class="[^"]*\boutput\b[^"]*"><div class="highlight"><pre><span></span>)(.*?)\n?(?=</pre>)', re.DOTALL)
    context["body"] = printed.sub(lambda m: m[1] + "".join(f'<span class="line">{line}\n</span>' for line in m[2].split("\n")),
                                  context.get("body", ""))


def reachable(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    "What screen readers ask for and neither Sphinx nor the theme writes: levels of captions; a list of parameters is no glossary"
    for part in ("body", "furo_navigation_tree"):
        html = context.get(part) or ""
        html = html.replace('class="caption" role="heading">', 'class="caption" role="heading" aria-level="2">')
        context[part] = re.sub(r'(<span class="sig-paren">\(</span>\s*)<dl>', r'\1<dl role="presentation">', html)


def live(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    "Vega goes only to pages with charts, and the host of widgets to pages with widgets"
    body = context.get("body", "")
    drawn = "data-chart" in body or "data-widget" in body
    for name in ["vega.js", "charts.js"] * drawn + ["widgets.js"] * ("data-widget" in body): app.add_js_file(name, loading_method="defer")


def setup(app: Any) -> None:
    app.add_domain(QuickPython, override=True)
    app.connect("html-page-context", before_furo, priority=400)    # the theme's own has 500
    app.connect("html-page-context", after_furo, priority=600)
    app.connect("html-page-context", lines)
    app.connect("html-page-context", reachable, priority=700)    # after the tree of pages is there
    app.connect("html-page-context", live)
