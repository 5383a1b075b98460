"""Length collapse: numbers against formed matrices, changed encoders, kept parts, what is refused, reports that say what tables say"""
from __future__ import annotations

import functools
import re
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from statistics import NormalDist
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from tokenizers.processors import Sequence
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    MPNetConfig,
    MPNetModel,
    T5Config,
    T5EncoderModel,
)

import longlens as ll
from longlens.attention.masks import full_mask
from longlens.attention.operator import AttentionOperator
from longlens.charts.embeddings import on_a_plane
from longlens.charts.page import page_html
from longlens.measure.spectral import collapse_rate
from longlens.probes.collapse import parts as collapse_parts
from longlens.probes.collapse.frames import changes_frame, effects_frame, similarity_frame
from longlens.probes.collapse.geometry import (
    effective_rank,
    geometry,
    geometry_intervals,
    length_changes,
    pair_cosines,
    pairs_interval,
    separability,
    spectrum,
)
from longlens.probes.collapse.inputs import CollapseDesign, CollapseSettings, get_inputs
from longlens.probes.collapse.parts import Change, VectorPart, encoder_key, layer_embeddings
from longlens.probes.collapse.probe import length_collapse
from longlens.probes.collapse.report import CollapseReport
from longlens.prompts.questions import Question
from longlens.retrieval_eval.evaluate import evaluate_retrieval
from longlens.retrieval_eval.tasks import needle_retrieval, padded_passages
from longlens.retrieval_eval.truncate import cut_texts, long_texts
from longlens.run import Run, plan

QUESTIONS = Path(__file__).parents[1] / "../shared/data/lost-in-the-middle/nq-open-oracle.jsonl.gz"
SMALL: dict[str, Any] = dict(lengths=(16, 32, 64), n_documents=8, layer_documents=4, taus=(0.5,), n_queries=6, n_candidates=8)
few = settings(max_examples=25, deadline=None)


def tiny(bias: float = 0.0, spread: float = 0.3) -> ll.Encoder:
    "A random BERT with MiniLM's tokenizer, of which all states can be pushed along one direction"
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30522, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                        max_position_embeddings=96, initializer_range=spread)
    hf = BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    hf.encoder.layer[-1].output.LayerNorm.bias[0] += bias
    return ll.load_encoder(hf, ll.load_encoder().tokenizer, pooling="mean")


@functools.cache
def measured() -> tuple[ll.Encoder, CollapseReport]:
    enc = tiny()
    return enc, length_collapse(enc, **SMALL)


# How texts lie together

@given(st.integers(2, 12), st.integers(2, 9), st.integers(0, 99))
@few
def test_geometry_against_its_definitions(n: int, d: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(n, d)) + 0.3
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    got = geometry(x)
    assert got.mean_cosine == pytest.approx(np.mean([u[i] @ u[j] for i in range(n) for j in range(n) if i != j]))
    values = np.linalg.eigvalsh(u.T @ u)
    assert got.anisotropy == pytest.approx(values[-1] / n)
    p = np.sqrt(values.clip(1e-30)) / np.sqrt(values.clip(1e-30)).sum()
    assert got.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
    assert got.effective_rank_centred <= min(n - 1, d) + 1e-9
    squares = np.mean([np.sum((r - u.mean(0)) ** 2) for r in u])
    assert squares == pytest.approx(1 - np.sum(u.mean(0) ** 2))
    assert got.centroid_distance == pytest.approx(np.mean([np.linalg.norm(r - u.mean(0)) for r in u]))
    assert geometry(3 * x) == pytest.approx(got)  # only directions count


def test_intervals_of_pairs_draw_documents() -> None:
    "Against resampling in a loop, and no pair of a document with itself"
    c = pair_cosines(np.random.default_rng(1).normal(size=(9, 4)))
    rng, means = np.random.default_rng(0), []
    for _ in range(4000):
        drawn = rng.integers(9, size=9)
        pairs = [c[i, j] for a, i in enumerate(drawn) for b, j in enumerate(drawn) if a != b and i != j]
        means.append(np.mean(pairs))
    got = pairs_interval(c, n=8000)
    assert (got.lower, got.upper) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.02)


def test_changes_between_lengths_against_a_loop() -> None:
    "Joint draws of documents, the largest deviation in standard errors, one width for all pairs: Student's"
    student = pytest.importorskip("scipy.stats").t
    rng = np.random.default_rng(2)
    x = {n: rng.normal(size=(12, 6)) + shift for n, shift in ((64, 0.2), (16, 0.6), (256, 0.8))}
    c = {n: pair_cosines(v) for n, v in x.items()}
    draws, pairs = [], [(16, 64), (16, 256), (64, 256)]
    for _ in range(3000):
        drawn = rng.integers(12, size=12)
        apart = drawn[:, None] != drawn[None, :]
        mean = {n: v[np.ix_(drawn, drawn)][apart].mean() for n, v in c.items()}
        draws.append([mean[b] - mean[a] for a, b in pairs])
    want = [geometry(x[b]).mean_cosine - geometry(x[a]).mean_cosine for a, b in pairs]
    off, error = np.array(draws) - want, np.std(draws, axis=0)
    z = NormalDist().cdf(np.quantile(np.abs(off / error).max(1), 0.95))
    half = student.ppf(z, 11) * error
    got = length_changes(c, n=6000)
    assert [*got] == pairs
    assert [i.mean for i in got.values()] == pytest.approx(want)
    assert [i.upper - i.mean for i in got.values()] == pytest.approx(half, rel=0.08)
    for p, i in got.items():  # wider than an interval for this pair alone
        alone = pairs_interval(c[p[1]] - c[p[0]])
        assert i.upper - i.lower > alone.upper - alone.lower


def test_a_document_is_never_in_both_folds() -> None:
    "Vectors of one document that are alike would give its length away"
    rng = np.random.default_rng(0)
    own = 20 * rng.normal(size=(24, 200))  # what a document says
    side = rng.choice([-1.0, 1.0], size=(24, 1)) * rng.normal(size=(24, 200)) * 0.1  # short and long differ, each document in its own way
    assert abs(separability(own - side, own + side).mean - 0.5) < 0.25


def test_a_cone_is_seen() -> None:
    "The same encoder with all states pushed along one direction"
    free, cone = (length_collapse(tiny(b), **{**SMALL, "taus": (), "retrieval": ()}) for b in (0.0, 40.0))
    value = lambda r, m: r.frames["geometry"].filter(measure=m, context_length=64)["value"].item()
    assert value(cone, "mean_cosine") > 0.98 > value(free, "mean_cosine")
    assert value(cone, "effective_rank") < value(free, "effective_rank")
    assert value(cone, "anisotropy") > value(free, "anisotropy")
    assert value(cone, "centroid_distance") < value(free, "centroid_distance")


# What layers do

def test_layers_against_the_formed_pattern() -> None:
    "sigma_a by SVD, entropy and spread by definition, in every layer, head and document"
    enc, report = measured()
    texts = cut_texts(long_texts(8, enc, 64), enc, (64,))[64][:4]
    eager = BertModel(enc.config, add_pooling_layer=False).eval()
    eager.load_state_dict(enc.hf.state_dict())
    eager.set_attn_implementation("eager")
    rows = []
    for text in texts:
        ids = enc.tokens(text).ids[None]
        out = eager(ids, output_attentions=True, output_hidden_states=True)
        for layer, (p, x) in enumerate(zip(out.attentions, out.hidden_states[1:], strict=True)):
            p, x = p[0].double(), x[0].double()
            sigma = torch.linalg.matrix_norm(p - p.mean(1, keepdim=True), 2)
            entropy = -(p * p.log()).sum(-1).mean(-1) / np.log(p.shape[-1])
            unit = x / x.norm(dim=-1, keepdim=True)
            n = len(x)
            rows.append(dict(layer=layer, sigma_a=sigma.mean().item(), entropy_norm=entropy.mean().item(),
                             high_frequency=((x - x.mean(0)).norm() / x.norm()).item(),
                             token_similarity=(((unit @ unit.T).sum() - n) / (n * (n - 1))).item()))
    want = pl.DataFrame(rows).group_by("layer").mean().sort("layer")
    got = report.frames["layers"].filter(condition="none", context_length=64)
    for measure in ("sigma_a", "entropy_norm", "high_frequency", "token_similarity"):
        assert got.filter(measure=measure).sort("layer")["value"].to_list() == pytest.approx(want[measure].to_list(), rel=2e-4), measure


@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.0])
def test_random_logits_collapse_with_length_and_sharpening_helps(sigma: float) -> None:
    "What the theory says of independent normal logits of moderate variance: the fall, and the temperature; not the bound"
    def rate(n: int, tau: float = 1.0) -> float:
        logits = sigma / tau * torch.randn(1, 6, n, n, generator=torch.Generator().manual_seed(n))
        empty = torch.zeros(1, 6, n, 1)
        return float(collapse_rate(AttentionOperator(empty, empty, mask=full_mask(), bias=logits)).mean())
    assert rate(32) > rate(128) > rate(384)
    assert rate(128, 0.5) > rate(128) > rate(128, 2.0)


def test_temperature_in_every_layer() -> None:
    "The numbers at a temperature are those of an encoder that is measured inside `temperature`; sharper attention has a larger sigma_a"
    enc, report = measured()
    with ll.temperature(enc, 0.5): inside = length_collapse(enc, **{**SMALL, "taus": ()})
    mine = lambda r, name, c: r.frames[name].filter(condition=c).drop("condition").filter(pl.col("context_length") == 64)
    for name in ("similarity", "layers", "heads"):
        assert_frame_equal(mine(report, name, "tau 0.5"), mine(inside, name, "none"), abs_tol=1e-6)
    assert inside.meta["interventions"] == [{"intervention": "temperature", "tau": 0.5}]
    f = report.frames["effects"].filter(measure="sigma_a", condition="tau 0.5", reference="none")
    assert len(f) == 3 and (f["lower"] > 0).all()


def test_padding_and_batches_change_nothing() -> None:
    enc, together = measured()
    alone = length_collapse(enc, **SMALL, batch_size=1)
    for name in ("geometry", "layers", "effects", "shortened", "queries"):
        assert_frame_equal(together.frames[name], alone.frames[name], abs_tol=2e-3, rel_tol=2e-3)
    uneven = [" ".join(["river stone"] * (3 + 2 * i)) for i in range(9)]
    at_once = layer_embeddings(enc, uneven, range(3), batch_size=9).vectors
    one = np.stack([layer_embeddings(enc, [t], range(3)).vectors[:, 0] for t in uneven], 1)
    assert np.abs(at_once - one).max() < 1e-5
    assert np.abs(at_once[-1] - enc.encode(uneven)).max() < 1e-5


def test_shortened_embeddings_are_those_of_encode() -> None:
    enc, report = measured()
    texts = cut_texts(long_texts(8, enc, 64), enc, (16, 32, 64))[32]
    for layer in (0, 1, 2):
        for dims in (8, 32):
            c = pair_cosines(enc.encode(texts, layer=layer, dims=dims))
            got = report.frames["shortened"].filter(texts="cut", context_length=32, layer=layer, dims=dims)["value"].item()
            assert got == pytest.approx((c.sum() - 8) / 56, abs=1e-5)


# Decoders, windows, prompts

@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_decoder_embedder(pooling: str) -> None:
    enc = ll.load_encoder(ll.load(), pooling=pooling)
    r = length_collapse(enc, lengths=(32, 64), n_documents=8, layer_documents=2, taus=(0.5,), retrieval="passkey",
                        n_queries=4, n_candidates=6)
    texts = cut_texts(long_texts(8, enc, 64), enc, (32, 64))[64]
    c = pair_cosines(enc.encode(texts))
    got = r.frames["similarity"].filter(condition="none", context_length=64)["mean_cosine"].item()
    assert got == pytest.approx((c.sum() - 8) / 56, abs=1e-4)
    assert r.frames["layers"]["layer"].n_unique() == enc.n_layers
    assert r.meta["positions"] == "rotary" and r.details() and r.chart() is not None


def test_windows_read_past_the_end_and_are_left_again() -> None:
    from longlens.interventions.extend import extend_window
    enc = tiny()
    r = length_collapse(enc, **{**SMALL, "taus": ()}, windows="all", beyond=(192,), retrieval="passkey")
    assert enc.max_length == 96
    ways = ["recurrent", "grouped", "interpolated"]
    f = r.frames["retrieval"].filter(context_length=192)
    assert f["condition"].unique(maintain_order=True).to_list() == ["cut off", *ways]
    assert f.filter(condition="cut off")["n_truncated"].unique().to_list() == [8]
    assert f.filter(pl.col("condition") != "cut off")["n_truncated"].sum() == 0
    texts = cut_texts(long_texts(8, enc, 192), enc, (16, 32, 64, 192))[192]
    with extend_window(enc, "grouped", length=192): c = pair_cosines(enc.encode(texts))
    got = r.frames["similarity"].filter(condition="grouped", context_length=192)["mean_cosine"].item()
    assert got == pytest.approx((c.sum() - 8) / 56, abs=1e-5)
    assert sum("positions at 192 tokens" in s for s in r.details()) == 3
    assert any("8 documents of retrieval tasks were cut at 96 tokens (cut off)" in s for s in r.details())
    assert "Past the encoder's length" in [s.title for s in r.sections()]


def test_windows_are_compared_with_all_that_positions_reach() -> None:
    "An encoder that reads less than it has positions for is cut at their end, not where it stops by default"
    short = tiny()
    short.max_length = 64
    how: dict[str, Any] = {**SMALL, "taus": (), "windows": "grouped", "beyond": (192,), "retrieval": "passkey", "retrieval_lengths": (64,)}
    r, whole = length_collapse(short, **how), length_collapse(tiny(), **how)
    assert short.max_length == 64 and (r.meta["max_length"], r.meta["reach"]) == (64, 96)
    past = [x.frames["queries"].filter(condition="cut off") for x in (r, whole)]
    assert_frame_equal(*past)
    assert any("against documents cut at 96" in s for s in r.details())
    assert any("documents of retrieval tasks were cut at 96 tokens (cut off)" in s for s in r.details())
    planned = plan(length_collapse, short, **how)
    assert planned["tokens"].sum() == r.meta["tokens"] == whole.meta["tokens"]


def test_prompts_stand_before_queries_and_documents() -> None:
    enc = tiny()
    plain = length_collapse(enc, **{**SMALL, "taus": ()}, retrieval="needle")
    told = length_collapse(enc, **{**SMALL, "taus": ()}, retrieval="needle", query_prompt="query: ", document_prompt="passage: ")
    assert not told.frames["similarity"]["mean_cosine"].equals(plain.frames["similarity"]["mean_cosine"])
    texts = cut_texts(long_texts(8, enc, 64), enc, (64,))[64]
    c = pair_cosines(enc.encode(["passage: " + t for t in texts]))
    got = told.frames["similarity"].filter(context_length=64)["mean_cosine"].item()
    assert got == pytest.approx((c.sum() - 8) / 56, abs=1e-5)
    with pytest.raises(ValueError, match="of which its prompt takes 3: take 93 at most"):
        length_collapse(enc, **{**SMALL, "lengths": (16, 95)}, document_prompt="passage: ")


def own_prompts(**prompts: str) -> ll.Encoder:
    enc = tiny()
    return ll.load_encoder(enc.hf, enc.tokenizer, pooling="mean", prompts=prompts)


def test_the_encoders_own_prompts_are_used_as_everywhere(tmp_path: Path) -> None:
    "As `evaluate_retrieval` does it: in documents, layers and retrieval, in the room they take, and in what is kept and said"
    enc, how = own_prompts(query="question: ", passage="passage: "), {**SMALL, "taus": (), "retrieval": "needle", "retrieval_lengths": 64}
    r = length_collapse(enc, **how, out=tmp_path / "kept")
    task = needle_retrieval(enc, 64, n_queries=6, n_documents=8)
    f = r.frames["retrieval"].filter(measure="ndcg_10")
    assert f["value"].item() == pytest.approx(evaluate_retrieval(task, enc)["ndcg_10"].mean(), abs=1e-6)
    named = length_collapse(tiny(), **how, query_prompt="question: ", document_prompt="passage: ")
    for name in ("similarity", "layers", "queries", "shortened"): assert_frame_equal(r.frames[name], named.frames[name], abs_tol=1e-6)
    assert (r.meta["settings"]["query_prompt"], r.meta["settings"]["document_prompt"]) == ("question: ", "passage: ")
    assert "prompts: 'question: ' before queries, 'passage: ' before documents" in r.details()
    kept = lambda e, **more: plan(length_collapse, e, **{**how, **more}, out=tmp_path / "kept")["finished"].sum()
    assert kept(enc) == r.meta["parts"] and kept(enc, document_prompt="") == kept(own_prompts(query="question: ")) == 0
    none = length_collapse(enc, **how, query_prompt="", document_prompt="")
    plain = length_collapse(tiny(), **how)
    assert_frame_equal(none.frames["queries"], plain.frames["queries"], abs_tol=1e-6)
    assert not any(s.startswith("prompts") for s in [*none.details(), *plain.details()])
    with pytest.raises(ValueError, match="of which its prompt takes 3: take 93 at most"):
        length_collapse(enc, **{**how, "lengths": (16, 95)})


def test_the_lengths_do_not_choose_the_questions() -> None:
    "The same questions at every length and in every list of lengths; which ones is a setting of its own"
    enc = tiny()
    words = "river stone cloud lamp garden window paper bridge".split()
    asked = [Question(f"Where is the {w} number {i}?", (f"spot {w} {i}",), (f"{w} {i}", f"It is at spot {w} {i}. " * (1 + i % 5)))
             for i in range(8) for w in words]
    how = {**SMALL, "taus": (), "retrieval": "passages", "n_queries": 6, "n_candidates": 6}
    tasks = lambda **more: {t.length: t for t in get_inputs(enc, None, None, asked, CollapseDesign(
        (16, 64), 8, 2, (), (), (), ("passages",), more.pop("at"), 6, 6, False, (), (), None, None, False, 0, **more)).tasks}
    one, other = tasks(at=(64, 96), max_passage=24), tasks(at=(96,), max_passage=24)
    assert one[64].queries == one[96].queries == other[96].queries and one[96].documents == other[96].documents
    assert tasks(at=(96,))[96].queries != other[96].queries
    r = length_collapse(enc, questions=asked, **how, max_passage=32)
    assert any("passages (6 queries, 6 documents, passages of up to 32 tokens)" in s for s in r.details())
    with pytest.raises(ValueError, match="retrieval_lengths begin at 64 tokens, and passages have up to max_passage=80: ask for longer"):
        length_collapse(enc, questions=asked, **how, max_passage=80)


def test_geometry_past_the_end_is_compared_with_the_cut_text() -> None:
    "Cosines and layers of the documents cut where positions end, beside those of the encoder that stops earlier"
    short = tiny()
    short.max_length = 64
    r = length_collapse(short, **{**SMALL, "taus": (), "retrieval": ()}, windows=("grouped", "recurrent"), beyond=(192,))
    f = r.frames["effects"].filter(condition="grouped", reference="cut off")
    assert {"mean_cosine", "effective_rank", "sigma_a", "high_frequency"} <= {*f["measure"]}
    assert f["reference_length"].unique().to_list() == [192]
    texts = cut_texts(long_texts(8, short, 192), short, (16, 32, 64, 192))[192]
    whole = tiny()  # which reads all 96
    c = pair_cosines(whole.encode_counted(texts, truncate=True).embeddings)
    got = r.frames["similarity"].filter(condition="cut off")
    assert got["mean_cosine"].item() == pytest.approx((c.sum() - 8) / 56, abs=1e-5)
    x = f.filter(measure="mean_cosine").row(0, named=True)
    grouped = r.frames["similarity"].filter(condition="grouped")["mean_cosine"].item()
    assert x["difference"] == pytest.approx(grouped - got["mean_cosine"].item(), abs=1e-6)
    said = f"grouped positions at 192 tokens, against documents cut at 96: cosine {got['mean_cosine'].item():.2f} → {grouped:.2f}, "
    assert any(s.startswith(said) for s in r.details())
    section = next(s for s in r.sections() if s.title == "Past the encoder's length")
    assert "cut off" in section.chart.to_json() and "as it is, 64 tokens" not in section.chart.to_json()
    assert {*r.frames["separability"]["condition"]} == {"none"}  # of these all lengths are the same


def test_longer_windows_have_room_for_prompts() -> None:
    from longlens.interventions.extend import extend_window
    enc = own_prompts(document="passage: ")
    r = length_collapse(enc, **{**SMALL, "taus": ()}, windows="all", beyond=(192,), retrieval="passkey")
    assert r.frames["retrieval"].filter(pl.col("condition") != "cut off")["n_truncated"].sum() == 0
    texts = cut_texts(long_texts(8, enc, 192), enc, (16, 32, 64, 192))[192]
    with extend_window(enc, "grouped", length=195): c = pair_cosines(enc.encode(texts, prompt="passage: "))
    got = r.frames["similarity"].filter(condition="grouped")["mean_cosine"].item()
    assert got == pytest.approx((c.sum() - 8) / 56, abs=1e-5)


def test_the_last_task_is_asked_at_all_lengths_under_every_change() -> None:
    "So that its curve by temperature is drawn by default"
    enc = tiny()
    r = length_collapse(enc, **{**SMALL, "retrieval_lengths": (64, 80)})
    f = r.frames["retrieval"].filter(condition="tau 0.5", measure="ndcg_10")
    assert f.select("task", "context_length").rows() == [("needle", 64), ("needle", 80)]
    assert "Needle, by temperature" in next(s for s in r.sections() if s.title == "Retrieval by length").chart.to_json()
    every = length_collapse(enc, **{**SMALL, "retrieval_lengths": (64, 80)}, everywhere=True)
    assert len(every.frames["retrieval"].filter(condition="tau 0.5", measure="ndcg_10")) == 4


# Encoders of which not all can be measured

HIDDEN: dict[str, Any] = {
    "MPNet": lambda **c: MPNetModel(MPNetConfig(vocab_size=30527, **c)),
    "Albert": lambda **c: AlbertModel(AlbertConfig(embedding_size=16, **c)),
    "Deberta": lambda **c: DebertaV2Model(DebertaV2Config(**c)),
}


def hidden(name: str) -> ll.Encoder:
    "An encoder whose attention cannot be captured"
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
    hf = HIDDEN[name](**shape, **({} if name == "MPNet" else {"vocab_size": 30522}))
    return ll.load_encoder(hf.eval().requires_grad_(False), ll.load_encoder().tokenizer, pooling="mean")


@pytest.mark.parametrize("name", HIDDEN)
def test_without_a_look_at_the_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    "All that needs no hook is measured, what is not is said, and what was asked for and cannot be is refused first"
    enc = hidden(name)
    r = length_collapse(enc, **{**SMALL, "taus": None})
    changed = name == "Albert"  # its layers share one module, which can be changed
    assert r.meta["settings"]["taus"] == ([0.5, 0.75] if changed else [])
    assert "heads" not in r.frames and {*r.frames["layers"]["measure"]} == {"high_frequency", "token_similarity"}
    said = next(s for s in r.details() if s.startswith("not measured: sigma_a and entropy of attention"))
    assert ("temperatures" in said) != changed and "TransformerBridge" not in said
    assert [s.title for s in r.sections()].count("Head by head") == 0 and r.chart() is not None
    assert page_html([r], "Length collapse") and r.widget(encoder=enc) is not None
    texts = cut_texts(long_texts(8, enc, 64), enc, (16, 32, 64))[64][:4]
    states = [enc.hf(**enc.padded(enc.read_texts([t]), [0])[0], output_hidden_states=True).hidden_states[-1][0].double() for t in texts]
    want = np.mean([((x - x.mean(0)).norm() / x.norm()).item() for x in states])
    got = r.frames["layers"].filter(condition="none", context_length=64, layer=1, measure="high_frequency")["value"].item()
    assert got == pytest.approx(want, abs=1e-4)
    if changed: return
    monkeypatch.setattr(collapse_parts, "layer_embeddings", lambda *a, **k: pytest.fail("texts were embedded"))
    with pytest.raises(ValueError, match=r"taus=\[0.5\]: .* does not route its attention .* Say taus=\(\), and the rest is measured"):
        length_collapse(enc, **SMALL)


def test_temperatures_change_an_encoder_that_cannot_be_captured() -> None:
    enc = hidden("Albert")
    r = length_collapse(enc, **{**SMALL, "retrieval": ()})
    texts = cut_texts(long_texts(8, enc, 64), enc, (16, 32, 64))[64]
    with ll.temperature(enc, 0.5): c = pair_cosines(enc.encode(texts))
    got = r.frames["similarity"].filter(condition="tau 0.5", context_length=64)["mean_cosine"].item()
    assert got == pytest.approx((c.sum() - 8) / 56, abs=1e-5)


def test_no_layers_at_all() -> None:
    enc = tiny()
    r = length_collapse(enc, **{**SMALL, "layer_documents": 0})
    assert {"layers", "heads", "layer_effects"}.isdisjoint(r.frames) and r.meta["unmeasured"] == {}
    titles = [s.title for s in r.sections()]
    assert "Temperature" in titles and {"Layer by layer", "Head by head"}.isdisjoint(titles)
    assert not any("sigma_a" in s for s in r.details()) and r.widget() is not None
    whole = measured()[1].frames["similarity"]
    assert_frame_equal(r.frames["similarity"], whole, abs_tol=1e-6)


def test_no_way_past_the_end_is_said() -> None:
    tok = ll.load_encoder().tokenizer
    gpt2 = GPT2Model(GPT2Config(vocab_size=30522, n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)).eval()
    t5 = T5EncoderModel(T5Config(vocab_size=30522, d_model=32, d_kv=8, num_layers=2, num_heads=4, d_ff=64)).eval()
    for enc in (ll.load_encoder(gpt2, tok, pooling="lasttoken"), ll.load_encoder(t5, tok, pooling="mean")):
        with pytest.raises(ValueError, match="'all' is no way to read past the length of .*: there is none, so leave out windows="):
            length_collapse(enc, long_texts(8, enc, 80), (8, 64), retrieval=(), windows="all")


def test_the_shortest_texts_have_two_tokens() -> None:
    "Also where the tokenizer adds none"
    torch.manual_seed(0)
    hf = LlamaModel(LlamaConfig(vocab_size=30522, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)).eval()
    tok = ll.load_encoder().tokenizer
    tok.backend_tokenizer.post_processor = Sequence([])
    enc, how = ll.load_encoder(hf, tok, pooling="lasttoken"), {**SMALL, "taus": (), "retrieval": ()}
    assert tok.num_special_tokens_to_add() == 0
    with pytest.raises(ValueError, match="lengths begin at 1: how alike tokens are takes 2 or more"):
        length_collapse(enc, **{**how, "lengths": (1, 2, 8)})
    r = length_collapse(enc, **{**how, "lengths": (2, 8)})
    assert r.frames["layers"]["value"].is_finite().all()


# Parts that are kept

def same(a: CollapseReport, b: CollapseReport) -> None:
    assert a.frames.keys() == b.frames.keys()
    for name in a.frames.keys() - {"costs"}: assert_frame_equal(a.frames[name], b.frames[name], abs_tol=1e-5)  # sums depend on alignment


def test_a_run_that_is_killed_goes_on_to_the_same_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enc, whole = measured()
    real, calls = VectorPart.run, []

    def killed(self: VectorPart, *args: Any) -> Any:
        calls.append(self.context_length)
        if len(calls) == 3: raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(VectorPart, "run", killed)
    with pytest.raises(KeyboardInterrupt): length_collapse(enc, **SMALL, out=tmp_path / "kept")
    monkeypatch.setattr(VectorPart, "run", real)
    again = length_collapse(enc, **SMALL, out=tmp_path / "kept")
    assert again.meta["parts_kept"] == 4  # embeddings and layers of the two lengths before
    same(again, whole)
    monkeypatch.setattr(VectorPart, "run", lambda *a: pytest.fail("this part was finished"))
    third = length_collapse(enc, **SMALL, out=tmp_path / "kept")
    assert third.meta["parts_kept"] == third.meta["parts"]
    same(third, whole)


def test_another_encoder_or_setting_finds_nothing(tmp_path: Path) -> None:
    how = {**SMALL, "taus": (), "retrieval": ()}
    enc = tiny()
    first = length_collapse(enc, **how, out=tmp_path / "kept")
    kept = lambda e, **more: plan(length_collapse, e, **{**how, **more}, out=tmp_path / "kept")["finished"].sum()
    assert kept(enc) == first.meta["parts"] == 6
    assert kept(tiny(bias=1.0)) == kept(enc, document_prompt="a ") == 0
    assert kept(ll.load_encoder(enc.hf, enc.tokenizer, pooling="cls")) == 0
    assert kept(enc, seed=1) == 0  # other documents
    assert kept(enc, dims=(4, 8)) == 3  # layers know no dims
    with ll.temperature(enc, 2.0): assert kept(enc) == 0


def test_keys_do_not_depend_on_what_was_tokenized_before() -> None:
    enc = tiny()
    before = encoder_key(enc)
    enc.encode_counted(["rain " * 300], truncate=True)
    assert encoder_key(enc) == before


def test_a_plan_tells_what_it_costs() -> None:
    enc, report = measured()
    planned = plan(length_collapse, enc, **SMALL)
    assert planned["tokens"].sum() == report.meta["tokens"]
    assert not planned["finished"].any()
    assert_frame_equal(planned.drop("finished"), report.frames["costs"].drop("seconds"))


def test_settings_and_run_together_or_one_by_one() -> None:
    enc, how = tiny(), {**SMALL, "taus": (), "retrieval": ()}
    one = length_collapse(enc, **how, dims=(4, 8), seed=1, batch_size=4)
    own = {k: v for k, v in how.items() if k not in ("layer_documents", "n_queries", "n_candidates")}
    s = CollapseSettings(layer_documents=4, n_queries=6, n_candidates=8, dims=(4, 8))
    same(length_collapse(enc, **own, settings=s, run=Run(seed=1, batch_size=4)), one)
    same(length_collapse(enc, **own, settings=s, run=Run(seed=7, batch_size=4), seed=1), one)    # an argument of its own comes first
    with pytest.raises(TypeError, match="no use for engine=: it takes out, batch_size, progress, seed"):
        length_collapse(enc, run=Run(engine="ray"))
    with pytest.raises(TypeError, match="unexpected keyword argument 'documents': its settings are layer_documents, retrieval"):
        length_collapse(enc, documents=8)  # type: ignore[call-arg]


# What is refused, and what is left out

@pytest.mark.parametrize(("given", "said"), [
    (dict(lengths=(16, 200)), "lengths go up to 200 tokens, and .* reads 96: take 96 at most"),
    (dict(lengths=()), "lengths is .*: give whole numbers above 0"),
    (dict(lengths=(0, 16)), "lengths is .*: give whole numbers above 0"),
    (dict(lengths=(2, 16)), "a length is 2, and the tokenizer adds 2 tokens"),
    (dict(n_documents=4), "n_documents is 4: 8 texts or more show how texts lie together"),
    (dict(layer_documents=-1), "layer_documents is -1: it is 0 to 8"),
    (dict(taus=(0.5, -1.0)), "a temperature is -1.0: it must be above 0"),
    (dict(taus=(float("nan"),)), "a temperature is nan"),
    (dict(retrieval=("needle", "haystack")), "there is no task 'haystack': there are passkey, needle, passages"),
    (dict(retrieval="passages"), 'the task "passages" asks real questions: give questions='),
    (dict(n_queries=9), "9 queries and 8 candidates"),
    (dict(retrieval_lengths=(16,)), "length is 16 tokens; .* takes"),
    (dict(lengths=(16, 32), retrieval="needle"), "retrieval takes documents of 64 tokens or more"),
    (dict(retrieval_lengths=(500,)), "retrieval_lengths go up to 500 tokens"),
    (dict(windows="self_extend"), "'self_extend' is no way to read past the length of .*, whose positions are learned"),
    (dict(windows="grouped", beyond=(50,)), "length is 50, and 96 tokens are read as it is"),
    (dict(beyond=(200,)), "beyond= are lengths for windows="),
    (dict(layers=(0, 3)), "layer 3: hidden states are numbered 0"),
    (dict(dims=(8, 64)), "dims go up to 64: embeddings of .* have 32 numbers"),
    (dict(lengths="16"), r"lengths is '16': give whole numbers, such as \(64, 256\)"),
    (dict(lengths=16.5), "lengths is 16.5: give whole numbers"),
    (dict(taus="half"), r"taus is 'half': give numbers above 0, such as \(0.5, 0.75\)"),
    (dict(texts="One text."), "this is one text: put it into a list"),
    (dict(natural="One text."), "this is one text: put it into a list"),
    (dict(texts=["too short"] * 9), "9 of 9 texts have fewer than 64 tokens"),
    (dict(texts=[""] * 9), "is empty"),
    (dict(natural=["One."] * 3), "natural has 3 texts: 8 or more are needed"),
    (dict(natural=["rain " * 200] * 8), "text 0 has 202 tokens .* reads 96: cut it"),
    (dict(batch_size=0), "batch_size is 0"),
    (dict(batch_size=2.5), "batch_size is 2.5: give a whole number"),
    (dict(n_documents=8.5), "n_documents is 8.5: give a whole number"),
    (dict(seed="x"), "seed is 'x': give a whole number"),
    (dict(n_queries="few"), "n_queries is 'few': give a whole number"),
    (dict(n_queries=1), "1 queries and 8 candidates: 2 queries or more"),
    (dict(retrieval_lengths=(16,)), r"the task 'passkey' at 16 tokens \(retrieval_lengths=\): length is 16 tokens; .* ask for 3\d or more"),
    (dict(questions=[]), "questions is empty: give some that have passages, or leave questions= out"),
    (dict(texts=["One text of a few words. " * 30] * 10), r"1 of 10 texts have 64 tokens or more \(9 others are copies of them\), and 8"),
    (dict(natural=["One.", "Two.", "Three."] * 3), "natural has 3 texts that differ: 8 or more are needed"),
    (dict(questions="nowhere.jsonl"), "nowhere.jsonl"),
])
def test_refused_before_anything_is_embedded(given: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    enc = measured()[0]
    monkeypatch.setattr(collapse_parts, "layer_embeddings", lambda *a, **k: pytest.fail("texts were embedded"))
    with pytest.raises((ValueError, IndexError, OSError, TypeError), match=said): length_collapse(enc, **{**SMALL, **given})


def test_numbers_alone_and_texts_that_come_once() -> None:
    enc, how = tiny(), {**SMALL, "retrieval": ()}
    texts = long_texts(9, enc, 80)
    listed = length_collapse(enc, texts, **how)
    same(length_collapse(enc, iter(texts), **how), listed)
    assert listed.meta["natural"] == 9
    alone = length_collapse(enc, texts, **how | {"lengths": 32, "taus": 0.5})
    assert (alone.meta["settings"]["lengths"], alone.meta["settings"]["taus"]) == ([32], [0.5])


def test_long_and_short_texts_are_counted() -> None:
    enc = tiny()
    texts = [*long_texts(9, enc, 80, seed="a"), *long_texts(2, enc, 150, seed="b"), *[f"Number {i} is a short one." for i in range(10)]]
    how = {**SMALL, "taus": (), "retrieval": ()}
    r = length_collapse(enc, texts, **{**how, "n_documents": 11})
    assert (r.meta["too_short"], r.meta["too_long"], r.meta["natural"], r.meta["n_truncated"]) == (10, 2, 19, 0)
    left = "10 texts were too short to be cut to the longest length; 2 texts were too long to be read whole"
    assert any(s.startswith(left) for s in r.details())
    assert r.frames["similarity"].filter(kind="cut")["documents"].unique().to_list() == [11]
    assert r.frames["similarity"].filter(kind="natural")["documents"].to_list() == [10, 9]
    assert any("19 documents as they are, in 2 groups of 9 to 10 by length" in s for s in r.details())
    cut = length_collapse(enc, texts, **how, truncate=True)
    assert (cut.meta["natural"], cut.meta["n_truncated"]) == (21, 2)
    assert "2 documents of natural length were cut at 96 tokens" in " ".join(cut.details())
    same_length = length_collapse(enc, long_texts(17, enc, 100), **how, truncate=True).frames["similarity"].filter(kind="natural")
    assert same_length.select("context_length", "documents").rows() == [(96, 17)]  # none is lost where all are cut


def test_a_copy_is_no_document_of_its_own() -> None:
    enc, how = tiny(), {**SMALL, "taus": (), "retrieval": ()}
    texts = long_texts(9, enc, 80)
    once = length_collapse(enc, texts, **how | {"n_documents": 20})
    twice = length_collapse(enc, [texts[0], *texts, texts[4].replace(" ", "  ", 3), *texts[:2]], **how | {"n_documents": 20})
    for name in ("similarity", "geometry", "separability", "layers"):
        assert_frame_equal(once.frames[name], twice.frames[name], abs_tol=1e-6)
    assert (once.meta["copies"], twice.meta["copies"], twice.meta["natural"], twice.meta["natural_copies"]) == (0, 4, 9, 4)
    left = "4 texts were the same as others as far as they are read, and left out; 4 of natural length were the same as others, and left"
    assert any(s.startswith(left) for s in twice.details())
    longer = [t + f" And then number {i}." for i in (1, 2) for t in texts]  # alike up to the longest length
    assert length_collapse(enc, longer, **how).meta["copies"] == 9


def test_cut_queries_are_counted() -> None:
    enc = tiny()
    words = "river stone cloud lamp garden window paper bridge".split()
    long = " please" * 120
    asked = [Question(f"Where is the {w} number {i}?{long * (i % 2)}", (f"spot {w} {i}",), (f"{w} {i}", f"It is at spot {w} {i}. " * 2))
             for i in range(8) for w in words]
    how = {**SMALL, "retrieval": "passages", "n_queries": 8, "n_candidates": 8, "max_passage": 32, "retrieval_lengths": (32, 64)}
    task = padded_passages(asked, enc, 32, n_queries=8, max_passage=32, seed=0)
    n = sum("please" in q for q in task.queries)
    texts = long_texts(8, enc, 80)
    with pytest.raises(ValueError, match="reads 96"): length_collapse(enc, texts, questions=asked, **how)
    r = length_collapse(enc, texts, questions=asked, **how, truncate=True)
    assert r.frames["retrieval"]["queries_truncated"].unique().to_list() == [n] and 0 < n < 8
    assert any(f"{n} of 8 queries of passages were cut at 96 tokens (none, tau 0.5)" in s for s in r.details())
    assert not any("queries" in s and "were cut" in s for s in measured()[1].details())


def test_temperatures_of_one_name_are_one() -> None:
    r = length_collapse(tiny(), **{**SMALL, "taus": (0.5, 0.50000001, 1.00000001), "retrieval": (), "n_queries": 1})  # of no task
    assert [*r.meta["conditions"]] == ["none", "tau 0.5"]


# Reports

def test_report_comes_back(tmp_path: Path) -> None:
    report = measured()[1]
    report.save(tmp_path / "kept")
    back = ll.Report.load(tmp_path / "kept")
    assert type(back) is CollapseReport
    assert back.details() == report.details()
    same(back, report)
    assert len(back.sections()) == len(report.sections()) == 8


def test_sentences_say_what_the_tables_say() -> None:
    "Numbers and directions; and other tables, other sentences"
    report = measured()[1]
    said = report.details()[0]
    f = report.frames["similarity"].filter(condition="none")
    first, last = (f.filter(context_length=n)["mean_cosine"].item() for n in (16, 64))
    assert f"a cosine of {first:.2f} at 16 and {last:.2f} at 64 tokens" in said
    x = report.frames["effects"].filter(measure="mean_cosine", condition="none").row(0, named=True)
    way = "rises" if x["lower"] > 0 else "falls" if x["upper"] < 0 else "no sign of a change"
    assert way in said
    for lower, upper, word in ((0.1, 0.3, "it rises"), (-0.3, -0.1, "it falls"), (-0.1, 0.1, "no sign of a change")):
        hit = (pl.col("measure") == "mean_cosine") & (pl.col("condition") == "none")
        effects = report.frames["effects"].with_columns(lower=pl.when(hit).then(lower).otherwise("lower"),
                                                        upper=pl.when(hit).then(upper).otherwise("upper"))
        assert word in CollapseReport({**report.frames, "effects": effects}, report.meta).details()[0]


def test_a_curve_that_falls_and_rises_is_not_said_to_stand_still() -> None:
    "What the ends hide is in the sentence, from vectors to words"
    report, rng = measured()[1], np.random.default_rng(0)
    own = rng.normal(size=(16, 32))
    vectors = {("cut", "none", n): own + 0.3 * rng.normal(size=own.shape) + push * np.eye(32)[0]
               for n, push in ((16, 4.0), (32, 0.0), (64, 4.0))}
    frames = {**report.frames, "similarity": similarity_frame(vectors), "changes": changes_frame(vectors),
              "effects": effects_frame(vectors, pl.DataFrame(schema={"measure": pl.String}), pl.DataFrame())}
    said = CollapseReport(frames, report.meta).details()[0]
    assert "no sign of a change between the ends, but it falls from 16 to 32 tokens, -" in said
    assert "and rises from 32 to 64 tokens, +" in said and said.endswith("(intervals for all 3 pairs at once)")
    f = report.frames["changes"]
    assert f.select("short", "context_length").rows() == [(16, 32), (16, 64), (32, 64)]
    old = CollapseReport({k: v for k, v in report.frames.items() if k != "changes"}, report.meta)  # kept by an earlier version
    assert old.details()[1:] == report.details()[1:]


def test_a_task_that_words_alone_solve_is_said_to_be_one() -> None:
    report = measured()[1]
    f = report.frames["shortened"]
    input_, last = (pl.col("measure") == "ndcg_10") & (pl.col("layer") == 0), (pl.col("measure") == "ndcg_10") & (pl.col("layer") == 2)
    for value, told in ((0.9, True), (0.5, False)):
        made = f.with_columns(value=pl.when(input_).then(value).when(last).then(0.92).otherwise("value"))
        said = next(s for s in CollapseReport({**report.frames, "shortened": made}, report.meta).details() if s.startswith("cut short"))
        assert ("words in common are enough" in said) == told


def test_rounding_is_no_direction() -> None:
    report, rng = measured()[1], np.random.default_rng(0)
    own = rng.normal(size=(9, 32)) + 1
    vectors = {("cut", "none", n): own + e for n, e in ((16, 0.0), (32, 1e-8), (64, 1e-7))}
    frames = {**report.frames, "similarity": similarity_frame(vectors), "changes": changes_frame(vectors),
              "effects": effects_frame(vectors, pl.DataFrame(schema={"measure": pl.String}), pl.DataFrame())}
    x = frames["effects"].filter(measure="mean_cosine").row(0, named=True)
    assert x["lower"] > 0 or x["upper"] < 0  # what a look at the signs alone would take for a direction
    assert ": no sign of a change between any two of the lengths" in CollapseReport(frames, report.meta).details()[0]


def test_layer_sentences_name_the_right_layers() -> None:
    report = measured()[1]
    f = report.frames["layer_effects"]
    ends = pl.when(pl.col("measure") == "sigma_a").then
    made = f.with_columns(lower=ends(pl.when(pl.col("layer") == 0).then(-0.2).otherwise(0.1)).otherwise("lower"),
                          upper=ends(pl.when(pl.col("layer") == 0).then(-0.1).otherwise(0.2)).otherwise("upper"))
    for documents, p, words in ((8, 0.01, "rises in layer 1; falls in layer 0"), (8, 0.2, "no sign of a change in all 2 layers"),
                                (4, 0.125, "too few documents to say")):
        told = made.with_columns(documents=pl.lit(documents), p=pl.lit(p))
        said = CollapseReport({**report.frames, "layer_effects": told}, report.meta).details()
        assert any(s.startswith(f"sigma_a, 16 to 64 tokens: {words} (") for s in said)


def test_generated_texts_are_said_to_be_no_evidence() -> None:
    enc, report = measured()
    assert sum("generated filler says the same few things" in s for s in report.details()) == 1
    own = length_collapse(enc, long_texts(8, enc, 64), **{**SMALL, "taus": (), "retrieval": ()})
    assert not any("filler" in s for s in own.details())


def test_effects_match_the_values_they_compare() -> None:
    report = measured()[1]
    value = lambda m, c, n: report.frames["geometry"].filter(measure=m, condition=c, context_length=n)["value"].item()
    for x in report.frames["effects"].filter(pl.col("measure").is_in(["mean_cosine", "effective_rank"])).iter_rows(named=True):
        want = value(x["measure"], x["condition"], x["context_length"]) - value(x["measure"], x["reference"], x["reference_length"])
        assert x["difference"] == pytest.approx(want, abs=1e-6)
        assert x["lower"] <= x["difference"] <= x["upper"]
    found = report.frames["retrieval"].filter(measure="ndcg_10", task="needle", context_length=64)
    x = report.frames["effects"].filter(measure="ndcg_10", task="needle", condition="tau 0.5").row(0, named=True)
    none, changed = (found.filter(condition=c)["value"].item() for c in ("none", "tau 0.5"))
    assert x["difference"] == pytest.approx(changed - none)


def test_page_shows_every_section_and_runs_nothing_of_the_models_name() -> None:
    report = measured()[1]
    named = CollapseReport(report.frames, {**report.meta, "model": "<script>alert(1)</script>"})
    page = page_html([named], "Length collapse")
    assert "<script>alert" not in page
    for s in report.sections(): assert s.title in page or s.title.replace("'", "&#x27;") in page
    assert "What was run" in page


def test_umap_only_if_it_is_there() -> None:
    report = measured()[1]
    if find_spec("umap") is None:
        with pytest.raises(ImportError, match="pip install umap-learn"): on_a_plane(report.frames["vectors"], "umap")
    points = on_a_plane(report.frames["vectors"])
    assert_frame_equal(points.select("x", "y").select(pl.all().abs()), report.frames["points"].select(pl.col("x", "y").abs()), abs_tol=1e-5)


def test_a_second_map_where_umap_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class UMAP:
        def __init__(self, metric: str, random_state: int): assert metric == "cosine"
        def fit_transform(self, x: np.ndarray) -> np.ndarray: return x[:, :2]

    fake = ModuleType("umap")
    fake.UMAP = UMAP  # type: ignore[attr-defined]
    fake.__spec__ = ModuleSpec("umap", None)
    monkeypatch.setitem(sys.modules, "umap", fake)
    section = next(s for s in measured()[1].sections() if s.title == "A map of the texts")
    assert len(section.chart.concat) == 2


def test_one_length_and_no_retrieval() -> None:
    "The least that can be measured still makes a report"
    r = length_collapse(tiny(), lengths=(32,), n_documents=8, layer_documents=1, taus=(), retrieval=())
    assert {"retrieval", "queries"}.isdisjoint(r.frames)
    assert re.match(r"8 documents \(generated filler\) cut to 32 tokens: two of them have a cosine of -?[\d.]+ \(", r.details()[0])
    assert len(r.sections()) == 6


def test_real_passages() -> None:
    if not QUESTIONS.exists():
        pytest.skip(f"needs published files: lost-in-the-middle/{QUESTIONS.name} in a folder shared/data beside the project's")
    enc = ll.load_encoder()
    plain = dict(query_prompt=None, document_prompt=None, truncate=False, seed=0)
    s = CollapseDesign((32, 256), 8, 2, (), (), (), ("passages",), (256,), 8, 8, False, (6,), (384,), **plain)
    x = get_inputs(enc, None, None, QUESTIONS, s)
    assert x.source == "passages, joined" and len(x.cut[256]) == 8 and len(x.natural) == 32
    r = length_collapse(enc, questions=QUESTIONS, lengths=(32, 256), n_documents=8, layer_documents=2, taus=(), retrieval="passages",
                        n_queries=8, retrieval_lengths=(256,))
    assert r.frames["retrieval"].filter(measure="hit_1")["candidates"].item() == 8
    assert r.frames["retrieval"].filter(measure="ndcg_10")["value"].item() > 0.9
    assert r.frames["similarity"].filter(kind="natural")["context_length"].is_sorted()
    name = encoder_key(enc)
    parts = [VectorPart(Change(), n, "cut", s, tuple(x.cut[n])) for n in (32, 256)]
    assert parts[0].key(name) != parts[1].key(name)


def test_spectrum_of_degenerate_texts() -> None:
    assert effective_rank(spectrum(np.ones((8, 3)), centred=True)) == 0
    flat = geometry_intervals(np.ones((8, 3)) + 1e-9 * np.eye(8, 3))
    assert flat["mean_cosine"].mean == pytest.approx(1)
    assert np.isfinite([flat["effective_rank_centred"].lower, flat["effective_rank_centred"].upper]).all()
