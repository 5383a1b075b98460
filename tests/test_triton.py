"""The Triton kernels in Triton's interpreter, on the CPU, against the pattern in float64: every kind of call, number format and tile."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longlens.attention.logits import AttentionCall, make_call
from longlens.attention.masks import NEVER, KeyChoice, KeySet, Mask, Stream, causal_mask, full_mask
from longlens.attention.operator import AttentionOperator, summed_by
from longlens.attention.reducers import (
    BlockMass,
    DistanceSum,
    EntropySum,
    Product,
    ReceivedSum,
    Reducer,
    SquareSum,
    TransposedProduct,
    WindowMass,
)

HERE = importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.skipif(not HERE, reason="Triton is not installed: pip install triton==3.9.0 (make test does so)")
if HERE:    # which sets Triton to interpret, where there is no GPU, before it is imported
    from longlens.attention import triton_blocks, triton_columns, triton_rows, triton_tiles
    from longlens.attention.triton_pass import add_up
    from longlens.attention.triton_tiles import Described, TileSize, tiles_seen, why_not

elif os.environ.get("CI"): raise ImportError("in continuous integration the GPU kernels are tested: make test installs Triton")

N, PAST = 70, 21
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-5, torch.bfloat16: 2e-5}    # of sums of the same inputs: they are in float32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(n: int, n_keys: int, d: int = 20, batch: int = 1, heads: int = 4, kv: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(batch, h, m, d, generator=g) * s for h, m, s in ((heads, n, 2), (kv, n_keys, 1), (kv, n_keys, 1))]


def padded(left: bool) -> Tensor:
    keep = torch.ones(2, N + PAST, dtype=torch.bool)
    if left: keep[0, :30] = False
    else: keep[1, 60:] = False
    return keep


def table(dtype: torch.dtype) -> Tensor:
    "A mask as a tensor, of booleans or of floats to be added: each query sees itself and about half of the others"
    g = torch.Generator().manual_seed(1)
    seen = (torch.rand(1, 4, N, N + PAST, generator=g) < .5) | (torch.arange(N)[:, None] + PAST == torch.arange(N + PAST))
    return seen if dtype == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(dtype).min)


def keyset(other: bool = False) -> KeySet:
    "From position 50 on, some keys are gone, by KV head; and if asked, later queries meet other keys"
    g = torch.Generator().manual_seed(2)
    at = torch.arange(PAST, N + PAST)
    until = torch.where(torch.rand(1, 2, N + PAST, generator=g) < .4, torch.randint(50, N + PAST, (1, 2, N + PAST), generator=g), NEVER)
    until = until.maximum(torch.arange(N + PAST) + 1)    # a query sees itself
    return KeySet(at[None], since=50, until=until, other=(torch.randn(1, 2, N + PAST, 20, generator=g), None) if other else None)


CASES: dict[str, dict[str, Any]] = {
    "causal": dict(mask=causal_mask(PAST)), "no cache": dict(mask=causal_mask(), n_keys=N), "window": dict(mask=causal_mask(PAST, 17)),
    "full": dict(mask=full_mask(), n_keys=N), "local": dict(mask=full_mask(9), n_keys=N), "to the right": dict(mask=Mask(None, 5, PAST)),
    "soft cap": dict(mask=causal_mask(PAST), softcap=3.), "learned sinks": dict(mask=causal_mask(PAST), sinks=torch.tensor([0., 2, -1, 4])),
    "left padding": dict(mask=replace(causal_mask(PAST), keep=padded(True))),
    "right padding, window, cap": dict(mask=replace(causal_mask(PAST, 30), keep=padded(False)), softcap=5.),
    "queries that see nothing": dict(mask=Mask(2, 2, N + PAST - 10)),
    "bias": dict(mask=causal_mask(PAST), bias=torch.randn(1, 4, N, N + PAST)),
    "mask of booleans": dict(mask=Mask(None, None, PAST, rule=table(torch.bool))),
    "mask of floats": dict(mask=Mask(None, None, PAST, rule=table(torch.float32))),
    "key set": dict(mask=causal_mask(PAST), sets=(keyset(),)), "other keys": dict(mask=causal_mask(PAST), sets=(keyset(True),)),
    "one query": dict(mask=causal_mask(N + PAST - 1), n=1), "scale": dict(mask=causal_mask(PAST), scale=.5),
}


def moved(x: Any, dtype: torch.dtype, device: str = DEVICE) -> Any:
    "A call's parts elsewhere, and floats in a format"
    if isinstance(x, Tensor): return x.to(device, dtype if x.is_floating_point() else x.dtype)
    if isinstance(x, tuple): return tuple(moved(y, dtype, device) for y in x)
    if isinstance(x, Mask): return replace(x, keep=moved(x.keep, dtype, device), rule=moved(x.rule, dtype, device))
    if isinstance(x, KeySet): return replace(x, **{name: moved(getattr(x, name), dtype, device) for name in ("at", "until", "other")})
    return x


def case(name: str, dtype: torch.dtype = torch.float32, d: int = 20) -> tuple[AttentionCall, AttentionOperator]:
    "The call in a format, and the operator of the same numbers in float64 on the CPU"
    kw = dict(CASES[name])
    batch = 1 if kw["mask"].keep is None else 2
    qkv = moved(tuple(inputs(kw.pop("n", N), kw.pop("n_keys", N + PAST), d, batch)), dtype)
    kw = {key: moved(value, dtype) for key, value in kw.items()}
    exact = {key: moved(value, torch.float64, "cpu") for key, value in kw.items()}
    return make_call(*qkv, **kw), AttentionOperator.of(make_call(*moved(qkv, torch.float64, "cpu"), **exact))


def reducers(batch: int, n: int, n_keys: int, every: bool) -> list[Reducer]:
    "Sums of both kernels, or every sum in every form"
    g = torch.Generator().manual_seed(3)
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64).float()
    some = [EntropySum(), SquareSum(), DistanceSum(), Product(rand(1, 1, n_keys, 3)), ReceivedSum(), TransposedProduct(rand(1, 1, n, 2))]
    more = [WindowMass([8, 1, 300]), WindowMass([20]), Product(rand(batch, 4, n_keys, 1)), ReceivedSum(rand(batch, n)), BlockMass(40, 64)]
    return some + more if every else some


def check(call: AttentionCall, exact: AttentionOperator, tol: float, every: bool = False) -> None:
    many = reducers(call.shape[0], *call.shape[2:], every)
    with summed_by("torch"): want = exact.reduce(*many)
    want = [w.clone() for w in want]
    lse = exact.lse.float().to(DEVICE)
    left = add_up(call, lse, many)
    assert not left
    for r, w in zip(many, want, strict=True):
        near = dict(rtol=tol, atol=tol * max(1., float(w.abs().max())))
        torch.testing.assert_close(r.result().double().cpu(), w, **near, msg=lambda m, r=r: f"{type(r).__name__}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_sums_of_every_kind_of_call(name: str) -> None: check(*case(name), TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["window", "right padding, window, cap", "other keys"])
def test_every_sum(name: str) -> None: check(*case(name), TOLERANCE[torch.float32], every=True)


@pytest.mark.parametrize("name", ["to the right", "left padding"])
def test_sums_in_a_fixed_order(name: str) -> None:
    torch.use_deterministic_algorithms(True)
    try: check(*case(name), TOLERANCE[torch.float32])
    finally: torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["soft cap", "other keys"])
def test_number_formats(name: str, dtype: torch.dtype) -> None: check(*case(name, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("name,size", [("window", (16, 32)), ("to the right", (32, 16)), ("queries that see nothing", (32, 32))])
def test_sizes_of_tiles(name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tiles, "tile_size", lambda d, bits: TileSize(*size))
    check(*case(name), 2e-5)


def test_head_sizes_views_and_groups() -> None:
    "As models hand them over: tokens before heads in memory, heads of any size, one KV head for all"
    g = torch.Generator().manual_seed(0)
    for d, heads, kv in ((13, 6, 1), (40, 2, 2), (100, 3, 3)):
        q, k = (torch.randn(2, n, h, d, generator=g).transpose(1, 2) for n, h in ((30, heads), (41, kv)))
        exact = AttentionOperator(q.double(), k.double(), k.double(), mask=causal_mask(11))
        call = make_call(q.to(DEVICE), k.to(DEVICE), mask=causal_mask(11))
        many = EntropySum(), ReceivedSum(), WindowMass([4])
        assert not add_up(call, exact.lse.float().to(DEVICE), many)
        with summed_by("torch"): want = exact.reduce(EntropySum(), ReceivedSum(), WindowMass([4]))
        for r, w in zip(many, want, strict=True): torch.testing.assert_close(r.result().double().cpu(), w, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["window", "learned sinks", "left padding", "bias", "mask of booleans", "other keys", "soft cap"])
def test_largest_weights(name: str) -> None:
    call, exact = case(name)
    n, k = call.shape[2], 3
    queries = sorted({0, n // 2, n - 1})
    weights, keys = (x.cpu() for x in triton_blocks.top_keys(Described(call, exact.lse.float().to(DEVICE)), queries, k))
    P = exact.rows(queries)
    torch.testing.assert_close(weights.double(), P.topk(k, -1).values, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(P.gather(-1, keys).double(), weights.double(), rtol=2e-5, atol=2e-5)


def test_the_operator_hands_over_what_kernels_can_do() -> None:
    "Reducers that they do not know go to torch; calls that they cannot compute are refused by name, or computed by torch if none asked"
    class Cubes(Reducer):
        key = ("cubes",)
        def start(self, op: Any) -> None: self.acc = op.per_query()
        def tile(self, p: Tensor, log2p: Tensor, at: Any) -> None: self.acc[at.b, at.heads, at.rows.start:at.rows.stop] += (p ** 3).sum(-1)

    call, exact = case("window")
    op, P = AttentionOperator.of(call), exact.dense()
    with summed_by("triton"):
        cubes, entropy = op.reduce(Cubes(), EntropySum())
        torch.testing.assert_close(op.topk([3, 60], 2)[0].double().cpu(), P[:, :, [3, 60]].topk(2, -1).values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cubes.double().cpu(), (P ** 3).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy.double().cpu(), exact.entropy(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="'auto', 'torch', 'triton' or 'compiled'"), summed_by("cuda"): pass


REFUSED = {
    "float64": (dict(), "they compute in float32"), "streams": (dict(streams=(Stream(torch.ones(4, dtype=torch.bool)),)), "heads stream"),
    "rule": (dict(mask=Mask(None, None, PAST, rule=lambda b, h, q, k: q >= k)), "the mask is a Python function"),
    "chosen keys": (dict(sets=(KeySet(torch.arange(PAST, N + PAST)[None], choice=KeyChoice(
        lambda b, q: torch.ones(1, len(q), N + PAST, dtype=torch.bool), torch.arange(N), torch.arange(N + PAST))),)), "by a function"),
    "two tables": (dict(mask=Mask(None, None, PAST, rule=table(torch.float32)), bias=torch.zeros(1, 1, N, N + PAST)), "mask and a bias"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_calls_that_they_cannot_compute(name: str) -> None:
    kw, why = REFUSED[name]
    qkv = [x.double() if name == "float64" else x for x in inputs(N, N + PAST)]
    op = AttentionOperator(*qkv, **kw)
    assert why in (why_not(op.call) or "")
    with summed_by("triton"), pytest.raises(ValueError, match=why): op.entropy()
    assert op.entropy().isfinite().all()


def count_loads(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    "Bytes that kernels load in the interpreter, by the format of the numbers"
    from triton.runtime import interpreter
    found: dict[str, int] = {}
    build = interpreter.InterpreterBuilder
    plain = build.create_masked_load

    def counted(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        out = plain(self, ptrs, mask, other, *rest)
        name = str(out.data.dtype)
        found[name] = found.get(name, 0) + int(mask.data.sum()) * out.data.itemsize
        return out

    monkeypatch.setattr(build, "create_masked_load", counted)
    return found


@pytest.mark.skipif(DEVICE == "cuda", reason="loads are counted in the interpreter, which runs where there is no GPU")
@pytest.mark.parametrize("mask", [causal_mask(), causal_mask(window=50), full_mask()], ids=["causal", "window", "full"])
def test_the_plan_counts_what_kernels_load(mask: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    "Queries once and keys once a tile, by the kernel for rows; the other way around by the one for columns"
    n, d, m, keys, heads = 128, 16, 32, 16, 2
    q, k = torch.randn(1, heads, n, d).half(), torch.randn(1, 1, n, d).half()
    op = AttentionOperator(q, k, k, mask=mask)
    about, found = Described(op.call, op.lse, TileSize(m, keys)), count_loads(monkeypatch)
    triton_rows.row_sums(about, triton_rows.WantedRows(entropy=True, squares=True))
    tiles = tiles_seen(op.call, m, keys)
    assert found == {"float16": 2 * d * heads * (n + tiles * keys), "float32": 4 * heads * n}
    found.clear()
    triton_columns.column_sums(about)
    assert found["float16"] == 2 * d * heads * (n + found["float32"] // (4 * heads))    # every query that is loaded comes with its lse
    by_columns = found["float32"] // (4 * heads * m)
    seen = sum(1 for a in range(0, n, m) for c in range(0, n, keys)
               if AttentionOperator.of(op.call.narrow(range(a, a + m)), op.lse[:, :, a:a + m]).dense()[..., c:c + keys].any())
    assert by_columns == seen == tiles


COMPILE = '''
import warnings
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from longlens.attention.triton_tiles import Numbers, Parts, TileFacts, tile_size
from longlens.attention.triton_rows import RowFacts, RowOut, rows_kernel
from longlens.attention.triton_columns import ColumnFacts, ColumnOut, columns_kernel

STRIDES = ("i64",) * 3
NUMBERS = Numbers(*["i32"] * 4, "i64", *["i32"] * 4, "fp32", "fp32", *[STRIDES] * 5, "i64", STRIDES[:2])
PARTS = Parts("*bf16", "*bf16", "*fp32", *[None] * 6)
SIZE = tile_size(128, 16)
FACTS = TileFacts(False, True, *[False] * 6, 128, SIZE.m, SIZE.n, "tf32x3")
ROWS = RowOut(*["*fp32"] * 6, "*i32", "*fp32", "*i8", STRIDES, STRIDES[:2], "i32")
COLUMNS = ColumnOut(*["*fp32"] * 4, "i64", STRIDES, "i32")

def build(kernel, stages, facts, *args):
    signature, constants, attrs = {}, {}, {}
    def walk(x, path):
        if isinstance(x, tuple):
            inner = [walk(y, (*path, i)) for i, y in enumerate(x)]
            return type(x)(*inner) if hasattr(x, "_fields") else tuple(inner)
        if x is None: constants[path] = None
        if x is None: return "constexpr"
        if x[0] == "*" or x == "i64": attrs[path] = [["tt.divisibility", 16]]
        return x
    for i, name in enumerate(kernel.arg_names):
        if name in facts: signature[name], constants[name] = "constexpr", facts[name]
        else: signature[name] = walk(args[i], (i,))
    made = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs), target=GPUTarget("cuda", 90, 32),
                          options={"num_warps": SIZE.warps, "num_stages": stages})
    assert made.metadata.shared < 227 * 1024, (kernel.__name__, made.metadata.shared)
    print(kernel.__name__, "wgmma" in made.asm["ptx"], "cp.async.cg" in made.asm["ptx"])

build(rows_kernel, SIZE.stages, dict(F=FACTS, G=RowFacts(True, True, True, 0, 16, True)), PARTS, NUMBERS, ROWS)
build(columns_kernel, SIZE.stages, dict(F=FACTS, G=ColumnFacts(True, False, 0)), PARTS, NUMBERS, COLUMNS)
'''


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for NVIDIA devices comes with its Linux wheels")
def test_they_compile_for_an_h100_without_one(tmp_path: Path) -> None:
    "To machine code for sm_90: products of rows and columns by its matrix units, and tiles of keys loaded ahead"
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:2] == ["rows_kernel True True", "columns_kernel True True"]
