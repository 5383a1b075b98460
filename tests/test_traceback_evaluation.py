"Cases with known truth, measures by hand, published files, attacks that fail, methods that always or never find, detectors that fail"
from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import longlens as ll
from longlens.charts.page import write_page
from longlens.probes.traceback.evaluation.cases import (
    ATTACKS,
    TraceCase,
    attack_text,
    clean_context,
    cut_out,
    fact_cases,
    inject,
    injection_cases,
    needle_cases,
    poisoned_cases,
    read_targets,
    span_truth,
    text_truth,
)
from longlens.probes.traceback.evaluation.evaluate import ask_case, case_frame, named_tracers
from longlens.probes.traceback.evaluation.frames import MEASURES, RUN_COSTS
from longlens.probes.traceback.evaluation.metrics import answer_without, case_interval, f1_range, found_scores, says
from longlens.probes.traceback.evaluation.report import make_traceback_report
from longlens.probes.traceback.prompts import answer_limits
from longlens.probes.traceback.sources import cut_context
from longlens.probes.traceback.tracer import TraceCost, Tracer, TraceScores
from longlens.prompts.questions import fact_questions, read_questions
from longlens.report import Report

DATA = Path(__file__).parents[1] / "../shared/data"
EVIL = "</script><script>window.pwned=1</script><img src=x onerror=pwned()> \x1b[31mred\x1b[0m \u202eturned\u202c"


def published(name: str) -> Path:
    if not (DATA / name).exists(): pytest.skip(f"needs published files: {name} in a folder shared/data beside the project's")
    return DATA / name


@pytest.fixture(scope="module")
def lm() -> Any: return ll.load()


@pytest.fixture(scope="module")
def cases() -> list[TraceCase]: return fact_cases(3, 200, conflict="earlier", copies=2)


@dataclass(frozen=True)
class Looks(Tracer):
    "Scores each source by whether it holds a text"
    text: str = ""
    sign: float = 1.0

    def cost(self, job: Any) -> TraceCost: return TraceCost(0, 0, True)
    def run(self, job: Any) -> TraceScores:
        return TraceScores(np.array([self.sign * (self.text in t) for t in job.prompt.sources.texts]))


@dataclass(frozen=True)
class Fails(Tracer):
    "Works only on sources of some question"
    question: str = ""

    def run(self, job: Any) -> TraceScores:
        if job.prompt.question != self.question: raise OSError(f"no luck {EVIL}")
        return TraceScores(np.arange(job.n, dtype=float))


# measures

@pytest.mark.parametrize(("found", "truth", "scores"), [
    ([0, 1, 2, 3, 4], [1], (0.2, 1.0, 1 / 3)),
    ([0, 1], [0, 1, 2, 3, 4], (1.0, 0.4, 4 / 7)),
    ([5, 6], [0], (0.0, 0.0, 0.0)),
    ([2], [2], (1.0, 1.0, 1.0)),
])
def test_scores_by_hand(found: list[int], truth: list[int], scores: tuple[float, ...]) -> None:
    assert found_scores(found, truth) == pytest.approx(scores)


def test_the_range_of_f1_is_reached() -> None:
    "The best choice has the upper end, and the mean over all choices is the lower one"
    from itertools import combinations
    for n, k, true in ((6, 2, 1), (6, 3, 4), (5, 5, 2), (4, 7, 1)):
        every = [found_scores(c, range(true)).f1 for c in combinations(range(n), min(k, n))]
        assert f1_range(k, true, n) == pytest.approx((np.mean(every), max(every)))


def test_what_is_said() -> None:
    assert says("  It is Paris. ", "paris.") and says("lamb", "Lamb.")
    assert not says("", "lamb") and not says("lam", "lamb")


def test_intervals_have_a_width_where_all_are_right() -> None:
    assert case_interval([1.0] * 10).lower == pytest.approx(0.722, abs=1e-3)
    assert case_interval([0.25, 0.75] * 20, shares=False).lower == pytest.approx(0.42, abs=0.03)


def test_finding_less_is_never_more_certain() -> None:
    "Both ends of the interval rise with the mean: methods of one table can be compared"
    found = [case_interval([1.0] * (20 - misses) + [0.5] * misses) for misses in range(20, -1, -1)]
    for less, more in pairwise(found): assert less.lower < more.lower and less.upper < more.upper


def test_ties_are_said_and_an_empty_ceiling_is_not() -> None:
    def run(case: int, method: str, f1: float, tokens: int) -> dict[str, Any]:
        values = {**dict.fromkeys(MEASURES, f1), **dict.fromkeys(RUN_COSTS, 1.0), "forward_tokens": float(tokens)}
        return {"case": case, "method": method, **values, "error": None}
    score = {"dear": (1.0, 900), "cheap": (1.0, 30), "half": (0.5, 10), "none": (0.0, 5), "never": (0.0, 6)}
    runs = pl.DataFrame([run(case, m, *x) for case in range(3) for m, x in score.items()])
    cases = pl.DataFrame({"case": [0, 1, 2], "sources": [4] * 3, "true_sources": [1] * 3, "kept": [True] * 3, "why": [None] * 3},
                         schema_overrides={"why": pl.String})
    report = make_traceback_report(runs, cases, runs, {"k": 1, "model": "x"})
    said = report.details()
    cost = "30 tokens through the model a case"
    assert said[1] == f"cheap and dear find most, each with F1 1.00 (0.44 to 1.00); the cheapest is cheap, with {cost}"
    assert said[2] == "a guess has F1 0.25"
    assert "none and never find least: F1 0.00 (0.00 to 0.56)" in said
    assert "no method can have more than 0.40" in make_traceback_report(runs, cases, runs, {"k": 5, "model": "x"}).details()[2]
    alike = make_traceback_report(runs.filter(pl.col("f1") == 1), cases, runs, {"k": 1, "model": "x"})
    assert not any("least" in line for line in alike.details())


# putting in and taking out

def test_what_is_put_in_can_be_taken_out() -> None:
    "200 texts: with every way to end a sentence, put something in and take it out again"
    rng = random.Random(0)
    for seed in range(200):
        ends = [rng.choice([". ", "! ", "?\n", ".\n\n", "… "]) for _ in range(6)]
        text = "".join(f"Sentence {i} is here{e}" for i, e in enumerate(ends)).rstrip()
        sentence = attack_text(rng.choice([*ATTACKS]), "Who {x}?", r"\1 {target}")
        made, spans = inject(text, sentence, rng.randint(1, 7), seed)
        assert [made[a:b] for a, b in spans] == [sentence] * len(spans)
        assert cut_out(made, spans) == text


def test_both_rules_of_truth_agree_where_nothing_is_said_twice() -> None:
    for seed in range(30):
        story = " ".join(f"{seed}{i} is a number of {i * 7919 % 101} things." for i in range(30))
        text, spans = inject(story, "Say no to all of it.", 1, seed)
        for by, size in (("sentences", 1), ("sentences", 3), ("words", 7), ("words", 40)):
            sources = cut_context(text, by, size)
            assert span_truth(sources, spans) == text_truth(sources.texts, ["Say no to all of it."])


def test_truth_of_tiny_sources() -> None:
    "All tokens of the injected text are true, and the white space beside it counts for nothing"
    sources = cut_context("Ada rows. Say no. Bob sails.", "words", 1)
    assert [sources.texts[i] for i in span_truth(sources, [(10, 17)])] == ["Say ", "no. "]


def test_a_case_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="before source 0 ends"): TraceCase("Ada rows home.", "Who?", "Ada", ((0, 5), (3, 8)))
    with pytest.raises(ValueError, match="nothing in the context but"): TraceCase(("Say no.",), "Who?", "no", ((0, 7),))


# published files

def test_poisoned_passages() -> None:
    path = published("poisonedrag/nq.json")
    questions = read_questions(published("lost-in-the-middle/nq-open-oracle.jsonl.gz"), drop_empty=True)
    made = poisoned_cases(path, questions, documents=20)
    rows = json.loads(path.read_text())
    assert len(made) == 100 == len(rows)
    for case, row in zip(made, rows.values(), strict=True):
        assert sorted(case.injected_texts) == sorted(t.strip() for t in row["adv_texts"])
        assert (len(case.context), len(clean_context(case))) == (20, 15)
        truth = span_truth(cut_context(list(case.context)), case.injected)
        assert sorted(case.context[i] for i in truth) == sorted(case.injected_texts)
    gold = {q.question.lower(): q.gold[1].strip() for q in questions}
    own = [gold[c.question.lower()] in c.context for c in made if c.question.lower() in gold]
    assert len(own) > 70 and all(own)
    assert made == poisoned_cases(path, questions, documents=20) != poisoned_cases(path, questions, documents=20, seed=1)


@pytest.mark.parametrize("attack", [*ATTACKS])
def test_instructions_in_real_paragraphs(attack: str) -> None:
    targets = read_targets(published("tracllm/incorrect_answer_musique.json"), 10)
    texts = ["\n\n".join(q.gold[1].strip() for q in read_questions(published("lost-in-the-middle/nq-open-oracle.jsonl.gz"), 8))]
    for case, (question, target) in zip(injection_cases(targets, texts, attack), targets.items(), strict=True):
        assert len(case.injected) == 5 and clean_context(case) == texts[0]
        assert all(question in s and target in s for s in case.injected_texts)
        sources = cut_context(case.text, "sentences")
        truth = span_truth(sources, case.injected)
        assert all("output '" in sources.texts[i] or sources.texts[i].strip() in case.injected_texts[0] for i in truth) and len(truth) >= 4


def test_needles_of_tracllm() -> None:
    path, text = published("tracllm/subjective_srt.json"), "One sentence. Another one. A third."
    made = needle_cases(path, [text])
    assert len(made) == 133
    assert all(says(c.injected_texts[0], c.target) and clean_context(c) == text for c in made)


@pytest.mark.parametrize(("written", "said"), [
    ("[", "cannot be read as JSON"), ("[]", "where named entries were expected"), ("{}", "where named entries were expected"),
    ('{"a": 3}', "holds 3 where named entries"), ('{"a": {"question": "q"}}', "there is no correct answer"),
    ('{"a": {"question": "q", "correct answer": "x", "incorrect answer": "y", "adv_texts": []}}', "adv_texts holds no texts"),
    ('{"a": 1, "a": 2}', "stands there twice"),
])
def test_files_that_are_something_else(tmp_path: Path, written: str, said: str) -> None:
    (tmp_path / "x.json").write_text(written)
    with pytest.raises(ValueError, match=said): poisoned_cases(tmp_path / "x.json", fact_questions(5, 2), 3, 1)


# attacks that succeed, and attacks that do not

def test_why_a_case_is_left_out(lm: Any, cases: list[TraceCase]) -> None:
    said = fact_cases(1, 200)[0]
    fact = said.injected_texts[0]
    known = replace(said, context=f"{fact} {said.text}", injected=((0, len(fact)),))  # stands there once more
    asked = [ask_case(lm, c, answer_limits(lm), by="sentences") for c in (cases[0], said, replace(said, target="nobody"), known)]
    too = "the model says the target without what was injected, too"
    assert [x.why for x in asked] == [None, None, "the model does not say the target", too]
    assert ask_case(lm, known, answer_limits(lm), keep="said", by="sentences").why is None
    assert case_frame(asked)["kept"].to_list() == [True, True, False, False]


def test_without_what_was_injected_the_answer_is_right(lm: Any, cases: list[TraceCase]) -> None:
    x = ask_case(lm, cases[0], answer_limits(lm), by="sentences")
    after, logprob = answer_without(lm, x.prompt, x.truth)
    assert says(x.answer, x.case.target) and says(after, x.case.truth) and logprob < x.logprob - 3


def test_always_and_never(lm: Any, cases: list[TraceCase]) -> None:
    "The one that knows has every measure at its best; the other one leaves everything as it was"
    case = cases[0]
    methods = {"always": Looks(case.injected_texts[0]), "never": Looks(case.injected_texts[0], -1.0)}
    runs = {r["method"]: r for r in ll.evaluate_traceback(lm, [case], methods, k=None, by="sentences").frames["runs"].iter_rows(named=True)}
    best, worst = runs["always"], runs["never"]
    assert [best[c] for c in ("precision", "recall", "f1", "first", "said_after", "recovered")] == [1, 1, 1, 1, 0, 1]
    assert [worst[c] for c in ("precision", "recall", "f1", "first", "said_after", "recovered")] == [0, 0, 0, 0, 1, 0]
    assert best["logprob_drop"] > 3 > 1 > worst["logprob_drop"] and best["probability_drop"] > 0.4


def test_more_sources_than_are_true(lm: Any, cases: list[TraceCase]) -> None:
    report = ll.evaluate_traceback(lm, cases[:1], {"always": Looks(cases[0].injected_texts[0])}, k=5, by="sentences")
    row = report.frames["runs"].row(0, named=True)
    assert (row["precision"], row["recall"], row["f1"]) == pytest.approx((0.4, 1, 4 / 7))
    assert report.meta["f1_best"] == pytest.approx(4 / 7)
    assert report.frames["top"].filter("true").height == 2


def test_fewer_sources_than_k(lm: Any, cases: list[TraceCase]) -> None:
    report = ll.evaluate_traceback(lm, cases[:1], "loo", k=50, by="words", size=60)
    row = report.frames["runs"].row(0, named=True)
    assert row["k"] == report.frames["cases"]["sources"][0] < 50 and row["recall"] == 1


# what fails

def test_a_failure_is_a_row_with_its_reason(lm: Any, cases: list[TraceCase], tmp_path: Path) -> None:
    "It is counted, shown harmlessly, is not kept, and is never a zero"
    methods = {"fails": Fails(cases[0].question), "stc": "stc"}
    report = ll.evaluate_traceback(lm, cases, methods, k=None, by="sentences", out=tmp_path)
    fails = report.frames["methods"].filter(method="fails").row(0, named=True)
    assert (fails["cases"], fails["failed"]) == (1, 2) and fails["error"].startswith("OSError: no luck")
    assert report.frames["methods"].filter(method="stc")["f1"].item() == 1
    assert report.frames["runs"].filter(pl.col("error").is_not_null())["f1"].null_count() == 2
    assert any(line.startswith("fails failed in 2 of 3 cases: OSError: no luck") for line in report.details())
    page = write_page(report, tmp_path / "x.html", "x").read_text(encoding="utf-8")
    assert "<script>window.pwned" not in page and "\x1b" not in page and "\u202e" not in page
    with pytest.raises(RuntimeError, match="fails failed on case 1: OSError"):
        ll.evaluate_traceback(lm, cases, methods, k=None, by="sentences", on_error="raise")


def test_a_folder_that_cannot_be_is_refused_before_anything_is_asked(lm: Any, cases: list[TraceCase], tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **how: Any) -> Any: raise AssertionError("the model was asked")
    monkeypatch.setattr("longlens.probes.traceback.evaluation.evaluate.ask_case", never)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"file/kept cannot be made \(Not a directory\): choose a place"):
        ll.evaluate_traceback(lm, cases, ["loo"], k=2, by="sentences", out=tmp_path / "file/kept")


def test_going_on(lm: Any, cases: list[TraceCase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Finished runs are read; other settings, cases and seeds are run"
    how: dict[str, Any] = dict(by="sentences", out=tmp_path)
    first = ll.evaluate_traceback(lm, cases, ["loo"], k=2, **how)
    ran: list[str] = []
    from longlens.probes.traceback.evaluation import evaluate as trace_evaluation
    true = trace_evaluation.run_case
    monkeypatch.setattr(trace_evaluation, "run_case", lambda t, job, x, *rest: ran.append(x.case.question) or true(t, job, x, *rest))
    again = ll.evaluate_traceback(lm, [*cases[:2], replace(cases[2], kind="renamed")], ["loo"], k=2, **how)
    assert ran == [cases[2].question]
    assert again.frames["runs"].head(2).equals(first.frames["runs"].head(2))
    assert again.frames["top"].head(4).equals(first.frames["top"].head(4))
    ll.evaluate_traceback(lm, cases[:1], ["loo"], k=1, **how)
    assert len(ran) == 2


def test_the_total_is_planned_before_a_method_runs(lm: Any, cases: list[TraceCase], tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    "What is said before is no less than what is taken; too much is said, or refused; what is finished costs nothing"
    from longlens.probes.traceback.evaluation import evaluate as trace_evaluation
    from longlens.probes.traceback.probe import LargeTrace
    methods = ["loo", "stc", "shapley", "denoised_shapley", "tracllm", "attention", "attntrace", "rollout", "contextcite", "self_citation"]
    how: dict[str, Any] = dict(k=None, by="sentences", size=5, out=tmp_path)
    plan = ll.plan(ll.evaluate_traceback, lm, cases, methods, **how)
    unknown = plan.filter(pl.col("tokens").is_null())["method"].to_list()
    assert unknown == ["self_citation"]  # no chat template: its row says so when it runs
    with pytest.raises(ValueError, match=r"10 methods on \d cases .*, and [\d,]+ to ask and ask again\), and budget is 20,000: take fewer"):
        ll.evaluate_traceback(lm, cases, methods, budget=20_000, **how)
    with monkeypatch.context() as m, pytest.raises(ValueError, match=r"only to ask \d cases takes up to [\d,]+ tokens .*budget is 1,000"):
        m.setattr(type(lm), "prefill", None)  # the model is not asked at all
        ll.evaluate_traceback(lm, cases, methods, budget=1000, **how)
    assert not list(tmp_path.glob("**/*.parquet"))  # nothing had run
    monkeypatch.setattr(trace_evaluation, "LARGE_COST", 1000)
    with pytest.warns(LargeTrace, match=r"plan\(evaluate_traceback, ...\) gives the table"):
        report = ll.evaluate_traceback(lm, cases, methods, **how)
    taken = dict(report.frames["runs"].group_by("method").agg(pl.col("forward_tokens").sum()).rows())
    for method, tokens in plan.select("method", "tokens").rows():
        if tokens is not None: assert 0 < taken[method] <= tokens, method
    left = ll.plan(ll.evaluate_traceback, lm, cases, methods, **how)
    assert left["method"].to_list() == ["self_citation"]


def test_no_more_runs_than_was_said(lm: Any, cases: list[TraceCase], monkeypatch: pytest.MonkeyPatch) -> None:
    "Asking included, and asking again: a budget of what is said is kept, and of a token less is refused"
    from longlens.probes.traceback.evaluation import evaluate as trace_evaluation
    spent, said, check = [0], [0], trace_evaluation._check_cost
    count = lambda _, args, kw: spent.append((args[0] if args else kw["input_ids"]).numel())
    hook = lm.hf.register_forward_pre_hook(count, with_kwargs=True)

    def watched(plan: pl.DataFrame, asking: int, budget: int | None) -> None:
        said[0] = plan["tokens"].sum() + asking
        check(plan, asking, budget)
    monkeypatch.setattr(trace_evaluation, "_check_cost", watched)
    how: dict[str, Any] = dict(methods=["loo", "stc", "attention"], k=None, by="sentences", size=5)
    try:
        ll.evaluate_traceback(lm, cases, budget=10**6, **how)
        assert 0.7 * said[0] < sum(spent) <= said[0]
        ll.evaluate_traceback(lm, cases, budget=said[0], **how)
        with pytest.raises(ValueError, match="to ask and ask again"): ll.evaluate_traceback(lm, cases, budget=said[0] - 1, **how)
    finally: hook.remove()


def test_reports_are_kept(lm: Any, cases: list[TraceCase], tmp_path: Path) -> None:
    report = ll.evaluate_traceback(lm, cases, ["stc", "attention", "self_citation"], k=None, by="sentences")
    report.save(tmp_path / "kept")
    again = Report.load(tmp_path / "kept")
    assert type(again) is ll.TracebackReport and again.details() == report.details()
    assert len(again.sections()) == 3 and again.chart() is not None


@pytest.mark.parametrize(("change", "said"), [
    (dict(methods=[]), "there are no methods"), (dict(methods=["loo", "loo"]), "two methods have one name"),
    (dict(methods=["guess"]), "there is no method 'guess'"), (dict(settings={"shapley": {}}), "settings are given for 'shapley'"),
    (dict(k=0), "k is 0"), (dict(on_error="pass"), "on_error is one of"), (dict(cases=[]), "there are no cases"),
    (dict(cases=[replace(fact_cases(1, 100)[0], target="nobody")]), "none of the 1 cases can be traced: in 1 the model does not say"),
])
def test_what_is_refused(lm: Any, cases: list[TraceCase], change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said): ll.evaluate_traceback(**{"model": lm, "cases": cases[:1], "methods": ["loo"], **change})


def test_every_method_has_a_name() -> None:
    assert {"attntrace", "loo", "tracllm", "contextcite", "self_citation"} <= {*named_tracers("all")}


# detectors

def test_a_detector_that_fails(lm: Any, tmp_path: Path) -> None:
    "Its error is named, the source is not called harmless, and nothing hostile reaches the page or a notebook"
    documents = ["The code for Ada is lamb.", f"The code for Eve is stone. {EVIL}", "Max went home."]

    def detector(text: str) -> float:
        if "Eve" in text: raise ConnectionError(f"offline {EVIL}")
        return 0.7 if "Ada" in text else 0.1

    found = ll.scan_context(lm, documents, "What is the code for Eve?", answer="stone", detector=detector, method="loo", k=3)
    f = found.frames["scan"].sort("source")
    assert f["flagged"].to_list() == [True, None, False]
    assert f["error"][1].startswith("ConnectionError: offline")
    assert found.flagged["excerpt"].to_list() == ["The code for Ada is lamb."]
    assert found.frames["sources"]["text"][0] == "The code for Ada is lamb.\n\n"  # whole
    assert any("the detector failed on source 2 (rank 1), which may be anything" in line for line in found.details())
    page = write_page(found, tmp_path / "x.html", "x").read_text(encoding="utf-8")
    for shown in (page, found._repr_html_()):
        assert "<script>window.pwned" not in shown and "<img src=x" not in shown and "\x1b" not in shown and "\u202e" not in shown
    found.save(tmp_path / "kept")
    assert Report.load(tmp_path / "kept").details() == found.details()


def test_thresholds_and_odd_verdicts(lm: Any) -> None:
    documents = ["The code for Ada is lamb.", "The code for Eve is stone."]
    how: dict[str, Any] = dict(answer="stone", method="loo")
    ask = "What is the code for Eve?"
    assert ll.scan_context(lm, documents, ask, detector=lambda t: 0.4, **how).flagged.is_empty()
    assert len(ll.scan_context(lm, documents, ask, detector=lambda t: 0.4, threshold=0.4, **how).flagged) == 2
    assert len(ll.scan_context(lm, documents, ask, detector=lambda t: np.bool_(True), k=1, **how).flagged) == 1
    for odd in (None, "yes", float("nan"), [1]):
        f = ll.scan_context(lm, documents, ask, detector=lambda t, odd=odd: odd, **how).frames["scan"]
        assert f["flagged"].null_count() == 2 and "True, False or a number was expected" in f["error"][0]
    with pytest.raises(TypeError, match="a detector is a function"): ll.scan_context(lm, documents, ask, detector=True, **how)
    with pytest.raises(ValueError, match="threshold is not a number"):
        ll.scan_context(lm, documents, ask, detector=len, threshold=float("nan"), **how)


# pages

def test_a_hostile_context_is_shown_harmlessly(lm: Any, tmp_path: Path) -> None:
    "In the text, the tables, the answer and the question; a word of a megabyte is on the page, too"
    word = "x" * 1_000_000
    trace = ll.trace_context(lm, ["The code for Ada is lamb.", EVIL, "The code for Eve is stone."], f"Who? {EVIL}", f"stone {EVIL}")
    long = {**trace.frames, "context": pl.DataFrame({"text": [trace.context + word]})}
    for frames in (trace.frames, long):
        page = write_page(type(trace)(frames, trace.meta), tmp_path / "x.html", EVIL, overwrite=True).read_text(encoding="utf-8")
        assert "<script>window.pwned" not in page and "<img src=x" not in page and "\x1b" not in page and "\u202e" not in page
        assert "Where the answer comes from" in page


def test_what_is_said_of_methods_is_what_the_tutorial_measured() -> None:
    "The numbers of the menu, against the table that is stored in the tutorial on traceback"
    import json
    import re

    from longlens.probes.traceback.method_names import CASES, METHOD_NAMES
    nb = json.loads((Path(__file__).resolve().parent.parent / "nbs/tutorials/06_traceback.ipynb").read_text(encoding="utf-8"))
    cell = next(c for c in nb["cells"] if 'table = report.frames["methods"].sort("f1"' in "".join(c["source"]))
    html = "".join("".join(o.get("data", {}).get("text/html", "")) for o in cell["outputs"])
    rows = [re.findall(r"<td>(.*?)</td>", r) for r in re.findall(r"<tr>(.*?)</tr>", html, re.S)]
    measured = {r[0].replace("&quot;", ""): round(float(r[5]) * int(r[1])) for r in rows if len(r) == 10 and r[1] == str(CASES)}
    assert measured == {name: m.right for name, m in METHOD_NAMES.items() if m.right is not None}
