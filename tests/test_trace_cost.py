"""What a trace costs: never more than was said, planned in little memory, and nothing runs before it is allowed"""
from __future__ import annotations

import tracemalloc
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo import zoo_model

import longlens as ll
from longlens.models.forward import LongModel
from longlens.needle_lm.data import filler
from longlens.probes.traceback import coarse_to_fine
from longlens.probes.traceback import tracer as trace_jobs
from longlens.probes.traceback.coarse_to_fine import CoarseToFine, _finer, _inside, level_rooms
from longlens.probes.traceback.evaluation import evaluate as trace_evaluation
from longlens.probes.traceback.evaluation.cases import TraceCase, fact_cases
from longlens.probes.traceback.methods import perturbation
from longlens.probes.traceback.methods.perturbation import LeaveOneOut, Shapley, out_masks
from longlens.probes.traceback.prefix_tree import first_alike
from longlens.probes.traceback.prompts import trace_prompt, unwritten
from longlens.probes.traceback.scorer import SubsetScorer
from longlens.probes.traceback.sources import TracePrompt, subset_ids, token_prompt
from longlens.probes.traceback.tracer import TRACERS, TraceCost, TraceJob, Tracer, TraceScores, find_tracer, load_methods, room_of

ASK = "What is the code for Eve?"
INNER: dict[str, dict[str, Any]] = {  # every method that can be inside of coarse_to_fine, with little to do
    "loo": {}, "stc": {}, "shapley": {"permutations": 3}, "denoised_shapley": {"permutations": 3},
    "tracllm": {"permutations": 3, "keep": 2}, "contextcite": {"ablations": 6, "held_out": 2, "draws": 2}, "attntrace": {"draws": 3},
    "attention": {}, "rollout": {},
    "captum_ablation": {}, "captum_shapley": {"samples": 2}, "kernel_shap": {}, "lime": {"samples": 6},
    "gradient_x_input": {}, "integrated_gradients": {"steps": 2}, "xl3m": {}, "longcodezip": {},
}
WORDS = ["stone", "river", "the", "door", "rain.", "lamp.", "No.", "green", "boat."]
sentence = st.lists(st.sampled_from(WORDS), min_size=1, max_size=25).map(lambda w: " ".join(w).capitalize() + ".")
paragraphs = st.lists(st.lists(sentence, min_size=1, max_size=9).map(" ".join), min_size=2, max_size=6)
some = lambda n: settings(max_examples=n, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module")
def lm() -> LongModel: return ll.load()


def test_all_inner_methods_are_here() -> None:
    assert {*load_methods()} - {"coarse_to_fine", "self_citation", "cited_answer", "quotes", "retrieval_attention", "at2"} == {*INNER}


@pytest.mark.parametrize("name", INNER)
@some(15)
@given(texts=paragraphs, levels=st.sampled_from([("sentences",), ("sentences", "tokens"), ("tokens",), ("lines", "sentences")]),
       keep=st.integers(1, 3), seed=st.integers(0, 99))
def test_whatever_wins_costs_no_more_than_was_said(lm: LongModel, name: str, texts: list[str], levels: tuple[str, ...], keep: int,
                                                   seed: int) -> None:
    "Texts with very uneven sentences, and any sources as the winners of every level; nothing is run"
    tracer, rng = find_tracer(name, INNER[name]), np.random.default_rng(seed)
    prompt = trace_prompt(lm, "\n\n".join(texts), ASK, " stone", by="paragraphs")
    job = TraceJob(lm, prompt, seed=seed)
    rooms = [*level_rooms(prompt, levels, keep, room_of(job).always)]
    said = [tracer.most(job, room) for room in rooms]
    for draw in range(4):
        now, costs, wins = prompt, [], None
        for by in levels:
            weight = [rng.random(now.n), [len(r) for r in now.ranges], [t.count(".") for t in now.sources.texts], range(now.n)][draw]
            wins = wins or sorted(np.argsort(weight)[-keep:].tolist())  # they still do where a level cuts nothing
            if (finer := _finer(now, wins, by)) is None: continue
            wins = None
            costs.append(tracer.cost(_inside(job, now := finer[0])))
        assert sum(c.tokens for c in costs) <= sum(s.tokens for s in said)
        assert sum(c.evaluations for c in costs) <= sum(s.evaluations for s in said)


@pytest.mark.parametrize("name", INNER)
@pytest.mark.filterwarnings("ignore::longlens.probes.traceback.methods.captum_gradients.IncompleteAttribution",
                            "ignore:Objective did not converge")
def test_a_run_costs_no_more_than_was_said(lm: LongModel, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    "Long sentences in three paragraphs, many short ones in the fourth; and with winners at random"
    long = " ".join(["the river bank is yellow and the stone garden is near the bridge and"] * 3) + "."
    short = "The code for Eve is stone. " + " ".join(f"{a} {b}." for a in ("Stone", "River", "Bank") for b in ("door", "lamp", "boat"))
    prompt = trace_prompt(lm, "\n\n".join([long] * 3 + [short]), ASK, " stone", by="paragraphs")
    real = coarse_to_fine._best
    for random in (False, True):
        if random: monkeypatch.setattr(coarse_to_fine, "_best", lambda v, keep: real(np.random.default_rng(len(v)).random(len(v)), keep))
        tracer, job = CoarseToFine(find_tracer(name, INNER[name]), keep=1), TraceJob(lm, prompt)
        said, taken = tracer.cost(job), tracer.run(job).costs
        assert taken.tokens <= said.tokens and taken.evaluations <= said.evaluations


def test_self_citation_inside_is_bounded(lm: LongModel) -> None:
    "What the model reads then is a new text, so it is bounded by its bytes"
    import copy

    from test_context import CHATML
    tok = copy.deepcopy(lm.tokenizer)
    tok.chat_template = CHATML
    chat = ll.load(lm.hf, tok)
    prompt = trace_prompt(chat, "\n\n".join(f"{filler(2, seed=i)} Rain. No." for i in range(4)), ASK, "stone", by="paragraphs")
    job, tracer = TraceJob(chat, prompt), TRACERS["self_citation"]
    (room,) = level_rooms(prompt, ["sentences"], 2, room_of(job).always)
    for pair in combinations(range(4), 2):
        cost = tracer.cost(_inside(job, _finer(prompt, pair, "sentences")[0]))
        assert cost.tokens <= tracer.most(job, room).tokens


@dataclass(frozen=True)
class Half(Tracer):
    "A method of one's own that says half of what it takes inside"

    def cost(self, job: TraceJob) -> TraceCost: return TraceCost(1, 100 if job.n == 3 else 10 * job.n)
    def run(self, job: TraceJob) -> TraceScores:
        from longlens.probes.traceback.prefix_tree import ScoreCosts
        return TraceScores(np.arange(job.n) + 1.0, costs=ScoreCosts(1, 1, 100 if job.n == 3 else 10 * job.n))


def test_a_level_that_is_over_the_budget_is_not_run(lm: LongModel) -> None:
    text = "\n\n".join(["It rains.", "It snows.", "The code for Eve is stone. " + "Yes. " * 40])
    first = ll.trace_context(lm, text, ASK, " stone", method=CoarseToFine(Half(), keep=1))
    assert first.frames["levels"]["level"].max() == 2
    job = TraceJob(lm, trace_prompt(lm, text, ASK, " stone", by="paragraphs"), budget=150)
    found = CoarseToFine(Half(), keep=1).run(job)
    assert found.frames["levels"]["level"].max() == 0
    assert "the 41 sentences in the best of those are not scored: that takes up to 1 evaluations, 410 tokens" in found.notes[0]
    assert "and of the budget 50 are left" in found.notes[0]


# Plans

def many_sources(n: int, long: int, kinds: int = 50) -> TracePrompt:
    "Sources of some tokens each; some are equal, and some are equal but for their order"
    rng = np.random.default_rng(0)
    parts = [rng.integers(3, 6 + i, long) for i in range(kinds)]
    ids = np.concatenate([[1], *(parts[i] for i in rng.integers(0, kinds, n)), [2]])
    return token_prompt(ids.tolist(), [(1 + i * long, 1 + (i + 1) * long) for i in range(n)], [7, 9])


@some(60)
@given(st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=3), min_size=1, max_size=7))
def test_subsets_of_one_prompt_are_found(sources: list[list[int]]) -> None:
    "Against the tokens themselves, of all subsets"
    ends = np.cumsum([1, *map(len, sources)]).tolist()
    prompt = token_prompt([1, *(t for s in sources for t in s), 2], [*pairwise(ends)], [7])
    masks = np.array([[i >> k & 1 for k in range(prompt.n)] for i in range(2**prompt.n)], bool)
    masks = np.concatenate([masks, masks[::3]])
    said = [tuple(subset_ids(prompt, m).tolist()) for m in masks]
    assert first_alike(prompt, masks).tolist() == [said.index(s) for s in said]


@pytest.mark.parametrize(("n", "long", "tracer"), [(800, 100, find_tracer("denoised_shapley", {})), (800, 100, Shapley()),
                                                   (3000, 20, LeaveOneOut())], ids=str)
def test_a_plan_takes_little(n: int, long: int, tracer: Tracer) -> None:
    "A byte for each source in each subset, and hardly more; it took gigabytes"
    lm, prompt = ll.load(zoo_model("llama"), allow_longer=True), many_sources(n, long)
    tracemalloc.start()
    cost = tracer.cost(TraceJob(lm, prompt))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    subsets = getattr(tracer, "permutations", 1) * (n + 1)
    assert cost.exact and 0.9 * subsets <= cost.evaluations <= subsets
    assert peak < 4 * subsets * n + 2**26


def test_a_plan_that_would_be_too_large_is_not_made(lm: LongModel, monkeypatch: pytest.MonkeyPatch) -> None:
    "Then the cost is that of whole forwards, and a budget refuses it as well"
    documents = [f"It rains on day {i}. " * 3 for i in range(12)]
    for name in ("loo", "stc", "shapley", "denoised_shapley", "captum_ablation", "captum_shapley", "kernel_shap", "lime"):
        exact = ll.plan(ll.trace_context, lm, documents, ASK, " stone", method=name)
        with monkeypatch.context() as m:
            m.setattr(trace_jobs, "MOST_BITS", 10)
            m.setattr(perturbation, "out_masks", lambda n: 1 / 0)
            most = ll.plan(ll.trace_context, lm, documents, ASK, " stone", method=name)
            with pytest.raises(ValueError, match="sources takes up to .* and budget is 100"):
                ll.trace_context(lm, documents, ASK, " stone", method=name, budget=100)
        assert exact.exact and not most.exact
        assert exact.tokens <= most.tokens < 5 * exact.tokens and exact.evaluations <= most.evaluations
    assert (out_masks(3) == [[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]]).all()


def test_a_plan_that_does_not_fit_is_not_free(lm: LongModel, monkeypatch: pytest.MonkeyPatch) -> None:
    "Out of memory while planning, an evaluation does not go on as if a method took nothing; a refusal is kept for its row"
    case = fact_cases(1, 300)[0]
    run = trace_evaluation.CaseRun("key", 0, replace_prompt(lm, case), "loo", LeaveOneOut())
    def raises(error: BaseException) -> Any: return lambda self, job: (_ for _ in ()).throw(error)
    monkeypatch.setattr(LeaveOneOut, "cost", raises(np._core._exceptions._ArrayMemoryError((9, 9), np.dtype(int))))
    with pytest.raises(MemoryError): trace_evaluation.planned_runs(lm, [run])
    monkeypatch.setattr(LeaveOneOut, "cost", raises(MemoryError("rollout keeps a number for each token")))
    assert trace_evaluation.planned_runs(lm, [run])["tokens"].to_list() == [None]


def replace_prompt(lm: LongModel, case: TraceCase) -> Any:
    return trace_evaluation.AskedCase(case, trace_prompt(lm, case.text, ASK, " stone"), (0,), " stone", "", -1.0)


# Nothing runs before it is allowed

@pytest.mark.parametrize("name", [*INNER, "coarse_to_fine"])
def test_a_cost_and_a_refusal_run_nothing(lm: LongModel, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    "With and without an answer; what is said then is no less than what is taken"
    text = "\n\n".join(f"{filler(2, seed=i)} The code for {who}." for i, who in enumerate(("Ada is lamb", "Eve is stone")))
    how = dict(method=name, by="sentences", **INNER.get(name, {}))
    with monkeypatch.context() as m:
        def never(*a: Any, **k: Any) -> Any: raise AssertionError("the model ran")
        m.setattr(LongModel, "logits_at", never)
        m.setattr(lm.hf, "forward", never)
        asked, given = (ll.plan(ll.trace_context, lm, text, ASK, answer, **how) for answer in (None, " stone"))
        for answer in (None, " stone"):
            with pytest.raises(ValueError, match="and budget is 10"): ll.trace_context(lm, text, ASK, answer, budget=10, **how)
    assert not asked.exact and asked.tokens > given.tokens > given.answer > 0
    if name in ("integrated_gradients", "gradient_x_input", "lime", "contextcite"): return  # their runs are elsewhere
    for said, answer in ((asked, None), (given, " stone")):
        costs = ll.trace_context(lm, text, ASK, answer, budget=said.tokens, **how).frames["costs"]
        assert costs["tokens"].sum() <= said.tokens
        if said.exact: assert costs["tokens"].sum() == said.tokens


def test_what_is_said_is_what_runs(lm: LongModel, tmp_path: Any) -> None:
    "Every token that goes through the model, counted at the model: to write the answer, to weigh it, and for the method"
    documents = [f"{filler(1, seed=i)} The code for {who}." for i, who in enumerate(("Ada is lamb", "Eve is stone"))]
    seen = [0]
    def count(module: Any, args: tuple, kwargs: dict) -> None: seen[0] += kwargs["input_ids"].numel()
    hook = lm.hf.register_forward_pre_hook(count, with_kwargs=True)
    try:
        for name in ("loo", "stc", "shapley", "attention", "attntrace", "rollout"):
            for answer in (None, " stone"):
                seen[0] = 0
                costs = ll.trace_context(lm, documents, ASK, answer, method=name).frames["costs"]
                assert 0 <= seen[0] - costs["tokens"].sum() <= 2 * (answer is None), (name, answer)  # an end that is cut off the answer
    finally: hook.remove()
    n = len(trace_prompt(lm, documents, ASK, " stone"))
    t = ll.trace_context(lm, documents, ASK, method="attention")  # written, weighed and looked at, the prompt runs once
    assert t.frames["costs"]["tokens"][:2].sum() < n + 20
    assert t.frames["costs"]["tokens"][2] < n / 2  # the answer without the context
    for _ in range(2):  # an answer that is known from its folder leaves nothing in memory, and the plan knows
        how = dict(method="attention", out=tmp_path)
        cost = ll.plan(ll.trace_context, lm, documents, ASK, " stone", **how)
        assert ll.trace_context(lm, documents, ASK, " stone", **how).frames["costs"]["tokens"].sum() == cost.tokens


def test_an_answer_that_stands_for_one(lm: LongModel) -> None:
    ids = unwritten(lm, 7)
    assert len(ids) == 7 and len(unwritten(lm)) == 32 and len(lm.tokens(lm.decode(torch.tensor(ids)), add_special_tokens=False)) == 7
    with pytest.raises(ValueError, match="stands 0 times in the answer"):
        ll.trace_context(lm, "The code for Eve is stone.", ASK, answer_span="oat")


# Memory

@pytest.mark.parametrize("name", ["loo", "stc", "attention", "attntrace", "rollout", "coarse_to_fine", "contextcite"])
@pytest.mark.parametrize("answer", [None, " stone"])
def test_max_memory_holds_for_every_method(name: str, answer: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    "Each prefill is in chunks that fit by the model's own estimate, and too little is refused with the number"
    lm = small_lm()
    text = "\n\n".join(f"{filler(20, seed=i)} The code for {i} is stone." for i in range(12))
    how = dict(method=name, by="paragraphs", max_new_tokens=8, **INNER.get(name, {}))
    if name == "coarse_to_fine": how["inner"] = "attention"
    roomy = ll.trace_context(lm, text, ASK, answer, **how)
    n, seen, real = len(trace_prompt(lm, text, ASK, " stone")), [], LongModel.prefill
    need = lm.memory(n + 8, 64, rows=8)
    limit = need.needed + 2 * need.cache + 4 * (lm.n_layers + 3) * n * 12 * (name == "rollout")

    def prefill(self: Any, x: Any, chunk: int | None = None, **kw: Any) -> Any:
        seen.append(min(chunk or self.best_chunk(len(x)), len(x)))
        assert self.memory(len(x), seen[-1]).needed <= limit, name
        return real(self, x, chunk, **kw)

    monkeypatch.setattr(LongModel, "prefill", prefill)
    assert lm.memory(n, n).needed > 3 * limit
    tight = ll.trace_context(lm, text, ASK, answer, max_memory=limit, **how)
    assert seen[0] < n / 4
    a, b = (t.frames["sources"]["score"].to_numpy() for t in (roomy, tight))
    np.testing.assert_allclose(a, b, atol=2e-5)
    with pytest.raises(MemoryError, match="max_memory is 10 kB"): ll.trace_context(lm, text, ASK, answer, max_memory=10_000, **how)


def small_lm() -> LongModel:
    "A model whose cache is small, so that what is at work at a time is most of the memory"
    from transformers import LlamaConfig, LlamaForCausalLM
    tok = ll.load().tokenizer
    torch.manual_seed(0)
    c = LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, max_position_embeddings=16384, eos_token_id=tok.eos_token_id)
    return ll.load(LlamaForCausalLM(c).eval(), tok)


def test_gradients_and_citations_keep_to_max_memory(lm: LongModel) -> None:
    prompt = trace_prompt(lm, ["The code for Ada is lamb.", "The code for Eve is stone."], ASK, " stone")
    for name in ("integrated_gradients", "gradient_x_input"):
        with pytest.raises(MemoryError, match=rf"{name} needs about .* and max_memory is 200 kB"):
            TRACERS[name].run(TraceJob(lm, prompt, max_memory=200_000))
    with pytest.raises(MemoryError, match="in chunks of 32: it takes .* and max_memory is 10 kB"): lm.best_chunk(500, most=10_000)


def test_a_scorer_counts_what_is_to_come(lm: LongModel) -> None:
    "A plan after `expect` is what is run after the subset has"
    prompt = trace_prompt(lm, [filler(1, seed=i) for i in range(5)], ASK, " stone")
    for kept in (out_masks(5), ~out_masks(5)):
        planned, ran = SubsetScorer(lm, prompt), SubsetScorer(lm, prompt)
        first = planned.expect()
        ran(np.ones((1, 5), bool))
        assert first.tokens == ran.costs.tokens and planned.plan(kept).tokens == ran.plan(kept).tokens
        assert planned.plan(kept).evaluations == ran.plan(kept).evaluations
        planned(kept)
        assert planned.ahead is None and planned.costs.tokens == replace(SubsetScorer(lm, prompt).plan(kept)).tokens
