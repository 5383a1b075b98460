"""Captum's methods on games whose answer is known, on a model beside our own methods, and its gradients beside plain autograd."""
from __future__ import annotations

import itertools
import math
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import zoo
from captum.attr import KernelShap, ShapleyValueSampling
from hypothesis import given, settings
from hypothesis import strategies as st

import longlens as ll
from longlens.needle_lm.data import filler
from longlens.probes.traceback.methods.captum_gradients import (
    CaptumGradient,
    CaptumIntegratedGradients,
    IncompleteAttribution,
    _inputs,
    _saved_bytes,
    answer_target,
    backward_bytes,
    gradient_tokens,
    integrated_tokens,
    neutral_id,
    source_sums,
)
from longlens.probes.traceback.methods.captum_perturbation import CaptumKernelShap, CaptumLime, CaptumShapley, MaskGame
from longlens.probes.traceback.methods.contextcite import ContextCite
from longlens.probes.traceback.prompts import trace_prompt
from longlens.probes.traceback.sources import token_prompt
from longlens.probes.traceback.tracer import TRACERS, GameJob, TraceJob, find_tracer

SUBSETS = ("captum_ablation", "captum_shapley", "kernel_shap", "lime")
PEOPLE = {"Ada": "lamb", "Bob": "river", "Eve": "stone", "Tom": "table", "Una": "glass"}


class Game:
    """A game of n players; it counts the sets it was asked about."""

    def __init__(self, n, value):
        self.n, self.value, self.asked = n, value, 0

    def __call__(self, kept):
        assert kept.dtype == bool and kept.shape[1] == self.n
        self.asked += len(kept)
        return self.value(kept)


def exact_shapley(value, n):
    """The sum over all coalitions, by the definition."""
    every = np.array(list(itertools.product([False, True], repeat=n)))
    worth = dict(zip(map(tuple, every.tolist()), value(every), strict=True))
    out = np.zeros(n)
    for row in every.tolist():
        size = sum(row)
        for i in range(n):
            if row[i]: continue
            weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            out[i] += weight * (worth[(*row[:i], True, *row[i + 1 :])] - worth[tuple(row)])
    return out


def tangled(m):
    return 4.0 * (m[:, 0] & m[:, 1]) - m[:, 2] + 2.0 * (m[:, 3] | m[:, 4]) + 0.5 * (m[:, 0] & ~m[:, 4]) - 20


@pytest.fixture(scope="module")
def lm():
    return ll.load()


@pytest.fixture(scope="module")
def prompt(lm):
    documents = [f"{filler(1, seed=i)} The code for {who} is {what}." for i, (who, what) in enumerate(PEOPLE.items())]
    return trace_prompt(lm, documents, "What is the code for Eve?")


# Subsets

@settings(max_examples=5, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10_000), st.floats(-300, 300))
def test_additive_games_are_recovered_by_every_method(n, seed, base):
    w = np.random.default_rng(seed).normal(size=n) * 3
    job = GameJob(Game(n, lambda kept: kept @ w + base))
    for name in ("loo", "stc", "shapley", *SUBSETS[:3]):
        np.testing.assert_allclose(TRACERS[name].run(job).values, w, atol=5e-3, err_msg=name)
    np.testing.assert_allclose(CaptumLime(samples=300, draws=2).run(job).values, w, atol=0.25)  # its penalty
    np.testing.assert_allclose(ContextCite(alpha=1e-6, draws=2).run(job).values, w, atol=1e-2)


def test_shapley_values_of_a_game_that_does_not_add_up():
    exact, job = exact_shapley(tangled, 5), GameJob(Game(5, tangled))
    np.testing.assert_allclose(TRACERS["captum_ablation"].run(job).values, TRACERS["loo"].run(job).values, atol=1e-9)
    for tracer in (CaptumShapley(samples=400), CaptumKernelShap(samples=600)):
        found = tracer.run(job)
        assert (np.abs(found.values - exact) < 4 * found.errors + 0.02).all(), tracer
        assert 0 < found.errors.max() < 0.3
        assert found.values.sum() == pytest.approx(tangled(np.ones((1, 5), bool))[0] - tangled(np.zeros((1, 5), bool))[0], abs=1e-2)


def test_standard_errors_are_the_spread_over_seeds():
    for tracer in (CaptumShapley(samples=30), CaptumKernelShap(samples=60, draws=15), CaptumLime(samples=60, draws=15)):
        runs = [tracer.run(GameJob(Game(5, tangled), seed=s)) for s in range(12)]
        spread, said = np.std([r.values for r in runs], axis=0, ddof=1), np.mean([r.errors for r in runs], axis=0)
        big = spread > 0.05
        assert big.any() and (0.35 < said[big] / spread[big]).all() and (said[big] / spread[big] < 2.5).all(), (tracer, said, spread)


def test_it_is_captum_that_answers():
    """One call of captum's classes, with its own arguments and the same seed, gives the same."""
    one, zero = torch.ones(1, 5), torch.zeros(1, 5)
    before = torch.get_rng_state()
    torch.manual_seed(3)
    shapley = ShapleyValueSampling(MaskGame(tangled)).attribute(one, baselines=zero, n_samples=25)
    torch.manual_seed(3)
    shap = KernelShap(MaskGame(tangled)).attribute(one, baselines=zero, n_samples=25)
    torch.set_rng_state(before)
    job = GameJob(Game(5, tangled), seed=3)
    np.testing.assert_allclose(TRACERS["captum_shapley"].run(job).values, shapley[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(TRACERS["kernel_shap"].run(job).values, shap[0].numpy(), atol=1e-5)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", SUBSETS)
def test_each_subset_is_scored_once_and_the_cost_said_before(lm, prompt, name):
    game = Game(5, tangled)
    cost = TRACERS[name].cost(GameJob(game))
    assert not game.asked
    a, b = (TRACERS[name].run(GameJob(game)) for _ in range(2))
    assert game.asked == 2 * cost.evaluations
    np.testing.assert_array_equal(a.values, b.values)
    job = TraceJob(lm, prompt)
    cost = TRACERS[name].cost(job)
    TRACERS[name].run(job)
    real = job.scorer.costs
    assert (cost.evaluations, cost.tokens) == (real.evaluations, real.tokens) and real.asked == cost.evaluations


def test_on_a_model_beside_our_own(lm, prompt):
    job = TraceJob(lm, prompt)
    exact = exact_shapley(job.scorer, 5)
    np.testing.assert_allclose(TRACERS["captum_ablation"].run(job).values, TRACERS["loo"].run(job).values, atol=1e-5)
    found = CaptumShapley(samples=200).run(job)
    assert (np.abs(found.values - exact) < 4 * found.errors + 1e-3).all()
    best = {name: int(np.argmax(TRACERS[name].run(job).values)) for name in SUBSETS}
    assert set(best.values()) == {2}, best


def test_settings_of_subsets():
    job = GameJob(Game(9, lambda kept: kept.sum(1) * 1.0))
    assert CaptumKernelShap(samples=11).run(job).values == pytest.approx(np.ones(9), abs=1e-2)
    with pytest.raises(ValueError, match="kernel_shap fits 10 numbers for 9 sources, and samples is 10: it needs 11 or more"):
        CaptumKernelShap(samples=10).cost(job)
    for cls in (CaptumShapley, CaptumKernelShap, CaptumLime):
        with pytest.raises(ValueError, match="samples is 0"): cls(samples=0)
    assert find_tracer("captum_shapley", {"samples": 1}).run(job).errors is None
    assert TRACERS["kernel_shap"].cost(GameJob(Game(40, None))).evaluations <= 160


def test_what_to_install(monkeypatch, lm, prompt):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    for name in (*SUBSETS, "integrated_gradients", "gradient_x_input"):
        with pytest.raises(ImportError, match=r"needs captum: pip install longlens\[trace\]"): TRACERS[name].run(TraceJob(lm, prompt))


# Gradients

def by_hand(lm, prompt, steps, token):
    """Integrated gradients by plain autograd on inputs_embeds, points and weights of Gauss and Legendre."""
    ids, empty = _inputs(lm, prompt, token)
    embed = lm.hf.get_input_embeddings()
    with torch.no_grad(): a, b = embed(empty), embed(ids)
    points, weights = np.polynomial.legendre.leggauss(steps)
    total = torch.zeros_like(a)
    for x, w in zip((points + 1) / 2, weights / 2, strict=True):
        at = (a + x * (b - a)).requires_grad_()
        logits = lm.hf(inputs_embeds=at, use_cache=False).logits[0, prompt.answer_rows.start : prompt.answer_rows.stop]
        said = prompt.answer.ids[prompt.traced.start : prompt.traced.stop]
        total += w * torch.autograd.grad(logits.log_softmax(-1).gather(-1, said[:, None]).sum(), at)[0]
    return (total * (b - a)).sum(-1)[0, : len(prompt)].numpy()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_oss", "phi3", "opt", "mixtral", "deepseek_v3"])
def test_every_architecture_beside_plain_autograd(name):
    model = zoo.zoo_model(name)
    lm = ll.load(model)
    ids = zoo.token_ids(46)[0]
    prompt = token_prompt(ids[:44], [(4, 10), (12, 20), (20, 33)], ids[44:])
    found = integrated_tokens(lm, prompt, 6, 11)
    hand = by_hand(lm, prompt, 6, 11)
    np.testing.assert_allclose(found.tokens, hand, atol=2e-4 * max(1, np.abs(hand).max()))
    assert not found.tokens[prompt.owner < 0].any()
    score = lm.score(prompt.ids, prompt.answer.ids).total - lm.score(_inputs(lm, prompt, 11)[1][0, :44].cpu(), prompt.answer.ids).total
    assert found.difference == pytest.approx(score, abs=1e-3)
    assert all(p.requires_grad for p in model.parameters()) and not any(p.grad is not None for p in model.parameters())


def test_gradient_times_input_is_that(lm, prompt):
    ids = _inputs(lm, prompt, 0)[0]
    x = lm.hf.get_input_embeddings()(ids).detach().requires_grad_()
    logits = lm.hf(inputs_embeds=x, use_cache=False).logits[0, prompt.answer_rows.start : prompt.answer_rows.stop]
    target = logits.log_softmax(-1).gather(-1, prompt.answer.ids[:, None]).sum()
    hand = (torch.autograd.grad(target, x)[0] * x).sum(-1)[0, : len(prompt)].detach().numpy()
    np.testing.assert_allclose(gradient_tokens(lm, prompt).tokens, hand, atol=1e-5)
    found = TRACERS["gradient_x_input"].run(TraceJob(lm, prompt))
    np.testing.assert_allclose(found.values, source_sums(prompt, hand), atol=1e-5)
    assert found.values.argmax() == 2 and found.frames["tokens"]["position"].to_list() == np.flatnonzero(prompt.owner >= 0).tolist()


def test_the_parts_add_up_the_better_the_more_steps(lm, prompt):
    gaps = {}
    for steps in (8, 32):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IncompleteAttribution)
            found = CaptumIntegratedGradients(steps=steps).run(TraceJob(lm, prompt))
        row = found.frames["completeness"].row(0, named=True)
        assert row["sum"] == pytest.approx(found.values.sum(), abs=1e-4) and row["sum"] - row["difference"] == pytest.approx(row["gap"])
        gaps[steps] = abs(row["gap"])
    assert gaps[32] < gaps[8] and gaps[32] < 0.1 * row["difference"]
    with pytest.warns(IncompleteAttribution, match="8 steps are too few for this baseline"):
        CaptumIntegratedGradients(steps=8, baseline=lm.tokenizer.pad_token_id).run(TraceJob(lm, prompt))


@pytest.mark.parametrize("tracer", [CaptumIntegratedGradients(steps=13), CaptumGradient()])
@pytest.mark.filterwarnings("ignore::longlens.probes.traceback.methods.captum_gradients.IncompleteAttribution")
def test_the_cost_of_gradients_is_what_runs(lm, prompt, tracer, monkeypatch):
    seen, forward = [], lm.hf.forward

    def counted(*args, **kw):
        seen.append(kw["input_ids"].shape)
        return forward(*args, **kw)

    cost = tracer.cost(TraceJob(lm, prompt))
    monkeypatch.setattr(lm.hf, "forward", counted)
    monkeypatch.setattr(lm, "accepts", lambda name: name == "logits_to_keep")
    found = tracer.run(TraceJob(lm, prompt))
    assert cost.evaluations == sum(b for b, _ in seen) == found.costs.evaluations
    assert cost.tokens == sum(b * n for b, n in seen) == found.costs.tokens and cost.exact


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_what_a_backward_pass_keeps_is_foreseen(name):
    lm, ids = ll.load(zoo.zoo_model(name), allow_longer=True), zoo.token_ids(700)[0]
    if lm.positions == "learned": ids = ids[: lm.max_length]
    real = _saved_bytes(lm, ids[None])
    assert real <= backward_bytes(lm, ids) <= 2 * real + 100_000


def test_too_little_memory_is_said_before_it_runs(lm, prompt, monkeypatch):
    real = lm.memory
    monkeypatch.setattr(lm, "memory", lambda n, *args: replace(real(n, *args), available=2_000_000))
    for name in ("integrated_gradients", "gradient_x_input"):
        with pytest.raises(MemoryError, match=rf"{name} needs about \d.* MB for a backward pass over \d+ tokens, and 2.0 MB are free"):
            TRACERS[name].run(TraceJob(lm, prompt))


def test_a_span_of_the_answer_and_a_changed_model(lm):
    """Only the traced tokens count, and interventions are in force."""
    documents = ["The code for Ada is lamb.", "The code for Eve is stone."]
    part = trace_prompt(lm, documents, "What is the code for Eve?", answer="stone. The code", answer_span="stone")
    target, inputs = answer_target(lm, part), _inputs(lm, part, ".")[0]
    alone = float(lm.score(part.tokens, part.answer).logprobs[part.traced.start])
    with torch.no_grad(): assert float(target(inputs)) == pytest.approx(alone, abs=1e-4)
    assert inputs.shape[1] == len(part) + part.traced.stop - 1  # what comes after the traced tokens is not run
    with ll.ablate(lm, heads=[(layer, h) for layer in (2, 3) for h in range(8)]):
        hurt = gradient_tokens(lm, part)
        with torch.no_grad(): assert float(target(inputs)) < -3
    assert np.abs(hurt.tokens - gradient_tokens(lm, part).tokens).max() > 1e-3


def test_what_gradients_refuse(lm, prompt):
    game = GameJob(Game(3, len))
    for name in ("integrated_gradients", "gradient_x_input"):
        with pytest.raises(ValueError, match="takes gradients of a model, and this job is a game without one"): TRACERS[name].run(game)
    with pytest.raises(ValueError, match="baseline 99999 is no token: needle-lm has 0 to"): neutral_id(lm, 99_999)
    with pytest.raises(ValueError, match="no tokens"): neutral_id(lm, "")
    with pytest.raises(ValueError, match="steps is 0"): CaptumIntegratedGradients(steps=0)
    assert neutral_id(lm, ".") == lm.tokens(".", add_special_tokens=False).ids[-1]


def test_weights_are_as_they_were_after_an_error(lm, prompt, monkeypatch):
    def fails(*args): raise RuntimeError("on the way")
    monkeypatch.setattr("longlens.probes.traceback.methods.captum_gradients.answer_target", fails)
    with pytest.raises(RuntimeError, match="on the way"): integrated_tokens(lm, prompt, 2)
    assert all(p.requires_grad for p in lm.hf.parameters()) and not lm.hf.get_input_embeddings()._forward_hooks
