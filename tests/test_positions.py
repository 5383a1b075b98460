"""Interventions on positions and documents, against references made by other means"""
from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache
from zoo import CAUSAL, EVERYTHING, LAYERS, VOCAB, ZOO, token_ids, zoo_model

import longlens as ll
from longlens.attention import kernels, streams
from longlens.attention.backends import attend_blocked
from longlens.attention.hf_interface import UnsupportedModel, attachments
from longlens.attention.kernels import attend
from longlens.attention.logits import AttentionCall, make_call
from longlens.attention.masks import Mask, positions, visible_tile
from longlens.attention.options import OptionRule
from longlens.interventions.base import Intervention, intervene, interventions
from longlens.interventions.calibrate import Redistribute, redistribute, redistributed_masses
from longlens.interventions.distances import ByDimension, DualChunk, ReRoPE, key_dimensions
from longlens.interventions.extend import SelfExtend
from longlens.interventions.heads import LambdaMask, Turner, ablate, lambda_mask, scale_spans, streaming_attention, temperature
from longlens.interventions.methods import position_method
from longlens.interventions.moved import E2, Jittered
from longlens.interventions.positions import POSITION_SCALINGS, MsPoE, SetBased, ms_poe, rescaled_positions, set_based
from longlens.interventions.weights import Sharpened
from longlens.measure.capture import capture
from longlens.measure.statistics import Received, Rows, SinkMass
from longlens.models.architecture import layers_without_positions
from longlens.models.prefix import new_cache

N = 40
UNSCALED = [name for name in CAUSAL if name not in ("gpt2", "opt", "gpt_oss")]  # whose positions can be rescaled
ROTARY = [name for name in CAUSAL if name not in ("gpt2", "opt", "deepseek_v3")]  # whose positions can be turned


class Keep(Intervention):
    "Keeps every call as it is given here, and every output, per layer"
    name = "keep"

    def __init__(self) -> None: self.__dict__.update(calls={}, outs={}, final={})

    def describe(self) -> dict: return {"intervention": "keep"}

    def before(self, call, layer):
        self.calls[layer] = call
        return call

    def after(self, call, out, layer):
        self.outs[layer], self.final[layer] = out, call
        return out


def in_pieces(model, ids, cuts, cache=None):
    "Logits of a text that is read in pieces over a cache"
    cache = DynamicCache(config=model.config) if cache is None else cache
    edges = [0, *cuts, ids.shape[1]]
    return torch.cat([model(ids[:, a:b], past_key_values=cache).logits for a, b in pairwise(edges)], 1)


def left_padded(ids, n=6):
    "Ids with padding before them, and the other arguments of the model"
    padded = torch.cat([ids.new_zeros(1, n), ids], 1)
    keep = torch.ones_like(padded)
    keep[:, :n] = 0
    return {"input_ids": padded, "attention_mask": keep, "position_ids": (keep.cumsum(1) - 1).clamp(min=0)}


def close(a, b, scale=1.): torch.testing.assert_close(a, b, atol=1e-4 * scale, rtol=1e-3)


# Ms-PoE


def rotated_by_model(model, call, layer, x, at):
    "x (n, d), unrotated, rotated to positions (n,) by the model's own rotary module"
    turner = Turner(model)
    cos, sin = turner.angles(x[None, None], at[None], layer)
    import sys
    apply = sys.modules[type(call.module).__module__].apply_rotary_pos_emb
    return apply(x[None, None], x[None, None], cos, sin)[0][0, 0]


@pytest.mark.parametrize("name", ROTARY)
@torch.no_grad()
def test_heads_read_positions_divided_by_their_ratio(name: str) -> None:
    "Every head by itself, from unrotated queries and keys; and the order from formed weights"
    model, ids = zoo_model(name), token_ids(N)
    before, after = Keep(), Keep()
    with intervene(model, before), ms_poe(model, first_layer=0) as (poe,), intervene(model, after): model(ids)
    turner, back, at = Turner(model), -torch.arange(N)[None], torch.arange(N)
    for layer, call in before.calls.items():
        heads, group = call.q.shape[1], call.q.shape[1] // call.k.shape[1]
        q, k = (turner.turn(call, layer, x, back) for x in (call.q, call.k))
        unrotated = call.operator().__class__(q, k, None, call.scale, call.mask, call.softcap, None).dense()[0, :, -1]  # (heads, keys)
        seen = unrotated.gt(0) if call.mask.left is None else at >= N - 1 - call.mask.left
        n_seen = int(seen.sum(-1).flatten()[0]) if call.mask.left is not None else N
        share = (unrotated > 3 / n_seen).float().sum(-1) / n_seen
        order = share.argsort(dim=-1, descending=True, stable=True).tolist()
        assert order == poe.read[layer].order[0].tolist()
        want = after.final[layer]
        assert want.q.shape[1] == want.k.shape[1] == want.v.shape[1] == heads
        for h in range(heads):
            here = at / (1.2 + .6 * order.index(h) / heads)
            close(want.q[0, h], rotated_by_model(model, call, layer, q[0, h], here))
            close(want.k[0, h], rotated_by_model(model, call, layer, k[0, h // group], here))


@pytest.mark.parametrize("name", ROTARY)
@torch.no_grad()
def test_ms_poe_goes_on_over_a_cache(name: str) -> None:
    "Prompt and decoding are one forward with the order that the prompt gave; a new text gets its own"
    model, ids = zoo_model(name), token_ids(N)
    with ms_poe(model, first_layer=1) as (poe,):
        model(token_ids(20, seed=3))
        parts = in_pieces(model, ids, (30, 37, 38, 39))
        found = {layer: r.order[0].tolist() for layer, r in poe.read.items()}
    assert set(found) == set(range(1, model.config.num_hidden_layers))
    with ms_poe(model, first_layer=1, order=found):
        whole = model(ids).logits
        close(model(**left_padded(ids)).logits[:, 6:], whole)
    close(parts, whole)
    assert (whole - model(ids).logits).abs().max() > 1e-3


@torch.no_grad()
def test_every_text_of_a_batch_has_its_own_order() -> None:
    model, ids = zoo_model("llama"), token_ids(N, batch=4)
    with ms_poe(model, first_layer=0) as (poe,):
        together = in_pieces(model, ids, (30,))
        orders = {tuple(o) for o in poe.read[1].order.tolist()}
        alone = torch.cat([in_pieces(model, ids[i:i + 1], (30,)) for i in range(4)])
    assert len(orders) > 1
    close(together, alone)


@torch.no_grad()
def test_a_text_that_ms_poe_did_not_read_last_is_refused() -> None:
    lm, ids = ll.load(zoo_model("llama")), token_ids(N, batch=2)
    outside = lm.prefill(ids[0])
    with ms_poe(lm, first_layer=0):
        with pytest.raises(ValueError, match="read it from its beginning"): outside.extend([5])
        one = lm.prefill(ids[0])
        want = one.logits_after([5, 6])
        other = lm.prefill(ids[1])
        with pytest.raises(ValueError, match="did not read last"): one.extend([5])
        close(other.logits_after([5, 6])[1:], other.extend([5]).logits_after([6]))
        again = lm.prefill(ids[0])
        close(again.logits_after([5, 6]), want)
        cache = again.fork(2)  # two continuations of one text
        close(lm.hf(torch.tensor([[5, 6], [5, 6]]), past_key_values=cache).logits[1], want)
        with pytest.raises(ValueError, match="padded"): lm([lm.tokens(ids[0]), lm.tokens(ids[1, :30])])


@torch.no_grad()
def test_ms_poe_in_half_precision() -> None:
    model, ids = copy.deepcopy(zoo_model("qwen3")), token_ids(N)
    order = {layer: range(4) for layer in range(LAYERS)}
    with ms_poe(model, first_layer=0, order=order): want = model(ids).logits
    plain = model(ids).logits
    model.to(torch.bfloat16)
    with ms_poe(model, first_layer=0, order=order): got = model(ids).logits.float()
    off, plain_off = (got - want).norm() / want.norm(), (model(ids).logits.float() - plain).norm() / plain.norm()
    assert off < 1.5 * plain_off


@pytest.mark.parametrize("kw, match", [
    (dict(first_layer=LAYERS), "the model has layers 0 to 1"), (dict(low=0., first_layer=0), "low is above 0"),
    (dict(low=2., first_layer=0), "high is not below low"),
    (dict(order={0: [0, 1, 2, 3], 1: [0, 1, 2, 2]}, first_layer=0), "order of layer 1")])
def test_bad_settings_of_ms_poe(kw: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match), ms_poe(zoo_model("llama"), **kw): pass


# Set-based prompting

A, D = token_ids(6, seed=11)[0], token_ids(9, seed=12)[0]


def joined(options, order, head=A, tail=D):
    "A prompt with its options in some order, and their spans"
    edges = torch.tensor([len(head), *(len(options[i]) for i in order)]).cumsum(0).tolist()
    return torch.cat([head, *(options[i] for i in order), tail])[None], [range(a, b) for a, b in pairwise(edges)]


def after_options(model, options, order):
    ids, spans = joined(options, order)
    with torch.no_grad(), set_based(model, spans): return model(ids).logits[0, -len(D):]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), name=st.sampled_from(ROTARY))
def test_the_order_of_options_does_not_matter(data, name: str) -> None:
    lengths = data.draw(st.lists(st.integers(1, 11), min_size=2, max_size=5))
    order = data.draw(st.permutations(range(len(lengths))))
    options = [token_ids(n, seed=20 + i)[0] for i, n in enumerate(lengths)]
    same, other = (after_options(zoo_model(name), options, o) for o in (range(len(lengths)), order))
    assert (same - other).abs().max() <= 1e-5 * max(1, float(same.abs().max()))


@pytest.mark.parametrize("name", ROTARY)
@torch.no_grad()
def test_without_it_the_order_matters(name: str) -> None:
    options = [token_ids(n, seed=20 + i)[0] for i, n in enumerate((3, 5, 4))]
    same, other = (zoo_model(name)(joined(options, o)[0]).logits[0, -len(D):] for o in ((0, 1, 2), (2, 0, 1)))
    assert (same - other).abs().max() > .01


BLOCKS = [[(4, 9), (9, 11), (11, 18)], [(20, 24), (24, 25)]]


def set_reference(name: str, ids: torch.Tensor, blocks) -> torch.Tensor:
    "A plain eager forward with position ids and 4-D masks of its own"
    n, at, seen = ids.shape[1], list(range(ids.shape[1])), torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    for block in blocks:
        start, longest, stop = at[block[0][0]], max(b - a for a, b in block), block[-1][1]
        for a, b in block:
            at[a:b] = range(start, start + b - a)
            for c, d in block:
                if (a, b) != (c, d): seen[a:b, c:d] = False
        at[stop:] = range(start + longest, start + longest + n - stop)
    here = torch.tensor(at)
    model = ZOO[name]()
    model.set_attn_implementation("eager")
    window = getattr(model.config, "sliding_window", None)
    near = seen if window is None else seen & (here[:, None] - here < window)

    def added(m): return torch.zeros(1, 1, n, n).masked_fill(~m, torch.finfo(torch.float32).min)
    types = getattr(model.config, "layer_types", None)
    mask = added(near if name == "mistral" else seen)
    if types: mask = {t: added(near if t == "sliding_attention" else seen) for t in types}
    return model(ids, attention_mask=mask, position_ids=here[None]).logits


@pytest.mark.parametrize("name", ROTARY)
@torch.no_grad()
def test_set_based_is_a_forward_with_these_positions_and_this_mask(name: str) -> None:
    model, ids = zoo_model(name), token_ids(N)
    with set_based(model, BLOCKS):
        whole = model(ids).logits
        close(whole, set_reference(name, ids, BLOCKS), 3)
        close(in_pieces(model, ids, (10, 23, 38, 39), new_cache(model.config, "all")), whole)
        close(model(**left_padded(ids)).logits[:, 6:], whole)
        right = torch.cat([ids, ids.new_zeros(1, 5)], 1)
        both = torch.cat([right, torch.cat([ids, ids[:, :5]], 1)])
        close(model(both, attention_mask=torch.tensor([[1] * N + [0] * 5, [1] * (N + 5)])).logits[:, :N], whole.expand(2, -1, -1))


@torch.no_grad()
def test_a_cache_that_dropped_what_the_window_sees_is_refused() -> None:
    model, ids = zoo_model("mistral"), token_ids(N)
    with set_based(model, [(4, 9), (9, 16)]):
        whole = model(ids).logits
        cache = DynamicCache(config=model.config)
        with pytest.raises(UnsupportedModel, match="the cache has dropped its first"): in_pieces(model, ids, (17, 18, 19), cache)
        close(in_pieces(model, ids, (30, 35), DynamicCache(config=model.config)), whole)  # by then they are out of sight
    with set_based(model, [(8, 22), (22, 34)]), pytest.raises(UnsupportedModel, match="the cache has dropped its first"):
        in_pieces(model, ids[:, :30], (20,))  # the first query of the second chunk has all it sees, and a later one has not


@torch.no_grad()
def test_what_set_based_cannot_do() -> None:
    model, ids = zoo_model("llama"), token_ids(N)
    spans = [(4, 9), (9, 16)]
    with set_based(model, spans):
        with pytest.raises(UnsupportedModel, match="4-D tensor"): model(ids, attention_mask=torch.ones(1, 1, N, N).tril().bool())
        with streaming_attention(model, 2, 8), pytest.raises(UnsupportedModel, match="stream"): model(ids)
    with streaming_attention(model, 2, 8), set_based(model, spans), pytest.raises(UnsupportedModel, match="stream"): model(ids)
    for other in (lambda_mask(model, 2, 8), ms_poe(model, first_layer=0)):
        with other, set_based(model, spans), pytest.raises(UnsupportedModel, match="change positions of the same layer"): model(ids)
    with scale_spans(model, {"a": (4, 9)}, 2.), set_based(model, spans), pytest.raises(UnsupportedModel, match="enter scale_spans after"):
        model(ids)
    with set_based(model, spans), scale_spans(model, {"a": (4, 9)}, 2.): model(ids)
    with set_based(zoo_model("modernbert"), spans), pytest.raises(UnsupportedModel, match="not causal"): zoo_model("modernbert")(ids)
    for name in ("gpt2", "deepseek_v3"):
        with pytest.raises(UnsupportedModel, match="no rotary module"), set_based(zoo_model(name), spans): pass
    for bad, match in (([], "needs the options"), ([(4, 9), (11, 12)], "tokens 9 to 10 stand between"), ([(4, 9), (8, 12)], "overlap"),
                       ([(4, 4)], "at least one token"), ([[(4, 9)], [(8, 12)]], "the blocks")):
        with pytest.raises(ValueError, match=match), set_based(model, bad): pass


# Options in the kernels


@st.composite
def option_calls(draw, dtypes=(torch.float32, torch.float64)) -> AttentionCall:
    "Queries anywhere in a text with blocks of options: cached, padded, with room for keys to come, with what kernels cannot do"
    g, dtype = torch.Generator().manual_seed(draw(st.integers(0, 2**31))), draw(st.sampled_from(dtypes))
    batch, kv, group, d = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 9))
    blocks, end = [], 0
    for lengths in draw(st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=4), min_size=1, max_size=3)):
        edges = torch.tensor([end + draw(st.integers(0, 6)), *lengths]).cumsum(0).tolist()
        blocks.append(tuple(pairwise(edges)))
        end = edges[-1]
    past, n = draw(st.integers(0, end + 3)), draw(st.integers(1, end + 6))
    n_k = past + n + draw(st.integers(0, 2))
    edge, holes = torch.tensor([[draw(st.integers(0, n_k))] for _ in range(batch)]), torch.rand(batch, n_k, generator=g) < .7
    keep = draw(st.sampled_from([None, torch.arange(n_k) >= edge, torch.arange(n_k) < edge, holes]))
    at = None if keep is None else positions(Mask(keep=keep), n_k)
    also = draw(st.sampled_from([None, None, None, lambda b, h, q, k: (q - k) % 3 != 1]))
    mask = Mask(draw(st.none() | st.none() | st.integers(0, 20)), 0, past, keep, OptionRule(tuple(blocks), at, also=also))

    def make(heads: int, m: int) -> torch.Tensor:
        return (torch.randn(batch, heads, m, d, generator=g) * draw(st.sampled_from([.5, 3.]))).to(dtype)
    cap = draw(st.none() | st.none() | st.just(3.))
    return make_call(make(kv * group, n), make(kv, n_k), make(kv, n_k), .4, mask, cap)


def seen_by_hand(m: Mask, batch: int, n: int, n_k: int) -> torch.Tensor:
    "Who sees whom, pair by pair, from the definition, (batch, n, n_k)"
    seen, rule = torch.zeros(batch, n, n_k, dtype=torch.bool), m.rule
    option = {p: (i, j) for i, block in enumerate(rule.blocks) for j, (a, b) in enumerate(block) for p in range(a, b)}
    for s in range(batch):
        keep = [True] * n_k if m.keep is None else m.keep[s].tolist()
        at = [sum(keep[:j]) for j in range(n_k)]  # tokens before it, padding aside
        for i in range(n):
            for j in range(m.offset + i + 1):
                a, b = option.get(at[m.offset + i]), option.get(at[j])
                hidden = a is not None and b is not None and a[0] == b[0] and a != b
                near = m.left is None or m.offset + i - j <= m.left
                also = rule.also is None or bool(rule.also(s, 0, m.offset + i, j))
                seen[s, i, j] = keep[m.offset + i] and keep[j] and near and also and not hidden
    return seen


@settings(max_examples=150, deadline=None)
@given(call=option_calls())
def test_kernels_see_of_options_what_the_rule_says(call) -> None:
    "Two ways to the same: the fused kernels by the blocks, and the tiles by the rule; and both by the definition"
    s, v = call, call.values
    (batch, _, n, _), n_k = s.q.shape, s.k.shape[2]
    out, lse = attend(s.q, s.k, v, s.scale, s.mask, s.softcap)
    by_rule = attend_blocked(call)
    for got, want in zip((out, lse), by_rule, strict=True): torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    seen = seen_by_hand(s.mask, batch, n, n_k)
    for b in range(batch):
        tile = visible_tile(s.mask, b, slice(0, 1), range(n), range(n_k), torch.device("cpu"))
        own = seen[b].any(-1, keepdim=True) | (s.mask.keep is None or s.mask.keep[b, s.mask.offset:s.mask.offset + n, None])
        assert torch.equal(tile & own, seen[b])
    x = s.q.double() @ s.k.double().repeat_interleave(s.group, 1).mT * s.scale
    if s.softcap: x = s.softcap * torch.tanh(x / s.softcap)
    x = x.masked_fill(~seen[:, None], -torch.inf)
    torch.testing.assert_close(lse.double(), x.logsumexp(-1), atol=2e-5, rtol=1e-5)
    want = x.softmax(-1).nan_to_num() @ v.double().repeat_interleave(s.group, 1)
    torch.testing.assert_close(out.double(), want, atol=5e-5, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(call=option_calls(), cuts=st.lists(st.integers(1, 30), max_size=3))
def test_chunks_of_queries_among_options(call, cuts) -> None:
    s, v = call, call.values
    n = s.q.shape[2]
    whole, edges = attend(s.q, s.k, v, s.scale, s.mask, s.softcap), sorted({0, n, *(c for c in cuts if c < n)})
    parts = [attend(s.q[:, :, a:b], s.k, v, s.scale, replace(s.mask, offset=s.mask.offset + a), s.softcap) for a, b in pairwise(edges)]
    for got, want in zip(zip(*parts, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.cat(got, 2), want, atol=2e-5, rtol=1e-5)


def test_gradients_and_half_precision_among_options() -> None:
    "A kernel's log-sum-exp carries no gradient: a call that needs one goes by the rule"
    g, rule = torch.Generator().manual_seed(0), OptionRule((((3, 8), (8, 10)), ((12, 13), (13, 17))))
    q, k, v = (torch.randn(1, h, 20, 8, generator=g, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    seen = seen_by_hand(Mask(rule=rule), 1, 20, 20)
    x = (q @ k.repeat_interleave(2, 1).mT * 8**-.5).masked_fill(~seen[:, None], -torch.inf)
    formed = x.softmax(-1) @ v.repeat_interleave(2, 1)
    out, lse = attend(q, k, v, mask=Mask(rule=rule))
    want = torch.autograd.grad(formed.square().sum(), (q, k, v))
    for a, b in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), want, strict=True): torch.testing.assert_close(a, b)
    assert not lse.requires_grad
    with torch.no_grad():
        for dtype, tol in ((torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
            out, lse = attend(*(t.to(dtype) for t in (q, k, v)), mask=Mask(rule=rule))
            assert out.dtype == dtype
            torch.testing.assert_close(out.double(), formed, atol=tol, rtol=tol)
            torch.testing.assert_close(lse.double(), x.logsumexp(-1), atol=tol, rtol=tol)


PLAIN = [name for name in ROTARY if name not in ("mistral", "gemma2", "gemma3", "gpt_oss")]  # without windows and soft caps


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_options_of_plain_layers_go_by_the_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    "Whole, in pieces, one token at a time, padded: with the blocked path taken away"
    model, ids = zoo_model(name), token_ids(N)
    with set_based(model, BLOCKS): want = model(ids).logits

    def refuse(*_): raise AssertionError("the blocked path was taken")
    for module in (kernels, streams): monkeypatch.setattr(module, "attend_blocked", refuse)
    with set_based(model, BLOCKS):
        close(model(ids).logits, want)
        close(in_pieces(model, ids, (10, 23, 38, 39)), want)
        close(in_pieces(model, ids, range(1, N)), want)
        close(model(**left_padded(ids)).logits[:, 6:], want)
        with temperature(model, .7), scale_spans(model, {"a": (4, 9)}, 2.): model(ids)


@torch.no_grad()
def test_layers_with_learned_sinks_among_options() -> None:
    "The sink joins the denominator after the parts are merged"
    model, ids, seen = zoo_model("gpt_oss"), token_ids(N), Keep()
    with set_based(model, BLOCKS), intervene(model, seen): model(ids)
    call = next(c for c in seen.final.values() if c.mask.left is None)
    close(call.attend()[0], attend(call.q, call.k, call.v, call.scale, replace(call.mask, rule=seen_by_hand(call.mask, 1, N, N)[:, None]),
                                   sinks=call.sinks)[0])
    assert call.sinks is not None


@torch.no_grad()
def test_statistics_see_the_rule() -> None:
    "What is captured while the kernels go by the blocks is the pattern of the mask, options hidden"
    model, ids, seen = zoo_model("llama"), token_ids(N), Keep()
    with set_based(model, BLOCKS), intervene(model, seen), capture(model, Rows(range(N), top=None), Received()) as got: model(ids)
    for layer, call in seen.final.items():
        assert isinstance(call.mask.rule, OptionRule) and (call.mask.left, call.mask.right, call.mask.keep) == (None, 0, None)
        visible = seen_by_hand(call.mask, 1, N, N)[0]
        x = (call.q @ call.k.repeat_interleave(2, 1).mT * call.scale)[0].masked_fill(~visible, -torch.inf)
        pattern = x.softmax(-1)
        rows = got.frame("rows").filter(layer=layer)
        weights = torch.zeros(4, N, N)
        weights[tuple(rows[c].to_torch().long() for c in ("head", "query", "position"))] = rows["weight"].to_torch().float()
        torch.testing.assert_close(weights, pattern, atol=1e-5, rtol=1e-4)
        assert (weights[:, ~visible] == 0).all()
        close(seen.outs[layer][0], pattern @ call.v[0].repeat_interleave(2, 0))
        received = got.frame("received").filter(layer=layer).sort("head", "position")["received"].to_torch().float().view(4, N)
        torch.testing.assert_close(received, pattern.sum(1), atol=1e-4, rtol=1e-3)


# Rescaled positions


def scaled_config(config, kind: str, factor: float):
    "A copy of a config with a scaling"
    out = copy.deepcopy(config)
    parts = [out.rope_parameters] if "rope_type" in out.rope_parameters else [out.rope_parameters["full_attention"]]
    head = next((h for h in (getattr(config, n, None) for n in ("qk_rope_head_dim", "head_dim")) if h), 16)
    for p in parts:
        d = int(head * p.get("partial_rotary_factor", 1))
        if kind == "ntk": p["rope_theta"] *= factor ** (d / (d - 2))
        else: p.update(rope_type=kind, factor=factor)
        if kind == "yarn": p["original_max_position_embeddings"] = 512
    if kind != "dynamic": out.max_position_embeddings = int(512 * factor)
    return out


@pytest.mark.parametrize("kind", POSITION_SCALINGS)
@pytest.mark.parametrize("name", UNSCALED)
@torch.no_grad()
def test_rescaled_is_a_model_built_with_that_scaling(name: str, kind: str) -> None:
    model, ids = zoo_model(name), token_ids(N if name != "llama" else 560)
    built = type(model)(scaled_config(model.config, kind, 2.)).eval()
    built.load_state_dict(model.state_dict())
    plain, config = model(ids[:, :N]).logits, copy.deepcopy(model.config)
    modules = {n: id(m) for n, m in model.named_modules()}
    held = {n: dict(vars(m)) for n, m in model.named_modules() if "Rotary" in type(m).__name__}
    buffers = {n: (id(b), b.clone()) for n, b in model.named_buffers()}
    with rescaled_positions(model, kind, 2.):
        assert model.config.max_position_embeddings == (512 if kind == "dynamic" else 1024)
        got = model(ids).logits
        assert interventions(model) == [{"intervention": "rescaled_positions", "kind": kind, "factor": 2.}]
    close(got, built(ids).logits)
    if kind != "dynamic": assert (got[:, :N] - plain).abs().max() > 1e-4
    assert model.config.to_dict() == config.to_dict() and modules == {n: id(m) for n, m in model.named_modules()}
    assert all(vars(model.get_submodule(n)).keys() == v.keys() for n, v in held.items())
    assert all(vars(model.get_submodule(n))[k] is x for n, v in held.items() for k, x in v.items())
    assert all(id(b) == buffers[n][0] and torch.equal(b, buffers[n][1]) for n, b in model.named_buffers())
    assert torch.equal(model(ids[:, :N]).logits, plain) and not attachments()


@pytest.mark.parametrize("kind", POSITION_SCALINGS)
@torch.no_grad()
def test_a_loaded_model_may_read_more(kind: str) -> None:
    lm, ids, bridge = ll.load(ZOO["llama"]()), token_ids(600)[0], object()
    vars(lm)["bridge"] = bridge
    plain = lm.logits(ids[:20])
    with pytest.raises(ValueError, match="512 positions"): lm.logits(ids)
    with pytest.raises(RuntimeError, match="stop"), rescaled_positions(lm, kind, 1.5):
        assert lm.max_length == 768 and "bridge" not in vars(lm)  # one would be made of the model as it is now
        whole = lm.logits(ids)
        close(lm.prefill(ids[:500], chunk=200).logits_after(ids[500:]), whole[500:])
        raise RuntimeError("stop")
    assert lm.max_length == 512 and torch.equal(lm.logits(ids[:20]), plain) and lm.bridge is bridge


@torch.no_grad()
def test_dynamic_frequencies_are_not_taken_for_those_of_a_distance() -> None:
    "Beyond the trained length, a turned position is that of the frequencies that the model used"
    model, ids = ZOO["llama"](), token_ids(540)
    spans = [(4, 200), (200, 402), (402, 530)]
    with rescaled_positions(model, "dynamic", 2.):
        long = model(ids, position_ids=torch.arange(540)[None] * 2).logits
        with set_based(model, spans):  # the frequencies are those of the text as the model sees it, 540 tokens
            a = model(ids).logits[0, 530:]
        order = torch.cat([ids[0, :4], ids[0, 402:530], ids[0, 4:402], ids[0, 530:]])[None]
        with set_based(model, [(4, 132), (132, 328), (328, 530)]): b = model(order).logits[0, 530:]
        assert torch.equal(model(ids, position_ids=torch.arange(540)[None] * 2).logits, long)
    close(a, b)


@torch.no_grad()
def test_rescaled_positions_and_others_in_either_order() -> None:
    model, ids = zoo_model("llama"), token_ids(N)
    for other in (lambda: set_based(model, [(4, 9), (9, 16)]), lambda: ms_poe(model, first_layer=0), lambda: lambda_mask(model, 3, 8)):
        with rescaled_positions(model, "yarn", 2.), other(): a = model(ids).logits
        with other(), rescaled_positions(model, "yarn", 2.): b = model(ids).logits
        with other(): c = model(ids).logits
        close(a, b)
        assert (a - c).abs().max() > 1e-3
    with rescaled_positions(model, "ntk", 2.), pytest.raises(ValueError, match="rescaled already"):
        with rescaled_positions(model, "ntk", 2.): pass


@pytest.mark.parametrize("name, kind, factor, match", [
    ("gpt_oss", "linear", 2., "scaled positions already \\(yarn\\)"), ("gpt2", "linear", 2., "no rotary"), ("opt", "yarn", 2., "no rotary"),
    ("llama", "linear", 1., "above 1"), ("llama", "linear", float("nan"), "above 1"), ("llama", "longrope", 2., "kind is linear")])
def test_what_cannot_be_rescaled(name: str, kind: str, factor: float, match: str) -> None:
    with pytest.raises(ValueError, match=match), rescaled_positions(zoo_model(name), kind, factor): pass
    assert not attachments()


# Redistributed attention

SPANS, SHARES = {"a": range(4, 9), "b": (9, 26), "c": (27, 30)}, {"a": .6, "b": .3, "c": .1}


def redistributed(call, spans, shares, first: int) -> torch.Tensor:
    "The output of a call, from its formed pattern, (batch, heads, n_queries, d_value)"
    p = call.operator().dense().double()
    n_q, group = p.shape[2], p.shape[1] // call.v.shape[1]
    late, new = torch.arange(n_q) + call.mask.offset >= first, p.clone()
    inside = torch.zeros(p.shape[-1], dtype=torch.bool)
    for name, s in spans.items():
        a, b = (s.start, s.stop) if isinstance(s, range) else s
        mean = p[..., a:b].sum(-1, keepdim=True) / (b - a)
        new[..., a:b] = torch.where(late[:, None] & (mean > 0), shares[name] / mean * p[..., a:b], p[..., a:b])
        inside[a:b] = True
    had, has = (x[..., inside].sum(-1, keepdim=True) for x in (p, new))
    new[..., inside] = torch.where(has > 0, new[..., inside] / has * had, p[..., inside])
    return new @ call.v.double().repeat_interleave(group, 1)


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_redistributed_attention_is_that_of_the_formed_pattern(name: str) -> None:
    model, ids, seen = zoo_model(name), token_ids(N), Keep()
    with redistribute(model, SPANS, SHARES, from_token=32), intervene(model, seen): whole = model(ids).logits
    for layer, call in seen.final.items():
        close(seen.outs[layer].double(), redistributed(call, SPANS, SHARES, 32))
    assert (whole[:, 32:] - model(ids).logits[:, 32:]).abs().max() > 1e-3
    with redistribute(model, SPANS, SHARES, from_token=32, last_layers=None):
        close(in_pieces(model, ids, (24, 35, 38, 39), new_cache(model.config, "all")), whole)
        close(in_pieces(model, ids, (24, 35, 38, 39)), whole)
        left = left_padded(ids)
        if name == "opt": left.pop("position_ids")
        close(model(**left).logits[:, 6:], whole)
        two = torch.cat([torch.cat([ids, ids.new_zeros(1, 4)], 1), torch.cat([ids, ids[:, :4]], 1)])
        close(model(two, attention_mask=torch.tensor([[1] * N + [0] * 4, [1] * (N + 4)])).logits[:, :N], whole.expand(2, -1, -1))


@torch.no_grad()
def test_only_the_last_layers() -> None:
    model, ids, plain, seen = zoo_model("gemma2"), token_ids(N), Keep(), Keep()
    with intervene(model, plain): model(ids)
    with redistribute(model, SPANS, SHARES, last_layers=1) as (what,), intervene(model, seen): model(ids)
    assert what.layers() == {3} and Redistribute(SPANS, SHARES).prepare(model).layers() == {0, 1, 2, 3}
    for layer in range(3): assert torch.equal(plain.outs[layer], seen.outs[layer])
    assert not torch.equal(plain.outs[3], seen.outs[3])


@pytest.mark.parametrize("around", [
    lambda m: streaming_attention(m, 6, 12), lambda m: lambda_mask(m, 6, 12), lambda m: set_based(m, [(4, 9), (9, 20)]),
    lambda m: ms_poe(m, first_layer=0, order={0: range(4), 1: range(4)}), lambda m: temperature(m, .5),
    lambda m: scale_spans(m, {"s": (6, 12)}, 5.)])
@torch.no_grad()
def test_redistributed_among_other_interventions(around) -> None:
    model, ids, seen = zoo_model("llama"), token_ids(N), Keep()
    with around(model), redistribute(model, SPANS, SHARES), intervene(model, seen):
        whole = model(ids).logits
        for layer, call in seen.final.items(): close(seen.outs[layer].double(), redistributed(call, SPANS, SHARES, 30))
        close(in_pieces(model, ids, (17, 39)), whole)
        close(model(**left_padded(ids)).logits[:, 6:], whole)


@torch.no_grad()
def test_redistributed_in_a_padded_batch_with_a_mask_rule() -> None:
    "With set_based's window, which goes by the position of every token in its own text"
    model, one, two, pad = zoo_model("mistral"), token_ids(N), token_ids(N - 7, seed=5), torch.zeros(1, 7, dtype=torch.long)
    with set_based(model, [(4, 21), (21, 26)]), redistribute(model, SPANS, SHARES) as (what,):
        alone = model(one).logits, model(two).logits
        for left in (True, False):
            both = torch.cat([one, torch.cat([pad, two] if left else [two, pad], 1)])
            keep = torch.ones_like(both)
            keep[1, slice(0, 7) if left else slice(N - 7, N)] = 0
            got = model(both, attention_mask=keep, position_ids=(keep.cumsum(1) - 1).clamp(min=0)).logits
            close(got[:1], alone[0])
            close(got[1:, 7:] if left else got[1:, :-7], alone[1])
    with set_based(model, [(4, 21), (21, 26)]): plain = model(one).logits
    assert (plain[:, what.from_token:] - alone[0][:, what.from_token:]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_redistributed_in_half_precision(dtype) -> None:
    "Against the formed pattern in float64 of the same numbers; a document with next to no mass does no harm"
    model, ids, seen = copy.deepcopy(zoo_model("qwen3")).to(dtype), token_ids(N), Keep()
    with temperature(model, .05), redistribute(model, SPANS, SHARES), intervene(model, seen): model(ids)
    for layer, call in seen.final.items():
        wide = copy.copy(call)
        wide = type(call)(**{**vars(call), "q": call.q.double(), "k": call.k.double(), "v": call.v.double()})
        want = redistributed(wide, SPANS, SHARES, 30)
        assert seen.outs[layer].isfinite().all()
        assert (seen.outs[layer].double() - want).norm() / want.norm() < {torch.bfloat16: .02, torch.float16: .005}[dtype]
    logs = torch.tensor([[-300., -torch.inf], [-1., -torch.inf]])
    assert redistributed_masses(logs, torch.tensor([1., 0.])).tolist() == [[pytest.approx(.3679, abs=1e-4), 0.], [0., 0.]]


def test_what_redistribute_refuses() -> None:
    model, ids = zoo_model("llama"), token_ids(N)
    with redistribute(model, SPANS, SHARES), pytest.raises(ValueError, match="no_grad"): model(ids)
    with torch.no_grad():
        with ablate(model, [(0, 1)]), redistribute(model, SPANS, SHARES), pytest.raises(UnsupportedModel, match="before it"): model(ids)
        with redistribute(model, SPANS, SHARES), redistribute(model, SPANS, SHARES):
            with pytest.raises(UnsupportedModel, match="before it, once"): model(ids)
        with redistribute(model, SPANS, SHARES), ablate(model, [(0, 1)]), intervene(model, seen := Keep()): model(ids)
        assert (seen.outs[0][:, 1] == 0).all()
        bert = zoo_model("bert")
        with redistribute(bert, SPANS, SHARES), pytest.raises(UnsupportedModel, match="not causal"): bert(ids)
        holes = torch.ones(1, N, dtype=torch.long)
        holes[0, 6] = 0
        with redistribute(model, SPANS, SHARES), pytest.raises(ValueError, match="has a hole at position"): model(ids, attention_mask=holes)
    for bad, match in (((SPANS, {"a": 1.}), "shares for a"), ((SPANS, {"a": .7, "b": .7, "c": 0}), "sum to 1.4 and"),
                       (({"a": (3, 5), "b": (4, 9)}, {"a": .5, "b": .5}), "overlap"), ((SPANS, SHARES, 29), "ends at 30"),
                       (({}, {}), "needs documents"), ((SPANS, SHARES, None, 0), "last_layers is 0")):
        with pytest.raises(ValueError, match=match), redistribute(model, *bad): pass


# All of them


def test_settings_are_plain_values() -> None:
    model = zoo_model("llama")
    for what in (MsPoE(first_layer=0), MsPoE(first_layer=0, order={0: range(4), 1: [3, 2, 1, 0]}),
                 SetBased({"a": range(4, 9), "b": range(9, 11)}), Redistribute(SPANS, SHARES)):
        ready = what.prepare(model)
        said = ready.describe()
        assert json.loads(json.dumps(said)) == said and said["intervention"] == what.name
        again = type(what)(**{k: v for k, v in said.items() if k != "intervention"}).prepare(model)
        assert again.describe() == said


@pytest.mark.parametrize("enter", [
    lambda m: ms_poe(m, first_layer=0), lambda m: set_based(m, BLOCKS), lambda m: redistribute(m, SPANS, SHARES),
    lambda m: rescaled_positions(m, "linear", 2.)])
@torch.no_grad()
def test_all_is_as_it_was_afterwards(enter) -> None:
    model, ids = zoo_model("gemma3"), token_ids(N)
    before = model(ids).logits
    with enter(model), capture(model, SinkMass(2)) as seen: changed = model(ids).logits
    assert (changed - before).abs().max() > 1e-4 and seen.frame("sink_mass")["sink_mass"].is_finite().all()
    with pytest.raises(RuntimeError, match="stop"), enter(model): raise RuntimeError("stop")
    assert torch.equal(model(ids).logits, before) and not attachments()
    assert isinstance(model, nn.Module) and VOCAB == before.shape[-1]


# Layers without positions


class _Queries(Intervention):
    "Keeps the queries of every layer"
    name = "queries"

    def __init__(self) -> None: self.__dict__.update(q={})

    def before(self, call, layer):
        self.q[layer] = call.q.clone()
        return call


PARTLY = {"smollm3": (3,), "llama4": (3,), "cohere2": (1, 3), "exaone4": (1, 3)}


@pytest.mark.parametrize("name", [*PARTLY, "llama", "gemma3"])
@torch.no_grad()
def test_layers_that_rotate_nothing_are_known(name: str) -> None:
    "Their queries are the same wherever a text begins; and a turned position leaves them as they are"
    model, ids, found = EVERYTHING[name](), token_ids(6), []
    for start in (0, 37):
        with intervene(model, q := _Queries()): model(ids, position_ids=torch.arange(6)[None] + start)
        found.append(q.q)
    same = tuple(layer for layer in found[0] if torch.allclose(found[0][layer], found[1][layer], atol=1e-4))
    assert same == layers_without_positions(model) == PARTLY.get(name, ())
    assert ll.load(model).positions == ("partly rotary" if same else "rotary")
    with lambda_mask(model, 2, 3, ceiling=3), intervene(model, keep := Keep()):
        if name != "llama4": model(ids)  # which has no function that rotates
    for layer in same:
        for st_ in keep.final[layer].streams if keep.final else ():
            assert torch.equal(st_.far[0], keep.final[layer].q) and torch.equal(st_.far[1], keep.final[layer].k)


# Other distances, moved tokens, other weights

WAYS = {
    "rerope": ReRoPE(9, trained=16), "leaky_rerope": ReRoPE(5, factor=3.0, trained=16), "dual_chunk": DualChunk(8, local=5, trained=16),
    "by_dimension": ByDimension((1, 3), window=4, trained=16), "self_extend": SelfExtend(48, trained=16, group=5, window=4, always=True),
    "lm_infinite_top_k": LambdaMask(3, 9, top_k=2, top_k_layer=0), "moved": E2(3.0, 5.0), "jittered": Jittered(0.4),
    "softplus": Sharpened(trained=16),
}
DIFFERENT = [n for n in ("llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_neox", "phi3", "smollm3", "cohere2") if n in EVERYTHING]


@pytest.mark.parametrize("name", DIFFERENT)
@torch.no_grad()
def test_other_positions_in_pieces_in_batches_and_by_every_way_of_computing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    "A text read whole is what it is in pieces, beside another with padding, and by the tiles alone"
    model, ids = EVERYTHING[name](), token_ids(N)
    plain, last = model(ids).logits, kernels.WAYS[-1:]
    for way, what in WAYS.items():
        far = way not in ("moved", "jittered", "softplus", "lm_infinite_top_k")
        if far and name in ("mistral", "cohere2"):  # whose layers with positions have windows only
            with pytest.raises(UnsupportedModel, match="a window only"), intervene(model, what): pass
            continue
        with intervene(model, what):
            whole = model(ids).logits
            parts = in_pieces(model, ids, (10, 23, 38, 39), new_cache(model.config, "all"))
            padded = model(**left_padded(ids)).logits[:, 6:]
            with monkeypatch.context() as m:
                m.setattr(kernels, "WAYS", last)
                tiles = model(ids).logits
        for got in (parts, padded, tiles): close(got, whole, 3)
        if name != "mistral" or way != "lm_infinite_top_k": assert (whole - plain).abs().max() > 1e-3, way
    assert torch.equal(model(ids).logits, plain)


@torch.no_grad()
def test_tokens_between_are_those_of_the_largest_logits() -> None:
    "LM-Infinite with re-insertion, from the formed matrix"
    model, ids, before, after = zoo_model("llama"), token_ids(N), Keep(), Keep()
    with intervene(model, before), intervene(model, LambdaMask(3, 9, top_k=2, top_k_layer=0)), intervene(model, after): model(ids)
    turner, at = Turner(model), torch.arange(N)[None]
    for layer, call in before.calls.items():
        near = (call.q @ call.k.repeat_interleave(2, 1).mT * call.scale)[0]
        q0, k0 = (turner.turn(call, layer, x, -at) for x in (call.q, call.k))  # unrotated
        k0 = k0.repeat_interleave(2, 1)
        sink, middle = ((turner.turn(call, layer, q0, d) @ k0.mT * call.scale)[0] for d in (at.clamp_max(9), torch.full_like(at, 4)))
        i, j = torch.arange(N)[:, None], torch.arange(N)
        between = (i - j >= 9) & (j >= 3)
        x = torch.where(i - j < 9, near, torch.where(j < 3, sink, middle)).masked_fill(j > i, -torch.inf)
        best = x.masked_fill(~between, -torch.inf).topk(2, -1).indices
        chosen = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, best, True) & between
        p = x.masked_fill(between & ~chosen, -torch.inf).softmax(-1)
        close(after.outs[layer][0], p @ call.v[0].repeat_interleave(2, 0))


@torch.no_grad()
def test_key_dimensions_are_those_of_the_longest_queries_and_keys() -> None:
    model, ids, keep = zoo_model("llama"), token_ids(N), Keep()
    table, keys = key_dimensions(model, ids[0], 0.5)
    with intervene(model, keep): model(ids)
    for layer, call in keep.calls.items():
        half = call.q.shape[-1] // 2
        norms = [x[0].unflatten(-1, (2, half)).norm(dim=-2) for x in (call.q, call.k.repeat_interleave(2, 1))]  # (heads, n, pairs)
        mean = (norms[0] * norms[1]).sum(1)
        got = table.filter(layer=layer).sort("head", "pair")["share"].to_torch().view(len(mean), half)
        close(got.float(), mean / mean.sum(-1, keepdim=True))
        assert keys[layer].sum(-1).tolist() == [half // 2] * len(mean) and torch.equal(keys[layer][::2], keys[layer][1::2])
    some = intervene(model, ByDimension(3, window=4, keys=keys, trained=16))
    with some: whole, parts = model(ids).logits, in_pieces(model, ids, (10, 38))
    close(parts, whole)
    with intervene(model, ByDimension(3, window=4, trained=16)): assert (model(ids).logits - whole).abs().max() > 1e-3
    everything = {layer: torch.ones_like(k) for layer, k in keys.items()}
    with intervene(model, ByDimension(3, window=4, keys=everything, trained=16)): a = model(ids).logits
    with intervene(model, SelfExtend(48, trained=20, group=3, window=4, always=True)): close(model(ids).logits, a)


@pytest.mark.parametrize("make, match", [
    (lambda: ReRoPE(0), "window is 0"), (lambda: ReRoPE(4, factor=0.5), "factor is 0.5"), (lambda: ReRoPE(4, trained=1), "trained is 1"),
    (lambda: DualChunk(8, local=9), "local is 1 to chunk"), (lambda: ByDimension(0), "a scale is 0"),
    (lambda: ByDimension((1,) * 3), "cut into equal ones"),
    (lambda: ByDimension(2, keys={}), "the key pairs of layer 0"), (lambda: LambdaMask(2, 8, top_k=-1), "top_k is -1"),
    (lambda: LambdaMask(2, 8, 20, top_k=1), "a ceiling up to recent"), (lambda: Sharpened(0.0), "power is 0.0"),
    (lambda: E2(2.0, -1.0), "offset -1.0")])
def test_bad_settings_of_other_positions(make, match: str) -> None:
    with pytest.raises(ValueError, match=match), intervene(zoo_model("llama"), make()): pass


@torch.no_grad()
def test_what_other_positions_refuse() -> None:
    ids = token_ids(N)
    with intervene(zoo_model("gpt_oss"), Sharpened()), pytest.raises(UnsupportedModel, match="learned sinks"): zoo_model("gpt_oss")(ids)
    for name in ("gpt2", "opt"):
        with pytest.raises(UnsupportedModel, match="no rotary module"), position_method(zoo_model(name), "dual_chunk", 2.0): pass
    model = zoo_model("llama")
    with intervene(model, ReRoPE(9), E2(2.0)), pytest.raises(UnsupportedModel, match="change positions of the same layer"): model(ids)
    with intervene(model, Sharpened(), Sharpened()), pytest.raises(UnsupportedModel, match="sharpened already"): model(ids)
    bert = zoo_model("modernbert")
    with intervene(bert, DualChunk()), pytest.raises(UnsupportedModel, match="not causal"): bert(ids)
