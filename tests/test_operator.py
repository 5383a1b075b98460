"""Properties of the attention operator that hold for every input, found by hypothesis, in float64 and float32."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longlens.attention.backends import _flex_blocks as flex_blocks
from longlens.attention.backends import attend_blocked, attend_flash, attend_flex
from longlens.attention.kernels import attend
from longlens.attention.logits import AttentionCall, make_call, tiles
from longlens.attention.masks import Mask, causal_mask, full_mask, seen_by, visible_keys, visible_tile
from longlens.attention.operator import AttentionOperator
from longlens.attention.reducers import SquareSum

settings.register_profile("longlens", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("longlens")


@st.composite
def operators(draw, sinks: bool = True, padding: bool = True) -> AttentionOperator:
    "An operator of any kind the package supports: grouped heads, caches, windows, padding, soft caps, sinks, rules"
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, kv, group, d = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    n, past = draw(st.integers(1, 40)), draw(st.integers(0, 20))
    strength = draw(st.sampled_from([0.1, 1.0, 5.0]))
    make = lambda h, m: (torch.randn(batch, h, m, d, generator=g) * strength).double()
    window = draw(st.none() | st.integers(1, 30))
    kind = draw(st.sampled_from(["causal", "full", "rule", "tensor"]))
    if kind == "causal": mask = causal_mask(past, window)
    elif kind == "full": mask = replace(full_mask(window), offset=past)
    elif kind == "rule": mask = Mask(None, None, past, rule=lambda b, h, q, k: (k <= q) & ((q + k) % 2 == 0))
    else:
        seen = torch.rand(1, 1, n, n + past, generator=g) < .6
        mask = Mask(None, None, past, rule=seen | (torch.arange(n)[:, None] + past == torch.arange(n + past)))
    if padding and draw(st.booleans()):
        holes, left = torch.rand(batch, n + past, generator=g) < .7, torch.arange(n + past).expand(batch, -1) >= draw(st.integers(0, 5))
        keep = holes if draw(st.booleans()) else left
        mask = replace(mask, keep=keep)
    softcap = draw(st.none() | st.just(3.0))
    learned = torch.randn(kv * group, generator=g).double() if sinks and draw(st.booleans()) else None
    return AttentionOperator(make(kv * group, n), make(kv, n + past), make(kv, n + past), mask=mask, softcap=softcap, sinks=learned)


def formed(op: AttentionOperator) -> torch.Tensor:
    "P by the textbook, from the definition of the mask alone"
    s, (b, h, nq, nk) = op.call, op.shape
    m, x = s.mask, s.q @ s.k.repeat_interleave(s.group, 1).mT * s.scale
    if s.softcap: x = s.softcap * torch.tanh(x / s.softcap)
    i, j = torch.arange(nq)[:, None] + m.offset, torch.arange(nk)[None]
    seen = torch.ones(nq, nk, dtype=torch.bool)
    if m.left is not None: seen = seen & (i - j <= m.left)
    if m.right is not None: seen = seen & (j - i <= m.right)
    seen = seen.expand(b, 1, nq, nk)
    if m.rule is not None: seen = seen & (m.rule if isinstance(m.rule, torch.Tensor) else m.rule(0, 0, i, j))
    if m.keep is not None: seen = seen & m.keep[:, None, None, :] & m.keep[:, None, m.offset:m.offset + nq, None]
    sinks = op.sinks
    extra = torch.full((b, h, nq, 1), -torch.inf).double() if sinks is None else sinks[None, :, None, None].expand(b, h, nq, 1)
    e = torch.cat([x.masked_fill(~seen, -torch.inf), extra], -1)
    rows = seen.any(-1, keepdim=True)  # a row that sees nothing has no attention, whatever the sink says
    return torch.where(rows, e.masked_fill(~rows, 0).softmax(-1)[..., :nk], 0.)


@given(operators())
def test_operator_is_the_formed_matrix(op: AttentionOperator) -> None:
    P = formed(op)
    torch.testing.assert_close(op.dense(), P)
    torch.testing.assert_close(op.output, P @ op.v.repeat_interleave(op.call.group, 1))
    torch.testing.assert_close(op.entropy(), -(P * P.clamp_min(1e-300).log()).sum(-1))
    torch.testing.assert_close(op.reduce(SquareSum())[0], (P**2).sum(-1))
    i, j = torch.arange(op.shape[2])[:, None] + op.mask.offset, torch.arange(op.shape[3])
    mass = P.sum(-1)
    torch.testing.assert_close(op.mean_distance() * mass, (P * (i - j).abs()).sum(-1))
    torch.testing.assert_close(op.window_mass(4), P.masked_fill((i - j).abs() >= 4, 0).sum(-1))
    torch.testing.assert_close(op.rows([0, -1]), P[:, :, [0, -1]])


@given(operators(padding=False))
def test_rows_sum_to_one_less_the_learned_sink(op: AttentionOperator) -> None:
    mass = op.matmul(torch.ones(op.shape[3], 1))[..., 0]
    torch.testing.assert_close(mass, op.key_mass())
    if op.sinks is None: torch.testing.assert_close(mass, torch.ones_like(mass))
    else: assert (mass <= 1 + 1e-9).all()


@given(operators(), st.integers(0, 50))
def test_masses_of_a_partition_sum_to_the_row(op: AttentionOperator, cut: int) -> None:
    n = op.shape[3]
    edges = sorted({0, n, *(e for e in (cut, cut // 2) if 0 < e < n)})
    masses = op.span_mass({str(a): (a, b) for a, b in pairwise(edges)})
    torch.testing.assert_close(masses.sum(-1), op.key_mass())


@given(operators())
def test_received_mass_sums_to_what_the_rows_give(op: AttentionOperator) -> None:
    torch.testing.assert_close(op.received().sum(-1), op.key_mass().sum(-1))
    assert (op.received() >= 0).all()


@given(operators(), st.integers(0, 2**31))
def test_transpose_is_the_adjoint(op: AttentionOperator, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(op.shape[2], 2, generator=g).double(), torch.randn(op.shape[3], 20, generator=g).double()
    torch.testing.assert_close(x.T @ op.matmul(y), op.rmatmul(x).mT @ y)


@given(operators(), st.integers(1, 300))
def test_tile_size_never_matters(op: AttentionOperator, size: int) -> None:
    seen = op.call.q.new_zeros(*op.shape)
    for at, p, _ in op.walk(size): seen[at.b, at.heads, at.rows.start:at.rows.stop, at.keys.start:at.keys.stop] += p
    torch.testing.assert_close(seen, op.dense())
    assert all(len(at.rows) * len(at.keys) >= 1 or not len(at.keys) for at in tiles(op.call, size=size))


@given(operators(), st.lists(st.integers(1, 39), max_size=3))
def test_chunks_of_queries_add_up(op: AttentionOperator, cuts: list[int]) -> None:
    s, n = op.call, op.shape[2]
    edges = sorted({0, n, *(c for c in cuts if c < n)})
    received, entropy = torch.zeros_like(op.received()), []
    for a, b in pairwise(edges):
        rule = s.mask.rule[:, :, a:b] if isinstance(s.mask.rule, torch.Tensor) else s.mask.rule
        mask = replace(s.mask, offset=s.mask.offset + a, rule=rule)
        part = AttentionOperator(s.q[:, :, a:b], s.k, op.v, mask=mask, softcap=s.softcap, sinks=op.sinks)
        received += part.received()
        entropy.append(part.entropy())
    torch.testing.assert_close(received, op.received())
    torch.testing.assert_close(torch.cat(entropy, 2), op.entropy())


@given(operators())
def test_counts_of_the_mask(op: AttentionOperator) -> None:
    P, (_, _, nq, nk) = formed(op)[:, :1] > 0, op.shape
    P = P if op.call.q.abs().max() < 15 else None  # strong logits underflow to exact zeros, which are not masked keys
    if P is None: return
    if op.mask.keep is not None: real = op.mask.keep[:, op.mask.offset:op.mask.offset + nq]
    visible = visible_keys(op.mask, nq, nk).expand(op.shape[0], -1)
    torch.testing.assert_close(visible if op.mask.keep is None else visible * real, P[:, 0].sum(-1).float())
    torch.testing.assert_close(seen_by(op.mask, nq, nk).expand(op.shape[0], -1), P[:, 0].sum(-2).float())


@given(operators(padding=False))
def test_entropy_and_support_are_bounded(op: AttentionOperator) -> None:
    if op.sinks is not None: return
    seen = visible_keys(op.mask, *op.shape[2:])[:, None].double()
    assert (op.entropy() >= -1e-9).all() and (op.entropy() <= seen.log() + 1e-9).all()
    assert (op.support() >= 1 - 1e-9).all() and (op.support() <= seen + 1e-6).all()


@pytest.mark.parametrize("dtype,tol", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_dtypes(dtype: torch.dtype, tol: float) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 300, 32, generator=g).to(dtype) for h in (4, 2, 2))
    op, exact = AttentionOperator(q, k, v), AttentionOperator(q.double(), k.double(), v.double())
    assert op.output.dtype == dtype
    torch.testing.assert_close(op.output.double(), exact.output, rtol=tol, atol=tol)
    torch.testing.assert_close(op.entropy().double(), exact.entropy(), rtol=1e-4, atol=1e-4)  # the sums are float32 whatever the input
    torch.testing.assert_close(op.received().double(), exact.received(), rtol=1e-4, atol=1e-4)


def test_grad_flows_through_attend() -> None:
    q, k, v = (torch.randn(1, 2, 20, 8, requires_grad=True) for _ in range(3))
    attend(q, k, v)[0].sum().backward()
    fused = [t.grad.clone() for t in (q, k, v)]
    for t in (q, k, v): t.grad = None
    torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    for a, t in zip(fused, (q, k, v), strict=True): torch.testing.assert_close(a, t.grad)


def test_memory_is_linear_in_the_length() -> None:
    "At 6,000 tokens the pattern of these heads would be 576 MB; the operator's largest tensor stays a tile"
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor): biggest = max(biggest, t.untyped_storage().nbytes())
            return out

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 6000, 16, generator=g) for h in (4, 4, 4))
    with Watch():
        op = AttentionOperator(q, k, v)
        op.entropy(), op.received(), op.support(), op.mean_distance(), op.distance_profile(), op.output
    assert biggest < 30 * 2**20


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "learned sinks"])
@pytest.mark.parametrize("mask", [causal_mask(12), causal_mask(12, 5), Mask(None, None, 12), Mask(3, 3, 12)], ids=str)
def test_gradients_are_those_of_the_formed_matrix(mask: Mask, sinks: bool) -> None:
    "A kernel's log-sum-exp carries no gradient: where parts are merged by it, another way must be taken"
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 8, generator=g, dtype=torch.float64, requires_grad=True) for n in (6, 18, 18))
    learned = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True) if sinks else None
    leaves = [q, k, v] + ([learned] if sinks else [])
    out, lse = attend(q, k, v, mask=mask, sinks=learned)
    got = torch.autograd.grad(out.square().sum(), leaves)
    assert not lse.requires_grad
    i, j = torch.arange(12, 18)[:, None], torch.arange(18)
    seen = (j <= i if mask.right == 0 else (i >= 0) & (j >= 0)) & ((i - j).abs() <= (18 if mask.left is None else mask.left))
    x = (q @ k.mT * 8**-.5).masked_fill(~seen, -torch.inf)
    if sinks: x = torch.cat([x, learned[None, :, None, None].expand(1, 2, 6, 1)], -1)
    want = torch.autograd.grad((x.softmax(-1)[..., :18] @ v).square().sum(), leaves)
    for a, b in zip(got, want, strict=True): torch.testing.assert_close(a, b)


@pytest.mark.parametrize("d_head,d_value", [(8, 24), (256, 64), (320, 320), (3, 5)])
@pytest.mark.parametrize("n,past", [(1, 0), (1, 30), (2, 30), (40, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_and_strides(d_head: int, d_value: int, n: int, past: int, dtype: torch.dtype) -> None:
    "Values wider than the keys, wide heads, one query, one query against a cache, tensors that are views"
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, n, 4, d_head, generator=g).to(dtype).transpose(1, 2)
    k = torch.randn(2, 2, d_head, n + past, generator=g).to(dtype).mT
    v = torch.randn(n + past, 2, 2, d_value, generator=g).to(dtype).permute(1, 2, 0, 3)
    for mask in (causal_mask(past), causal_mask(past, 7), Mask(None, None, past)):
        out, lse = attend(q, k, v, mask=mask)
        want = AttentionOperator(q.double(), k.double(), v.double(), mask=mask)
        tol = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(out.double(), formed(want) @ want.v.repeat_interleave(2, 1), rtol=tol, atol=tol)
        torch.testing.assert_close(lse.double(), want.lse, rtol=tol, atol=tol)


@pytest.mark.parametrize("mask", [Mask(2, 2, 30), Mask(2, 2, 19), Mask(0, 0, 25), causal_mask(40, 3)], ids=str)
def test_rows_too_far_from_any_key_see_nothing(mask: Mask) -> None:
    q, k = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 20, 8)
    op = AttentionOperator(q, k, k, mask=mask)
    nothing = visible_keys(mask, 6, 20)[0] == 0
    assert nothing.any() and torch.equal(op.lse[0, 0] == -torch.inf, nothing)
    assert (op.output[:, :, nothing] == 0).all() and op.dense()[:, :, nothing].sum() == 0 and op.output.isfinite().all()


def test_padding_of_other_tensors_is_refused() -> None:
    q = torch.randn(2, 2, 6, 8)
    for keep in (torch.ones(1, 6, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)):
        with pytest.raises(ValueError, match="the padding mask is"): attend(q, q, q, mask=replace(causal_mask(), keep=keep))
    with pytest.raises(ValueError, match="at least one query and one key"): attend(q[:, :, :0], q, q)


def test_products_are_not_remembered() -> None:
    "An iteration makes thousands: each kept with its columns would fill the memory"
    op = AttentionOperator(torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8))
    op.entropy()
    for _ in range(3): op.matmul(torch.randn(6, 1)), op.rmatmul(torch.randn(6, 1)), op.received(torch.rand(6)), op.span_mass({"a": (0, 2)})
    assert len(op._done) == 1


FLEX = {
    "causal after a cache": (dict(mask=causal_mask(60)), 200), "window": (dict(mask=causal_mask(60, 33)), 200),
    "full": (dict(mask=full_mask()), 260),
    "local, off the corner": (dict(mask=Mask(40, 20, 10)), 200), "soft cap": (dict(mask=causal_mask(60), softcap=3.0), 200),
    "left padding": (dict(mask=replace(causal_mask(60), keep=torch.stack([torch.arange(260) >= 70, torch.arange(260) >= 0]))), 200),
    "booleans": (dict(mask=Mask(None, None, 60, rule=torch.arange(260).expand(1, 4, 200, -1) % 3 < 1)), 200),
    "floats, cap": (dict(mask=Mask(None, 0, 60, rule=torch.zeros(2, 1, 200, 260).masked_fill(torch.arange(260) % 3 == 0, -3e38)),
                         softcap=4.0), 200),
    "bias": (dict(mask=causal_mask(60), bias=torch.linspace(-1, 1, 260).expand(1, 4, 200, 260)), 200),
    "one query": (dict(mask=causal_mask(259)), 1),
}


@pytest.mark.filterwarnings("ignore")    # without a compiler, torch says, logits are formed: that is what is wanted here
@pytest.mark.parametrize("name", FLEX)
def test_flex_attention_is_told_the_same_mask(name: str) -> None:
    "As torch defines it, on the CPU: what a GPU is asked for is right, and the blocks it may pass over hide nothing that is seen"
    kw, n = FLEX[name]
    g = torch.Generator().manual_seed(0)
    call = make_call(*(torch.randn(2, h, size, 20, generator=g) for h, size in ((4, n), (2, 260), (2, 260))), **kw)
    out, lse = attend_flex(call)
    want = attend_blocked(call)
    for a, b in zip((out, lse), want, strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    m = call.mask
    whole = m.keep is None and m.rule is None
    some, at, every, where = flex_blocks(m.left, m.right, m.offset, n, 260, whole, torch.device("cpu"))
    tiles_of = [visible_tile(m, b, slice(0, 4), range(n), range(260), torch.device("cpu")) for b in range(2)]
    everything = torch.ones(1, n, 260, dtype=torch.bool)
    tiles_of = [everything if x is None else x for x in tiles_of]
    seen = torch.stack([(x > -1e30 if x.is_floating_point() else x).expand(4, n, 260) for x in tiles_of])
    for r in range(some.shape[-1]):
        parts, full = set(at[0, 0, r, :some[0, 0, r]].tolist()), set(where[0, 0, r, :every[0, 0, r]].tolist())
        assert not parts & full
        for c in range(at.shape[-1]):
            tile = seen[:, :, r * 128:(r + 1) * 128, c * 128:(c + 1) * 128]
            if c in full: assert tile.all()
            elif c not in parts: assert not tile.any()


def test_log_sum_exp_is_natural() -> None:
    "Kernels compute with base 2, and some gave that out (torch's flash backend of FlexAttention once did): two equal keys give log 2"
    q = torch.zeros(1, 1, 2, 16)
    for mask, want in ((causal_mask(), [0.0, 0.6931472]), (full_mask(), [0.6931472, 0.6931472])):
        assert attend(q, q, q, mask=mask)[1][0, 0].tolist() == pytest.approx(want)


def test_the_flash_kernel_for_cuda_is_called_as_it_wants() -> None:
    "On tensors without numbers: shapes, layouts and arguments"
    q, k, v = (torch.empty(2, h, n, d, dtype=torch.bfloat16, device="meta") for h, n, d in ((8, 50, 60), (2, 90, 60), (2, 90, 44)))
    for mask in (causal_mask(40), causal_mask(30, 7), Mask(None, None, 40), Mask(5, 5, 40)):
        out, lse = attend_flash(AttentionCall(q, k, v, .1, mask))
        assert out.shape == (2, 8, 50, 44) and lse.shape == (2, 8, 50) and lse.dtype == torch.float32
