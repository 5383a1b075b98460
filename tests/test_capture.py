"""What capture() must get right around a forward: errors, turns, forks, generation, models that bypass it, bad queries and masks."""

from __future__ import annotations

import copy

import numpy as np
import polars as pl
import pytest
import torch
from transformers import DynamicCache, StaticCache
from zoo import ZOO, token_ids

import longlens.measure.statistics as st
from longlens.attention.hf_interface import UnsupportedModel, attachments
from longlens.measure.capture import capture

EVERYTHING = (st.Entropy(), st.SinkMass(4), st.Received(), st.Distance(), st.ValueNorm(), st.ResidualNorm(), st.MassiveActivations())


def same(a: pl.DataFrame, b: pl.DataFrame, skip: tuple[str, ...] = ("sample",)) -> None:
    "Equal tables but for float rounding"
    assert a.columns == b.columns and len(a) == len(b)
    for c in set(a.columns) - set(skip): np.testing.assert_allclose(a[c].to_numpy(), b[c].to_numpy(), rtol=1e-4, atol=1e-5, err_msg=c)


@torch.no_grad()
def alone(model, ids: torch.Tensor, *statistics: st.Statistic) -> dict[str, pl.DataFrame]:
    with capture(model, *(statistics or EVERYTHING)) as seen: model(ids)
    return seen.frames


def untouched(model) -> None:
    assert model.config._attn_implementation != "longlens" and not attachments()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Stop(Exception): ...


@torch.no_grad()
def test_a_forward_that_fails_midway_leaves_nothing_behind() -> None:
    model, ids = ZOO["llama"](), token_ids(30)
    def fail(*_: object) -> None: raise Stop
    with capture(model, *EVERYTHING) as seen:
        handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(Stop): model(ids)
        handle.remove()
        model(token_ids(20, seed=1))
    for name, frame in alone(model, token_ids(20, seed=1)).items(): same(seen.frame(name), frame)
    untouched(model)


@torch.no_grad()
def test_a_failing_chunk_drops_its_text_only() -> None:
    model, ids = ZOO["llama"](), token_ids(30)
    def fail(*_: object) -> None: raise Stop
    with pytest.raises(Stop), capture(model, st.Entropy()) as seen:
        model(ids)
        cache = DynamicCache(config=model.config)
        model(ids[:, :10], past_key_values=cache)
        model.model.layers[1].mlp.register_forward_pre_hook(fail)
        model(ids[:, 10:], past_key_values=cache)
    same(seen.frame("entropy"), alone(ZOO["llama"](), ids)["entropy"])
    assert not attachments() and model.config._attn_implementation == "sdpa"


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_texts_that_take_turns_are_told_apart(name: str) -> None:
    model, a, b = ZOO[name](), token_ids(40, seed=1), token_ids(40, seed=2)
    b[:, 10:20] = a[:, 10:20]  # the same tokens before the turn
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    with capture(model, *EVERYTHING) as seen:
        for first, last in ((0, 20), (20, 21), (21, 40)):
            for ids, cache in zip((a, b), caches, strict=True): model(ids[:, first:last], past_key_values=cache)
    frames = seen.frames
    for i, ids in enumerate((a, b)):
        for key, frame in alone(model, ids).items():
            columns = [c for c in frame.columns if c != "median"]  # a median of medians in chunks
            same(frames[key].filter(sample=i).select(columns), frame.select(columns))


@torch.no_grad()
def test_forks_of_a_prefix_are_samples_of_their_own() -> None:
    model, ids = ZOO["llama"](), token_ids(40)
    cache = DynamicCache(config=model.config)
    with capture(model, st.Entropy(), st.Received()) as seen:
        model(ids[:, :30], past_key_values=cache)
        for _ in range(2): model(ids[:, 30:], past_key_values=copy.deepcopy(cache))
        cache.crop(-10)
        model(ids[:, 20:], past_key_values=cache)  # goes on at another position
    entropy = seen.frame("entropy")
    assert entropy["sample"].unique().sort().to_list() == [0, 1, 2, 3]
    same(entropy.filter(sample=1), entropy.filter(sample=2))
    for sample, first in ((1, 30), (3, 20)):
        same(entropy.filter(sample=sample), alone(model, ids, st.Entropy(queries=range(first, 40)))["entropy"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_continuation_reports_only_what_it_saw(name: str) -> None:
    "The prefix was run before the capture: no rows at positions that were never seen"
    model, ids = ZOO[name](), token_ids(40)
    cache = DynamicCache(config=model.config)
    model(ids[:, :30], past_key_values=cache)
    with capture(model, st.Received(), st.ResidualNorm(), st.ValueNorm()) as seen: model(ids[:, 30:], past_key_values=cache)
    assert seen.frame("residual_norm").filter(layer=0)["position"].to_list() == list(range(30, 40))
    first = 0 if name == "llama" else 23  # the sliding cache holds 7 tokens
    for frame in (seen.frame("received").filter(layer=0, head=0), seen.frame("value_norm").filter(layer=0, kv_head=0)):
        assert frame["position"].to_list() == list(range(first, 40))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generate_counts_prefill_and_steps_once(name: str) -> None:
    model, ids, keep = ZOO[name](), token_ids(20, batch=2), torch.ones(2, 20, dtype=torch.long)
    keep[0, :6] = 0
    statistics = st.Entropy(), st.Received(), st.SinkMass(2), st.Distance(), st.Rows([17], top=5)
    with capture(model, *statistics) as seen:
        out = model.generate(ids, attention_mask=keep, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    frames = seen.frames
    assert len(seen.groups) == 1
    for i, text in enumerate((out[0, 6:-1], out[1, :-1])):  # the last token was never fed
        for key, frame in alone(model, text[None], *statistics).items(): same(frames[key].filter(sample=i), frame)
    untouched(model)


@torch.no_grad()
def test_generate_with_a_static_cache_is_refused() -> None:
    model = ZOO["llama"]()
    with pytest.raises(TypeError, match="use its default cache"), capture(model, st.Entropy()):
        model.generate(token_ids(20), max_new_tokens=4, cache_implementation="static")
    untouched(model)


@torch.no_grad()
def test_static_cache_reports_no_empty_places() -> None:
    model, ids = ZOO["llama"](), token_ids(20)
    cache = StaticCache(config=model.config, max_cache_len=50)
    with capture(model, *EVERYTHING) as seen: model(ids, past_key_values=cache)
    for name, frame in alone(model, ids).items(): same(seen.frame(name), frame)


@torch.no_grad()
def test_nested_captures_see_the_same() -> None:
    model, ids = ZOO["gemma2"](), token_ids(40, batch=2)
    with capture(model, st.Entropy()) as outer:
        model(ids[:1])
        with capture(model, st.Entropy(), st.Support()) as inner: model(ids)
        model(ids[1:])
    assert outer.frame("entropy")["sample"].unique().sort().to_list() == [0, 1, 2, 3]
    same(outer.frame("entropy").filter(pl.col("sample").is_in([1, 2])), inner.frame("entropy"))
    assert len(inner.frame("support")) == len(inner.frame("entropy"))
    untouched(model)


@torch.no_grad()
def test_a_layer_that_bypasses_the_interface_is_named() -> None:
    model = ZOO["llama"]()
    module = model.model.layers[1].self_attn
    module.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.self_attn of LlamaForCausalLM ran without calling"), \
         capture(model, st.Entropy()): model(token_ids(10))
    untouched(model)


@torch.no_grad()
def test_a_model_none_of_whose_layers_call_is_named() -> None:
    model = ZOO["llama"]()
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM ran without calling the attention interface"), \
         capture(model, st.Entropy()): model(token_ids(10))


@torch.no_grad()
def test_shared_layers_are_refused() -> None:
    model = ZOO["llama"]()
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(UnsupportedModel, match="two attention calls of layer 0 in one forward"), capture(model, st.Entropy()):
        model(token_ids(10))
    untouched(model)


def test_transformer_bridge_is_refused() -> None:
    bridge = type("TransformerBridge", (), {"__module__": "transformer_lens.model_bridge"})()
    with pytest.raises(UnsupportedModel, match=r"use longlens\.load\(bridge\)"): capture(bridge, st.Entropy())
    with pytest.raises(TypeError, match="got str"): capture("gpt2", st.Entropy())


def test_training_is_refused() -> None:
    model = ZOO["llama"]()
    model.train()
    with pytest.raises(UnsupportedModel, match="training mode"), capture(model, st.Entropy()): model(token_ids(5))
    untouched(model)


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_weights_names_the_layer(value: float) -> None:
    model = ZOO["llama"]()
    model.model.layers[1].self_attn.k_proj.weight[0, 0] = value
    with pytest.raises(FloatingPointError, match="layer 1 are NaN or infinite"), capture(model, st.Entropy()): model(token_ids(40))
    untouched(model)


@torch.no_grad()
@pytest.mark.parametrize("chunked", [False, True], ids=["once", "chunks"])
def test_spans_and_queries_beyond_the_text_are_errors(chunked: bool) -> None:
    model, ids = ZOO["llama"](), token_ids(30)
    with capture(model, st.SpanMass({"in": (0, 30), "out": (25, 31)}), st.Rows([3, 29, 30, 31]), st.Entropy(queries=[2, 40])) as seen:
        cache = DynamicCache(config=model.config)
        for part in ids.split(11 if chunked else 30, 1): model(part, past_key_values=cache)
    of = "in sample 0, which has 30 tokens"
    with pytest.raises(ValueError, match=r"span 'out' is \[25, 31\), but sample 0 has 30 tokens"): seen.frame("span_mass")
    with pytest.raises(ValueError, match=f"rows: 2 of 4 queries were not run {of}: 30, 31"): seen.frame("rows")
    with pytest.raises(ValueError, match=f"entropy: 1 of 2 queries were not run {of}: 40"): seen.frame("entropy")


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_span_must_lie_in_every_sample(side: str) -> None:
    model, ids, keep = ZOO["llama"](), token_ids(30, batch=2), torch.ones(2, 30, dtype=torch.long)
    keep[1, slice(0, 5) if side == "left" else slice(25, 30)] = 0
    with capture(model, st.SpanMass({"end": (20, 28)})) as seen: model(ids, attention_mask=keep)
    with pytest.raises(ValueError, match=r"span 'end' is \[20, 28\), but sample 1 has 25 tokens"): seen.frame("span_mass")


@torch.no_grad()
def test_queries_in_a_prefix_that_was_not_captured_are_missing() -> None:
    model, ids = ZOO["llama"](), token_ids(30)
    cache = DynamicCache(config=model.config)
    model(ids[:, :20], past_key_values=cache)
    with capture(model, st.Rows([10, 25])) as seen: model(ids[:, 20:], past_key_values=cache)
    with pytest.raises(ValueError, match="1 of 2 queries were not run in sample 0, which has 30 tokens: 10"): seen.frame("rows")


@torch.no_grad()
@pytest.mark.parametrize("stat", [st.Rows([12, 19], top=None), st.Rows([12, 19], bins=4), st.Rows([12, 19], top=3)], ids=repr)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_rows_do_not_depend_on_the_chunks(name: str, stat: st.Rows) -> None:
    model, ids = ZOO[name](), token_ids(30)
    with capture(model, stat) as seen:
        cache = DynamicCache(config=model.config)
        for part in ids.split(8, 1): model(part, past_key_values=cache)
    same(seen.frame("rows"), alone(model, ids, stat)["rows"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_top_keys_of_layers_with_windows_are_padded(name: str) -> None:
    "As the pattern has them: where a window holds fewer keys than were asked for, -1 without weight"
    model, ids = ZOO[name](), token_ids(40)
    with capture(model, st.Rows([39], top=32)) as seen: model(ids)
    model.set_attn_implementation("eager")
    patterns = model(ids, output_attentions=True).attentions
    at, weight = seen.top_keys()
    assert at.shape == weight.shape == (len(patterns), patterns[0].shape[1], 1, 32)
    for layer, pattern in enumerate(patterns):
        for head, row in enumerate(pattern[0, :, 39]):
            here, n = at[layer, head, 0], int((row[:40] > 0).sum())
            held = here[here >= 0]
            assert len(held) == min(n, 32) and len({*held.tolist()}) == len(held)
            torch.testing.assert_close(weight[layer, head, 0][here >= 0], row[held], atol=1e-6, rtol=1e-4)
            assert not weight[layer, head, 0][here < 0].any()


@torch.no_grad()
def test_an_empty_sample_has_no_numbers() -> None:
    model, ids, keep = ZOO["llama"](), token_ids(20, batch=2), torch.ones(2, 20, dtype=torch.long)
    keep[1] = 0
    with capture(model, *EVERYTHING) as seen: model(ids, attention_mask=keep)
    for name, frame in alone(model, ids[:1]).items(): same(seen.frame(name).filter(sample=0), frame)
    assert seen.frame("entropy").filter(sample=1)["entropy"].is_nan().all()
    assert seen.frame("received").filter(sample=1).is_empty()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bool", "inf", "lowest"])
def test_masks_given_in_four_dimensions(kind: str) -> None:
    model, ids, n = ZOO["llama"](), token_ids(24), 24
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    seen[:, 5] = False
    seen[5, 5] = True
    low = {"inf": -torch.inf, "lowest": torch.finfo(torch.float32).min}
    mask = seen if kind == "bool" else torch.zeros(n, n).masked_fill(~seen, low[kind])
    with capture(model, st.Entropy(), st.Received()) as got: out = model(ids, attention_mask=mask[None, None]).logits
    torch.testing.assert_close(out, model(ids, attention_mask=mask[None, None]).logits, rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("eager")
    additive = torch.zeros(n, n).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    P = torch.stack(model(ids, attention_mask=additive, output_attentions=True).attentions)[:, 0]
    np.testing.assert_allclose(got.frame("received")["alpha"].to_numpy(), (P.sum(-2) / seen.sum(0)).numpy().ravel(), rtol=1e-3, atol=1e-6)
    H = -(P * P.clamp_min(1e-30).log()).sum(-1)
    norm = torch.where(seen.sum(-1) > 1, H / seen.sum(-1).clamp_min(2).log(), torch.nan).nanmean(-1)
    np.testing.assert_allclose(got.frame("entropy")["entropy_norm"].to_numpy(), norm.numpy().ravel(), rtol=1e-4)


@torch.no_grad()
def test_a_frame_that_is_too_long_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = ZOO["llama"](), token_ids(40, batch=2)
    with capture(model, st.Received(), st.Entropy()) as seen: model(ids)
    whole = seen.frame("received")
    monkeypatch.setattr("longlens.measure.base.MAX_ROWS", 100)
    def never(*_: object, **__: object) -> None: raise AssertionError("a table was made")
    with monkeypatch.context() as m:
        m.setattr("longlens.measure.base.layer_table", never)
        with pytest.raises(ValueError, match=r"the frame 'received' would have 640 rows, more than 100: .*top=64"): seen.frame("received")
    top = seen.frame("received", top=3)
    best = whole.sort("alpha", descending=True).group_by("sample", "layer", "head").head(3)
    keys = ["sample", "layer", "head", "position"]
    same(top.sort(keys), best.select(top.columns).sort(keys), skip=())
    few = seen.frame("received", heads=[(1, 2)])
    same(few, whole.filter(layer=1, head=2), skip=())


@torch.no_grad()
def test_nothing_large_is_kept_after_the_forward() -> None:
    "Queries, keys and values of a layer must be free once it has been measured"
    import gc
    import weakref
    model, kept = ZOO["llama"](), []
    import longlens.attention.hf_interface as module
    original = module.LayerCall.operator

    def watched(call: object, lse: object = None) -> object:
        op = original(call, lse)
        kept.append(weakref.ref(op))
        return op
    module.LayerCall.operator = watched
    try:
        with capture(model, *EVERYTHING) as seen: model(token_ids(30))
    finally: module.LayerCall.operator = original
    gc.collect()
    assert len(kept) == 2 and all(r() is None for r in kept)
    assert seen.frames
