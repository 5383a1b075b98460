"What a person can repeat of a report: verdicts whose numbers are those of the tables, small pictures, reference values, comparisons"
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import altair as alt
import polars as pl
import pytest

import longlens as ll
from longlens.charts.page import page_html, write_page
from longlens.charts.small import share_axes, small_bars, small_curve, small_map
from longlens.cli.main import main
from longlens.needle_lm.data import make_example
from longlens.probes.compare import comparison_html
from longlens.probes.traceback.evaluation.cases import fact_cases
from longlens.prompts.questions import fact_questions
from longlens.reference import compare_to, number_text, reference_values
from longlens.report import Measure, Report, ReportError, Summary

PROBES = ["sinks", "heads", "middle", "grid", "trace", "scan", "methods", "collapse", "gain", "reading"]
BAD = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def numbers(text: str) -> list[float]:
    "The words of a text that are numbers"
    words = (w.strip("(),.;:%") for w in text.split())
    return [float(w.replace(",", "")) for w in words if re.fullmatch(r"[+-]?\d[\d,]*(\.\d+)?(e-?\d+)?", w)]


@pytest.fixture(scope="module")
def lm() -> ll.LongModel: return ll.load()


@pytest.fixture(scope="module")
def reports(lm: ll.LongModel) -> dict[str, Report]:
    text = make_example(n_tokens=300).prompt
    documents = ["The code for Bob is apple.", "The code for Eve is walnut.", "The code for Ann is pear."]
    case = fact_cases(2, 300, conflict="earlier", copies=2)
    asked = ll.needle_context(lm, 200, 50, wording="facts", n_keys=2)
    return {
        "sinks": ll.attention_sinks(lm, [text], sequences=4),
        "heads": ll.retrieval_heads(lm, lengths=(128,), depths=(10, 90), n_random=1),
        "middle": ll.lost_in_the_middle(lm, fact_questions(4, 4), positions=3),
        "grid": ll.needle_grid(lm, (128, 256), (0, 100), trials=2),
        "trace": ll.trace_context(lm, documents, "What is the code for Eve?", max_new_tokens=4),
        "scan": ll.scan_context(lm, documents, "What is the code for Eve?", detector=lambda t: "walnut" in t, k=2, max_new_tokens=4),
        "methods": ll.evaluate_traceback(lm, case, ["attention", "loo"], k=1, by="sentences"),
        "collapse": ll.length_collapse(lengths=(16, 64), n_documents=8, layer_documents=0, taus=(), retrieval=None),
        "gain": ll.context_gain(lm, [text], windows=(16, 64), targets=8),
        "reading": ll.explore(lm, asked).report,
    }


@pytest.mark.parametrize("name", PROBES)
def test_two_numbers_at_most(reports: dict[str, Report], name: str) -> None:
    report = reports[name]
    s = report.summary()
    for line in [s.verdict, *report.findings()]: assert len(numbers(line)) <= 2, line
    assert report.findings() == [s.verdict, *s.compared] and s.verdict and s.sure and s.untested
    assert s.verdict.endswith(".") and "nan" not in f"{s.verdict} {s.sure}".lower().split()
    assert report.details() and all(isinstance(line, str) for line in report.details())


@pytest.mark.parametrize("name", PROBES)
def test_a_picture_is_small_and_shows_something(reports: dict[str, Report], name: str) -> None:
    "None, or a chart of about 320 by 180 whose values are not all the same"
    picture = reports[name].summary().picture
    if picture is None: return
    spec = picture.to_dict()
    assert spec["width"] <= 270 and (isinstance(spec["height"], dict) or spec["height"] <= 140) and "title" not in spec
    rows = [row for rows in spec.get("datasets", {}).values() for row in rows] or [
        row for part in [spec, *spec.get("layer", [])] for row in part.get("data", {}).get("values", [])]
    drawn = [row[c] for row in rows for c in ("value", "mean") if isinstance(row.get(c), int | float)]
    assert len(set(drawn)) > 1


def expected(name: str, r: Report) -> list[float]:
    "The numbers of a verdict, from the tables"
    f = r.frames
    if name == "sinks":
        h = f["heads"].group_by("layer", "head").mean()
        return [(h["alpha_first"] > 0.3).sum(), len(h)]
    if name == "heads": return [f["heads"]["retrieval_head"].sum(), len(f["heads"])]
    if name == "scan": return [f["scan"]["flagged"].sum(), len(f["scan"])]
    if name == "methods": return [round(f["methods"]["f1"].max(), 2), round(r.meta["f1_guess"], 2)]
    if name == "collapse":
        return [round(v, 2) for v in f["similarity"].filter(kind="cut", condition="none").sort("context_length")["mean_cosine"]]
    raise KeyError(name)


@pytest.mark.parametrize("name", ["sinks", "heads", "scan", "methods", "collapse"])
def test_numbers_of_a_verdict_are_those_of_the_tables(reports: dict[str, Report], name: str) -> None:
    assert numbers(reports[name].summary().verdict) == [float(v) for v in expected(name, reports[name])]


def with_scores(r: Report, frames: dict[str, pl.DataFrame]) -> Report: return type(r)({**r.frames, **frames}, r.meta)


def test_a_saturated_or_empty_grid_is_a_sentence(reports: dict[str, Report]) -> None:
    r = reports["grid"]
    for score, start in ((1.0, "Every needle is found"), (0.0, "No needle is found")):
        f = r.frames["lengths"].with_columns(score=pl.lit(score))
        made = with_scores(r, {"lengths": f, "effective": r.frames["effective"].with_columns(effective_length=pl.lit(256.0))}).summary()
        assert made.verdict.startswith(start) and numbers(made.verdict) == [256.0] and made.picture is None
    half = r.frames["lengths"].with_columns(score=pl.Series([1.0, 0.5]))
    reach = r.frames["effective"].with_columns(effective_length=pl.lit(128.0))
    s = with_scores(r, {"lengths": half, "effective": reach}).summary()
    assert numbers(s.verdict) == [75.0, 128.0] and s.picture is not None
    none = r.frames["effective"].with_columns(effective_length=pl.lit(None, pl.Float64))
    made = with_scores(r, {"lengths": half, "effective": none}).summary()
    assert made.verdict == "75 % of the needles are found, and at no length reliably."


def middle_of(r: Report, scores: list[float], lower: float, upper: float, p: float) -> Summary:
    "The summary of a curve with these scores, and this interval of ends less middle"
    plain = r.frames["curve"].with_columns(score=pl.Series(scores))
    u = (scores[0] + scores[-1]) / 2 - scores[1]
    ends = {"u_shape": u, "primacy": scores[0] - scores[1], "recency": scores[-1] - scores[1]}
    f = r.frames["indices"].with_columns(value=pl.col("index").replace_strict(ends), p=pl.lit(p), lower=pl.lit(lower), upper=pl.lit(upper))
    return with_scores(r, {"curve": plain, "indices": f}).summary()


def test_the_middle_in_words(reports: dict[str, Report]) -> None:
    "Lost only where interval and test agree; nothing is said of a middle where all is wrong or right"
    r = reports["middle"]
    lost = middle_of(r, [0.8, 0.4, 0.6], 0.1, 0.5, 0.01)
    assert lost.verdict == "Lost in the middle: 70 % right at the ends, 40 % in the middle." and lost.picture is not None
    unsure = middle_of(r, [0.8, 0.4, 0.6], -0.1, 0.7, 0.2)
    assert unsure.verdict.startswith("No sign of lost in the middle: 70 %") and "-10 to +70" in unsure.sure
    assert middle_of(r, [0.2, 0.6, 0.2], -0.6, -0.2, 0.01).verdict.startswith("Better in the middle than at the ends")
    nothing, everything = (middle_of(r, [x] * 3, 0.0, 0.0, 1.0) for x in (0.0, 1.0))
    assert "nothing can be said" in nothing.verdict and nothing.picture is None
    assert everything.verdict.startswith("Every question is answered right") and everything.picture is None


def test_no_head_and_no_needle(reports: dict[str, Report]) -> None:
    r = reports["heads"]
    none = type(r)({**r.frames, "heads": r.frames["heads"].with_columns(retrieval_head=pl.lit(False))}, r.meta)
    assert none.summary().verdict == "None of 40 heads copies the answer out of the context." and none.summary().picture is None
    lost = type(r)({**r.frames, "trials": r.frames["trials"].with_columns(kept=pl.lit(False))}, {**r.meta, "counted": 0})
    assert "does not find the needle" in lost.summary().verdict and lost.summary().picture is None


def test_no_sink_at_all(reports: dict[str, Report]) -> None:
    r = reports["sinks"]
    flat = {"heads": r.frames["heads"].with_columns(alpha_first=pl.lit(0.01)), "tokens": r.frames["tokens"].with_columns(heads=pl.lit(0))}
    s = with_scores(r, flat).summary()
    assert s.verdict == "There is no attention sink: no head rests on a single token." and s.picture is None
    other = with_scores(r, {**flat, "tokens": r.frames["tokens"].head(1).with_columns(heads=pl.lit(3), position=pl.lit(12))}).summary()
    assert "the strongest is at position 12, in 3 heads" in other.verdict


def test_a_guess_comes_first(reports: dict[str, Report]) -> None:
    r = reports["trace"]
    sure, unsure = (with_scores(r, {"answer": r.frames["answer"].with_columns(logprob=pl.lit(x))}).summary().verdict for x in (-0.01, -5.0))
    assert not sure.startswith("The model is guessing") and unsure.startswith("The model is guessing: its answer has a probability of ")
    assert unsure.endswith(sure)


def test_a_sink_is_the_same_in_report_and_workbench(lm: ll.LongModel) -> None:
    "The same heads, of one text, and the same words"
    from longlens.apps.reading import RULES, read_text
    from longlens.probes.sinks.metrics import SINK
    text = "The river was green. Most people were gone by then. " * 12
    report, reading = ll.attention_sinks(lm, text, T=32, sequences=1), read_text(lm, text)
    rule = next(r for r in RULES if r.label == "sink")
    heads = report.frames["heads"].filter(pl.col("alpha_top") > report.meta["settings"]["epsilon"]).select("layer", "head").rows()
    mine = [(h["layer"], h["head"]) for h in reading.frames["heads"].iter_rows(named=True) if rule.holds(h)]
    assert heads and sorted(heads) == sorted(mine)
    assert rule.criterion == SINK.format(epsilon=.3) and rule.criterion in next(s.text for s in report.sections())


# ---- reference values

def test_every_reference_value_has_a_source_and_is_used(reports: dict[str, Report]) -> None:
    f = reference_values()
    assert f["source"].null_count() == 0 and set(f["kind"]) == {"published", "measured"}
    assert f.select("key", "model", "documents", "tokens").is_duplicated().sum() == 0
    known = {m.key for r in reports.values() for m in r.summary().measures} | {"ends_less_middle", "closed_book", "right_document_only"}
    assert set(f["key"]) <= known


def test_published_values_as_in_the_papers() -> None:
    at = lambda key, model, **where: reference_values(key, **where).filter(model=model)["value"].to_list()
    assert at("sink_rate_natural", "LLaMA3-8B") == [99.02] and at("sink_rate_repeated", "GPT2-XL") == [62.28]
    assert at("ends_less_middle", "GPT-3.5-Turbo", documents=10) == [round((76.8 + 62.4) / 2 - 61.2, 2)]
    assert at("closed_book", "MPT-30B-Instruct") == [31.5] and at("retrieval_heads", "Mixtral-8x7B-v0.1") == [6.15]


def test_usual_or_not() -> None:
    say = lambda value, model="mine", **ends: compare_to([Measure("sink_rate_natural", "Sink rate", value, "%", **ends)], model)[0]
    assert say(50.0) == "Sink rate: 50 %, less than any of 12 reference models"
    assert say(50.0, "smollm2") == "Sink rate: 50 %, less than any of 11 published models"
    assert say(90.0) == "Sink rate: 90 %, within what 12 reference models have"
    assert say(100.0) == "Sink rate: 100 %, more than any of 12 reference models"
    assert say(50.0, lower=30.0, upper=80.0).endswith("not to be told from 12 reference models")
    assert compare_to([Measure("sink_rate_natural", "x", float("nan"))]) == ()
    assert [number_text(x, "%") for x in (0.0, 2.64, 9.96, 99.5)] == ["0 %", "2.6 %", "10 %", "100 %"]


def test_other_settings_are_not_compared(lm: ll.LongModel, reports: dict[str, Report]) -> None:
    r = reports["sinks"]
    s = type(r)(r.frames, {**r.meta, "settings": {**r.meta["settings"], "T": 32}})
    assert not any("Sink rate" in line for line in s.summary().compared) and any("T = 64" in line for line in s.summary().untested)
    assert reports["middle"].summary().compared == ()    # made questions


# ---- shown

class Hostile(Report):
    title = "Hostile"

    def summary(self) -> Summary:
        chart = lambda: small_bars(pl.DataFrame({"name": [BAD, BAD, "b"], "v": [1.0, 2.0, 3.0]}), "name", "v", BAD)
        return Summary(BAD, chart, (BAD,), (BAD, BAD), BAD, (Measure("x", BAD, 1.0, BAD),), BAD)

    def paired(self) -> pl.DataFrame: return pl.DataFrame({"measure": ["x"] * 3, "unit": [BAD, "b", "c"], "value": self.meta["values"]})


@pytest.fixture(scope="module")
def hostile() -> list[Report]:
    return [Hostile({"a": pl.DataFrame({"x": [BAD]})}, {"model": BAD, "settings": {"s": f"{BAD}{i}"}, "values": v})
            for i, v in enumerate(([1.0, 0.0, 1.0], [2.0, 2.0, 1.0]))]


def test_nothing_of_a_summary_is_run(hostile: list[Report], tmp_path: Path) -> None:
    both = ll.compare_reports(*hostile)
    for shown in (page_html(hostile, BAD), hostile[0]._repr_html_(), both._repr_html_(), comparison_html(both, BAD)):
        shown = re.sub(r"<script(?: type=[^>]*)?>(?!alert).*?</script>", "", shown, flags=re.S)    # the page's own
        assert "<script>alert" not in shown and "<img" not in shown and "&lt;script&gt;alert(1)" in shown


@pytest.mark.parametrize("name", ["sinks", "grid", "trace"])
def test_a_cell_shows_verdict_and_picture(reports: dict[str, Report], name: str) -> None:
    "With no script: an SVG that takes its ink from the page"
    shown, s = reports[name]._repr_html_(), reports[name].summary()
    assert s.verdict.split("'")[0] in shown and ("<svg" in shown) == (s.picture is not None) and "<script" not in shown


def test_small_charts_share_their_axes() -> None:
    a, b = (pl.DataFrame({"n": [1, 2], "y": y}) for y in ([0.0, 1.0], [0.0, 5.0]))
    one, two = share_axes([small_curve(f, "n", "y", ("n", "y")) for f in (a, b)])
    ends = lambda c: {tuple(e["scale"]["domain"]) for part in c.to_dict()["layer"] for k, e in part["encoding"].items() if k == "y"}
    assert ends(one) == ends(two) == {(0.0, 5.25)}
    cells = pl.DataFrame({"layer": [0, 1], "head": [0, 0], "v": [0.1, 0.4]})
    maps = share_axes([small_map(cells.with_columns(pl.col("v") * k), "head", "layer", "v", ("head", "layer", "v")) for k in (1, 2)])
    assert [m.to_dict()["encoding"]["color"]["scale"]["domain"] for m in maps] == [[0.0, 0.8]] * 2


# ---- side by side

def test_paired_where_the_needles_are_the_same(lm: ll.LongModel, reports: dict[str, Report]) -> None:
    "Same needles, other scores: the mean difference over them, with an interval; also when read from folders"
    a = reports["grid"]
    f = a.frames["answers"].with_columns(score=pl.when(pl.int_range(pl.len()) < 5).then(0.0).otherwise("score"))
    b = with_scores(a, {"answers": f})
    both = ll.compare_reports(a, b, names=["before", "after"])
    row = both.differences.filter(what="Needles found").row(0, named=True)
    assert row["shared"] == 8 and row["difference"] == pytest.approx(100 * (f["score"] - a.frames["answers"]["score"]).mean())
    assert row["lower"] <= row["difference"] <= row["upper"] < 0 and both.settings.is_empty()
    assert both.findings() == [f"Needles found: {abs(row['difference']):.0f} points less for after, on 8 shared cases"]


def test_what_is_not_alike_is_said(lm: ll.LongModel, reports: dict[str, Report]) -> None:
    a, other = reports["grid"], ll.needle_grid(lm, (256, 512), (0, 100), trials=2)
    both = ll.compare_reports([a, reports["sinks"]], other)
    assert both.names == ["needle-lm (A)", "needle-lm (B)"]
    assert both.settings["setting"].to_list() == ["lengths"] and both.settings["probe"].to_list() == ["Needles in a haystack"]
    assert both.findings()[1] == "Not measured alike (lengths): plain differences are of models and settings together"
    assert both.findings()[-1] == "Only measured on needle-lm (A)"
    assert both.differences.filter(what="Needles found")["shared"].to_list() == [4]    # those in 256 tokens
    assert both.differences.filter(what="Effective length")["lower"].to_list() == [None]


def test_three_sides_and_what_cannot_be_compared(reports: dict[str, Report], tmp_path: Path) -> None:
    three = ll.compare_reports(reports["grid"], reports["grid"], reports["middle"], names=list("xyz"))
    assert three.differences["second"].unique().to_list() == ["y"] and three.differences["difference"].abs().max() == 0
    assert page(three).count("class='compared'") == 2 and page(three).count("Not measured.") == 3
    with pytest.raises(ValueError, match="two reports or more"): ll.compare_reports(reports["grid"])
    with pytest.raises(ValueError, match="a side of a comparison has no reports"): ll.compare_reports(reports["grid"], [])
    with pytest.raises(FileNotFoundError, match="no report folder"): ll.compare_reports(reports["grid"], tmp_path / "nowhere")
    with pytest.raises(ReportError, match="is not a report, and holds none"): ll.compare_reports(reports["grid"], tmp_path)


def page(both: Any) -> str: return comparison_html(both, "a title")


def test_the_command_compares_folders(reports: dict[str, Report], tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for side in ("one", "two"):
        for name in ("grid", "sinks"): reports[name].save(f"{side}/{name}")
    assert main(["compare", "one", "two", "--names", "first,second", "--out", "both"]) == 0
    shown = capsys.readouterr().out
    assert f"  first: {reports['grid'].summary().verdict}" in shown and "no difference that 8 shared cases can show" in shown
    text = Path("both/index.html").read_text(encoding="utf-8")
    assert "All settings are the same." in text and text.count("data-chart=") == 2 * (
        sum(reports[n].summary().picture is not None for n in ("grid", "sinks")))
    assert main(["compare", "one", "--out", "c"]) == 2 and "two report folders are compared" in capsys.readouterr().err
    assert main(["compare", "one", "three", "--out", "c"]) == 2 and "there is no report folder three" in capsys.readouterr().err
    assert main(["compare", "one", "two", "--out", "both"]) == 2 and not Path("c").exists()


# ---- in a browser

@pytest.mark.browser
def test_the_page_begins_with_the_summary(reports: dict[str, Report], browser: Any, tmp_path: Path) -> None:
    "All verdicts within two screens, the rest folded; links and keys unfold it; two models beside each other; nothing is wrong or wide"
    shown = [reports[n] for n in ("sinks", "heads", "middle", "grid", "trace", "collapse")]
    place = write_page(shown, tmp_path / "index.html")
    tab = browser.new_page(viewport={"width": 1400, "height": 1000})
    wrong: list[str] = []
    tab.on("pageerror", lambda e: wrong.append(str(e)))
    tab.goto(place.as_uri())
    tab.wait_for_function("() => [...document.querySelectorAll('[data-chart]')].every(c => c.dataset.drawn)")
    assert tab.locator(".summary .row").count() == 6 and tab.locator(".verdict").first.is_visible()
    assert tab.evaluate("document.querySelector('#summary').getBoundingClientRect().bottom") < 2000
    assert not tab.locator("details.report section").first.is_visible()
    nav, main_ = (tab.locator(s).bounding_box() for s in ("nav", "main"))
    assert nav["x"] + nav["width"] <= main_["x"]    # beside
    tab.locator("nav a", has_text="Heads that copy").first.click()
    assert tab.locator("#report-2 section").first.is_visible() and not tab.locator("#report-1 section").first.is_visible()
    tab.locator("#report-1 > summary").focus()
    tab.keyboard.press("Enter")
    assert tab.locator("#report-1 section").first.is_visible()
    assert tab.evaluate("document.querySelector('nav').getBoundingClientRect().top") >= 0    # it stays
    tab.set_viewport_size({"width": 500, "height": 900})
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    both = ll.compare_reports(shown, shown, names=["left", "right"]).write(tmp_path / "both.html")
    tab.set_viewport_size({"width": 1400, "height": 1000})
    tab.goto(both.as_uri())
    tab.wait_for_function("() => [...document.querySelectorAll('[data-chart]')].every(c => c.dataset.drawn)")
    left, right = (tab.locator(".both").first.locator(".words").nth(i).bounding_box() for i in (0, 1))
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
    assert wrong == []
    tab.close()


def test_altair_is_loaded_only_for_pictures(reports: dict[str, Report]) -> None:
    assert isinstance(reports["sinks"].summary().picture, alt.Chart) and reports["sinks"].summary().draw is not None
