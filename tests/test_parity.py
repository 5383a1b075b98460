"""Every statistic of every architecture against the formed matrix of transformers' own eager attention, in float32."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from transformers import DynamicCache
from zoo import CAUSAL, ZOO, token_ids

import longlens.measure.statistics as st
from longlens.attention.hf_interface import attach
from longlens.measure.capture import capture

N, PAD = 45, 9  # tokens; padding of the first sample
CHUNKS = ((0, 16), (16, 30), (30, 42), (42, 43), (43, 45))
WINDOWS = (1, 3, 8, 20, 45)
SPANS = {"head": (0, 5), "body": (5, 30), "tail": (30, 36)}  # every sample has these positions
STATISTICS = (
    st.Entropy(), st.Support(), st.SinkMass(4), st.SpanMass(SPANS), st.Distance(), st.DistanceProfile(WINDOWS), st.Received(),
    st.Rows(range(20, 30), top=5), st.Entropy(queries=range(20, 25), label="some"), st.Entropy(bins=[9, 18, 36], label="binned"),
)


def padding(side: str | None) -> torch.Tensor | None:
    if side is None: return None
    keep = torch.ones(2, N, dtype=torch.long)
    if side == "left": keep[0, :PAD] = 0
    else: keep[0, -PAD:] = 0
    return keep


def forward(model, ids, keep, chunked: bool):
    if not chunked: return model(ids, attention_mask=keep)
    cache = DynamicCache(config=model.config)
    return [model(ids[:, a:b], attention_mask=None if keep is None else keep[:, :b], past_key_values=cache) for a, b in CHUNKS][-1]


def eager(model, ids, keep) -> tuple[torch.Tensor, torch.Tensor]:
    "Patterns (layers, batch, heads, n, n), and logits or hidden states"
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    out = model(ids, attention_mask=keep, output_attentions=True)
    model.set_attn_implementation(before)
    return torch.stack(out.attentions), out[0]


def expected(P: torch.Tensor) -> dict[str, np.ndarray]:
    "The statistics of one sample from its formed pattern (layers, heads, n, n), in float64"
    P = P.double()
    n = P.shape[-1]
    i, j = torch.arange(n)[:, None], torch.arange(n)
    mass, seen = P.sum(-1), P > 0  # in these small models no visible weight underflows
    H = -(P * P.clamp_min(1e-300).log()).sum(-1)
    by_layer = seen.any(1)  # (layers, n, n); a layer with a window sees fewer keys
    visible = by_layer.sum(-1)[:, None]
    norm = torch.where(visible > 1, H / visible.clamp_min(2).log(), torch.nan)
    distance = (P * (i - j).abs()).sum(-1) / mass
    return {
        "entropy.entropy": H.mean(-1), "entropy.entropy_norm": norm.nanmean(-1),
        "support.support": (mass**2 / (P**2).sum(-1)).mean(-1),
        "sink_mass.sink_mass": P[..., :4].sum(-1).mean(-1), "sink_mass.learned_sink": (1 - mass).mean(-1),
        "span_mass.mass": torch.stack([P[..., a:b].sum(-1).mean(-1) for a, b in SPANS.values()], -1),
        "distance.mean_distance": distance.mean(-1),
        "distance_profile.mass": torch.stack([P.masked_fill((i - j).abs() >= w, 0).sum(-1).mean(-1) for w in WINDOWS], -1),
        "received.received": P.sum(-2), "received.alpha": P.sum(-2) / by_layer.sum(-2)[:, None],
        "some.entropy": H[..., 20:25].mean(-1),
        "binned.entropy": torch.stack([H[..., a:b].mean(-1) for a, b in ((0, 9), (9, 18), (18, 36))], -1),
    }


def agree(got: np.ndarray, want: torch.Tensor, what: str, rtol: float = 1e-4) -> None:
    w = want.numpy().ravel()
    np.testing.assert_allclose(got, w, rtol=rtol, atol=1e-6 * max(1.0, float(np.abs(w).max())), err_msg=what)


CASES = [(name, side, chunked) for name in ZOO for side in (None, "left", "right") for chunked in (False, True)
         if not chunked or (name in CAUSAL and side != "right")]  # encoders have no cache; a cached batch is padded on the left


@pytest.mark.parametrize("name,side,chunked", CASES, ids=[f"{n}-{s or 'whole'}-{'chunks' if c else 'once'}" for n, s, c in CASES])
@torch.no_grad()
def test_statistics_agree_with_eager(name: str, side: str | None, chunked: bool) -> None:
    model, ids, keep = ZOO[name](), token_ids(N, batch=2), padding(side)
    plain = forward(model, ids, keep, chunked)[0]
    with capture(model, *STATISTICS) as seen: out = forward(model, ids, keep, chunked)[0]
    real = slice(None) if keep is None else keep[:, -out.shape[1]:].bool()
    torch.testing.assert_close(out[real], plain[real], rtol=1e-4, atol=1e-4)  # the logits do not change
    P, _ = eager(model, ids, keep)
    frames = seen.frames
    for b in range(2):
        text = slice(None) if keep is None else keep[b].nonzero()[:, 0]
        own = P[:, b][:, :, text][..., text]
        for key, want in expected(own).items():
            frame, column = key.split(".")
            agree(frames[frame].filter(sample=b)[column].to_numpy(), want, f"{name} {key} sample {b}")
        rows = frames["rows"].filter(sample=b)
        for (layer, head, query), part in rows.group_by("layer", "head", "query"):
            row = own[layer, head, query]
            agree(part["weight"].to_numpy(), row[torch.tensor(part["position"].to_numpy())], f"{name} rows")
            assert part["weight"].max() == pytest.approx(row.max().item(), rel=1e-4)


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_model_is_left_exactly_as_it_was(name: str) -> None:
    model, ids = ZOO[name](), token_ids(N, batch=2)
    configs = dict(vars(model.config))
    before = model(ids)[0]
    with capture(model, st.Entropy()), capture(model, st.Received()): model(ids)
    with pytest.raises(KeyError), attach(model):
        model(ids)
        raise KeyError
    assert torch.equal(model(ids)[0], before)
    assert vars(model.config) == configs
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_residual_and_value_norms(name: str) -> None:
    model, ids = ZOO[name](), token_ids(N, batch=2)
    grabbed: dict[int, torch.Tensor] = {}
    with capture(model, st.ResidualNorm(), st.MassiveActivations(), st.ValueNorm()) as seen:
        blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == model.config.num_hidden_layers)
        def grab(block: torch.nn.Module, args: tuple, output) -> None:
            grabbed[list(blocks).index(block)] = output if isinstance(output, torch.Tensor) else output[0]
        hooks = [b.register_forward_hook(grab) for b in blocks]
        model(ids)
        for hook in hooks: hook.remove()
    hidden = torch.stack([grabbed[i] for i in range(len(blocks))], 1).double()  # (batch, layers, n, d)
    norms = seen.frame("residual_norm").sort("sample", "layer", "position")["norm"].to_numpy()
    agree(norms, hidden.norm(dim=-1), name)
    massive = seen.frame("massive_activations")
    for (sample, layer), part in massive.group_by("sample", "layer"):
        h = hidden[sample, layer]
        agree(part.sort("rank")["value"].abs().to_numpy(), h.abs().ravel().topk(3).values, name)
        for position, dim, value in part.select("position", "dim", "value").rows():
            assert h[position, dim].item() == pytest.approx(value, rel=1e-5)
        assert part["median"][0] == pytest.approx(h.abs().median().item(), rel=1e-4)
    values = seen.frame("value_norm")
    assert set(values.columns) == {"sample", "layer", "kv_head", "position", "norm"} and values["norm"].min() > 0


@torch.no_grad()
def test_separate_texts_are_separate_samples() -> None:
    model = ZOO["llama"]()
    with capture(model, st.Entropy()) as seen:
        model(token_ids(20, batch=1)); model(token_ids(30, batch=2))
    assert seen.frame("entropy")["sample"].unique().sort().to_list() == [0, 1, 2]


@torch.no_grad()
def test_rows_only_for_the_continuation() -> None:
    "A prefix cached outside of the capture: the queries that follow are measured at their true positions"
    model, ids = ZOO["llama"](), token_ids(N, batch=1)
    cache = DynamicCache(config=model.config)
    model(ids[:, :40], past_key_values=cache)
    with capture(model, st.Rows([42], top=None), st.Entropy()) as seen: model(ids[:, 40:], past_key_values=cache)
    P, _ = eager(model, ids, None)
    rows = seen.frame("rows")
    assert rows.filter(layer=0, head=0)["position"].to_list() == list(range(43))  # what the query sees
    agree(rows["weight"].to_numpy(), P[:, 0, :, 42, :43].double(), "rows")
    H = -(P * P.clamp_min(1e-30).log()).sum(-1)[..., 40:].mean(-1)
    agree(seen.frame("entropy")["entropy"].to_numpy(), H.double(), "entropy")


@torch.no_grad()
def test_half_precision_statistics_are_close() -> None:
    model, ids = ZOO["llama"](), token_ids(200, batch=1)
    with capture(model, st.Entropy(), st.SinkMass(4)) as full: model(ids)
    with capture(model.bfloat16(), st.Entropy(), st.SinkMass(4)) as half: model(ids)
    a, b = full.frame("entropy")["entropy"], half.frame("entropy")["entropy"]
    assert (a - b).abs().max() < 0.15  # the model itself is rounded, so its attention differs a little
    assert b.null_count() == 0 and half.frame("sink_mass")["sink_mass"].is_finite().all()


def test_frames_are_tidy() -> None:
    model = ZOO["llama"]()
    with torch.no_grad(), capture(model, *STATISTICS) as seen: model(token_ids(N, batch=1))
    for name, frame in seen.frames.items():
        assert frame.columns[:3] == ["sample", "layer", "head"], name
        keys = [c for c in frame.columns if frame[c].dtype in (pl.Int64, pl.Int32, pl.String)]
        assert frame.select(keys).is_duplicated().sum() == 0, name
