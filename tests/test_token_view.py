"The token view in a browser: fast at 100,000 tokens, faithful to every character, harmless, usable without a mouse"
from __future__ import annotations

import json
import random
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longlens.charts.page import as_json, policy, static, write_page
from longlens.charts.token_view import Shade, TextData, text_html, token_data, utf16, utf16_at
from longlens.charts.trace_view import trace_data, trace_page
from longlens.report import Report, Section
from longlens.text import visible

N = 100_000
HOSTILE = [
    "<script>window.hacked = 1</script>", "</script><script>window.hacked = 2</script>", "<img src=x onerror='window.hacked=3'>",
    "\"><svg onload=window.hacked=4>", "' onmouseover='window.hacked=5", "</style><script>window.hacked=6</script>", "<!--<script>",
    "\x1b[31mred\x1b[0m", "\u202egnp.exe\u202c", "zero\u200bwidth", "line\u2028separator", "${window.hacked=7}", "\ud83d", "\ude00\ud83d",
    "\x00nul\r\n",
    "&lt;b&gt;", "\u0301\u0301accent", "e" + "\u0301" * 3000, "", " ", "\n", "\u05e9\u05dc\u05d5\u05dd", "a😀b", "javascript:x",
]
TAGS = {*"DIV SPAN I BDI MARK BUTTON SELECT OPTION INPUT OUTPUT B P TABLE CAPTION THEAD TBODY TR TH TD".split()}
ANY = st.characters(codec="utf-16", categories=None) | st.sampled_from("\ud83d\ude00\n\t \u202e\u0301<&😀")
TOKENS = st.lists(st.text(ANY, max_size=12), min_size=1, max_size=30)


def many(n: int) -> list[str]:
    "A text of n tokens: words, ends of words, stops and new lines"
    r, words, ends = random.Random(0), "the of code for baker counts sacks gate reads nobody sign lamb with".split(), "ing ed s , .".split()
    return [w if (w := r.choice(words + ends)) in ends else ("\n" if r.random() < .01 else " ") + w for _ in range(n)]


@pytest.fixture(scope="module")
def large() -> TextData:
    r = np.random.default_rng(0)
    values = {"attention received": Shade(r.random(N) ** 30 + 1e-9, kind="log"), "score": r.normal(size=N), "position": np.arange(N)}
    spans = {"document": range(10_000, 60_000), "needle": range(50_000, 50_012), "question": range(N - 20, N)}
    return token_data(many(N), values, spans)


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    "Opens a page from its file, with no network; nothing may be loaded, and nothing said on the console"
    tabs = []

    def go(html: str | Path, scheme: str = "light", width: int = 1100) -> Any:
        path = html if isinstance(html, Path) else tmp_path / "page.html"
        if isinstance(html, str): path.write_text(framed(html), encoding="utf-8")
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        tab = context.new_page()
        tab.set_default_timeout(20_000)
        tab.wrong = []
        tab.on("console", lambda m: tab.wrong.append(m.text) if m.type in ("error", "warning") else None)
        tab.on("pageerror", lambda e: tab.wrong.append(str(e)))
        tab.on("request", lambda r: tab.wrong.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)
        tabs.append((context, tab))
        tab.goto(path.as_uri())
        tab.wait_for_selector(".ll-tokens[data-drawn]")
        return tab
    yield go
    for context, tab in tabs:
        assert tab.evaluate("window.hacked") is None and tab.wrong == []
        context.close()


def framed(fragment: str) -> str:
    "A page with a policy that lets only the fragment's own script run"
    scripts = re.findall(r'<script type="module">(.*?)</script>', fragment, re.S)
    return (f'<!DOCTYPE html><html><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy(scripts)}">'
            f'<meta name="color-scheme" content="light dark"></head><body>{fragment}</body></html>')


def until(tab: Any, said: str) -> None:
    "Waits for an expression; the policy of the page forbids what Playwright's own waiting does"
    end = time.monotonic() + 20
    while not tab.evaluate(said):
        assert time.monotonic() < end, said
        time.sleep(0.02)


VIEW = "document.querySelector('[data-texts]').view"


OVERFLOW = "Math.max(...[...document.querySelectorAll('.ll-line')].map((l) => l.scrollWidth - l.clientWidth))"    # pixels


def unit(tab: Any, u: int) -> Any: return tab.locator(f".ll-u[data-u='{u}']").first


def settled(tab: Any) -> None: until(tab, f"!{VIEW}.waiting")    # what was changed is drawn


def details(tab: Any) -> str: return tab.locator(".ll-details").inner_text()


@pytest.mark.browser
def test_100_000_tokens_are_there_at_once(open_page: Any, large: TextData) -> None:
    took, html = [], text_html(large)
    for _ in range(3):    # a machine that is busy with something else is so at times, and not all the time
        tab = open_page(html)
        until(tab, "performance.getEntriesByName('first-contentful-paint').length")
        painted = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        took.append(max(painted, int(tab.locator(".ll-tokens").get_attribute("data-drawn"))))
        if took[-1] < 1000: break
    assert min(took) < 1000, f"first paint and text after {took} ms"
    assert tab.evaluate(f"{VIEW}.block.children.length") < 100    # lines that are drawn, of thousands
    count = "document.querySelectorAll('.ll-view *').length"
    sizes = [tab.evaluate(count)]
    frames = tab.evaluate("""async () => {
        const view = document.querySelector(".ll-view"), times = [];
        for (let k = 1; k <= 40; k++) {
            const start = performance.now();
            view.scrollTop = view.scrollHeight * k / 40;
            await new Promise(requestAnimationFrame);
            await new Promise((done) => setTimeout(done, 0));
            times.push(performance.now() - start);
        }
        return times;
    }""")
    settled(tab)
    sizes.append(tab.evaluate(count))
    assert max(sizes) < 4000 and sorted(frames)[20] < 250, (sizes, frames)    # drawing takes 8 ms of each; the rest is waiting
    assert unit(tab, N - 1).is_visible()
    assert tab.evaluate(OVERFLOW) <= 0


@pytest.mark.browser
def test_links_of_a_token_among_100_000(open_page: Any, large: TextData) -> None:
    "Pointed at, asked of the kernel, and drawn: far from 300 ms, of which the kernel needs the rest (test_reading)"
    tab = open_page(text_html(large))
    tab.evaluate(f"() => {{ window.told = []; {VIEW}.settings.links = true; {VIEW}.tell = (news) => window.told.push(news); }}")
    tab.get_by_role("button", name="Go to needle").click()
    settled(tab)
    unit(tab, 50_005).hover()
    until(tab, "window.told.some((news) => news.hovered === 50005)")
    took = tab.evaluate(f"""async () => {{
        const units = [...Array(48).keys()].map((i) => 50000 + i), weights = units.map((_, i) => 1 / (i + 1)), times = [];
        for (let k = 0; k < 5; k++) {{
            const start = performance.now();
            {VIEW}.setLinks({{unit: 50005, to: [units, weights], from: [[50020], [.5]], note: "layer 2, head 0"}});
            {VIEW}.draw();
            times.push(performance.now() - start);
        }}
        return times;
    }}""")
    assert sorted(took)[2] < 150, took
    assert "is-to" in unit(tab, 50_000).get_attribute("class") and "is-from" in unit(tab, 50_020).get_attribute("class")
    assert "looks at (layer 2, head 0)" in details(tab) and tab.locator(".ll-link").count() == 9
    tab.locator(".ll-linked.is-from .ll-link").click()
    until(tab, f"{VIEW}.selected === 50020 && !{VIEW}.links")    # and its own are asked for
    until(tab, "window.told.some((news) => news.hovered === 50020)")


@pytest.mark.browser
def test_what_is_chosen_is_told_and_shown(open_page: Any, large: TextData) -> None:
    tab = open_page(text_html(large))
    tab.evaluate(f"() => {{ window.told = []; {VIEW}.tell = (news) => window.told.push(news); }}")
    tab.get_by_role("button", name="Go to needle").click()
    settled(tab)
    assert unit(tab, 50_000).is_visible() and "in needle" in " ".join(details(tab).split())
    unit(tab, 50_003).click()
    tab.locator(".ll-quantity").select_option("score")
    unit(tab, 50_009).click(modifiers=["Shift"])
    assert tab.evaluate("window.told") == [{"span": "needle"}, {"selected": 50_003, "selection": [50_003, 50_004]}, {"quantity": "score"},
                                           {"selected": 50_003, "selection": [50_003, 50_010]}]
    assert tab.locator(".ll-legend").inner_text().split()[1] == "0"
    value = np.frombuffer(large.quantities[1]["values"], np.float32)[50_009]
    settled(tab)
    unit(tab, 50_009).hover()
    assert f"score {float(value):.4g}" in " ".join(details(tab).split())
    assert "is-cold" in unit(tab, 50_009).get_attribute("class") or value > 0
    box = tab.locator(".ll-map").bounding_box()
    tab.mouse.click(box["x"] + 9, box["y"] + box["height"] * .9)
    until(tab, f"{VIEW}.lines.starts[{VIEW}.top] > {VIEW}.context.text.length * .85")


@pytest.mark.browser
def test_without_a_mouse(open_page: Any) -> None:
    tab = open_page(text_html(token_data(many(5000), {"alpha": np.arange(5000.)}, {"needle": range(900, 905)})))
    view = tab.get_by_role("listbox")
    view.focus()
    active = lambda: tab.evaluate("document.getElementById(document.querySelector('.ll-view').getAttribute('aria-activedescendant'))"
                                  "?.dataset.u")
    for key, at in zip("ArrowRight ArrowRight End ArrowRight ArrowLeft Home".split(), "0 1 4999 4999 4998 0".split(), strict=True):
        tab.keyboard.press(key)
        until(tab, f"{VIEW}.cursor === {at} && !{VIEW}.waiting")
        assert active() == at
    until(tab, f"{VIEW}.selected === 0")
    for key in ("ArrowDown", "PageDown"):
        before = tab.evaluate(f"{VIEW}.cursor")
        tab.keyboard.press(key)
        until(tab, f"{VIEW}.cursor > {before} + 3 && !{VIEW}.waiting")
    tab.keyboard.press("Enter")
    at = tab.evaluate(f"{VIEW}.selected")
    settled(tab)
    until(tab, f"document.querySelector('[role=status]').textContent.includes('position {at} of 5,000, alpha {at}')")
    option = unit(tab, at)
    assert [option.get_attribute(name) for name in ("role", "aria-selected", "aria-setsize")] == ["option", "true", "5000"]
    tab.keyboard.press("ArrowUp")
    until(tab, f"{VIEW}.cursor < {at}")
    tab.keyboard.press("Shift+ArrowRight")
    until(tab, f"{VIEW}.range !== null || {VIEW}.cursor === {at}")
    for _ in range(12):    # everything that can be focused shows that it is
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement === document.body || getComputedStyle(document.activeElement).outlineStyle === 'solid'")


@pytest.mark.browser
def test_search(open_page: Any) -> None:
    words = [f" word{i}" for i in range(3000)]
    words[10] = words[2500] = " A.c(*"
    tab = open_page(text_html(token_data(words)))
    tab.get_by_role("listbox").focus()
    tab.keyboard.press("/")
    tab.keyboard.type("a.C(*")
    tab.keyboard.press("Enter")
    found = tab.locator(".ll-found")
    settled(tab)
    assert found.inner_text() == "1 of 2" and tab.locator("mark.is-here").inner_text() == "A.c(*"
    tab.keyboard.press("Enter")
    assert found.inner_text() == "2 of 2"
    until(tab, f"{VIEW}.cursor === 2500 && !{VIEW}.waiting")
    assert tab.locator("mark.is-here").is_visible()
    tab.keyboard.press("Enter")
    assert found.inner_text() == "1 of 2"
    tab.get_by_role("button", name="Previous match").click()
    assert found.inner_text() == "2 of 2"
    tab.locator(".ll-search").fill("nowhere")
    tab.keyboard.press("Enter")
    assert found.inner_text() == "not found"
    tab.keyboard.press("Escape")
    assert tab.evaluate("document.activeElement.className") == "ll-view" and found.inner_text() == ""
    tab.keyboard.press("Control+f")
    assert tab.evaluate("document.activeElement.className") == "ll-search"


@pytest.mark.browser
def test_hostile_text_is_text(open_page: Any) -> None:
    values = {HOSTILE[0]: np.arange(len(HOSTILE)), HOSTILE[2]: np.ones(len(HOSTILE))}
    bad = token_data(HOSTILE, values, {HOSTILE[3]: (0, 3), HOSTILE[1]: (2, 9)}, label=HOSTILE[4], top=30)
    answer = [{"text": HOSTILE[2], "quantity": HOSTILE[2], "note": HOSTILE[5]}, {"text": HOSTILE[1]}]
    bad.settings.update(question=HOSTILE[0], answer=answer)
    tab = open_page(text_html(bad))
    for box in tab.locator(".ll-u[role=option]").all(): box.hover(force=True)
    tab.evaluate("document.querySelectorAll('.ll-tokens button').forEach((b) => b.click())")
    tab.locator(".ll-search").fill("<script>")
    tab.keyboard.press("Enter")
    settled(tab)
    assert set(tab.evaluate("[...document.querySelectorAll('.ll-tokens, .ll-tokens *')].map((e) => e.tagName)")) <= TAGS
    names = set(tab.evaluate("[...document.querySelectorAll('.ll-tokens *')].flatMap((e) => e.getAttributeNames())"))
    assert not [n for n in names if n.startswith("on") or n in ("href", "src", "srcdoc")]
    shown = tab.locator(".ll-view").inner_text()
    assert re.findall(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", shown) == []
    assert r"\u202egnp.exe\u202c" in shown and r"\ud83d\ude00\ud83d" in shown and "a😀b" in shown
    assert tab.evaluate(OVERFLOW) <= 0


@pytest.mark.browser
def test_ten_megabytes_of_one_word(open_page: Any) -> None:
    word = "w" * 10_000_000
    tab = open_page(text_html(token_data(["The", " ", word, " end"], {"alpha": [1, 2, 3, 4]}, top=3)))
    fold = tab.locator(".ll-fold")
    assert fold.inner_text() == "… 9,999,840 more characters"
    start = tab.evaluate("performance.now()")
    unit(tab, 3).click()
    unit(tab, 2).hover()
    settled(tab)
    assert "(10,000,000 characters)" in details(tab) and len(tab.locator(".ll-tokens").inner_text()) < 3000
    fold.click()
    until(tab, "document.querySelector('.ll-fold') === null || document.querySelector('.ll-fold').textContent.includes('9,995,840')")
    assert tab.evaluate("performance.now()") - start < 3000 and tab.evaluate("document.querySelectorAll('.ll-view *').length") < 4000
    for text in (word, "w " * 5_000_000):
        frame = pl.DataFrame({"start": [0, 5_000_000], "end": [5_000_000, 10_000_000], "score": [1.0, 2.0]})
        tab = open_page(text_html(trace_data(text, frame)))
        tab.get_by_role("listbox").focus()
        tab.keyboard.press("End")
        until(tab, f"{VIEW}.cursor === 1 && !{VIEW}.waiting")
        assert unit(tab, 1).is_visible() and tab.evaluate("document.querySelectorAll('.ll-view *').length") < 4000


@pytest.fixture(scope="module")
def bench(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    "A page with the module's functions, to try many small texts"
    path = tmp_path_factory.mktemp("bench") / "bench.html"
    script = static("tokens.js") + """
        Object.assign(window, {seen, visible, show: async (data) => {
            document.body.replaceChildren();
            const view = new TextView(document.body, readContext(data.context), {...data.settings, height: 400});
            view.setQuantities(data.quantities.map(readQuantity));
            view.setSpans(data.spans);
            await new Promise(requestAnimationFrame);
            await new Promise((done) => setTimeout(done, 0));
            view.resize(); view.draw();
            return view;
        }});"""
    path.write_text(f'<meta charset="utf-8"><style>{static("tokens.css")}</style><body></body><script type="module">{script}</script>')
    tab = browser.new_page(viewport={"width": 500, "height": 600})
    tab.goto(path.as_uri())
    tab.wait_for_function("window.show !== undefined")
    yield tab
    tab.close()


def signs(text: str) -> str:
    "What the view writes for a text, without what it adds before accents"
    from longlens.text import seen
    return seen(utf16(text).decode("utf-16-le", "surrogatepass"))


@pytest.mark.browser
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=TOKENS)
def test_every_character_of_every_token_is_shown(bench: Any, tokens: list[str]) -> None:
    data = token_data(tokens, {"alpha": np.arange(len(tokens))})
    lines = bench.evaluate("""async (json) => {
        const view = await show(JSON.parse(json)), lines = [...document.querySelectorAll(".ll-line")].map((e) => e.textContent);
        view.destroy();
        return [lines, document.querySelectorAll(".ll-line").length === view.lines.count];
    }""", as_json(data.page()))
    if any(unicodedata.category(c) == "Cn" for t in tokens for c in t): return    # the browser may know a newer Unicode
    shown, want = "".join(lines[0]).replace("◌", ""), signs(data.context["text"]).replace("◌", "")
    assert shown == want if lines[1] else want.startswith(shown), tokens


SCRIPTS = ("naïve café", "مرحبا بالعالم", "شاید می\u200cخواهم", "שלום עולם", "日本語です。", "한국어", "हिन्दी क्षत्रिय", "ไทยนี้",
           "Ελλάδα, Ещё", "e\u0301n\u0303o\u0302\u0323", "👨\u200d👩\u200d👧", "👍🏽", "🇫🇷🇪🇺",
           "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f", "❤️", "12 km²", " \n", "the cat")
WRITTEN = st.lists(st.sampled_from(SCRIPTS) | st.text(st.characters(codec="utf-8"), max_size=4), min_size=1, max_size=6).map("".join)


@pytest.fixture(scope="module")
def readers() -> dict[str, Any]:
    "What makes tokens of a text here: bytes, bytes in merges, pieces of words, letters"
    import longlens as ll
    from longlens.models.gguf import has_packaged
    more = {"SmolLM2": ll.load("smollm2")} if has_packaged("smollm2") else {}
    return {"needle-lm": ll.load("needle-lm"), "MiniLM": ll.load_encoder(), **more}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=WRITTEN, cut=st.integers(0, 30))
def test_joined_tokens_are_the_text(readers: dict[str, Any], text: str, cut: int) -> None:
    from longlens.models.tokens import Tokens, owned_characters
    for name, m in readers.items():
        try: t = m.tokens(text, allow_longer=True)
        except ValueError: continue    # a text of which the tokenizer leaves nothing
        real = (t.offsets[:, 0] < t.offsets[:, 1]).tolist()
        ends, at, joined = owned_characters(t.offsets).tolist(), 0, ""
        for (a, b), s, mine in zip(ends, t.strings, real, strict=True):
            if not mine: continue
            joined, at = joined + text[at:a] + s, b
        assert joined + text[at:] == text, name
        context = token_data(t).context
        names = [s for s, mine in zip(t.strings, real, strict=True) if not mine]
        assert len(context["text"]) == len(text) + sum(map(len, names)) and not context["empty"], name
        assert "".join(s for s, mine in zip(t.labels, real, strict=True) if not mine) == "".join(names)
        ids = t.ids[cut % len(t):]    # from anywhere, without the text
        whole = m.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
        assert "".join(Tokens(ids, tokenizer=m.tokenizer).strings) == whole, name


@pytest.mark.browser
def test_scripts_read_as_they_are_written(bench: Any, readers: dict[str, Any]) -> None:
    text = "naïve café 👨\u200d👩\u200d👧 end\nمرحبا بالعالم 42\nשלום Latin\n日本語"
    tokens = readers["needle-lm"].tokens(text, add_special_tokens=False)
    data = token_data(tokens, {"alpha": np.arange(len(tokens))})
    got = bench.evaluate("""async (json) => {
        const view = await show(JSON.parse(json)), all = (name) => [...document.querySelectorAll(name)], box = all(".ll-box")[0];
        const left = (text) => all(".ll-u").find((u) => u.textContent === text).getBoundingClientRect().x;
        const at = box.getBoundingClientRect(), hit = (x) => view.unitOf({target: box, clientX: at.x + x * at.width});
        const said = {lines: all(".ll-line").map((e) => e.textContent), dirs: all(".ll-line").map((e) => e.dir), hits: [hit(.1), hit(.9)],
            parts: box.dataset.stops, boxes: all(".ll-box").map((e) => e.textContent), mirrored: left("م") > left("ح"),
            options: all("[role=option]").length};
        view.destroy();
        return said;
    }""", as_json(data.page()))
    assert "".join(got["lines"]) == text.replace("\n", "⏎")
    assert got["dirs"] == ["ltr", "rtl", "rtl", "ltr"] and got["mirrored"]
    assert got["hits"] == [1, 2] and got["parts"] == "0 50 100" and "👨\u200d👩\u200d👧" in got["boxes"]
    assert got["options"] == len(tokens)


@pytest.mark.browser
def test_signs_are_those_of_python(bench: Any) -> None:
    "For all of Unicode that this Python knows, a few of the characters for private use"
    known = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in ("Cn", "Co") or ord(c) % 977 == 0]
    known = [c for c in known if unicodedata.category(c) != "Cn"]
    hidden = {ord(c): s for c in known if (s := signs(c)) != c}
    got = bench.evaluate("""(codes) => codes.map((c) => [c, seen(String.fromCodePoint(c)).replace(/^◌/, "")])
                            .filter(([c, s]) => s !== String.fromCodePoint(c))""", [ord(c) for c in known if c != "◌"])
    assert dict(got) == hidden


@pytest.mark.browser
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.text(st.characters(codec="utf-8") | st.sampled_from(" \n\u202e😀"), max_size=90), limit=st.integers(1, 80))
def test_labels_are_those_of_python(bench: Any, words: str, limit: int) -> None:
    if any(unicodedata.category(c) in ("Cn", "Mc", "Me", "Mn") for c in words): return    # Unicode grows; accents differ by a sign
    assert bench.evaluate("([text, limit]) => visible(text, limit)", [words, limit]) == visible(words, limit)


@given(words=st.text(st.characters(codec="utf-16", categories=None) | st.sampled_from("😀\ud83d\ude00a")), data=st.data())
def test_places_in_utf16(words: str, data: st.DataObject) -> None:
    a = data.draw(st.integers(0, len(words)))
    b = data.draw(st.integers(a, len(words)))
    i, j = (int(k) for k in utf16_at(words, [a, b]))
    assert utf16(words)[2 * i:2 * j] == utf16(words[a:b])


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_shade(open_page: Any, scheme: str) -> None:
    "Ink against the strongest shade of both colours, and what is written softly against the paper (WCAG: 4.5)"
    data = token_data([" hot", " cold", " none", " \n"], {"change": [1, -1, 0, np.nan]}, {"needle": (0, 1)})
    tab = open_page(text_html(data), scheme)
    tab.locator(".ll-search").fill("none")
    tab.keyboard.press("Enter")
    settled(tab)
    ratios = tab.evaluate("""() => {
        const pen = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d", {willReadFrequently: true});
        const lum = (...layers) => {
            layers.forEach((c) => { pen.fillStyle = c; pen.fillRect(0, 0, 1, 1); });
            const v = [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3).map((x) => x / 255);
            const [r, g, b] = v.map((x) => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
            return .2126 * r + .7152 * g + .0722 * b;
        };
        const paper = getComputedStyle(document.querySelector(".ll-tokens")).backgroundColor;
        const inked = [...document.querySelectorAll(".ll-u, .ll-note, .ll-ends span, mark, .ll-fact b, .ll-found")];
        return inked.map((e) => {
            const style = getComputedStyle(e), back = lum(paper, style.backgroundColor), ink = lum(style.color);
            return [(Math.max(ink, back) + .05) / (Math.min(ink, back) + .05), e.className || e.tagName];
        });
    }""")
    assert min(ratios)[0] > 4.5, min(ratios)


@pytest.mark.browser
def test_it_follows_the_theme_of_the_notebook(open_page: Any) -> None:
    tab = open_page(text_html(token_data([" a"], {"alpha": [1]})), "light")
    paper = "getComputedStyle(document.querySelector('.ll-tokens')).backgroundColor"
    light = tab.evaluate(paper)
    tab.evaluate("document.body.dataset.jpThemeLight = 'false'")
    dark = tab.evaluate(paper)
    tab.emulate_media(color_scheme="dark")
    tab.evaluate("document.body.dataset.jpThemeLight = 'true'")
    assert light != dark and tab.evaluate(paper) == light


class WithText(Report):
    "A text among the sections of a page"

    def sections(self) -> list[Section]:
        return [Section("What is looked at", view=token_data(HOSTILE, {"alpha": np.arange(len(HOSTILE))}, height=200)),
                Section("Again", view=token_data([" one", " two"], top=2), table=self.table)]


@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "width"), [("light", 1100), ("dark", 500)])
def test_among_the_sections_of_a_page(open_page: Any, tmp_path: Path, scheme: str, width: int) -> None:
    path = write_page(WithText({"numbers": pl.DataFrame({"x": [1]})}), tmp_path / "index.html")
    html = path.read_text(encoding="utf-8")
    assert html.count("</script") == 3 and not re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\ud800-\udfff]", html)
    tab = open_page(path, scheme, width)
    assert tab.locator(".ll-tokens[data-drawn]").count() == 2
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.browser
def test_a_trace_of_a_thousand_sources(open_page: Any, tmp_path: Path) -> None:
    r = random.Random(1)
    parts = [" ".join(r.choice(("baker", "code", "gate", "the", "😀", "lamb")) for _ in range(100)) + ". " for _ in range(1000)]
    context, ends = "".join(parts), np.cumsum([*map(len, parts)])
    frame = pl.DataFrame({"index": range(1000), "start": ends - [*map(len, parts)], "end": ends, "score": [r.gauss(0, .1) for _ in parts],
                          "token_start": range(0, 100_000, 100), "token_end": range(100, 100_100, 100), "error": [None] * 1000})
    score = lambda at: frame.with_columns(score=pl.when(pl.col("index") == at).then(3.0).otherwise("score"))
    said = pl.DataFrame({"token": [" It", " is", " lamb"], "logprob": [-.5, -.25, -.125]})
    path = trace_page(tmp_path / "trace.html", context, {(2, 3): score(700), (0, 2): score(20)}, "<b>Which?</b>", said)
    tab = open_page(path)
    assert tab.evaluate("performance.now()") < 3000 and tab.evaluate("document.querySelectorAll('.ll-tokens *').length") < 3000
    rows = tab.locator(".ll-top tbody tr")
    assert rows.count() == 10 and rows.first.inner_text().split()[1] == "701"
    start, end = frame.row(700, named=True)["start"], frame.row(700, named=True)["end"]
    assert f"{start:,} to {end:,}" in rows.first.inner_text() and "70,000 to 70,100" in rows.first.inner_text()
    rows.first.click()
    until(tab, f"!{VIEW}.waiting && {VIEW}.selected === 700")
    assert unit(tab, 700).is_visible() and "is-hot" in unit(tab, 700).get_attribute("class")
    shown = tab.evaluate(f"[...'x'].map(() => {VIEW}.context.text.slice({VIEW}.context.starts[700], {VIEW}.context.ends[700]))[0]")
    assert shown == parts[700]
    pick = tab.get_by_role("button", name="Sources of ␣It is")
    pick.click()
    assert rows.first.inner_text().split()[1] == "21" and pick.get_attribute("aria-pressed") == "true"
    assert pick.get_attribute("title") == "log-probability -0.75, probability 0.472"
    assert "<b>Which?</b>" in tab.locator(".ll-asked").inner_text()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_on_a_page(open_page: Any, tmp_path: Path, scheme: str) -> None:
    "Names, roles and contrast by axe-core, on a page with a text and the sources of an answer"
    from lab import axe_violations
    frame = pl.DataFrame({"start": [0, 9, 22], "end": [9, 22, 30], "score": [0.1, 2.0, -1.0]})
    said = pl.DataFrame({"token": [" It", " is", " é"], "logprob": [-.5, -.25, -.125]})
    path = trace_page(tmp_path / "trace.html", "It rained the code is é. שלום.", {(2, 3): frame, (0, 2): frame}, "Which?", said)
    assert axe_violations(open_page(path, scheme)) == []
    values = {"alpha": np.arange(6.), "change": np.arange(-3., 3.)}
    data = token_data(["a", " naï", "ve", " e", "\u0301", " b"], values, {"needle": (1, 3)}, top=3)
    assert axe_violations(open_page(text_html(data), scheme), ".ll-tokens") == []


def test_the_script_makes_no_html() -> None:
    script = static("tokens.js")
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|</script|<!--|https?:", script)
    assert json.loads(as_json(token_data(HOSTILE).page()))["context"]["unit"] == "token"
