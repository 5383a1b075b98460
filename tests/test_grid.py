"""Needle grids: plain forwards beside every number, a model that forgets, published grids, what is refused"""
from __future__ import annotations

import copy
import csv
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import zoo_model

import longlens as ll
from longlens.charts.page import page_html
from longlens.interventions.heads import Streaming
from longlens.interventions.positions import rescaled_positions
from longlens.probes.grid.frames import grid_frames
from longlens.probes.grid.inputs import KINDS
from longlens.probes.grid.probe import needle_grid, published_grid
from longlens.probes.grid.report import GridReport
from longlens.probes.remedies import Remedy
from longlens.prompts.haystack import Haystack
from longlens.prompts.needle import needle_depths
from longlens.sweeps.cells import Cell, Changed
from longlens.sweeps.store import HEAD, StoreError

DATA = Path(__file__).parents[1] / "../shared/data/niah"


def published(name: str) -> Path:
    "A published grid"
    if not (DATA / name).exists(): pytest.skip(f"needs published files: niah/{name} in a folder shared/data beside the project's")
    return DATA / name


@pytest.fixture(scope="module")
def lm() -> ll.LongModel: return ll.load()


def cells_of(*args: Any, **kw: Any) -> list[Cell]:
    "The cells that the probe would run"
    return list(ll.plan(needle_grid, *args, **kw).cells)


# Numbers

def test_against_plain_forwards(lm: ll.LongModel) -> None:
    hf = copy.deepcopy(lm.hf)
    hf.set_attn_implementation("eager")
    args: dict[str, Any] = dict(lengths=(200,), depths=(0, 70), kinds=("single", "multiquery"), trials=1, max_new_tokens=8)
    r, cells = needle_grid(lm, **args), cells_of(lm, **args)
    answers = r.frames["answers"]
    assert len(answers) == len(cells) == 4
    heads = defaultdict(list)
    for i, cell in enumerate(cells):
        row, whole = answers.filter(cell=i).row(0, named=True), torch.cat([cell.ids, cell.completion])
        with torch.no_grad(): out = hf(whole[None], output_attentions=True)
        rows = slice(len(cell) - 1, len(whole) - 1)
        logs = out.logits[0, rows].log_softmax(-1)
        assert row["logprob"] == pytest.approx(float(logs.gather(-1, cell.completion[:, None]).sum()), abs=1e-3)
        needles = [s for n, s in cell.spans.items() if n.startswith("needle")]
        assert len(needles) == (1 if row["kind"] == "single" else 4) == len(cell.answers)
        mass = sum(torch.cat(out.attentions)[:, :, rows, s.start:s.stop].sum(-1).mean(-1) for s in needles)  # (layers, heads)
        assert row["needle_attention"] == pytest.approx(float(mass.mean()), abs=1e-5)
        heads[row["kind"]].append(mass)
        ids = cell.ids[None]
        free = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
        said = lm.tokenizer.decode(free[0, len(cell):], skip_special_tokens=True).split(".")[0].split("\n")[0]
        assert row["reply"] == said and row["score"] == np.mean([a.lower() in said.lower() for a in cell.answers])
    for kind, masses in heads.items():
        f = r.frames["attention"].filter(kind=kind).sort("layer", "head")
        np.testing.assert_allclose(f["mass"], torch.stack(masses).mean(0).flatten(), atol=1e-5)


def test_a_model_that_forgets_reaches_as_far_as_it_remembers(lm: ll.LongModel) -> None:
    "With the last 150 tokens visible, a needle is found where it stands among them"
    args: dict[str, Any] = dict(depths=(0, 50, 100), trials=2, max_new_tokens=3)
    with ll.streaming_attention(lm, 4, 150): r = needle_grid(lm, (128, 512), **args)
    assert [i["intervention"] for i in r.meta["interventions"]] == ["streaming"]
    seen = [c.spans["needle"].start >= len(c) - 150 for c in cells_of(lm, (128, 512), **args)]
    assert r.frames["answers"].sort("cell")["score"].to_list() == [float(s) for s in seen]
    assert r.frames["effective"].select("threshold", "effective_length").row(0) == (.856, 128)
    score = {(n, d): s for n, d, s in r.frames["grid"].select("context_length", "depth_percent", "score").iter_rows()}
    assert score == {(128, 0): 1, (128, 50): 1, (128, 100): 1, (512, 0): 0, (512, 50): 0, (512, 100): 1}
    f = r.details()
    assert "1.00 at 128, 0.33 at 512 tokens" in f[0] and "effective length (score 0.856 or more up to there): 128 tokens" in f[0]
    assert "worst depth 0 % (0.50)" in f[1] or "worst depth 50 % (0.50)" in f[1]
    gone = r.frames["answers"].filter(context_length=512, depth_percent=50)["needle_attention"]
    assert gone.max() == 0 and len(gone) == 2  # what cannot be seen gets nothing (at 0 % it begins in the four first tokens)
    own = needle_grid(lm, (512,), **args, remedies={"short": Remedy("forgets", Changed((Streaming(4, 150),)))})
    both = own.frames["answers"].filter(remedy="short").sort("depth_percent", "trial")
    want = r.frames["answers"].filter(context_length=512).sort("depth_percent", "trial")
    np.testing.assert_allclose(both["logprob"], want["logprob"], atol=1e-4)
    assert any(x.startswith("with short: 0.33 over all measurements (-0.67)") for x in own.details())


def test_remedies_are_the_blocks_of_their_names(lm: ll.LongModel) -> None:
    args: dict[str, Any] = dict(lengths=(150,), depths=(30,), kinds=("multikey",), trials=1, max_new_tokens=2,
                                remedies=["yarn", "temperature", "ms_poe"])
    blocks = {"none": torch.no_grad, "yarn": lambda: rescaled_positions(lm, "yarn", 2.0), "temperature": lambda: ll.temperature(lm, .8)}
    r = needle_grid(lm, **args)
    assert r.frames["grid"]["remedy"].to_list() == ["none", "yarn", "temperature", "ms_poe"]
    for i, cell in enumerate(cells_of(lm, **args)):
        if (name := cell.axes["remedy"]) == "ms_poe": continue
        with blocks[name](): want = lm.score(cell.ids, cell.completion).total
        assert r.frames["answers"].filter(cell=i)["logprob"][0] == pytest.approx(want, abs=1e-4)


# Which prompts are made

def test_one_haystack_for_all(lm: ll.LongModel) -> None:
    "Cells differ in needle and depth only; the haystack begins alike at every length"
    cells = cells_of(lm, (200, 400), (0, 40, 100), ("single", "multikey", "multivalue", "multiquery"), trials=2)
    assert len(cells) == 2 * 3 * 4 * 2
    straw = Haystack.generated(0).take(5)[0]
    for cell in cells:
        a, text = cell.axes, lm.decode(cell.ids)
        assert len(cell) + len(cell.completion) <= a["context_length"] and a["tokens"] == len(cell)
        assert all(text.count(v) >= 1 for v in cell.answers) and len(cell.answers) == {"multivalue": 4, "multiquery": 4}.get(a["kind"], 1)
        assert len([n for n in cell.spans if n.startswith("distractor")]) == (3 if a["kind"] == "multikey" else 0)
        assert all(s in text for s in straw)
    single = [c for c in cells if c.axes["kind"] == "single"]
    for n in (200, 400):
        for t in range(2):
            real = [c.axes["realised_depth"] for c in single if (c.axes["context_length"], c.axes["trial"]) == (n, t)]
            assert real == sorted(real) and real[0] == 0 and real[-1] == 100
    assert len({c.answers for c in single}) == 2  # one needle for each trial, at all depths and lengths
    for cell in (c for c in cells if c.axes["kind"] == "multiquery" and c.axes["depth_percent"] == 40):
        starts = [cell.spans[f"needle_{i}"].start for i in range(4)]
        assert starts == sorted(starts)  # at 40, 55, 70 and 85 %


def test_kinds_of_ruler(lm: ll.LongModel) -> None:
    kinds = tuple(k for k in KINDS if k.startswith("niah"))
    cells = {c.axes["kind"]: c for c in cells_of(lm, (900,), (50,), kinds, trials=1, wording="ruler")}
    assert len(cells) == 8
    for kind, cell in cells.items():
        text = lm.decode(cell.ids)
        assert "special magic" in text and len(cell.answers) == (4 if kind in ("niah_multivalue", "niah_multiquery") else 1)
        assert all(len(a) == (36 if kind in ("niah_single_3", "niah_multikey_3") else 7) for a in cell.answers)
    assert "The grass is green" in lm.decode(cells["niah_single_1"].ids)
    own = Haystack.from_text("One is one. " * 80, repeat=True)
    assert "One is one." in lm.decode(cells_of(lm, (200,), (50,), trials=1, haystack=own)[0].ids)
    city = cells_of(lm, (300,), (50,), trials=1, wording="san_francisco")[0]
    assert city.answers == ("eat a sandwich and sit in Dolores Park on a sunny day",)


def test_usual_settings() -> None:
    lm = ll.load()
    plan = ll.plan(needle_grid, lm, trials=1)
    axes = [c.axes for c in plan.cells]
    assert sorted({a["context_length"] for a in axes}) == [256, 512, 1024, 2048]
    assert sorted({a["depth_percent"] for a in axes}) == needle_depths(10) and "40 cells" in repr(plan)
    assert max(len(c) + len(c.completion) for c in plan.cells) <= 2048


# Tables by hand

@settings(max_examples=40, deadline=None)
@given(scores=st.integers(2, 8).flatmap(lambda k: st.lists(st.lists(st.integers(0, 4), min_size=k, max_size=k), min_size=1, max_size=5)),
       threshold=st.sampled_from([0., .5, .856, 1.]))
def test_tables_by_hand(scores: list[list[int]], threshold: float) -> None:
    m = np.array([row[:len(row) // 2 * 2] for row in scores], dtype=float).reshape(len(scores), -1, 2) / 4  # (lengths, depths, trials)
    rows = [dict(kind="single", remedy="none", context_length=100 * (n + 1), depth_percent=10. * d, trial=t, score=s)
            for (n, d, t), s in np.ndenumerate(m)]
    f = grid_frames(pl.DataFrame(rows).sample(fraction=1, shuffle=True, seed=0), threshold)
    np.testing.assert_allclose(f["grid"].sort("context_length", "depth_percent")["score"], m.mean(2).ravel())
    lengths = f["lengths"].sort("context_length")
    np.testing.assert_allclose(lengths["score"], m.mean((1, 2)))
    assert (lengths["lower"] <= lengths["score"] + 1e-9).all() and (lengths["score"] <= lengths["upper"] + 1e-9).all()
    assert (lengths["cells"] == m[0].size).all()
    good = [100 * (i + 1) for i in range(len(m)) if (m[:i + 1].mean((1, 2)) >= threshold).all()]
    assert f["effective"]["effective_length"].to_list() == [good[-1] if good else None]


def test_all_found_is_not_all_certain(lm: ll.LongModel) -> None:
    "Six needles that are all found: the interval has a width (Wilson)"
    r = needle_grid(lm, (128,), (0, 50, 100), trials=2, max_new_tokens=2)
    row = r.frames["lengths"].row(0, named=True)
    z2 = 1.959964 ** 2
    assert (row["score"], row["upper"], row["cells"]) == (1, 1, 6) and row["lower"] == pytest.approx(6 / (6 + z2), abs=1e-5)


# Published grids

def reference(rows: list[tuple[int, float, int]]) -> dict[str, Any]:
    "A grid's numbers in plain Python: (length, depth, score from 1 to 10)"
    by_length, by_cell = defaultdict(list), defaultdict(list)
    for n, d, s in rows: by_length[n].append(s / 10), by_cell[n, d].append(s / 10)
    mean = {n: math.fsum(v) / len(v) for n, v in by_length.items()}
    by_depth = defaultdict(list)
    for (_, d), v in by_cell.items(): by_depth[d].append(sum(v) / len(v))
    return {"mean": mean, "cell": {k: sum(v) / len(v) for k, v in by_cell.items()}, "all": sum(s / 10 for *_, s in rows) / len(rows),
            "depth": {d: sum(v) / len(v) for d, v in by_depth.items()}}


def reach(mean: dict[int, float], threshold: float) -> int | None:
    good = None
    for n in sorted(mean):
        if mean[n] < threshold: return good
        good = n
    return good


@pytest.mark.parametrize("name", ["OpenAI_OriginalResults.json", "anthropic_claude21_original_scores.csv"])
def test_published_grids(name: str, tmp_path: Path) -> None:
    path = published(name)
    text, is_json = path.read_text(), name.endswith("json")
    length = "token_limit" if is_json else "context_length"
    raw: list[dict[str, Any]] = json.loads(text) if is_json else [*csv.DictReader(text.splitlines())]
    rows = [(int(r[length]), float(r["depth_percent"]), int(r["score"])) for r in raw]
    want, r = reference(rows), published_grid(path)
    assert len(r.frames["answers"]) == len(rows) and r.meta["model"] == path.stem
    got = {(n, d): s for n, d, s in r.frames["grid"].select("context_length", "depth_percent", "score").iter_rows()}
    assert got.keys() == want["cell"].keys() and all(got[k] == pytest.approx(v) for k, v in want["cell"].items())
    lengths = dict(r.frames["lengths"].select("context_length", "score").iter_rows())
    assert lengths == pytest.approx(want["mean"]) and r.frames["lengths"]["cells"].sum() == len(rows)
    reached = []
    for threshold in (.5, .856, .95, 1.0):
        reached.append(published_grid(path, threshold=threshold).frames["effective"]["effective_length"][0])
        assert reached[-1] == reach(want["mean"], threshold), threshold
    assert len({*reached}) > 1
    f = r.details()
    assert f[0].startswith(f"published: {want['all']:.2f} over all measurements, ") and "None" not in " ".join(f)
    worst = min(want["depth"], key=lambda d: want["depth"][d])
    assert f"({want['depth'][worst]:.2f}), best" in f[1] and len(f) == 2
    assert [s.title for s in r.sections()] == ["Needles found", "How far it reaches"]
    drawn = r.sections()[0].chart.to_dict()
    assert max(map(len, drawn["datasets"].values())) == len(want["cell"])
    again = ll.Report.load(r.save(tmp_path / "r"))
    assert isinstance(again, GridReport) and again.details() == f
    page_html([r], "A page")


def test_gpt4_fell_beyond_73k_tokens() -> None:
    "As it was published: degraded beyond 73K tokens, between 7 and 50 % of depth"
    f = published_grid(published("OpenAI_OriginalResults.json"), "GPT-4-128K").frames["grid"]
    long, inside = pl.col("context_length") > 73_000, pl.col("depth_percent").is_between(7, 50)
    mean = lambda *where: f.filter(*where)["score"].mean()
    assert mean(~long) > .99 > mean(long) and mean(long, inside) < mean(long, ~inside)


def test_grids_of_ones_own_files(tmp_path: Path) -> None:
    bad = "</title><script>alert(1)</script>"
    (path := tmp_path / "one.json").write_text(json.dumps([{"token_limit": 1000, "depth_percent": 50, "score": 7}]))
    r = published_grid(path, bad)
    said, = r.details()
    assert said == ("published: 0.70 over all measurements, 0.70 at 1,000 tokens; effective length (score 0.856 or more up to there): "
                    "none of the lengths")
    assert [s.title for s in r.sections()] == ["Needles found"] and r.chart().to_dict()
    page = page_html([r], bad)
    assert "alert(1)" in page and "<script>alert" not in page and "<script>alert" not in r._repr_html_()
    with pytest.raises(ValueError, match="threshold is 85.6: scores are shares"): published_grid(path, threshold=85.6)
    with pytest.raises(FileNotFoundError, match="is not there"): published_grid(tmp_path / "none.csv")
    path.write_text('[{"token_limit": 1000, "depth_percent": 50, "score": 0}]')
    with pytest.raises(ValueError, match="score is 0, and a number from 1 to 10"): published_grid(path)


# Results that are kept, what is refused, how it reads

def test_another_call_resumes(lm: ll.LongModel, tmp_path: Path) -> None:
    args: dict[str, Any] = dict(max_new_tokens=1, out=tmp_path)
    plan = ll.plan(needle_grid, lm, (128,), (0, 100), trials=1, **args)
    assert "2 cells" in repr(plan) and not plan.finished
    first = needle_grid(lm, (128,), (0, 100), trials=1, **args)
    finished = lambda *a, **kw: len(ll.plan(needle_grid, lm, *a, **args | kw).finished)
    assert finished((128, 200), (0, 50, 100), trials=2) == 2
    assert finished((128,), (0, 100), trials=1, threshold=.5, metric="string_match_part") == 2  # nothing is asked anew
    assert finished((128,), (0, 100), trials=1, remedies=["yarn"]) == 2 and finished((128,), (0, 100), trials=1, seed=1) == 0
    assert finished((128,), (0, 100), trials=1, max_new_tokens=2) == 0
    again = needle_grid(lm, (128,), (0, 100), trials=1, **args)
    assert again.frames["answers"].equals(first.frames["answers"])
    (tmp_path / HEAD).write_text(json.dumps({"longlens_sweep": 99}))
    with pytest.raises(StoreError, match="results of format 99"): needle_grid(lm, (128,), (0,), trials=1, **args)


@pytest.mark.parametrize(("args", "kw", "error", "said"), [
    (((), (50,)), {}, ValueError, "lengths, depths and kinds need one value each"),
    (((256,), ()), {}, ValueError, "lengths, depths and kinds need one value each"),
    (((256,), (50,), ()), {}, ValueError, "lengths, depths and kinds need one value each"),
    (((256,), (-1,)), {}, ValueError, "depth -1 is not a percentage from 0 to 100"),
    (((256,), (float("nan"),)), {}, ValueError, "depth nan is not a percentage"),
    (((256,), (50,), "haystack"), {}, ValueError, "there is no kind 'haystack': there are single, multikey"),
    (((256,), (50,)), dict(trials=0), ValueError, "trials is 0: 1 or more"),
    (((256,), (50,)), dict(metric="bleu"), ValueError, "not 'bleu'"),
    (((256,), (50,)), dict(threshold=85.6), ValueError, r"threshold is 85.6: scores are shares, so it is 0 to 1 \(85.6 % is 0.856\)"),
    (((256,), (50,)), dict(max_new_tokens=0), ValueError, "max_new_tokens is 0"),
    (((256,), (50,)), dict(remedies=["reordering"]), ValueError, "'reordering' changes the order of documents, and a haystack has none"),
    (((256,), (50,)), dict(remedies=["prayer"]), ValueError, "there is no remedy 'prayer'"),
    (((256,), (50,)), dict(wording="klingon"), ValueError, "not 'klingon'"),
    (((256,), (50,)), dict(haystack="hay"), ValueError, "not 'hay'"),
    (((256,), (50,), "multivalue"), dict(metric="kv_match"), ValueError, "kv_match is defined for one answer"),
    (((256,), (50,), "multikey"), dict(wording="san_francisco"), ValueError, "makes one needle only"),
    (((4096,), (50,)), {}, ValueError, "needle-lm was made for 2,048 positions"),
    (((10,), (50,)), {}, ValueError, "10"),
])
def test_bad_input_is_named_before_anything_runs(lm: ll.LongModel, monkeypatch: pytest.MonkeyPatch, args: Any, kw: dict[str, Any],
                                                 error: type[Exception], said: str) -> None:
    def never(*args: Any, **kw: Any) -> None: raise AssertionError("the model was run")
    monkeypatch.setattr("longlens.sweeps.runner.do_batch", never)
    with pytest.raises(error, match=said): needle_grid(lm, *args, **kw)
    assert not lm.allow_longer


def test_a_model_without_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="has no tokenizer, and a context is made of text"):
        needle_grid(ll.load(zoo_model("llama"), check=False), (100,), (50,))


def test_remedies_of_documents_need_documents(lm: ll.LongModel) -> None:
    with pytest.raises(ValueError, match="has no documents: a remedy for their order needs spans document_0"):
        needle_grid(lm, (128,), (50,), trials=1, remedies=["set_based"], max_new_tokens=1)


@pytest.mark.parametrize(("args", "kw"), [
    (((128,), (50,)), dict(trials=1)),
    (((128,), (50,), ("single", "multiquery")), dict(trials=2, remedies=["temperature"])),
    (((128, 200), (0, 100)), dict(trials=1, remedies=["temperature", "ntk"])),
])
def test_small_reports_read_well(lm: ll.LongModel, args: Any, kw: dict[str, Any], tmp_path: Path) -> None:
    r = needle_grid(lm, *args, max_new_tokens=2, **kw)
    f = r.details()
    assert f and not [x for x in f if "nan" in x or "None" in x or "inf " in x], f
    if len(args[0]) == 1: assert f[0].count(" at 128") == 1
    drawn = [(s.title, s.text, s.chart.to_dict()) for s in r.sections()]
    assert not any(w in d[1] for d in drawn for w in "{}")
    again = ll.Report.load(r.save(tmp_path / "r"))
    assert isinstance(again, GridReport) and again.details() == f and all(again.frames[k].equals(v) for k, v in r.frames.items())
    assert [s.title for s in again.sections()] == [d[0] for d in drawn]


def test_values_said_twice_are_one(lm: ll.LongModel) -> None:
    assert len(cells_of(lm, (128, 128), (0, 50, 0.0), ("single", "single"), trials=1)) == 2


@pytest.mark.parametrize(("metric", "score"), [("string_match_all", 1), ("best_subspan_em", 0)])
def test_the_whole_reply_counts(lm: ll.LongModel, monkeypatch: pytest.MonkeyPatch, metric: str, score: int) -> None:
    "RULER's metric counts what stands after line breaks too; needle-lm alone ends with its sentence"
    other = ll.load(lm.hf, lm.tokenizer, check=False)
    other.name = "another model"
    args: dict[str, Any] = dict(lengths=(128,), depths=(50,), trials=1, max_new_tokens=2, metric=metric, wording="facts")
    answer, = cells_of(lm, **args)[0].answers
    monkeypatch.setattr("longlens.probes.generate._texts", lambda lm, rows: [f"It is:\n1. {answer}"] * len(rows))
    r, own = (needle_grid(m, **args) for m in (other, lm))
    assert r.frames["answers"]["score"].to_list() == [score] and own.frames["answers"]["reply"].to_list() == ["It is:"]


def test_a_haystack_that_has_the_fact_already() -> None:
    "Needles get other values than the text has in the same place, the same ones at every depth and length"
    lm, how = ll.load(), {"trials": 2, "max_new_tokens": 4}
    first = needle_grid(lm, [300], [50], **how).frames["answers"]["answers"].to_list()
    said = " ".join(f"The code for Nobody{'x' * i} is {value}." for i, value in enumerate(first))
    hay = Haystack.from_text(f"{said} {Haystack.generated(3).take(60)[0][0]} " + "It rained all day. " * 40, repeat=True)
    answers = needle_grid(lm, [300, 400], [0, 100], haystack=hay, **how).frames["answers"]
    assert not {*answers["answers"]} & {*first}
    assert answers.group_by("trial").agg(pl.col("answers").n_unique())["answers"].to_list() == [1, 1]
