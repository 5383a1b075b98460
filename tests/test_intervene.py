"""Interventions against references made by other means, on every architecture of the zoo"""
from __future__ import annotations

import copy
from contextlib import ExitStack
from itertools import combinations_with_replacement

import pytest
import torch
from transformers import DynamicCache
from zoo import CAUSAL, ENCODERS, POSITIONS, token_ids, zoo_model

import longlens as ll
from longlens.attention.hf_interface import UnsupportedModel, attachments
from longlens.interventions.base import (
    Intervention,
    check_heads,
    head_sizes,
    intervene,
    interventions,
    served_heads,
)
from longlens.interventions.heads import (
    Ablate,
    LambdaMask,
    Streaming,
    Turner,
    ablate,
    lambda_mask,
    mean_outputs,
    scale_spans,
    streaming_attention,
    temperature,
)
from longlens.interventions.positions import ms_poe, set_based
from longlens.measure.capture import capture
from longlens.measure.statistics import Entropy, Received, Rows, SpanMass

N = 40
ROTARY = [name for name in CAUSAL if name not in ("gpt2", "opt", "deepseek_v3")]


class Keep(Intervention):
    "Keeps every call and its output, per layer"
    name = "keep"

    def __init__(self) -> None: self.__dict__["seen"] = {}

    def describe(self) -> dict: return {"intervention": "keep"}

    def after(self, call, out, layer):
        self.seen[layer] = call, out
        return out


def formed(call, layer_mask=None) -> torch.Tensor:
    "The pattern of a call, formed from its queries and keys, (batch, heads, n_queries, n_keys)"
    return call.operator().dense()


@pytest.mark.parametrize("name", CAUSAL + ENCODERS)
@torch.no_grad()
def test_nothing_is_left_behind(name: str) -> None:
    model, ids = zoo_model(name), token_ids(N)
    before = model(ids)[0]
    heads = [(0, 0)]
    with ablate(model, heads), temperature(model, .7): changed = model(ids)[0]
    assert (changed - before).abs().max() > 1e-4
    with pytest.raises(RuntimeError, match="stop"), ablate(model, heads): raise RuntimeError("stop")
    assert torch.equal(model(ids)[0], before)
    assert not attachments()


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_streaming_hides_the_middle_and_nothing_else(name: str) -> None:
    "Against the pattern of the same layer: weights of what stays, normalised again"
    model, ids = zoo_model(name), token_ids(N)
    _, n_heads, _ = head_sizes(model)
    sink, recent, mine = 3, 9, [0, n_heads - 1]
    plain, streamed = Keep(), Keep()
    with intervene(model, plain): model(ids)
    with intervene(model, Streaming(sink, recent, [(0, h) for h in mine]), streamed): model(ids)
    want, got = formed(plain.seen[0][0]), formed(streamed.seen[0][0])
    i, j = torch.arange(N)[:, None], torch.arange(N)
    hidden = ~((i - j < recent) | (j < sink))
    call = plain.seen[0][0]
    for h in range(n_heads):
        if h not in mine:
            torch.testing.assert_close(got[:, h], want[:, h], atol=1e-5, rtol=1e-4)
            continue
        assert (got[:, h].masked_select(hidden) == 0).all()
        part = want[:, h].masked_fill(hidden, 0)
        gone = want[:, h].masked_fill(~hidden, 0).sum(-1, keepdim=True)
        torch.testing.assert_close(got[:, h], part / (1 - gone), atol=1e-5, rtol=1e-3)  # a learned sink keeps its share
    v = call.v.repeat_interleave(n_heads // call.v.shape[1], 1)
    torch.testing.assert_close(streamed.seen[0][1], got @ v, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_streaming_in_pieces_and_padded(name: str) -> None:
    model, ids = zoo_model(name), token_ids(N)
    with streaming_attention(model, sink=2, recent=8):
        whole, cache = model(ids).logits, DynamicCache(config=model.config)
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 15), (15, 31), (31, 32), (32, N))]
        padded = torch.cat([ids.new_zeros(1, 6), ids], 1)
        keep = torch.ones_like(padded)
        keep[:, :6] = 0
        at = (keep.cumsum(1) - 1).clamp(min=0)
        kw = {} if name == "opt" else {"position_ids": at}
        left = model(padded, attention_mask=keep, **kw).logits[:, 6:]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(left, whole, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", CAUSAL + ENCODERS)
@torch.no_grad()
def test_uniform_attention_is_uniform(name: str) -> None:
    model, ids = zoo_model(name), token_ids(N)
    with ablate(model, [(1, 1)], "uniform"), capture(model, Entropy(queries=[5, 20])) as seen: model(ids)
    f = seen.frame("entropy").filter(layer=1)
    if name == "gpt_oss": return  # the learned sink takes its share
    assert f["entropy_norm"][1] == pytest.approx(1, abs=1e-4)
    assert f["entropy_norm"][0] < .9999


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_temperature_divides_all_logits(name: str) -> None:
    model, ids, tau = zoo_model(name), token_ids(N), .6
    plain, cold = Keep(), Keep()
    with intervene(model, plain): model(ids)
    with temperature(model, tau), intervene(model, cold): model(ids)
    p, got = formed(plain.seen[0][0]).double(), formed(cold.seen[0][0]).double()
    sink = (1 - p.sum(-1, keepdim=True)).clamp_min(0) if plain.seen[0][0].sinks is not None else torch.zeros_like(p[..., :1])
    powered = torch.cat([p, sink], -1) ** (1 / tau)  # softmax(s / tau) is p^(1/tau), normalised again
    want = (powered / powered.sum(-1, keepdim=True))[..., :-1]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("name", [n for n in CAUSAL if n != "gemma2"])
@torch.no_grad()
def test_scaled_spans(name: str) -> None:
    model, ids, c = zoo_model(name), token_ids(N), 2.5
    plain, scaled = Keep(), Keep()
    with intervene(model, plain): model(ids)
    with scale_spans(model, {"a": range(4, 9), "b": (20, 23)}, {"a": c, "b": 0}, heads=[(0, 1)]), intervene(model, scaled): model(ids)
    p, got = formed(plain.seen[0][0]), formed(scaled.seen[0][0])
    w = torch.ones(N)
    w[4:9], w[20:23] = c, 0
    sink = (1 - p[:, 1].sum(-1, keepdim=True)).clamp_min(0)
    want = p[:, 1] * w
    torch.testing.assert_close(got[:, 1], want / (want.sum(-1, keepdim=True) + sink), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(got[:, 0], p[:, 0], atol=1e-5, rtol=1e-3)


def test_soft_capped_spans_are_refused() -> None:
    model = zoo_model("gemma2")
    with scale_spans(model, {"a": (1, 3)}, 2.), pytest.raises(UnsupportedModel, match="soft-capped"): model(token_ids(N))


@pytest.mark.parametrize("name", ROTARY)
@torch.no_grad()
def test_positions_can_be_turned_back(name: str) -> None:
    "With all rotations undone, a model gives the same scores as one that was run at position 0 throughout"
    model, ids = zoo_model(name), token_ids(N)
    here, there = Keep(), Keep()
    with intervene(model, here): model(ids)
    with intervene(model, there): model(ids, position_ids=torch.zeros(1, N, dtype=torch.long))
    turner, back = Turner(model), -torch.arange(N)[None]
    for layer in (0,):
        a, b = here.seen[layer][0], there.seen[layer][0]
        torch.testing.assert_close(turner.turn(a, layer, a.q, back), b.q, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(turner.turn(a, layer, a.k, back), b.k, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ROTARY)
@torch.no_grad()
def test_lambda_mask_in_pieces(name: str) -> None:
    model, ids = zoo_model(name), token_ids(N)
    with lambda_mask(model, sink=3, recent=8, ceiling=8), capture(model, Received()) as seen:
        whole, cache = model(ids).logits, DynamicCache(config=model.config)
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 15), (15, 39), (39, N))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-3)
    a, b = (seen.frame("received").filter(sample=s).drop("sample") for s in (0, 1))
    assert (a["received"] - b["received"]).abs().max() < 1e-3


def dynamic(name: str):
    "A model of the zoo whose rotary frequencies grow with the text beyond its trained length"
    model = zoo_model(name)
    config = copy.deepcopy(model.config)
    rope = config.rope_parameters
    (rope if "rope_type" in rope else rope["full_attention"]).update(rope_type="dynamic", factor=2.)
    built = type(model)(config).eval()
    built.load_state_dict(model.state_dict())
    return built


def frequencies(model) -> dict[str, torch.Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if name.endswith("inv_freq") and "original" not in name}


def rotated_back(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    "Queries or keys before the rotation of their first dimensions, as many as there are angles"
    d = cos.shape[-1]
    x, rest = x[..., :d], x[..., d:]
    return torch.cat([x * cos - torch.cat([-x[..., d // 2:], x[..., :d // 2]], -1) * sin, rest], -1)


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3"])
@torch.no_grad()
def test_distances_do_not_set_dynamic_frequencies_back(name: str) -> None:
    "Beyond the trained length, first tokens are unrotated by the frequencies that rotated them, in all layers"
    model, ids, at, ceiling, seen = dynamic(name), token_ids(POSITIONS + 40), torch.arange(POSITIONS + 40)[None], 30, Keep()
    short = frequencies(model)
    model(ids)
    used = frequencies(model)
    assert any((x != short[name]).any() for name, x in used.items())
    with lambda_mask(model, 6, 20, ceiling), intervene(model, seen): model(ids)
    assert all(torch.equal(x, used[name]) for name, x in frequencies(model).items())
    kinds = model.config.layer_types if name == "gemma3" else [None] * len(seen.seen)
    for layer, (call, _) in seen.seen.items():
        cos, sin = model.model.rotary_emb(call.q, at, *[kinds[layer]] * (name == "gemma3"))  # as in the forward: up to the last token
        far_q, far_k = call.streams[0].far
        torch.testing.assert_close(far_k, rotated_back(call.k, cos, sin), atol=1e-4, rtol=1e-3)
        capped = (x[:, at[0].clamp_max(ceiling)] for x in (cos, sin))
        torch.testing.assert_close(rotated_back(far_q, *capped), rotated_back(call.q, cos, sin), atol=1e-4, rtol=1e-3)


TURNING = {"lambda_mask": lambda m: lambda_mask(m, 2, 8), "ms_poe": lambda m: ms_poe(m, first_layer=0),
           "set_based": lambda m: set_based(m, [(4, 9), (9, 16)])}


@pytest.mark.parametrize("pair", list(combinations_with_replacement(TURNING, 2)), ids="-".join)
@torch.no_grad()
def test_only_one_changes_positions(pair: tuple[str, str]) -> None:
    "In either order; the model is free again afterwards"
    model, ids = zoo_model("llama"), token_ids(N)
    before = model(ids).logits
    for first, second in (pair, pair[::-1]):
        with ExitStack() as stack:
            for one in (first, second): stack.enter_context(TURNING[one](model))
            with pytest.raises(UnsupportedModel, match=f"{first} and {second} change positions of the same layer: use one"): model(ids)
        with TURNING[first](model): model(ids)
    assert torch.equal(model(ids).logits, before) and not attachments()


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3"])
@torch.no_grad()
def test_scaled_spans_inside_lambda_mask(name: str) -> None:
    "First tokens that stand at the ceiling are scaled as all others; before lambda_mask, scale_spans is refused"
    model, ids, c = zoo_model(name), token_ids(N), 2.5
    plain, scaled = Keep(), Keep()
    with lambda_mask(model, 4, 9, 12), intervene(model, plain): model(ids)
    with lambda_mask(model, 4, 9, 12), scale_spans(model, {"a": (1, 3), "b": (33, 36)}, c, heads=[(0, 1)]), intervene(model, scaled):
        model(ids)
    p, got, w = formed(plain.seen[0][0]), formed(scaled.seen[0][0]), torch.ones(N)
    w[1:3] = w[33:36] = c
    want = p[:, 1] * w
    torch.testing.assert_close(got[:, 1], want / want.sum(-1, keepdim=True), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(got[:, 0], p[:, 0], atol=1e-5, rtol=1e-3)
    v = scaled.seen[0][0].v.repeat_interleave(4 // scaled.seen[0][0].v.shape[1], 1)
    torch.testing.assert_close(scaled.seen[0][1], got @ v, atol=1e-4, rtol=1e-3)
    with scale_spans(model, {"a": (1, 3)}, 2.), lambda_mask(model, 4, 9), pytest.raises(UnsupportedModel, match="enter scale_spans after"):
        model(ids)


@pytest.mark.parametrize("name", ["gpt2", "opt", "deepseek_v3"])
def test_lambda_mask_needs_rotary_positions(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="no rotary module"), lambda_mask(zoo_model(name)): pass


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_cannot_stream(name: str) -> None:
    model = zoo_model(name)
    with streaming_attention(model, 2, 8), pytest.raises(UnsupportedModel, match="not causal"): model(token_ids(N))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_same_ablation_through_transformer_lens(name: str) -> None:
    pytest.importorskip("transformer_lens", reason="TransformerLens is not installed: pip install longlens[bridge]")
    lm, ids = ll.load(zoo_model(name)), token_ids(N)
    _, _, n_kv = head_sizes(lm)
    for heads in ([(0, 1)], [(1, 0), (1, 2), (0, 3)]):
        def silence(z, hook, heads=heads):
            for layer, h in heads:
                if layer == hook.layer(): z[:, :, h] = 0
            return z
        hooks = [(f"blocks.{layer}.attn.hook_z", silence) for layer in {a for a, _ in heads}]
        want = lm.bridge.run_with_hooks(ids, fwd_hooks=hooks)
        with ablate(lm, heads): got = lm.hf(ids).logits
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert n_kv <= 4


@torch.no_grad()
def test_means_ignore_padding() -> None:
    model, ids = zoo_model("llama"), token_ids(20)
    padded = torch.cat([ids, ids.new_zeros(1, 5)], 1)
    want = mean_outputs(model, ids)
    keep = Keep()
    with intervene(model, keep): model(ids)
    torch.testing.assert_close(want[1], keep.seen[1][1][0].mean(1), atol=1e-5, rtol=1e-4)
    from longlens.interventions.heads import _Sum
    add = _Sum()
    mask = torch.ones_like(padded)
    mask[:, 20:] = 0
    with intervene(model, add): model(padded, attention_mask=mask)
    torch.testing.assert_close(add.total[0] / add.count[0], want[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_query_heads_and_kv_heads_are_not_confused() -> None:
    model, ids = zoo_model("llama"), token_ids(N)
    _, n_heads, n_kv = head_sizes(model)
    assert n_heads > n_kv
    spans = SpanMass({"middle": (4, 25)}, queries=[N - 1])
    with streaming_attention(model, 2, 8, kv_heads=[(1, n_kv - 1)]), capture(model, spans) as by_kv: model(ids)
    with streaming_attention(model, 2, 8, heads=served_heads(model, [(1, n_kv - 1)])), capture(model, spans) as by_head: model(ids)
    hidden = [h for h, m in by_kv.frame("span_mass").filter(layer=1).select("head", "mass").iter_rows() if m == 0]
    assert hidden == list(range(n_heads - n_heads // n_kv, n_heads))
    assert by_kv.frame("span_mass").equals(by_head.frame("span_mass"))
    with pytest.raises(IndexError, match="kv_heads 0 to"): check_heads(model, [(0, n_kv)], "kv_head")
    with pytest.raises(ValueError, match="not both"), streaming_attention(model, 2, 8, heads=[(0, 0)], kv_heads=[(0, 0)]): pass


@torch.no_grad()
def test_order_of_leaving_does_not_matter() -> None:
    model, ids = zoo_model("llama"), token_ids(N)
    before = model(ids).logits
    a, b = ablate(model, [(0, 1)]), streaming_attention(model, 2, 8)
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    with streaming_attention(model, 2, 8): pass  # one more on top leaves
    only_b = model(ids).logits
    b.__exit__(None, None, None)
    with streaming_attention(model, 2, 8): assert torch.equal(model(ids).logits, only_b)
    assert torch.equal(model(ids).logits, before) and not interventions(model)


@torch.no_grad()
def test_an_intervention_that_did_not_happen_is_an_error() -> None:
    model, ids = zoo_model("llama"), token_ids(N)
    with ablate(model, [(0, 1)]):
        model.set_attn_implementation("sdpa")  # someone takes the model away
        with pytest.raises(UnsupportedModel, match="could not change it"): model(ids)


@pytest.mark.parametrize("what, match", [
    (lambda: Ablate([(0, 0)], "mean"), "reference="), (lambda: Streaming(-1, 4), "sink -1"), (lambda: Streaming(0, 0), "recent 0"),
    (lambda: LambdaMask(0, 4), "1 token or more")])
def test_bad_settings(what, match: str) -> None:
    with pytest.raises(ValueError, match=match), intervene(zoo_model("llama"), what()): pass


@torch.no_grad()
def test_rows_of_streaming_heads_sum_to_one_with_all_statistics() -> None:
    model, ids = zoo_model("qwen3"), token_ids(N)
    with streaming_attention(model, 2, 8), temperature(model, 1.3), capture(model, Rows([10, 39], top=None), Received()) as seen: model(ids)
    total = seen.frame("rows").group_by("layer", "head", "query").sum()["weight"]
    assert (total - 1).abs().max() < 1e-5
    received = seen.frame("received").group_by("layer", "head").sum()["received"]
    assert (received - N).abs().max() < 1e-3
