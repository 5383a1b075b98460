"""Numbers that were wrong without a word: spans as ranges, texts in chunks, models in training mode."""

from __future__ import annotations

import warnings

import pytest
import torch
import zoo
from matrix import attention_is, patterns
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import longlens as ll
from longlens.attention.hf_interface import UnsupportedModel
from longlens.models.forward import LongModel
from longlens.models.prefix import WholeText, continuation, continue_cache, start_cache
from longlens.probes.generate import greedy
from longlens.probes.heads.scores import _decoded, _teacher_forced
from longlens.sweeps.cells import Cell, Start

N = 40


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, atol=atol * max(1.0, float(b.abs().max())), rtol=0)


# ---- spans

SPANS = [range(25, 27), (25, 27), [25, 27], torch.tensor([25, 27]), range(25, 30), (25, 30), range(25, 26)]


def ends(span) -> tuple[int, int]: return (span.start, span.stop) if isinstance(span, range) else (int(span[0]), int(span[1]))


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_a_span_is_read_in_one_way(span):
    hf, ids, (a, b) = zoo.zoo_model("llama"), zoo.token_ids(N), ends(span)
    with torch.no_grad(): P = patterns(hf, ids)
    with ll.capture(hf, ll.SpanMass({"x": span}), ll.Rollout({"x": span}, queries=[N - 1])) as seen, torch.no_grad(): hf(ids)
    want = torch.stack([P[layer][0, :, :, a:b].sum(-1).mean(-1) for layer in sorted(P)]).flatten()
    close(seen.frame("span_mass").sort("layer", "head")["mass"].to_torch(), want)
    x = torch.zeros(N).index_fill(0, torch.arange(a, b), 1.0)
    for layer in sorted(P): x = 0.5 * P[layer][0].mean(0) @ x + 0.5 * x
    close(seen.frame("rollout").sort("layer")["mass"].to_torch()[-1].float(), x[-1])


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_a_span_is_hidden_in_one_way(span):
    hf, ids, (a, b) = zoo.zoo_model("llama"), zoo.token_ids(N), ends(span)
    mask = torch.full((N, N), -torch.inf).triu(1)
    mask[b:, a:b] = -torch.inf
    with torch.no_grad(), attention_is(hf, "eager"): want = hf(ids, attention_mask=mask[None, None].clamp_min(-1e9)).logits[0]
    with torch.no_grad(), ll.scale_spans(hf, {"x": span}, 0.0): got = hf(ids).logits[0]
    close(got[b:], want[b:], 1e-3)


@pytest.mark.parametrize("wrong", [range(3, 3), range(-1, 2), range(0, 4, 2), range(5, 2, -1), (5, 3), (-1, 2), 3, (1, 2, 3),
                                   (0.5, 2), (True, 3), "ab", slice(0, 2), None], ids=str)
def test_what_is_no_span_is_refused(wrong):
    hf = zoo.zoo_model("llama")
    for make in (lambda s: ll.SpanMass(s), lambda s: ll.Rollout(s, queries=[5]), lambda s: ll.scale_spans(hf, s, 2.0).__enter__()):
        with pytest.raises((ValueError, TypeError), match="span 'x' is"): make({"x": wrong})


def test_the_spans_of_a_context_are_taken_as_they_are():
    lm = ll.load(device="cpu")
    ctx = ll.needle_context(lm, n_tokens=200)
    with ll.capture(lm, ll.SpanMass(ctx.spans)) as seen: lm(ctx.tokens)
    f = seen.frame("span_mass").filter(layer=0, head=0, span="needle")
    with ll.capture(lm, ll.SpanMass({"needle": (ctx.spans["needle"].start, ctx.spans["needle"].stop)})) as pair: lm(ctx.tokens)
    assert abs(f["mass"][0] - pair.frame("span_mass").filter(layer=0, head=0)["mass"][0]) < 1e-6
    with pytest.raises(TypeError, match="by name"): ll.SpanMass([(2, 5)])


# ---- caches

HYBRIDS = {"jamba": "tokens", "bamba": "whole", "qwen3_next": "chunks", "lfm2": "chunks", "falcon_h1": "chunks", "zamba2": "chunks",
           "recurrent_gemma": "whole", "llama": "chunks", "gemma2": "chunks"}
MODELS: dict[str, PreTrainedModel] = {}


def model(name: str) -> LongModel:
    hf = MODELS.setdefault(name, zoo.EVERYTHING[name]())
    return LongModel(hf, name=name)


@pytest.mark.filterwarnings("ignore:.*gives other logits")
@pytest.mark.parametrize("name", HYBRIDS)
def test_continued_is_whole(name):
    "Whatever transformers does with its caches: logits are those of one forward"
    lm, t = model(name), zoo.token_ids(60)[0]
    with torch.no_grad(): whole = lm.hf(t[None], use_cache=False).logits[0]
    p = lm.prefill(t[:40])
    close(lm.prefill(t, chunk=16).logits, whole[-1])
    close(p.logits_after(t[40:]), whole[40:])
    close(p.logits_after(t[40:], chunk=7), whole[40:])
    close(p.extend(t[40:50]).logits_after(t[50:]), whole[50:])
    close(p.logits, whole[39])
    score = whole[39:59].log_softmax(-1).gather(-1, t[40:, None]).sum()
    assert abs(lm.score(p, t[40:]).total - score) < 1e-2 and abs(lm.score(t[:40], t[40:], chunk=16).total - score) < 1e-2
    three = continue_cache(lm, torch.arange(5), t[40:45].expand(3, -1), p.fork(3))
    close(three, whole[40:45].expand(3, -1, -1))
    try: close(p.crop(20).logits_after(t[20:]), whole[20:])
    except ValueError as e: assert "has forgotten" in str(e)


@pytest.mark.parametrize("name", HYBRIDS)
def test_how_it_is_continued(name):
    hf = zoo.EVERYTHING[name]()
    lm = LongModel(hf, name=name)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        how = {continuation(lm), continuation(LongModel(hf))}
    messages = [str(w.message) for w in seen if "gives other logits" in str(w.message)]
    assert len(messages) == (how != {"chunks"})
    assert how in ({"chunks"}, {"tokens"}, {"whole"})    # which one is a matter of transformers' version; that it is right is tested above
    assert isinstance(start_cache(lm), WholeText) == (how == {"whole"})


@pytest.mark.filterwarnings("ignore:.*gives other logits")
def test_the_trial_is_not_captured():
    "A model that is first continued inside of a capture"
    lm = LongModel(zoo.EVERYTHING["qwen3_next"]())
    with ll.capture(lm, ll.Entropy()) as seen: lm.prefill(zoo.token_ids(N)[0], chunk=16)
    with ll.capture(lm, ll.Entropy()) as again: lm.prefill(zoo.token_ids(N)[0], chunk=16)
    assert seen.frame("entropy").equals(again.frame("entropy")) and seen.frame("entropy")["sample"].n_unique() == 1


@pytest.mark.filterwarnings("ignore:.*gives other logits")
@pytest.mark.parametrize("name", ["llama", "jamba", "bamba"])
def test_answers_of_a_batch_are_those_of_whole_texts(name):
    lm, ids = model(name), zoo.token_ids(30, batch=2)
    cache = start_cache(lm)
    with torch.no_grad(): continue_cache(lm, torch.tensor([0]), ids[:, :-1], cache)
    start, want = Start(cache, ids[:, -1:], 30), ids
    with torch.no_grad():
        replies = greedy(lm, start, 5)
        for _ in range(5): want = torch.cat([want, lm.hf(want, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert [r for r, _ in replies] == [w[30:30 + len(r)].tolist() for (r, _), w in zip(replies, want, strict=True)]
        cells = [Cell(i, completion=torch.tensor(r)) for i, (r, _) in zip(ids, replies, strict=True)]
        forced, written = _teacher_forced(lm, cells, start), _decoded(lm, cells, start, 5)
    for (a, at), (b, looked) in zip(forced, written, strict=True):
        assert a.tolist() == b.tolist() and torch.equal(at, looked)


# ---- training mode

def dropping() -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**zoo._base(attention_dropout=0.5)))


def test_a_model_in_training_is_measured_in_eval_mode_and_stays_in_training():
    hf, ids = dropping().train(), zoo.token_ids(50)[0]
    hf.model.layers[0].eval()    # a part that is frozen stays so
    before = [m.training for m in hf.modules()]
    lm = ll.load(hf)
    assert [m.training for m in hf.modules()] == before
    got, prefix, new = lm.logits(ids), lm.prefill(ids[:30]).logits_after(ids[30:]), lm.generate_ids(ids, 4)
    with ll.capture(lm, ll.Entropy()) as seen: lm(ids)
    report = ll.attention_sinks(lm, [ids.tolist() * 2])
    with ll.ablate(lm, [(0, 1)]): ablated = lm.logits(ids)
    assert [m.training for m in hf.modules()] == before
    with pytest.raises(ll.UnsupportedModel if hasattr(ll, "UnsupportedModel") else Exception, match="training mode"):
        with ll.capture(hf, ll.Entropy()): pass
    hf.eval()
    with torch.no_grad(): want = hf(ids[None]).logits[0]
    close(got, want)
    close(prefix, want[30:])
    assert torch.equal(new, lm.generate_ids(ids, 4))
    with ll.capture(hf, ll.Entropy()) as plain, torch.no_grad(): hf(ids[None])
    close(seen.frame("entropy")["entropy"].to_torch(), plain.frame("entropy")["entropy"].to_torch())
    with ll.ablate(hf, [(0, 1)]), torch.no_grad(): close(ablated, hf(ids[None]).logits[0])
    assert report.details() == ll.attention_sinks(lm, [ids.tolist() * 2]).details()


def test_what_raises_leaves_the_mode():
    hf = dropping().train()
    lm = ll.load(hf)
    with pytest.raises(ValueError): lm(zoo.token_ids(5)[0], inputs_embeds=torch.zeros(1, 5, 64))
    assert all(m.training for m in hf.modules())


def test_gradients_still_flow():
    hf = dropping().train()
    ll.load(hf)(zoo.token_ids(5)[0], grad=True).logits.sum().backward()
    assert hf.lm_head.weight.grad is not None and hf.training


# ---- small ones

def test_a_text_is_shown_with_its_model():
    from longlens.charts.token_view import token_data
    lm = ll.load(device="cpu")
    assert token_data(lm, "The code is seven.").n == len(lm.tokens("The code is seven."))
    with pytest.raises(TypeError, match="what is shown is a text"): token_data(lm)


def test_an_adapter_folder_names_the_way_out(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="PEFT adapter: merge it"): ll.load(tmp_path)


# ---- encoders with attention of their own

def sparse(name: str, **kw) -> PreTrainedModel:
    import transformers
    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=512, pad_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes, **kw)).eval()


@pytest.mark.parametrize("name, kw", [("BigBird", {"attention_type": "original_full"}), ("Longformer", {"attention_window": 8}),
                                      ("BigBird", {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1})], ids=str)
def test_encoders_with_attention_of_their_own_are_refused_by_name(name, kw):
    "and the way out that is named exists"
    hf, ids = sparse(name, **kw), zoo.token_ids(60)
    for block in (lambda: ll.capture(hf, ll.Entropy()), lambda: ll.ablate(hf, [(0, 0)]), lambda: ll.temperature(hf, 2.0)):
        with pytest.raises(UnsupportedModel, match=rf"^{name}Model computes .* of its own .*output_attentions=True.*load_encoder"):
            with block(): pass
    if kw.get("attention_type") == "block_sparse": hf.set_attention_type("original_full")    # rows of the others do not sum to 1
    with torch.no_grad(): given = hf(ids, output_attentions=True).attentions
    assert len(given) == 2 and all(torch.allclose(a.sum(-1), torch.ones(()), atol=1e-4) for a in given)
    enc = ll.load_encoder(hf, ll.load_encoder().tokenizer, pooling="mean")
    with torch.no_grad(): states = hf(ids).last_hidden_state[0]
    close(torch.as_tensor(enc.encode_tokens(ids[0])), states.mean(0))


def test_a_short_text_is_cut_by_words_into_several_sources():
    lm, text = ll.load(device="cpu"), "A stone lies in the river. The code for Eve is seven. Rain falls on the old green boat."
    found = ll.trace_context(lm, text, "What is the code for Eve?", " seven", by="words")
    assert 8 <= found.table.height <= 10 and "".join(found.table["text"]) == text
    assert ll.trace_context(lm, text, "What is the code for Eve?", " seven", by="words", size=100).table.height == 1
