"""The keys that policies keep, beside those that their authors' code keeps, on the same queries, keys and values of SmolLM2.

python benchmarks/agreement/policies.py --repos FOLDER

FOLDER has checkouts of the repositories in `SOURCES`, each under the name of the repository; none of them is imported, single functions and
classes are run on a CPU. kvpress is compared by `kvpress.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import Comparison, apart, commit_of, functions, smollm2, text_ids

N, BUDGET, LAYERS = 512, 128, (0, 9, 18, 27)
SOURCES = (
    "H2O SnapKV KVCache-Factory Quest TOVA streaming-llm LOOK-M LaCache SirLLM hyper-attn MInference x-attention draft-based-approx-llm "
    "ShadowKV hip-attention MoBA TokenSelect SqueezedAttention"
).split()
ON = f"{N} tokens of English, layers {', '.join(map(str, LAYERS))}"


@dataclass
class Read:
    "A layer's attention of the text: the prompt, and what follows it"

    prompt: Any  # Prompt of the first N tokens
    each: Any  # the same, with a KV head for every query head, as authors have it who repeat keys first
    q: torch.Tensor  # of all tokens, (1, heads, n, d)
    k: torch.Tensor  # (1, kv_heads, n, d)
    v: torch.Tensor

    @property
    def mha(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        "Queries, keys and values of the prompt, keys repeated"
        g = self.q.shape[1] // self.k.shape[1]
        return self.q[:, :, :N], *(x[:, :, :N].repeat_interleave(g, 1) for x in (self.k, self.v))


def read_layers(lm: Any, more: int = 64) -> dict[int, Read]:
    "Queries, keys and values of some layers"
    from longlens.attention.operator import AttentionOperator
    from longlens.policies.base import Prompt
    from longlens.probes.policies.inputs import PolicyCase
    from longlens.probes.policies.measures import read_prompts

    ids, out = text_ids(lm, N + more), {}
    _, prompts = read_prompts(lm, PolicyCase(ids, len(ids), 0), [])
    for layer in LAYERS:
        p = prompts[layer]
        q, k, v = (x.detach() for x in (p.op.call.q, p.op.call.k, p.op.call.values))
        g = q.shape[1] // k.shape[1]
        cut = [x[:, :, :N] for x in (q, k, v)]
        wide = [cut[0], *(x.repeat_interleave(g, 1) for x in cut[1:])]
        out[layer] = Read(Prompt(AttentionOperator(*cut), layer, p.layers), Prompt(AttentionOperator(*wide), layer, p.layers), q, k, v)
    return out


def places(like: torch.Tensor) -> torch.Tensor:
    "Values that say where they stand, in the shape of keys"
    return torch.arange(like.shape[2], dtype=like.dtype)[:, None].expand_as(like).contiguous()


def marked(at: torch.Tensor) -> torch.Tensor:  # bool, (heads, N)
    "Kept keys, of positions (heads, many)"
    return torch.zeros(len(at), N, dtype=torch.bool).scatter_(1, at.long(), True)


def silently(make: Callable[[], Any]) -> Any:
    "Without what the authors print"
    with contextlib.redirect_stdout(io.StringIO()):
        return make()


def row(c: Comparison, what: str, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], note: str = "", on: str = ON) -> None:
    "A row: how many keys each keeps, and how many of theirs ours lacks"
    theirs, ours, both = 0, 0, 0
    for a, b in pairs:
        b = b.expand_as(a)
        theirs, ours, both = theirs + int(a.sum()), ours + int(b.sum()), both + int((a & b).sum())
    c.add(what, on, f"{theirs:,} keys", f"{ours:,} keys", f"{theirs - both:,} of theirs are not kept", note)


def h2o(c: Comparison, repos: Path, reads: dict[int, Read]) -> None:
    "The simulation of `utils_lm_eval`, of heavy hitters alone; one more row asks what is left after the last token"
    from longlens.policies.attention import H2O

    f = functions(repos / "H2O/h2o_hf/utils_lm_eval/modify_llama.py", "local_heavy_hitter_mask", torch=torch, nn=torch.nn)
    pairs = []
    for r in reads.values():
        q, k, _ = r.mha
        x = (q @ k.mT * r.prompt.op.call.scale).masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)
        x = torch.nn.functional.pad(torch.nn.functional.pad(x, (0, 1), value=-torch.inf), (0, 0, 0, 1))
        pairs.append((f.local_heavy_hitter_mask(x, BUDGET + 1)[0, :, -1, :N], H2O(recent=0).keep(r.each, BUDGET)))
    row(
        c, "H2O: heavy hitters of a text that streams by", pairs, "half of the budget is for recent keys in the policy's default; here none"
    )


def snapkv(c: Comparison, repos: Path, reads: dict[int, Read]) -> None:
    from longlens.policies.attention import SnapKV

    for pooling in ("avg", "max"):
        for name, path in (("SnapKV", "SnapKV/snapkv/monkeypatch/snapkv_utils.py"), ("SnapKV in KVCache-Factory", FACTORY)):
            names = ["SnapKVCluster", *GROUPED * (path == FACTORY)]
            f = functions(repos / path, *names, torch=torch, nn=torch.nn, F=torch.nn.functional, math=math, _KVCACHE_FACTORY_DEBUG=False)
            pairs = []
            for r in reads.values():
                alone = path != FACTORY  # heads by themselves there; the KV heads of a model here
                q, k, _ = r.mha if alone else (x[:, :, :N] for x in (r.q, r.k, r.v))
                theirs = f.SnapKVCluster(32, BUDGET, 5, f"{pooling}pool")
                _, at = silently(lambda t=theirs, q=q, k=k: t.update_kv(k, q, places(k), None, 1))
                ours = SnapKV(32, 5, pooling).keep(r.each if alone else r.prompt, BUDGET)
                pairs.append((marked(at[0, :, :, 0]), ours))
            note = "max pooling makes neighbours equal, and either may stay" * (pooling == "max")
            if note and not alone:
                note += "; after the mean over the query heads of a KV head there, before it here"
            row(c, f"{name}, {pooling} pooling", pairs, note)


FACTORY = "KVCache-Factory/pyramidkv/pyramidkv_utils.py"
GROUPED = ["repeat_kv", "_gqa_groups", "_reduce_group_scores", "_grouped_window_attn_cache", "_select_topk_kv", "merge_kv", "_debug_print"]


def pyramid(c: Comparison, repos: Path, reads: dict[int, Read]) -> None:
    from longlens.policies.budgets import PyramidKV

    f = functions(
        repos / FACTORY,
        "PyramidKVCluster",
        *GROUPED,
        torch=torch,
        nn=torch.nn,
        F=torch.nn.functional,
        math=math,
        _KVCACHE_FACTORY_DEBUG=False,
    )
    pairs = []
    for layer, r in reads.items():
        theirs = f.PyramidKVCluster(len(r.prompt.layers), 8, BUDGET, 5, "avgpool", 20, layer_idx=layer)
        k = r.k[:, :, :N]
        _, at = silently(lambda t=theirs, k=k, r=r: t.update_kv(k, r.q[:, :, :N], places(k), None, 1))
        pairs.append((marked(at[0, :, :, 0]), PyramidKV(8, 5, beta=20).keep(r.prompt, BUDGET)))
    row(
        c,
        "PyramidKV in KVCache-Factory",
        pairs,
        "it shares out what lies before the window, in whole steps; here, as in kvpress, the whole budget is shared out",
    )


def quest(c: Comparison, repos: Path, reads: dict[int, Read]) -> None:
    "The attention layer's own forward, with a query after the prompt, on projections and rotations that do nothing"
    from longlens.policies.selection import Quest

    f = functions(
        repos / "Quest/evaluation/quest_attention.py",
        "local_heavy_hitter_mask",
        "forward",
        torch=torch,
        nn=torch.nn,
        math=math,
        DynamicCache=type("DynamicCache", (), {}),
        apply_rotary_pos_emb=lambda q, k, *a: (q, k),
        repeat_kv=lambda x, n: x,
    )
    pairs = []
    for r in reads.values():
        q, (_, k, v) = r.q[:, :, N : N + 1], r.mha
        heads, d = q.shape[1], q.shape[-1]
        last = dict(num_heads=heads, num_key_value_heads=heads, num_key_value_groups=1, head_dim=d, hidden_size=heads * d)
        own = SimpleNamespace(
            layer_id=9,
            chunk_size=16,
            token_budget=BUDGET,
            rotary_emb=lambda *a: (None, None),
            o_proj=lambda x: x,
            q_proj=lambda h, q=q: q.transpose(1, 2),
            k_proj=lambda h, k=k: k[:, :, -1:].transpose(1, 2),
            v_proj=lambda h, v=v: v[:, :, -1:].transpose(1, 2),
            **last,
        )
        past = k[:, :, :-1], v[:, :, :-1]
        weights = f.forward(own, torch.zeros(1, 1, heads * d), None, torch.tensor([[N]]), past, True)[1]
        p, policy = r.prompt, Quest()
        pairs.append((weights[0, :, 0] > 0, policy.select(p, policy.index(p, BUDGET), q[0], BUDGET)[:, 0]))
    row(c, "Quest: pages for the next query", pairs, "keys whose weight is 0 in float32 cannot be told from hidden ones there")


def caches(c: Comparison, repos: Path, reads: dict[int, Read], lm: Any) -> None:
    "TOVA, StreamingLLM, SirLLM and LaCache: classes that cut a cache"
    from longlens.policies.attention import TOVA
    from longlens.policies.budgets import LaCache
    from longlens.policies.controls import StreamingKeys
    from longlens.policies.keys import SirLLM
    from longlens.policies.use import surprisals

    f = functions(
        repos / "TOVA/src/tova_cache.py", "TOVACache", torch=torch, DynamicCache=type("DynamicCache", (), {"__init__": lambda s: None})
    )
    pairs = []
    for r in reads.values():
        cache = f.TOVACache(BUDGET)
        cache.key_cache, cache.value_cache = [r.k[:, :, :N]], [places(r.k[:, :, :N])]
        cache.reduce(0, r.each.op.rows(range(N - 1, N)))
        pairs.append((marked(cache.value_cache[0][0, :, :, 0]), TOVA().keep(r.prompt, BUDGET)))
    row(c, "TOVA", pairs)

    one = next(iter(reads.values()))
    stacks = [(places(r.k[:, :, :N]), places(r.k[:, :, :N])) for r in reads.values()]
    f = functions(
        repos / "streaming-llm/streaming_llm/kv_cache.py",
        "slice1d",
        "slice2d",
        "slice3d",
        "DIM_TO_SLICE",
        "StartRecentKVCache",
        torch=torch,
    )
    left = silently(lambda: f.StartRecentKVCache(4, BUDGET - 4))(stacks)
    row(c, "StreamingLLM", [(marked(x[0][0, :, :, 0]), StreamingKeys().keep(one.prompt, BUDGET)) for x in left])

    f = functions(repos / "SirLLM/sir_llm/kv_cache.py", "slice1d", "slice2d", "slice3d", "DIM_TO_SLICE", "StartRecentKVCache", torch=torch)
    said = surprisals(lm, text_ids(lm, N)).tolist()
    kept = [max(said), *said[1:]]  # the first token counts as the most surprising one there
    theirs = silently(lambda: f.StartRecentKVCache(4, BUDGET // 4, BUDGET - 4 - BUDGET // 4)).evict_for_space_token_entropy(
        stacks, kept, 0
    )[0]
    from dataclasses import replace

    ours = SirLLM().keep(replace(one.prompt, surprisal=torch.tensor(kept)), BUDGET)
    row(
        c,
        "SirLLM",
        [(marked(x[0][0, :, :, 0]), ours) for x in theirs],
        "surprisal by longlens in both; the first token has the largest there, and has it here for this row",
    )

    f = functions(repos / "LaCache/LongBench/lacache/kv_cache.py", "LaCache", torch=torch, math=math)
    for span, overlap, size in ((15, 0, 300), (10, 4, 400)):
        layers = one.prompt.layers
        k = places(one.k[:, :, :N])
        left = f.LaCache(size, 4, span, overlap)([(k, k)] * len(layers))
        pairs = []
        for i, (x, _) in enumerate(left):
            theirs = marked(x[0, :, :, 0])
            ours = LaCache(4, span, overlap).keep(replace(one.prompt, layer=layers[i]), int(theirs[0].sum()))
            pairs.append((theirs, ours))
        row(
            c,
            f"LaCache, span {span}, overlap {overlap}, {size} of {N} keys",
            pairs,
            "as many keys as theirs keeps in the layer",
            f"{N} keys, 30 layers",
        )


def lookm(c: Comparison, repos: Path, reads: dict[int, Read]) -> None:
    "Their pivot merge, into the keys that it keeps"
    from longlens.policies.merging import _merged

    path = repos / "LOOK-M/LLaVA-mix_merge_v1/llava/model/kv_token_merge/modify_llama.py"
    f = functions(path, "PivotKVCache_LayerWise", torch=torch, nn=torch.nn, change=[("repeat(1, 1, 1, 128)", "repeat(1, 1, 1, 64)")])
    off, moved = [], []
    for r in reads.values():
        _, k, v = r.mha
        rows = r.each.op.rows(range(N))
        scores = rows[0].sum(1)[:, : N - BUDGET // 2].clone()
        scores[:, :4] = torch.inf
        kept = torch.zeros(k.shape[1], N, dtype=torch.bool).scatter_(1, scores.argsort(-1, descending=True)[:, : BUDGET // 2], True)
        kept[:, N - BUDGET // 2 :] = True
        cache = silently(lambda: f.PivotKVCache_LayerWise(BUDGET // 2, BUDGET // 2))
        theirs = cache((k.clone(), v.clone()), rows.clone())
        for h in range(k.shape[1]):
            ours = _merged(kept[h], k[0, h], v[0, h], "pivotal")
            off.append(torch.stack([(a[0, h] - b[kept[h]]).abs().max() for a, b in zip(theirs, ours, strict=True)]))
            moved.append((theirs[0][0, h] - k[0, h][kept[h]]).abs().amax(-1) > 0)
    worst = float(torch.stack(off).max())
    c.add(
        "LOOK-M: keys and values after the pivot merge",
        ON,
        f"{int(torch.cat(moved).sum()):,} of {torch.cat(moved).numel():,} keys are merged into",
        "the same keys kept",
        f"{worst:.1e} at most",
        "its average and weighted merges pair filtered indices with unfiltered keys, so that other keys are merged: not compared",
    )


def hyper(c: Comparison, repos: Path, reads: dict[int, Read]) -> None:
    from longlens.policies.search import gray_numbers

    f = functions(repos / "hyper-attn/models/attention/angular_lsh.py", "AngularLSH", torch=torch)
    r = next(iter(reads.values()))
    lsh = f.AngularLSH(7, (1, 1, r.k.shape[-1]), torch.Generator().manual_seed(0))
    ours = gray_numbers(r.k[0, :, :N], lsh.proj_dir[0, 0].flip(-1))  # its first plane is the lowest bit
    theirs = lsh.hash(r.k[:, :, :N])[0]
    same = [x[:, :, None] == x[:, None] for x in (theirs, ours)]
    c.add(
        "HyperAttention: which keys fall into one bucket",
        ON,
        f"{len(theirs.unique())} buckets",
        f"{len(ours.unique())} buckets",
        f"{int((same[0] != same[1]).sum())} of {same[0].numel():,} pairs",
        "buckets are numbered otherwise: here neighbours differ in the side of one plane, "
        "as the paper asks; its code takes the Gray code of a number where the inverse is meant, which is the same for two planes only",
    )


def minference(c: Comparison, repos: Path, reads: dict[int, Read]) -> None:
    from longlens.policies.patterns import MInference

    f = functions(repos / "MInference/minference/modules/minference_forward.py", "sum_all_diagonal_matrix", torch=torch)
    theirs, ours = [], []
    for r in reads.values():
        rows = r.prompt.op.rows(range(N - 64, N))
        theirs.append(torch.cat([f.sum_all_diagonal_matrix(rows[:, h : h + 1])[..., :-63].flip(-1)[0] for h in range(rows.shape[1])]))
        ours.append(MInference().index(r.prompt, BUDGET)[1])
    a, b = torch.stack(theirs), torch.stack(ours)
    near = min(100, BUDGET // 8)  # which are infinite in both: always taken
    c.add(
        "MInference: attention by distance",
        ON,
        f"mean {float(a[..., near:].mean()):.6f}",
        f"mean {float(b[..., near:].mean()):.6f}",
        apart(a[..., near:], b[..., near:]),
        "the diagonals of the last 64 queries; the lines that make a mask of them are nested in a method: read, not run",
    )


def xattention(c: Comparison, repos: Path, reads: dict[int, Read]) -> None:
    from longlens.policies.patterns import _antidiagonals

    f = functions(
        repos / "x-attention/xattn/src/Xattention.py",
        "xattn_estimate",
        torch=torch,
        math=math,
        F=torch.nn.functional,
        find_blocks_chunked=lambda x, *a, **k: x > 0,
        change=[('.to("cuda")', ""), ('\n            "cuda"\n        )', ")")],
    )
    theirs, ours = [], []
    for r in reads.values():
        q, (_, k, _) = r.q[:, :, N : N + 64], r.mha
        sums, _ = f.xattn_estimate(q, k, 64, 8, chunk_size=64, use_triton=False, causal=False)
        at = torch.arange(64)
        x = _antidiagonals(r.prompt, q[0], at % 8, at // 8, 8, 8).softmax(-1)
        theirs.append(sums[0, :, 0])
        ours.append(x.unflatten(-1, (-1, 8)).sum(-1).sum(1))
    c.add(
        "XAttention: what a block of 64 queries gives each block of 64 keys",
        ON,
        f"mean {float(torch.stack(theirs).mean()):.6f}",
        f"mean {float(torch.stack(ours).mean()):.6f}",
        apart(torch.stack(theirs), torch.stack(ours)),
        "the queries after the prompt; without Triton",
    )


def speckv(c: Comparison, repos: Path, reads: dict[int, Read]) -> None:
    from longlens.policies.drafts import SpecKV

    f = functions(
        repos / "draft-based-approx-llm/draft_approx_llm/speckv/util.py",
        "compress_kv",
        torch=torch,
        math=math,
        F=torch.nn.functional,
        Tensor=torch.Tensor,
        repeat_kv=lambda x, n: x.repeat_interleave(n, 1),
    )
    pairs = []
    for layer, r in reads.items():
        k = r.k[:, :, :N]
        _, at, _ = f.compress_kv(k, r.q[:, :, :N], places(k), 32, BUDGET, BUDGET, "max", "max", 7)
        looks = {layer: r.prompt.op.rows(range(N - 32, N))[0]}
        pairs.append((marked(at[0, :, :, 0]), SpecKV(looks=looks).keep(r.prompt, BUDGET)))
    row(
        c,
        "SpecKV: keys by the last 32 queries",
        pairs,
        "max pooling makes neighbours equal, and either may stay; the draft is left out: its queries are more rows of the same sum",
    )


def shadow(c: Comparison, repos: Path, reads: dict[int, Read]) -> None:
    from longlens.policies.selection import ShadowKV

    change = [("torch.cuda.Stream()", "None"), ("math.sqrt(128)", "math.sqrt(64)")]
    f = functions(repos / "ShadowKV/models/kv_cache.py", "ShadowKVCache", torch=torch, nn=torch.nn, math=math, change=change)
    pairs = []
    for r in reads.values():
        q, k, v = r.q[:, :, N : N + 1], r.k[:, :, :N], r.v[:, :, :N]
        config = SimpleNamespace(
            num_attention_heads=q.shape[1], num_key_value_heads=k.shape[1], hidden_size=q.shape[1] * 64, num_hidden_layers=1
        )
        cache = f.ShadowKVCache(config, 1, N, "cpu", torch.float32, 128, 8)
        cache.outlier_chunk = 6
        cache.prefill_kv_cache(v, 0, k)
        kept = marked(cache.get_retrieval_position_ids(0, q)[0])
        chunk = torch.ones(k.shape[1], N // 8, dtype=torch.bool).scatter_(
            1, cache.k_landmark_idx[0, 0], False
        )  # outliers and the last four
        kept |= chunk.repeat_interleave(8, 1)
        policy = ShadowKV(outliers=6)
        ours = policy.select(r.prompt, policy.index(r.prompt, 208), q[0], 208)[:: q.shape[1] // k.shape[1], 0]
        pairs.append((kept, ours))
    row(c, "ShadowKV: outliers, the last chunks, and those chosen for the next query", pairs, "128 in sqrt(128) is its head size: 64 here")


def hip(c: Comparison, repos: Path, reads: dict[int, Read]) -> None:
    "The search of version 1.1, whose numba kernel runs as plain Python"
    from longlens.policies.search import HiP

    f = functions(
        repos / "hip-attention/src/hip_attn/v1_1/attention2_draft.py",
        "cdiv",
        "masking_iteration_draft_numba_kernel",
        np=np,
        math=math,
        NdArray=np.ndarray,
        Tensor=torch.Tensor,
        numba=SimpleNamespace(njit=lambda g: g),
    )
    pairs = []
    for r in reads.values():
        q, (_, k, _) = r.q[0, :, N], r.mha
        kept = torch.zeros(len(q), N, dtype=torch.bool)
        for h in range(len(q)):
            found = np.zeros(BUDGET // 2, dtype=np.int32)
            two = q[h].expand(2, -1).numpy()  # it looks at every second query of a block
            f.masking_iteration_draft_numba_kernel(
                two, k[0, h].numpy(), found, BUDGET, 0, 2, 2, 1, False, 0, False, False, None, 0, False, None, None, 0, 1, 0, 1, 1
            )
            kept[h, torch.from_numpy(found).long()] = kept[h, torch.from_numpy(found).long() + 1] = True
        pairs.append((kept, HiP(judge="first").select(r.prompt, None, q[:, None], BUDGET)[:, 0]))
    row(c, "HiP: the tree search for the next query", pairs, '`judge="first"`; the paper\'s middle key is the default here')


def moba(c: Comparison, repos: Path, reads: dict[int, Read]) -> None:
    from longlens.policies.selection import MoBA

    f = functions(repos / "MoBA/moba/moba_naive.py", "moba_attn_varlen_naive", torch=torch, math=math)
    theirs, ours = [], []
    for r in reads.values():
        g = r.q.shape[1] // r.k.shape[1]
        q, k, v = r.q[0], r.k[0].repeat_interleave(g, 0), r.v[0].repeat_interleave(g, 0)
        a = f.moba_attn_varlen_naive(*(x.transpose(0, 1) for x in (q, k, v)), torch.tensor([0, N + 64]), N + 64, 64, 3)
        theirs.append(a[N:].transpose(0, 1))
        policy = MoBA(block=64, least=1)
        seen = policy.select(r.prompt, policy.index(r.prompt, 128), q[:, N:], 128)
        seen = torch.cat([seen, torch.ones(64, 64).tril().bool().expand(len(q), -1, -1)], -1)
        x = (q[:, N:] @ k.mT * r.prompt.op.call.scale).masked_fill(~seen, -torch.inf)
        ours.append(x.softmax(-1) @ v)
    c.add(
        "MoBA: outputs of the 64 queries after the prompt",
        ON,
        f"norm {float(torch.stack(theirs).norm()):.4f}",
        f"norm {float(torch.stack(ours).norm()):.4f}",
        apart(torch.stack(theirs), torch.stack(ours)),
        "two blocks of 64 beside the queries' own",
    )


def tokenselect(c: Comparison, repos: Path, reads: dict[int, Read]) -> None:
    from longlens.policies.selection import TokenSelect

    def product(q: Any, k: Any, at: Any, out: torch.Tensor, *sizes: int) -> None:
        out.copy_(torch.einsum("hd,nhd->hn", q, k.view(len(k), sizes[2], -1).repeat_interleave(sizes[1] // sizes[2], 1)))

    f = functions(
        repos / "TokenSelect/patcher/token_retrieval.py",
        "TokenRetriever",
        torch=torch,
        paged_matmul=product,
        KERNEL_SIZE=0,
        dist=SimpleNamespace(is_initialized=lambda: False),
        change=[("dtype=torch.bfloat16\n        )\n\n        # Launch", "dtype=torch.float32\n        )\n\n        # Launch")],
    )
    pairs = []
    for r in reads.values():
        q, k, p = r.q[0, :, N], r.k[0, :, :N], r.prompt
        own = SimpleNamespace(head_dim=64, num_kv_heads=len(k), device="cpu")
        first, last = BUDGET // 8, BUDGET // 4
        inner = k[:, first : N - last].transpose(0, 1).flatten(1)
        at = f.TokenRetriever.get_topk_tokens(own, (q * p.op.call.scale).flatten(), inner, BUDGET - first - last, torch.arange(len(inner)))
        kept = torch.zeros(1, N, dtype=torch.bool)
        kept[:, :first], kept[:, N - last :], kept[:, at + first] = True, True, True
        policy = TokenSelect()
        pairs.append((kept, policy.select_at(p, policy.index(p, BUDGET), q[:, None], torch.tensor([0]), BUDGET)[:, 0]))
    row(
        c,
        "TokenSelect: the vote for the next query",
        pairs,
        "its Triton product as one of torch, in float32; first and last tokens as the policy sets them",
    )


def squeezed(c: Comparison, repos: Path, reads: dict[int, Read]) -> None:
    "What each key's cluster is worth to the next 64 queries: the quantiles that its thresholds are made of; clusters by longlens in both"
    from longlens.policies.clusters import SqueezedAttention, _cluster_shares

    f = functions(repos / "SqueezedAttention/squeezedattention/clustering.py", "run_global_threshold", torch=torch, np=np, math=math)
    keys, queries, centres, labels, ours = {}, {}, {}, {}, []
    for i, r in enumerate(reads.values()):
        g = r.q.shape[1] // r.k.shape[1]
        label, centre = SqueezedAttention().index(r.prompt, BUDGET)[0]
        keys[i], queries[i] = r.k.repeat_interleave(g, 1), r.q
        labels[i], centres[i] = (x.repeat_interleave(g, 0)[None] for x in (label, centre))
        ours.append(_cluster_shares(r.prompt, r.q[0, :, N:], label, centre).mean(1))
    theirs = f.run_global_threshold(keys, queries, centres, labels, centres[0].shape[2], 64, device="cpu")
    at = (0.5, 0.7, 0.8, 0.9)
    a, b = [theirs[x] for x in at], np.quantile(torch.stack(ours).numpy(), at)
    c.add(
        "Squeezed Attention: median and higher quantiles of what clusters are worth",
        ON,
        ", ".join(f"{x:.2e}" for x in a),
        ", ".join(f"{x:.2e}" for x in b),
        apart(a, b),
        "mean over 64 queries; here the best are taken, there those above such a threshold",
    )


NOT_RUN = (
    "LongHeads, A2ATS, NSA (fla-org and lucidrains), DSA's indexer, LongLoRA's shift: their rules are inside layers "
    "that want flash-attn, Triton, TileLang or trained weights; read, and written again.",
    "LoCoCo: its convolution is learned; what is fitted here is told on its page.",
    "KVMerger, LongGen: no code of the authors was found. Recycled Attention: its repository could not be had; by its paper.",
    "Longformer, BigBird, HyperAttention's and Landmark's attention itself: patterns and kernels for models trained with them.",
)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--repos", type=Path, required=True, help="a folder of checkouts")
    p.add_argument("--model", default="smollm2", help="what longlens loads")
    a = p.parse_args()
    lm = smollm2(a)
    c = Comparison(
        "policies",
        "Policies for key-value caches",
        "; ".join(f"{n} at {commit_of(a.repos / n)}" for n in SOURCES),
        f"Single functions and classes, on queries, keys and values of SmolLM2 after rotation. "
        f"{BUDGET} keys of {N}, unless said otherwise; "
        "where two scores are equal to the last digits, either key may stay.",
    )
    with torch.no_grad():
        reads = read_layers(lm)
        for part in (h2o, snapkv, pyramid, quest, lookm, hyper, minference, xattention, speckv, shadow, hip, moba, tokenselect, squeezed):
            try:
                part(c, a.repos, reads)
            except Exception as e:  # what a checkout lacks is told in the table
                c.not_run.append(f"{part.__name__}: {type(e).__name__}: {e}.")
        caches(c, a.repos, reads, lm)
    c.not_run += NOT_RUN
    c.write()


if __name__ == "__main__":
    main()
