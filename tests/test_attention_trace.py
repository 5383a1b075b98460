"""Attention back to the sources: rows and rollout of every architecture against transformers' own eager patterns."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from test_parity import CASES, N, agree, eager, forward, padding
from transformers import DynamicCache
from zoo import ZOO, token_ids, zoo_model

import longlens as ll
from longlens.measure.capture import capture
from longlens.measure.mean_rows import MeanRows, mean_over_layers
from longlens.measure.rollout import Rollout
from longlens.needle_lm.data import filler
from longlens.probes.traceback.methods.attention import AttentionRollout, AttnTrace, MeanAttention, RetrievalAttention, draw_sources
from longlens.probes.traceback.probe import trace_context
from longlens.probes.traceback.prompts import ready_prompt, trace_prompt
from longlens.probes.traceback.sources import token_prompt
from longlens.probes.traceback.tracer import TraceJob

SPANS = {"head": (0, 5), "body": (5, 24), "tail": (24, 33)}  # every sample has these positions
ROWS = (range(30, 36), [20, 29, 35])  # queries of each sample
WEIGHTS = {(0, 1): 1.0, (1, 0): 0.5, (1, 3): 2.0}


def rolled_out(P: torch.Tensor, skip: float = 0.5) -> torch.Tensor:  # (layers, n, n)
    "Products of the formed matrices of one sample, (layers, heads, n, n), after every layer"
    eye, out = torch.eye(P.shape[-1], dtype=torch.float64), []
    for mean in P.double().mean(1): out.append(((1 - skip) * mean + skip * eye) @ (out[-1] if out else eye))
    return torch.stack(out)


@pytest.mark.parametrize("name,side,chunked", CASES, ids=[f"{n}-{s or 'whole'}-{'chunks' if c else 'once'}" for n, s, c in CASES])
@torch.no_grad()
def test_rows_and_rollout_agree_with_eager(name: str, side: str | None, chunked: bool) -> None:
    model, ids, keep = ZOO[name](), token_ids(N, batch=2), padding(side)
    stats = (MeanRows(ROWS), MeanRows(ROWS, by="layer", label="layers"), MeanRows(ROWS, by="layer", weights=WEIGHTS, label="some"),
             Rollout(SPANS, ROWS[0], in_chunks=chunked))
    with capture(model, *stats) as seen: forward(model, ids, keep, chunked)
    P, _ = eager(model, ids, keep)
    means, some = mean_over_layers(seen, "layers"), mean_over_layers(seen, "some")
    for b in range(2):
        text = slice(None) if keep is None else keep[b].nonzero()[:, 0]
        own = P[:, b][:, :, text][..., text].double()
        rows = own[:, :, list(ROWS[b])].mean(2)  # (layers, heads, n)
        frame = seen.frame("mean_rows").filter(sample=b)
        got = torch.zeros_like(rows)  # layers whose sliding cache let go of the first keys have no rows for them
        got[frame["layer"].to_torch(), frame["head"].to_torch(), frame["position"].to_torch()] = frame["weight"].to_torch().double()
        agree(got.numpy().ravel(), rows, f"{name} rows {b}")
        there = len(means[b])  # in chunks, what comes after the last query's chunk is not in it
        assert there > ROWS[b][-1] and (chunked or there == own.shape[-1])
        agree(means[b].numpy(), rows.mean((0, 1))[:there], f"{name} mean {b}")
        want = sum(w * rows[at] for at, w in WEIGHTS.items()) / sum(WEIGHTS.values())
        agree(some[b].numpy(), want[:there], f"{name} weighted {b}")
        R = rolled_out(own)[:, list(ROWS[0])].mean(1)
        want = torch.stack([R[:, a:z].sum(-1) for a, z in SPANS.values()], -1)
        agree(seen.frame("rollout").filter(sample=b)["mass"].to_numpy(), want, f"{name} rollout {b}")


@torch.no_grad()
def test_texts_that_take_turns_roll_out_apart() -> None:
    "Two texts over two caches, chunk by chunk, through one statistic"
    model, texts = zoo_model("llama"), [token_ids(N, seed=s) for s in (1, 2)]
    caches = [DynamicCache(config=model.config) for _ in texts]
    with capture(model, Rollout(SPANS, range(34, 40), in_chunks=True)) as seen:
        for a, b in ((0, 20), (20, 36), (36, N)):
            for ids, cache in zip(texts, caches, strict=True): model(ids[:, a:b], past_key_values=cache)
    for i, ids in enumerate(texts):
        R = rolled_out(eager(model, ids, None)[0][:, 0])[:, 34:40].mean(1)
        want = torch.stack([R[:, a:z].sum(-1) for a, z in SPANS.values()], -1)
        agree(seen.frame("rollout").filter(sample=i)["mass"].to_numpy(), want, f"text {i}")


@torch.no_grad()
def test_a_forward_that_fails_midway_does_not_leak_into_the_next() -> None:
    model, ids = ZOO["llama"](), token_ids(N)
    class Stop(Exception): ...
    def fail(*_: object) -> None: raise Stop
    stat = Rollout(SPANS, range(30, 36))
    with capture(model, stat) as seen:
        handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(Stop): model(token_ids(N, seed=5))
        handle.remove()
        model(ids)
    with capture(model, Rollout(SPANS, range(30, 36))) as clean: model(ids)
    assert seen.frame("rollout").equals(clean.frame("rollout"))


MODELS = ("gpt2", "llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "gpt_neox", "opt", "deepseek_v3")
SOURCES = [(1, 6), (6, 9), (9, 20), (20, 21), (21, 32), (32, 37)]  # token positions; 0 and what follows are the prompt around them


def prompt_of(model, answer_span: range | None = None):
    "A LongModel of the zoo, and a prompt of 40 tokens with six sources and an answer of four"
    ids = token_ids(44)[0]
    return ll.load(model), token_prompt(ids[:40], SOURCES, ids[40:], answer_span)


def row_means(model, ids: torch.Tensor, rows: range, pick=lambda P: P.mean((0, 1))) -> np.ndarray:
    "Mean of some rows of the formed patterns, (n,), over the heads that are picked"
    P = eager(model, ids[None], None)[0][:, 0].double()  # (layers, heads, n, n)
    return pick(P[:, :, list(rows)].mean(2)).numpy()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_draws_agree_with_formed_patterns(name: str) -> None:
    "Subsets that share beginnings, against one whole eager forward for each draw"
    model = ZOO[name]()
    lm, prompt = prompt_of(model)
    tracer = AttnTrace(draws=7, share=0.5, top_tokens=3)
    got = tracer.run(TraceJob(lm, prompt, seed=3))
    random, each = np.random.RandomState(3), [[] for _ in SOURCES]
    for _ in range(7):
        kept = sorted(random.permutation(6)[:3].tolist())
        ids = torch.cat([prompt.ids[:1], *(prompt.ids[a:b] for a, b in (SOURCES[i] for i in kept)), prompt.ids[37:], prompt.answer.ids])
        row, at = row_means(model, ids, range(len(ids) - 5, len(ids))), 1
        for i in kept:
            size = SOURCES[i][1] - SOURCES[i][0]
            each[i].append(np.sort(row[at:at + size])[-3:].mean())
            at += size
    np.testing.assert_allclose(got.values, [np.mean(x) if x else 0 for x in each], rtol=1e-4, atol=1e-6)
    assert got.frames["draws"].group_by("source").len().sort("source")["len"].to_list() == [len(x) for x in each if x]
    assert got.costs.tokens == tracer.cost(TraceJob(lm, prompt, seed=3)).tokens <= got.costs.plain_tokens


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_methods_agree_with_formed_patterns(name: str) -> None:
    model = ZOO[name]()
    lm, prompt = prompt_of(model)
    rows, ids = range(39, 44), prompt.whole
    row = row_means(model, ids, rows)
    last = lm.n_layers - 1
    heads = {(0, 1): 0.25, (last, 2): 0.5}
    of_heads = row_means(model, ids, rows, lambda P: (0.25 * P[0, 1] + 0.5 * P[last, 2]) / 0.75)
    R = rolled_out(eager(model, ids[None], None)[0][:, 0])[-1, 39:44].mean(0).numpy()
    wanted = {
        MeanAttention(): [row[a:b].mean() for a, b in SOURCES],
        MeanAttention(layers=(last,), total=True): [row_means(model, ids, rows, lambda P: P[last].mean(0))[a:b].sum() for a, b in SOURCES],
        AttnTrace(draws=1, share=1.0, top_tokens=99): [row[a:b].mean() for a, b in SOURCES],
        RetrievalAttention(): [of_heads[a:b].sum() for a, b in SOURCES],
        AttentionRollout(): [R[a:b].sum() for a, b in SOURCES],
        AttentionRollout(total=False): [R[a:b].mean() for a, b in SOURCES],
    }
    for tracer, want in wanted.items():
        np.testing.assert_allclose(tracer.run(TraceJob(lm, prompt, heads=heads)).values, want, rtol=2e-4, atol=2e-6, err_msg=f"{tracer}")


@torch.no_grad()
def test_a_model_that_attends_alike_gives_numbers_known_beforehand() -> None:
    "Without queries, every row is uniform over what it sees"
    model = ZOO["llama"]()
    for layer in model.model.layers: layer.self_attn.q_proj.weight.zero_()
    lm, prompt = prompt_of(model, range(1, 3))  # the row before the second token of the answer, its own, and the third token's
    each = np.mean([1 / 41, 1 / 42, 1 / 43])
    np.testing.assert_allclose(MeanAttention().run(TraceJob(lm, prompt)).values, [each] * 6, rtol=1e-5)
    sizes = np.array([b - a for a, b in SOURCES])
    np.testing.assert_allclose(MeanAttention(total=True).run(TraceJob(lm, prompt)).values, each * sizes, rtol=1e-5)
    uniform = torch.tril(torch.ones(44, 44, dtype=torch.float64))
    step = (uniform / uniform.sum(-1, keepdim=True) + torch.eye(44)) / 2
    R = (step @ step)[40:43].mean(0)
    np.testing.assert_allclose(AttentionRollout().run(TraceJob(lm, prompt)).values, [float(R[a:b].sum()) for a, b in SOURCES], rtol=1e-5)
    short = AttnTrace(draws=400, share=0.5, top_tokens=2).run(TraceJob(lm, prompt))  # shorter prompts get more: 1 / (their length)
    draws = short.frames["draws"].with_columns(size=pl.col("source").replace_strict(dict(enumerate(sizes.tolist()))).sum().over("draw"))
    rows = [pl.col("size") + 4 + i for i in (1, 2, 3)]  # 4 tokens around the sources; a row sees itself too
    assert (draws["score"] - draws.select(sum(1 / r for r in rows) / 3).to_series()).abs().max() < 1e-6


def test_draws_are_the_published_ones() -> None:
    "Expected number of draws, determinism, few sources, few tokens"
    every = np.concatenate([np.concatenate(draw_sources(25, seed=s)) for s in range(100)])
    assert np.bincount(every).sum() == 100 * 30 * 10 and abs(np.bincount(every) / 100 - 12).max() < 1.5
    assert all(np.array_equal(a, b) for a, b in zip(draw_sources(25, seed=1), draw_sources(25, seed=1), strict=True))
    assert [len(d) for d in draw_sources(2, share=0.4)] == [1] * 30  # int(2 * 0.4) is 0, and the published code draws nothing
    lm, prompt = prompt_of(zoo_model("llama"))
    few = AttnTrace(draws=1, share=0.34).run(TraceJob(lm, prompt))
    assert (few.values == 0).sum() == 4 and "4 of 6 sources were in none of the 1 draws" in few.notes[0] and np.isnan(few.errors).all()
    many = AttnTrace(draws=30).run(TraceJob(lm, prompt))
    assert many.notes == () and (many.errors > 0).all()
    assert many.costs.evaluations <= 15 < many.costs.asked == 30  # there are 15 pairs of 6 sources: equal ones run once


def test_draws_of_one_source_say_so() -> None:
    lm = ll.load()
    documents = [f"{filler(1, seed=i)} The code for {who} is {what}." for i, (who, what) in enumerate((("Ada", "lamb"), ("Bob", "river")))]
    found = AttnTrace().run(TraceJob(lm, trace_prompt(lm, documents, "What is the code for Bob?")))  # 0.4 of 2 is less than one
    assert found.notes == ("each draw had one of the 2 sources, so none was compared with another: take a larger share=",)
    assert found.errors.tolist() == [0.0, 0.0]  # equal but for rounding


def test_an_intervention_holds_while_it_is_traced() -> None:
    "Heads that are silenced change what later layers look at"
    lm, prompt = prompt_of(ZOO["llama"]())
    before = MeanAttention().run(TraceJob(lm, prompt)).values
    with ll.ablate(lm, heads=[(0, h) for h in range(lm.n_heads)]): during = MeanAttention().run(TraceJob(lm, prompt)).values
    assert abs(during - before).max() > 1e-4
    assert np.array_equal(MeanAttention().run(TraceJob(lm, prompt)).values, before)


@pytest.mark.parametrize("error,make", [
    ("there is no layer 15: ", lambda job: MeanAttention(layers=range(15, 20)).run(job)),
    ("layers is empty", lambda job: MeanAttention(layers=[]).run(job)),
    ("there is no head \\(7, 0\\)", lambda job: RetrievalAttention().run(replace(job, heads=[(7, 0)]))),
    ("none of the 1 retrieval heads is in the layers", lambda job: RetrievalAttention(layers=[1]).run(replace(job, heads=[(0, 0)]))),
    ("weights of a mean are 0 or more", lambda job: RetrievalAttention().run(replace(job, heads={(0, 0): -1.0}))),
    ("needs to know which heads retrieve", lambda job: RetrievalAttention().run(job)),
    ("share is 0", lambda job: AttnTrace(share=0)),
    ("top_tokens are 1 or more", lambda job: AttnTrace(top_tokens=0)),
])
def test_bad_settings_say_what_is_wrong(error: str, make) -> None:
    with pytest.raises((ValueError, IndexError), match=error): make(TraceJob(*prompt_of(zoo_model("llama"))))


def test_a_report_without_retrieval_heads_is_refused() -> None:
    class Nothing(ll.HeadReport): found = ()
    with pytest.raises(ValueError, match="found no retrieval heads, so there is nothing to weigh by"):
        RetrievalAttention().run(TraceJob(*prompt_of(zoo_model("llama")), heads=Nothing.__new__(Nothing)))


def test_rollout_in_chunks_is_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    "Where the memory is short the prompt comes in chunks; where it is too short, nothing runs"
    lm, prompt = prompt_of(ZOO["mistral"]())
    whole = AttentionRollout().run(TraceJob(lm, prompt)).values
    memory, prefill, seen = type(lm).memory, type(lm).prefill, []
    def tight(self, n, chunk=None, *a, **kw): return replace(memory(self, n, chunk, *a, **kw), available=free[0])
    monkeypatch.setattr(type(lm), "memory", tight)
    free = [int(1.2 * memory(lm, 44, 32).needed)]
    monkeypatch.setattr(type(lm), "prefill", lambda self, x, chunk=None, **kw: (seen.append(chunk), prefill(self, x, chunk, **kw))[1])
    np.testing.assert_allclose(AttentionRollout().run(TraceJob(lm, prompt)).values, whole, rtol=1e-5)
    assert seen == [32]
    free[0] = 20_000
    with pytest.raises(MemoryError): AttentionRollout().cost(TraceJob(lm, prompt))


def test_needle_lm_finds_its_fact_by_attention() -> None:
    "Three questions: plain attention and heads that copy point at the fact"
    lm = ll.load()
    for seed in (0, 2, 3):
        ctx = ll.needle_context(lm, 700, 30 * seed, wording="facts", n_keys=4, seed=seed)
        prompt = ready_prompt(lm, ctx, by="sentences", size=2)
        right = next(i for i, r in enumerate(prompt.ranges) if ctx.spans["needle"].start in r)
        job = TraceJob(lm, prompt, heads=[(2, 0), (2, 1)])
        assert MeanAttention().run(job).values.argmax() == right
        copying = RetrievalAttention().run(job).values
        assert copying.argmax() == right and copying[right] > 0.5


def test_methods_are_found_by_name(tmp_path) -> None:
    "Through `trace_context`: settings, spans of the answer, costs, errors, and what a report keeps"
    lm = ll.load()
    documents = [f"{filler(3, seed=i)} The code for {said}." for i, said in enumerate(("Ada is lamb", "Eve is stone"))]
    ask = "What is the code for Eve?"
    for method, settings in (("attntrace", {"draws": 5}), ("attention", {"layers": range(2, 4)}), ("rollout", {"skip": 0.4}),
                             ("retrieval_attention", {})):
        trace = trace_context(lm, documents, ask, method=method, by="sentences", heads=[(2, 0), (2, 1)], **settings)
        scores = trace.frames["sources"]["score"]
        assert scores.is_finite().all() and (scores >= 0).all() and scores.sum() > 0
        how = dict(method=method, by="sentences", heads=[(2, 0)], **settings)
        cost = ll.plan(trace_context, lm, documents, ask, trace.meta["answer"], **how)
        again = trace_context(lm, documents, ask, trace.meta["answer"], budget=cost.tokens, **how).frames["costs"]
        assert cost.exact and cost.tokens == again["tokens"].sum()
        asked = ll.plan(trace_context, lm, documents, ask, **how)  # the answer is not there yet
        assert not asked.exact and trace.frames["costs"]["tokens"].sum() <= asked.tokens
        trace.save(tmp_path / method)
        assert ll.Report.load(tmp_path / method).frames["sources"].equals(trace.frames["sources"])
    best = trace.frames["sources"].sort("score", descending=True).row(0, named=True)
    assert trace.context[best["start"]:best["end"]].strip() == "The code for Eve is stone."
    with pytest.raises(ValueError, match="needs heads"): trace_context(lm, documents, ask, method="retrieval_attention")
    with pytest.raises(TypeError, match="has no setting 'beta'"): trace_context(lm, documents, ask, method="attntrace", beta=3)


def test_a_script_sees_the_methods_at_once() -> None:
    code = "from longlens.probes.traceback.tracer import load_methods; print(load_methods()['attntrace'])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("AttnTrace(draws=30, share=0.4, top_tokens=5, layers=None)")
