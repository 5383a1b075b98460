"""Context traceback: sources to the character, scores against plain forwards, games whose solution is known, what is refused"""
from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, combinations, pairwise
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_context import CHATML, MAKE
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import CAUSAL, token_ids, zoo_model

import longlens as ll
from longlens.apps.needle import answers_html
from longlens.apps.progress import Cancelled, Progress, exclusive_use
from longlens.apps.question_bar import QuestionBar, question_context, read_asked, text_asked
from longlens.apps.reading import PromptReading, revive
from longlens.apps.trace import prompt_of_trace, removal_html, trace_span
from longlens.charts.page import page_html
from longlens.models.tokens import Tokens
from longlens.needle_lm.data import filler
from longlens.probes.traceback import probe as traceback
from longlens.probes.traceback import scorer as subset_scores
from longlens.probes.traceback.coarse_to_fine import CoarseToFine
from longlens.probes.traceback.methods import attention as attention_trace
from longlens.probes.traceback.methods.perturbation import InformedSearch, Shapley, chain_masks, informed_search, marginals
from longlens.probes.traceback.prefix_tree import branches, common_start
from longlens.probes.traceback.prompts import ready_prompt, trace_prompt
from longlens.probes.traceback.scorer import FLOOR, SubsetScorer, plain_scores
from longlens.probes.traceback.sources import (
    TracePrompt,
    cut_context,
    narrowed,
    placed,
    source_frame,
    subset_ids,
    subset_tokens,
    token_prompt,
)
from longlens.probes.traceback.tracer import TRACER_MODULES, TRACERS, GameJob, TraceCost, TraceJob, Tracer, TraceScores, find_tracer
from longlens.prompts.key_value import kv_lines
from longlens.prompts.multi_document import numbered_documents
from longlens.prompts.questions import fact_questions
from longlens.sweeps.runner import SweepWarning
from longlens.text import probability_text

PEOPLE = {"Ada": "lamb", "Bob": "river", "Eve": "stone", "Tom": "table", "Una": "glass", "Max": "paper"}
DOCUMENTS = [f"{filler(2, seed=i)} The code for {who} is {what}." for i, (who, what) in enumerate(PEOPLE.items())]
ASK = "What is the code for Eve?"
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module")
def lm() -> ll.LongModel: return ll.load()


@pytest.fixture
def prompt(lm: ll.LongModel) -> TracePrompt: return trace_prompt(lm, DOCUMENTS, ASK)


def some_prompt(n: int = 8, long: int = 8, seed: int = 3, answer: tuple[int, ...] = (7, 9, 11, 4), **kw: Any) -> TracePrompt:
    "Random tokens in sources of different sizes, with tokens that belong to none before, between and after"
    ids, spans, at = token_ids(3 + n * long + 5, seed=seed)[0], [], 3
    for i in range(n):
        spans.append((at, at + long - i % 3))
        at += long
    return token_prompt(ids, spans, list(answer), **kw)


def some_subsets(n: int, many: int, seed: int = 0) -> np.ndarray:
    "Each left out, each alone, all, none, and others at random"
    eye = np.eye(n, dtype=bool)
    return np.concatenate([~eye, eye, np.ones((1, n), bool), np.zeros((1, n), bool), np.random.default_rng(seed).random((many, n)) < 0.5])


# Sources

WORDS = ["It", "rains.", "No!", "naïve", "日本。", "a", "\n\n", " ", "\t", "🙂", "x" * 20, "é", "'s"]
words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=60)


@QUICK
@given(words, st.sampled_from(["words", "sentences", "paragraphs"]), st.integers(1, 5))
def test_sources_are_the_context_to_the_character(parts: list[str], by: str, size: int) -> None:
    text = " ".join(parts)
    if not text.strip():
        with pytest.raises(ValueError, match="no sources"): cut_context(text, by, size)
        return
    s = cut_context(text, by, size)
    assert "".join(s.texts) == text and all(t.strip() for t in s.texts)


def test_words_are_tracllms_segments() -> None:
    text = " ".join(f"w{i}" for i in range(250))
    theirs = [" ".join(text.split(" ")[i : i + 100]) + " " for i in range(0, 250, 100)]
    assert cut_context(text).texts == [*theirs[:-1], theirs[-1][:-1]]  # the last of theirs has a space that the text does not have


@pytest.mark.parametrize("tok", MAKE)
@pytest.mark.parametrize("by", ["words", "sentences", "paragraphs", "tokens"])
def test_every_token_of_the_context_has_one_source(tok: str, by: str) -> None:
    lm = ll.load(zoo_model("llama"), MAKE[tok]())
    lm.n_embeddings = 10_000  # type: ignore[misc]  # these tokenizers have more tokens than the model
    text = "\n\n".join(DOCUMENTS[:3]) + "\n\n  And (so) on: 12345 …  "
    p = trace_prompt(lm, text, "Who?", "nobody", by=by, size=7 if by == "words" else None, allow_longer=True)
    spans = np.array(p.sources.spans)
    assert spans[0, 0] == 0 and spans[-1, 1] == len(text) and (spans[1:, 0] == spans[:-1, 1]).all()
    assert (np.diff(p.owner[p.owner >= 0]) >= 0).all()
    assert [list(r) for r in p.ranges] == [np.flatnonzero(p.owner == i).tolist() for i in range(p.n)]
    whole = lm.tokens(p.tokens.text).ids
    n = len(p)
    assert subset_ids(p, np.ones(p.n, bool)).tolist() == whole[:n].tolist()
    for i, r in enumerate(p.ranges):  # a token stands in the source of its first visible character
        for a, b in p.tokens.offsets[r.start : r.stop].tolist():
            visible = [c for c in range(a, b) if not p.tokens.text[c].isspace()]
            assert not visible or spans[i, 0] <= visible[0] - p.at < spans[i, 1]
    outside = [i for i in np.flatnonzero(p.owner < 0) if p.tokens.offsets[i, 0] < p.tokens.offsets[i, 1]]
    for i in outside:
        a, b = p.tokens.offsets[i].tolist()
        assert a < p.at or b > p.at + len(text.rstrip())


def test_own_spans_leave_the_rest_of_the_context_alone(lm: ll.LongModel) -> None:
    text = "Nothing here. The code for Bob is river. The code for Eve is stone. And nothing there."
    spans = [(text.index("The code for Bob"), text.index("The code for Eve") - 1), (text.index("The code for Eve"), text.index(" And"))]
    p = trace_prompt(lm, text, ASK, by=spans)
    assert p.sources.texts == ["The code for Bob is river.", "The code for Eve is stone."]
    assert lm.decode(subset_ids(p, [0])).startswith("Nothing here. The code for Bob is river. And nothing there.\nQuestion")
    assert ll.trace_context(lm, text, ASK, by=spans).top(1)["source"].item() == 1
    with pytest.raises(ValueError, match="only white space"): trace_prompt(lm, text, ASK, by=[(13, 14)])


def test_a_source_without_a_token_joins_its_neighbour_or_is_refused(lm: ll.LongModel) -> None:
    word = "extraordinarily"
    ids = lm.tokens(word, add_special_tokens=False)
    inside = next(i for i in range(1, len(word)) if i not in ids.offsets.flatten().tolist())
    with pytest.raises(ValueError, match="has no token of its own"): trace_prompt(lm, word, ASK, "x", by=[(inside, inside + 1)])
    p = trace_prompt(lm, "日本", ASK, "x", by="tokens")  # several tokens a character: one source each
    assert p.sources.texts == ["日", "本"] and [len(r) for r in p.ranges] == [3, 3]
    two = trace_prompt(lm, ["It rains.", "It snows."], ASK, "x", by="tokens").sources
    assert two.documents == tuple(int(a >= len("It rains.\n\n")) for a, _ in two.spans) and set(two.documents) == {0, 1}


def test_narrowing_keeps_tokens_and_characters(lm: ll.LongModel, prompt: TracePrompt) -> None:
    fine, parents = narrowed(prompt, [4, 1], "sentences")
    assert sorted(set(parents)) == [1, 4]
    assert fine.ids.tolist() == subset_ids(prompt, [1, 4]).tolist()
    assert "".join(fine.sources.texts) == prompt.sources.texts[1] + prompt.sources.texts[4]
    a, b = fine.sources.spans[0]
    assert prompt.sources.text[a:b] == fine.sources.texts[0]
    word, above = narrowed(fine, [len(fine.ranges) - 1], "tokens")
    assert "paper" not in "".join(word.sources.texts) and set(above) == {fine.n - 1}
    assert subset_tokens(word, []).tolist() == np.flatnonzero(word.owner < 0).tolist()
    with pytest.raises(ValueError, match="no sources"): narrowed(prompt, [])
    with pytest.raises(IndexError, match="no source 9"): narrowed(prompt, [9])


# Prompts and answers

def test_templates_and_answers(lm: ll.LongModel) -> None:
    p = trace_prompt(lm, "Bob is {here}. {question}", "Who?", "Bob", template="Q {question} {brace} C {context} A")
    assert p.tokens.text == "Q Who? {brace} C Bob is {here}. {question} A"
    assert p.answer.text == " Bob" and p.sources.text == p.tokens.text[p.at : p.at + len(p.sources.text)]
    assert trace_prompt(lm, "x y", "Who?", "北京", template="raw").answer.text == "北京"  # no space where there are no spaces
    assert trace_prompt(lm, "x y", "Who?", [5, 6], template="raw").answer.ids.tolist() == [5, 6]
    tail = trace_prompt(lm, "one two", "Who?", "it is Bob, I think", template="raw", answer_span="Bob")
    assert "".join(tail.answer.strings[i] for i in tail.traced) == " Bob"
    again = trace_prompt(lm, "one two", "Who?", "it is Bob, I think", template="raw", answer_span=(7, 10))
    assert again.traced == tail.traced
    for bad, message in [("Tom", "stands 0 times"), ((3, 99), "not a span"), (range(2, 99), "not tokens of the answer")]:
        with pytest.raises(ValueError, match=message): trace_prompt(lm, "one two", "Who?", "it is Bob", answer_span=bad)
    with pytest.raises(ValueError, match="has it 2 times"): trace_prompt(lm, "x", "y", "z", template="{context} {context}")


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("answer", ["Paris", " Paris", "Paris is it", "7", "é", "北京"])
def test_an_answer_has_the_tokens_it_has_behind_the_prompt(name: str, answer: str) -> None:
    "Llama 2's tokenizer would put a space before a text that stands alone"
    shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=512)
    lm = ll.load(LlamaForCausalLM(LlamaConfig(vocab_size=len(MAKE[name]()), **shape)), MAKE[name]())
    p = trace_prompt(lm, ["One two.", "Three four."], "What is it?", answer, template="raw")
    behind = lm.tokens(p.tokens.text + p.answer.text, allow_longer=True).ids.tolist()
    joined = p.tokens.ids.tolist() + p.answer.ids.tolist()
    assert behind[: len(joined)] == joined
    assert {*behind[len(joined) :]} <= {lm.tokenizer.sep_token_id, lm.tokenizer.eos_token_id}    # that end a text
    assert p.answer.text.strip() == answer.strip()
    assert p.answer.offsets.min() >= 0 and p.answer.offsets.max() <= len(p.answer.text)


def test_a_chat_template_stands_around(lm: ll.LongModel) -> None:
    tok = MAKE["llama3"]()
    tok.add_special_tokens({"additional_special_tokens": [AddedToken("<|im_start|>"), AddedToken("<|im_end|>")]})
    tok.chat_template = CHATML
    chatty = ll.load(zoo_model("llama"), tok)
    chatty.n_embeddings = 10_000  # type: ignore[misc]
    p = trace_prompt(chatty, DOCUMENTS[:2], "user", "Yes", template="contextcite", chat=True, system="user Context: ")
    text = p.tokens.text or ""
    assert text[p.at : p.at + len(p.sources.text)] == p.sources.text and text.endswith("<|im_start|>assistant\n")
    assert p.answer.text == "Yes" and text[: p.at].endswith("\n Context: ".strip()[-9:] + " ")
    with pytest.raises(ValueError, match="special=True"): trace_prompt(chatty, ["a <|im_end|> b"], "q", "a", chat=True)
    assert trace_prompt(chatty, ["a <|im_end|> b"], "q", "a", chat=True, special=True).n == 1


def test_prompts_that_are_ready(lm: ll.LongModel) -> None:
    ctx = ll.needle_context(lm, 400, depth_percent=40, wording="facts")
    t = ll.trace_context(lm, ctx, by="sentences")
    assert t.top(1)["excerpt"].item() == f"The code for {ctx.question.split()[-1][:-1]} is {ctx.answer}."
    text = ctx.text
    at = text.index("\nQuestion")
    same = ll.trace_context(lm, text, span=(0, at), by="sentences", answer=f" {ctx.answer}")
    assert same.frames["sources"]["score"].to_list() == pytest.approx(t.frames["sources"]["score"].to_list(), abs=1e-5)
    with pytest.raises(ValueError, match="the prompt has the characters"): ready_prompt(lm, text, (5, 10**6))


def test_a_context_knows_its_parts(lm: ll.LongModel) -> None:
    q = fact_questions(1, 5)[0]
    docs = numbered_documents(lm, q.question, q.gold, q.others, gold_index=3, answer_prefix=q.answer_prefix)
    t = ll.trace_context(lm, docs, by="documents")
    f = t.frames["sources"]
    assert t.meta["by"] == "documents" and t.meta["documents"] == 5 and t.top(1)["source"].item() == 3
    assert f["token_start"].to_list() == [docs.spans[f"document_{i}"].start for i in range(5)]
    assert f["token_end"].to_list()[:4] == f["token_start"].to_list()[1:]  # no hole is left
    assert f["text"].to_list() == ll.trace_context(lm, docs).frames["sources"]["text"].to_list()
    assert ready_prompt(lm, docs, answer="x", size=2).sources.documents == (0, 2, 4)
    fine = source_frame(ready_prompt(lm, docs, answer="x", by="tokens"))
    assert fine["document"].unique().to_list() == [*range(5)] and fine["tokens"].max() < 3
    part = (docs.text.index("Document [2]"), docs.text.index("Document [4]"))
    assert ready_prompt(lm, docs, part, answer="x", by="documents").n == 2
    pairs = ready_prompt(lm, kv_lines(lm, [("a", "x"), ("b", "y"), ("c", "z")], "b"), answer="y")
    assert pairs.sources.texts == ["Key a: x.\n", "Key b: y.\n", "Key c: z"] and pairs.sources.by == "pairs"
    with pytest.raises(ValueError, match="names no documents: it has needle, answer"):
        ready_prompt(lm, ll.needle_context(lm, 300, wording="facts"), answer="x", by="documents")


def test_needles_are_sources_by_themselves(lm: ll.LongModel) -> None:
    ctx = ll.needle_context(lm, 700, [20, 70], wording="facts", n_keys=4, n_queries=2, seed=2)
    p = ready_prompt(lm, ctx, answer="x")
    f = source_frame(p)
    for name in ("needle_0", "needle_1", "distractor_0", "distractor_1"):
        s = ctx.spans[name]
        assert len(f.filter(pl.col("token_start") == s.start, pl.col("token_end") == s.stop)) == 1
    assert p.sources.spans[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(p.sources.spans)) and f["tokens"].max() < 140
    assert "".join(p.sources.texts) == ctx.text[: ctx.text.index("\nQuestion")]


def test_documents_in_a_chat_are_found() -> None:
    tok = ll.load().tokenizer
    tok.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    chatty = ll.load(zoo_model("llama"), tok)
    chatty.n_embeddings = 10_000  # type: ignore[misc]
    chat = numbered_documents(chatty, "Who?", "It rains.", ["It snows."], answers=["x"], chat=True)
    assert ready_prompt(chatty, chat, answer="x").n == 2


# Scores

@pytest.mark.parametrize("name", CAUSAL)
def test_scores_are_those_of_plain_forwards(name: str) -> None:
    lm = ll.load(zoo_model(name))
    p, kept = some_prompt(answer_span=range(1, 4)), some_subsets(8, 12)
    scorer = SubsetScorer(lm, p)
    said = scorer.plan(kept)
    np.testing.assert_allclose(scorer(kept), plain_scores(lm, p, kept), atol=1e-4)
    assert scorer.costs.tokens == said.tokens < 0.7 * said.plain_tokens and scorer.costs.evaluations == said.evaluations
    again = SubsetScorer(lm, p, batch_size=1)
    np.testing.assert_allclose(again(kept), scorer(kept), atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_small_chunks_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = ll.load(zoo_model(name))
    p, kept = some_prompt(), some_subsets(8, 12)
    monkeypatch.setattr(subset_scores, "_fitting", lambda *_: (3, 5))
    np.testing.assert_allclose(SubsetScorer(lm, p)(kept), plain_scores(lm, p, kept), atol=1e-4)


def turned(rope: dict[str, Any]) -> ll.LongModel:
    "A small model whose positions are turned otherwise in texts of more than 32 tokens"
    import transformers
    torch.manual_seed(0)
    c = transformers.LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                 max_position_embeddings=32, initializer_range=0.2, rope_parameters=rope)
    return ll.load(transformers.AutoModelForCausalLM.from_config(c).eval())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_length(kind: str) -> None:
    more: dict[str, Any] = {"factor": 4.0} if kind == "dynamic" else {
        "factor": 4.0, "original_max_position_embeddings": 32, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    lm, p, kept = turned({"rope_type": kind, "rope_theta": 10_000.0, **more}), some_prompt(), some_subsets(8, 12)
    fresh = np.concatenate([plain_scores(ll.load(copy.deepcopy(lm.hf)), p, kept[i : i + 1]) for i in range(len(kept))])
    scorer = SubsetScorer(lm, p)
    np.testing.assert_allclose(scorer(kept), fresh, atol=1e-4)
    assert scorer.costs.tokens < scorer.costs.plain_tokens  # short ones are still shared


def test_a_state_that_cannot_be_taken_back() -> None:
    import transformers
    torch.manual_seed(0)
    c = transformers.Lfm2Config(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                num_key_value_heads=2, layer_types=["conv", "full_attention"], block_ff_dim=128)
    lm, p, kept = ll.load(transformers.AutoModelForCausalLM.from_config(c).eval()), some_prompt(), some_subsets(8, 4)
    scorer = SubsetScorer(lm, p)
    assert not scorer.reuse
    np.testing.assert_allclose(scorer(kept), plain_scores(lm, p, kept), atol=1e-4)
    assert scorer.costs.tokens == scorer.costs.plain_tokens


def test_contexts_at_the_very_end_and_nothing_around(lm: ll.LongModel) -> None:
    zoo = ll.load(zoo_model("llama"))
    p = token_prompt([1, 5, 6, 7, 8, 9], [(1, 3), (3, 5), (5, 6)], [4, 3])  # nothing after the last source
    kept = np.array([[i >> k & 1 for k in range(3)] for i in range(8)], dtype=bool)
    np.testing.assert_allclose(SubsetScorer(zoo, p)(kept), plain_scores(zoo, p, kept), atol=1e-4)
    bare = token_prompt([5, 6, 7], [(0, 1), (1, 3)], [4])
    with pytest.raises(ValueError, match="without any source the prompt has no token"): SubsetScorer(zoo, bare)(kept[:1, :2])


@QUICK
@given(st.sets(st.frozensets(st.integers(0, 6)), min_size=1, max_size=30))
def test_every_subset_is_a_leaf_once(sets: set[frozenset[int]]) -> None:
    rows = [np.array(sorted(s), dtype=np.int64) for s in sets]
    bits = np.packbits(np.array([np.isin(np.arange(7), r) for r in rows]), axis=1)
    seen, held, tokens = [], np.empty(0, np.int64), 0
    for b in branches(bits, np.ones(7, int)):
        at = rows[b.one][: b.depth]
        tokens, held = tokens + len(at) - common_start(held, at), at if common_start(held, at) < len(at) else held
        assert all(common_start(rows[i], at) == len(at) for i in b.leaves)
        seen += b.leaves
        tokens += sum(len(rows[i]) - b.depth for i in b.leaves)
    assert sorted(seen) == list(range(len(rows)))
    prefixes = {tuple(r[:k]) for r in rows for k in range(1, len(r) + 1)}
    assert tokens == len(prefixes)  # every shared beginning is computed exactly once


def test_log_odds_are_contextcites(lm: ll.LongModel, prompt: TracePrompt) -> None:
    p = trace_prompt(lm, DOCUMENTS, ASK, " stone and the river")
    scorer, kept = SubsetScorer(lm, p), some_subsets(6, 2)
    for mask, mine in zip(kept, scorer.log_odds(kept), strict=True):
        ids = subset_ids(p, mask)
        logp = lm.logits(torch.cat([ids, p.answer.ids])).double()[len(ids) - 1 : -1].log_softmax(-1)
        whole = logp.gather(-1, p.answer.ids[:, None]).sum()
        assert mine == pytest.approx(float(whole - torch.log1p(-whole.exp())), abs=1e-3)


def test_log_odds_of_the_answer_are_not_its_tokens_together(lm: ll.LongModel, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = SubsetScorer(lm, trace_prompt(lm, DOCUMENTS, ASK, " stone and the river"))
    odds = np.array([[40.0, 40.0], [0.0, 0.0], [-5.0, 40.0], [-np.inf, 1.0], [np.inf, np.inf]])
    monkeypatch.setattr(scorer, "measures", lambda kept: np.stack([odds, odds], 1))
    want = [40 - math.log(2), math.log(1 / 3), -5.0, -1000.0, 1000.0]  # two even chances are one in four
    np.testing.assert_allclose(scorer.log_odds([[True] * 6] * 5), want, atol=1e-9)


def test_a_killed_run_goes_on(lm: ll.LongModel, prompt: TracePrompt, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, calls, real = some_subsets(6, 10), [0], subset_scores.Walker.leaves

    def dies(self: Any, *a: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4: raise KeyboardInterrupt
        return real(self, *a)

    monkeypatch.setattr(subset_scores.Walker, "leaves", dies)
    with pytest.raises(KeyboardInterrupt): SubsetScorer(lm, prompt, out=tmp_path)(kept)
    monkeypatch.setattr(subset_scores.Walker, "leaves", real)
    second = SubsetScorer(lm, prompt, out=tmp_path)
    plan = second.plan(kept)
    assert 0 < plan.evaluations < len({m.tobytes() for m in kept})
    np.testing.assert_allclose(second(kept), plain_scores(lm, prompt, kept), atol=1e-4)
    assert second.costs.evaluations == plan.evaluations
    assert SubsetScorer(lm, prompt, out=tmp_path).plan(kept).evaluations == 0
    other = trace_prompt(lm, DOCUMENTS, ASK, "river")  # another answer is another result
    assert SubsetScorer(lm, other, out=tmp_path).plan(kept).evaluations == len({m.tobytes() for m in kept})


def test_out_of_memory_is_survived_and_said(lm: ll.LongModel, prompt: TracePrompt, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, real = some_subsets(6, 10), subset_scores.Walker.leaves

    def small(self: Any, ats: Any, start: int, chunk: int) -> Any:
        if len(ats) > 1 or chunk > 64: raise torch.OutOfMemoryError("no")
        return real(self, ats, start, chunk)

    monkeypatch.setattr(subset_scores.Walker, "leaves", small)
    with pytest.warns(SweepWarning, match="both are halved"): values = SubsetScorer(lm, prompt)(kept)
    np.testing.assert_allclose(values, plain_scores(lm, prompt, kept), atol=1e-4)
    monkeypatch.setattr(subset_scores.Walker, "leaves", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.warns(SweepWarning), pytest.raises(MemoryError, match="even in chunks of 32"): SubsetScorer(lm, prompt)(kept)


def test_memory_is_kept_to(lm: ll.LongModel, prompt: TracePrompt) -> None:
    with pytest.raises(MemoryError, match="max_memory is 10 kB"): SubsetScorer(lm, prompt, max_memory=10_000)(some_subsets(6, 1))
    roomy = subset_scores._fitting(SubsetScorer(lm, prompt), len(prompt))
    tight = subset_scores._fitting(SubsetScorer(lm, prompt, max_memory=9_000_000), len(prompt))
    assert roomy[0] == 8 and tight[0] * tight[1] < roomy[0] * roomy[1]
    with pytest.raises(ValueError, match="batch_size is 0"): SubsetScorer(lm, prompt, batch_size=0)


def test_what_was_true_without_an_intervention_is_forgotten(lm: ll.LongModel, prompt: TracePrompt) -> None:
    scorer, kept = SubsetScorer(lm, prompt), some_subsets(6, 2)
    before = scorer(kept)
    with ll.ablate(lm, heads=[(2, 0), (2, 1)]):
        without = scorer(kept)
        np.testing.assert_allclose(without, plain_scores(lm, prompt, kept), atol=1e-4)
    assert np.abs(before - without).max() > 0.1
    np.testing.assert_allclose(scorer(kept), before, atol=1e-6)


# Games

@dataclass
class Game:
    "Weights of sets: a set is worth what it contains"
    n: int
    worth: dict[tuple[int, ...], float]

    def __call__(self, kept: np.ndarray) -> np.ndarray:
        return sum((w * kept[:, list(s)].all(1) for s, w in self.worth.items()), np.zeros(len(kept)))


def exact_shapley(game: Game) -> np.ndarray:
    "By the definition"
    out, others = np.zeros(game.n), lambda i: [j for j in range(game.n) if j != i]

    def value(s: tuple[int, ...]) -> float:
        mask = np.zeros((1, game.n), bool)
        mask[0, list(s)] = True
        return float(game(mask)[0])

    for i in range(game.n):
        for k in range(game.n):
            for s in combinations(others(i), k): out[i] += (value((*s, i)) - value(s)) / (game.n * comb(game.n - 1, k))
    return out


GAME = Game(6, {(0,): 1.0, (1, 2): 4.0, (2, 3, 4): -3.0, (5,): 0.5})


def test_shapley_values_are_estimated_without_bias() -> None:
    true = exact_shapley(GAME)
    assert true == pytest.approx([1, 2, 1, -1, -1, 0.5])
    many = Shapley(permutations=3000).run(GameJob(GAME))
    assert np.abs(many.values - true).max() < 4 * many.errors.max() < 0.2
    few = [Shapley(permutations=12).run(GameJob(GAME, seed=s)) for s in range(200)]
    spread = np.stack([f.values for f in few]).std(0)
    assert np.stack([f.errors for f in few]).mean(0) == pytest.approx(spread, rel=0.15)
    assert all(f.values.sum() == pytest.approx(2.5) for f in few)  # efficiency, in every sample
    assert (Shapley().run(GameJob(GAME, seed=1)).values == Shapley().run(GameJob(GAME, seed=1)).values).all()


def test_chains_hold_who_came_before() -> None:
    masks = chain_masks(np.array([[2, 0, 1]]))
    assert masks[0].astype(int).tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 1], [1, 1, 1]]
    assert marginals(GAME, np.array([[1, 2, 0, 3, 4, 5]]))[0].tolist() == [1, 0, 4, 0, -3, 0.5]


def test_denoised_values_are_means_of_the_largest() -> None:
    t = find_tracer("denoised_shapley", {"permutations": 9, "beta": 0.4})
    m = marginals(GAME, t.orders(GameJob(GAME)))
    assert t.run(GameJob(GAME)).values == pytest.approx(np.sort(m, 0)[-3:].mean(0))  # int(3.6) = 3 of 9
    one = find_tracer("denoised_shapley", {"permutations": 3, "beta": 0.1}).run(GameJob(GAME, seed=2))
    assert one.values == pytest.approx(marginals(GAME, Shapley(3).orders(GameJob(GAME, seed=2))).max(0))


@pytest.mark.parametrize(("n", "counts"), [(6, [6]), (10, [8, 7]), (100, [8] + 4 * [10]), (200, [8] + 5 * [10]), (320, [8] + 6 * [10])])
def test_the_search_scores_as_many_groups_as_published(n: int, counts: list[int]) -> None:
    nodes, values, seen = informed_search(lambda nodes: np.array([float(len(r)) for r in nodes]), n)
    assert seen.group_by("level").len().sort("level")["len"].to_list() == counts
    assert len(nodes) == 5 and all(len(r) == 1 for r in nodes) and len(values) == 5


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_search_among_few_still_scores_them(n: int) -> None:
    found = InformedSearch().run(GameJob(Game(n, {(n - 1,): 3.0})))
    assert found.values.tolist() == [0.0] * (n - 1) + [6.0]  # leave-one-out counts double
    assert found.frames["search"].group_by("function").len()["len"].to_list() == [n] * 3


def test_a_search_by_hand() -> None:
    # 7 sources, the best 2 groups kept; what counts are 1 and 6. [0-6] -> [0-2][3-6], kept unscored (2 groups); then scored
    # [0][1-2][3-4][5-6] -> keeps [1-2] and [5-6] -> [1][2][5][6] -> keeps [1] and [6]
    nodes, values, seen = informed_search(lambda nodes: np.array([3.0 * (1 in r) + 2.0 * (6 in r) for r in nodes]), 7, 2)
    assert [r.start for r in nodes] == [1, 6] and values.tolist() == [3, 2]
    assert seen.select("level", "start", "stop", "kept").rows() == [
        (0, 0, 1, False), (0, 1, 3, True), (0, 3, 5, False), (0, 5, 7, True), (1, 1, 2, True), (1, 2, 3, False), (1, 5, 6, False),
        (1, 6, 7, True)]


def test_a_searched_group_stands_alone() -> None:
    class Watch(Game):
        def __call__(self, kept: np.ndarray) -> np.ndarray:
            seen.append(kept.copy())
            return super().__call__(kept)

    seen: list[np.ndarray] = []
    InformedSearch(functions=("loo",), keep=2).run(GameJob(Watch(8, {(3,): 1.0})))
    sizes = [sorted(set(k.sum(1).tolist())) for k in seen]
    assert sizes == [[6, 8], [3, 4], ] or sizes[-1] == [3, 4]  # the second level knows nothing of what was dropped
    assert TRACERS["tracllm"] == InformedSearch(("stc", "loo", "denoised_shapley"), 5, 2.0, 20, 0.2)  # published defaults


def test_costs_are_said_before(lm: ll.LongModel, prompt: TracePrompt) -> None:
    for name in ("loo", "stc", "shapley", "denoised_shapley", "tracllm", "coarse_to_fine"):
        job = TraceJob(lm, prompt)
        said = TRACERS[name].cost(job)
        found = TRACERS[name].run(job)
        costs = found.costs or job.scorer.costs
        assert costs.tokens <= said.tokens and costs.evaluations <= said.evaluations
        assert not said.exact or (costs.tokens, costs.evaluations) == (said.tokens, said.evaluations)


@dataclass
class Wins:
    "A game that groups of high weights win; it remembers the sets that were asked for"
    weights: np.ndarray
    asked: set[tuple[bool, ...]] = field(default_factory=set)

    @property
    def n(self) -> int: return len(self.weights)

    def __call__(self, kept: np.ndarray) -> np.ndarray:
        self.asked.update(map(tuple, kept.tolist()))
        return kept @ self.weights


@pytest.mark.parametrize("how", [{}, {"functions": "stc", "keep": 1}, {"functions": ("loo", "shapley"), "keep": 2}], ids=str)
@pytest.mark.parametrize("sizes", [(0,) * 16, (0,) * 12 + (8,) * 4, (9,) * 2 + (0,) * 5 + (6,) * 9, (2, 2, 2)], ids=str)
def test_a_search_costs_no_more_than_was_said(lm: ll.LongModel, sizes: tuple[int, ...], how: dict[str, Any]) -> None:
    "Whatever wins: what is last, what is first, what is longest, or anything"
    documents = [f"The code for Mira is {i}." + " The sky is blue." * k for i, k in enumerate(sizes)]
    prompt = trace_prompt(lm, documents, ASK, " 48")
    tracer, lengths = find_tracer("tracllm", how), np.array([len(r) for r in prompt.ranges])
    said = tracer.cost(TraceJob(lm, prompt))
    for weights in (np.arange(prompt.n), -np.arange(prompt.n), lengths, *np.random.default_rng(0).normal(size=(9, prompt.n))):
        game = Wins(weights.astype(float))
        tracer.run(GameJob(game))
        asked = np.array([*game.asked])
        assert len(asked) <= said.evaluations
        assert len(asked) * (len(prompt.whole) - 1) - ((~asked) @ lengths).sum() <= said.tokens


@pytest.mark.parametrize("first", ["methods.perturbation", "methods.contextcite", "methods.self_citation", "methods.captum_perturbation"])
def test_methods_come_in_one_order(first: str) -> None:
    "Whichever module was imported first"
    code = (f"import longlens.probes.traceback.{first}; from longlens.probes.traceback.tracer import TRACERS, load_methods; TRACERS |= "
            "dict(mine=1, loo=TRACERS.get('loo')); load_methods(); print(*TRACERS)")
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert names == [*chain(*TRACER_MODULES.values()), "mine"] and names[:2] == ["loo", "stc"]


@pytest.mark.parametrize("functions", ["zzz", "coarse_to_fine", ("stc", "attention"), "self_citation"])
def test_functions_that_score_no_groups_are_refused(lm: ll.LongModel, prompt: TracePrompt, functions: Any) -> None:
    with pytest.raises(ValueError, match="there is no method 'zzz'|cannot score groups: take of loo, stc, shapley"):
        ll.trace_context(lm, prompt, method="tracllm", functions=functions)
    assert ll.trace_context(lm, prompt, method="tracllm", functions="loo").meta["settings"]["functions"] == ["loo"]


# The function

def test_every_method_finds_the_document(lm: ll.LongModel) -> None:
    for name in ("loo", "stc", "shapley", "denoised_shapley", "tracllm"):
        t = ll.trace_context(lm, DOCUMENTS, ASK, method=name, k=50)
        assert t.top(1)["source"].item() == 2 and len(t.top()) == 6 and t.meta["answer"].strip() == "stone" and t.meta["generated"]
        f = t.frames["sources"]
        assert [t.context[a:b] for a, b in f.select("start", "end").rows()] == f["text"].to_list()


def test_equal_passages_stay_two(lm: ll.LongModel) -> None:
    twice = [DOCUMENTS[2], DOCUMENTS[0], DOCUMENTS[2], DOCUMENTS[1]]
    t = ll.trace_context(lm, twice, ASK, method="stc")
    f = t.frames["sources"]
    assert f["source"].to_list() == [0, 1, 2, 3] and set(t.top(2)["source"]) == {0, 2}
    assert ll.trace_context(lm, twice, ASK, method="tracllm").frames["sources"]["score"].null_count() == 0
    spared = ll.trace_context(lm, [DOCUMENTS[2]] * 3 + DOCUMENTS[:2], ASK, "stone")
    assert spared.details()[2].startswith("without any one of the sources the answer loses less than 0.01 nats: several say the same")
    assert not ll.trace_context(lm, DOCUMENTS, ASK).meta["notes"]


def test_part_of_an_answer(lm: ll.LongModel) -> None:
    answer = "stone. The code for Bob is river"
    of = lambda part: ll.trace_context(lm, DOCUMENTS, ASK, answer, answer_span=part)
    assert of("stone").top(1)["source"].item() == 2 and of("river").top(1)["source"].item() == 1
    f = of("river").frames["answer"]
    assert f.filter("traced")["text"].to_list() == [" river"] and f["logprob"].is_not_null().sum() == 1


def test_what_is_refused(lm: ll.LongModel) -> None:
    def refused(message: str, *a: Any, error: type[Exception] = ValueError, **kw: Any) -> None:
        with pytest.raises(error, match=message): ll.trace_context(lm, *a, **kw)

    refused("there are no sources", "  \n ", ASK)
    refused("this is a PosixPath|this is a WindowsPath", Path("x"), ASK, error=TypeError)
    refused("this is a NoneType", None, ASK, error=TypeError)
    refused("this is a bytes", b"abc", ASK, error=TypeError)
    refused("token ids, and this is a list of texts", DOCUMENTS, ASK, ["stone", "river"], error=TypeError)
    refused("stands 2 times in the answer: give characters", DOCUMENTS, ASK, "stone or stone", answer_span="stone")
    refused("seed is -1", DOCUMENTS, ASK, seed=-1)
    refused("document 1 is empty", ["a", " "], ASK)
    refused("was made for 2,048 positions", DOCUMENTS * 40, ASK)
    refused("and budget is 500", DOCUMENTS, ASK, budget=500)
    refused("no setting 'beta'", DOCUMENTS, ASK, method="shapley", beta=0.2, error=TypeError)
    refused("there is no method 'best'", DOCUMENTS, ASK, method="best")
    refused("the answer is empty", DOCUMENTS, ASK, " ")
    refused("k is 0", DOCUMENTS, ASK, k=0)
    refused("chat template", DOCUMENTS, ASK, chat=True)
    refused("size is 0", DOCUMENTS[0], ASK, size=0)
    cost = ll.plan(ll.trace_context, lm, DOCUMENTS, ASK, "stone", method="shapley")
    assert isinstance(cost, TraceCost) and cost.exact


def test_an_answer_without_any_probability(lm: ll.LongModel) -> None:
    def never(token: int) -> Callable:
        def hook(module: Any, args: Any, out: Any) -> Any:
            out.logits[..., token] = -torch.inf
            return out
        return hook

    stone, river = (lm.tokenizer.encode(f" {w}", add_special_tokens=False)[0] for w in ("stone", "river"))
    with_hook = lm.hf.register_forward_hook(never(stone))
    try:
        with pytest.raises(ValueError, match="gives the token ' stone' of the answer no probability at all"):
            ll.trace_context(lm, DOCUMENTS, ASK, "stone")
    finally: with_hook.remove()

    def only_short(module: Any, args: Any, kw: Any, out: Any) -> Any:  # " river" can only be said after much context
        if kw.get("past_key_values") is None or kw["past_key_values"].get_seq_length() < 200: out.logits[..., river] = -torch.inf
        return out

    with_hook = lm.hf.register_forward_hook(only_short, with_kwargs=True)
    try: t = ll.trace_context(lm, DOCUMENTS, "What is the code for Bob?", "river", method="stc")
    finally: with_hook.remove()
    assert t.frames["sources"]["score"].to_list() == [0.0] * 6  # all of them -1000, as nothing is
    assert "no source speaks for the answer" in t.details()[1] and f"count as {FLOOR:g} nats" in t.details()[2]


def test_lines_of_a_log(lm: ll.LongModel) -> None:
    log = "".join(f'{{"step": {i}, "said": "the code for {who} is {what}"}}\n' for i, (who, what) in enumerate(PEOPLE.items()))
    t = ll.trace_context(lm, log, ASK, " stone", by="lines", k=50)
    assert "".join(t.frames["sources"]["text"]) == log and len(t.top()) == 6 and t.top(1)["source"].item() == 2
    one = ll.trace_context(lm, log, ASK, " stone", by="paragraphs")
    assert "there is one source by paragraphs" in one.details()[1] and "cut finer" in one.details()[1]


def test_a_method_of_ones_own(lm: ll.LongModel) -> None:
    @dataclass(frozen=True)
    class Longest(Tracer):
        power: float = 1.0

        def cost(self, job: TraceJob) -> TraceCost: return TraceCost(0, 0, True)
        def run(self, job: TraceJob) -> TraceScores: return TraceScores(np.array([float(len(r)) for r in job.prompt.ranges]) ** self.power)

    TRACERS["longest"] = Longest()
    try: t = ll.trace_context(lm, DOCUMENTS, ASK, method="longest", power=2.0)
    finally: del TRACERS["longest"]
    f = t.frames["sources"]
    assert f["score"].to_list() == [float(n) ** 2 for n in f["tokens"]] and t.meta["settings"] == {"power": 2.0}
    assert ll.trace_context(lm, DOCUMENTS, ASK, method=Longest()).meta["method"] == "Longest"


def test_a_level_on_which_nothing_stands_out_says_so(lm: ll.LongModel) -> None:
    "Two sentences say the same, so none is missed when it is left out"
    text = "The code for Eve is stone. The river is long. The code for Eve is stone. Glass was here.\n\nNothing was said of it."
    t = ll.trace_context(lm, text, "What is the code for Eve?", " stone", method="coarse_to_fine", levels="sentences")
    said = t.details()
    assert any(x.startswith("none of the 5 sentences in the best of those stands out") for x in said), said
    assert any("without any one of the sources" in x for x in said)
    assert not any(x.startswith(("the best of", "where that is")) for x in said)


def test_coarse_to_fine_finds_the_word(lm: ll.LongModel) -> None:
    text = "\n\n".join(DOCUMENTS)
    t = ll.trace_context(lm, text, ASK, method="coarse_to_fine", keep=2)
    f = t.frames["levels"].filter(rank=1)
    assert t.meta["by"] == "paragraphs" and f["by"].to_list() == ["paragraphs", "sentences", "tokens"]
    assert [s.strip() for s in f["text"]][:2] == [DOCUMENTS[2], "The code for Eve is stone."]
    levels = t.frames["levels"]
    assert all(t.context[a:b] == s for a, b, s in levels.select("start", "end", "text").rows())
    above = {(x["level"], x["source"]): (x["start"], x["end"]) for x in levels.iter_rows(named=True)}
    for x in levels.filter(pl.col("level") > 0).iter_rows(named=True):
        a, b = above[x["level"] - 1, x["parent"]]
        assert a <= x["start"] < x["end"] <= b
    flat = ll.trace_context(lm, " ".join(DOCUMENTS * 2), ASK, method="coarse_to_fine", inner="attention", levels=())
    assert flat.meta["by"] == "words" and len(flat.frames["sources"]) > 1  # a text without paragraphs
    alone = ll.trace_context(lm, DOCUMENTS, ASK, method="coarse_to_fine", levels=(), keep=2).frames["levels"]
    assert len(alone) == 6  # nothing finer was asked for
    other = ll.trace_context(lm, text, ASK, method="coarse_to_fine", inner="stc")
    assert CoarseToFine("stc").tracer == TRACERS["stc"] and other.meta["settings"]["inner"] == "stc"


def test_what_coarse_to_fine_ends_at_is_shown(lm: ll.LongModel, tmp_path: Any) -> None:
    t = ll.trace_context(lm, "\n\n".join(DOCUMENTS), ASK, method="coarse_to_fine", keep=2)
    t.save(tmp_path / "trace")
    back = ll.Trace.load(tmp_path / "trace")
    f = back.finer(1)
    assert f["by"].to_list() == ["sentences", "tokens"] and back.finer().equals(t.finer())
    sentence, word = (t.context[a:b].strip() for a, b in f.select("start", "end").rows())
    assert sentence == "The code for Eve is stone." and word in sentence
    inside = next(s for s in back.sections() if s.title == "Inside the best")
    tokens = t.frames["levels"].filter(level=2)
    assert inside.table.equals(t.finer()) and len(tokens) == len(inside.view.context["starts"]) // 4
    assert any(f"{f['start'][1]:,} to {f['end'][1]:,} (best of the tokens)" in line for line in back.details())
    flat = ll.trace_context(lm, DOCUMENTS, ASK)
    assert all("finer" not in line for line in flat.details())
    with pytest.raises(ValueError, match="of one level only"): flat.finer()


@pytest.mark.parametrize(("method", "title"), [("contextcite", "How well the surrogate foretells"), ("tracllm", "The search")])
def test_tables_of_a_method_are_on_its_page(lm: ll.LongModel, method: str, title: str) -> None:
    assert title in [s.title for s in ll.trace_context(lm, DOCUMENTS, ASK, method=method).sections()]


def test_an_answer_that_reads_back_otherwise_keeps_its_tokens(lm: ll.LongModel, tmp_path: Any) -> None:
    letters = [lm.tokens(c, add_special_tokens=False).ids[-1].item() for c in "stone"]
    t = ll.trace_context(lm, DOCUMENTS, ASK, letters, method="attention")
    t.save(tmp_path / "trace")
    made = prompt_of_trace(lm, ll.Report.load(tmp_path / "trace"))
    assert made.answer.ids.tolist() == letters and made.answer.strings == t.frames["answer"]["text"].to_list()
    for span in ((0, 1), (2, 5)):
        assert trace_span(lm, made, span, "attention").meta["traced"] == "".join(made.answer.strings[slice(*span)])
    t.frames["answer"] = t.frames["answer"].drop("id")  # of a report that is older
    with pytest.raises(ValueError, match="the answer cannot be made again"): prompt_of_trace(lm, t)


@pytest.mark.parametrize("how", [{"question": "Who?"}, {"answer": " coat"}, {"by": "words"}, {"size": 2}, {"answer_span": "s"},
                                 {"span": (0, 9)}, {"template": "raw"}, {"chat": True}, {"system": "Be brief."}, {"stop": ["."]},
                                 {"max_new_tokens": 3}])
def test_nothing_is_dropped_in_silence(lm: ll.LongModel, prompt: TracePrompt, how: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(how))} is .*leave {next(iter(how))} out"): ll.trace_context(lm, prompt, **how)


HOSTILE = ["<script>alert(1)</script> The code for Eve is stone. </style><img src=x onerror=alert(2)>",
           "\x1b[31mred\x1b[0m \u202eevil\u2066 \u200b", "a" * 50_000, "The code for Bob is river. \U0001f600"]


def test_hostile_text_is_shown_and_does_nothing(lm: ll.LongModel) -> None:
    owner = np.repeat(np.arange(4), 2)
    texts, spans = "".join(HOSTILE), np.cumsum([0, *map(len, HOSTILE)])
    cut = cut_context(texts, [*zip(spans[:-1].tolist(), spans[1:].tolist(), strict=True)])
    offsets = [(spans[i] + k, spans[i] + k + 1) for i in range(4) for k in (0, 4)]
    tokens = Tokens(torch.arange(8), texts, torch.tensor(offsets))
    p = placed(tokens, 0, cut, Tokens(torch.tensor([3]), "<b>\x1b", torch.tensor([[0, 4]])), question="<i>?")
    assert p.owner.tolist() == owner.tolist()
    from longlens.probes.traceback.report import make_trace
    costs = pl.DataFrame({"stage": ["answer", "method"], **{c: [1, 4] for c in ("evaluations", "asked", "tokens", "plain_tokens")}})
    meta = dict(method="<u>loo", unit="nats", says="<s>", k=5, signed=True, model="m", generated=False)
    t = make_trace(p, TraceScores(np.arange(4.0)), np.array([-0.5]), costs, meta)
    page, here = page_html([t], "title"), t._repr_html_()
    data = re.search(r'(?s)<script type="application/json" id="texts">(.*?)</script>', page)
    assert json.loads(data[1])[0]["context"]["text"] == texts and "<" not in data[1]  # the whole context, as data that opens nothing
    page = page.replace(data[1], "")
    bad = ("<script>alert", "<img src=x", "\x1b", "\u202e", "\u2066", "\u200b", "<i>", "<u>loo", "a" * 1000)
    assert not [b for b in bad for html in (page, here) if b in html]
    assert not [b for b in bad[2:6] if b in str(t.top())]  # a terminal does what it is told
    assert t.context == texts and "\x1b" not in "".join(t.details())
    assert "\\x1b" in str(t.chart().to_dict())


def test_a_trace_comes_back_from_its_folder(lm: ll.LongModel, tmp_path: Any) -> None:
    t = ll.trace_context(lm, DOCUMENTS, ASK, method="shapley", out=tmp_path / "scores")
    t.save(tmp_path / "trace")
    back = ll.Report.load(tmp_path / "trace")
    assert type(back) is ll.Trace and back.details() == t.details() and back.top().equals(t.top()) and back.context == t.context
    made = prompt_of_trace(lm, back)  # the explorer of a trace that was kept can ask the model further
    assert made.ids.tolist() == trace_prompt(lm, DOCUMENTS, ASK).ids.tolist() and made.answer.text == t.meta["answer"]
    again = ll.trace_context(lm, DOCUMENTS, ASK, method="shapley", out=tmp_path / "scores")
    assert again.frames["costs"]["evaluations"].to_list()[:2] == [0, 0]  # the answer without the context is weighed again
    assert again.frames["sources"].equals(t.frames["sources"])


def test_ids_alone_are_traced() -> None:
    t = ll.trace_context(zoo_model("llama"), some_prompt(), method="loo")
    assert len(t.frames["sources"]) == 8 and t.meta["answer"] == "7 9 11 4"
    assert source_frame(some_prompt())["token_start"].to_list()[:2] == [3, 11]


def test_small_probabilities_are_not_zero() -> None:
    "The same numbers in every explorer, however small"
    assert [probability_text(x) for x in (-0.0284, -3.474, -10.8, -1000.0, None)] == ["0.972", "0.031", "2.0e-5", "5.1e-435", "–"]
    shown = removal_html(" lamb", [3], {"reply": " lamb", "logprob": -0.0284}, {"reply": " oat", "logprob": -10.8})
    assert "<td>0.972</td>" in shown and "<td>2.0e-5</td>" in shown
    row = {"asked": 0, "reply": " oat", "answers": "lamb", "score": 0.0, "logprob": -10.8}
    assert "<td>2.0e-5</td>" in answers_html(pl.DataFrame([row]), None)


def test_bars_say_what_they_are_about(lm: ll.LongModel, monkeypatch: pytest.MonkeyPatch) -> None:
    "Every phase of a method has a bar with a name of its own"
    said: list[str] = []
    for module in (subset_scores, attention_trace):
        real = module.progress_bar
        monkeypatch.setattr(module, "progress_bar", lambda *a, real=real, **k: said.append(k["desc"]) or real(*a, **k | {"disable": True}))
    def bars(method: str, **how: Any) -> list[str]:
        said.clear()
        ll.trace_context(lm, DOCUMENTS, ASK, method=method, progress=True, **how)
        return [*dict.fromkeys(said)]
    assert bars("loo") == ["answer", "loo"]
    assert bars("attntrace") == ["answer", "attntrace"]
    assert bars("coarse_to_fine", keep=1) == ["answer", *(f"coarse_to_fine, {by}" for by in ("documents", "sentences", "tokens"))]
    assert bars("tracllm", functions="stc", keep=1)[:3] == ["answer", "tracllm, stc, level 0", "tracllm, stc, level 1"]


def test_a_large_cost_is_said_before_it_arises(lm: ll.LongModel, monkeypatch: pytest.MonkeyPatch) -> None:
    "A warning with the cost and the ways out, and nothing has run yet; a budget is consent"
    monkeypatch.setattr(traceback, "LARGE_COST", 500)
    def never(*a: Any, **k: Any) -> Any: raise AssertionError("it ran")
    for method, way in (("loo", "and so does method='attntrace'"), ("coarse_to_fine", "and so does inner='attntrace'")):
        cost = ll.plan(ll.trace_context, lm, DOCUMENTS, ASK, "stone", method=method)
        with monkeypatch.context() as m:
            m.setattr(traceback, "run_tracer", never)
            with pytest.raises(traceback.LargeTrace, match=re.escape(f"{cost}")) as e:    # warnings are errors here
                ll.trace_context(lm, DOCUMENTS, ASK, "stone", method=method)
        assert way in str(e.value) and "Give budget= and" in str(e.value) and "size=, by=" in str(e.value)
        ll.trace_context(lm, DOCUMENTS, ASK, "stone", method=method, budget=cost.tokens)
    monkeypatch.setattr(traceback, "LARGE_COST", 10)
    with pytest.warns(traceback.LargeTrace) as seen: ll.trace_context(lm, DOCUMENTS, ASK, "stone", method="attntrace")
    assert "attntrace" not in str(seen[0].message) and seen[0].filename == __file__


def chat_lm() -> ll.LongModel:
    "needle-lm with a chat template of its own"
    lm = ll.load()
    tok = copy.deepcopy(lm.tokenizer)
    tok.chat_template = CHATML
    return ll.load(lm.hf, tok)


@pytest.mark.parametrize("chat", [False, True])
def test_a_plain_text_is_asked(chat: bool) -> None:
    "In the workbench: the prompt is `trace_context`'s own, the text can be asked again, and what was asked is kept with its model"
    lm, note = chat_lm(), "Most people were gone. The code for Ada is lamb. It rained.\n"
    ctx = question_context(lm, note, "What is the code for Ada?", "lamb", chat)
    assert torch.equal(ctx.tokens.ids, trace_prompt(lm, note, "What is the code for Ada?", "lamb", chat=chat or None).ids)
    assert (ctx.kind, ctx.answers, ctx.completion.strip()) == ("asked", ("lamb",), "lamb")
    reading = read_asked(lm, note, "What is the code for Ada?", "lamb", chat)
    assert text_asked(reading) == note.strip() and ready_prompt(lm, ctx, answer=ctx.completion).sources.text == note.strip()
    again = revive(PromptReading(reading.frames, json.loads(json.dumps(reading.meta))), lm)
    assert text_asked(again) == note.strip() and again.live.context.completion == ctx.completion
    bar = QuestionBar(lambda: None)
    bar.show(again)
    assert bar.shown == ("What is the code for Ada?", "lamb", chat) and bar.chat.layout.display is None


def test_asking_is_cancelled(lm: ll.LongModel) -> None:
    "Before the answer, and between the chunks of the text"
    said: list[str] = []
    progress = Progress(lambda share, text: said.append(text))
    with exclusive_use(lm, progress): read_asked(lm, "The code for Ada is lamb. " * 20, "What is the code for Ada?", progress=progress)
    assert said[0] == "the answer" and any("of about" in s for s in said)
    progress.cancelled = True
    with pytest.raises(Cancelled), exclusive_use(lm, progress): read_asked(lm, "The code for Ada is lamb.", ASK, progress=progress)
