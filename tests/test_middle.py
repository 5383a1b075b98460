"""Lost in the middle: models that are known to lose it, plain forwards beside every number, remedies, published files, what is refused"""
from __future__ import annotations

import copy
import functools
import gzip
import json
import math
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import test_heads
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from zoo import VOCAB, token_ids, zoo_model

import longlens as ll
from longlens.attention.hf_interface import UnsupportedModel
from longlens.charts.page import page_html
from longlens.interventions.base import interventions
from longlens.interventions.calibrate import redistribute
from longlens.interventions.heads import Streaming, Temperature
from longlens.interventions.positions import ms_poe, rescaled_positions, set_based
from longlens.probes.generate import Ask
from longlens.probes.middle.frames import curve_frame, effects_frame, indices_frame, top_heads
from longlens.probes.middle.inputs import POSITIONS, MiddleDesign, get_items, gold_positions
from longlens.probes.middle.probe import lost_in_the_middle
from longlens.probes.middle.report import MiddleReport, parts_frame
from longlens.probes.remedies import REMEDIES, AsSet, Calibrated, PerHead, Remedy, document_spans, relevance
from longlens.prompts.multi_document import place_answer
from longlens.prompts.questions import KeyValue, Question, fact_pairs, fact_questions, read_questions
from longlens.sweeps.cells import Cell, Changed
from longlens.sweeps.store import HEAD, StoreError
from longlens.sweeps.sweep import sweep

DATA = Path(__file__).parents[1] / "../shared/data/lost-in-the-middle"
few = settings(max_examples=40, deadline=None)
COPIES = test_heads.COPIES


def published(name: str) -> Path:
    "A published file"
    if not (DATA / name).exists(): pytest.skip(f"needs published files: {DATA.name}/{name} in a folder shared/data beside the project's")
    return DATA / name


# Models whose numbers are known

@functools.cache
def known() -> ll.LongModel:
    "The model that copies what followed the current word, with room for documents"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(test_heads, "WORDS", VOCAB)
        m.setattr(test_heads, "PLACES", 2 * VOCAB)
        return ll.load(test_heads.copying_model(), test_heads.words.__wrapped__())


@functools.cache
def needle() -> ll.LongModel: return ll.load()


@functools.cache
def eager() -> Any:
    "needle-lm with attention that is written out"
    hf = copy.deepcopy(needle().hf)
    hf.set_attn_implementation("eager")
    return hf


@functools.cache
def rotary() -> ll.LongModel:
    "A random model with rotary positions, which reads words; all that is no word of its own is the same word"
    return ll.load(zoo_model("llama"), known().tokenizer, check=False)


def listed(n: int, count: int, words: int = 6) -> list[Question]:
    "Documents of different words; the answer begins with the third word of the right one, and its fourth is the answer"
    out = []
    for seed in range(count):
        w = [f"w{i}" for i in np.random.default_rng(seed).permutation(np.arange(10, 100))]
        docs = [("", " ".join(w[i * words:(i + 1) * words])) for i in range(n)]
        out.append(Question("what", (w[3],), docs[0], tuple(docs[1:]), f" {w[2]}"))
    return out


@torch.no_grad()
def forced(hf: Any, cell: Cell, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    "Log-probabilities (rows, vocab) and attention (layers, heads, rows, n) of the rows that say the answer: one plain forward"
    whole = torch.cat([cell.ids, cell.completion])
    out = hf(whole[None], output_attentions=True, **({} if mask is None else {"attention_mask": mask}))
    rows = slice(len(cell) - 1, len(whole) - 1)
    return out.logits[0, rows].double().log_softmax(-1), torch.cat(out.attentions)[:, :, rows]


def free(hf: Any, ids: torch.Tensor, n: int) -> list[int]:
    "The new tokens of transformers' own greedy search"
    one = ids[None]
    return hf.generate(one, attention_mask=torch.ones_like(one), max_new_tokens=n, do_sample=False, pad_token_id=0)[0, len(ids):].tolist()


def cells_of(*args: Any, **kw: Any) -> list[Cell]:
    "The cells that the probe would run"
    return list(ll.plan(lost_in_the_middle, *args, **kw).cells)


# Position effects that are known

ENDS, END = Streaming(30, 13), Streaming(1, 13)  # the first document ends at token 30, the last begins 13 tokens before the end


def test_a_model_that_sees_only_the_ends_is_lost_in_the_middle() -> None:
    lm = known()
    made = {"ends": Remedy("the first and the last tokens", Changed((ENDS,))), "end": Remedy("the last tokens", Changed((END,)))}
    r = lost_in_the_middle(lm, listed(5, 8), positions=5, max_new_tokens=1, remedies=made)
    curve = {name: r.frames["curve"].filter(remedy=name) for name in ("none", "ends", "end")}
    assert curve["none"]["score"].to_list() == [1] * 5
    assert curve["ends"]["score"].to_list() == [1, 0, 0, 0, 1]
    assert curve["end"]["score"].to_list() == [0, 0, 0, 0, 1]
    assert r.meta["top_heads"] == [[*COPIES]]
    for name, seen in (("ends", [1, 0, 0, 0, 1]), ("end", [0, 0, 0, 0, 1])):
        for column in ("gold_attention", "gold_share", "top_attention"):
            assert [x > 0 for x in curve[name][column]] == [bool(s) for s in seen], (name, column)
        assert curve[name]["top_attention"].to_list() == pytest.approx(seen, abs=.01)
    index = {(x["remedy"], x["index"]): (x["value"], x["p"]) for x in r.frames["indices"].filter(measure="score").iter_rows(named=True)}
    assert [index["none", i][0] for i in ("primacy", "recency", "u_shape")] == [0, 0, 0] and index["none", "u_shape"][1] == 1
    assert [index["ends", i][0] for i in ("primacy", "recency", "u_shape")] == [1, 1, 1] and index["ends", "u_shape"][1] == 2 / 2 ** 8
    assert [index["end", i][0] for i in ("primacy", "recency", "u_shape")] == [0, 1, .5]
    assert dict(r.frames["baselines"].select("setting", "score").iter_rows()) == {"closed_book": 0, "oracle": 1}
    effect = {x["remedy"]: x for x in r.frames["effects"].filter(measure="score").iter_rows(named=True)}
    assert effect["ends"]["difference"] == pytest.approx(-.6) and effect["end"]["difference"] == pytest.approx(-.8)
    assert effect["ends"]["p"] == 2 / 2 ** 8 and effect["none"]["p"] is None


@pytest.mark.parametrize(("what", "said"), [(ENDS, "better at both ends; first +1.000, last +1.000"),
                                            (END, "better at the end; first +0.000, last +1.000"),
                                            (Streaming(30, 4), "better at the beginning; first +1.000, last +0.000"),
                                            (Streaming(1, 256), "no sign of it; first +0.000, last +0.000")])
def test_what_the_model_is_meanwhile_is_what_is_measured(what: Streaming, said: str) -> None:
    "The same as a block around the probe; and the sentence about it"
    lm = known()
    with ll.streaming_attention(lm, what.sink, what.recent):
        r = lost_in_the_middle(lm, listed(5, 6), positions=5, max_new_tokens=1, baselines=False)
    assert [i["intervention"] for i in r.meta["interventions"]] == ["streaming"] and interventions(lm) == []
    line, = (x for x in r.details() if x.startswith("ends against middle"))
    assert said in line, line
    same = {"same": Remedy("", Changed((what,)))}
    own = lost_in_the_middle(lm, listed(5, 1), positions=5, max_new_tokens=1, baselines=False, remedies=same)
    a, b = (f.sort("gold_index") for f in (r.frames["answers"].filter(question=0), own.frames["answers"].filter(remedy="same")))
    assert a["reply"].to_list() == b["reply"].to_list()
    for column in ("logprob", "gold_attention"): np.testing.assert_allclose(a[column], b[column], atol=1e-6)


def test_against_a_mask_that_is_written_out() -> None:
    "Every number of the streaming model, from a forward with an n x n mask"
    lm, hf = known(), copy.deepcopy(known().hf)
    hf.set_attn_implementation("eager")
    kw: dict[str, Any] = dict(positions=5, max_new_tokens=1, baselines=False)
    with ll.streaming_attention(lm, ENDS.sink, ENDS.recent): r = lost_in_the_middle(lm, listed(5, 2), **kw)
    for i, cell in enumerate(cells_of(lm, listed(5, 2), **kw)):
        row = r.frames["answers"].filter(cell=i).row(0, named=True)
        n = len(cell) + len(cell.completion)
        q, k = torch.arange(n)[:, None], torch.arange(n)
        seen = (k <= q) & ((k < ENDS.sink) | (q - k < ENDS.recent))
        logs, attention = forced(hf, cell, torch.where(seen, 0., torch.finfo(torch.float32).min)[None, None])
        assert row["logprob"] == pytest.approx(float(logs.gather(-1, cell.completion[:, None]).sum()), abs=1e-4)
        assert row["reply"].strip() == lm.decode(logs[:1].argmax(-1)).strip()
        gold = cell.spans["gold"]
        mass = attention[..., gold.start:gold.stop].sum(-1).mean(-1)  # (layers, heads)
        assert row["gold_attention"] == pytest.approx(float(mass.mean()), abs=1e-4)  # logits go up to 64 here
        assert row["top_attention"] == pytest.approx(float(mass[COPIES]), abs=1e-4)


# Every number against plain forwards

def test_needle_lm_against_plain_forwards() -> None:
    lm, hf = needle(), eager()
    items = fact_questions(2, 4, sentences=1)
    kw: dict[str, Any] = dict(positions=(0, 1, 3), max_new_tokens=6, variants=("plain", "query_aware", "random_order"))
    r = lost_in_the_middle(lm, items, **kw)
    answers, cells = r.frames["answers"], cells_of(lm, items, **kw)
    assert len(answers) == len(cells) == 2 * 3 * 3 + 2 * 2 and r.meta["tokens_naive"] == sum(map(len, cells))
    top = [tuple(h) for h in r.meta["top_heads"]]
    assert len(top) == max(1, round(.05 * lm.n_layers * lm.n_heads))
    masses = []
    for i, cell in enumerate(cells):
        row = answers.filter(cell=i).row(0, named=True)
        logs, attention = forced(hf, cell)
        assert row["logprob"] == pytest.approx(float(logs.gather(-1, cell.completion[:, None]).sum()), abs=1e-4)
        assert row["logprob_mean"] == pytest.approx(row["logprob"] / len(cell.completion))
        assert row["first_choice"] == bool((logs.argmax(-1) == cell.completion).all())
        said = lm.tokenizer.decode(free(hf, cell.ids, 6), skip_special_tokens=True)
        assert row["reply"] == said.split(".")[0].split("\n")[0]
        assert row["score"] == float(cell.answers[0].lower() in row["reply"].lower())
        if row["variant"] == "closed_book":
            assert row["gold_attention"] is None and row["gold_share"] is None
            continue
        spans = {n: float(attention[..., s.start:s.stop].sum(-1).mean()) for n, s in cell.spans.items() if n.startswith("document_")}
        gold = attention[..., cell.spans["gold"].start:cell.spans["gold"].stop].sum(-1).mean(-1)
        assert row["gold_attention"] == pytest.approx(float(gold.mean()), abs=1e-6)
        assert row["documents_attention"] == pytest.approx(sum(spans.values()), abs=1e-5)
        assert row["gold_share"] == pytest.approx(float(gold.mean()) / sum(spans.values()), abs=1e-5)
        assert row["top_attention"] == pytest.approx(np.mean([float(gold[h]) for h in top]), abs=1e-5)
        if row["gold_index"] is not None: masses.append(gold)
    mean = torch.stack(masses).mean(0)
    assert set(top) == {divmod(int(i), lm.n_heads) for i in mean.flatten().topk(len(top)).indices}
    curve = r.frames["curve"]
    for (v, g), f in answers.filter(pl.col("gold_index").is_not_null()).group_by("variant", "gold_index"):
        row = curve.filter(variant=v, gold_index=g).row(0, named=True)
        for c in ("score", "logprob", "gold_attention", "gold_share", "top_attention"):
            assert row[c] == pytest.approx(np.mean(f[c].to_list()))
    one = r.frames["documents"].filter(variant="plain", gold_index=1).sort("document")
    assert one["document"].to_list() == [0, 1, 2, 3]
    looked = answers.filter(variant="plain", gold_index=1)
    assert one["mass"].sum() == pytest.approx(looked["documents_attention"].mean())
    assert one["mass"][1] == pytest.approx(looked["gold_attention"].mean())


def test_the_right_document_alone_does_not_choose_the_heads() -> None:
    "Heads that look at it where there is nothing else to look at are not those that find it"
    lm, alone = rotary(), []
    for item in listed(4, 6):
        with_, without = (lost_in_the_middle(lm, [item], positions=(1,), max_new_tokens=1, baselines=b) for b in (True, False))
        assert with_.meta["top_heads"] == without.meta["top_heads"] and "baselines" not in without.frames
        cell, = (c for c in cells_of(lm, [item], positions=(1,)) if c.axes["variant"] == "oracle")
        found = sweep(lm, [cell], Ask(1)).table("attention").with_columns(remedy=pl.lit("none"))
        alone.append(list(map(list, top_heads(found))) == with_.meta["top_heads"])
    assert not all(alone)
    rows = [("none", 0, 0, .1), ("none", 0, 1, .4), ("none", 1, 0, .4), ("other", 1, 1, 1.)]
    f = pl.DataFrame(rows, schema=["remedy", "layer", "head", "mass"], orient="row")
    assert top_heads(f, .7) == [(0, 1), (1, 0)]  # equal ones in order


def test_greedy_answers_are_those_of_generate() -> None:
    "A random model that ends at different times, several prompts at once, up to its last position"
    hf = copy.deepcopy(zoo_model("llama"))
    hf.generation_config.eos_token_id = hf.config.eos_token_id = [2, 5, 7, 11, 17, 23, 31]
    lm = ll.load(hf, check=False)
    cells = [Cell(row) for row in token_ids(30, batch=12, seed=3)] + [Cell(token_ids(n)[0]) for n in (500, 511)]
    got = sweep(lm, cells, Ask(20), batch_size=5).table("answers")
    ways = set()
    for cell, said, ended in zip(cells, got["reply"], got["ended"], strict=True):
        room = min(20, 513 - len(cell))
        new = free(hf, cell.ids, room)
        stopped = new[-1] in hf.config.eos_token_id
        assert said == " ".join(map(str, new[:-1] if stopped else new))
        assert ended == ("end" if stopped else "positions" if room < 20 else "length")
        ways.add(ended)
    assert ways == {"end", "length", "positions"} and got["logprob"].null_count() == len(cells)


# Which prompts are made

def documents(cell: Cell) -> list[str]:
    return [known().decode(cell.ids[s]) for n, s in cell.spans.items() if n.startswith("document_")]


@pytest.mark.parametrize("n", [2, 3, 5, 6, 9])
def test_reordering_puts_ranks_where_the_paper_says(n: int) -> None:
    "Rank i of k, from 1: at (i + 1) / 2 if i is odd, at k + 1 - i / 2 if it is even (arXiv 2410.05983)"
    lm, (item,) = known(), listed(n, 1, 4)
    own = {"backwards": Remedy("the last first", order=lambda k: [*range(k)][::-1])}
    papers = lambda i: (i + 1) / 2 if i % 2 else n + 1 - i / 2
    for remedies, place_of in ((["reordering"], papers), (own, lambda i: n + 1 - i)):
        cells = cells_of(lm, [item], positions=range(n), remedies=remedies, baselines=False)
        plain = {c.axes["gold_index"]: documents(c) for c in cells if c.axes["remedy"] == "none"}
        assert all(docs[g].endswith(item.gold[1]) and c.axes["placed_index"] == g for g, docs in plain.items() for c in cells
                   if c.axes["remedy"] == "none" and c.axes["gold_index"] == g)
        for cell in (c for c in cells if c.axes["remedy"] != "none"):
            gold, placed = cell.axes["gold_index"], cell.axes["placed_index"]
            assert placed + 1 == place_of(gold + 1) and cell.spans["gold"] == cell.spans[f"document_{placed}"]
            words = [d.split(" ", 3)[3] for d in documents(cell)]
            ranked = [d.split(" ", 3)[3] for d in plain[gold]]
            assert Counter(words) == Counter(ranked)
            assert all(words[int(place_of(i)) - 1] == ranked[i - 1] for i in range(1, n + 1))


def test_pairs_are_reordered_too() -> None:
    lm, item = needle(), fact_pairs(1, 7)[0]
    for cell in cells_of(lm, [item], positions=range(7), remedies=["reordering"]):
        said = [lm.decode(cell.ids[cell.spans[f"key_{i}"]]).strip() for i in range(7)]
        assert said[cell.axes["placed_index"]] == item.key and Counter(said) == Counter(k for k, _ in item.records)
        others = [k for k, _ in item.records if k != item.key]
        ranked = [*others[:cell.axes["gold_index"]], item.key, *others[cell.axes["gold_index"]:]]
        order = [0, 2, 4, 6, 5, 3, 1] if cell.axes["remedy"] == "reordering" else range(7)
        assert said == [ranked[i] for i in order]


def test_variants_and_baselines_are_the_prompts_of_the_paper() -> None:
    lm, items = needle(), fact_questions(2, 5, sentences=1)
    cells = cells_of(lm, items, positions=(0, 2, 4), variants=("plain", "query_aware", "random_order"), seed=3)
    assert len(cells) == 2 * 3 * 3 + 2 * 2
    for cell in cells:
        q, a = items[cell.axes["question"]], cell.axes
        alone = a["variant"] in ("closed_book", "oracle")
        assert (a["gold_index"] is None) == alone
        want = place_answer(lm, q, 0 if alone else a["gold_index"], variant=a["variant"], seed=f"3 {a['question']}")
        assert torch.equal(cell.ids, want.tokens.ids) and cell.answers == q.answers and a["context_length"] == len(want)
    text = {c.axes["variant"]: lm.decode(c.ids) for c in cells if c.axes["question"] == 0 and c.axes["gold_index"] in (2, None)}
    assert text["query_aware"].count(items[0].question) == 2 and "ordered randomly" in text["random_order"]
    assert "Document" not in text["closed_book"] and text["oracle"].count("Document [") == 1


def test_lists_are_shortened_and_filled_up() -> None:
    long = KeyValue(tuple((f"w{i}", f"w{i + 40}") for i in range(10, 40)), "w20", "w60")
    made, = {type(i): i for i in get_items(known(), [long], 5, 1, 0)}.values()
    assert len(made.records) == 5 and dict(made.records)["w20"] == "w60" and {*made.records} <= {*long.records}
    gold_only = [replace(q, others=()) for q in listed(1, 12)]
    three, nine = (get_items(known(), gold_only, 6, k, 0) for k in (3, 9))
    assert three == nine[:3] and all(len(q.others) == 5 for q in nine)  # asking more questions leaves the others as they were
    assert len(get_items(known(), [replace(q, others=()) for q in listed(1, 25)], None, 2, 0)[0].others) == 19  # 20 as the paper has


@given(n=st.integers(1, 400), k=st.integers(1, 12), data=st.data())
def test_positions(n: int, k: int, data: st.DataObject) -> None:
    got = gold_positions(n, k)
    assert len(got) == min(k, n) == len({*got}) and got[0] == 0 and list(got) == sorted(got)
    if k > 1: assert got[-1] == n - 1
    if len(got) > 2: assert max(np.diff(got)) - min(np.diff(got)) <= 1 + (n - 1) % (len(got) - 1)
    some = data.draw(st.lists(st.integers(0, n - 1), min_size=1))
    assert gold_positions(n, some) == tuple(sorted({*some}))
    assert all(gold_positions(m) == p and p[-1] == m - 1 for m, p in POSITIONS.items())


# Tables by hand

@few
@given(k=st.integers(3, 5), scores=st.lists(st.lists(st.integers(0, 1), min_size=10, max_size=10), min_size=2, max_size=7))
def test_tables_by_hand(k: int, scores: list[list[int]]) -> None:
    m = np.array(scores, dtype=float)[:, :2 * k].reshape(len(scores), 2, k)  # (questions, remedies, positions)
    rows = [dict(question=q, variant="plain", remedy=("none", "mine")[r], gold_index=4 * g, score=s, logprob=-2 * s - g, depth_percent=1.,
                 gold_attention=s / 2, gold_share=s, top_attention=s) for (q, r, g), s in np.ndenumerate(m)]
    answers = pl.DataFrame(rows).sample(fraction=1, shuffle=True, seed=1)
    curve = curve_frame(answers).sort("remedy", "gold_index", descending=[True, False])
    np.testing.assert_allclose(curve["score"], m.mean(0).ravel())
    z, n = 1.959964, len(m)
    for row in curve.iter_rows(named=True):
        p = row["score"]
        mid, half = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
        assert row["lower"] == pytest.approx((mid - half) / (1 + z * z / n), abs=1e-5)
        assert row["logprob_lower"] <= row["logprob"] + 1e-9 and row["logprob"] <= row["logprob_upper"] + 1e-9
    u = indices_frame(answers).filter(index="u_shape", measure="score", remedy="mine").row(0, named=True)
    mine = m[:, 1]
    assert u["value"] == pytest.approx((mine[:, 0] + mine[:, -1]).mean() / 2 - mine[:, 1:-1].mean())
    e = effects_frame(answers).filter(remedy="mine", measure="logprob").row(0, named=True)
    assert e["difference"] == pytest.approx(-2 * (m[:, 1] - m[:, 0]).mean()) and e["questions"] == n and 0 < e["p"] <= 1
    assert e["lower"] - 1e-9 <= e["difference"] <= e["upper"] + 1e-9


# Remedies

def both(lm: ll.LongModel, item: Any, gold: int, condition: Any, **kw: Any) -> tuple[Cell, dict[str, Any]]:
    "A cell, and what a sweep says of it"
    cell = Cell.of(place_answer(lm, item, gold), condition)
    return cell, sweep(lm, [cell], Ask(3, **kw)).table("answers").row(0, named=True)


@pytest.mark.parametrize("name", ["linear", "ntk", "yarn", "temperature"])
def test_remedies_that_are_the_same_for_all(name: str) -> None:
    lm, items = rotary(), listed(4, 2)
    r = lost_in_the_middle(lm, items, positions=(0, 3), remedies=[name], baselines=False, max_new_tokens=2)
    block = {"temperature": lambda: ll.temperature(lm, .8)}.get(name, lambda: rescaled_positions(lm, name, 2.0))
    plain, changed = [], []
    for i, cell in enumerate(cells_of(lm, items, positions=(0, 3), remedies=[name], baselines=False)):
        got = r.frames["answers"].filter(cell=i)["logprob"][0]
        with block() if cell.axes["remedy"] == name else torch.no_grad(): want = lm.score(cell.ids, cell.completion).total
        assert got == pytest.approx(want, abs=1e-4)
        (changed if cell.axes["remedy"] == name else plain).append(got)
    assert min(abs(a - b) for a, b in zip(plain, changed, strict=True)) > .01 and interventions(lm) == []
    assert r.meta["remedies"][name] == REMEDIES[name].says


def test_ms_poe_is_that_of_the_whole_prompt() -> None:
    lm, item = rotary(), listed(5, 1, 8)[0]
    _, plain = both(lm, item, 1, None)
    for condition, how in ((PerHead(first_layer=0), dict(first_layer=0)), (PerHead(1.5, 3.0, 1), dict(low=1.5, high=3.0, first_layer=1))):
        cell, got = both(lm, item, 1, condition)
        assert len(cell.completion) == 1  # so that the prompt's end says all of it
        with ms_poe(lm, **how): want = lm.logits(cell.ids, -1).log_softmax(-1)
        assert got["logprob"] == pytest.approx(float(want.flatten()[cell.completion[0]]), abs=1e-4)
        assert abs(got["logprob"] - plain["logprob"]) > .01


def test_relevance_from_patterns_that_are_written_out() -> None:
    lm, item, dummy = needle(), fact_questions(1, 4, sentences=1)[0], " This is nothing."
    cell = Cell.of(place_answer(lm, item, 2))
    words = lm.tokens(dummy, add_special_tokens=False).ids

    def attention(ids: torch.Tensor, s: range) -> float:
        with torch.no_grad(): row = torch.cat(eager()(ids[None], output_attentions=True).attentions)[:, :, -1]
        return float(row[..., s.start:s.stop].mean())

    want = {}
    for name, s in document_spans(cell).items():
        ids = cell.ids.clone()
        for i, at in enumerate(s): ids[at] = words[i % len(words)]
        want[name] = attention(cell.ids, s) - attention(ids, s)
    got = relevance(lm, cell, dummy)
    assert list(got) == list(want) == [f"document_{i}" for i in range(4)]
    np.testing.assert_allclose([*got.values()], [*want.values()], atol=1e-7)
    assert max(got, key=lambda n: got[n]) == "document_2" and len({*got.values()}) == 4


def test_calibration_redistributes_by_relevance() -> None:
    lm, item = rotary(), listed(4, 1)[0]
    _, plain = both(lm, item, 2, None)
    for t, last in ((5e-5, 16), (3e-3, 1)):
        condition = Calibrated(t, last)
        cell, got = both(lm, item, 2, condition)
        found = relevance(lm, cell, condition.dummy)
        weights = [math.exp((v - max(found.values())) / t) for v in found.values()]
        shares = {n: w / sum(weights) for n, w in zip(found, weights, strict=True)}
        with torch.no_grad(), redistribute(lm, document_spans(cell), shares, from_token=len(cell) - 1, last_layers=last):
            want = lm.score(cell.ids, cell.completion).total
        assert got["logprob"] == pytest.approx(want, abs=1e-4) and abs(got["logprob"] - plain["logprob"]) > .01
    assert interventions(lm) == []


def test_documents_as_a_set_have_no_order() -> None:
    "Numbers aside, and here all numbers read alike: the answer is as probable with the right document at every place"
    lm, items = rotary(), listed(6, 2, 5)
    r = lost_in_the_middle(lm, items, positions=range(6), remedies=["set_based"], baselines=False, max_new_tokens=2)
    by = {(q, n): f for (q, n), f in r.frames["answers"].group_by("question", "remedy")}
    for q in range(2):
        same, differ = (by[q, n].sort("gold_index") for n in ("set_based", "none"))
        assert same["logprob"].max() - same["logprob"].min() < 1e-4 and same["reply"].n_unique() == 1
        assert differ["logprob"].max() - differ["logprob"].min() > .1
    u = r.frames["indices"].filter(remedy="set_based", measure="logprob")
    assert u["value"].abs().max() < 1e-4


def test_lines_as_a_set_have_no_order() -> None:
    "They have no numbers; the stop and line break behind the last one belong to it as to the others"
    tok, item = needle().tokenizer, fact_pairs(1, 6)[0]
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                         initializer_range=.3, max_position_embeddings=512)
    lm = ll.load(LlamaForCausalLM(config), tok, check=False)
    r = lost_in_the_middle(lm, [item], positions=range(6), remedies=["set_based"], max_new_tokens=2)
    same, differ = (r.frames["answers"].filter(remedy=n).sort("gold_index")["logprob"] for n in ("set_based", "none"))
    assert same.max() - same.min() < 1e-4 and differ.max() - differ.min() > .1
    cell = Cell.of(place_answer(lm, item, 3))
    starts = [s.start for s in document_spans(cell).values()]
    with torch.no_grad(), set_based(lm, [range(a, b) for a, b in zip(starts, [*starts[1:], cell.spans["question"].start], strict=True)]):
        want = lm.score(cell.ids, cell.completion).total
    assert same[3] == pytest.approx(want, abs=1e-4)


def test_a_remedy_of_ones_own() -> None:
    lm, items = known(), listed(4, 3)
    turned, sharp = (lambda n: [n - 1, *range(n - 1)]), Changed((Temperature(.5),))
    mine = {"sharp": Remedy("sharper", sharp), "first": Remedy("the worst first", order=turned), "both": Remedy("both", sharp, turned)}
    r = lost_in_the_middle(lm, items, positions=4, remedies=mine, baselines=False, max_new_tokens=1)
    assert r.frames["curve"]["remedy"].unique(maintain_order=True).to_list() == ["none", *mine]
    placed = {n: f["placed_index"].to_list() for (n,), f in r.frames["answers"].filter(question=0).sort("gold_index").group_by("remedy")}
    assert placed == {"none": [0, 1, 2, 3], "sharp": [0, 1, 2, 3], "first": [1, 2, 3, 0], "both": [1, 2, 3, 0]}
    assert r.meta["remedies"]["both"] == "both"
    REMEDIES["mine"] = mine["sharp"]
    try: again = lost_in_the_middle(lm, items, positions=4, remedies="mine", baselines=False, max_new_tokens=1)
    finally: del REMEDIES["mine"]
    a, b = again.frames["answers"].filter(remedy="mine"), r.frames["answers"].filter(remedy="sharp")
    np.testing.assert_allclose(a.sort("cell")["logprob"], b.sort("cell")["logprob"], atol=1e-9)


# Published files

@functools.cache
def reader() -> ll.LongModel:
    "A tiny random model with a tokenizer that was trained on a few of its prompts"
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    corpus = [q.gold[1] for q in read_questions(published("nq-open-oracle.jsonl.gz"), 60)]
    letters = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=700, initial_alphabet=letters, show_progress=False))
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=700, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                         initializer_range=.5, max_position_embeddings=8192, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return ll.load(LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=tok), check=False)


def test_published_questions() -> None:
    lm, path = reader(), published("nq-open-oracle.jsonl.gz")
    r = lost_in_the_middle(lm, path, n_documents=10, n_questions=2, max_new_tokens=2)
    s = r.meta["settings"]
    assert (s["task"], s["n"], s["positions"], s["metric"], s["stop"]) == (path.name, 10, [0, 4, 9], "best_subspan_em", ["\n"])
    assert r.frames["curve"]["gold_index"].to_list() == [0, 4, 9] and r.frames["baselines"]["questions"].to_list() == [2, 2]
    raw = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]
    texts = {c["text"].strip() for row in raw for c in row["ctxs"]}
    cells = cells_of(lm, str(path), n_documents=10, n_questions=2)
    for cell in (c for c in cells if c.axes["gold_index"] is not None):
        row = raw[cell.axes["question"]]
        said = [lm.decode(cell.ids[cell.spans[f"document_{i}"]]).strip() for i in range(10)]
        gold = next(c for c in row["ctxs"] if c["isgold"])
        assert said[cell.axes["gold_index"]].endswith(gold["text"].strip()) and f"(Title: {gold['title']})" in said[cell.axes["gold_index"]]
        assert all(d.split(") ", 1)[1] in texts or any(d.endswith(t) for t in texts) for d in said)
        assert sum(any(a.lower() in d.lower() for a in row["answers"]) for d in said) >= 1 and list(cell.answers) == row["answers"]
    for row, cell in zip(r.frames["answers"].iter_rows(named=True), cells, strict=True):
        assert row["logprob"] == pytest.approx(lm.score(cell.ids, cell.completion).total, rel=1e-4, abs=1e-3)
    more = cells_of(lm, path, n_documents=10, n_questions=4)
    have = {tuple(c.ids.tolist()) for c in more}
    assert all(tuple(c.ids.tolist()) in have for c in cells)  # four questions are these two and two more


def test_published_pairs() -> None:
    lm, path = reader(), published("kv-retrieval-75_keys.jsonl.gz")
    cells = cells_of(lm, path, n_questions=2)
    raw = [json.loads(line) for line, _ in zip(gzip.open(path, "rt", encoding="utf-8"), range(2), strict=False)]
    assert [(c.axes["question"], c.axes["gold_index"]) for c in cells] == [(q, g) for q in range(2) for g in (0, 24, 49, 74)]
    for cell in cells:
        text, row = lm.decode(cell.ids), raw[cell.axes["question"]]
        start = text.index("JSON data:\n") + 11
        told = list(json.loads(text[start:text.index("\n\nKey: ")]).items())
        assert Counter(told) == Counter(map(tuple, row["ordered_kv_records"]))
        assert told[cell.axes["gold_index"]] == (row["key"], row["value"])
        assert [p for p in told if p[0] != row["key"]] == [tuple(p) for p in row["ordered_kv_records"] if p[0] != row["key"]]
        assert text.endswith(f'Key: "{row["key"]}"\nCorresponding value:') and cell.answers == (row["value"],)
    r = lost_in_the_middle(lm, path, n_documents=8, n_questions=2, positions=3, max_new_tokens=2)
    s = r.meta["settings"]
    assert (s["n"], s["metric"], s["stop"], s["what"]) == (8, "kv_match", [], "pairs")  # the whole reply counts, line breaks and all
    assert r.frames["curve"]["gold_index"].to_list() == [0, 4, 7] and "baselines" not in r.frames
    assert "2 questions with 8 pairs" in r.details()[0]


@pytest.mark.parametrize(("item", "score"), [("pairs", 1), ("documents", 0)])
def test_what_counts_of_a_reply(monkeypatch: pytest.MonkeyPatch, item: str, score: int) -> None:
    "All of it for pairs, the first line for documents: as published"
    lm = ll.load(needle().hf, needle().tokenizer, check=False)
    lm.name = "another model"
    made = fact_pairs(1, 3)[0] if item == "pairs" else fact_questions(1, 3, sentences=1)[0]
    answer = made.value if isinstance(made, KeyValue) else made.answers[0]
    monkeypatch.setattr("longlens.probes.generate._texts", lambda lm, rows: [f"It is:\n{answer}"] * len(rows))
    r = lost_in_the_middle(lm, [made], max_new_tokens=2)
    assert {*r.frames["answers"]["score"]} == {score}


# Results that are kept

def test_another_call_resumes(tmp_path: Path) -> None:
    lm, gold_only = known(), [replace(q, others=()) for q in listed(1, 9)]
    kw: dict[str, Any] = dict(n_documents=4, positions=4, max_new_tokens=1, out=tmp_path / "r")
    plan = ll.plan(lost_in_the_middle, lm, gold_only, n_questions=2, **kw)
    assert "12 cells" in repr(plan) and "tokens to compute" in repr(plan) and plan.finished == frozenset()
    first = lost_in_the_middle(lm, gold_only, n_questions=2, **kw)
    finished = lambda **more: len(ll.plan(lost_in_the_middle, lm, gold_only, **kw | dict(n_questions=2) | more).finished)
    assert finished() == 12
    assert finished(n_questions=3) == 12
    assert finished(metric="string_match_part") == 0  # the whole reply is written then
    assert finished(positions=2) == 8 and finished(variants="query_aware") == 4 and finished(max_new_tokens=2) == finished(seed=1) - 4 == 0
    one = {"sharp": Remedy("", Changed((Temperature(.5),)))}
    assert finished(remedies=one) == 12
    lost_in_the_middle(lm, gold_only, n_questions=2, remedies=one, **kw)
    assert finished(remedies=one) == 20
    assert finished(remedies={"renamed": one["sharp"]}) == 20  # a name is no setting
    assert finished(remedies={"sharp": Remedy("", Changed((Temperature(.6),)))}) == 12
    again = lost_in_the_middle(lm, gold_only, n_questions=2, **kw)
    assert again.frames["answers"].equals(first.frames["answers"]) and again.details() == first.details()
    with ll.temperature(lm, .9): assert finished() == 0
    assert finished() == 12


def test_results_of_another_version_are_refused(tmp_path: Path) -> None:
    lm = known()
    lost_in_the_middle(lm, listed(3, 1), max_new_tokens=1, out=tmp_path)
    (tmp_path / HEAD).write_text(json.dumps({"longlens_sweep": 0}))
    with pytest.raises(StoreError, match="results of format 0, and this version of longlens writes format 1"):
        lost_in_the_middle(lm, listed(3, 1), max_new_tokens=1, out=tmp_path)


# What is refused

@pytest.mark.parametrize(("how", "error", "said"), [
    (dict(positions=(0, 5)), ValueError, "position 5 is not among 5 documents or pairs: it is 0 to 4"),
    (dict(positions=(-1,)), ValueError, "position -1 is not among 5"),
    (dict(positions=()), ValueError, "positions is empty: give at least one"),
    (dict(positions=0), ValueError, "0 positions: one or more"),
    (dict(n_documents=40), ValueError, "40 documents were asked for, and 'what' can have"),
    (dict(n_documents=0), ValueError, "n_documents is 0: ask one question or more, of one document or more"),
    (dict(n_documents=-3), ValueError, "n_documents is -3"),
    (dict(n_questions=0), ValueError, "n_questions is 0"),
    (dict(n_questions=-1), ValueError, "n_questions is -1"),
    (dict(variants=("reversed",)), ValueError, "a variant of this task is one of plain, query_aware, random_order, not 'reversed'"),
    (dict(variants=()), ValueError, "variants is empty"),
    (dict(metric="bleu"), ValueError, "a metric is one of best_subspan_em, .*, not 'bleu'"),
    (dict(remedies=["prayer"]), ValueError, "there is no remedy 'prayer': there are reordering, calibration"),
    (dict(remedies={"mine": AsSet()}), TypeError, "the remedy 'mine' is a AsSet: give Remedy"),
    (dict(remedies={"none": Remedy("x")}), ValueError, '"none" is what every remedy is compared with'),
    (dict(remedies={"odd": Remedy("x", order=lambda n: [0] * n)}), ValueError, r"of 5 documents is \[0, 0, 0, 0, 0\]: it must name each"),
    (dict(remedies={"few": Remedy("x", order=lambda n: range(n - 1))}), ValueError, "it must name each of 0 to 4 once"),
    (dict(max_new_tokens=0), ValueError, "max_new_tokens is 0"),
    (dict(engine="dask"), ValueError, "not 'dask'"),
    (dict(task=[]), ValueError, "no questions: there is nothing to ask"),
    (dict(task="no/such/file.jsonl"), FileNotFoundError, "there is no file no/such/file.jsonl: task is"),
    (dict(task=Path("no/such")), FileNotFoundError, "there is no file"),
    (dict(task=[*listed(2, 1), *listed(3, 1)]), ValueError, "2 to 3 documents: say how many with n_documents="),
    (dict(task=[*listed(2, 1), fact_pairs(1, 4)[0]]), TypeError, "two tasks"),
    (dict(task=[*fact_pairs(1, 4), *fact_pairs(1, 5)]), ValueError, "4 to 5 pairs: say how many with n_documents="),
    (dict(task=fact_pairs(1, 4), n_documents=9), ValueError, "9 pairs were asked for, and this list has 4"),
    (dict(task=fact_pairs(1, 4), n_documents=1), ValueError, "two pairs or more are needed"),
    (dict(task=fact_pairs(1, 4), variants=["random_order"]), ValueError, "one of plain, query_aware, not 'random_order'"),
    (dict(task=[Question("what", ("w5",), "w5 " * 150, ("w6 " * 150,))]), ValueError, "made for 256 positions: they are a learned table"),
])
def test_bad_input_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], error: type[Exception],
                                                 said: str) -> None:
    def never(*args: Any, **kw: Any) -> None: raise AssertionError("the model was run")
    monkeypatch.setattr("longlens.sweeps.runner.do_batch", never)
    with pytest.raises(error, match=said): lost_in_the_middle(known(), **{"task": listed(5, 2)} | how)


def test_a_metric_that_cannot_be_had_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kw: Any) -> None: raise AssertionError("the model was run")
    monkeypatch.setattr("longlens.sweeps.runner.do_batch", never)
    two = [replace(q, answers=(*q.answers, "w5")) for q in listed(3, 1)]
    with pytest.raises(ValueError, match="kv_match is defined for one answer"): lost_in_the_middle(known(), two, metric="kv_match")
    with pytest.raises(ValueError, match="of which nothing is left without punctuation and articles"): replace(two[0], answers=("The.",))


def test_texts_that_are_too_long(tmp_path: Path) -> None:
    lm, items = needle(), fact_questions(1, 2, sentences=110)
    assert len(place_answer(lm, items[0], 0, allow_longer=True)) > 2048
    with pytest.raises(ValueError, match=r"made for 2,048 positions: .* if the model is loaded with allow_longer=True"):
        lost_in_the_middle(lm, items)
    r = lost_in_the_middle(lm, items, positions=1, allow_longer=True, max_new_tokens=1, baselines=False)
    assert len(r.frames["answers"]) == 1 and not lm.allow_longer


def test_models_that_cannot_be_asked() -> None:
    bare = ll.load(zoo_model("llama"), check=False)
    with pytest.raises(ValueError, match="has no tokenizer, and a context is made of text: load"): lost_in_the_middle(bare, listed(3, 1))
    for name, said in (("set_based", "no rotary module"), ("ms_poe", "no rotary module|first_layer is 2")):
        with pytest.raises((UnsupportedModel, ValueError), match=said):  # learned positions
            lost_in_the_middle(known(), listed(3, 1), remedies=[name], max_new_tokens=1)
        assert interventions(known()) == []
    bare_cell = Cell(torch.arange(3, 30), condition=AsSet())
    with pytest.raises(ValueError, match="has no documents: a remedy for their order"): sweep(needle(), [bare_cell], Ask(2))


# The report

def odd(findings: list[str]) -> list[str]:
    "Sentences that no reader should see"
    bad = "nan", "None", "inf ", "-0.000", "1 questions", "1 positions", "1 documents"
    return [f for f in findings if any(w in f for w in bad)]


@pytest.mark.parametrize(("n", "count", "positions", "more"), [
    (1, 1, 1, dict(n_documents=1)), (2, 1, 1, {}), (3, 1, 3, dict(remedies=["reordering"])), (4, 2, (1, 2, 3), {}),
    (5, 3, 4, dict(baselines=False, variants=("query_aware", "plain"), remedies=["reordering", "temperature"])),
])
def test_small_reports_read_well(n: int, count: int, positions: Any, more: dict[str, Any], tmp_path: Path) -> None:
    r = lost_in_the_middle(known(), listed(n, count), positions=positions, max_new_tokens=1, **more)
    assert not odd(r.details()) and r.details(), r.details()
    drawn = [(s.title, s.text, s.chart.to_dict()) for s in r.sections()]
    again = ll.Report.load(r.save(tmp_path / "r"))
    assert isinstance(again, MiddleReport) and again.details() == r.details() and again.meta == r.meta
    assert all(again.frames[k].equals(f) for k, f in r.frames.items()) and [s.title for s in again.sections()] == [d[0] for d in drawn]
    assert r.chart().to_dict() and not any(w in d[1] for d in drawn for w in "{}")


def test_one_question_claims_nothing() -> None:
    lm = known()
    with ll.streaming_attention(lm, ENDS.sink, ENDS.recent):
        r = lost_in_the_middle(lm, listed(5, 1), positions=5, max_new_tokens=1, remedies=["reordering"])
    line, = (x for x in r.details() if x.startswith("ends against middle"))
    assert "+1.000 (one question, so no interval): no sign of it" in line
    with ll.streaming_attention(lm, ENDS.sink, ENDS.recent): r = lost_in_the_middle(lm, listed(5, 3), positions=5, max_new_tokens=1)
    line, = (x for x in r.details() if x.startswith("ends against middle"))
    assert "p = 0.25): no sign of it" in line  # three questions that agree are as likely as three coins


def test_ends_are_only_called_ends_where_they_are() -> None:
    lm = known()
    with ll.streaming_attention(lm, ENDS.sink, ENDS.recent): r = lost_in_the_middle(lm, listed(5, 2), positions=(1, 2, 4), max_new_tokens=1)
    assert any(x.startswith("positions 2 and 5 against middle: ") for x in r.details())
    parts = parts_frame(r.frames["answers"].filter(pl.col("gold_index").is_not_null()))
    assert dict(parts.select("part", "score").iter_rows()) == {"ends": .5, "middle": 0}


def test_a_page_runs_nothing_of_what_it_shows(tmp_path: Path) -> None:
    bad = "<script>alert(1)<:script>"
    ctxs = [{"title": bad, "text": f"w10 {bad} w11", "isgold": i == 0} for i in range(3)]
    rows = [{"question": f"what {bad}", "answers": [bad], "ctxs": ctxs}]
    (path := tmp_path / f"{bad}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    r = lost_in_the_middle(known(), path, max_new_tokens=1, remedies={bad: Remedy(bad, Changed((Temperature(.5),)))})
    assert r.meta["settings"]["task"] == path.name and bad in r.frames["answers"]["answers"][0]
    page = page_html([r], bad)
    assert "alert(1)" in page and "<script>alert" not in page and "<script>alert" not in r._repr_html_()


def test_settings_say_what_was_run() -> None:
    kw: dict[str, Any] = dict(positions=2, max_new_tokens=1)
    r = lost_in_the_middle(known(), listed(4, 2), variants="query_aware", seed=7, metric="string_match_part", **kw)
    s = r.meta["settings"]
    assert (s["task"], s["questions"], s["variants"], s["remedies"], s["seed"]) == ("own questions", 2, ["query_aware"], ["none"], 7)
    assert s["stop"] == [] and s["what"] == "documents"
    assert {*s} == {*asdict(MiddleDesign("", 1, (), 1, (), (), "", 1, ()))} and r.meta["max_length"] == 256
    twice = lost_in_the_middle(known(), listed(4, 2), variants=("plain", "plain"), remedies=["reordering", "reordering"], **kw)
    assert len(twice.frames["answers"]) == 2 * 2 * 2 + 4
