"""Layers that are not all attention, and facts that differ from layer to layer: numbers are the model's own, everywhere"""

from __future__ import annotations

from typing import Any

import matrix
import pytest
import torch
import zoo
from matrix import off, patterns, with_words
from transformers import PreTrainedModel

import longlens as ll
from longlens.attention.hf_interface import UnsupportedModel, attach, recording
from longlens.interventions.calibrate import Redistribute
from longlens.interventions.heads import mean_outputs
from longlens.models.architecture import (
    attention_layers,
    attention_modules,
    count_kv_heads,
    count_query_heads,
    head_widths,
    layers_with_states,
)
from longlens.models.forward import LongModel
from longlens.probes.generate import Ask
from longlens.probes.heads.ablation import random_orders
from longlens.probes.heads.duo_gates import Gated, duo_gates
from longlens.probes.traceback.methods.attention import retrieval_weights
from longlens.sweeps.cells import Cell
from longlens.sweeps.sweep import sweep

# said once a model, where its states make longlens run it otherwise: tests/test_silent.py is about that
pytestmark = pytest.mark.filterwarnings("ignore:.* gives other logits when its cache is continued:UserWarning")

HYBRIDS = ("jamba", "bamba", "qwen3_next", "qwen3_5", "lfm2", "zamba2", "nemotron_h", "granite_hybrid", "olmo_hybrid")
HEADS = [(layer, head) for layer in (1, 3) for head in range(4)]


class Calls:
    "Notes the attention calls of a model: module -> query heads, KV heads, widths"

    def __init__(self) -> None: self.found: dict[torch.nn.Module, tuple[int, int, int, int]] = {}

    def record(self, module: torch.nn.Module, op: Any) -> None:
        call = op.call
        self.found[module] = call.q.shape[1], call.k.shape[1], call.k.shape[3], op.v.shape[3]


@pytest.mark.parametrize("name", zoo.EVERYTHING)
@torch.no_grad()
def test_attention_layers_are_those_that_call_the_attention_function(name: str) -> None:
    hf, calls = zoo.EVERYTHING[name](), Calls()
    assert attention_layers(hf) == attention_layers(hf.config), "modules and config agree"
    try:
        with attach(hf), recording(hf, calls): hf(input_ids=zoo.token_ids(8), use_cache=False)
    except (UnsupportedModel, TypeError, AttributeError, ValueError):
        if name != "mamba": assert attention_layers(hf) == tuple(range(hf.config.get_text_config().num_hidden_layers))
        return    # its attention does not go through the interface, or it slices its mask: nothing is measured there
    number = {m: layer for layer, _, m in attention_modules(hf)}
    assert {number[m] for m in calls.found} == set(attention_layers(hf))
    for m, facts in calls.found.items():
        layer = number[m]
        assert facts == (count_query_heads(hf, layer), count_kv_heads(hf, layer), *head_widths(hf, layer)), f"layer {layer}"


def test_layers_with_states() -> None:
    found = {name: layers_with_states(zoo.EVERYTHING[name]()) for name in ("llama", "gemma3", "jamba", "nemotron_h", "falcon_h1", "lfm2")}
    assert found == dict(llama=(), gemma3=(), jamba=(0, 2), nemotron_h=(0,), falcon_h1=(0, 1), lfm2=(0, 2))


@pytest.mark.parametrize(("settings", "layers"), [
    (dict(layer_types=["conv", "full_attention", "conv"]), (1,)),
    (dict(layers_block_type=["mamba", "attention", "moe"]), (1,)),
    (dict(block_types=["recurrent", "recurrent", "attention"]), (2,)),
    (dict(attn_layer_indices=[0, 2]), (0, 2)),
    (dict(attn_layer_period=2, attn_layer_offset=1), (1,)),
    ({}, (0, 1, 2)),
])
def test_configs_without_a_model(settings: dict[str, Any], layers: tuple[int, ...]) -> None:
    class Config:    # of a model whose code is not in transformers
        num_hidden_layers = 3
        def get_text_config(self) -> Config: return self
    config = Config()
    for name, value in settings.items(): setattr(config, name, value)
    assert attention_layers(config) == layers  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*HYBRIDS, "recurrent_gemma", "gemma4"])
@torch.no_grad()
def test_sinks_carry_the_layers_of_the_model(name: str) -> None:
    hf, ids = zoo.EVERYTHING[name](), zoo.token_ids(80)
    P = patterns(hf, ids)
    r = ll.attention_sinks(ll.load(hf), [ids[0].tolist()], sequences=3)
    assert r.details()
    for frame in ("heads", "positions", "lengths", "values", "residual"): assert set(r.frames[frame]["layer"]) == set(P), frame
    assert set(r.frames["tokens"]["layer"]) <= set(P)
    for layer, p in P.items():
        sees = (p[0, ..., 0] > 0).any(0)
        assert off(r.table.filter(layer=layer).sort("head")["alpha_first"].to_torch(), p[0][:, sees, 0].double().mean(-1)) < 1e-4
        got = r.frames["positions"].filter(layer=layer).sort("position")["received"].to_torch()
        assert off(got, p[0].double().sum(1).mean(0)) < 1e-4


def test_sinks_of_several_residual_streams_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="Gemma3nForCausalLM leaves states of shape .*not one stream"):
        ll.attention_sinks(ll.load(zoo.EVERYTHING["gemma3n"]()), [zoo.token_ids(80)[0].tolist()], sequences=3)


@pytest.fixture(scope="module")
def jamba() -> LongModel: return with_words(zoo.EVERYTHING["jamba"])


def test_probes_of_a_hybrid(jamba: LongModel) -> None:
    assert jamba.attention_layers == (1, 3) and "4 layers (2 with attention) x 4 heads" in repr(jamba)
    heads = ll.retrieval_heads(jamba, lengths=(160,), depths=(50,), ablation=None)
    assert heads.details() and list(heads.table.sort("layer", "head").select("layer", "head").iter_rows()) == HEADS
    assert set(heads.frames["scores"]["layer"]) <= {1, 3}
    assert heads.meta["attention_layers"] == [1, 3]
    grid = ll.needle_grid(jamba, lengths=(160,), depths=(50,), trials=1)
    assert set(grid.frames["attention"]["layer"]) == {1, 3} and grid.details()
    middle = ll.lost_in_the_middle(jamba, matrix.items_of(jamba), positions=2)
    assert set(middle.frames["attention"]["layer"]) == {1, 3} and middle.details()


@torch.no_grad()
def test_masses_of_the_needle_are_those_of_their_layers() -> None:
    lm = with_words(zoo.EVERYTHING["qwen3_next"])
    ctx = ll.needle_context(lm, 160, 50, wording="facts")
    done = sweep(lm, [Cell.of(ctx)], Ask(max_new_tokens=0, heads_on="needle"), progress=False)
    got, needle = done.table("attention"), ctx.spans["needle"]
    ids = torch.cat([ctx.tokens.ids, ctx.completion_ids])[:-1]
    n = len(ctx.tokens)
    for layer, p in patterns(lm.hf, ids[None]).items():
        want = p[0, :, n - 1:, needle.start:needle.stop].double().sum(-1).mean(-1)
        assert off(got.filter(layer=layer).sort("head")["mass"].to_torch(), want) < 1e-4


def test_random_heads_are_heads(jamba: LongModel) -> None:
    assert sorted(random_orders(jamba, [], 1)[0]) == HEADS


def test_layers_without_heads_are_refused_by_number(jamba: LongModel) -> None:
    says = "layer 0 of JambaForCausalLM has no heads: those with attention are 1, 3"
    with pytest.raises(ValueError, match=says), ll.ablate(jamba, [(0, 1)]): pass
    with pytest.raises(ValueError, match=says), ll.streaming_attention(jamba, kv_heads=[(0, 1)]): pass
    with pytest.raises(IndexError, match="layers 0 to 3"), ll.ablate(jamba, [(4, 1)]): pass
    with pytest.raises(IndexError, match=r"there is no head \(0, 1\).*in layers \[1, 3\]"): retrieval_weights(jamba, [(0, 1)])
    question = ll.needle_context(jamba, 160, 50, wording="facts")
    how: dict[str, Any] = dict(answer=question.answer, by="sentences", progress=False)
    with pytest.raises(ValueError, match=says): ll.trace_context(jamba, question, method="attention", layers=[0], **how)
    assert ll.trace_context(jamba, question, method="attention", layers=[3], **how).details()
    with pytest.raises(UnsupportedModel, match="layers 0, 2 of this model mix tokens without it"):
        ll.trace_context(jamba, question, method="rollout", **how)


@torch.no_grad()
def test_means_of_heads_stand_at_their_layers() -> None:
    hf, ids = zoo.EVERYTHING["jamba"](), zoo.token_ids(40)
    means = mean_outputs(hf, ids)
    assert means.shape == (4, 4, 16) and means[[0, 2]].isnan().all() and means[[1, 3]].isfinite().all()
    with ll.ablate(hf, [(3, 1)], "mean", ids): inside = mean_outputs(hf, ids)
    assert off(inside[3], means[3]) < 1e-5
    with ll.ablate(hf, HEADS, "mean", ids): assert hf(input_ids=ids, use_cache=False).logits.isfinite().all()


@torch.no_grad()
def test_means_of_heads_of_several_widths() -> None:
    hf, ids = zoo.EVERYTHING["gemma4"](), zoo.token_ids(40)
    means = mean_outputs(hf, ids)
    assert means.shape == (4, 4, 32) and means[[0, 2], :, 16:].isnan().all() and means[[1, 3]].isfinite().all()
    with ll.ablate(hf, [(0, 1), (1, 1)], "mean", ids): assert hf(input_ids=ids, use_cache=False).logits.isfinite().all()


def test_last_layers_are_layers_with_attention(jamba: LongModel) -> None:
    what = Redistribute({"a": range(2), "b": range(2, 4)}, {"a": 0.5, "b": 0.5}, last_layers=1)
    assert what.prepare(jamba).layers() == {3}


@torch.no_grad()
def test_gates_of_a_hybrid(jamba: LongModel) -> None:
    ids, gates = zoo.token_ids(40), torch.ones(2, 2)
    gates[1, 0] = 0    # of layer 3
    with ll.intervene(jamba, Gated(gates, 2, 4)): got = jamba.hf(input_ids=ids, use_cache=False).logits
    with ll.streaming_attention(jamba, 2, 4, kv_heads=[(3, 0)]): want = jamba.hf(input_ids=ids, use_cache=False).logits
    assert off(got, want) < 1e-5 and off(got, jamba.hf(input_ids=ids, use_cache=False).logits) > 1e-3
    with torch.enable_grad():
        fit = duo_gates(jamba, [(ids[0], torch.tensor([30, 35]))], steps=5, sink=2, recent=4, progress=False)
    assert list(fit.gates.select("layer", "kv_head").iter_rows()) == [(1, 0), (1, 1), (3, 0), (3, 1)]


def test_reading_a_hybrid(jamba: LongModel) -> None:
    from longlens.apps.head_panels import head_row
    from longlens.apps.reading import read_text
    r = read_text(jamba, zoo.token_ids(40)[0])
    assert list(r.frames["heads"].sort("layer", "head").select("layer", "head").iter_rows()) == HEADS
    assert set(r.frames["profile"]["layer"]) == {1, 3} == set(r.frames["distance"]["layer"])
    with torch.no_grad(): P = patterns(jamba.hf, zoo.token_ids(40))
    assert off(head_row(r, 39, 3, 2), P[3][0, 2, 39]) < 1e-4


def gemma4_with_fewer_global_kv_heads() -> PreTrainedModel:
    import transformers
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = transformers.Gemma4TextConfig(**zoo._base(
            num_hidden_layers=4, head_dim=16, global_head_dim=32, num_kv_shared_layers=0, layer_types=zoo.PAIRS, sliding_window=12,
            vocab_size_per_layer_input=128, hidden_size_per_layer_input=0, attention_k_eq_v=True, num_global_key_value_heads=1))
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_kv_heads_that_differ_by_layer() -> None:
    lm = ll.load(gemma4_with_fewer_global_kv_heads())
    assert [count_kv_heads(lm, i) for i in range(4)] == [2, 1, 2, 1] and "(1 or 2 with keys of their own)" in repr(lm)
    with pytest.raises(ValueError, match=r"Gemma4ForCausalLM has no one number of KV heads: layers differ \(2, 1\)"): _ = lm.n_kv_heads
    with pytest.raises(ValueError, match="no one number of head widths"): _ = lm.d_head
    with pytest.raises(ValueError, match="no one number of KV heads"), ll.intervene(lm, Gated(torch.ones(4, 2))): pass
    with pytest.raises(IndexError, match="kv_heads 0 to 0"), ll.streaming_attention(lm, kv_heads=[(1, 1)]): pass
    r = ll.attention_sinks(lm, [zoo.token_ids(80)[0].tolist()], sequences=3)
    assert r.meta["kv_heads"] == [2, 1, 2, 1] and r.details()
    assert r.frames["values"].group_by("layer").len().sort("layer")["len"].to_list() == [2, 1, 2, 1]


@pytest.mark.parametrize("name", ["gemma3n", "gemma4", "jamba", "llama"])
def test_memory_adds_up_layer_by_layer(name: str) -> None:
    lm = ll.load(zoo.EVERYTHING[name]())
    prefix, n = lm.prefill(zoo.token_ids(40)[0]), 40
    got = sum(layer.keys.nbytes + layer.values.nbytes for layer in prefix.cache.layers if getattr(layer, "keys", None) is not None)
    assert lm.memory(n).cache >= got and lm.memory(n).activations > 0
    if name in ("llama", "gemma4", "jamba"): assert lm.memory(n).cache == got


def test_query_heads_that_differ_by_layer_are_refused_at_load() -> None:
    hf = zoo.EVERYTHING["llama"]()
    hf.config.num_attention_heads_per_layer = [4, 2]
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no one number of query heads: layers differ \(4, 2\)"): ll.load(hf)


def test_a_plan_counts_what_a_cache_that_cannot_be_continued_runs_again() -> None:
    "Bamba gives other logits in any other way: every word of an answer runs the whole text"
    lm, ran = with_words(zoo.EVERYTHING["bamba"]), 0

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal ran
        ran += kwargs["input_ids"].numel()
    plan = ll.plan(ll.needle_grid, lm, lengths=(160,), depths=(50,), trials=1)
    hook = lm.hf.register_forward_pre_hook(count, with_kwargs=True)
    ll.needle_grid(lm, lengths=(160,), depths=(50,), trials=1)
    hook.remove()
    assert ran <= plan.tokens < 1.05 * ran and plan.again > 100 * plan.naive
    assert "cannot be continued" in repr(plan)
