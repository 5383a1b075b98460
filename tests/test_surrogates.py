"""ContextCite against games whose answer is known, against its published definition, and on a model; citations read and asked for."""
from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso
from sklearn.preprocessing import StandardScaler

import longlens as ll
from longlens.needle_lm.data import filler
from longlens.probes.traceback.methods.contextcite import (
    ContextCite,
    ablation_masks,
    fit_surrogate,
    linear_datamodelling_score,
    surrogate_errors,
)
from longlens.probes.traceback.methods.self_citation import NoCitation, SelfCitation, citation_prompt, citation_scores, read_citations
from longlens.probes.traceback.prompts import trace_prompt
from longlens.probes.traceback.scorer import SubsetScorer, plain_scores
from longlens.probes.traceback.sources import token_prompt
from longlens.probes.traceback.tracer import TRACERS, GameJob, TraceJob

PEOPLE = {"Ada": "lamb", "Bob": "river", "Eve": "stone", "Tom": "table", "Una": "glass"}
ASK = "What is the code for Eve?"


class Game:
    """A game of n players; it counts the sets it was asked about."""

    def __init__(self, n, value):
        self.n, self.value, self.asked = n, value, []

    def __call__(self, kept):
        assert kept.dtype == bool and kept.shape[1] == self.n
        self.asked.append(kept)
        return self.value(kept)


@pytest.fixture(scope="module")
def lm():
    return ll.load()


@pytest.fixture(scope="module")
def prompt(lm):
    return trace_prompt(lm, [f"{filler(1, seed=i)} The code for {who} is {what}." for i, (who, what) in enumerate(PEOPLE.items())], ASK)


def test_the_published_definition_step_by_step(lm, prompt):
    """64 masks from RandomState(i); sum of logit - logsumexp of the others; Lasso(0.01) of y / tokens on standardised masks."""
    masks = np.stack([np.random.RandomState(i).choice([False, True], size=5, p=[0.5, 0.5]) for i in range(64)])
    a, y = prompt.answer.ids, []
    for mask in masks:
        keep = np.append(mask, True)[prompt.owner]
        ids = torch.cat([prompt.ids[torch.from_numpy(keep)], a])
        logits = lm.logits(ids, range(len(ids) - len(a) - 1, len(ids) - 1)).double()
        own = logits.gather(-1, a[:, None])[:, 0]
        others = torch.stack([torch.cat([row[:t], row[t + 1 :]]).logsumexp(0) for row, t in zip(logits, a.tolist(), strict=True)])
        y.append(float((own - others).sum()))
    scaler = StandardScaler().fit(masks)
    lasso = Lasso(alpha=0.01, fit_intercept=True, random_state=0).fit(scaler.transform(masks), np.array(y) / len(a))
    found = ContextCite().run(TraceJob(lm, prompt))
    np.testing.assert_allclose(found.values, lasso.coef_ / scaler.scale_ * len(a), atol=1e-3)
    bias = (lasso.intercept_ - scaler.mean_ / scaler.scale_ @ lasso.coef_) * len(a)
    assert found.frames["fidelity"]["bias"][0] == pytest.approx(bias, abs=1e-3)
    assert found.values.argmax() == 2


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 12), st.integers(0, 10_000), st.floats(-300, 300))
def test_additive_games_are_recovered(n, seed, base):
    w = np.random.default_rng(seed).normal(size=n) * 3
    found = ContextCite(alpha=1e-6, draws=2).run(GameJob(Game(n, lambda kept: kept @ w + base)))
    np.testing.assert_allclose(found.values, w, atol=1e-3)
    fit = found.frames["fidelity"].row(0, named=True)
    assert fit["lds"] > 0.999 and fit["bias"] == pytest.approx(base, abs=1e-2)
    assert (found.errors < 1e-2).all()


def test_a_text_is_cut_into_sentences_as_published(lm):
    text = "It rains. The code for Eve is stone. The code for Bob is river."
    t = ll.trace_context(lm, text, ASK, "stone", "contextcite", ablations=16, held_out=0)
    assert t.meta["by"] == "sentences" and t.top(1)["source"].item() == 1
    assert ll.trace_context(lm, text, ASK, "stone", "contextcite", by="words", size=5, ablations=16, held_out=0).meta["by"] == "words"


def test_the_penalty_removes_what_does_not_matter():
    w = np.zeros(60)
    w[[7, 31]] = 4, -3
    found = ContextCite().run(GameJob(Game(60, lambda kept: kept @ w)))
    assert set(np.flatnonzero(found.values)) == {7, 31}  # sixty sources from 64 ablations
    assert found.frames["fidelity"]["lds"][0] > 0.9


def test_a_seed_says_all_and_cost_is_what_runs(lm, prompt):
    tracer = ContextCite(ablations=20, held_out=10, draws=5)
    a, b, c = (TraceJob(lm, prompt, seed=s) for s in (0, 0, 100))
    plan, found = tracer.cost(a), [tracer.run(job) for job in (a, b, c)]
    assert (plan.evaluations, plan.tokens, plan.exact) == (a.scorer.costs.evaluations, a.scorer.costs.tokens, True)
    np.testing.assert_array_equal(found[0].values, found[1].values)
    np.testing.assert_array_equal(found[0].errors, found[1].errors)
    assert not np.allclose(found[0].values, found[2].values, atol=1e-6)
    game = Game(9, lambda kept: kept.sum(1) * 1.0)
    assert tracer.cost(GameJob(game)).evaluations == len(np.unique(tracer.masks(GameJob(game)), axis=0)) and not game.asked


def test_held_out_ablations_are_not_fitted():
    """What happens to them changes the score and not the weights."""
    x, k = ablation_masks(8, 96), 64
    w = np.arange(8) - 3.0
    late = {m.tobytes() for m in x[k:]} - {m.tobytes() for m in x[:k]}
    spoilt = Game(8, lambda kept: np.where([row.tobytes() in late for row in kept], 9.0 - kept @ w, kept @ w))
    a, b = (ContextCite().run(GameJob(g)) for g in (Game(8, lambda kept: kept @ w), spoilt))
    np.testing.assert_array_equal(a.values, b.values)
    assert b.frames["fidelity"]["lds"][0] < a.frames["fidelity"]["lds"][0] - 0.5
    assert a.frames["fidelity"]["unseen"][0] == sum(m.tobytes() in late for m in x[k:])
    assert a.frames["ablations"]["held_out"].sum() == 32


def test_intervals_of_the_score_hold_it():
    """Over games with noise, the interval from 32 ablations holds the score from 2,000 in nine cases of ten or more."""
    hits, x, many = 0, ablation_masks(8, 96), ablation_masks(8, 2000, seed=1000)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        w = rng.normal(size=8)
        fit = fit_surrogate(x[:64], x[:64] @ w + rng.normal(size=64), 1)
        true = linear_datamodelling_score(fit.predict(many), many @ w + rng.normal(size=2000), draws=1).mean
        said = linear_datamodelling_score(fit.predict(x[64:]), x[64:] @ w + rng.normal(size=32))
        hits += said.lower <= true <= said.upper
    assert hits >= 26


def test_errors_shrink_with_ablations():
    w, sizes = np.array([2.0, 0, -1, 0.5]), []
    for count in (64, 1024):
        x = ablation_masks(4, count)
        sizes.append(surrogate_errors(x, x @ w + np.random.default_rng(0).normal(size=count), 1, draws=60).mean())
    assert 2.5 < sizes[0] / sizes[1] < 6  # by four, if they were exact


def test_few_sources_and_a_flat_game():
    one = ContextCite().run(GameJob(Game(1, lambda kept: 3.0 * kept[:, 0])))
    assert one.values == pytest.approx([3], abs=0.05) and one.frames["fidelity"]["unseen"][0] == 0
    flat = ContextCite().run(GameJob(Game(4, lambda kept: np.full(len(kept), -7.0))))
    assert not flat.values.any() and "finds no source that matters" in flat.notes[0]
    assert np.isnan(flat.frames["fidelity"]["lds"][0]) and flat.frames["fidelity"]["bias"][0] == pytest.approx(-7)


def test_any_architecture_without_a_tokenizer():
    lm = ll.load(zoo.zoo_model("gemma2"))
    ids = zoo.token_ids(40)[0]
    prompt = token_prompt(ids, [(4, 10), (10, 20), (20, 33)], [7, 9])
    job = TraceJob(lm, prompt)
    found = ContextCite(ablations=24, held_out=0, draws=2).run(job)
    assert np.isfinite(found.values).all() and "lds" in found.frames["fidelity"].columns
    masks = ablation_masks(3, 24)
    np.testing.assert_allclose(SubsetScorer(lm, prompt)(masks), plain_scores(lm, prompt, masks), atol=1e-4)


@pytest.mark.parametrize("settings, said", [
    (dict(ablations=1), "ablations, held_out and draws are 1, 32 and 100"), (dict(alpha=0.0), "alpha is 0.0"),
    (dict(draws=1), "2, 0 and 2 at least"), (dict(held_out=-1), "are 64, -1 and 100"),
])
def test_settings_that_mean_nothing(settings, said):
    with pytest.raises(ValueError, match=said): ContextCite(**settings)


def test_values_that_no_line_fits():
    with pytest.raises(ValueError, match="are not finite: no line fits them"):
        ContextCite().run(GameJob(Game(4, lambda kept: np.where(kept[:, 0], np.nan, 0.0))))
    with pytest.raises(ValueError, match="keep is 1.5: a probability between 0 and 1"):
        ContextCite(keep=1.5).masks(GameJob(Game(3, len)))


def test_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"contextcite needs sklearn: pip install longlens\[trace\]"):
        ContextCite().run(GameJob(Game(3, lambda kept: kept.sum(1) * 1.0)))


# The model's own citations

@given(st.text(max_size=300), st.integers(1, 30), st.integers(1, 8))
def test_any_reply_is_read(reply, n, k):
    found = read_citations(reply, n, k)
    scores = citation_scores(found, n)
    used = found.filter(found["use"] == "cited")["source"].to_list()
    assert len(used) == len(set(used)) <= k and all(0 <= i < n for i in used)
    assert sorted(scores[scores > 0]) == list(range(1, len(used) + 1))


@pytest.mark.parametrize("reply, scores", [
    ("[3]>[1]>[2]", [2, 1, 3]), ("[3]", [0, 0, 1]), ("Texts [2], [2] and [2].", [0, 1, 0]), ("[0]>[4]>[1]", [1, 0, 0]),
    ("[" + "9" * 5000 + "]>[2]", [0, 1, 0]), ("[-1]>[1.5]>[ 3 ]", [0, 0, 1]), ("", [0, 0, 0]), ("[1]>[2]>[3]>[1]", [3, 2, 1]),
])
def test_replies(reply, scores):
    assert citation_scores(read_citations(reply, 3, 5), 3).tolist() == scores


@pytest.fixture(scope="module")
def chat():
    """A model with random weights and a chat template"""
    from transformers import LlamaConfig, LlamaForCausalLM

    tok = ll.load().tokenizer
    tok.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=1024)
    return ll.load(LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), **size)), tok)


def test_a_model_that_cites_nothing(chat):
    job = TraceJob(chat, trace_prompt(chat, ["The code for Eve is stone.", "The code for Bob is <b>river</b>."], ASK, answer="stone"))
    with pytest.raises(NoCitation, match=r"cites none of the 2 texts when it is asked.*Its reply: '.+'. Take another method"):
        SelfCitation(max_new_tokens=8).run(job)


def test_replies_in_errors_do_nothing(chat, monkeypatch):
    job = TraceJob(chat, trace_prompt(chat, ["One.", "Two."], ASK, answer="stone"))
    monkeypatch.setattr(chat, "decode", lambda ids: "\x1b[2J\u202eevil\n" + "word " * 10_000)
    with pytest.raises(NoCitation) as error: SelfCitation(max_new_tokens=4).run(job)
    assert not {"\x1b", "\u202e", "\n"} & set(str(error.value)) and len(str(error.value)) < 600


def test_a_scripted_reply(chat, monkeypatch):
    texts = ["The code for Eve is stone.", "The code for Bob is river.", "The code for Eve is stone."]
    job = TraceJob(chat, trace_prompt(chat, texts, ASK, answer="stone"))
    asked = citation_prompt(chat, job.prompt, 5).text
    assert asked.startswith("user: ") and asked.endswith("assistant:") and "[3]: The code for Eve is stone.\n" in asked
    assert "Which 3 of the texts" in asked and "Query: " + ASK in asked
    ids = chat.tokens("[3]>[1]>[17]", add_special_tokens=False).ids
    monkeypatch.setattr(chat, "generate_ids", lambda *args, **kw: ids)
    found, plan = SelfCitation().run(job), SelfCitation().cost(job)
    assert found.values.tolist() == [1, 0, 2]  # equal texts stay apart
    assert found.costs.tokens == plan.tokens - 99 + len(ids) and found.notes == ("of 3 citations in the reply 1 cannot be used",)


def test_who_cannot_be_asked(lm, prompt):
    with pytest.raises(ValueError, match="self_citation asks the model, and needle-lm is no chat model"):
        TRACERS["self_citation"].run(TraceJob(lm, prompt))
    with pytest.raises(ValueError, match="this job is a game without one"): SelfCitation().cost(GameJob(Game(2, len)))
    with pytest.raises(ValueError, match="k is 0"): SelfCitation(k=0)
