"""Every explorer in JupyterLab, by hand: click, drag, pick, cancel, and see what changed; no network, and no text that runs

One server, one notebook and one page serve all tests: starting them takes most of the time. EXPLORER_PICTURES=folder keeps a
picture of every explorer, light and dark.
"""
from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import axe_violations, browser, errors_of, jupyterlab, missing, open_page, run_notebook, set_theme, write_notebook

pytestmark = pytest.mark.browser
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
CELLS = [f"HOSTILE = {HOSTILE!r}", """
import longlens as ll
from longlens.probes.traceback.prompts import ready_prompt
from longlens.probes.traceback.probe import trace_context
lm, enc = ll.load(), ll.load_encoder()
ctx = ll.needle_context(lm, 2040, 40, wording="facts", n_keys=4)
work = ll.explore(lm, ctx)
work""", """
text = ll.compose_prompt(lm, [f"A page says {HOSTILE} and little else. The code for Ada is lamb. Most people were gone by then.",
                       "\\nQuestion: What is the code for Ada?\\nAnswer: The code for Ada is"], completion=" lamb.")
hostile = ll.explore(lm, text)
hostile""", """
grid = ll.needle_grid(lm, [256, 512], [0, 50, 100], trials=1).widget(model=lm)
grid""", """
from longlens.probes.collapse.probe import length_collapse
collapse = length_collapse(enc, lengths=[16, 32], n_documents=8, layer_documents=1, taus=[.5], retrieval=()).widget(encoder=enc)
collapse""", """
small = ll.needle_context(lm, 200, 40, wording="facts", n_keys=3, seed=1)
prompt = ready_prompt(lm, small, answer=" lamb. The", by="sentences", answer_span=(0, 5))
trace = trace_context(lm, prompt, method="attention").widget(model=lm, prompt=prompt)
trace""", """
plain = ll.explore(lm, f"Most were gone. The code for Ada is lamb. {HOSTILE} was read. The code for Bob is river. It rained.")
plain""", """
policies = ll.policy_lens(lm, policies=["snapkv"], budgets=(.25, .5), n_contexts=1, n_tokens=120).widget()
policies""", """
positions = ll.position_lens(lm, (64, 160), ("yarn",), n_texts=1, trained=128).widget()
positions"""]
# ipywidgets: a size that was due is told to a widget that was taken away meanwhile; nothing comes of it
LATE = "processLuminoMessage"
TABS = ["Heads", "Text", "Trace", "Needle", "Policies", "Positions", "Collapse", "More", "Compare"]
APPS = ["work", "hostile", "grid", "collapse", "trace", "plain", "policies", "positions"]    # in this order
CLICK = """([app, layer, head]) => new Promise((done) => {    // milliseconds until every picture has its new rows
  const charts = [...app.querySelectorAll(".lx-chart")], before = charts.map((c) => c.dataset.refreshed);
  const cell = [...charts[0].querySelectorAll("path[aria-label]")].find((e) => e.ariaLabel.startsWith(`head: ${head}; layer: ${layer}`));
  const box = cell.getBoundingClientRect(), start = performance.now();
  for (const type of ["mousedown", "mouseup", "click"])
    cell.dispatchEvent(new MouseEvent(type, {bubbles: true, clientX: box.x + 5, clientY: box.y + 5}));
  const look = () => {
    const told = app.querySelector(".lx-head").textContent.includes(`Layer ${layer}, head ${head}`);
    if (told && charts.every((c, i) => c.dataset.refreshed !== before[i])) requestAnimationFrame(() => done(performance.now() - start));
    else if (performance.now() - start > 20000) done(Infinity);
    else setTimeout(look, 4);
  };
  look();
})"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    "A notebook with every explorer, run in JupyterLab"
    if why := missing(): pytest.skip(why)
    root = tmp_path_factory.mktemp("explorers")
    write_notebook(root / "explorers.ipynb", *CELLS)
    with jupyterlab(root) as (url, token), browser(root / ".chrome", (1400, 1100)) as context:
        page = open_page(context, url)
        run_notebook(page, url, token, "explorers.ipynb", 300)
        page.root = root
        page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')")
        assert errors_of(page) == []
        page.wait_for_selector(".lx-chart svg.marks")
        yield page


@pytest.fixture
def app(page: Any) -> Any:
    "An explorer by its name"
    from playwright.sync_api import expect
    expect(page.locator(".lx-app")).to_have_count(len(APPS))
    return lambda name: page.locator(".lx-app").nth(APPS.index(name))


def keep_picture(page: Any, app: Any, name: str) -> None:
    "A picture of an explorer, light and dark, where a folder for them is named"
    if not (folder := os.environ.get("EXPLORER_PICTURES")): return
    Path(folder).mkdir(parents=True, exist_ok=True)
    for theme in ("Dark", "Light"):
        set_theme(page, f"JupyterLab {theme}")
        page.wait_for_timeout(300)
        app.screenshot(path=f"{folder}/{name}-{theme.lower()}.png")


def says(app: Any, text: str | re.Pattern) -> None:
    "Wait until the line of status says it"
    from playwright.sync_api import expect
    expect(app.locator(".lx-status")).to_contain_text(text)


def pick_method(app: Any, words: str) -> None:
    "Choose a method by its words; the menu also has what each costs, once that is planned"
    from playwright.sync_api import expect
    menu = app.get_by_label("method")
    expect(menu.locator("option", has_text=words)).to_contain_text("tokens")
    menu.select_option(label=plain_text(menu.locator("option", has_text=words).inner_text()))


def plain_text(label: str) -> str: return label.replace("\u00a0", " ")    # ipywidgets keeps words of an option together


def tab(app: Any, name: str) -> None: app.locator(".lx-tabs").get_by_role("button", name=name, exact=True).click()


def test_a_click_on_a_head_shows_it_at_once(page: Any, app: Any, record_property: Any) -> None:
    work = app("work")
    took = [page.evaluate(CLICK, [work.element_handle(), layer, head]) for layer, head in ((3, 3), (2, 1), (4, 5), (0, 0), (2, 0))]
    record_property("milliseconds", took)
    print(f"\na click on a head, 2,035 tokens: {sorted(took)[2]:.0f} ms in the median, {max(took):.0f} ms at most")
    assert sorted(took)[2] < 1500, f"clicks took {took} ms"    # 100 ms on a machine that does nothing else
    assert "retrieval" in work.locator(".lx-chips").inner_text()
    assert "here 0.29" in work.locator(".lx-rules").inner_text()
    keep_picture(page, work, "heads")


def test_arrow_keys_move_through_the_heads(page: Any, app: Any) -> None:
    from playwright.sync_api import expect
    work = app("work")
    chart = work.locator(".lx-chart").first
    chart.focus()
    page.keyboard.press("ArrowRight")
    expect(work.locator(".lx-head h4")).to_have_text("Layer 2, head 1")
    page.keyboard.press("ArrowUp")
    expect(work.locator(".lx-head h4")).to_have_text("Layer 1, head 1")
    for key in ("ArrowDown", "ArrowLeft"): page.keyboard.press(key)
    expect(work.locator(".lx-head h4")).to_have_text("Layer 2, head 0")


def test_silenced_heads_change_the_answer(page: Any, app: Any) -> None:
    from playwright.sync_api import expect
    work, silence = app("work"), app("work").get_by_role("button", name="Silence this head")
    answers = work.locator(".lx-answers")
    expect(answers).to_contain_text("marble")
    silence.click()
    says(work, "asking without 2-0: done")
    expect(answers).to_contain_text("without 2-0")
    work.locator('path[aria-label^="head: 1; layer: 2"]').first.click()
    expect(work.locator(".lx-head h4")).to_have_text("Layer 2, head 1")
    silence.click()
    says(work, "asking without 2-0, 2-1: done")
    row = work.locator(".lx-answers tr", has_text="without 2-0, 2-1")
    assert "marble" not in row.inner_text() and float(row.locator("td").nth(2).inner_text()) < .1
    work.get_by_role("button", name="Silence none").click()
    expect(answers).not_to_contain_text("without")


def test_a_token_that_is_clicked_looks(page: Any, app: Any) -> None:
    from playwright.sync_api import expect
    work = app("work")
    tab(work, "Text")
    work.locator(".ll-u[data-u='2030']").first.click()
    keep_picture(page, work, "text")
    tab(work, "Heads")
    expect(work.locator(".lx-picture", has_text="From one token").locator("input[type=number]")).to_have_value("2030")


def test_a_needle_is_dragged(page: Any, app: Any) -> None:
    from playwright.sync_api import expect
    grid = app("grid")
    handle = grid.locator(".noUi-handle").first
    handle.scroll_into_view_if_needed()
    handle.focus()
    for _ in range(3): page.keyboard.press("ArrowRight")
    expect(grid.get_by_text("nothing was measured at 53: this is 50")).to_be_visible()
    grid.get_by_role("button", name="Ask the model here").click()
    says(grid, "asking at 53: done")
    expect(grid.locator(".lx-answers tr").nth(1)).to_contain_text("asked here")
    grid.locator('path[aria-label*="512"]').first.click()
    expect(grid.locator(".lx-sliders select").first).to_have_value("512")
    keep_picture(page, grid, "needle")
    tab(grid, "Report")
    expect(grid.locator(".lx-findings li").first).to_contain_text("Every needle is found")
    expect(grid.locator(".lx-section svg.marks")).to_be_visible()
    keep_picture(page, grid, "report")
    tab(grid, "Needle")


def test_a_run_is_cancelled(page: Any, app: Any) -> None:
    from playwright.sync_api import expect
    work = app("work")
    tab(work, "Needle")
    work.get_by_role("button", name="Measure").click()
    stop = work.get_by_role("button", name="Cancel")
    expect(stop).to_be_visible()
    says(work, re.compile(r"needle: [\d,]+ of about [\d,]+ tokens"))
    tab(work, "Trace")
    work.get_by_role("button", name="Measure").click()
    expect(work.get_by_role("alert")).to_contain_text("needle is still running: wait for it, or cancel it")
    tab(work, "Needle")
    stop.click()
    says(work, "needle: cancelled, and nothing was changed")
    expect(stop).to_be_hidden()
    expect(work.get_by_role("button", name="Measure")).to_be_enabled()
    assert work.locator(".lx-error").count() == 0
    tab(work, "Heads")


def test_an_answer_is_traced_where_hardly_a_position_is_left(page: Any, app: Any) -> None:
    from playwright.sync_api import expect
    work = app("work")
    tab(work, "Trace")
    pick_method(work, "attention, mean of all heads")
    work.get_by_role("button", name="Measure").click()    # 2,035 of 2,048 positions are taken
    says(work, "trace: done")
    expect(work.get_by_role("alert")).to_have_count(0)
    expect(work.locator(".lx-side")).to_contain_text("marble")
    expect(work.locator(".lx-main")).to_contain_text("shaded by its score (attention): attention of the answer to the tokens")
    keep_picture(page, work, "full")
    tab(work, "Heads")


def test_every_quantity_of_the_map_is_explained(page: Any, app: Any) -> None:
    from playwright.sync_api import expect
    work = app("work")
    menu, told = work.get_by_label("colour"), work.locator(".lx-main .lx-caption").first
    names = [name.replace("\u00a0", " ") for name in menu.locator("option").all_inner_texts()]
    assert "entropy" in names and "normalised entropy" in names and "learned sink" not in names
    for name, sentence in (("entropy", "How spread out its attention is"), ("retrieval score", "Outlined: above 0.1, 2 of 40 heads.")):
        menu.select_option(label=name)
        expect(told).to_contain_text(sentence)
    expect(work.get_by_text("(empty)")).to_have_count(0)


FITS = """([app, most]) => app.clientWidth < most && app.scrollWidth <= app.clientWidth && [...app.querySelectorAll(".lx-chart svg.marks")]
  .filter((svg) => svg.clientWidth).every((svg) => svg.getBoundingClientRect().right <= app.getBoundingClientRect().right)"""


def test_a_window_that_gets_narrower_takes_the_pictures_with_it(page: Any, app: Any) -> None:
    work = app("work")
    before = work.evaluate("(app) => app.clientWidth")
    try:
        for width in (1000, 800):
            page.set_viewport_size({"width": width, "height": 1100})
            for name in ("work", "grid", "trace"): page.wait_for_function(FITS, arg=[app(name).element_handle(), width])
            keep_picture(page, work, f"narrow-{width}")
    finally: page.set_viewport_size({"width": 1400, "height": 1100})
    chart = "(app) => Math.abs(app.querySelector('.lx-wide svg.marks').clientWidth - app.querySelector('.lx-wide').clientWidth) < 30"
    page.wait_for_function(f"([app, wide]) => app.clientWidth === wide && ({chart})(app)", arg=[work.element_handle(), before])


def test_a_text_stays_where_it_is_when_it_is_shaded_by_something_else(page: Any, app: Any) -> None:
    from playwright.sync_api import expect
    work = app("work")
    tab(work, "Text")
    text, wide = work.locator(".ll-tokens[data-unit='token']"), []
    expect(text).to_be_visible()
    menu = text.locator(".ll-quantity")
    for name in menu.locator("option").all_inner_texts():
        menu.select_option(label=name)
        page.wait_for_timeout(100)
        wide.append(text.evaluate("(e) => [e.clientWidth, e.closest('.lx-stack').clientWidth]"))
    assert len(wide) > 2 and len({tuple(w) for w in wide}) == 1 and wide[0][1] - wide[0][0] < 10, wide
    tab(work, "Heads")


def test_sliders_move_the_collapse(page: Any, app: Any) -> None:
    from playwright.sync_api import expect
    collapse = app("collapse")
    table = collapse.locator(".lx-numbers").first
    before = table.inner_text()
    length, temperature = collapse.locator(".noUi-handle").nth(0), collapse.locator(".noUi-handle").nth(1)
    length.scroll_into_view_if_needed()
    length.focus()
    page.keyboard.press("ArrowLeft")
    expect(table).not_to_have_text(before)
    temperature.focus()
    page.keyboard.press("ArrowLeft")
    expect(collapse.get_by_text("shown at temperature 1")).to_be_visible()
    collapse.get_by_role("button", name="Embed at this temperature").click()
    says(collapse, "temperature 0.5: done")
    expect(collapse.get_by_text("shown at temperature 1")).to_have_count(0)
    keep_picture(page, collapse, "collapse")


def test_a_span_is_picked_and_sources_are_removed(page: Any, app: Any) -> None:
    from playwright.sync_api import expect
    trace = app("trace")
    left, right = trace.locator(".noUi-handle").nth(0), trace.locator(".noUi-handle").nth(1)
    right.scroll_into_view_if_needed()
    right.focus()
    for _ in range(2): page.keyboard.press("ArrowRight")
    left.focus()
    page.keyboard.press("ArrowRight")
    expect(trace.locator(".lx-quote").first).to_contain_text("not traced yet")
    trace.get_by_role("button", name="Trace this span").click()
    says(trace, re.compile("tracing .*: done"))
    expect(trace.locator(".lx-quote").first).not_to_contain_text("not traced yet")
    trace.get_by_role("button", name="Ask without them").click()
    expect(trace.get_by_role("alert")).to_contain_text("take the tick from one of the boxes first")
    trace.locator("input[type=checkbox]").first.uncheck()
    trace.get_by_role("button", name="Ask without them").click()
    says(trace, "asking without 1 of")
    expect(trace.locator(".lx-answers tr", has_text="without")).to_be_visible()
    expect(trace.get_by_role("alert")).to_have_count(0)
    keep_picture(page, trace, "trace")


def test_what_a_text_says_stays_text(page: Any, app: Any) -> None:
    from playwright.sync_api import expect
    hostile = app("hostile")
    hostile.locator('path[aria-label^="head: 2; layer: 3"]').first.click()
    box = hostile.locator(".lx-picture", has_text="From one token").locator("input[type=number]")
    for token in (8, 14, 20):
        box.fill(str(token))
        box.press("Enter")
        expect(hostile.locator(".lx-quote mark").first).to_be_visible()
    tab(hostile, "Text")
    expect(hostile.locator(".ll-view")).to_contain_text(HOSTILE)
    tab(hostile, "Trace")
    hostile.get_by_role("button", name="Measure").click()
    says(hostile, "trace: done")
    expect(hostile.locator(".lx-main")).to_contain_text("<script>")
    expect(hostile.locator(".lx-side")).to_contain_text("<script>")
    assert page.evaluate("window.hacked") is None
    assert page.locator(".lx-app script, .lx-app img, .lx-app [onerror]").count() == 0


def test_a_plain_text_is_asked(page: Any, app: Any) -> None:
    from playwright.sync_api import expect
    plain, ask = app("plain"), app("plain").locator(".lx-asking button[title='Ask']")
    question, answer = plain.get_by_label("question", exact=True), plain.get_by_label("answer", exact=True)
    ask.click()
    expect(plain.get_by_role("alert")).to_contain_text("the question is empty")
    question.fill("What is the code for Bob?")
    question.press("Enter")
    says(plain, "asking: done")
    expect(plain.get_by_role("alert")).to_have_count(0)
    expect(plain.locator(".lx-answers")).to_contain_text("river")
    expect(plain.locator(".lx-chips").first).to_be_visible()
    wide = "(app) => app.querySelector('.lx-wide').clientWidth - app.querySelector('.lx-wide svg').clientWidth"
    page.wait_for_function(f"(app) => ({wide})(app) < 30", arg=plain.element_handle())
    ask.click()
    says(plain, "that is what was asked")
    expect(plain.get_by_role("alert")).to_have_count(0)
    expect(plain.locator(".lx-answered")).to_contain_text("river, probability")
    answer.fill("<b>lamb</b>")
    ask.click()
    says(plain, "asking: done")
    expect(plain.locator(".lx-box .lx-caption")).to_contain_text("“<b>lamb</b>” is the answer that was given")
    expect(plain.locator(".lx-doubt")).to_contain_text("The model does not give the expected answer “<b>lamb</b>”")
    tab(plain, "Trace")
    plain.get_by_role("button", name="Measure").click()
    says(plain, "trace: done")
    expect(plain.locator(".ll-asked")).to_contain_text("Question What is the code for Bob?")
    expect(plain.locator(".ll-asked")).to_contain_text("<b>lamb</b>")
    keep_picture(page, plain, "asked")
    tab(plain, "Needle")
    expect(question).to_be_hidden()
    assert page.evaluate("window.hacked") is None


def test_a_word_of_the_answer_is_clicked_and_its_sources_are_found(page: Any, app: Any) -> None:
    "With a real click; the view stands at the winner, which is counted from 1"
    from playwright.sync_api import expect
    plain = app("plain")
    tab(plain, "Trace")
    plain.get_by_label("answer", exact=True).fill("river, lamb")
    plain.locator(".lx-asking button[title='Ask']").click()
    says(plain, "asking: done")
    plain.get_by_role("button", name="Measure").click()
    says(plain, "trace: done")
    plain.get_by_role("button", name=re.compile("Find the sources of .?lamb")).click()
    says(plain, "tracing “lamb”: done")
    pressed = plain.locator(".ll-pick[aria-pressed=true]")
    expect(pressed).to_have_text("lamb")
    expect(plain.locator(".ll-top tbody tr").first).to_contain_text("lamb")
    won = plain.locator(".ll-top tbody tr").first.locator("td").nth(1).inner_text()
    expect(plain.locator(f".ll-view .ll-u[data-u='{int(won) - 1}']").first).to_be_in_viewport()
    expect(plain.locator(".lx-side input[type=checkbox]").first.locator("xpath=..")).to_contain_text(f"{won} · ")
    assert plain.get_by_label("method").count() == 1    # one menu for one thing
    tab(plain, "Heads")
    tab(plain, "Trace")    # what each method costs is planned when the tab is opened
    line = re.compile(r"leave\sone\sout\s·\sabout\s[\d,]+\stokens\s·\sright\sin")
    expect(plain.get_by_label("method").locator("option").first).to_contain_text(line)


def test_a_sentence_is_deleted_and_the_question_asked_again(page: Any, app: Any) -> None:
    from playwright.sync_api import expect
    plain = app("plain")
    tab(plain, "Heads")
    plain.get_by_label("answer", exact=True).fill("")
    plain.get_by_role("button", name="Edit the text").click()
    box = plain.locator("textarea").first
    box.fill(box.input_value().replace("The code for Bob is river. ", ""))
    plain.locator(".lx-asking button[title='Ask']").click()
    says(plain, "asking: done")
    expect(plain.locator(".lx-answered")).to_contain_text("Before: “river")
    expect(plain.locator(".lx-answered .lx-answer")).not_to_contain_text("river")
    asked = map(plain_text, plain.get_by_label("asked so far").locator("option").all_inner_texts())
    plain.get_by_label("asked so far").select_option(label=next(o for o in asked if o.startswith("1. ")))
    says(plain, "asking: done")
    expect(plain.locator(".lx-answered .lx-answer")).to_contain_text("river")
    plain.get_by_role("button", name="Edit the text").click()


def test_a_token_that_is_pointed_at_shows_both_ways(page: Any, app: Any) -> None:
    from playwright.sync_api import expect
    work = app("work")
    tab(work, "Heads")
    work.locator('path[aria-label^="head: 0; layer: 2"]').first.click()
    expect(work.locator(".lx-head h4")).to_have_text("Layer 2, head 0")
    tab(work, "Text")
    says(work, "layer 2, head 0: done")
    work.locator(".ll-view").focus()
    page.keyboard.press("End")    # the last token, which copies
    expect(work.locator(".ll-linked.is-to .ll-link").first).to_contain_text("marble")
    expect(work.locator(".ll-linked.is-to")).to_contain_text("layer 2, head 0")
    work.locator(".ll-linked.is-to .ll-link").first.click()    # the needle: who looks at it?
    expect(work.locator(".ll-linked.is-from .ll-link").first).to_contain_text("is")
    expect(work.locator(".ll-u.is-selected")).to_be_in_viewport()
    work.locator(".ll-view .ll-u").nth(40).hover()
    expect(work.locator(".ll-linked")).to_have_count(2)
    keep_picture(page, work, "hover")
    tab(work, "Heads")


def test_two_models_side_by_side(page: Any, app: Any) -> None:
    from playwright.sync_api import expect
    plain = app("plain")
    tab(plain, "Compare")
    go = plain.locator(".lx-stack").get_by_role("button", name="Compare")
    go.click()
    expect(plain.get_by_role("alert")).to_contain_text("nothing to compare with was named")
    plain.get_by_label("which").fill("needle-lm")
    plain.get_by_label("which").press("Enter")
    go.click()
    says(plain, "comparing: done")
    table = plain.locator(".lx-compared table.differences")
    expect(table).to_contain_text("Surprise at a word")
    expect(table).to_contain_text(re.compile(r"0 to 0.*\d+ shared cases", re.S))
    plain.get_by_label("with", exact=True).select_option(label="another method of traceback")
    go.click()
    says(plain, "comparing: done")
    expect(plain.locator(".lx-compared")).to_contain_text("Rank correlation of all sources")
    keep_picture(page, plain, "compare")


def test_a_tab_that_needs_something_says_what(page: Any, app: Any) -> None:
    from playwright.sync_api import expect
    work = app("work")
    tab(work, "Collapse")
    expect(work.get_by_role("button", name="Measure")).to_be_disabled()
    expect(work.locator(".lx-ask .lx-soft")).to_contain_text("encoder=longlens.load_encoder()")
    tab(work, "Heads")


def test_other_lenses_read_the_text(page: Any, app: Any) -> None:
    "What a tab measures of the text, and the next one after it"
    from playwright.sync_api import expect
    plain = app("plain")
    tab(plain, "More")
    for what, said in (("what far text gives to each token", "of the tokens are predicted better"),
                       ("what heads find at the first token", "the key of the first token")):
        plain.get_by_label("what").first.select_option(what)
        plain.get_by_role("button", name="Measure").click()
        expect(plain.get_by_text(re.compile(said)).first).to_be_visible(timeout=30_000)
        expect(plain.locator(".lx-chart svg.marks").first).to_be_visible()
    tab(plain, "Positions")
    plain.get_by_role("button", name="Measure").click()
    expect(plain.get_by_text("Loss by position").first).to_be_visible(timeout=60_000)
    tab(plain, "Heads")


def axe_in(page: Any, app: Any, dark: bool) -> list[str]:
    "What axe finds in an explorer as it stands"
    app.evaluate("(app) => { app.id = 'looked-at'; }")
    page.wait_for_timeout(300)
    found = axe_violations(page, "#looked-at", contrast_only=dark)
    app.evaluate("(app) => { app.id = ''; }")
    return found


@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing(page: Any, app: Any, dark: bool) -> None:
    "Names, roles and contrast, on every tab of the workbench, and in the other explorers with what they measured"
    set_theme(page, f"JupyterLab {'Dark' if dark else 'Light'}")
    found, others = [], ("grid", "collapse", "trace", "policies", "positions")
    for name in TABS[2 * dark::1 + 2 * dark]:    # in the dark, some
        tab(app("plain"), name)
        found += [f"{name}: {line}" for line in axe_in(page, app("plain"), dark)]
    for name in others: found += [f"{name}: {line}" for line in axe_in(page, app(name), dark)]
    tab(app("grid"), "Report")
    found += [f"report: {line}" for line in axe_in(page, app("grid"), dark)]
    tab(app("grid"), "Needle")
    set_theme(page, "JupyterLab Light")
    assert not found, "\n".join(found)


CAN_FOCUS = 'button, select, input, textarea, a[href], summary, .noUi-handle, [role=listbox], [tabindex="0"]'
STOPS = """([app, kinds]) => [...app.querySelectorAll(kinds)]
  .filter((e) => e.checkVisibility({visibilityProperty: true}) && !e.disabled && e.getBoundingClientRect().width)
  .map((e, i) => { e.dataset.stop = i; return `${e.tagName} ${e.ariaLabel || e.title || e.textContent.trim()}`.slice(0, 60); })"""
FOCUSED = """(app) => {
  const now = document.activeElement, style = getComputedStyle(now);
  const seen = style.outlineStyle === "solid" && parseFloat(style.outlineWidth) >= 2;
  return app.contains(now) ? [Number(now.dataset.stop ?? -1), seen] : null;
}"""


SHOWN = ["work Text", "plain Compare", "trace Trace", "grid Needle", "collapse Collapse"]


@pytest.mark.parametrize("which", SHOWN)
def test_the_tab_key_reaches_all_that_can_be_clicked(page: Any, app: Any, which: str) -> None:
    "One after the other, each with a frame around it, and out at the end; Shift and Tab lead back"
    from playwright.sync_api import expect
    shown, title = app(which.split()[0]), which.split()[1]
    tab(shown, title)
    page.wait_for_timeout(300)
    expect(shown.get_by_role("button", name="Cancel")).to_be_hidden()    # what a tab asks for when it is opened has come
    names = page.evaluate(STOPS, [shown.element_handle(), CAN_FOCUS])
    reached, unseen = set(), []
    shown.evaluate("(app) => app.querySelector('[data-stop=\"0\"]').focus()")
    for _ in range(2 * len(names) + 20):
        if (now := shown.evaluate(FOCUSED)) is None: break
        if reached and now[0] >= 0 and not now[1]: unseen.append(now[0])    # the first was focused by a script; numbers have a caret
        reached.add(now[0])
        page.keyboard.press("Tab")
    else: pytest.fail("the Tab key does not lead out again")
    for _ in range(5):    # what JupyterLab has between two outputs can be focused, too
        page.keyboard.press("Shift+Tab")
        if shown.evaluate(FOCUSED): break
    assert shown.evaluate(FOCUSED), "Shift and Tab do not lead back"
    assert [n for i, n in enumerate(names) if i not in reached] == [], "not reached"
    assert [names[i] for i in unseen] == [], "focused, and nothing shows it"
    shown.evaluate("(app) => app.querySelectorAll('[data-stop]').forEach((e) => { delete e.dataset.stop; })")


def test_arrow_keys_move_in_every_chart_that_can_be_clicked(page: Any, app: Any) -> None:
    "To the next mark, where a chart has no axes of choices"
    from playwright.sync_api import expect
    grid, chosen = app("grid"), app("collapse").locator(".widget-readout").first
    assert page.locator(".lx-chart[aria-label='Vega visualization']").count() == 0    # Vega's name for all of them
    tab(grid, "Needle")
    handle = grid.locator(".noUi-handle").first
    before, least = (handle.get_attribute(f"aria-value{what}") for what in ("text", "min"))
    grid.get_by_label("Answers by depth").focus()
    page.keyboard.press("ArrowRight" if handle.get_attribute("aria-valuenow") == least else "ArrowLeft")
    expect(grid.locator(".noUi-handle").first).not_to_have_attribute("aria-valuetext", before)
    length = chosen.inner_text()
    app("collapse").get_by_label("Cosine by length: arrow keys choose").first.focus()
    page.keyboard.press("ArrowLeft" if length.startswith("32") else "ArrowRight")
    expect(chosen).not_to_have_text(length)


def test_views_are_kept_and_errors_are_shown(page: Any, app: Any) -> None:
    from playwright.sync_api import expect
    work, folder = app("work"), app("work").get_by_placeholder("folder")
    tab(work, "Heads")
    work.locator('path[aria-label^="head: 5; layer: 4"]').first.click()
    expect(work.locator(".lx-head h4")).to_have_text("Layer 4, head 5")
    folder.fill("kept <b>view</b>")
    folder.press("Enter")
    work.get_by_role("button", name="Save").click()
    says(work, "kept in kept <b>view</b>")
    assert (page.root / "kept <b>view<" / "b>" / "report.json").exists()
    work.locator('path[aria-label^="head: 0; layer: 0"]').first.click()
    expect(work.locator(".lx-head h4")).to_have_text("Layer 0, head 0")
    work.get_by_role("button", name="Load").click()
    says(work, "read from")
    expect(work.locator(".lx-head h4")).to_have_text("Layer 4, head 5")
    expect(work.locator(".lx-tabs button")).to_have_text(TABS)    # the model is still there
    asks = work.locator(".lx-asking button[title='Ask']")
    for button in (asks, work.get_by_role("button", name="Silence this head")): expect(button).to_be_visible()
    tab(work, "Trace")
    expect(work.locator(".lx-side input[type=checkbox]").first).to_be_enabled()
    tab(work, "Heads")
    folder.fill("<i>nothing</i>")
    folder.press("Enter")
    work.get_by_role("button", name="Load").click()
    expect(work.get_by_role("alert")).to_contain_text("<i>nothing</i> is not a report")


def test_dark_is_dark(page: Any, app: Any) -> None:
    ink = """(app) => ["color", "backgroundColor"].map((what) => getComputedStyle(app)[what]).concat(
      getComputedStyle(app.querySelector("svg.marks .mark-text text")).fill)"""
    luma = lambda css: sum(w * int(v) for w, v in zip((.3, .6, .1), re.findall(r"\d+", css)[:3], strict=True))
    for theme, dark in (("JupyterLab Dark", True), ("JupyterLab Light", False)):
        set_theme(page, theme)
        text, paper, axis = map(luma, page.evaluate(ink, app("grid").element_handle()))
        right = text > 150 and axis > 150 and paper < 60 if dark else text < 100 and axis < 100 and paper > 200
        assert right, (theme, text, paper, axis)


def test_nothing_left_the_machine_and_nothing_was_complained_of(page: Any) -> None:
    assert page.outside == []
    assert errors_of(page) == []
    ours = [w for w in page.wrong if any(word in w.lower() for word in ("longlens", "vega", "widget"))]
    assert [w for w in ours if not (w.startswith("TypeError") and LATE in w)] == []
