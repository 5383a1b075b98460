"The site: every notebook and public name is on it, every link leads somewhere, and a browser without network draws every chart"
from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from inspect import isclass, signature
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import nbfiles
import outputs
import pytest
from fastcore.docments import docments
from filelock import FileLock
from lab import ARGS, AXE, axe_lines, find_chromium, missing

import longlens

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools/docs"))

from book import Index, pages
from entries import entries
from markup import escaped, linked
from stage import public_names

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked=2'>"


def build(out: Path, root: Path) -> Path:
    "Run tools/docs/build.py in a process of its own"
    run = [sys.executable, ROOT / "tools/docs/build.py", "--root", root, "--out", out, "--work", out.with_name("work")]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (out.with_name("said")).write_text(done.stdout + done.stderr)
    return out


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The files that the site is made of, as they are now"
    copy = tmp_path_factory.mktemp("project")
    for name in ("settings.ini", "CHANGELOG.md", "CONTRIBUTING.md", "README.md", "LICENSE"): shutil.copy(ROOT / name, copy)
    for name in ("nbs", "docs", "benchmarks", "longlens"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.safetensors"))
    return copy


def digest(*folders: Path) -> str:
    "Of the names and contents of all files in there"
    found = hashlib.sha256((ROOT / "constraints.txt").read_bytes())
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
            found.update(path.relative_to(folder).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


@pytest.fixture(scope="session")
def site(project: Path) -> Path:
    "The site, built once for the tests that read its files and for those in a browser, which run apart"
    kept = ROOT / "build/tested-site"
    kept.parent.mkdir(exist_ok=True)
    with FileLock(f"{kept}.lock"):
        made = kept / digest(project, ROOT / "tools/docs")
        if not (made / "said").exists():  # written last
            shutil.rmtree(kept, ignore_errors=True)
            made.mkdir(parents=True)
            build(made / "out", project)
    return made / "out"


class Html(HTMLParser):
    "What a page points at, and what can be pointed at"

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.loads: list[str] = []
        self.unresolved: list[str] = []
        self.open: list[str] = []
        self.named = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        at = {name: value or "" for name, value in attrs}
        self.ids |= {at[name] for name in ("id", "name") if name in at}
        target = at.get("href") or at.get("src")
        if target and tag != "svg": (self.links if tag == "a" else self.loads).append(target)
        self.named = "xref" in at.get("class", "").split() and "a" not in self.open
        self.open.append(tag)

    def handle_data(self, data: str) -> None:
        if self.named: self.unresolved.append(data)
        self.named = False

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open: del self.open[len(self.open) - 1 - self.open[::-1].index(tag):]


@pytest.fixture(scope="session")
def parsed(site: Path) -> dict[Path, Html]:
    return {path: Html(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def test_navigation_is_as_the_theme_would_make_it() -> None:
    "The tree of one page, moved to another, is the tree that Furo makes for that one"
    from furo.navigation import get_navigation_tree
    from navigation import Navigation

    def tree(two: str, end: str, room: str, on: tuple[str, str]) -> str:    # on: what the lists of the room and of the end have
        title = '<p class="caption" role="heading"><span class="caption-text">Rooms</span></p>'
        entry = '<li class="toctree-l{}{}"><a class="{}reference internal" href="{}">{}</a>'
        now = [" current" if href == "#" else "" for href in (two, end)]
        link = ["current " if href == "#" else "" for href in (two, end)]
        one, other = entry.format(2, "", "", f"{room}one.html", "One"), entry.format(2, now[0], link[0], two, "Two &amp; 2")
        inside = f"{one}</li>{other}</li>"
        return (f"{title}\n<ul{on[0]}>{entry.format(1, now[0], '', f'{room}index.html', 'A room')}<ul{on[0]}>{inside}</ul></li></ul>"
                f"<ul{on[1]}>{entry.format(1, now[1], link[1], end, 'End')}</li></ul>")

    here = ' class="current"'
    trees = {"room/two.html": tree("#", "../end.html", "", (here, "")), "end.html": tree("room/two.html", "#", "room/", ("", here))}
    for page, html in trees.items():
        for other in trees: assert Navigation.read(html, page).of(other) == get_navigation_tree(trees[other]), (page, other)


def test_builds_without_a_warning(site: Path) -> None:
    said = site.with_name("said").read_text()
    assert "WARNING" not in said and "ERROR" not in said, said


def test_every_link_leads_somewhere(site: Path, parsed: dict[Path, Html]) -> None:
    wrong = []
    for path, html in parsed.items():
        for target in [*html.links, *html.loads]:
            if re.match(r"https://|mailto:|data:", target): continue
            file, _, anchor = target.partition("#")
            to = (path.parent / unquote(file.partition("?")[0])).resolve() if file else path
            if to.is_dir(): to /= "index.html"
            known = parsed[to].ids if to in parsed else set()
            lost = not to.is_file() or (anchor and to in parsed and unquote(anchor) not in known)
            if lost: wrong.append(f"{path.relative_to(site)}: {target}")
        wrong += [f"{path.relative_to(site)}: {name} leads nowhere" for name in html.unresolved]
    assert not wrong, "\n".join(wrong)
    assert sum(len(html.links) for html in parsed.values()) > 5000


def test_formulas_are_formulas(parsed: dict[Path, Html], site: Path) -> None:
    "No mathematics is left as it was written, in backslashes and dollar signs"
    not_prose = r'<(span|div) class="math .*?</\1>|<(pre|code|script|style|title|svg)\b.*?</\2>|<[^>]*>'
    for path in parsed:
        text = re.sub(not_prose, "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.findall(r".*(?:\\[a-z]{2,}|\$[^\s$][^$\n]*\$).*", text), path.relative_to(site)


def test_nothing_is_loaded_from_elsewhere(parsed: dict[Path, Html], site: Path) -> None:
    outside = {load for html in parsed.values() for load in html.loads if re.match(r"[a-z]+:|//", load) and not load.startswith("data:")}
    assert outside == {load for load in outside if load.startswith(longlens_host())}, outside
    for css in site.rglob("*.css"): assert not re.findall(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", css.read_text(encoding="utf-8")), css


def longlens_host() -> str:    # <link rel=canonical>: says where a page is published, and loads nothing
    from stage import settings
    return settings(ROOT)["doc_host"]


def test_every_notebook_has_a_page(project: Path, site: Path, parsed: dict[Path, Html]) -> None:
    reached = {(path.parent / unquote(link.partition("#")[0])).resolve() for path, html in parsed.items() for link in html.links if link}
    for page in pages(project / "nbs"):
        assert site / f"{page.name}.html" in reached, f"{page.name} has no page that a link leads to"


def test_every_public_name_has_an_entry(parsed: dict[Path, Html], site: Path) -> None:
    ids = set().union(*(parsed[path].ids for path in (site / "reference").glob("*.html")))
    assert {f"longlens.{name}" for name in longlens.__all__} <= ids


def test_the_version_is_on_every_page(site: Path, parsed: dict[Path, Html]) -> None:
    for path in parsed: assert f"longlens {longlens.__version__}" in path.read_text(encoding="utf-8"), path


def test_entries_agree_with_the_objects() -> None:
    "Names, signatures and docments, read from the notebooks without an import, are those of the imported functions"
    index = Index(pages(ROOT / "nbs"), public_names(ROOT))
    compared = 0
    for name, where in public_names(ROOT).items():
        found = index.find(name)
        assert found, f"{name} is exported by no notebook"
        real, entry = getattr(import_module(f"longlens.{where}"), name), index.whole(found[0])
        if isclass(real) and "__init__" not in vars(real): continue    # from a base, or from torch
        names = [n for n in signature(real).parameters if n != "self"]
        assert [p.name.lstrip("*") for p in entry.parameters] == names, name
        said = docments(real)
        for parameter in entry.parameters:
            theirs = said.get(parameter.name.lstrip("*")) if not parameter.name.startswith("*") else None
            if theirs is not None: assert parameter.text.split() == theirs.split(), (name, parameter.name)
            compared += theirs is not None
    assert compared > 100


# one notebook that has everything

EVERYTHING = '''#| export
@dataclass
class Thing(Base):
    "A *thing* with `code` and <b>"
    size: int = 3    # how large, in <tokens>
    _hidden: int = 0
    made: list = field(default_factory=list)    # what it made

    def grow(
        self,
        by: int = 1,    # steps
        *names: str,    # what they are called
        # said above
        fast: bool = False,
    ) -> Thing:         # itself
        "Grow"

LIMIT = 3    # at most
def _private(): pass
def with_many(a, b: int, /, c="x", *, d: float = 1e-4): "Does `grow`"
'''


def test_entries_of_a_cell() -> None:
    thing, limit, many = entries(EVERYTHING, "longlens.x")
    assert thing.signature == "(size: int = 3, made: list = ...)"
    assert [p.text for p in thing.parameters] == ["how large, in <tokens>", "what it made"]
    (grow,) = thing.members
    assert (grow.name, grow.kind, grow.returned) == ("Thing.grow", "method", "itself")
    assert grow.signature == "(by: int = 1, *names: str, fast: bool = False) -> Thing"
    assert [p.text for p in grow.parameters] == ["steps", "what they are called", "said above"]
    assert (limit.kind, limit.doc) == ("data", "at most")
    assert many.signature == "(a, b: int, /, c='x', *, d: float = 0.0001)"
    assert entries("def broken(") == [] and entries("%magic\n1") == []
    assert entries("@patch\ndef more(self: Thing, x): 'Adds'", "m")[0].name == "Thing.more"


def test_text_becomes_markup_that_says_the_same() -> None:
    assert escaped("a *b* <i> `x*y` d_head $3") == r"a \*b\* \<i\> `x*y` d\_head \$3"
    index = Index(pages(ROOT / "nbs"), public_names(ROOT))
    assert linked("see `capture()` and `layer`", index) == "see {py:obj}`capture() <longlens.capture>` and `layer`"
    kept = "## `capture`\n\n```python\n`capture`\n```\n\n[`capture`](x.md)"
    assert linked(kept, index) == kept
    assert "<longlens.Report.load>" in linked("`Report.load()`", index)
    assert linked("`longlens.report`", index) == "[`longlens.report`](/00_report.md)"
    assert "LongModel.prefill" in {m.name for m in index.whole(index.find("LongModel")[0]).members}, "inherited"


def cell(kind: str, source: str, *outs: dict[str, Any]) -> nbfiles.Cell:
    more = {"outputs": list(outs), "execution_count": None} if kind == "code" else {}
    return {"cell_type": kind, "id": "a", "metadata": {}, "source": source.splitlines(keepends=True), **more}


def result(**data: Any) -> dict[str, Any]:
    kinds = {"html": "text/html", "text": "text/plain", "png": "image/png", "md": "text/markdown",
             "chart": outputs.CHART, "widget": outputs.WIDGET}
    return {"output_type": "execute_result", "metadata": {}, "execution_count": None, "data": {kinds[k]: v for k, v in data.items()}}


def bars(n: int) -> dict[str, Any]:
    return {"data": {"values": []}, "datasets": {"d": [{"a": i % 7, "b": i} for i in range(n)]}, "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
            "mark": "point", "encoding": {"x": {"field": "a", "type": "quantitative"}}, "title": HOSTILE} | {"data": {"name": "d"}}


def model(kind: str, **state: Any) -> dict[str, Any]: return {"kind": kind, "state": state}


CLICKER = '''export default { render({ model, el }) {
  const button = document.createElement("button");
  const say = () => { button.textContent = `${model.get("n")} of ${new Float32Array(model.get("data").buffer).length}`; };
  button.onclick = () => { model.set("n", model.get("n") + 1); model.save_changes(); };
  model.on("change:n", say); say(); el.append(button);
} };'''
WIDGETS = {"view": "widget-0", "models": {
    "widget-0": model("VBox", children=[f"IPY_MODEL_widget-{i}" for i in range(1, 8)], layout="IPY_MODEL_widget-8"),
    "widget-1": model("IntSlider", description="depth", min=0, max=9, step=1, value=4),
    "widget-2": model("Dropdown", description="layer", _options_labels=["one", "two"], index=1),
    "widget-3": model("Any", spec=bars(4)),
    "widget-4": model("Any", _esm=CLICKER, n=1) | {"buffers": [{"path": ["data"], "data": "AAAAAAAAgD8=", "encoding": "base64"}]},
    "widget-5": model("Label", value=HOSTILE),
    "widget-6": model("Tab", titles=["first"], children=["IPY_MODEL_widget-5"], selected_index=0),
    "widget-7": model("SomethingNew", value=3),
    "widget-8": model("Layout", width="90%"),
}}


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The site of a project with everything that can stand in a notebook, and much that should not"
    root = tmp_path_factory.mktemp("small")
    for name in ("settings.ini",): (root / name).write_text((ROOT / name).read_text())
    for name, cells in {
        "index": [cell("markdown", "# small\n\n> A *site*"), cell("markdown", "See [the rest](new/01_all.ipynb#widgets) and `thing()`.")],
        "new/01_all": [
            cell("code", "#| default_exp all"), cell("markdown", "# All\n\n> of it"), cell("code", EVERYTHING),
            cell("code", "#| hide\nsecret()"),
            cell("code", "x", {"output_type": "stream", "name": "stdout", "text": ["\x1b[31mred\x1b[0m ```\n", HOSTILE]},
                 {"output_type": "stream", "name": "stderr", "text": ["noise"]}),
            cell("code", "#| export\ndef thing(a): 'One `LIMIT`'", result(html='<table border="1"><tr><td>1</td></tr></table>', text="no")),
            cell("code", "chart", result(chart=bars(5), png="AA==")), cell("code", "many", result(chart=bars(4000))),
            cell("markdown", "# Widgets\n\nA formula: $a_{ij} = \\frac{1}{2}$\n\n```python\n[not](a_link.ipynb)\n```"),
            cell("code", "widget", result(widget=WIDGETS, text="no")),
            cell("code", "shown", result(md="## Shown\n\n`text`")),
            cell("code", "1/0", {"output_type": "error", "ename": "ZeroDivisionError", "evalue": HOSTILE, "traceback": []})],
        "new/02_empty": [], "new/03_untitled": [cell("code", "1 +")],
    }.items():
        (root / "nbs" / name).parent.mkdir(parents=True, exist_ok=True)
        nbfiles.write({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}, root / f"nbs/{name}.ipynb")
    (root / "longlens").mkdir()
    (root / "longlens/__init__.pyi").write_text("from .all import thing as thing\nfrom .nowhere import lost as lost\n")
    return build(root / "site/out", root)


def test_a_notebook_with_everything(small: Path) -> None:
    text = (small / "new/01_all.html").read_text(encoding="utf-8")
    assert "secret" not in text and "noise" not in text and "\x1b" not in text and HOSTILE not in text
    assert text.count("<h1>") == 1 and "Shown" in text and "red ```" in text
    assert 'href="../reference/more.html#longlens.thing"' in (small / "new/01_all.html").read_text() or "longlens.all.thing" in text
    assert "no notebook exports it" in (small / "reference/more.html").read_text()
    for name in ("new/02_empty", "new/03_untitled"): assert (small / f"{name}.html").exists()
    assert 'href="new/01_all.html#widgets"' in (small / "index.html").read_text()
    icon = re.search(r'<link rel="shortcut icon" href="([^"?]+)', (small / "index.html").read_text())
    assert icon and (small / icon[1]).is_file()    # without one, browsers ask for a file that is not there


def test_stored_charts_and_widgets() -> None:
    "What tools/execute.py puts into a notebook"
    import altair as alt
    import anywidget
    import ipywidgets
    import polars as pl
    import traitlets

    class Own(anywidget.AnyWidget):
        _esm = "export default {}"
        data = traitlets.Bytes(b"abc").tag(sync=True)

    chart = alt.Chart(pl.DataFrame({"x": [1 / 3]})).mark_bar().encode(x="x")
    box = ipywidgets.VBox([ipywidgets.IntSlider(value=3), Own(), alt.JupyterChart(chart)])
    stored = outputs.with_widget({outputs.VIEW: {"model_id": box.model_id}, "text/plain": "VBox"})
    assert outputs.VIEW not in stored and stored["text/plain"] == "VBox"
    state = stored[outputs.WIDGET]
    kinds = {name: one["kind"] for name, one in state["models"].items()}
    children = [c.removeprefix("IPY_MODEL_") for c in state["models"][state["view"]]["state"]["children"]]
    assert [kinds[c] for c in children] == ["IntSlider", "Any", "Any"]
    assert state["models"][children[1]]["buffers"][0]["data"] == "YWJj"
    assert "_esm" not in state["models"][children[2]]["state"] and state["models"][children[2]]["state"]["spec"]["mark"]["type"] == "bar"
    with alt.renderers.enable("html"): html = chart._repr_mimebundle_()
    assert outputs.chart_of(html[0] if isinstance(html, tuple) else html)["mark"] == {"type": "bar"}
    assert outputs.chart_of({"text/html": "<b>altair-viz-</b>})({]"}) is outputs.chart_of({}) is None
    assert outputs.with_widget({outputs.VIEW: {"model_id": "gone"}, "text/plain": "x"}) == {"text/plain": "x"}

    before = alt.renderers._plugins["png"] if hasattr(alt.renderers, "_plugins") else None
    try:
        outputs.store_charts()
        with alt.renderers.enable("png"): data, _ = chart._repr_mimebundle_()
        assert data["image/png"] and next(iter(data[outputs.CHART]["datasets"].values())) == [{"x": 0.3333333}]
    finally:
        if before is not None: alt.renderers.register("png", before)


def made_of(state: dict[str, Any]) -> dict[str, set[Any]]:
    "What a widget consists of, whatever text it shows: controls by name, titles of tabs, classes, scripts"
    models = [(m["kind"], m["state"]) for m in state["models"].values()]
    return {"controls": {(kind, s["description"]) for kind, s in models if s.get("description")},
            "tabs": {title for _, s in models for title in s.get("titles", [])},
            "classes": {name for _, s in models for name in s.get("_dom_classes", [])},
            "scripts": {s["_esm"] for _, s in models if "_esm" in s},
            "styles": {s["value"] for _, s in models if str(s.get("value")).startswith("<style>")}}


def test_stored_workbenches_are_what_the_code_shows() -> None:
    "A workbench that is stored in a notebook is not older than its controls: where it is, run tools/execute.py on that notebook"
    stored = {}
    for page in pages(ROOT / "nbs"):
        for data in (out.get("data", {}) for c in page.cells if c["cell_type"] == "code" for out in c["outputs"]):
            if "longlens workbench" in "".join(data.get("text/plain", "")): stored[page.name] = made_of(data[outputs.WIDGET])
    assert {"tutorials/00_ten_minutes", "apps/18_workbench"} <= {*stored}
    lm = longlens.load()
    app = longlens.explore(lm, longlens.needle_context(lm, 300, 40, wording="facts", n_keys=3, seed=1))
    state = outputs.widget_state({"model_id": app.model_id})
    assert state is not None
    fresh = made_of(state)
    assert ("Button", "Ask") in fresh["controls"] and len(fresh["scripts"]) > 1
    old = {name: sorted(part for part in fresh if fresh[part] != mine[part]) for name, mine in stored.items()}
    assert {name: parts for name, parts in old.items() if parts} == {}


# in a browser


@pytest.fixture(scope="session")
def playwright() -> Any:
    if why := missing("playwright"): pytest.skip(why)
    return importlib.import_module("playwright.async_api")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: pass


def served(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]: yield from served(site)


@pytest.fixture(scope="session")
def small_address(small: Path) -> Iterator[str]: yield from served(small)


LOOK = '''() => {
const scrolls = (e) => /auto|scroll/.test(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth + 1;
// the right edge of a chart is outside a box that hides it, and nothing in between scrolls and says so
const lost = (marks) => {
  for (let e = marks, right = marks.getBoundingClientRect().right; (e = e.parentElement) && e.matches("article *");) {
    if (right <= e.getBoundingClientRect().right + 1) continue;
    if (scrolls(e)) return !(e.previousElementSibling?.matches(".cue") && e.tabIndex === 0);
    if (getComputedStyle(e).overflowX !== "visible") return true;
  }
  return marks.getBoundingClientRect().right > innerWidth;
};
const letters = (svg) => [...svg.querySelectorAll("text")].filter((t) => t.checkVisibility() && t.getAttribute("font-size"))
  .map((t) => parseFloat(t.getAttribute("font-size")) * svg.getBoundingClientRect().width / svg.width.baseVal.value);
return {
  charts: document.querySelectorAll("[data-chart][data-drawn]").length,
  widgets: document.querySelectorAll("[data-widget][data-drawn]").length,
  empty: [...document.querySelectorAll("[data-chart]")].filter((c) => !c.querySelector("canvas.marks, svg.marks :is(path, text)")).length,
  formulas: document.querySelectorAll(".math").length,
  set: document.querySelectorAll(".math mjx-container").length, wrong: document.querySelectorAll("[data-mjx-error]").length,
  cut: [...document.querySelectorAll(".live :is(svg, canvas).marks")].filter(lost).length,
  cues: document.querySelectorAll(".cue").length,
  tiny: Math.min(12, ...[...document.querySelectorAll(".live svg.fitted")].flatMap(letters)),
  unwrapped: [...document.querySelectorAll("div.output pre")].filter((p) => p.scrollWidth > p.clientWidth + 1
    && !/[\u2500-\u257f]/.test(p.textContent)).length,
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth, title: document.title,
}}'''
DRAWN = '''() => !document.querySelector("[data-chart]:not([data-drawn]), [data-widget]:not([data-drawn])")
  && [...document.querySelectorAll(".math")].every((m) => m.querySelector("mjx-container"))'''


async def visit(context: Any, where: str) -> dict[str, Any]:
    "Open a page, wait until it has drawn itself, and say what is on it"
    tab = await context.new_page()
    wrong: list[str] = []
    tab.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda e: wrong.append(str(e)))
    tab.on("response", lambda r: wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    try:
        await tab.goto(where)
        await tab.wait_for_function(DRAWN, timeout=60_000)
        seen = await tab.evaluate(LOOK)
    finally: await tab.close()
    return {**seen, "console": wrong}


async def opened(playwright: Any, then: Any, **how: Any) -> tuple[Any, list[str]]:
    "Do something with a browser context from which nothing leaves the machine; what it gave, and the requests that tried"
    outside: list[str] = []
    async with playwright.async_playwright() as p:
        browser = await p.chromium.launch(executable_path=find_chromium(), headless=True, args=ARGS)
        context = await browser.new_context(**{"viewport": {"width": 1400, "height": 900}, **how})
        context.on("request", lambda r: outside.append(r.url) if not re.match(r"http://127\.0\.0\.1|file:|data:|blob:", r.url) else None)
        await context.route(re.compile(r"^https?://(?!127\.0\.0\.1)"), lambda route: route.abort())
        got = await then(context)
        await browser.close()
    return got, outside


def expected(page: Any) -> int:
    "Charts that a notebook shows"
    shown = [c for c in page.cells if c["cell_type"] == "code" and "hide" not in nbfiles.directives(c)]
    return sum(outputs.chart_of(out.get("data", {})) is not None for c in shown for out in c["outputs"])


def pages_draw_themselves(names: list[str], playwright: Any, project: Path, address: str) -> None:
    "Open pages, and look at what is on them"
    async def all_pages(context: Any) -> list[dict[str, Any]]:
        few = asyncio.Semaphore(3)

        async def one(name: str) -> dict[str, Any]:
            async with few: return await visit(context, f"{address}/{name}")
        return await asyncio.gather(*map(one, names))
    seen, outside = asyncio.run(opened(playwright, all_pages))
    found = dict(zip(names, seen, strict=True))
    assert outside == []
    assert {name: one["console"] for name, one in found.items() if one["console"]} == {}
    charts = {name: expected(page) for page in pages(project / "nbs") if (name := f"{page.name}.html") in names}
    assert {name: one["charts"] for name, one in found.items() if one["charts"]} == {name: n for name, n in charts.items() if n}
    assert sum(charts.values()) > 5, "these pages have hardly a chart"
    assert {name for name, one in found.items() if one["empty"] or one["wrong"]} == set()
    if (page := "tutorials/04_collapse.html") in names: assert found[page]["formulas"] > 0
    assert {name: one["wide"] for name, one in found.items() if one["wide"] > 0} == {}, "pages that scroll sideways"
    assert {name: one["cut"] for name, one in found.items() if one["cut"]} == {}, "charts that are cut off, and nothing says so"
    assert {name: one["tiny"] for name, one in found.items() if one["tiny"] < 8.9} == {}, "charts with letters too small to read"
    assert {name: one["unwrapped"] for name, one in found.items() if one["unwrapped"]} == {}, "printed text that is cut off"


def page_names(site: Path) -> tuple[list[str], list[str]]:
    "Pages that are opened each time: tutorials, contents, and every twelfth of the rest; and those left to `make slow`"
    names = sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html"))
    first = [n for n in names if n.startswith("tutorials/") or n.endswith("index.html")]
    rest = [n for n in names if n not in first]
    return sorted([*first, *rest[::12]]), [n for i, n in enumerate(rest) if i % 12]


# a class is what processes share out (--dist loadscope)

@pytest.mark.browser
class TestPages0:
    def test_draw_themselves(self, playwright: Any, project: Path, site: Path, address: str) -> None:
        pages_draw_themselves(page_names(site)[0][::2], playwright, project, address)


@pytest.mark.browser
class TestPages1:
    def test_draw_themselves(self, playwright: Any, project: Path, site: Path, address: str) -> None:
        pages_draw_themselves(page_names(site)[0][1::2], playwright, project, address)


@pytest.mark.browser
@pytest.mark.slow
def test_all_other_pages_draw_themselves(playwright: Any, project: Path, site: Path, address: str) -> None:
    "Every page of the site that is not opened each time"
    pages_draw_themselves(page_names(site)[1], playwright, project, address)


@pytest.mark.browser
def test_narrow_dark_and_from_files(playwright: Any, site: Path) -> None:
    "From the file system, as a phone shows it: nothing is wider than the screen, or cut off, and the search finds something"
    names = ["index.html", "tutorials/01_sinks.html", "tutorials/04_collapse.html", "probes/02_remedies.html", "apps/18_workbench.html",
             "reference/probes.html", "measure/01_statistics.html", "benchmarks.html"]

    async def look(context: Any) -> tuple[list[dict[str, Any]], int]:
        seen = [await visit(context, (site / name).as_uri()) for name in names]
        tab = await context.new_page()
        await tab.goto((site / "search.html").as_uri() + "?q=sink")
        await tab.wait_for_selector("#search-results li:nth-child(6) a")    # results come in one after the other
        return seen, await tab.locator("#search-results li").count()
    (seen, results), outside = asyncio.run(opened(playwright, look, color_scheme="dark", viewport={"width": 390, "height": 844}))
    assert outside == [] and results > 5
    assert [one["console"] for one in seen] == [[]] * len(names)
    for trouble in ("wide", "cut", "unwrapped"): assert [one[trouble] for one in seen] == [0] * len(names), trouble
    assert min(one["tiny"] for one in seen) >= 8.9 and sum(one["cues"] for one in seen) > 3


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(playwright: Any, address: str, scheme: str) -> None:
    "Names, roles and contrast, on pages of each kind: the first, charts, a widget, an API page"
    from axe_playwright_python.async_playwright import Axe
    names = {"light": ["index.html", "reference/prompts.html"], "dark": ["charts/11_paths.html", "apps/18_workbench.html"]}[scheme]

    async def look(context: Any) -> list[str]:
        found = []
        for name in names:
            tab = await context.new_page()
            await tab.goto(f"{address}/{name}")
            await tab.wait_for_function(DRAWN)
            found += [f"{name}: {line}" for line in axe_lines((await Axe().run(tab, options=AXE)).response)]
            await tab.close()
        return found
    found, _ = asyncio.run(opened(playwright, look, color_scheme=scheme))
    assert not found, "\n".join(found)


@pytest.mark.browser
def test_widgets_without_a_kernel(playwright: Any, small_address: str) -> None:
    async def look(context: Any) -> dict[str, Any]:
        seen = await visit(context, f"{small_address}/new/01_all.html")
        tab = await context.new_page()
        await tab.goto(f"{small_address}/new/01_all.html")
        await tab.wait_for_function(DRAWN)
        widget = tab.locator("[data-widget]")
        own = widget.locator("button").first
        before = await own.inner_text()
        await own.click()
        controls = "[...document.querySelectorAll('[data-widget] :is(input, select)')]"
        return {**seen, "before": before, "after": await own.inner_text(), "hacked": await tab.evaluate("window.hacked"),
                "disabled": await tab.evaluate(f"{controls}.every((c) => c.disabled) && {controls}.length"),
                "text": await widget.inner_text(), "inside": await widget.locator("svg.marks").count(),
                "kinds": await tab.evaluate("[...document.querySelectorAll('[data-drawn]')].map((c) => c.dataset.drawn)")}
    got, outside = asyncio.run(opened(playwright, look))
    assert outside == [] and got["console"] == [] and got["hacked"] is None
    assert (got["before"], got["after"]) == ("1 of 2", "2 of 2")
    assert got["charts"] == 2 and got["widgets"] == 1 and got["inside"] == 1 and {"svg", "canvas", "widget"} <= {*got["kinds"]}
    assert got["disabled"] == 3 and "depth" in got["text"] and "two" in got["text"] and HOSTILE in got["text"]
    assert "its controls work in Jupyter" in got["text"]


def test_settings_of_the_site_are_json(site: Path) -> None:
    "The look of charts is what report pages have"
    from longlens.charts.page import PAGE
    line = (site / "_static/vega.js").read_text(encoding="utf-8").rstrip().splitlines()[-1]
    assert json.loads(line.removeprefix("window.longlensPage = ").removesuffix(";")) == PAGE
