"""The sink report says what eager attention says, on the model that ships with longlens and on models with other attention."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from zoo import CAUSAL, zoo_model

import longlens as ll
from longlens.charts.page import write_page
from longlens.needle_lm.data import make_example
from longlens.probes.sinks.metrics import judged


def eager_alpha(lm: ll.LongModel, ids: torch.Tensor) -> torch.Tensor:
    "Mean attention every position receives, from the formed pattern, (layers, heads, n)"
    before = lm.hf.config._attn_implementation
    lm.hf.set_attn_implementation("eager")
    P = torch.stack(lm(ids, output_attentions=True).attentions)[:, 0].double()
    lm.hf.set_attn_implementation(before)
    return P.sum(-2) / (P > 0).any(1).sum(-2)[:, None]


@pytest.fixture(scope="module")
def lm() -> ll.LongModel: return ll.load()


@pytest.fixture(scope="module")
def report(lm: ll.LongModel) -> ll.SinkReport: return ll.attention_sinks(lm, make_example(n_tokens=500, seed=11).prompt, sequences=5)


def test_the_sinks_of_needle_lm_are_those_of_eager_attention(lm: ll.LongModel, report: ll.SinkReport) -> None:
    tokens = lm.tokens(make_example(n_tokens=500, seed=11).prompt)
    alpha = eager_alpha(lm, tokens.ids)
    heads = report.frames["heads"].sort("layer", "head")
    torch.testing.assert_close(torch.tensor(heads["alpha_first"].to_numpy()).double(), alpha[..., 0].ravel(), rtol=1e-4, atol=1e-6)
    over = (alpha[..., :judged(len(tokens))] > .3).sum((0, 1))  # heads above epsilon at each position
    told = report.frames["tokens"]
    assert dict(told.filter(pl.col("heads") > 0).select("position", "heads").rows()) == {i: int(c) for i, c in enumerate(over) if c}
    assert told.row(0, named=True)["position"] == 0 and told["token"][0] == "<bos>"  # a real sink, and it is there in eager too
    assert alpha[..., 0].max() > .3


def test_the_metric_is_the_papers(lm: ll.LongModel, report: ll.SinkReport) -> None:
    from longlens.probes.sinks.metrics import SinkSettings, natural_sequences
    settings = SinkSettings(sequences=5)
    ids = natural_sequences(lm, [lm.tokens(make_example(n_tokens=500, seed=11).prompt)], settings)
    assert (ids[:, 0] == lm.tokenizer.bos_token_id).all() and ids.shape == (5, 64)
    over = torch.stack([eager_alpha(lm, row)[..., 0] > .3 for row in ids])
    got = report.frames["metric"].filter(kind="natural", k=1)["sink_rate"][0]
    assert got == pytest.approx(100 * over.double().mean().item())


def test_value_vectors_are_compared_in_the_heads_that_hold_a_sink(lm: ll.LongModel, report: ll.SinkReport) -> None:
    tokens, kept = lm.tokens(make_example(n_tokens=500, seed=11).prompt), []
    hooks = [layer.self_attn.v_proj.register_forward_hook(lambda m, x, out: kept.append(out[0])) for layer in lm.hf.model.layers]
    lm(tokens)
    for hook in hooks: hook.remove()
    norms = torch.stack(kept).unflatten(-1, (lm.n_kv_heads, -1)).norm(dim=-1).movedim(-1, 1)  # (layers, kv_heads, n)
    alpha = eager_alpha(lm, tokens.ids)[..., :judged(len(tokens))]
    held = (alpha > .3).any(-1)
    sinks = report.frames["tokens"]["position"].to_list()
    others = norms[..., [i for i in range(len(tokens)) if i not in sinks]]
    own = norms.gather(-1, alpha.argmax(-1)[..., None])[..., 0] / torch.quantile(others, .5, -1)
    told = report.frames["values"].filter(pl.col("heads") > 0).sort("layer", "kv_head")
    assert told.select("layer", "kv_head").rows() == [tuple(x) for x in held.nonzero().tolist()] and held.sum() >= 5
    torch.testing.assert_close(torch.tensor(told["own_ratio"].to_numpy()), own[held], rtol=1e-3, atol=1e-6)
    assert f"in the {held.sum()} of the 40 heads that hold one: {np.median(own[held]):.2g} times" in report.details()[-1]


@pytest.mark.parametrize("name", CAUSAL)
def test_every_architecture_gets_a_report(name: str) -> None:
    lm = ll.load(zoo_model(name))
    ids = torch.randint(3, 128, (150,), generator=torch.Generator().manual_seed(0))
    r = ll.attention_sinks(lm, ids, T=32, sequences=3, chunk=64)
    alpha = eager_alpha(lm, ids)
    got = torch.tensor(r.frames["heads"].sort("layer", "head")["alpha_first"].to_numpy()).double()
    torch.testing.assert_close(got, alpha[..., 0].ravel(), rtol=1e-4, atol=1e-6)
    group = alpha[..., :judged(150)].unflatten(1, (lm.n_kv_heads, -1)) > .3
    assert r.frames["values"].sort("layer", "kv_head")["heads"].to_list() == group.any(-1).sum(-1).ravel().tolist()
    assert len(r.details()) == 5
    assert ("learned sinks" in " ".join(r.details())) == (name == "gpt_oss")


def test_saved_loaded_and_drawn(report: ll.SinkReport, tmp_path) -> None:
    again = ll.Report.load(report.save(tmp_path / "sinks"))
    assert isinstance(again, ll.SinkReport) and again.details() == report.details()
    assert all(again.frames[n].equals(f) for n, f in report.frames.items())
    page = write_page(again, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "&lt;bos&gt;" in page and "published metric" in page
    assert report.chart().to_dict()
