"The report page: hostile text comes out harmless, nothing is loaded, and a browser draws every chart"
from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from lab import axe_violations

from longlens.charts import page as page_module
from longlens.charts.common import arrange, bars, head_map, layer_profile, length_curve, position_profile
from longlens.charts.page import page_html, write_page
from longlens.report import REPORTS, Report, Section

HOSTILE = [
    "<script>window.hacked = 1</script>", "</script><script>window.hacked = 2</script>", "<img src=x onerror='window.hacked=3'>",
    "\"><svg onload=window.hacked=4>", "' onmouseover='window.hacked=5", "</style><script>window.hacked=6</script>", "<!--<script>",
    "\x1b[31mred\x1b[0m", "\u202egnp.exe\u202c", "zero\u200bwidth", "line\u2028separator", "{{ 7*7 }} ${window.hacked=7}",
    "javascript:window.hacked=8", "]]><a href=http://evil.example/x>", "w" * 1_000_000, "\x00nul", "&lt;b&gt;", "</title></textarea>",
]


def frames() -> dict[str, pl.DataFrame]:
    n = 64
    grid = [(layer, head) for layer in range(4) for head in range(8)]
    heads = pl.DataFrame([{"layer": a, "head": b, "sink_mass": (3 * a + b) % 11 / 11} for a, b in grid])
    return {
        "heads": heads,
        "positions": pl.DataFrame([{"layer": a, "position": p, "alpha_mean": 1 / (p + 1)} for a in range(2) for p in range(n)]),
        "lengths": pl.concat([heads.with_columns(context_length=pl.lit(length)) for length in (64, 128, 256)]),
        "massive": pl.DataFrame({"layer": range(4), "value": [1.0, 400, 380, 3], "median": [0.2, 0.3, 0.3, 0.4]}),
        "tokens": pl.DataFrame([{"token": t, "position": i, "alpha": 1 / (i + 1)} for i, t in enumerate(HOSTILE)]),
    }


class HostileReport(Report):
    "Everything that can be text, is hostile"

    def findings(self) -> list[str]: return HOSTILE

    def sections(self) -> list[Section]:
        f, bad = self.frames, HOSTILE[0]
        marks = f["tokens"].head(6)
        two = arrange([head_map(f["heads"], "sink_mass", title=bad, unit=bad, threshold=0.5),
                       length_curve(f["lengths"].with_columns(kind=pl.lit(HOSTILE[2])), "sink_mass", by="kind", subtitle=bad)])
        return [Section("".join(HOSTILE), "\n\n".join(HOSTILE), two, f["tokens"]),
                Section(bad, bad, position_profile(f["positions"], "alpha_mean", marks=marks, log=True)),
                Section("bars", "", bars(f["tokens"], ["token", "position"], "alpha", title=HOSTILE[1]), f["heads"].rename({"layer": bad})),
                Section("layers", "", layer_profile(f["massive"], ["value", "median"], log=True, title=HOSTILE[3]))]


class LargeReport(Report):
    "One map of 80 layers by 128 heads"

    def sections(self) -> list[Section]: return [Section("All heads", "", head_map(self.table, "x", threshold=120), self.table)]


@pytest.fixture(scope="module")
def hostile() -> HostileReport:
    return HostileReport(frames(), {"model": HOSTILE[1], "lengths": [2048], "settings": {t[:60]: t for t in HOSTILE}})


@pytest.fixture(scope="module")
def page(hostile: HostileReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cells = [{"layer": i // 128, "head": i % 128, "x": float(i % 127)} for i in range(80 * 128)]
    large = LargeReport({"heads": pl.DataFrame(cells)})
    return write_page([hostile, large], tmp_path_factory.mktemp("page") / "index.html", title="".join(HOSTILE))


class Elements(HTMLParser):
    "The elements of a page, with their attributes, and the text of each kind"

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None: self.open.pop()

    def handle_data(self, data: str) -> None: self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


def test_hostile_text_is_text(page: Path) -> None:
    parsed = Elements(page.read_text(encoding="utf-8"))
    kinds = [tag for tag, _ in parsed.found]
    assert kinds.count("script") == 3, "Vega, the page's own, and the charts' data"
    assert not {"img", "svg", "iframe", "object", "textarea", "base", "form"} & {*kinds}
    assert all(not name.startswith("on") for _, attrs in parsed.found for name in attrs)
    assert HOSTILE[0] in parsed.texts["li"] and HOSTILE[0] in parsed.texts["td"]
    assert max(map(len, (t for k, all_ in parsed.texts.items() if k != "script" for t in all_))) < 20_000, "a word of a megabyte is cut"


def test_nothing_is_hidden(page: Path) -> None:
    text = re.sub(r"<script.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.S)
    assert not re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]", text)
    assert r"\u202egnp.exe" in text and r"\x1b[31mred" in text


def test_nothing_is_loaded(page: Path) -> None:
    parsed = Elements(page.read_text(encoding="utf-8"))
    loads = {(tag, name, value) for tag, attrs in parsed.found for name, value in attrs.items()
             if name in ("src", "href", "srcset", "action", "data", "poster", "style") and not (value or "").startswith("#")}
    assert loads == {("link", "href", "data:,")}
    assert not re.findall(r"url\(|@import", "".join(parsed.texts["style"]))
    specs = next(t for t in parsed.texts["script"] if t.startswith("[{"))
    assert not {"url", "href"} & {*re.findall(r'"(\w+)":', specs)}
    assert {d["spec"]["$schema"].startswith("https://vega.github.io/schema/") for d in json.loads(specs)} == {True}


def test_policy_forbids_everything_else(page: Path) -> None:
    rules = next(a["content"] for _, a in Elements(page.read_text(encoding="utf-8")).found if a.get("http-equiv"))
    assert rules and rules.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in rules and "http" not in rules and re.search(r"script-src [^;]*unsafe", rules) is None


def test_size_stays_near_that_of_vega(page: Path) -> None:
    assert page.stat().st_size < 2.5e6


def test_what_fails_leaves_the_old_page(hostile: HostileReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index.html"
    path.write_text("old")
    with pytest.raises(FileExistsError, match="overwrite=True"): write_page(hostile, path)

    def broken(*_: Any) -> None: raise OSError("no space left")
    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no space left"): write_page(hostile, path, overwrite=True)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["index.html"]


def test_replaced_when_asked(tmp_path: Path) -> None:
    plain = Report({"heads": frames()["heads"]}, {"model": "toy"})
    path = write_page(plain, tmp_path / "index.html")
    write_page(plain, path, title="second", overwrite=True)
    assert "<h1>second</h1>" in path.read_text() and [p.name for p in tmp_path.iterdir()] == ["index.html"]


def test_odd_tables(tmp_path: Path) -> None:
    columns = {"none": [None, None], "list": [[1, 2], []], "nan": [float("nan"), float("inf")], "when": [None, "2026"], "yes": [True, None]}
    frame = pl.DataFrame(columns)
    text = page_html([Report({"odd": frame, "empty": frame.head(0)}, {"model": None, "nothing": {}, "lengths": []})], "odd")
    assert "[1, 2]" in text and "nan" in text and "yes" in text and "longlens" in text


def test_script_cannot_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    "Whatever vl-convert bundles one day"
    monkeypatch.setattr("vl_convert.javascript_bundle", lambda snippet: 'window.vegaEmbed = "</script><!--"')
    page_module.vega_script.cache_clear()
    try: assert "</script" not in page_module.vega_script() and "<!--" not in page_module.vega_script()
    finally: page_module.vega_script.cache_clear()


@pytest.fixture(params=["light", "dark"])
def opened(request: pytest.FixtureRequest, browser: Any, page: Path) -> Iterator[Any]:
    context = browser.new_context(color_scheme=request.param, viewport={"width": 1200, "height": 900})
    tab = context.new_page()
    tab.set_default_timeout(60_000)
    tab.wrong, tab.outside = [], []
    tab.on("console", lambda m: tab.wrong.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda e: tab.wrong.append(str(e)))
    tab.on("request", lambda r: tab.outside.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)
    context.route(re.compile("^https?:"), lambda route: route.abort())
    tab.goto(page.as_uri())
    tab.evaluate("document.querySelectorAll('details.report').forEach(d => { d.open = true; })")    # they are folded
    tab.wait_for_function("() => [...document.querySelectorAll('[data-chart]')].every(c => c.dataset.drawn)")
    yield tab
    context.close()


@pytest.mark.browser
def test_in_a_browser(opened: Any) -> None:
    charts = opened.locator("[data-chart]")
    assert charts.count() == 6
    for i in range(charts.count()):
        kind = charts.nth(i).get_attribute("data-drawn")
        if kind == "svg": assert charts.nth(i).locator("svg.marks path, svg.marks text").count() > 20
        else: assert charts.nth(i).locator("canvas").evaluate(
            "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size") > 20
    for i in range(charts.count()):    # every tooltip's text is text
        box = charts.nth(i).bounding_box()
        charts.nth(i).scroll_into_view_if_needed()
        for x, y in ((0.2, 0.4), (0.3, 0.6), (0.15, 0.5)):
            charts.nth(i).hover(position={"x": box["width"] * x, "y": box["height"] * y}, force=True)
    assert opened.evaluate("window.hacked") is None
    assert opened.locator("img, iframe, #vg-tooltip-element script").count() == 0
    assert opened.wrong == [] and opened.outside == []


@pytest.mark.browser
def test_a_hostile_token_in_a_tooltip(opened: Any) -> None:
    opened.locator("[data-chart='3'] svg.marks g.mark-rect.role-mark path").nth(2).hover()
    tip = opened.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    assert "<img src=x onerror" in tip.inner_text() and tip.locator("img").count() == 0
    assert opened.evaluate("window.hacked") is None


@pytest.mark.browser
def test_ink_can_be_read(opened: Any) -> None:
    "Text and background of page and charts differ enough, in both colour schemes (WCAG: 4.5)"
    ratio = opened.evaluate("""() => {
        const linear = x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
        const lum = c => { const v = c.match(/[\\d.]+/g).map(x => linear(x / 255)); return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
        const back = lum(getComputedStyle(document.body).backgroundColor);
        const inks = [...document.querySelectorAll("svg.marks text, p, td, th, a, summary")].map(
            e => getComputedStyle(e)[e instanceof SVGElement ? "fill" : "color"]).filter(c => c !== "none").map(lum);
        return Math.min(...inks.map(i => (Math.max(i, back) + .05) / (Math.min(i, back) + .05)));
    }""")
    assert ratio > 4.5


@pytest.mark.browser
def test_axe_finds_nothing(opened: Any) -> None:
    "Names, roles and contrast of summary, sections, tables and charts"
    dark = opened.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert axe_violations(opened, contrast_only=dark) == []


@pytest.mark.browser
def test_a_small_screen_needs_no_sideways_scrolling(opened: Any) -> None:
    opened.set_viewport_size({"width": 800, "height": 900})
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


PLACES = """() => [...document.querySelectorAll("figure.pairs .chart")].map(c => {
    const box = c.getBoundingClientRect(), svg = c.querySelector("svg.marks");
    return {x: box.x, y: box.y, scale: svg ? svg.getBoundingClientRect().width / svg.width.baseVal.value : 1}; })"""


@pytest.mark.browser
@pytest.mark.parametrize(("width", "beside"), [(1600, True), (1280, True), (980, True), (940, False), (400, False)])
def test_pairs_stay_pairs_until_there_is_no_room(opened: Any, width: int, beside: bool) -> None:
    "Two charts that belong together are in one line, or one below the other; neither is drawn at less than three quarters"
    opened.set_viewport_size({"width": width, "height": 900})
    left, right = opened.evaluate(PLACES)
    assert (left["y"] == right["y"] and left["x"] < right["x"]) if beside else (left["x"] == right["x"] and left["y"] < right["y"])
    assert min(left["scale"], right["scale"]) >= 0.74
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.browser
def test_links_lead_from_the_summary_to_their_report(opened: Any) -> None:
    "A verdict of each report, each beside a link; the rest is where the link leads, folded until then"
    assert opened.locator(".summary .row").count() == 2
    assert opened.locator(".summary .row").first.locator(".verdict").count() == 1
    opened.evaluate("document.querySelectorAll('details.report').forEach(d => { d.open = false; })")
    link = opened.locator(".summary a").first
    part = opened.locator(link.get_attribute("href"))
    assert part.locator("h2").inner_text() == link.inner_text() == "Hostile report"
    rest = part.locator("details.found")
    assert rest.count() == 1 and rest.locator("li").count() == len(HOSTILE) and not rest.is_visible()
    link.click()
    assert rest.is_visible() and not rest.locator("li").last.is_visible()
    rest.locator("summary").click()
    assert rest.locator("li").last.is_visible()


@pytest.mark.browser
def test_a_canvas_follows_the_colour_scheme(opened: Any) -> None:
    canvas = opened.locator("[data-drawn='canvas'] canvas")
    ink = "c => { const d = c.getContext('2d').getImageData(0, 0, c.width, 60).data; let s = 0, n = 0; "\
          "for (let i = 0; i < d.length; i += 4) if (d[i + 3] > 200) { s += d[i]; n++; } return s / n; }"
    dark = opened.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    before = canvas.evaluate(ink)
    opened.emulate_media(color_scheme="light" if dark else "dark")
    opened.wait_for_timeout(1500)
    after = canvas.evaluate(ink)
    assert abs(before - after) > 20 and (before > after) == dark    # light ink where the page is dark


def test_every_report_has_a_title_that_a_reader_understands() -> None:
    import pkgutil

    import longlens
    for module in pkgutil.walk_packages(longlens.__path__, "longlens."): import_module(module.name)
    own = {name: kind for name, kind in REPORTS.items() if kind.__module__.startswith("longlens.") and kind is not Report}
    assert {"SinkReport", "MiddleReport", "TracebackReport", "PromptReading", "GainReport", "TracePage"} <= own.keys()
    untitled = [name for name, kind in own.items() if not kind.title]
    assert not untitled
    assert len({kind.title for kind in own.values() if kind.title}) == len(own) - len(untitled)
