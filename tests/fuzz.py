"""Random but valid inputs for every public function: never a wrong number, never an error from inside.

    python tests/fuzz.py                  10,000 inputs, and benchmarks/FUZZ.md is written (`make fuzz`)
    python tests/fuzz.py capture attend --inputs 500

A case draws its inputs with hypothesis, calls the function and compares: statistics with patterns that transformers' own
eager attention forms in float64, logits with one forward pass of the whole text. What raises must be an error of ours: raised
by longlens on purpose, in words. `test_fuzz.py` runs 200 inputs, and checks that every public name has a case or a reason.
"""

from __future__ import annotations

import argparse
import ast
import copy
import datetime
import functools
import itertools
import json
import linecache
import math
import os
import platform
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import polars as pl
import torch
import transformers
import zoo
from hypothesis import HealthCheck, Phase, event, given, seed, settings
from hypothesis import strategies as st
from matrix import attention_is, patterns
from transformers import PreTrainedModel

import longlens as ll
from longlens.attention import compiled_pass
from longlens.attention.operator import summed_by
from longlens.models.architecture import attention_layers, count_kv_heads
from longlens.models.forward import LongModel
from longlens.models.tokens import span_ends

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "longlens"
Draw = Callable[[st.SearchStrategy], Any]


# ---- whose error is it?


@functools.cache
def _raises(file: str) -> list[tuple[int, int]]:
    "First and last lines of the statements of a file that raise something on purpose"
    tree = ast.parse("".join(linecache.getlines(file)))
    return [(n.lineno, n.end_lineno or n.lineno) for n in ast.walk(tree) if isinstance(n, ast.Raise) and n.exc is not None]


def _last(tb: TracebackType | None) -> tuple[str, int]:
    "File and line at which an error was raised"
    frame = traceback.extract_tb(tb)[-1]
    return frame.filename, frame.lineno or 0


def fault(error: BaseException) -> str | None:
    "Why an error is not one of ours; None: longlens raised it on purpose, in words"
    file, line = _last(error.__traceback__)
    where = f"{type(error).__name__} at {Path(file).name}:{line}: {str(error)[:200]}"
    if not Path(file).is_relative_to(PACKAGE):
        return f"raised outside of longlens: {where}"
    if not any(a <= line <= b for a, b in _raises(file)):
        return f"not raised on purpose: {where}"
    if isinstance(error, KeyError | AttributeError | ZeroDivisionError | AssertionError | NotImplementedError):
        return f"an error of a kind that users do not understand: {where}"
    return None if len(str(error).split()) > 3 else f"says too little: {where}"


class Refused(Exception):
    "longlens refused an input, clearly"


@contextmanager
def clear() -> Iterator[None]:
    "In this block only errors of ours may be raised; they end the case well"
    try:
        yield
    except Exception as e:
        if isinstance(e, AssertionError) and _last(e.__traceback__)[0] == __file__: raise  # a comparison of ours
        if why := fault(e):
            raise AssertionError(why) from e
        event(f"refused: {str(e)[:40]}")
        raise Refused from e


def close(got: Any, want: Any, atol: float = 1e-4, what: str = "") -> None:
    "Equal up to a share of the largest number, or of 1; not-a-number in the same places"
    a, b = (torch.as_tensor(np.array(x) if isinstance(x, pl.Series) else x).double() for x in (got, want))
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)} where {tuple(b.shape)} is right"
    assert torch.equal(a.isnan(), b.isnan()), f"{what}: numbers are missing in other places: {a} where {b} is right"
    if not b.numel() or bool(b.isnan().all()):
        return
    off = float((a - b).nan_to_num().abs().max() / max(1.0, float(b.nan_to_num(posinf=0, neginf=0).abs().max())))
    assert off <= atol, f"{what}: {off:.2e} away from what is right"


# ---- what is drawn

ODD = [
    "👨‍👩‍👧‍👦",
    "🏳️‍🌈",
    "👍🏽",
    "🇩🇪",
    "é",
    "é",
    "Å̧̱",
    "ﷺ",
    "שלום",
    "مرحبا",
    "\u202eabc\u202c",
    "\u200b",
    "\u200d",
    "\ufeff",
    "\u2028",
    "\x00",
    "\x07",
    "\x1b[31m",
    "\r\n",
    "\t",
    "\x85",
    "\xa0",
    "\u3000",
    "漢字",
    "ｶﾞ",
    "ﬁ",
    "ß",
    "İ",
    "ı",
    "𝔘",
    "\U0010ffff",
    "\ue000",
    "\ufffd",
    "<s>",
    "</s>",
    "<pad>",
    "<|endoftext|>",
    "[MASK]",
    "{",
    "}",
    "{question}",
    "%s",
    "\\",
    '"',
    "'",
    "<b>&amp;</b>",
    "$x^2$",
    "\udc80",
    "\ud83d",
]
PLAIN = ["The code", "for Eve", "is", "seven.", "A stone", "lies", "in the", "river.", "\n", "\n\n", " ", "12,345", "rain?"]
word = st.one_of(st.sampled_from(PLAIN), st.sampled_from(PLAIN), st.sampled_from(ODD), st.text(max_size=4))
texts = st.lists(word, max_size=14).map(" ".join)
glued = st.lists(word, max_size=8).map("".join)
any_text = st.one_of(
    texts.filter(str.strip), texts.filter(str.strip), glued.filter(str.strip), st.text(max_size=30)
)  # the last may be empty
sentence = st.lists(st.sampled_from([p for p in PLAIN if p.strip()] + ODD[:30]), min_size=1, max_size=12).map(lambda w: " ".join(w) + ".")
plain_sentence = st.lists(st.sampled_from([p for p in PLAIN if p.strip()]), min_size=2, max_size=12).map(lambda w: " ".join(w) + ".")


def ids_of(draw: Draw, rows: int, least: int = 1, most: int = 48) -> torch.Tensor:
    "Token ids, (n,), without the special ones"
    n = draw(st.integers(least, most))
    return torch.randint(3, rows, (n,), generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))


def form_of_ids(draw: Draw, ids: torch.Tensor) -> Any:
    "The same ids in one of the forms that are taken"
    forms = [
        lambda x: x,
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.int(),
        lambda x: tuple(x.tolist()),
        lambda x: x.numpy().astype(np.int16),
    ]
    return draw(st.sampled_from(forms))(ids)


def mostly(draw: Draw, right: st.SearchStrategy, odd: st.SearchStrategy) -> Any:
    "What is right, and in one of ten inputs something odd"
    return draw(odd if draw(st.integers(0, 9)) == 9 else right)


def span_in(draw: Draw, n: int) -> Any:
    "A span of a text of n tokens, in one of the forms that are taken"
    a = draw(st.integers(0, n - 1))
    b = draw(st.integers(a + 1, n))
    return draw(st.sampled_from([range(a, b), (a, b), [a, b], torch.tensor([a, b]), np.array([a, b]), (np.int64(a), np.int32(b))]))


def spans_in(draw: Draw, n: int, most: int = 3) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(["needle", "a b", "é", "x_1", "", "🏳️‍🌈"]), min_size=1, max_size=most, unique=True))
    return {name: span_in(draw, n) for name in names}


def padding_of(draw: Draw, batch: int, n: int) -> torch.Tensor | None:
    "A padding mask, (batch, n): left or right, at least one token a text, one text whole; or none"
    side = draw(st.sampled_from(["none", "left", "right"]))
    if side == "none":
        return None
    keep = torch.ones(batch, n, dtype=torch.long)
    for b in range(batch - 1):
        m = draw(st.integers(0, n - 1))
        keep[b, slice(None, m) if side == "left" else slice(n - m, None)] = 0
    return keep


# ---- models

ATTENTION = ["llama", "mistral", "gemma2", "gpt_oss", "bert", "modernbert", "deepseek_v3", "opt", "gpt2", "jamba", "cohere2", "smollm3"]
CAUSAL = [name for name in ATTENTION if name not in zoo.ENCODERS]


@functools.cache
def model(name: str) -> PreTrainedModel:
    return zoo.EVERYTHING[name]().requires_grad_(False)


@functools.cache
def exact(name: str) -> PreTrainedModel:
    "The same model in float64: what is right"
    hf = copy.deepcopy(model(name)).double()
    hf.set_experts_implementation("eager")  # the grouped product of experts takes no float64
    return hf


@functools.cache
def needle_lm() -> LongModel:
    return ll.load(device="cpu")


@functools.cache
def with_words(name: str) -> LongModel:
    "A zoo model with needle-lm's tokenizer, and as large a vocabulary"
    small, before = needle_lm(), (zoo.VOCAB, zoo.POSITIONS)
    zoo.VOCAB, zoo.POSITIONS = small.vocab_size, 1024
    try:
        return ll.load(zoo.EVERYTHING[name]().requires_grad_(False), small.tokenizer)
    finally:
        zoo.VOCAB, zoo.POSITIONS = before


@functools.cache
def encoder() -> ll.Encoder:
    "A small random BERT with MiniLM's tokenizer"
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=30522,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=96,
            initializer_range=0.3,
        )
        hf = BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    return ll.load_encoder(hf, ll.load_encoder().tokenizer, pooling="mean")


def some_model(draw: Draw) -> LongModel:
    return draw(st.sampled_from([needle_lm, lambda: with_words("llama"), lambda: with_words("jamba")]))()


def _finite_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    "transformers' own mask of numbers, of which logits may be added to the least in float64 too"
    mask = transformers.masking_utils.eager_mask(*args, **kwargs)
    return mask if mask is None else mask.clamp_min(-1e30)


@contextmanager
def finite_masks() -> Iterator[None]:
    masks = transformers.AttentionMaskInterface
    for name in ("eager", "sdpa"):
        masks.register(name, _finite_mask)
    try:
        yield
    finally:
        for name in ("eager", "sdpa"):
            masks.register(name, getattr(transformers.masking_utils, f"{name}_mask"))


def right_patterns(hf: PreTrainedModel, ids: torch.Tensor, keep: torch.Tensor | None = None) -> dict[int, torch.Tensor]:
    "Patterns of transformers' eager attention"
    with finite_masks(), torch.no_grad():
        return patterns(hf, ids, keep)


def forward(hf: PreTrainedModel, ids: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    extra = {} if "use_cache" not in _takes(type(hf)) else {"use_cache": False}
    with torch.no_grad():
        return hf(input_ids=torch.atleast_2d(ids), attention_mask=keep, **extra)[0]


@functools.cache
def _takes(cls: type) -> frozenset[str]:
    import inspect

    return frozenset(inspect.signature(cls.forward).parameters)


# ---- cases: one for every public function

CASES: dict[str, Callable[[Draw], None]] = {}
WEIGHTS: dict[str, float] = {}  # how often a case runs, beside 1: slow ones less, central ones more


def case(*names: str, weight: float = 1.0) -> Callable[[Callable[[Draw], None]], Callable[[Draw], None]]:
    "A case for these public names"

    def add(f: Callable[[Draw], None]) -> Callable[[Draw], None]:
        for name in names:
            CASES[name], WEIGHTS[name] = f, weight
        return f

    return add


# ---- attention


def _formed(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    seen: torch.Tensor,
    softcap: float | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    "Weights and log-sum-exp, formed in float64; seen: (batch, 1, n_queries, n_keys)"
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = scale * q @ k.mT
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.double()
    logits = logits.masked_fill(~seen, -torch.inf)
    every = logits if sinks is None else torch.cat([logits, sinks.double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
    lse = every.logsumexp(-1).masked_fill(~seen.any(-1), -torch.inf)
    return (logits - lse.masked_fill(lse.isinf(), 0)[..., None]).exp(), lse


@dataclass
class _Call:
    "A drawn attention call, and its pattern"

    args: dict[str, Any]
    P: torch.Tensor
    lse: torch.Tensor
    seen: torch.Tensor

    @property
    def n_keys(self) -> int:
        return self.P.shape[-1]


def _drawn_call(draw: Draw) -> _Call:
    from longlens.attention.masks import Mask, causal_mask, full_mask

    batch, kv, group, d = (draw(st.integers(1, m)) for m in (2, 2, 3, 9))
    n_keys = draw(st.integers(1, 40))
    n_queries = n_keys if draw(st.booleans()) else draw(st.integers(1, n_keys))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype, loud = draw(st.sampled_from([torch.float32, torch.float64])), draw(st.sampled_from([0.0, 1.0, 3.0]))
    q = torch.randn(batch, kv * group, n_queries, d, generator=g, dtype=dtype) * loud
    k, v = (torch.randn(batch, kv, n_keys, m, generator=g, dtype=dtype) for m in (d, draw(st.integers(1, 7))))
    window = draw(st.one_of(st.none(), st.integers(1, 50)))
    two_sided = n_queries == n_keys and draw(st.booleans())
    mask = full_mask(window) if two_sided else causal_mask(n_keys - n_queries, window)
    keep = padding_of(draw, batch, n_keys)
    if keep is not None:
        mask = Mask(mask.left, mask.right, mask.offset, keep=keep.bool())
    i, j = torch.arange(n_queries)[:, None] + n_keys - n_queries, torch.arange(n_keys)
    seen = torch.ones(n_queries, n_keys, dtype=torch.bool)
    if two_sided and window is not None:
        seen = (i - j).abs() <= window
    if not two_sided:
        seen = (j <= i) & (i - j < (window or 99))
    seen = seen.expand(batch, 1, -1, -1)
    if keep is not None:
        seen = seen & keep.bool()[:, None, None]
    scale = draw(st.one_of(st.none(), st.floats(0, 3)))
    softcap = draw(st.one_of(st.none(), st.none(), st.floats(0.5, 50)))
    sinks = torch.randn(kv * group, generator=g, dtype=dtype) if draw(st.booleans()) else None
    shape = draw(st.sampled_from([None, None, (1, 1), (batch, kv * group)]))
    bias = None if shape is None else torch.randn(*shape, n_queries, n_keys, generator=g, dtype=dtype)
    given = None if keep is None and window is None and not two_sided and draw(st.booleans()) else mask
    P, lse = _formed(q, k, d**-0.5 if scale is None else scale, seen, softcap, bias, sinks)
    return _Call(dict(q=q, k=k, v=v, scale=scale, mask=given, softcap=softcap, sinks=sinks, bias=bias), P, lse, seen)


def _real_rows(call: _Call) -> torch.Tensor:
    "Rows that are tokens of the text: (batch, heads, n_queries)"
    mask = call.args["mask"]
    if mask is None or mask.keep is None:
        return torch.ones(call.P.shape[:3], dtype=torch.bool)
    return mask.keep[:, None, -call.P.shape[2] :].expand(call.P.shape[:3])


@case("attend", weight=8)
def attend(draw: Draw) -> None:
    call = _drawn_call(draw)
    with clear():
        out, lse = ll.attend(**call.args)
    v = call.args["v"].double().repeat_interleave(call.P.shape[1] // call.args["v"].shape[1], 1)
    real = _real_rows(call)
    close(out[real], (call.P @ v)[real], 1e-5, "output")
    close(lse[real], call.lse[real], 1e-5, "log-sum-exp")


@case("AttentionOperator", weight=8)
def operator(draw: Draw) -> None:
    call = _drawn_call(draw)
    args = call.args | ({"v": None} if draw(st.booleans()) else {})
    with clear():
        op = ll.AttentionOperator(**args)
    P, n, real = call.P * _real_rows(call)[..., None], call.n_keys, _real_rows(call)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x, y = torch.randn(n, 3, generator=g), torch.randn(P.shape[2], 2, generator=g) * real[0, 0, :, None]
    i, j = torch.arange(P.shape[2])[:, None] + n - P.shape[2], torch.arange(n)
    mass, w = P.sum(-1), draw(st.integers(1, 60))
    rows = draw(st.lists(st.integers(-P.shape[2], P.shape[2] - 1), min_size=1, max_size=4))
    span = span_in(draw, n)
    a, b = span_ends("x", span)
    windows = sorted(draw(st.sets(st.integers(1, 60), min_size=1, max_size=4)))
    kernels = draw(st.sampled_from(["auto", "torch"] + ["compiled"] * (compiled_pass.why_not(op.call) is None)))
    with clear(), summed_by(kernels):
        for name, got, want in [
            ("matmul", op.matmul(x.to(op.dtype)), P @ x.double()),
            ("entropy", op.entropy(), torch.special.entr(P).sum(-1)),
            ("support", op.support(), mass**2 / (P**2).sum(-1).clamp_min(1e-300)),
            ("key_mass", op.key_mass(), mass),
            ("mean_distance", op.mean_distance(), (P * (i - j).abs()).sum(-1) / mass.clamp_min(1e-300)),
            ("span_mass", op.span_mass({"x": span})[..., 0], P[..., a:b].sum(-1)),
            ("window_mass", op.window_mass(w), (P * ((i - j).abs() < w)).sum(-1)),
            ("rows", op.rows(rows), P[:, :, rows]),
            ("dense", op.dense(), P),
            ("topk", op.topk(rows, k := draw(st.integers(1, n)))[0], P[:, :, rows].topk(k).values),
            ("distance_profile", op.distance_profile(windows), torch.stack([(P * ((i - j).abs() < w)).sum(-1) for w in windows], -1)),
        ]:
            at = real[:, :, rows] if name in ("rows", "topk") else real
            close(got[at], want[at], 1e-4, name)
        if bool(real.all()):
            close(op.rmatmul(y.to(op.dtype)), P.mT @ y.double(), 1e-4, "rmatmul")
            close(op.received(), P.sum(2), 1e-4, "received")
            if args["v"] is not None:
                assert op.output.isfinite().all()
        repr(op)


# ---- statistics


@dataclass
class _Seen:
    "A drawn batch, and the patterns of its texts, formed in float64"

    hf: PreTrainedModel
    name: str
    ids: torch.Tensor
    keep: torch.Tensor | None
    P: dict[int, torch.Tensor]

    def text(self, b: int) -> torch.Tensor:
        "Indices of the tokens of a text"
        return torch.arange(self.ids.shape[1]) if self.keep is None else self.keep[b].nonzero()[:, 0]

    def of(self, b: int, layer: int) -> torch.Tensor:
        "The pattern of a text, (heads, m, m)"
        return self.P[layer][b][:, self.text(b)][..., self.text(b)]

    def shortest(self) -> int:
        return min(len(self.text(b)) for b in range(len(self.ids)))

    def capture(self, *statistics: Any) -> Any:
        with clear():
            with ll.capture(self.hf, *statistics) as seen:
                forward(self.hf, self.ids, self.keep)
        return seen


def _batch(draw: Draw, names: Sequence[str] = ATTENTION) -> _Seen:
    name = draw(st.sampled_from(names))
    n, batch = draw(st.integers(1, 40)), draw(st.integers(1, 3))
    ids = torch.randint(3, zoo.VOCAB, (batch, n), generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    keep = padding_of(draw, batch, n)
    P = right_patterns(exact(name), ids, keep)
    hf = exact(name) if draw(st.integers(0, 3)) == 0 else model(name)
    return _Seen(hf, name, ids, keep, P)


def _queries(draw: Draw, n: int) -> Any:
    "Query positions of a text of n tokens, in one of the forms that are taken; None: all"
    some = sorted(draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=5)))
    a = draw(st.integers(0, n - 1))
    stretch = range(a, draw(st.integers(a + 1, n)))
    return draw(st.sampled_from([None, None, some, tuple(some), np.array(some), torch.tensor(some), stretch, range(0, n, 2)]))


def _bins(draw: Draw) -> list[int] | None:
    return draw(st.one_of(st.none(), st.sets(st.integers(1, 45), min_size=1, max_size=3).map(sorted)))


def _row_statistic(
    draw: Draw,
    kind: str,
    make: Callable[..., Any],
    values: Callable[[torch.Tensor], torch.Tensor],
    column: str,
    batch: _Seen | None = None,
    **given: Any,
) -> None:
    "A mean over queries against the same mean of formed rows; `values`: (heads, m, m) -> (heads, m) or (heads, m, categories)"
    s = batch or _batch(draw)
    queries, bins = _queries(draw, s.shortest()), _bins(draw)
    with clear():
        stat = make(**given, queries=queries, bins=bins)
    f = s.capture(stat).frame(kind)
    asked = None if queries is None else {int(q) for q in queries}
    for layer in s.P:
        for b in range(len(s.ids)):
            x = values(s.of(b, layer))
            x = x[..., None] if x.ndim == 2 else x
            at = [i for i in range(x.shape[1]) if asked is None or i in asked]
            edges = bins or [10**9]
            inside = [[i for i in at if i + 1 <= e and (k == 0 or i + 1 > edges[k - 1])] for k, e in enumerate(edges)]
            want = torch.stack([x[:, rows].nanmean(1) if rows else torch.full_like(x[:, 0], torch.nan) for rows in inside], 1)
            close(f.filter(layer=layer, sample=b)[column], want.flatten(), 1e-4, f"{kind} of {s.name}, layer {layer}, sample {b}")


def _away(p: torch.Tensor) -> torch.Tensor:
    i = torch.arange(p.shape[-1])
    return (i[:, None] - i).abs()


@case("Entropy")
def entropy(draw: Draw) -> None:
    _row_statistic(draw, "entropy", ll.Entropy, lambda p: torch.special.entr(p).sum(-1), "entropy")


@case("Support")
def support(draw: Draw) -> None:
    _row_statistic(draw, "support", ll.Support, lambda p: p.sum(-1) ** 2 / (p**2).sum(-1), "support")


@case("SinkMass")
def sink_mass(draw: Draw) -> None:
    k = draw(st.integers(1, 50))
    _row_statistic(draw, "sink_mass", ll.SinkMass, lambda p: p[..., :k].sum(-1), "sink_mass", k=k)


@case("Distance")
def distance(draw: Draw) -> None:
    _row_statistic(draw, "distance", ll.Distance, lambda p: (p * _away(p)).sum(-1) / p.sum(-1), "mean_distance")


@case("DistanceProfile")
def distance_profile(draw: Draw) -> None:
    windows = sorted(draw(st.sets(st.integers(1, 60), min_size=1, max_size=4)))
    _row_statistic(
        draw,
        "distance_profile",
        ll.DistanceProfile,
        lambda p: torch.stack([(p * (_away(p) < w)).sum(-1) for w in windows], -1),
        "mass",
        windows=draw(st.sampled_from([windows, tuple(windows), np.array(windows)])),
    )


@case("SpanMass", weight=2)
def span_mass(draw: Draw) -> None:
    s = _batch(draw)
    spans = spans_in(draw, s.shortest())
    ends = [span_ends(name, span) for name, span in spans.items()]
    _row_statistic(
        draw, "span_mass", ll.SpanMass, lambda p: torch.stack([p[..., a:b].sum(-1) for a, b in ends], -1), "mass", s, spans=spans
    )


@case("Received")
def received(draw: Draw) -> None:
    s = _batch(draw)
    a = draw(st.integers(0, s.shortest() - 1))
    queries = draw(st.one_of(st.none(), st.integers(a + 1, s.shortest()).map(lambda b: range(a, b))))
    f = s.capture(ll.Received(queries=queries)).frame("received")
    rows = slice(None) if queries is None else slice(queries.start, queries.stop)
    for layer in s.P:
        for b in range(len(s.ids)):
            p = s.of(b, layer)[:, rows]
            close(f.filter(layer=layer, sample=b)["received"], p.sum(1).flatten(), 1e-4, f"received of {s.name}")


@case("Rows")
def rows(draw: Draw) -> None:
    s = _batch(draw)
    queries = sorted(draw(st.sets(st.integers(0, s.shortest() - 1), min_size=1, max_size=4)))
    top = draw(st.one_of(st.none(), st.integers(1, 45)))
    f = s.capture(ll.Rows(queries, top=top)).frame("rows")
    for layer in s.P:
        for b in range(len(s.ids)):
            p = s.of(b, layer)[:, queries]
            made = torch.zeros_like(p)
            for r in f.filter(layer=layer, sample=b).iter_rows(named=True):
                made[r["head"], queries.index(r["query"]), r["position"]] = r["weight"]
            least = p.topk(min(top or 99, p.shape[-1])).values[..., -1:]
            close(made, torch.where(p >= least - 1e-6, made if top else p, 0 * p), 1e-4, f"rows of {s.name}")
            close(made.sum(-1), p.topk(min(top or 99, p.shape[-1])).values.sum(-1), 1e-4, f"top rows of {s.name}")


@case("MeanRows")
def mean_rows(draw: Draw) -> None:
    s = _batch(draw)
    queries = sorted(draw(st.sets(st.integers(0, s.shortest() - 1), min_size=1, max_size=4)))
    by = draw(st.sampled_from(["head", "layer"]))
    form = draw(st.sampled_from([list, tuple, np.array, torch.tensor]))
    with clear():
        stat = ll.MeanRows(form(queries), by=by)
    f = s.capture(stat).frame("mean_rows")
    for layer in s.P:
        for b in range(len(s.ids)):
            p = s.of(b, layer)[:, queries].mean(1)
            want = p.flatten() if by == "head" else p.mean(0)
            got = f.filter(layer=layer, sample=b)
            assert got["position"].max() < p.shape[-1]
            table = torch.zeros_like(p if by == "head" else p[:1])
            for r in got.iter_rows(named=True):
                table[r.get("head", 0), r["position"]] = r["weight"]
            close(table.flatten(), want, 1e-4, f"mean rows of {s.name}")


@case("Rollout")
def rollout(draw: Draw) -> None:
    s = _batch(draw, [name for name in ATTENTION if name != "jamba"])
    spans = spans_in(draw, s.shortest())
    queries = sorted(draw(st.sets(st.integers(0, s.shortest() - 1), min_size=1, max_size=3)))
    skip = draw(st.sampled_from([0, 0.5, 1, 0.25]))
    with clear():
        stat = ll.Rollout(spans, draw(st.sampled_from([list, tuple, np.array, torch.tensor]))(queries), skip=skip)
    f = s.capture(stat).frame("rollout")
    for b in range(len(s.ids)):
        m = len(s.text(b))
        x = torch.zeros(m, len(spans), dtype=torch.float64)
        for c, (name, span) in enumerate(spans.items()):
            x[slice(*span_ends(name, span)), c] = 1
        for layer in sorted(s.P):
            x = (1 - skip) * s.of(b, layer).mean(0) @ x + skip * x
            close(f.filter(layer=layer, sample=b)["mass"], x[queries].mean(0), 1e-4, f"rollout of {s.name}, layer {layer}")


@case("SpectralNorm")
def spectral_norm(draw: Draw) -> None:
    s = _batch(draw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what has not converged says how far off it is
        f = s.capture(ll.SpectralNorm(seed=draw(st.integers(0, 9)))).frame("spectral_norm")
    for layer in s.P:
        for b in range(len(s.ids)):
            p = s.of(b, layer)
            want = torch.linalg.matrix_norm(p - p.mean(1, keepdim=True), 2)
            got = f.filter(layer=layer, sample=b)
            off = (got["sigma_a"].to_torch() - want).abs()
            assert bool((off <= got["sigma_a_error"].to_torch() + 2e-4 * want.clamp_min(1)).all()), (
                f"sigma_a of {s.name}: {off.max()} off"
            )


def _states(s: _Seen) -> list[torch.Tensor]:
    with finite_masks(), torch.no_grad():
        out = exact(s.name)(input_ids=s.ids, attention_mask=s.keep, output_hidden_states=True)
    return list(out.hidden_states[1:-1])  # the last one is behind the model's own norm


@case("ResidualNorm", "TokenSpread")
def residual(draw: Draw) -> None:
    s = _batch(draw)
    seen = s.capture(ll.ResidualNorm(), ll.TokenSpread())
    f, spread = seen.frame("residual_norm"), seen.frame("token_spread")
    for layer, h in enumerate(_states(s)):
        if layer not in attention_layers(exact(s.name)): continue  # a statistic of attention layers
        for b in range(len(s.ids)):
            x = h[b, s.text(b)]
            close(f.filter(layer=layer, sample=b)["norm"], x.norm(dim=-1), 1e-4, f"residual norm of {s.name}, layer {layer}")
            got = spread.filter(layer=layer, sample=b)
            if len(x) < 2:
                continue  # one token differs from nothing
            close(got["high_frequency"][0], (x - x.mean(0)).norm() / x.norm(), 1e-3, f"spread of {s.name}")


@case("ValueNorm")
def value_norm(draw: Draw) -> None:
    s = _batch(draw, ["llama", "mistral", "smollm3"])
    f, found = s.capture(ll.ValueNorm()).frame("value_norm"), []
    hooks = [m.self_attn.v_proj.register_forward_hook(lambda _m, _a, out: found.append(out)) for m in exact(s.name).model.layers]
    try:
        forward(exact(s.name), s.ids, s.keep)
    finally:
        for h in hooks:
            h.remove()
    for layer, v in enumerate(found):
        norm = v.unflatten(-1, (zoo.KV_HEADS, -1)).norm(dim=-1)
        for b in range(len(s.ids)):
            close(f.filter(layer=layer, sample=b)["norm"], norm[b, s.text(b)].T.flatten(), 1e-4, f"value norm of {s.name}")


@case("capture", weight=1)
def capture(draw: Draw) -> None:
    "Several statistics at once, in several forwards, whole or in chunks; inside and outside the model gives the same"
    lm, n = some_model(draw), draw(st.integers(2, 60))
    ids = [ids_of(draw, min(400, lm.vocab_size), 1, n) for _ in range(draw(st.integers(1, 3)))]
    chunk = draw(st.one_of(st.none(), st.integers(1, 40)))
    k = draw(st.integers(1, 8))
    with clear():
        with ll.capture(lm, ll.SinkMass(k), ll.SinkMass(k + 1, label="wider"), ll.Entropy(bins=_bins(draw))) as seen:
            for x in ids:
                if chunk:
                    lm.prefill(form_of_ids(draw, x), chunk)
                else:
                    lm(form_of_ids(draw, x))
        f = seen.frame("sink_mass")
        for name in seen.frames() if callable(getattr(seen, "frames", None)) else ("sink_mass", "wider", "entropy"):
            seen.frame(name)
    assert f["sample"].n_unique() == len(ids)
    for b, x in enumerate(ids):
        P = right_patterns(lm.hf, x[None])
        assert sorted(f["layer"].unique()) == sorted(P)
        for layer, p in P.items():
            close(f.filter(layer=layer, sample=b)["sink_mass"], p[0, ..., :k].sum(-1).mean(-1), 1e-4, f"sink mass, sample {b}")
        with torch.no_grad():
            close(lm.logits(x), lm.hf(x[None], use_cache=False).logits[0], 1e-4, "logits")


# ---- interventions

EDITED: dict[
    str, Any
] = {}  # "logits": (module, logits before the mask is added) -> logits; "tau": of everything; "out": (module, output)


def edited(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    "Attention with the matrix formed, changed as `EDITED` says"
    group = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ k.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if position_bias is not None:
        logits = logits + position_bias
    sinks = None if s_aux is None else s_aux.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    if edit := EDITED.get("logits"):
        logits, sinks = edit(module, logits, sinks)
    if attention_mask is not None:
        logits = logits.masked_fill(attention_mask[..., : k.shape[2]] < -1, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks], -1)
    out = logits.softmax(-1)[..., : k.shape[2]].nan_to_num() @ v
    if edit := EDITED.get("out"):
        out = edit(module, out)
    return out.transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("edited", edited)
transformers.AttentionMaskInterface.register("edited", transformers.masking_utils.eager_mask)
CHANGED = ["llama", "mistral", "gemma2", "gpt_oss", "bert", "modernbert", "opt", "gpt2", "cohere2", "smollm3", "deepseek_v3"]


@functools.cache
def numbers(name: str) -> dict[torch.nn.Module, int]:
    "Attention modules of the exact model, and their layers"
    return {m: i for m in exact(name).modules() if hasattr(m, "is_causal") and (i := getattr(m, "layer_idx", None)) is not None} or {
        m: int(next(p for p in n.split(".") if p.isdigit())) for n, m in exact(name).named_modules() if hasattr(m, "is_causal")
    }


def _changed(
    draw: Draw,
    block: Callable[[PreTrainedModel], Any],
    names: Sequence[str] = CHANGED,
    name: str | None = None,
    batch: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    **edits: Any,
) -> None:
    "Outputs inside of a block against the formed attention changed alike; outside, the model is as before"
    name = name or draw(st.sampled_from(names))
    ids, keep = batch or _ids_and_padding(draw)
    real = torch.ones_like(ids).bool() if keep is None else keep.bool()
    before = forward(model(name), ids, keep)
    with clear():
        with block(model(name)):
            inside = forward(model(name), ids, keep)
    assert torch.equal(forward(model(name), ids, keep)[real], before[real]), "the model is not as it was"
    EDITED.update({what: functools.partial(f, numbers(name)) for what, f in edits.items()})
    try:
        with attention_is(exact(name), "edited"):
            want = forward(exact(name), ids, keep)
    finally:
        EDITED.clear()
    try:
        close(inside[real], want[real], 1e-3, f"outputs of {name}")
    except AssertionError:
        if not _has_experts(name):
            raise
        # two experts that are nearly equal change places with rounding: in float64 they do not
        with clear(), block(exact(name)):
            inside = forward(exact(name), ids, keep)
        close(inside[real], want[real], 1e-6, f"outputs of {name} in float64")


def _has_experts(name: str) -> bool:
    return any("expert" in key for key in model(name).config.to_dict())


def _ids_and_padding(draw: Draw) -> tuple[torch.Tensor, torch.Tensor | None]:
    n, batch = draw(st.integers(2, 40)), draw(st.integers(1, 2))
    ids = torch.randint(3, zoo.VOCAB, (batch, n), generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    return ids, padding_of(draw, batch, n)


def _heads(draw: Draw, name: str) -> list[tuple[int, int]]:
    layers = sorted(set(numbers(name).values()))
    pairs = st.tuples(st.sampled_from(layers), st.integers(0, zoo.HEADS - 1))
    return draw(st.lists(pairs, min_size=1, max_size=4))


@case("ablate", weight=2)
def ablate(draw: Draw) -> None:
    name, mode = draw(st.sampled_from(CHANGED)), draw(st.sampled_from(["zero", "zero", "uniform"]))
    heads = _heads(draw, name)

    def out(of: Mapping[Any, int], module: Any, x: torch.Tensor) -> torch.Tensor:
        mine = [h for l, h in heads if l == of[module]]
        return x.index_fill(1, torch.tensor(mine, dtype=torch.long), 0.0) if mine else x

    def logits(of: Mapping[Any, int], module: Any, x: torch.Tensor, sinks: Any) -> tuple[torch.Tensor, Any]:
        return out(of, module, x), sinks

    form = draw(st.sampled_from([list, tuple, np.array, lambda h: [list(x) for x in h]]))
    _changed(draw, lambda hf: ll.ablate(hf, form(heads), mode), name=name, **({"out": out} if mode == "zero" else {"logits": logits}))


def _text_positions(keep: torch.Tensor | None, n: int) -> torch.Tensor:
    "Where every key stands in its text, (batch|1, n)"
    return torch.arange(n)[None] if keep is None else (keep.cumsum(1) - 1).masked_fill(keep == 0, -1)


@case("streaming_attention")
def streaming(draw: Draw) -> None:
    name = draw(st.sampled_from([n for n in CHANGED if n not in zoo.ENCODERS]))
    batch, sink, recent = _ids_and_padding(draw), draw(st.integers(0, 20)), draw(st.integers(1, 30))
    heads = draw(st.one_of(st.none(), st.just(_heads(draw, name))))

    def logits(of: Mapping[Any, int], module: Any, x: torch.Tensor, sinks: Any) -> tuple[torch.Tensor, Any]:
        i, at = torch.arange(x.shape[-1]), _text_positions(batch[1], x.shape[-1])
        seen = ((i[:, None] - i) < recent)[None] | ((at >= 0) & (at < sink))[:, None]
        mine = torch.tensor([heads is None or (of[module], h) in heads for h in range(x.shape[1])])
        return x.masked_fill(~seen[:, None] & mine[:, None, None], -torch.inf), sinks

    _changed(draw, lambda hf: ll.streaming_attention(hf, sink, recent, heads), name=name, batch=batch, logits=logits)


@case("temperature")
def temperature(draw: Draw) -> None:
    name, tau = draw(st.sampled_from(CHANGED)), draw(st.one_of(st.floats(0.1, 5), st.sampled_from([1, 2, np.float32(0.5), 1.0])))
    heads = draw(st.one_of(st.none(), st.just(_heads(draw, name))))

    def logits(of: Mapping[Any, int], module: Any, x: torch.Tensor, sinks: Any) -> tuple[torch.Tensor, Any]:
        by = torch.tensor([float(tau) if heads is None or (of[module], h) in heads else 1.0 for h in range(x.shape[1])]).double()[
            :, None, None
        ]
        return x / by, None if sinks is None else sinks / by

    _changed(draw, lambda hf: ll.temperature(hf, tau, heads), name=name, logits=logits)


@case("scale_spans", weight=2)
def scale_spans(draw: Draw) -> None:
    name, batch = draw(st.sampled_from(CHANGED)), _ids_and_padding(draw)
    spans = spans_in(draw, batch[0].shape[1], 2)
    factors = {s: draw(st.sampled_from([0.01, 0.5, 1, 3.0, 100])) for s in spans}
    one = draw(st.booleans())
    if one:
        factors = dict.fromkeys(spans, next(iter(factors.values())))
    heads = draw(st.one_of(st.none(), st.just(_heads(draw, name))))

    def logits(of: Mapping[Any, int], module: Any, x: torch.Tensor, sinks: Any) -> tuple[torch.Tensor, Any]:
        at, added = _text_positions(batch[1], x.shape[-1]), torch.zeros(1, x.shape[-1], dtype=x.dtype)
        for s, span in spans.items():
            a, b = span_ends(s, span)
            added = added + ((at >= a) & (at < b)) * math.log(factors[s])
        mine = torch.tensor([heads is None or (of[module], h) in heads for h in range(x.shape[1])])
        return x + added[:, None, None] * mine[:, None, None], sinks

    factor = next(iter(factors.values())) if one else factors
    _changed(draw, lambda hf: ll.scale_spans(hf, spans, factor, heads), name=name, batch=batch, logits=logits)


@case("lambda_mask")
def lambda_mask(draw: Draw) -> None:
    "Where every token is recent, nothing changes"
    name, (ids, keep) = draw(st.sampled_from(["llama", "qwen3", "gpt_neox", "phi3", "smollm3"])), _ids_and_padding(draw)
    sink, recent = draw(st.integers(1, 20)), draw(st.integers(1, 60))
    ceiling = draw(st.one_of(st.none(), st.integers(1, 60)))
    before = forward(model(name), ids, keep)
    with clear():
        with ll.lambda_mask(model(name), sink, recent, ceiling):
            inside = forward(model(name), ids, keep)
    real = torch.ones_like(ids).bool() if keep is None else keep.bool()
    assert inside[real].isfinite().all()
    if recent >= ids.shape[1]:
        close(inside[real], before[real], 1e-3, f"{name} inside of a mask that hides nothing")


@case("intervene")
def intervene(draw: Draw) -> None:
    "Interventions of one block are the same as one block for each"
    from longlens.interventions.heads import Ablate, Streaming, Temperature

    name, (ids, keep) = draw(st.sampled_from([n for n in CHANGED if n not in zoo.ENCODERS])), _ids_and_padding(draw)
    heads = _heads(draw, name)
    made = [Ablate(heads), Temperature(draw(st.floats(0.3, 3))), Streaming(draw(st.integers(0, 9)), draw(st.integers(1, 40)))]
    chosen = draw(st.lists(st.sampled_from(made), min_size=1, max_size=3))
    real = torch.ones_like(ids).bool() if keep is None else keep.bool()
    with clear():
        with ll.intervene(model(name), *chosen):
            together = forward(model(name), ids, keep)
        from contextlib import ExitStack

        with ExitStack() as stack:
            for i in chosen:
                stack.enter_context(ll.intervene(model(name), i))
            apart = forward(model(name), ids, keep)
    close(together[real], apart[real], 1e-5, "together and apart")


@case("extend_window")
def extend_window(draw: Draw) -> None:
    "Texts that the model knows are read as they were, but for NTK, which changes them all"
    name = draw(st.sampled_from(["bert", "llama", "modernbert", "qwen3", "gpt2", "mistral"]))
    kind = draw(st.sampled_from(["recurrent", "grouped", "interpolated", "ntk", "self_extend"]))
    trained = draw(st.integers(8, 60))
    length = trained + draw(st.integers(0, 300))
    more: dict[str, Any] = {"trained": trained}
    if kind == "self_extend":
        more |= {"group": draw(st.integers(1, 40)), "window": draw(st.integers(1, 30))}
    if kind == "ntk" and draw(st.booleans()):
        more["theta_factor"] = draw(st.floats(0.5, 50))
    n = draw(st.integers(1, min(length, 300)))
    ids = torch.randint(3, zoo.VOCAB, (1, n), generator=torch.Generator().manual_seed(n))
    before = forward(model(name), ids)
    with clear():
        with ll.extend_window(model(name), kind, length, **more):
            inside = forward(model(name), ids)
    assert inside.isfinite().all()
    assert torch.equal(forward(model(name), ids), before), "the model is not as it was"
    if n <= trained and kind != "ntk" and not (kind == "self_extend" and model(name).can_generate()):  # which counts in groups always
        close(inside, before, 1e-4, f"{kind} of {name} in a text that is known")


@case("other_frequencies")
def other_frequencies(draw: Draw) -> None:
    "A text in two pieces is the text whole, and the model is as it was"
    from longlens.interventions.frequencies import FREQUENCIES, Turning, longrope

    name, (ids, _) = draw(st.sampled_from(["llama", "qwen3", "gpt_neox", "smollm3", "gpt2", "gemma3"])), _ids_and_padding(draw)
    own = [lambda r: Turning(r.frequencies / 3), lambda r: r.frequencies, longrope([1.5] * 8), lambda r: Turning(r.frequencies[:1])]
    method = draw(st.one_of(st.sampled_from([*FREQUENCIES, "rotate", None, 7]), st.sampled_from(own)))
    factor = draw(st.one_of(st.floats(1, 30), st.sampled_from([1, 2, 0.5, math.nan, math.inf, -2.0])))
    _pieces(name, ids, lambda: ll.other_frequencies(model(name), method, factor))


def _pieces(name: str, ids: torch.Tensor, changed: Callable[[], Any]) -> None:
    "A change is refused, or holds for a text whole and in pieces, and is undone"
    from transformers import DynamicCache

    hf, ids = model(name), ids[:1]
    before = forward(hf, ids)
    with clear():
        with changed():
            whole, cache, cut = forward(hf, ids), DynamicCache(config=hf.config), ids.shape[1] // 2
            if cut:
                parts = [hf(x, past_key_values=cache).logits for x in (ids[:, :cut], ids[:, cut:])]
                close(torch.cat(parts, 1).float(), whole.float(), 2e-3, f"{name} in pieces")
    assert whole.isfinite().all()
    assert torch.equal(forward(hf, ids), before), "the model is not as it was"


@case("position_method", weight=2)
def position_method(draw: Draw) -> None:
    "Every method, and methods of other settings: a text in pieces is the text whole"
    from longlens.interventions.distances import ByDimension, DualChunk, ReRoPE
    from longlens.interventions.methods import POSITION_METHODS, PositionMethod
    from longlens.interventions.moved import E2, Jittered, RandomGaps, Shifted, Unrotated
    from longlens.interventions.weights import Sharpened

    name, (ids, _) = draw(st.sampled_from(["llama", "qwen3", "gpt_neox", "smollm3", "gpt2", "phi3"])), _ids_and_padding(draw)
    whole, small = st.integers(-1, 70), st.floats(-1, 9)
    made: list[Callable[[], Any]] = [
        lambda: ReRoPE(draw(whole), draw(st.none() | small)),
        lambda: DualChunk(draw(whole), draw(whole), trained=draw(whole)),
        lambda: ByDimension(draw(st.integers(-1, 9) | st.lists(st.integers(1, 5), max_size=4)), draw(whole), trained=draw(whole)),
        lambda: E2(draw(small), draw(small), draw(whole)),
        lambda: Jittered(draw(small)),
        lambda: RandomGaps(draw(small)),
        lambda: Shifted(draw(whole), draw(whole)),
        lambda: Unrotated(draw(st.sampled_from([None, [(0, 1)], [(9, 9)], []]))),
        lambda: Sharpened(draw(small), draw(st.booleans()), draw(st.booleans()), draw(whole)),
    ]
    if draw(st.booleans()):
        method: Any = draw(st.sampled_from([*POSITION_METHODS, "none", 3]))
    else:
        what = draw(st.sampled_from(made))()
        method = PositionMethod("drawn", interventions=lambda trained, factor: (what,))
    factor = draw(st.one_of(st.floats(1.01, 8), st.sampled_from([1.0, 2, math.nan])))
    _pieces(name, ids, lambda: ll.position_method(model(name), method, factor))


@case("position_lens", weight=0.2)
def position_lens(draw: Draw) -> None:
    "The unchanged model's loss in a text that fits is that of a score"
    lm = ll.load()
    lengths = draw(st.lists(st.integers(-2, 90), max_size=2))
    asked = {"n_needles": 0, "n_questions": 0, "n_texts": draw(st.integers(0, 2))}
    methods = draw(st.sampled_from([(), (), ("yarn",), "none", ["rotate"], {"none": 3}]))
    with clear():
        report = ll.position_lens(lm, lengths, methods, **asked)
    loss = report.frames["loss"]
    assert loss["loss"].is_finite().all() and loss["length"].unique().sort().to_list() == sorted(set(lengths))
    assert not report.findings() and report.frames["attention"]["entropy_norm"].max() <= 1 + 1e-5


# ---- models and texts


@case("load", weight=0.7)
def load(draw: Draw) -> None:
    name = draw(st.sampled_from([n for n in CAUSAL if n in zoo.EVERYTHING]))
    options = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "dtype": st.sampled_from(["float32", "bfloat16", torch.float64, None, "auto", "float99"]),
                "allow_longer": st.booleans(),
                "device": st.sampled_from(["cpu", torch.device("cpu"), None, "nowhere"]),
                "check": st.booleans(),
            },
        )
    )
    given = draw(st.sampled_from([model(name), "needle-lm", None, "no-such-model", Path("/no/such/folder"), "", 7, b"x"]))
    with clear():
        lm = ll.load(given, download=False, **options)
        repr(lm), lm.n_layers, lm.n_heads, lm.max_length, lm.attention_layers
    assert ll.load(lm) is lm


@case("LongModel", weight=2)
def long_model(draw: Draw) -> None:
    "Logits, scores and answers of any text against one forward pass"
    lm, text = some_model(draw), draw(any_text)
    with clear():
        t = lm.tokens(text)
        assert len(t.strings) == len(t)
        repr(t), lm.decode(t.ids)
        ids = t.ids
        want = lm.hf(ids[None], use_cache=False).logits[0]
        rows = draw(st.one_of(st.none(), st.lists(st.integers(-len(ids), len(ids) - 1), min_size=1, max_size=4)))
        form = draw(st.sampled_from([text, t, ids, ids.tolist(), ids.numpy()]))
        close(lm.logits(form, rows), want if rows is None else want[[r % len(ids) for r in rows]], 1e-4, "logits")
        chunk = draw(st.one_of(st.none(), st.integers(1, 60)))
        prefix = lm.prefill(form, chunk)
        close(prefix.logits, want[-1], 1e-4, "prefill")
        more = draw(st.one_of(any_text, st.just(form_of_ids(draw, ids_of(draw, 400, 1, 12)))))
        a = lm.tokens(more, add_special_tokens=False)
        whole = lm.hf(torch.cat([ids, a.ids])[None], use_cache=False).logits[0]
        right = whole[len(ids) - 1 : -1].log_softmax(-1).gather(-1, a.ids[:, None])[:, 0]
        for s in (
            lm.score(form, more, chunk=chunk),
            lm.score(prefix, more),
            lm.score_many([form, ids], [more, more], batch_size=draw(st.integers(1, 3)))[0],
        ):
            close(s.logprobs, right, 2e-4, "score")
        close(prefix.logits_after(a.ids, draw(st.one_of(st.none(), st.integers(1, 9)))), whole[len(ids) :], 1e-4, "logits_after")
        longer = prefix.extend(a.ids)
        close(longer.logits, whole[-1], 1e-4, "extend")
        m = draw(st.integers(1, len(longer)))
        if "Jamba" not in type(lm.hf).__name__:
            close(longer.crop(m).logits, whole[m - 1], 1e-4, "crop")
        new = lm.generate_ids(form, k := draw(st.integers(0, 4)), draw(st.sampled_from([None, "", ".", ("a", ""), "é"])))
        for i, token in enumerate(new.tolist()):
            at = torch.cat([ids, new[:i]])
            best = lm.hf(at[None], use_cache=False).logits[0, -1]
            assert best[token] >= best.max() - 1e-3, "not the first choice"
        lm.generate(text, k)


@case("LongModel.batches", weight=2)
def batches(draw: Draw) -> None:
    "Several inputs at once, padded on either side, and inputs that are nearly right"
    lm = needle_lm()
    rows = [ids_of(draw, lm.vocab_size) for _ in range(draw(st.integers(1, 3)))]
    side = draw(st.sampled_from(["left", "right", "right", "middle"]))
    wrong = draw(
        st.sampled_from(
            [
                None,
                None,
                None,
                [[1, 2], [3]],
                [],
                [[]],
                [1.5],
                [2**70],
                [-1],
                [10**6],
                [None],
                [True, False],
                "",
                [[[1]]],
                torch.zeros(0),
                np.array(["a"]),
                {1, 2},
                {"a": 1},
                None,
                object(),
                [torch.tensor([1, 2]), torch.tensor([3])],
            ]
        )
    )
    if wrong is not None:
        with clear():
            draw(st.sampled_from([lm, lm.logits, lm.tokens, lm.prefill, lambda x: lm.score(x, [3]), lambda x: lm.score([3], x)]))(wrong)
        return
    with clear():
        out = lm([lm.tokens(r) for r in rows], padding=side).logits
    for b, r in enumerate(rows):
        n = max(map(len, rows))
        got = out[b, n - len(r) :] if side == "left" else out[b, : len(r)]
        close(got, lm.hf(r[None], use_cache=False).logits[0], 1e-4, "logits of a padded batch")


@case("load_encoder", weight=0.7)
def load_encoder(draw: Draw) -> None:
    enc = encoder()
    given = draw(st.sampled_from([enc, enc.hf, "no-such-encoder", Path("/no/such/folder"), "", 7, None]))
    options = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "pooling": st.sampled_from(["mean", "cls", "max", ("mean", "cls"), "odd", (), "lasttoken", "weightedmean"]),
                "normalize": st.booleans(),
                "max_length": st.sampled_from([8, 96, 97, 0, -3]),
                "dtype": st.sampled_from(["float32", "bfloat16", "float99"]),
                "prompts": st.sampled_from([{}, {"query": "q: "}, {"é": "\ud83d"}]),
            },
        )
    )
    with clear():
        made = ll.load_encoder(given, enc.tokenizer if given is enc.hf else None, **options)
        repr(made), made.width


@case("Encoder", weight=2)
def encode(draw: Draw) -> None:
    "Each text in a batch as alone; and the mean of its states"
    enc, several = encoder(), draw(st.lists(any_text, min_size=1, max_size=5))
    with clear():
        together = enc.encode(several, draw(st.integers(1, 4)))
    for text, vector in zip(several, together, strict=True):
        with clear():
            t = enc.tokens(text)
        with torch.no_grad():
            states = enc.hf(t.ids[None]).last_hidden_state[0]
        close(vector, states.mean(0), 1e-4, "embedding")


@case("chunk_vectors", "decoder_vectors", weight=0.5)
def chunks_and_echoes(draw: Draw) -> None:
    "Rows of one plain run, between two places"
    enc, words = encoder(), draw(st.lists(sentence, min_size=1, max_size=3))
    text, ends = " ".join(words), [0]
    for w in words: ends.append(min(len(text), ends[-1] + len(w) + 1))
    spans = mostly(draw, st.just([*itertools.pairwise(ends)]), st.sampled_from([[], [(0, 0)], [(0, 9_999)]]))
    with clear():
        got = ll.chunk_vectors(enc, text, spans)
        again = ll.decoder_vectors(enc, text)
    t = enc.tokens(text)
    with torch.no_grad():
        states = enc.hf(t.ids[None]).last_hidden_state[0]
    close(again, enc.encode(text), 1e-4, "the whole text")
    for (a, b), vector in zip(spans, got.together, strict=True):
        first, last = t.offsets.T
        rows = states[(first < last) & (first >= a) & (first < b)]
        close(vector, rows.mean(0), 1e-4, "a chunk")


# ---- prompts

haystacks = st.one_of(
    st.none(),
    st.builds(lambda s: ll.Haystack.from_text(" ".join(s), repeat=True), st.lists(sentence, min_size=1, max_size=9)),
    st.sampled_from(["noise", "needles", "generated", "odd"]),
)


@case("Haystack", weight=3)
def haystack(draw: Draw) -> None:
    from longlens.prompts.haystack import split_sentences

    text = draw(any_text)
    how = draw(st.sampled_from(["from_text", "from_documents", "units"]))
    units, gaps = split_sentences(text)
    assert "".join(u + g for u, g in zip(units, gaps, strict=True)) == text or not text.strip(), "sentences are not the text"
    with clear():
        if how == "from_text":
            h = ll.Haystack.from_text(text, repeat=draw(st.booleans()))
        elif how == "from_documents":
            h = ll.Haystack.from_documents(draw(st.lists(any_text, max_size=3)))
        else:
            h = ll.Haystack(tuple(draw(st.lists(any_text, max_size=4))))
        n = draw(st.integers(0, 30))
        taken, after = h.take(n)
        assert len(taken) == len(after) and (not h.repeat or len(taken) == n)
        repr(h), h.text


@case("Context", "compose_prompt", weight=4)
def compose(draw: Draw) -> None:
    "Every named piece is where its tokens say"
    from longlens.prompts.compose import Piece

    lm = draw(st.sampled_from([needle_lm(), needle_lm().tokenizer, encoder().tokenizer]))
    parts = draw(st.lists(any_text, min_size=1, max_size=5))
    named = [draw(st.booleans()) for _ in parts]
    sep = draw(st.sampled_from([" ", "\n", "", "\n\n", " | ", "é"]))
    more = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "answers": st.just(["seven"]),
                "completion": st.sampled_from([" seven.", "x", " 👍🏽"]),
                "answer_prefix": st.sampled_from([" The code is", ":", "\ud83d"]),
                "question": any_text,
                "meta": st.just({"a": 1}),
            },
        )
    )
    with clear():
        ctx = ll.compose_prompt(
            lm, [Piece(p, f"part_{i}") if n else p for i, (p, n) in enumerate(zip(parts, named, strict=True))], sep=sep, **more
        )
        repr(ctx), len(ctx), ctx._repr_html_() if hasattr(ctx, "_repr_html_") else None
        assert ctx.completion_ids.ndim == 1
    text = sep.join(parts)
    assert ctx.text.startswith(text)
    for i, n in enumerate(named):
        if not n:
            continue
        span, a = ctx.spans[f"part_{i}"], len(sep.join(parts[:i])) + len(sep) * (i > 0)
        offsets = ctx.tokens.offsets[span.start : span.stop]
        whole = ctx.tokens.offsets[(ctx.tokens.offsets[:, 1] > a) & (ctx.tokens.offsets[:, 0] < a + len(parts[i]))]
        read = [c for b, e in whole.tolist() for c in range(max(b, a), min(e, a + len(parts[i])))]  # some tokenizers drop characters
        covered = text[int(offsets[0, 0]) : int(offsets[-1, 1])]
        assert not read or (offsets[0, 0] <= min(read) and max(read) < offsets[-1, 1]), f"{covered!r} where {parts[i]!r} is right"
        assert a <= int(offsets[-1, 1]) and int(offsets[0, 0]) <= a + len(parts[i])


@case("needle_context", weight=1)
def needle(draw: Draw) -> None:
    lm, n = (
        draw(st.sampled_from([needle_lm(), needle_lm().tokenizer])),
        draw(st.one_of(st.integers(1, 900), st.sampled_from([0, -1, 20_000]))),
    )
    options = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "wording": st.sampled_from(["ruler", "facts", "odd"]),
                "haystack": haystacks,
                "seed": st.one_of(st.integers(-5, 99), any_text),
                "exact": st.booleans(),
                "n_keys": st.integers(0, 4),
                "n_values": st.integers(0, 3),
                "n_queries": st.integers(0, 3),
                "needles": st.sampled_from([None, [("Eve", "seven")], [("é", "👍🏽")], []]),
                "value_words": st.integers(0, 3),
                "depth_percent": st.one_of(st.none(), st.floats(0, 100), st.sampled_from([-1, 101, math.nan, [50.0], [0, 100], []])),
            },
        )
    )
    with clear():
        ctx = ll.needle_context(lm, n, **options)
        total = len(ctx) + len(ctx.completion_ids)
    assert total <= n and (not options.get("exact") or total == n), f"{total} tokens where {n} are asked for"
    for name, span in ctx.spans.items():
        assert 0 <= span.start < span.stop <= len(ctx), name
    for answer in ctx.answers:
        assert answer in ctx.text


# ---- probes: every one at its smallest, with settings drawn; where there is a number to compare, it is compared


def _page(report: ll.Report) -> None:
    "All that a report shows; kept and read, it is the same"
    report.findings(), report.details(), report.summary(), report.table, repr(report), report._repr_html_()
    with tempfile.TemporaryDirectory() as folder:
        again = type(report).load(report.save(Path(folder) / "kept"))
    assert again.frames.keys() == report.frames.keys() and all(
        again.frames[k].equals(f, null_equal=True) for k, f in report.frames.items()
    )
    assert again.findings() == report.findings()


def _several_texts(draw: Draw, lm: LongModel, most: int = 3) -> Any:
    "One text or several, in the forms that probes take"
    one = lambda: draw(
        st.sampled_from(
            [draw(any_text), " ".join(draw(st.lists(sentence, min_size=2, max_size=12))), form_of_ids(draw, ids_of(draw, 400, 1, 150))]
        )
    )
    return draw(st.sampled_from([one(), [one() for _ in range(draw(st.integers(0, most)))]]))


@case("attention_sinks", "SinkReport", weight=0.3)
def sinks(draw: Draw) -> None:
    lm = some_model(draw)
    texts, n = _several_texts(draw, lm, 2), draw(st.integers(1, 8))
    options = dict(
        epsilon=draw(st.one_of(st.floats(0, 1), st.just(0.3))),
        T=mostly(draw, st.integers(2, 12), st.integers(1, 70)),
        sequences=mostly(draw, st.integers(1, 3), st.just(0)),
        first=n,
        seed=draw(st.integers(-3, 9)),
        chunk=draw(st.one_of(st.none(), st.integers(0, 50))),
    )
    with clear():
        report = ll.attention_sinks(lm, texts, **options)
        _page(report)
    ids = lm.tokens(texts if not isinstance(texts, list) or isinstance(texts[0], int) else texts[0]).ids
    P = right_patterns(lm.hf, ids[None])
    f = report.table.filter(sample=0) if "sample" in report.table.columns else report.table
    assert sorted(f["layer"].unique()) == sorted(P)
    for layer, p in P.items():
        close(f.filter(layer=layer).sort("head")["alpha_first"], p[0, ..., 0].mean(-1), 1e-4, "alpha of the first token")


@case("context_gain", "GainReport", weight=0.4)
def gain(draw: Draw) -> None:
    lm = some_model(draw)
    texts = _several_texts(draw, lm)
    windows = mostly(draw, st.lists(st.integers(1, 30), min_size=1, max_size=3), st.lists(st.integers(0, 60), max_size=3))
    targets = mostly(draw, st.integers(1, 5), st.integers(0, 20))
    with clear():
        report = ll.context_gain(
            lm,
            texts,
            windows,
            targets=targets,
            tolerance=draw(st.floats(0, 1)),
            batch_size=draw(st.integers(1, 4)),
            seed=draw(st.integers(-2, 5)),
        )
        _page(report)
    first = lm.tokens(texts if isinstance(texts, str) else texts[0]).ids
    w = max(windows)
    front = next((i for i, x in enumerate(first.tolist()) if x not in set(lm.tokenizer.all_special_ids)), len(first))
    start = max(front, len(first) - targets - w)
    read = torch.cat([first[:front], first[start:]])
    logits = lm.hf(read[None], use_cache=False).logits[0, :-1].log_softmax(-1).gather(-1, read[1:, None])[-targets:].mean()
    close(report.frames["rows"].filter(text=0, window=w)["logprob"][0], logits, 1e-3, "gain")


@case("duo_gates", weight=0.15)
def duo(draw: Draw) -> None:
    lm = draw(st.sampled_from([needle_lm(), with_words("llama")]))
    n = draw(st.integers(2, 60))
    texts = [
        (ids_of(draw, 400, n, n), torch.tensor(sorted(draw(st.sets(st.integers(1, n - 1), min_size=1, max_size=4))))) for _ in range(2)
    ]
    options = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "lr": st.floats(0, 1),
                "penalty": st.floats(0, 2),
                "sink": st.integers(-1, 20),
                "recent": st.integers(0, 40),
                "seed": st.integers(-2, 5),
            },
        )
    )
    with clear():
        fit = ll.duo_gates(
            lm,
            draw(st.sampled_from([texts, texts[:1], [], lambda i: texts[i % 2]])),
            steps=mostly(draw, st.just(5), st.integers(-1, 6)),
            progress=False,
            **options,
        )
        repr(fit), fit.array
    assert bool(((fit.array >= 0) & (fit.array <= 1)).all()) and fit.log.height == fit.settings.steps


@case("retrieval_heads", "HeadReport", weight=0.1)
def heads(draw: Draw) -> None:
    lm = draw(st.sampled_from([needle_lm(), needle_lm(), with_words("jamba")]))
    options = draw(
        st.fixed_dictionaries(
            {"ablation": st.sampled_from([None, None, None, None, "zero", "mean", "uniform", "odd"])},
            optional={
                "trials": st.integers(1, 2),
                "methods": st.sampled_from([("patterns",), ("qr",), ("patterns", "qr"), (), ("odd",)]),
                "control": st.one_of(st.none(), any_text),
                "seed": st.integers(-2, 9),
                "batch_size": st.integers(1, 3),
            },
        )
    )
    lengths = mostly(draw, st.lists(st.integers(100, 160), min_size=1, max_size=1), st.lists(st.integers(0, 160), max_size=2))
    depths = mostly(
        draw, st.lists(st.floats(0, 100), min_size=1, max_size=1), st.lists(st.sampled_from([120.0, -1.0, math.nan, 50]), max_size=2)
    )
    with clear():
        _page(report := ll.retrieval_heads(lm, lengths=lengths, depths=depths, **options))
    assert sorted(report.table["layer"].unique()) == list(lm.attention_layers)


@case("lost_in_the_middle", "MiddleReport", weight=0.2)
def middle(draw: Draw) -> None:
    from longlens.prompts.questions import Question

    lm = needle_lm()

    def question(i: int) -> Question:
        gold, *others = draw(st.lists(st.one_of(plain_sentence, sentence), min_size=3, max_size=3, unique=True))
        return Question(f"What is the code for Eve {i}?", (draw(st.sampled_from(["seven", "👍🏽", "x"])),), gold, tuple(others))

    options = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "variants": st.sampled_from([("plain",), ("plain",), ("plain", "query_aware"), ("plain", "plain"), (), ("odd",)]),
                "baselines": st.booleans(),
                "metric": st.sampled_from([None, "string_match_all", "best_subspan_em", "odd"]),
                "seed": st.integers(-2, 9),
                "batch_size": st.integers(1, 3),
            },
        )
    )
    positions = mostly(
        draw,
        st.one_of(st.integers(1, 3), st.lists(st.integers(0, 2), min_size=1, max_size=3)),
        st.one_of(st.integers(-1, 4), st.lists(st.integers(-1, 3), max_size=3)),
    )
    with clear():
        task = [question(i) for i in range(draw(st.integers(1, 2)))]
        _page(
            report := ll.lost_in_the_middle(
                lm,
                task,
                max_new_tokens=mostly(draw, st.integers(1, 3), st.integers(-1, 0)),
                positions=positions,
                n_documents=mostly(draw, st.sampled_from([None, 3]), st.integers(0, 4)),
                **options,
            )
        )
    assert report.table.height > 0


@case("tasks", "Tasks", "Dataset", "register", "evaluate_tasks", "TaskReport", weight=0.3)
def published_tasks(draw: Draw) -> None:
    from longlens.task_data.base import DATASETS

    lm, longs = needle_lm(), st.lists(st.one_of(plain_sentence, sentence), min_size=1, max_size=4)
    good = st.fixed_dictionaries(
        {
            "input": sentence,
            "context": longs.map("\n".join),
            "answers": st.lists(plain_sentence, min_size=1, max_size=2),
            "dataset": st.just("qasper"),
        },
        optional={"length": st.integers(0, 9999), "language": st.sampled_from(["en", "zh"]), "_id": st.one_of(st.none(), any_text)},
    )
    odd = st.one_of(
        st.just({"input": "?"}), st.just([1]), st.fixed_dictionaries({"context": any_text, "answers": st.none(), "dataset": any_text})
    )
    rows = draw(st.lists(st.one_of(good, good, good, odd), min_size=0, max_size=3))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / draw(st.sampled_from(["qasper.jsonl", "qasper.json", "qasper.csv", "qasper.parquet"]))
        path.write_text("\n".join(json.dumps(r) for r in rows) if draw(st.booleans()) else json.dumps(rows), encoding="utf-8")
        with clear():
            found = ll.tasks(
                draw(st.sampled_from(["longbench:qasper", "longbench", "longbench:qasper", "odd"])),
                path,
                draw(st.sampled_from([None, 1, 0])),
            )
            assert found.frame().height == len(found) <= len(rows)
            d = ll.Dataset(draw(st.sampled_from(["own", "a:b", ""])), "Own", lambda files, part: iter(found.questions))
            try:
                assert len(ll.tasks(ll.register(d).name, path)) == len(found)
            finally:
                DATASETS.pop("own", None)
            options = draw(
                st.fixed_dictionaries(
                    {},
                    optional={
                        "truncate": st.sampled_from([None, 150, 400, 3]),
                        "max_new_tokens": st.integers(0, 3),
                        "metric": st.sampled_from([None, "any_in", "odd", "judged"]),
                        "seed": st.integers(-1, 3),
                    },
                )
            )
            _page(report := ll.evaluate_tasks(lm, found, **options))
    assert report.frames["answers"]["score"].is_between(0, 1).all() and report.table.height == len(found)


@case("needle_grid", "GridReport", "plan", weight=0.3)
def grid(draw: Draw) -> None:
    lm = draw(st.sampled_from([needle_lm(), needle_lm(), with_words("llama")]))
    options = draw(
        st.fixed_dictionaries(
            {
                "lengths": st.lists(st.integers(90, 200), min_size=1, max_size=2),
                "depths": st.lists(st.floats(0, 100), min_size=1, max_size=2),
                "trials": st.integers(1, 2),
            },
            optional={
                "kinds": st.sampled_from([("single",), ("single",), ("multikey",), ("single", "single"), (), ("odd",)]),
                "threshold": st.floats(0, 1.05),
                "wording": st.sampled_from(["facts", "facts", "facts", "ruler", "odd"]),
                "seed": st.integers(-2, 9),
                "metric": st.sampled_from(["string_match_all", "string_match_part", "string_match_all", "odd"]),
                "max_new_tokens": st.integers(0, 6),
                "remedies": st.sampled_from([(), (), (), ("ntk",), ("odd",)]),
                "batch_size": st.sampled_from([1, 2, 3, 4, 0]),
                "stop": st.sampled_from([(), ("\n",), ("",), ("é",)]),
                "haystack": haystacks.filter(lambda h: not isinstance(h, str)),
            },
        )
    )
    with clear():
        planned = ll.plan(ll.needle_grid, lm, **options)
        _page(report := ll.needle_grid(lm, **options))
    assert len(planned.cells) > 0 and report.frames["answers"].height > 0


@case("published_grid", weight=2)
def published(draw: Draw) -> None:
    "A grid as others publish theirs: CSV or JSON, and files that are nearly one"
    right = st.fixed_dictionaries(
        {"context_length": st.integers(1, 200_000), "depth_percent": st.floats(0, 100), "score": st.integers(1, 10)}
    )
    odd = st.fixed_dictionaries(
        {
            "context_length": st.sampled_from([0, -1, "x", None, 1e300, True]),
            "depth_percent": st.sampled_from([101, -1, "", math.nan]),
            "score": st.sampled_from([11, 0, "", "ten", math.inf]),
        }
    )
    rows = [
        mostly(draw, right, st.one_of(odd, right.map(lambda r: {"a": r["score"]}), st.just({}))) for _ in range(draw(st.integers(1, 6)))
    ]
    length = draw(st.sampled_from(["context_length", "token_limit", "context_length"]))
    rows = [{length if k == "context_length" else k: v for k, v in r.items()} for r in rows]
    columns = list(dict.fromkeys(k for r in rows for k in r))
    table = "\n".join([",".join(columns), *(",".join(str(r.get(c, "")) for c in columns) for r in rows)])
    data = mostly(draw, st.just(json.dumps(rows)), st.sampled_from(["", "{}", "[]", '{"results": [1]}', "null", "3", "[[1]]", "{"]))
    kind = draw(st.sampled_from(["csv", "json"]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"scores.{kind}"
        file.write_text(
            table if kind == "csv" else data, encoding=mostly(draw, st.just("utf-8"), st.sampled_from(["utf-16", "utf-8-sig"]))
        )
        with clear():
            found = ll.published_grid(
                mostly(draw, st.sampled_from([file, str(file)]), st.sampled_from([Path(folder), Path(folder) / "none.csv"])),
                threshold=draw(st.floats(0, 1)),
            )
            _page(found)
    close(found.frames["answers"]["score"].sort(), sorted(r["score"] / 10 for r in rows), 1e-6, "scores")


@case("length_collapse", "CollapseReport", weight=0.12)
def collapse(draw: Draw) -> None:
    texts = draw(st.one_of(st.none(), st.lists(st.lists(plain_sentence, min_size=8, max_size=12).map(" ".join), min_size=1, max_size=4)))
    options = draw(
        st.fixed_dictionaries(
            {
                "lengths": st.one_of(st.lists(st.integers(3, 90), min_size=1, max_size=3), st.integers(4, 90)),
                "n_documents": st.sampled_from([8, 8, 9, 8, 3]),
            },
            optional={
                "taus": st.sampled_from([None, 0.5, (0.5, 1.0), (), -1]),
                "seed": st.integers(-2, 9),
                "batch_size": st.integers(1, 4),
                "layer_documents": st.integers(0, 3),
                "retrieval": st.sampled_from([None, (), "odd"]),
            },
        )
    )
    with clear():
        _page(ll.length_collapse(encoder(), texts, n_queries=3, n_candidates=4, **options))


METHODS = ["loo", "attention", "attntrace", "stc", "contextcite", "rollout", "shapley", "tracllm", "gradient_x_input", "xl3m",
           "longcodezip", "odd"]


def _traced(draw: Draw) -> tuple[Any, dict[str, Any]]:
    "A context and how it is cut"
    context = draw(
        st.one_of(
            st.lists(sentence, min_size=1, max_size=8).map(" ".join),
            st.lists(sentence, min_size=1, max_size=4),
            any_text,
            st.lists(any_text, max_size=3),
        )
    )
    options = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "by": st.sampled_from(
                    ["words", "lines", "sentences", "paragraphs", "documents", "tokens", "odd", [(0, 2), (2, 5)], [], [(5, 2)]]
                ),
                "size": st.integers(0, 5),
                "k": st.integers(0, 9),
                "seed": st.integers(0, 9),
                "batch_size": st.integers(1, 4),
            },
        )
    )
    return context, options


@case("trace_context", "Trace", weight=0.5)
def trace(draw: Draw) -> None:
    lm, (context, options) = needle_lm(), _traced(draw)
    question, answer = draw(any_text), draw(st.one_of(st.sampled_from([" seven", "seven.", " a stone"]), st.none(), any_text))
    method = draw(st.sampled_from(METHODS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with clear():
            found = ll.trace_context(lm, context, question, answer, method, max_new_tokens=3, **options)
            _page(found)
            found.top(), found.chart()
    if method == "loo":
        _leave_one_out(found)


def _leave_one_out(found: ll.Trace) -> None:
    "Scores are finite, one for each source"
    assert found.table["score"].is_finite().all()


@case("fit_at2", "HeadFit", "save_fit", "load_fit", weight=0.3)
def heads_fitted(draw: Draw) -> None:
    "Coefficients whose absolute values sum to 1, kept in a file as they are; scores are the formed pattern, weighted"
    from longlens.probes.traceback.prompts import trace_prompt
    lm, prompts = needle_lm(), []
    for _ in range(mostly(draw, st.integers(1, 2), st.just(0))):
        parts = draw(st.lists(sentence, min_size=1, max_size=4))
        prompts.append(trace_prompt(lm, parts, draw(sentence), draw(st.sampled_from([" seven", "a stone"]))))
    with clear():
        fit = ll.fit_at2(lm, prompts, ablations=mostly(draw, st.integers(2, 6), st.just(1)), steps=draw(st.integers(1, 5)))
        with tempfile.TemporaryDirectory() as folder: assert ll.load_fit(ll.save_fit(fit, Path(folder) / "fit.json")) == fit
        assert abs(sum(abs(c) for *_, c in fit.coefficients) - 1) < 1e-4
        p = prompts[0]
        found = ll.trace_context(lm, p, method="at2", fitted=fit).table.sort("source")["score"]
        hf = copy.deepcopy(lm.hf)
        hf.set_attn_implementation("eager")
        with torch.no_grad(): patterns = hf(input_ids=p.whole[None], output_attentions=True).attentions
        rows = slice(p.answer_rows.start, p.answer_rows.stop)
        want = [sum(c * float(patterns[layer][0, head, rows].mean(0)[r.start : r.stop].sum()) for layer, head, c in fit.coefficients)
                for r in p.ranges]
        close(torch.tensor(found.to_list()), torch.tensor(want), 1e-4, "at2")


@case("check_citations", "CitationCheck", weight=0.3)
def citations_checked(draw: Draw) -> None:
    "Shares that can be counted again from the table"
    texts = mostly(draw, st.lists(sentence, min_size=2, max_size=4), st.lists(sentence, max_size=1))
    reply = draw(st.one_of(any_text, st.sampled_from(["stone [1].", "A stone. [2] Seven [1][9]", "[1]", "x [1, 2]? y."])))
    with clear():
        found = ll.check_citations(needle_lm(), texts, draw(sentence), reply=reply, least=draw(st.floats(-2, 2)))
        f = found.sources
        both = int((f["cited"] & f["needed"]).sum())
        for share, of in ((found.recall, "needed"), (found.precision, "cited")):
            assert math.isnan(share) if not f[of].sum() else abs(share * int(f[of].sum()) - both) < 1e-9


@case("check_quotes", "QuoteCheck", weight=0.3)
def quotes_checked(draw: Draw) -> None:
    "A real quote stands in the texts that are named, word for word"
    texts = mostly(draw, st.lists(sentence, min_size=1, max_size=4), st.just([]))
    reply = draw(st.one_of(any_text, st.sampled_from(["\n".join(texts), " ".join(f'"{t}" [1]' for t in texts), "a b c\nAnswer: no"])))
    with clear():
        found = ll.check_quotes(needle_lm(), texts, draw(sentence), reply=reply, answer_tokens=2)
        for quote, at, real in found.quotes.select("text", "found", "real").rows():
            assert real == bool(at) and all(" ".join(quote.split()) in " ".join(texts[i].split()) for i in at), (quote, at)
        assert (found.answer is not None) == found.quotes["real"].any()


@case("shorten_context", "ShortContext", weight=0.3)
def shortened(draw: Draw) -> None:
    "No more is kept than fits, in its order, and nothing else"
    texts = draw(st.lists(sentence, min_size=1, max_size=5))
    keep, method = mostly(draw, st.integers(5, 60), st.just(0)), draw(st.sampled_from(["longcodezip", "xl3m", "loo"]))
    with clear():
        found = ll.shorten_context(
            needle_lm(), texts, draw(sentence), keep, method=method, inside=draw(st.sampled_from([None, 2])), max_new_tokens=2
        )
        parts = found.sources if found.blocks is None else found.blocks
        assert found.kept == parts.filter("kept")["tokens"].sum() <= keep
        assert found.text == "".join(parts.filter("kept")["text"]) and parts["start"].is_sorted()


@case("scan_context", "ScanReport", weight=0.3)
def scan(draw: Draw) -> None:
    context, options = _traced(draw)
    options.pop("k", None)
    if not isinstance(options.get("by", "words"), str):
        options.pop("by")
    detector = draw(
        st.sampled_from(
            [lambda text: "seven" in text, lambda text: 0.7, lambda text: None, lambda text: len(text), lambda text: math.nan]
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with clear():
            _page(
                ll.scan_context(
                    needle_lm(),
                    context,
                    draw(any_text),
                    draw(st.sampled_from([" seven", None])),
                    detector=detector,
                    max_new_tokens=3,
                    threshold=draw(st.floats(0, 1)),
                    method=draw(st.sampled_from(["loo", "attention", "attntrace"])),
                    **options,
                )
            )


@case("evaluate_traceback", "TracebackReport", weight=0.3)
def evaluate(draw: Draw) -> None:
    from longlens.probes.traceback.evaluation.cases import TraceCase

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with clear():
            cases = []
            for _ in range(mostly(draw, st.integers(1, 2), st.just(0))):
                parts = draw(st.lists(sentence, min_size=1, max_size=4))
                at = draw(st.integers(0, len(parts) - 1))
                begin = len(" ".join(parts[:at])) + (at > 0)
                cases.append(
                    TraceCase(
                        " ".join(parts),
                        draw(any_text),
                        draw(st.sampled_from([" seven", "x", "seven", " a stone", ""])),
                        ((begin, begin + len(parts[at])),),
                    )
                )
            _page(
                ll.evaluate_traceback(
                    needle_lm(),
                    cases,
                    mostly(draw, st.sampled_from([["loo"], ["attention", "loo"]]), st.sampled_from([[], ["odd"], {"a": "loo"}])),
                    mostly(draw, st.one_of(st.none(), st.integers(1, 4)), st.just(0)),
                    by=mostly(draw, st.sampled_from([None, "sentences", "words"]), st.just("odd")),
                    keep=mostly(draw, st.sampled_from(["changed", "said"]), st.just("odd")),
                    max_new_tokens=3,
                    seed=draw(st.integers(0, 5)),
                )
            )


@case("sweep", "Run", weight=0.4)
def sweep(draw: Draw) -> None:
    "Shared beginnings and batches change nothing"
    from longlens.interventions.heads import Streaming, Temperature
    from longlens.probes.generate import Ask
    from longlens.sweeps.cells import Cell, Changed

    lm, base = some_model(draw), ids_of(draw, 400, 1, 60)
    conditions = [None, Changed((Temperature(1.3),)), Changed((Streaming(2, 9),))]
    cells = []
    for i in range(mostly(draw, st.integers(1, 5), st.just(0))):
        ids = torch.cat([base[: draw(st.integers(0, len(base)))], ids_of(draw, 400, 2, 9)])
        spans = (
            {"gold": range(a := draw(st.integers(0, len(ids) - 1)), draw(st.integers(a + 1, len(ids))))} if draw(st.booleans()) else {}
        )
        cells.append(Cell(ids, {"i": i}, spans, completion=ids_of(draw, 400, 1, 3), condition=draw(st.sampled_from(conditions))))
    run = dict(batch_size=draw(st.one_of(st.none(), st.integers(0, 3))), seed=0)
    with clear():
        run_of = ll.Run(**run)
    with clear():
        shared = ll.sweep(
            lm,
            cells,
            Ask(draw(st.integers(0, 2))),
            grain=draw(st.sampled_from([None, 1, 4, 16])),
            run=run_of,
            chunk=draw(st.one_of(st.none(), st.integers(0, 30))),
        )
        table = shared.table("answers")
    alone = ll.sweep(lm, cells, Ask(0), reuse=False, batch_size=1).table("answers")
    assert table.height == len(cells)
    for column in ("logprob", "log_prob"):
        if column in alone.columns:
            close(table.sort("i")[column], alone.sort("i")[column], 1e-3, column)


# ---- what is shown


@case("token_view", weight=0.7)
def view(draw: Draw) -> None:
    lm, text = needle_lm(), draw(any_text)
    how = draw(st.sampled_from(["text", "tokens", "strings", "ids", "context"]))
    with clear():
        n = len(lm.tokens(text))
        number = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.integers(-9, 9), st.floats(-1, 1, width=32))
        values = draw(st.lists(number, min_size=n, max_size=n))
        form = draw(
            st.sampled_from(
                [list, tuple, np.array, lambda v: torch.tensor(v, dtype=torch.float32), lambda v: pl.Series(v, dtype=pl.Float64)]
            )
        )
        quantities = draw(st.sampled_from([None, {}, {"é 👍🏽": form(values)}, {"short": [1.0]}, {"": form(values)}]))
        spans = draw(st.sampled_from([None, {}, spans_in(draw, n)]))
        selected = draw(st.one_of(st.none(), st.integers(-1, n)))
        if how == "text":
            shown = ll.token_view(lm, text, spans=spans, selected=selected)
        else:
            tokens = {
                "tokens": lm.tokens(text),
                "strings": lm.tokens(text).strings,
                "ids": lm.tokens(lm.tokens(text).ids),
                "context": ll.compose_prompt(lm, [text]) if how == "context" else None,
            }[how]
            shown = ll.token_view(tokens, quantities, spans, selected)
        from longlens.charts.token_view import token_data

        json.dumps(token_data(lm.tokens(text), None, spans).page())
    if how in ("tokens", "text"):
        assert shown._n == n


@case("explore", "PromptReading", weight=0.2)
def explore(draw: Draw) -> None:
    lm, text = needle_lm(), draw(st.one_of(any_text, st.lists(sentence, min_size=1, max_size=6).map(" ".join)))
    given = draw(st.sampled_from([text, text, None, [text], form_of_ids(draw, ids_of(draw, 400, 1, 60))]))
    question = draw(st.sampled_from(["", "", "What is the code for Eve?", draw(any_text)]))
    with clear():
        bench = ll.explore(lm, given, question=question, answer=draw(st.sampled_from(["", " seven"])) if question else "")
        _page(bench.report)


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(ODD),
    st.just(Path("a")),
    st.just(torch.tensor(3)),
    st.just(object()),
    st.just({1: 2}),
    st.lists(st.integers(), max_size=2),
)


plain_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False), texts),
    lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(st.text(max_size=3), v, max_size=3)),
    max_leaves=6,
)


@case("Report", weight=4)
def report(draw: Draw) -> None:
    names = mostly(
        draw,
        st.lists(st.sampled_from(["table", "a_1", "x" * 60, "report", "con"]), min_size=1, max_size=3, unique=True),
        st.lists(st.sampled_from(["Table", "table", "é", "", "x" * 70, "a/b", "..", "a\x00"]), max_size=3, unique=True),
    )
    column = st.sampled_from(
        [
            [1, 2],
            [1.5, math.nan],
            ["a", "👍🏽"],
            [None, None],
            [True, False],
            [[1], [2, 3]],
            [{"a": 1}, {"a": 2}],
            [b"x", b""],
            [datetime.date(2026, 1, 1)] * 2,
        ]
    )
    made = st.dictionaries(
        st.one_of(st.sampled_from(["x", "é", ""]), st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=3)),
        column,
        max_size=3,
    )
    frames = {name: pl.DataFrame(draw(made), strict=False) for name in names}
    meta = mostly(
        draw, st.dictionaries(st.text(max_size=4), plain_values, max_size=3), st.dictionaries(st.text(max_size=4), values, max_size=3)
    )
    with clear():
        _page(ll.Report(frames, meta))


# ---- key sets and policies


@case("keep_keys", weight=2)
def keep_keys(draw: Draw) -> None:
    "Keys that are gone for later queries, against formed masks; tables of odd kinds and shapes are refused"
    name = draw(st.sampled_from([n for n in CHANGED if n not in zoo.ENCODERS]))
    batch, since, n = _ids_and_padding(draw), draw(st.integers(0, 30)), draw(st.integers(1, 30))
    layers = sorted(set(numbers(name).values()))
    n_kv = draw(st.sampled_from([1, zoo.HEADS if name == "deepseek_v3" else count_kv_heads(model(name))]))
    g, going = torch.Generator().manual_seed(draw(st.integers(0, 2**31))), draw(st.booleans())
    tables: dict[int, Any] = {}
    for layer in draw(st.lists(st.sampled_from(layers), min_size=1, max_size=2, unique=True)):
        seen = torch.rand(n_kv, n, generator=g) < 0.5
        tables[layer] = torch.randint(0, 40, (n_kv, n), generator=g) if going else seen
        tables[layer] = mostly(draw, st.just(tables[layer]), st.sampled_from([seen.float(), seen[0], seen.tolist(), seen[:, :0], None]))

    def logits(of: Mapping[Any, int], module: Any, x: torch.Tensor, sinks: Any) -> tuple[torch.Tensor, Any]:
        if of[module] not in tables:
            return x, sinks
        table, at = tables[of[module]], _text_positions(batch[1], x.shape[-1])
        until = table if going else torch.where(table, 10**6, 0)
        until = torch.nn.functional.pad(until, (0, 99), value=10**6)[:, at.clamp_min(0)].transpose(0, 1)  # (batch, kv, keys)
        until = until.masked_fill(at[:, None] < 0, 10**6).repeat_interleave(x.shape[1] // until.shape[1], 1)
        gone = (at[:, None, :, None] >= until[:, :, None]) & (at >= since)[:, None, :, None]
        return x.masked_fill(gone, -torch.inf), sinks

    _changed(draw, lambda hf: ll.keep_keys(hf, tables, since=since), name=name, batch=batch, logits=logits)


def _odd_budget(draw: Draw, n: int) -> Any:
    return mostly(draw, st.integers(1, n), st.sampled_from([0, -1, n + 1, 2.5, "3", None, float("nan"), True]))


@case("use_policy")
def use_policy(draw: Draw) -> None:
    "The prompt is read as without; what follows is the same in one piece and in chunks; with all keys an eviction changes nothing"
    from longlens.policies.use import POLICIES

    lm = draw(st.sampled_from([needle_lm, lambda: with_words("llama"), lambda: with_words("gpt_oss")]))()
    ids = ids_of(draw, min(400, lm.vocab_size), 12, 70)
    n = draw(st.integers(8, len(ids) - 2))
    name, budget = mostly(draw, st.sampled_from([*POLICIES]), st.sampled_from(["", "snap", 3, None])), _odd_budget(draw, n)
    with clear():
        with ll.use_policy(lm, name, budget, form_of_ids(draw, ids[:n])):
            whole = lm.logits(ids)
            parts = lm.prefill(ids[:n], chunk=draw(st.integers(3, 30))).logits_after(ids[n:], draw(st.integers(1, 9)))
    plain = lm.logits(ids)
    close(whole[:n], plain[:n], 1e-3, f"the prompt under {name}")
    if name != "xattention":  # it chooses for groups of queries that come together
        close(parts, whole[n:], 2e-3, f"what follows under {name}")
    if POLICIES[name].kind == "eviction" and budget == n:
        close(whole, plain, 1e-3, f"all keys under {name}")


@case("policy_lens", weight=0.5)
def policy_lens(draw: Draw) -> None:
    "Shares within 0 and 1, nothing lost with all keys, the oracle above every policy that sees no more"
    from longlens.policies.use import POLICIES

    lm = draw(st.sampled_from([needle_lm, lambda: with_words("llama")]))()
    texts = [ids_of(draw, min(400, lm.vocab_size), 20, 90) for _ in range(draw(st.integers(1, 2)))]
    chosen = mostly(draw, st.lists(st.sampled_from([*POLICIES]), min_size=1, max_size=3), st.sampled_from([["x"], [3], "", []]))
    budgets = mostly(draw, st.sampled_from([0.1, (0.2, 0.6), [5], 1.0, 40]), st.sampled_from([0, -1, (), float("nan"), "a", [None]]))
    targets = mostly(draw, st.integers(2, 10), st.sampled_from([0, 1, 2.5, 99, None]))
    with clear():
        report = ll.policy_lens(lm, texts, chosen, budgets, targets=targets)
        report.findings(), report.sections()
    rows = report.frames["cases"]
    for column in ("mass_kept", "recall", "share"):
        assert rows[column].is_between(-1e-5, 1 + 1e-5).all(), f"{column} is no share: {rows[column].to_list()}"
    full = rows.filter(policy="full")
    close(full["mass_kept"], np.ones(len(full)), 1e-4, "mass with all keys")
    close(full["running_error"], np.zeros(len(full)), 1e-3, "error with all keys")
    heads = report.frames["heads"]
    best = heads.filter(policy="oracle").select("budget", "layer", "head", best="mass_kept")
    spread = ("full", "recycled", "squeezed", "squeezed_tree", "ada_kv", "pyramid_kv", "duo_attention", "longgen")  # uneven
    both = heads.filter(~pl.col("policy").is_in(spread)).join(best, on=["budget", "layer", "head"])
    assert (both["mass_kept"] <= both["best"] + 1e-4).all(), f"more mass than the oracle keeps: {both}"


@case("policy_premises", weight=0.5)
def policy_premises(draw: Draw) -> None:
    "alpha against formed weights; numbers for every head"
    lm = draw(st.sampled_from([needle_lm, lambda: with_words("llama"), lambda: with_words("jamba")]))()
    ids = ids_of(draw, min(400, lm.vocab_size), 16, 80)
    with clear():
        found = ll.policy_premises(lm, form_of_ids(draw, ids))
    for layer, p in right_patterns(lm.hf, ids[None]).items():
        mine = found.filter(layer=layer).sort("head")
        close(mine["alpha"], len(ids) * p[0].double().pow(2).sum(1).amax(-1), 1e-3, f"alpha of layer {layer}")
        assert mine["lazy_share"].is_between(0, 1).all()


def _rows_in(draw: Draw, n: int) -> Any:
    "Rows of a text of n tokens, or none"
    return draw(st.one_of(st.none(), st.just(span_in(draw, n))))


def _cut_of(spans: Mapping[str, Any], rows: Any, heads: Any, keep: torch.Tensor | None) -> Callable[..., torch.Tensor]:
    "Which weights are cut, (batch|1, heads, n, n)"

    def cut(of: Mapping[Any, int], module: Any, shape: Sequence[int]) -> torch.Tensor:
        at, out = _text_positions(keep, shape[-1]), torch.zeros(1, 1, shape[-1], shape[-1], dtype=torch.bool)
        for name, span in spans.items():
            a, b = span_ends(name, span)
            first, last = (b, 10**9) if rows is None else span_ends("rows", rows)
            out = out | (((at >= first) & (at < last))[:, None, :, None] & ((at >= a) & (at < b))[:, None, None])
        mine = torch.tensor([heads is None or (of[module], h) in heads for h in range(shape[1])])
        return out & mine[:, None, None]

    return cut


@case("knock_out", weight=2)
def knock_out(draw: Draw) -> None:
    "Weights on spans are zero at chosen rows and heads, against formed logits"
    name, batch = draw(st.sampled_from([n for n in CHANGED if n not in zoo.ENCODERS])), _ids_and_padding(draw)
    n = batch[0].shape[1]
    spans, rows, heads = spans_in(draw, n, 2), _rows_in(draw, n), draw(st.one_of(st.none(), st.just(_heads(draw, name))))
    cut = _cut_of(spans, rows, heads, batch[1])

    def logits(of: Mapping[Any, int], module: Any, x: torch.Tensor, sinks: Any) -> tuple[torch.Tensor, Any]:
        return x.masked_fill(cut(of, module, x.shape), -torch.inf), sinks

    _changed(draw, lambda hf: ll.knock_out(hf, spans, rows, heads), name=name, batch=batch, logits=logits)


@case("zero_values")
def zero_values(draw: Draw) -> None:
    "With all rows and keys cut, heads give nothing; a span that no row comes after changes nothing"
    name, batch = draw(st.sampled_from(["llama", "gpt2", "gemma2", "gpt_oss"])), _ids_and_padding(draw)
    n, heads = batch[0].shape[1], _heads(draw, name)

    def out(of: Mapping[Any, int], module: Any, x: torch.Tensor) -> torch.Tensor:
        mine = torch.tensor([(of[module], h) in heads for h in range(x.shape[1])])
        return x.masked_fill(mine[:, None, None], 0)

    _changed(draw, lambda hf: ll.zero_values(hf, {"all": (0, n)}, (0, n), heads), name=name, batch=batch, out=out)
    ids, keep = batch
    with clear(), ll.zero_values(model(name), spans_in(draw, n, 2), (n, n + 3)):
        inside = forward(model(name), ids, keep)
    real = torch.ones_like(ids).bool() if keep is None else keep.bool()
    close(inside[real], forward(model(name), ids, keep)[real], 1e-5, "rows that are not there")


@case("document_mask")
def document_mask(draw: Draw) -> None:
    "Tokens of other documents are not seen; starts of odd kinds are refused"
    name, batch = draw(st.sampled_from([n for n in CHANGED if n not in zoo.ENCODERS])), _ids_and_padding(draw)
    right = st.lists(st.integers(1, 39), max_size=3, unique=True).map(lambda x: [0, *sorted(x)])
    starts = mostly(draw, right, st.sampled_from([[], [1], [0, 0], "0", [0, 2.5], None, [5, 0]]))

    def logits(of: Mapping[Any, int], module: Any, x: torch.Tensor, sinks: Any) -> tuple[torch.Tensor, Any]:
        at = _text_positions(batch[1], x.shape[-1])
        which = torch.bucketize(at, torch.tensor(starts), right=True)
        return x.masked_fill((which[:, None, :, None] != which[:, None, None]) & (at >= 0)[:, None, :, None], -torch.inf), sinks

    _changed(draw, lambda hf: ll.document_mask(hf, starts), name=name, batch=batch, logits=logits)


@case("silence_states", "state_decay", "state_window", weight=0.5)
def states_changed(draw: Draw) -> None:
    "A factor of 1 and a window as long as the text change nothing; silence does; afterwards all is as before"
    name = draw(st.sampled_from(["mamba", "jamba", "bamba", "qwen3_next", "falcon_h1"]))
    ids = torch.atleast_2d(ids_of(draw, zoo.VOCAB, 2, 40))
    n, before = ids.shape[1], forward(model(name), ids)
    factor = mostly(draw, st.floats(0.1, 8), st.sampled_from([0, -1.0, math.nan, "2", None]))
    window, block = mostly(draw, st.integers(1, 50), st.sampled_from([0, 2.5, "3"])), draw(st.integers(1, 20))
    layers = mostly(draw, st.none(), st.sampled_from([[], [99], "0", [0.5]]))
    with clear():
        with ll.state_decay(model(name), factor, layers): faster = forward(model(name), ids)
        with ll.state_window(model(name), window, block, layers): windowed = forward(model(name), ids)
        with ll.silence_states(model(name), layers): silent = forward(model(name), ids)
    close(faster[:, 0], before[:, 0], 1e-5, "the first token has nothing to forget")
    if window >= n:
        close(windowed, before, 1e-3, "a window as long as the text")
    assert (silent - before).abs().max() > 0 and torch.equal(forward(model(name), ids), before)


@case("sink_anatomy", "AnatomyReport", weight=0.3)
def anatomy(draw: Draw) -> None:
    "Weights against formed patterns; shares within their bounds"
    lm = some_model(draw)
    ids, at = ids_of(draw, min(400, lm.vocab_size), 4, 60), mostly(draw, st.integers(0, 6), st.integers(-2, 70))
    documents = draw(st.one_of(st.none(), st.just([ids_of(draw, 90, 4, 20) for _ in range(draw(st.integers(1, 3)))])))
    with clear():
        report = ll.sink_anatomy(lm, form_of_ids(draw, ids), documents=documents, position=at, swap=draw(st.integers(0, 9)),
                                 targets=draw(st.integers(1, 30)), recent=draw(st.integers(1, 50)),
                                 chunk=draw(st.one_of(st.none(), st.integers(1, 30))))
        _page(report)
    for layer, p in right_patterns(lm.hf, ids[None]).items():
        f = report.frames["heads"].filter(layer=layer).sort("head")
        close(f["attention"], p[0, :, at + 1:, at].mean(-1), 1e-4, f"attention of layer {layer}")
        assert f["cosine"].is_between(-1.001, 1.001).all() and (f["fetched"] >= 0).all()


@case("patch_heads", "PatchReport", weight=0.3)
def patching(draw: Draw) -> None:
    "All rows of all heads bring back everything from the first change on"
    lm = some_model(draw)
    ids = ids_of(draw, min(400, lm.vocab_size), 3, 40)
    other, n, at = ids.clone(), len(ids), draw(st.integers(0, len(ids) - 2))
    other[at] = (other[at] + draw(st.integers(0, 5))) % 300 + 3
    rows = mostly(draw, st.just((at + 1, n)), st.sampled_from([(0, 99), (3, 1), "a", None]))
    answers = mostly(draw, st.just((5, 9)), st.sampled_from([None, (5, 5), (5,), "ab"]))
    with clear():
        report = ll.patch_heads(lm, form_of_ids(draw, ids), form_of_ids(draw, other), answers, rows, heads=[(lm.attention_layers[0], 0)],
                                into=draw(st.sampled_from(["clean", "corrupt"])), chunk=draw(st.one_of(st.none(), st.integers(1, 20))))
        _page(report)
    if rows == (at + 1, n) and len(lm.attention_layers) == lm.n_layers and at < n - 1:
        assert abs(report.meta["all_heads"] - 1) < 1e-2 * max(1, 1 / abs(report.meta["goal"] - report.meta["base"])), report.meta


@case("fact_path", "PathReport", weight=0.3)
def paths(draw: Draw) -> None:
    "The ends of the scale are those of the model as it is, and with the fact cut off everywhere"
    lm = some_model(draw)
    ids = ids_of(draw, min(400, lm.vocab_size), 6, 40)
    fact = mostly(draw, st.just((0, draw(st.integers(1, 3)))), st.sampled_from([(0, 99), (4, 2), "zz", None]))
    stops = mostly(draw, st.none(), st.sampled_from([{"a": (4, 5)}, {"a": (0, 2)}, {}, "a"]))
    answer = mostly(draw, st.sampled_from([[5], [5, 9]]), st.sampled_from([None, [], [10**6]]))
    with clear():
        report = ll.fact_path(lm, form_of_ids(draw, ids), fact, answer, stops, paths=0,
                              chunk=draw(st.one_of(st.none(), st.integers(1, 20))))
        _page(report)
    close(report.meta["whole"], lm.score(ids, answer).total, 1e-3, "log-probability as it is")
    with ll.knock_out(lm, {"f": fact}): gone = lm.score(ids, answer).total
    close(report.meta["none"], gone, 2e-3, "log-probability with the fact cut off")


@case("state_lens", "StateReport", weight=0.3)
def state_lenses(draw: Draw) -> None:
    "Numbers of states that are those of the cache; settings of odd kinds are refused"
    lm = mostly(draw, st.sampled_from(["jamba", "mamba", "bamba"]).map(with_words), st.just("llama").map(with_words))
    ids = ids_of(draw, min(400, lm.vocab_size), 4, 60)
    trained = mostly(draw, st.integers(2, 50), st.sampled_from([0, 1, 2.5, "3"]))
    asked = mostly(draw, st.sampled_from([None, [(ids[:5], ids[:1])]]), st.just([]))
    with clear():
        report = ll.state_lens(lm, form_of_ids(draw, ids), trained=trained, questions=asked,
                               decays=mostly(draw, st.sampled_from([(), (2.0,)]), st.just((0,))),
                               factor=mostly(draw, st.sampled_from([2.0, 1.5]), st.just(1.0)))
        _page(report)
    f = report.frames["states"]
    assert (f["variance"] >= 0).all() and f["norm"].is_finite().all()
    close(f["norm"] ** 2, f["size"] * (f["variance"] + f["mean"] ** 2), 1e-3, "norms, and means with variances")


@case("write_scores", "full_attention_needs", weight=0.3)
def deeper(draw: Draw) -> None:
    "Shares outside of first and recent tokens against formed patterns; scores that are finite"
    lm = draw(st.sampled_from([needle_lm, lambda: with_words("llama"), lambda: with_words("gpt_oss")]))()
    ids, sink = ids_of(draw, min(400, lm.vocab_size), 8, 60), mostly(draw, st.integers(1, 4), st.sampled_from([0, 99, "4"]))
    recent = mostly(draw, st.integers(1, 4), st.sampled_from([0, 99, None]))
    with clear():
        found = ll.full_attention_needs(lm, form_of_ids(draw, ids), sink, recent, draw(st.one_of(st.none(), st.integers(1, 20))))
        context = ll.needle_context(lm, draw(st.integers(150, 250)), draw(st.integers(0, 100)), seed=draw(st.integers(0, 99)))
        scores = ll.write_scores(lm, [context])
    i = torch.arange(len(ids))
    outside = (i[None] >= sink) & (i[:, None] - i >= recent)
    for layer, p in right_patterns(lm.hf, ids[None]).items():
        want = (p[0] * outside).sum(-1)[:, sink + recent :].mean(-1)
        close(found.filter(layer=layer).sort("head")["outside"], want, 1e-4, f"outside of layer {layer}")
    assert scores.select(pl.col("on", "off", "write_score").is_finite().all()).row(0) == (True,) * 3


@case("token_gain", "TokenGainReport", weight=0.3)
def token_gains(draw: Draw) -> None:
    "Both predictions against whole passes"
    lm = some_model(draw)
    ids, short = ids_of(draw, min(400, lm.vocab_size), 3, 60), mostly(draw, st.integers(1, 20), st.sampled_from([0, 99, "4"]))
    block = mostly(draw, st.integers(1, 20), st.sampled_from([0, 2.5]))
    with clear():
        report = ll.token_gain(lm, form_of_ids(draw, ids), short, block=block, notable=draw(st.sampled_from([0, 0.1, -1.0])))
        _page(report)
    f = report.table
    logprobs = lm.logits(ids)[:-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    close(f["long"], logprobs[f["position"].to_numpy() - 1], 1e-3, "the long context")
    a = int(f["position"][0])
    read = ids[a - short : a]
    close(f["short"][0], lm.logits(read, [-1])[0].log_softmax(-1)[ids[a]], 1e-3, "the short context")


@case("rank_samples", "Sample", "SampleReport", weight=0.3)
def ranked_samples(draw: Draw) -> None:
    "Perplexities of whole passes"
    lm = ll.load()
    given = [(draw(sentence), draw(sentence), draw(sentence)) for _ in range(draw(st.integers(1, 3)))]
    with clear():
        samples = [ll.Sample(*x) for x in given]
        report = ll.rank_samples(lm, samples, short=draw(st.sampled_from([4, 8, 0])), segment=draw(st.sampled_from([3, 50])))
        _page(report)
    f = report.table.sort("sample")
    for x, ppl in zip(samples, f["ppl_long"], strict=True):
        score = lm.score(f"{x.context.rstrip()}\n{x.question.strip()}", " " + x.answer.strip())
        close(math.log(ppl), -score.mean, 1e-3, "the long context")


# ---- what has no case of its own

NO_CASE: dict[str, str] = {  # public name -> why
    "PolicyReport": "a report: as policy_lens",
    "PositionReport": "a report: as position_lens",
    "reading_curve": "made of evaluate_tasks: tests/test_task_data.py",
    "compare_reports": "not yet: tests/test_summary.py",
    "TimeBudget": "a clock: tests/test_budget.py",
    "measure_speed": "a clock: tests/test_budget.py",
    "cached_models": "reads a folder: tests/test_gguf.py",
    "clear_cache": "reads a folder: tests/test_gguf.py",
}


def public_names() -> list[str]:
    "The names of the stub"
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    return [a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names]


# ---- running


def share(total: int, names: Sequence[str]) -> dict[str, int]:
    "How many inputs of each case, in all `total` or a little more"
    whole = sum(WEIGHTS[n] for n in names)
    return {n: max(1, math.ceil(total * WEIGHTS[n] / whole)) for n in names}


@dataclass
class Outcome:
    "What became of the inputs of one case"

    name: str
    inputs: int = 0
    refused: int = 0
    messages: Counter[str] = field(default_factory=Counter)  # of refusals
    seconds: float = 0.0
    wrong: str = ""


def run_case(name: str, inputs: int, base: int = 0, found: Outcome | None = None, shrink: bool = True) -> Outcome:
    "So many inputs of a case; raises at the first that is wrong, made smaller if that is wanted"
    out = found or Outcome(name)

    @seed(base)
    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate] + [Phase.shrink] * shrink,
    )
    @given(data=st.data())
    def one(data: st.DataObject) -> None:
        out.inputs += 1
        with torch.no_grad() if name != "duo_gates" else torch.enable_grad():
            try:
                CASES[name](data.draw)
            except Refused as e:
                out.refused += 1
                out.messages[str(e.__cause__)[:90]] += 1

    start = time.perf_counter()
    try:
        one()
    finally:
        out.seconds = time.perf_counter() - start
    return out


def _told(e: BaseException) -> str:
    "What was wrong, where, and with which input"
    notes = "\n".join(getattr(e, "__notes__", []))
    cause = e.__cause__ or e
    places = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(cause.__traceback__)][-6:]
    return f"  {type(e).__name__}: {e}\n  {' > '.join(places)}\n  {notes[:1500]}"


def functions() -> list[str]:
    "One name for each case"
    return list({f: name for name, f in reversed(CASES.items())}.values())[::-1]


def page(results: Sequence[Mapping[str, Any]]) -> str:
    "What was run, as a page"
    names = {f: [n for n, g in CASES.items() if g is f] for f in CASES.values()}
    rows = [
        "| {} | {:,} | {:,} | {:.0f} | {} |".format(
            ", ".join(names[CASES[r["name"]]]), r["inputs"], r["refused"], r["seconds"], "WRONG" if r["wrong"] else "right"
        )
        for r in results
    ]
    inputs, seconds = (sum(r[k] for r in results) for k in ("inputs", "seconds"))
    return "\n".join(
        [
            "# Fuzz",
            "",
            "Random but valid inputs, and some that are nearly right, for every public function (`make fuzz`; what "
            "a case draws and compares is in tests/fuzz.py). A number that is not that of the formed pattern, or an error that "
            "longlens did not raise on purpose and in words, would be WRONG.",
            "",
            f"Run on {datetime.date.today()} with Python {platform.python_version()}, transformers {transformers.__version__} and torch "
            f"{torch.__version__.split('+')[0]}, on CPUs: {inputs:,} inputs in {len(rows)} cases in {seconds / 60:.0f} minutes "
            f"(other work ran too); {sum(bool(r['wrong']) for r in results)} cases wrong.",
            "",
            "| public names | inputs | refused in words | seconds | |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> int:
    "Run the cases, and write what came out"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases (default: all)")
    parser.add_argument("--inputs", type=int, default=int(os.environ.get("LONGLENS_FUZZ", "10000")), help="of all cases (LONGLENS_FUZZ)")
    parser.add_argument("--shrink", action="store_true", help="make an input that is wrong smaller (slow)")
    parser.add_argument("--verbose", action="store_true", help="show what was refused")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--results", type=Path, default=ROOT / "out/fuzz.jsonl", help="a line for each case: the page is made of it"
    )
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    asked.results.parent.mkdir(parents=True, exist_ok=True)
    if not asked.names:
        asked.results.unlink(missing_ok=True)
    wrong = 0
    for name, n in share(asked.inputs, functions()).items():
        if not asked.names or name in asked.names:
            wrong += _record(name, n, asked)
    lines = {r["name"]: r for r in map(json.loads, asked.results.read_text().splitlines())}
    if lines.keys() >= {*functions()}:
        (ROOT / "benchmarks/FUZZ.md").write_text(page([lines[n] for n in functions()]), encoding="utf-8")
    return int(wrong > 0)


def _record(name: str, inputs: int, asked: argparse.Namespace) -> bool:
    "Run a case, show and keep what came out; was it wrong?"
    out = Outcome(name)
    try:
        run_case(name, inputs, asked.seed, out, shrink=asked.shrink)
    except Exception as e:
        out.wrong = _told(e)
    print(f"{name:22} {out.inputs:6} inputs, {out.refused:5} refused, {out.seconds:6.1f} s {'WRONG' if out.wrong else ''}", flush=True)
    if asked.verbose:
        print(*(f"    {n:4} {m}" for m, n in out.messages.most_common(8)), sep="\n", flush=True)
    if out.wrong:
        print(out.wrong, flush=True)
    with asked.results.open("a") as file:
        file.write(json.dumps(vars(out)) + "\n")
    return bool(out.wrong)


if __name__ == "__main__":
    sys.exit(main())
