"""The CUDA paths against float64 on the CPU. Skipped where there is no CUDA device, which is where they were written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from zoo import ZOO, token_ids

import longlens.measure.statistics as st
from longlens.attention.kernels import attend
from longlens.attention.masks import Mask, causal_mask, full_mask, visible_keys
from longlens.attention.operator import AttentionOperator, summed_by
from longlens.measure.capture import capture

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and a CUDA build of torch")]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
N = 300
MASKS = {"causal": causal_mask(), "window": causal_mask(window=37), "full": full_mask(), "local": full_mask(9)}


def inputs(n_queries: int, dtype: torch.dtype, d_head: int = 64, d_value: int = 64) -> list[torch.Tensor]:
    "Queries, keys and values of 4 heads over 2 KV heads, 2 samples"
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, h, n, d, generator=g).to(dtype) for h, n, d in ((4, n_queries, d_head), (2, N, d_head), (2, N, d_value))]


def compare(qkv: list[torch.Tensor], mask: Mask, **kw) -> None:
    "attend() on the GPU against attend() of the same numbers in float64 on the CPU"
    on_gpu = replace(mask, keep=None if mask.keep is None else mask.keep.cuda())
    out, lse = attend(*(t.cuda() for t in qkv), mask=on_gpu, **{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in kw.items()})
    want = attend(*(t.double() for t in qkv), mask=mask, **{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kw.items()})
    tol = TOLERANCE[qkv[0].dtype]
    for a, b in zip((out, lse), want, strict=True): torch.testing.assert_close(a.double().cpu(), b, rtol=tol, atol=tol)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("past", [0, 100, N - 1])
@pytest.mark.parametrize("d_head,d_value", [(64, 64), (24, 16), (13, 20), (320, 64)])
def test_attend(dtype: torch.dtype, mask: str, past: int, d_head: int, d_value: int) -> None:
    compare(inputs(N - past, dtype, d_head, d_value), replace(MASKS[mask], offset=past))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["left", "right", "holes"])
def test_padding(dtype: torch.dtype, mask: str, kind: str) -> None:
    keep = torch.ones(2, N, dtype=torch.bool)
    keep[0, {"left": slice(0, 40), "right": slice(260, N), "holes": slice(50, N, 7)}[kind]] = False
    compare(inputs(N, dtype), replace(MASKS[mask], keep=keep))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_soft_cap_and_learned_sinks(dtype: torch.dtype) -> None:
    compare(inputs(N, dtype), causal_mask(), softcap=5.0)
    compare(inputs(N, dtype), causal_mask(), sinks=torch.tensor([0.0, 2.0, -1.0, 4.0]).to(dtype))
    compare(inputs(4, dtype), Mask(2, 2, N - 2))  # queries that see nothing


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_statistics_of_the_operator(dtype: torch.dtype) -> None:
    q, k, v = inputs(N, dtype)
    got, want = AttentionOperator(q.cuda(), k.cuda(), v.cuda()), AttentionOperator(q.double(), k.double(), v.double())
    for name in ("entropy", "support", "received", "mean_distance", "distance_profile"):
        torch.testing.assert_close(getattr(got, name)().double().cpu(), getattr(want, name)(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_log_sum_exp_is_natural(dtype: torch.dtype, mask: str) -> None:
    "Equal keys: the logarithm of how many are seen, by whatever kernel is taken (FlexAttention's flash backend gave base 2 once)"
    q = torch.zeros(1, 4, N, 64, dtype=dtype, device="cuda")
    k = q[:, :2]
    for more in ({}, {"softcap": 5.0}):
        lse = attend(q, k, k, mask=MASKS[mask], **more)[1]
        want = visible_keys(MASKS[mask], N, N).log()
        torch.testing.assert_close(lse[0, 0].float().cpu(), want[0], rtol=1e-3, atol=1e-3)


def test_which_kernel_is_taken() -> None:
    "One call where there is a kernel for it, and none that is merged from several"
    from longlens.attention.kernels import _way_of
    from longlens.attention.logits import make_call
    half, single = ([t.cuda() for t in inputs(N - 100, d)] for d in (torch.bfloat16, torch.float32))
    for mask in (causal_mask(100), causal_mask(100, 37)):
        assert _way_of(make_call(*half, mask=mask)).name == "flash kernel for CUDA"
        assert _way_of(make_call(*single, mask=mask)).name == "FlexAttention"
    assert _way_of(make_call(*half, mask=causal_mask(100), softcap=5.0)).name == "FlexAttention"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_triton_and_torch_add_up_the_same(dtype: torch.dtype, mask: str) -> None:
    q, k, v = (t.cuda() for t in inputs(N, dtype))
    found = []
    for kernels in ("triton", "torch"):
        op = AttentionOperator(q, k, v, mask=MASKS[mask])
        with summed_by(kernels):
            rows = [op.entropy(), op.support(), op.mean_distance(), op.distance_profile(), op.topk([5, N - 1], 4)[0]]
            found.append([*rows, op.received(), op.block_mass()])
    for a, b in zip(*found, strict=True): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_capture_of_a_small_llama() -> None:
    statistics = st.Entropy(), st.Received(), st.SinkMass(4), st.Distance(), st.ResidualNorm(), st.MassiveActivations()
    ids, keep = token_ids(200, batch=2), torch.ones(2, 200, dtype=torch.long)
    keep[0, :30] = 0
    model = ZOO["llama"]()
    with capture(model, *statistics) as cpu: model(ids, attention_mask=keep)
    model.cuda()
    with capture(model, *statistics) as gpu: model(ids.cuda(), attention_mask=keep.cuda())
    for name, frame in cpu.frames.items():
        other = gpu.frame(name)
        for column in frame.columns:
            torch.testing.assert_close(torch.tensor(other[column].to_numpy()), torch.tensor(frame[column].to_numpy()), rtol=1e-3, atol=1e-3)


def test_sweep_of_a_small_llama() -> None:
    "Shared beginnings, batches and answers on the GPU give what they give on the CPU"
    import longlens as ll
    from longlens.probes.generate import Ask
    from longlens.prompts.haystack import Haystack
    from longlens.sweeps.cells import Cell
    lms = [ll.load(device=d) for d in ("cpu", "cuda")]
    at = [(d, t) for d in (10, 50, 90) for t in range(3)]
    cells = [Cell.of(ll.needle_context(lms[0], 600, d, wording="facts", haystack=Haystack.generated(0), seed=t)) for d, t in at]
    want, got = (ll.sweep(lm, cells, Ask(4, heads_on="needle")) for lm in lms)
    assert want.table("answers")["reply"].equals(got.table("answers")["reply"])
    for name, column in (("answers", "logprob"), ("attention", "mass")):
        a, b = (s.table(name)[column].to_torch() for s in (want, got))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
