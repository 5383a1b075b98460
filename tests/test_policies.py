"""Key sets and policies: exact against formed masks in eager attention, worked by hand, and as reports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import token_ids, zoo_model

from longlens import PolicyReport, keep_keys, load, use_policy
from longlens.attention.kernels import attend
from longlens.attention.masks import NEVER, KeyChoice, KeySet
from longlens.attention.operator import AttentionOperator
from longlens.interventions.base import UnsupportedModel, head_sizes
from longlens.interventions.heads import scale_spans
from longlens.measure.capture import capture
from longlens.measure.statistics import Entropy, Rows
from longlens.models.architecture import attention_modules
from longlens.policies.base import Replacement, Selection
from longlens.policies.use import POLICIES

N, SINCE = 40, 26
MODELS = ("llama", "mistral", "gemma2", "gemma3", "gpt_oss", "gpt_neox")  # grouped heads, windows, soft caps, learned sinks


# ---- the operator, in float64, against a formed matrix

def formed(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
    "Attention by the textbook"
    g = q.shape[1] // k.shape[1]
    x = q @ k.repeat_interleave(g, 1).mT * q.shape[-1] ** -.5
    if softcap: x = softcap * torch.tanh(x / softcap)
    x = x.masked_fill(~seen, -torch.inf)
    if sinks is not None: x = torch.cat([x, sinks[None, :, None, None].expand(*x.shape[:3], 1)], -1)
    return x.softmax(-1)[..., :k.shape[2]] @ v.repeat_interleave(g, 1)


@pytest.mark.parametrize("softcap", [None, 2.])
@pytest.mark.parametrize("window", [None, 9])
def test_key_sets_are_exact(window: int | None, softcap: float | None) -> None:
    "Evicted, one after another, chosen, replaced: output, weights and sums, with windows, soft caps, learned sinks, cached keys"
    from longlens.attention.masks import causal_mask
    g = torch.Generator().manual_seed(0)
    c, n, since = 6, 20, 14
    draw = lambda h, m: torch.randn(1, h, m, 8, generator=g).double()
    q, k, v, sinks = draw(4, n), draw(2, c + n), draw(2, c + n), torch.randn(4, generator=g).double()
    at = torch.arange(c, c + n)
    later = (at >= since)[:, None]
    band = torch.arange(c + n) <= at[:, None]
    if window: band &= at[:, None] - torch.arange(c + n) < window
    once = torch.where(torch.rand(1, 2, c + n, generator=g) < .4, 0, NEVER)
    once[..., since:] = NEVER
    going = torch.arange(c + n)[None, None] + torch.tensor([3, 5])[None, :, None]
    table = (torch.rand(4, n, c + n, generator=g) < .5) | (torch.arange(c + n) == at[:, None])
    chosen = KeyChoice(lambda b, rows: table[:, rows], torch.arange(n), torch.arange(c + n))
    by_head = lambda until: (at[:, None] < until[0].repeat_interleave(2, 0)[:, None]) | ~later
    other = draw(2, c + n), draw(2, c + n)
    for keyset, seen in ((KeySet(at[None], since, once), by_head(once)), (KeySet(at[None], since, going), by_head(going)),
                         (KeySet(at[None], since, choice=chosen), table | ~later),
                         (KeySet(at[None], since, once, other=other), by_head(once))):
        args = dict(mask=causal_mask(c, window), softcap=softcap, sinks=sinks, sets=(keyset,))
        out = formed(q, k, v, seen & band, softcap, sinks)
        if keyset.other: out[:, :, at >= since] = formed(q, *other, seen & band, softcap, sinks)[:, :, at >= since]
        torch.testing.assert_close(attend(q, k, v, **args)[0], out, atol=1e-10, rtol=0)
        op = AttentionOperator(q, k, v, **args)
        torch.testing.assert_close(op.output, out, atol=1e-10, rtol=0)
        assert (op.dense()[0] > 0).equal((seen & band).expand(4, -1, -1))
        torch.testing.assert_close(op.dense().sum(-1), op.key_mass(), atol=1e-9, rtol=0)
        part = op.call.narrow(range(5, n), heads=torch.tensor([2, 3]))
        torch.testing.assert_close(AttentionOperator.of(part).output,
                                   out[:, 2:, 5:], atol=1e-10, rtol=0)


# ---- in models, against eager attention with the mask applied

@contextmanager
def masked(hf: Any, seen: Any) -> Iterator[None]:
    "Eager attention with more keys hidden: `seen(layer)` is bool, (batch|1, heads|1, queries, keys)"
    hf.set_attn_implementation("eager")
    hooks = []
    for layer, _, m in attention_modules(hf):
        def before(module: Any, args: tuple, kwargs: dict, layer: int = layer) -> tuple:
            mask = kwargs["attention_mask"]
            return args, kwargs | {"attention_mask": mask.masked_fill(~seen(layer), torch.finfo(mask.dtype).min)}
        hooks.append(m.register_forward_pre_hook(before, with_kwargs=True))
    try: yield
    finally:
        for h in hooks: h.remove()


def kept_keys(hf: Any, seed: int = 0) -> dict[int, Tensor]:
    "Half of the keys of each KV head"
    layers, _, n_kv = head_sizes(hf)
    return {i: torch.rand(n_kv, SINCE, generator=torch.Generator().manual_seed(seed + i)) < .5 for i in range(layers)}


def seen_of(hf: Any, kept: dict[int, Tensor]) -> Any:
    _, n_heads, n_kv = head_sizes(hf)

    def seen(layer: int) -> Tensor:
        keys = torch.nn.functional.pad(kept[layer], (0, N - SINCE), value=True).repeat_interleave(n_heads // n_kv, 0)
        return keys[None, :, None] | (torch.arange(N) < SINCE)[:, None]
    return seen


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_kept_keys_in_models(name: str) -> None:
    "One piece, chunks over a cache, token by token, padded"
    hf, ids = zoo_model(name), token_ids(N)
    kept = kept_keys(hf)
    with masked(hf, seen_of(hf, kept)): wanted = hf(ids).logits[0]
    hf.set_attn_implementation("sdpa" if name not in ("gpt_oss", "gemma2") else "eager")
    plain = hf(ids).logits[0]
    assert (wanted - plain).abs().max() > .05
    lm = load(hf)
    with keep_keys(lm, kept, since=SINCE):
        torch.testing.assert_close(lm.hf(ids).logits[0], wanted, atol=2e-3, rtol=1e-3)
        for before, chunk in ((SINCE - 4, 5), (SINCE + 3, 1)):
            after = lm.prefill(ids[0, :before], chunk=7).logits_after(ids[0, before:], chunk)
            torch.testing.assert_close(after, wanted[before:], atol=2e-3, rtol=1e-3)
        mask = torch.ones(2, N + 5, dtype=torch.int64)
        mask[0, :5] = mask[1, -5:] = 0
        both = torch.zeros_like(mask)
        both[0, 5:], both[1, :N] = ids[0], ids[0]
        padded = lm.hf(both, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
        torch.testing.assert_close(padded[0, 5:], wanted, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(padded[1, :N], wanted, atol=2e-3, rtol=1e-3)
        prompt = ids[0, :SINCE + 1]
        new = lm.generate_ids(prompt, 4)
        assert new.tolist() == [int(lm.logits(torch.cat([prompt, new[:i]]), [-1]).argmax()) for i in range(len(new))]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_chosen_keys_and_capture(name: str) -> None:
    "Keys that differ by query, and the weights that are captured under them"
    hf, ids = zoo_model(name), token_ids(N)
    layers, n_heads, _ = head_sizes(hf)
    tables = [torch.rand(n_heads, N, N, generator=torch.Generator().manual_seed(i)) < .5 for i in range(layers)]
    for t in tables: t |= torch.eye(N, dtype=torch.bool)
    with masked(hf, lambda layer: (tables[layer] | (torch.arange(N) < SINCE)[:, None])[None]):
        out = hf(ids, output_attentions=True)
    lm = load(hf)

    def choose(call: Any, layer: int) -> Any:
        off, n = call.mask.offset, call.k.shape[2]
        return lambda b, rows: tables[layer][:, rows + off, :n]
    with keep_keys(lm, choose=choose, since=SINCE), capture(lm, Rows([N - 1, 3], top=None), Entropy()) as seen:
        torch.testing.assert_close(lm.hf(ids).logits[0], out.logits[0], atol=2e-3, rtol=1e-3)
    with keep_keys(lm, choose=choose, since=SINCE):
        chunked = lm.prefill(ids[0, :30], chunk=11).logits_after(ids[0, 30:], 3)
        torch.testing.assert_close(chunked, out.logits[0, 30:], atol=2e-3, rtol=1e-3)
    rows = seen.frame("rows")
    for layer in range(layers):
        mine = rows.filter(layer=layer, query=N - 1).sort("head", "position")
        found = torch.zeros(n_heads, N)
        found[mine["head"].to_list(), mine["position"].to_list()] = torch.tensor(mine["weight"].to_list())
        torch.testing.assert_close(found, out.attentions[layer][0, :, -1, :N], atol=1e-4, rtol=0)


@torch.no_grad()
def test_other_keys_stand_in() -> None:
    "Keys and values of another text in place of the prompt's: as if the cache held them"
    hf = zoo_model("llama")
    lm, ids = load(hf), token_ids(N)[0]
    before = lm.prefill(ids[:SINCE])
    changed = before.fork()
    others = {}
    for layer, c in enumerate(changed.layers):
        c.keys, c.values = c.keys + .3, c.values.roll(1, 2)
        others[layer] = c.keys[0], c.values[0]
    wanted = hf(ids[None, SINCE:], past_key_values=changed).logits[0]
    with keep_keys(lm, other=others, since=SINCE):
        torch.testing.assert_close(before.logits_after(ids[SINCE:]), wanted, atol=1e-4, rtol=0)
        torch.testing.assert_close(lm.logits(ids)[SINCE:], wanted, atol=1e-4, rtol=0)
        torch.testing.assert_close(lm.logits(ids)[:SINCE], lm.logits(ids[:SINCE]), atol=1e-4, rtol=0)
        with pytest.raises(UnsupportedModel, match="enter keep_keys after it"), scale_spans(lm, {"a": (0, 3)}, .5): lm.logits(ids)


# ---- policies

def prompts(lm: Any, n: int = 48) -> dict[int, Any]:
    from longlens.probes.policies.inputs import PolicyCase
    from longlens.probes.policies.measures import read_prompts
    return read_prompts(lm, PolicyCase(token_ids(n + 2)[0], n, 1), list(POLICIES.values()), chunk=20)[1]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@torch.no_grad()
def test_every_policy_keeps_its_budget(name: str) -> None:
    "Over all heads and layers as many keys as an even budget has, and no more"
    lm = load(zoo_model(name))
    found, at = prompts(lm), torch.arange(3)
    for key, policy in POLICIES.items():
        if key == "full" or (key in ("expected_attention", "a2ats") and name == "gemma2"): continue
        policy = policy.prepared(lm, token_ids(50)[0][:48])
        ready = policy.ready({layer: policy.read(p) for layer, p in found.items()}) if policy.reads else policy
        total = 0.
        for p in found.values():
            if isinstance(ready, Selection):
                index, queries = ready.index(p, 12), p.op.call.q[0][:, -3:]
                ready.note(index, queries, at)
                kept = ready.select_at(p, index, queries, at, 12)
                if key == "recycled": kept = kept[:, 1:]  # without the full step
                assert kept.shape in ((p.n_kv * p.op.call.group, kept.shape[1], p.n), (1, kept.shape[1], p.n)), key
                total += float(kept.float().sum(-1).mean()) * p.n_kv
            else:
                kept = ready.change(p, 12)[0] if isinstance(ready, Replacement) else ready.keep(p, 12)
                assert kept.shape in ((p.n_kv, p.n), (1, p.n)), key
                total += float(kept.expand(p.n_kv, -1).sum())
        wanted = 12 * sum(p.n_kv for p in found.values())
        assert (0 if key == "shifted_groups" else .85) * wanted <= total <= wanted, (key, total, wanted)  # groups see less by their rule


@torch.no_grad()
def test_mass_kept_is_that_of_eager_attention() -> None:
    "Against transformers' own attention weights, and the oracle above everything"
    from longlens.probes.policies.inputs import PolicyCase
    from longlens.probes.policies.measures import measure_case
    hf, ids = zoo_model("llama"), token_ids(60)[0]
    lm = load(hf)
    case = PolicyCase(ids, 48, 4, {"needle": range(10, 14)})
    chosen = {k: POLICIES[k] for k in ("full", "random", "streaming", "oracle", "snapkv", "quest", "look_m")}
    found = measure_case(lm, case, chosen, [.25])
    hf.set_attn_implementation("eager")
    weights = hf(ids[None, :-1], output_attentions=True).attentions
    kept = found.kept.filter(policy="snapkv")
    for layer, w in enumerate(weights):
        seen = torch.ones(2, 59, dtype=torch.bool)
        seen[:, :48] = False
        mine = kept.filter(layer=layer)
        seen[mine["kv_head"].to_list(), mine["position"].to_list()] = True
        want = (w[0, :, 48:] * seen.repeat_interleave(2, 0)[:, None]).sum(-1).mean(-1)
        got = found.heads.filter(policy="snapkv", layer=layer).sort("head")["mass_kept"].to_list()
        torch.testing.assert_close(torch.tensor(got), want, atol=1e-4, rtol=0)
    rows = {r["policy"]: r for r in found.rows.to_dicts()}
    assert rows["full"]["running_error"] < 1e-4 and rows["full"]["mass_kept"] == pytest.approx(1, abs=1e-4)
    assert all(rows["oracle"]["mass_kept"] >= r["mass_kept"] - 1e-6 for k, r in rows.items() if k != "full")
    lost = sum(found.heads.filter(policy="snapkv")[f"lost_{p}"] for p in ("sink", "spans", "recent", "rest"))
    torch.testing.assert_close(torch.tensor(lost.to_list()), 1 - torch.tensor(found.heads.filter(policy="snapkv")["mass_kept"].to_list()),
                               atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_policy_in_force() -> None:
    "In one piece, over a cache, token by token: what `keep` says, and nothing before the prompt has been read"
    lm, ids = load(zoo_model("gpt_oss")), token_ids(N)[0]
    for policy in ("snapkv", "quest", "look_m", "duo_attention"):
        with use_policy(lm, policy, 8, ids[:SINCE]):
            whole = lm.logits(ids)
            chunked = lm.prefill(ids[:SINCE], chunk=10).logits_after(ids[SINCE:], 3)
        torch.testing.assert_close(chunked, whole[SINCE:], atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(whole[:SINCE], lm.logits(ids[:SINCE]), atol=2e-3, rtol=1e-3)
    with use_policy(lm, "tova", 8, ids[:SINCE]), pytest.raises(UnsupportedModel, match="one text at a time"):
        lm.hf(ids[None].expand(2, -1))
    before = lm.prefill(ids[:SINCE])
    with use_policy(lm, "tova", 8, ids[:SINCE]), pytest.raises(ValueError, match="read them inside"): before.extend(ids[SINCE:])


@torch.no_grad()
def test_h2o_goes_on_as_formed_weights_say() -> None:
    "The first layer, whose keys no policy changes: key after key, by the softmax over the keys that are left"
    from longlens.policies.attention import H2O
    lm, n, budget = load(zoo_model("llama")), 20, 8
    ids = token_ids(32)[0]
    with use_policy(lm, H2O(go_on=True), budget, ids[:n]) as (on,):
        lm.prefill(ids[:n]).logits_after(ids[n:])
        until = on.going[0].until
    call = prompts(lm, 32)[0].op.call
    x = call.q[0] @ call.k[0].repeat_interleave(call.group, 0).mT * call.scale  # (heads, 32, 32)
    formed = lambda i, alive: x[:, i, :i + 1].masked_fill(~alive.repeat_interleave(call.group, 0)[:, :i + 1], -torch.inf).softmax(-1)
    score, alive = torch.zeros(len(call.k[0]), 32), torch.ones(len(call.k[0]), 32, dtype=torch.bool)
    wanted = torch.full_like(alive, 1 << 40, dtype=torch.int64)
    for i in range(32):
        seen = alive if i >= n else torch.ones_like(alive)  # the prompt's rows are over the whole text
        score[:, :i + 1] += formed(i, seen).unflatten(0, (len(alive), -1)).mean(1)
        if i < budget: continue
        goes = score[:, :i + 1 - budget // 2].masked_fill(~alive[:, :i + 1 - budget // 2], torch.inf).argmin(-1)
        for h, j in enumerate(goes.tolist()): alive[h, j], wanted[h, j] = False, 0 if i < n else i + 1
    assert torch.equal(until.clamp_max(1 << 40), wanted)


@torch.no_grad()
def test_what_cannot_be_applied_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    "Where all policies are asked for; one that is asked for by name is an error"
    from longlens import policy_lens
    from longlens.probes.policies import probe
    few = ("full", "random", "streaming", "oracle", "expected_attention", "tova")
    monkeypatch.setattr(probe, "POLICIES", {name: POLICIES[name] for name in few})
    lm, ids = load(zoo_model("gpt2")), token_ids(60)[0]
    report = policy_lens(lm, ids, budgets=.5, targets=8)
    assert report.table["policy"].unique().sort().to_list() == sorted(set(few) - {"expected_attention"})
    assert "no rotary positions" in report.meta["left_out"]["expected_attention"]
    assert any("expected_attention was left out" in s for s in report.findings())
    with pytest.raises(UnsupportedModel, match="no rotary positions"): policy_lens(lm, ids, "expected_attention", .5, targets=8)


def test_the_lens_and_the_command(tmp_path: Any, capsys: Any) -> None:
    "Tables of one policy beside the controls, files for serving code, a page"
    from longlens.cli.main import main
    asked = ["needle-lm", "--policies", "tova", "--budgets", "0.2", "--contexts", "2", "--tokens", "200", "--out", str(tmp_path / "out")]
    assert main(["policies", *asked]) == 0
    text = capsys.readouterr().out
    assert "quality and not speed" in text and (tmp_path / "out/index.html").exists()
    assert len((tmp_path / "out/head_budgets.tsv").read_text().splitlines()) == load().n_layers
    report = PolicyReport.load(tmp_path / "out/policies")
    assert report.table["policy"].to_list() == ["full", "random", "streaming", "oracle", "tova"]
    assert report.frames["paired"].filter(policy="oracle", control="random", measure="mass_kept")["lower"][0] > 0
    assert main(["policies", "--policies", "tofu", "--dry-run"]) == 2
    assert "there is no policy 'tofu'" in capsys.readouterr().err


# ---- what policies assume

@torch.no_grad()
def test_premises_against_formed_patterns() -> None:
    "alpha, M and the attention received, against transformers' own weights, with grouped heads; and of every architecture, numbers"
    from longlens.probes.policies.premises import hyper_hardness, lazy_queries, policy_premises, query_sparsity
    found, ids = prompts(load(zoo_model("llama"))), token_ids(50)[0][:48]
    hf = zoo_model("llama")
    hf.set_attn_implementation("eager")
    weights = hf(ids[None], output_attentions=True).attentions
    for layer, p in found.items():
        w = weights[layer][0]
        torch.testing.assert_close(hyper_hardness(p.op)[0], 48 * w.pow(2).sum(1).amax(-1), atol=1e-3, rtol=1e-3)
        log = w[:, -1].log()
        torch.testing.assert_close(query_sparsity(p.op)[:, -1], log.amax(-1) - log.mean(-1), atol=1e-3, rtol=1e-3)
        assert lazy_queries(p.op)[0].shape == (len(w),)
    for name in ("gemma2", "gpt_oss", "mistral"):
        frame = policy_premises(load(zoo_model(name)), ids)
        assert not any(frame[c].is_nan().any() or frame[c].is_infinite().any() for c in frame.columns[2:]), name


def test_what_an_indexer_keeps() -> None:
    "The dense attention's mass on the keys that a model's own indexer chooses: all of it, if it may choose all but one, and less with less"
    from zoo import EVERYTHING

    from longlens.probes.policies.premises import indexer_mass
    hf, ids = EVERYTHING["deepseek_v32"](), token_ids(24)[0]
    few = indexer_mass(hf.eval(), ids)
    assert few["keys"].unique().to_list() == [8] and few["mass"].is_between(0, 1).all()
    for m in hf.modules():
        if hasattr(m, "index_topk"): m.index_topk = 23
    most = indexer_mass(hf, ids)
    assert (most["mass"] > few["mass"]).all()
    with pytest.raises(ValueError, match="give a longer text"): indexer_mass(hf, ids[:20])
