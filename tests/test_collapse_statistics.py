"""Length collapse layer by layer: sigma_a against the singular values of the formed pattern, token spread against its definition."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
import torch
from transformers import DynamicCache, StaticCache
from zoo import CAUSAL, ZOO, token_ids

import longlens as ll
import longlens.measure.statistics as st
from longlens.attention.masks import Mask, causal_mask, full_mask
from longlens.attention.operator import AttentionOperator
from longlens.interventions.heads import streaming_attention, temperature
from longlens.measure import spectral as collapse
from longlens.measure.capture import capture
from longlens.measure.spectral import CenteredLanczos, SpectralNorm, TokenSpread, collapse_rate, top_singular
from longlens.needle_lm.data import make_example

TIGHT = SpectralNorm(tol=1e-6)


def sigma(P: torch.Tensor) -> torch.Tensor:
    "Largest singular value of centred patterns (..., n, n), from the formed matrices in float64"
    P = P.double()
    return torch.linalg.svdvals(P - P.mean(-2, keepdim=True))[..., 0]


def eager(model, ids: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    "Patterns of transformers' own eager attention, (layers, batch, heads, n, n)"
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    out = model(ids, attention_mask=keep, output_attentions=True)
    model.set_attn_implementation(before)
    return torch.stack(out.attentions)


def padding(n: int, side: str, pad: int = 9) -> torch.Tensor:
    keep = torch.ones(2, n, dtype=torch.long)
    keep[0, slice(0, pad) if side == "left" else slice(n - pad, n)] = 0
    return keep


def random_operator(n: int, heads: int = 4, kv_heads: int = 2, seed: int = 0, sharp: float = 1.5, **kw) -> AttentionOperator:
    g = torch.Generator().manual_seed(seed)
    q, k = (sharp * torch.randn(1, h, n, 16, generator=g, dtype=torch.float64) for h in (heads, kv_heads))
    return AttentionOperator(q, k, **kw)


class Formed(st.Statistic):
    "sigma_a of the formed pattern of a call without padding"
    name = "formed"
    def update(self, state: dict, call: st.Call) -> None: state["sigma_a"] = sigma(call.op.dense())
    def table(self, state: dict): return {"head": range(state["sigma_a"].shape[1])}, state


def within_its_error(frame: pl.DataFrame, want: torch.Tensor, what: str = "") -> None:
    got, error, true = frame["sigma_a"].to_numpy(), frame["sigma_a_error"].to_numpy(), want.numpy().ravel()
    assert (np.abs(got - true) <= error).all(), f"{what}: {got} and {true}"


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_sigma_agrees_with_the_svd_of_eager_attention(name: str) -> None:
    model, n = ZOO[name](), 45
    for side in (None, "left", "right"):
        ids, keep = token_ids(n, batch=2), None if side is None else padding(n, side)
        with capture(model, SpectralNorm(tol=1e-3), SpectralNorm(tol=1e-5, label="tight")) as seen: model(ids, attention_mask=keep)
        P = eager(model, ids, keep)
        for b in range(2):
            text = slice(None) if keep is None else keep[b].nonzero()[:, 0]
            want = sigma(P[:, b][:, :, text][..., text])
            rough, tight = (seen.frame(f).filter(sample=b) for f in ("spectral_norm", "tight"))
            within_its_error(rough, want, f"{name} {side}")
            np.testing.assert_allclose(tight["sigma_a"].to_numpy(), want.numpy().ravel(), rtol=3e-5, err_msg=f"{name} {side}")
            assert set(rough["n_tokens"]) == {n if keep is None else len(text)}
            assert (rough["sigma_a_error"] <= 2e-3 * rough["sigma_a"] + 1e-4).all() and rough["iterations"].max() <= n


@pytest.mark.parametrize("name,n", [("bert", 512), ("llama", 512), ("modernbert", 256), ("mistral", 256), ("gemma2", 256)])
@torch.no_grad()
def test_double_precision(name: str, n: int) -> None:
    "Against the operator's own formed pattern: eager attention rounds its softmax to float32"
    model, ids = ZOO[name]().double(), token_ids(n)
    with capture(model, SpectralNorm(), SpectralNorm(tol=1e-7, label="tight"), Formed()) as seen: model(ids)
    want = torch.tensor(seen.frame("formed")["sigma_a"].to_numpy())
    for label, rtol in (("spectral_norm", 1e-3), ("tight", 1e-9)):
        within_its_error(seen.frame(label), want, name)
        np.testing.assert_allclose(seen.frame(label)["sigma_a"].to_numpy(), want, rtol=rtol)


@torch.no_grad()
def test_the_packaged_model() -> None:
    "Real heads: sinks, heads that copy, heads that look one token back"
    lm = ll.load()
    ids = lm.tokens(make_example(n_tokens=300, seed=3).prompt).ids[None]
    with capture(lm, SpectralNorm()) as seen: lm.hf(ids)
    within_its_error(seen.frame("spectral_norm"), sigma(eager(lm.hf, ids)[:, 0]))


@pytest.mark.parametrize("kw", [
    {"mask": full_mask()}, {"mask": causal_mask(window=30)}, {"mask": full_mask(7)}, {"softcap": 3.0},
    {"sinks": torch.tensor([0.0, 2.0, -1.0, 4.0]).double()}, {"kv_heads": 4}, {"kv_heads": 1},
    {"mask": Mask(rule=lambda b, h, q, k: (k <= q) & ((q - k) % 3 != 1))},
    {"bias": torch.linspace(-3, 0, 200 * 200).view(1, 1, 200, 200).double()},
], ids=["full", "window", "local", "softcap", "sinks", "no groups", "one kv head", "rule", "bias"])
def test_every_kind_of_mask_and_logits(kw: dict) -> None:
    op = random_operator(200, **kw)
    got, want = top_singular(op, tol=1e-8), sigma(op.dense())
    torch.testing.assert_close(got.value, want, rtol=1e-10, atol=1e-12)
    assert got.converged.all()
    torch.testing.assert_close(collapse_rate(op), want[0], rtol=1e-4, atol=0)


def test_a_padded_text_is_measured_as_if_alone() -> None:
    "However it is padded, holes included, to rounding: even the start is the same"
    op = random_operator(120, mask=full_mask())
    want = top_singular(op)
    for at in (range(30, 150), range(120), [*range(60), *range(80, 140)]):
        keep = torch.zeros(1, 150, dtype=torch.bool)
        keep[0, list(at)] = True
        q, k = (torch.randn(1, x.shape[1], 150, 16, dtype=torch.float64) for x in (op.call.q, op.call.k))
        q[:, :, keep[0]], k[:, :, keep[0]] = op.call.q, op.call.k
        got = top_singular(AttentionOperator(q, k, mask=Mask(None, None, keep=keep)))
        torch.testing.assert_close(got.value, want.value, rtol=1e-10, atol=0)
        assert torch.equal(got.iterations, want.iterations)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sink", [False, True])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype, sink: bool) -> None:
    "Against the same rounded numbers in float64, also where one key takes nearly all and centring cancels"
    g = torch.Generator().manual_seed(0)
    q, k = ((torch.randn(1, h, 400, 16, generator=g) * 1.2).to(dtype) for h in (4, 2))
    if sink: q[..., 0], k[..., 0], k[..., 0, 0] = 4, 0, 10  # the first key's logits are higher by ten
    op = AttentionOperator(q, k)
    exact = AttentionOperator(q.double(), k.double())
    got, want = top_singular(op, tol=1e-5), sigma(exact.dense())
    assert got.value.dtype == torch.float64 and got.converged.all()
    assert ((got.value - want).abs() <= got.error).all() and ((got.value - want).abs() < 1e-4 * want).all()
    assert (got.error < 2e-3 * want).all()


@torch.no_grad()
def test_half_precision_model() -> None:
    model, ids = ZOO["bert"]().bfloat16(), token_ids(100)
    with capture(model, SpectralNorm(), Formed(), st.Received()) as seen: model(ids)
    np.testing.assert_allclose(seen.frame("spectral_norm")["sigma_a"], seen.frame("formed")["sigma_a"], rtol=2e-3)


def test_a_head_that_gives_all_to_one_key() -> None:
    "What is left after centring is small beside the pattern, and yet not lost, whatever the start"
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 300, 16, generator=g) * .7 for _ in range(2))
    q[..., 0], k[..., 0], k[..., 0, 0] = 4, 0, torch.tensor([18.0, 14.0])
    op = AttentionOperator(q, k)
    want = sigma(AttentionOperator(q.double(), k.double()).dense())
    assert (want < .1).all()
    for seed in range(10):
        got = top_singular(op, seed=seed)
        assert ((got.value - want).abs() <= got.error).all() and (got.error < 2e-4).all()


def test_tiny_texts_and_uniform_attention() -> None:
    for n in (1, 2, 3):
        op = random_operator(n)
        got = top_singular(op)
        torch.testing.assert_close(got.value, sigma(op.dense()), rtol=1e-9, atol=1e-12)
        assert got.converged.all() and (got.iterations <= n).all()
    zero = torch.zeros(1, 2, 50, 4)
    uniform = top_singular(AttentionOperator(zero, zero, mask=full_mask()))
    assert (uniform.value < 1e-5).all() and (uniform.error >= uniform.value).all() and uniform.converged.all()
    eye = 40 * torch.eye(50)[None, None]
    itself = top_singular(AttentionOperator(eye, eye, scale=1.0, mask=full_mask()))  # I - 11^T/n: all singular values but one are 1
    torch.testing.assert_close(itself.value, torch.ones(1, 1).double(), rtol=1e-5, atol=0)


def test_heads_that_are_done_are_left_out_and_change_nothing() -> None:
    n, g = 1200, torch.Generator().manual_seed(0)  # long enough that a block holds one head
    q, k = (torch.randn(1, 2, n, 16, generator=g, dtype=torch.float64) for _ in range(2))
    q[:, 0] *= .3
    k[:, 1] = 3 * q[:, 1]  # every token attends to itself
    both = top_singular(AttentionOperator(q, k, mask=full_mask()))
    assert both.iterations[0, 0] > both.iterations[0, 1]
    for h in range(2):
        one = top_singular(AttentionOperator(q[:, h:h + 1], k[:, h:h + 1], mask=full_mask()))
        torch.testing.assert_close(one.value[0, 0], both.value[0, h], rtol=1e-12, atol=0)
        assert one.iterations[0, 0] == both.iterations[0, h]


def test_the_pattern_is_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    "No block is larger than a tile, and no tensor that is kept is longer than the text"
    n, sizes, blocks = 2500, [], collapse._row_blocks
    def watched(*args):
        for at, p in blocks(*args):
            sizes.append(p.numel())
            yield at, p
    monkeypatch.setattr(collapse, "_row_blocks", watched)
    monkeypatch.setattr(AttentionOperator, "dense", None)
    lanczos = CenteredLanczos(random_operator(n, heads=2))
    lanczos.step(torch.ones(1, 2, dtype=torch.bool))
    assert max(sizes) <= 2**19 < n * n
    assert max(t.numel() for t in vars(lanczos).values() if isinstance(t, torch.Tensor)) == 2 * n


@torch.no_grad()
def test_a_text_in_pieces_is_refused() -> None:
    model, ids = ZOO["llama"](), token_ids(40)
    cache = DynamicCache(config=model.config)
    said = "spectral_norm of layer 0 needs the whole pattern .* 15 queries for 40 keys: run the text in one piece"
    with pytest.raises(ValueError, match=said), capture(model, SpectralNorm()):
        model(ids[:, :25], past_key_values=cache)
        model(ids[:, 25:], past_key_values=cache)
    with pytest.raises(ValueError, match="1 queries for 41 keys"), capture(model, SpectralNorm()): \
         model.generate(ids, max_new_tokens=3, min_new_tokens=3)
    model = ZOO["mistral"]()  # a sliding cache drops keys
    cache = DynamicCache(config=model.config)
    model(ids[:, :39], past_key_values=cache)
    with pytest.raises(ValueError, match="1 queries for 40 keys"), capture(model, SpectralNorm()): model(ids[:, 39:], past_key_values=cache)


@torch.no_grad()
def test_an_empty_cache_is_no_hindrance() -> None:
    model, ids = ZOO["llama"](), token_ids(30)
    with capture(model, SpectralNorm()) as seen:
        model(ids)
        model(ids, past_key_values=DynamicCache(config=model.config))
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=50))
    frame = seen.frame("spectral_norm")
    for i in (1, 2): np.testing.assert_allclose(frame.filter(sample=i)["sigma_a"], frame.filter(sample=0)["sigma_a"], rtol=1e-5)
    assert set(frame["n_tokens"]) == {30}


@torch.no_grad()
def test_what_has_not_converged_is_said() -> None:
    model, ids = ZOO["bert"](), token_ids(60)
    text = "layer [01] has not converged in sample 0 .* after 2 iterations, while tol=0.0001 asks for .* more iterations="
    with pytest.warns(RuntimeWarning, match=text) as said, capture(model, SpectralNorm(iterations=2)) as seen: model(ids)
    assert len(said) == 2  # once a layer
    frame = seen.frame("spectral_norm")
    assert (frame["sigma_a_error"] > 1e-3 * frame["sigma_a"]).any() and frame["iterations"].max() == 2
    with pytest.raises(RuntimeError, match="has not converged"): collapse_rate(random_operator(60), iterations=2)


def test_bad_settings() -> None:
    for bad, match in (({"iterations": 0}, "1 step or more"), ({"tol": 0.0}, "between 0 and 1"), ({"tol": 2.0}, "between 0 and 1")):
        with pytest.raises(ValueError, match=match): SpectralNorm(**bad)
    op = random_operator(30)
    two = AttentionOperator(op.call.q.expand(2, -1, -1, -1), op.call.k.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="there are 2 samples"): collapse_rate(two)
    with pytest.raises(IndexError, match="no sample 2"): collapse_rate(two, sample=2)
    torch.testing.assert_close(collapse_rate(two, sample=1), collapse_rate(op))
    assert st.STATISTICS["spectral_norm"] is SpectralNorm and st.STATISTICS["token_spread"] is TokenSpread


@torch.no_grad()
def test_interventions_are_seen() -> None:
    ids, bert, llama = token_ids(60), ZOO["bert"](), ZOO["llama"]()
    with capture(bert, TIGHT, Formed()) as seen:
        bert(ids)
        with temperature(bert, .5): bert(ids)
    with capture(llama, TIGHT, Formed()) as seen_too, streaming_attention(llama, heads=[(0, 1), (1, 2)], sink=2, recent=5): llama(ids)
    for s in (seen, seen_too): np.testing.assert_allclose(s.frame("spectral_norm")["sigma_a"], s.frame("formed")["sigma_a"], rtol=1e-4)
    frame = seen.frame("spectral_norm")
    assert (frame.filter(sample=1)["sigma_a"] != frame.filter(sample=0)["sigma_a"]).all()


@torch.no_grad()
def test_the_pass_is_shared_with_received_attention() -> None:
    model, ids = ZOO["gemma2"](), token_ids(50, batch=2)
    with capture(model, SpectralNorm(), st.Received()) as both: model(ids)
    for stat in (SpectralNorm(), st.Received()):
        with capture(model, stat) as alone: model(ids)
        assert alone.frame(stat.title).equals(both.frame(stat.title))


# --- what D1 (arXiv 2410.24200) says of independent normal logits ---

def gaussian(n: int, sigma_s: float, tau: float = 1.0, draws: int = 6) -> float:
    "Mean sigma_a over draws, at a temperature"
    logits = sigma_s / tau * torch.randn(1, draws, n, n, generator=torch.Generator().manual_seed(n))
    empty = torch.zeros(1, draws, n, 1)
    return collapse_rate(AttentionOperator(empty, empty, mask=full_mask(), bias=logits)).mean().item()


def test_longer_texts_collapse_more_and_a_low_temperature_less() -> None:
    lengths = (32, 64, 128, 256, 512)
    at = [gaussian(n, .5) for n in lengths]
    assert at == sorted(at, reverse=True)
    for tau in (.9, .5): assert gaussian(128, .5, tau) > at[2]
    for n, got in zip(lengths[2:], at[2:], strict=True): assert got == pytest.approx(2 * math.sqrt((math.exp(.25) - 1) / n), rel=.05)


# --- TokenSpread ---

def spread(x: torch.Tensor) -> tuple[float, float]:
    "Its definition, for the states (n, d) of one text: all pairs"
    x = x.double()
    n, unit = len(x), x / x.norm(dim=-1, keepdim=True)
    hc = x - torch.ones(n, n).double() / n @ x
    cosines = unit @ unit.T
    return (hc.norm() / x.norm()).item(), (cosines.sum() - cosines.diagonal().sum()).item() / (n * (n - 1))


@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "llama", "gemma3"])
@pytest.mark.parametrize("side", [None, "left", "right"])
@torch.no_grad()
def test_token_spread_is_its_definition(name: str, side: str | None) -> None:
    model, n = ZOO[name](), 45
    ids, keep, left = token_ids(n, batch=2), None if side is None else padding(n, side), []
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == model.config.num_hidden_layers)
    with capture(model, TokenSpread()) as seen:
        hooks = [b.register_forward_hook(lambda _, __, out: left.append(out if isinstance(out, torch.Tensor) else out[0])) for b in blocks]
        model(ids, attention_mask=keep)
        for h in hooks: h.remove()
    frame = seen.frame("token_spread")
    assert frame.columns == ["sample", "layer", "n_tokens", "high_frequency", "token_similarity"] and len(frame) == 2 * len(blocks)
    for layer, states in enumerate(left):
        for b in range(2):
            want = spread(states[b] if keep is None else states[b, keep[b].bool()])
            row = frame.row(by_predicate=(pl.col("sample") == b) & (pl.col("layer") == layer), named=True)
            assert (row["high_frequency"], row["token_similarity"]) == pytest.approx(want, rel=1e-9)
            assert row["n_tokens"] == (n if keep is None else keep[b].sum())


@pytest.mark.parametrize("name", [n for n in CAUSAL if n in ("llama", "mistral", "gpt_oss")])
@torch.no_grad()
def test_token_spread_adds_up_over_chunks(name: str) -> None:
    model, n = ZOO[name](), 45
    ids, keep, cache = token_ids(n, batch=2), padding(n, "left"), DynamicCache(config=model.config)
    with capture(model, TokenSpread()) as whole: model(ids, attention_mask=keep)
    with capture(model, TokenSpread()) as parts:
        for a, b in ((0, 7), (7, 30), (30, 44), (44, 45)): model(ids[:, a:b], attention_mask=keep[:, :b], past_key_values=cache)
    one, many = whole.frame("token_spread"), parts.frame("token_spread")
    assert one["n_tokens"].equals(many["n_tokens"])
    for c in ("high_frequency", "token_similarity"): np.testing.assert_allclose(many[c], one[c], rtol=1e-4, atol=1e-5)


def test_token_spread_at_the_edges() -> None:
    def table(x: torch.Tensor, pos: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        state: dict = {}
        TokenSpread().update_residual(state, x, torch.arange(x.shape[1])[None] if pos is None else pos, 0)
        return TokenSpread().table(state)[1]
    same = table(1000 + 1e-4 * torch.randn(1, 5000, 700, generator=torch.Generator().manual_seed(0)).double())  # in several blocks
    assert same["high_frequency"].item() == pytest.approx(1e-7, rel=1e-2)  # float32 sums would leave nothing of it
    assert same["token_similarity"].item() == pytest.approx(1)
    opposite = table(torch.tensor([[[1.0, 0], [-1, 0]]]))
    assert (opposite["high_frequency"].item(), opposite["token_similarity"].item()) == (1, -1)
    with_zero = table(torch.tensor([[[1.0, 0], [1, 0], [0, 0]]]))  # a state without direction has cosine 0 with all
    assert with_zero["token_similarity"].item() == pytest.approx(1 / 3)
    one = table(torch.ones(1, 3, 4), torch.tensor([[-1, 0, -1]]))
    assert one["n_tokens"].item() == 1 and one["high_frequency"].isnan().all() and one["token_similarity"].isnan().all()
    dirty = torch.full((1, 3, 4), torch.nan)  # what stands at padding does not count
    dirty[0, 1:] = torch.tensor([[1.0, 2, 3, 4], [2, 0, 1, 5]])
    got = table(dirty, torch.tensor([[-1, 0, 1]]))
    assert (got["high_frequency"].item(), got["token_similarity"].item()) == pytest.approx(spread(dirty[0, 1:]))
