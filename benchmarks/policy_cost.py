"""What it costs to run a model under a policy: the plain forward, an eviction, selections, side by side in one process.

The same random-weight Llama of SmolLM2-135M's shape, the same tokens; times are interleaved (plain, eviction, ...), and the fastest of
each counts. Every query from the first token on is selected for, which is more than a policy does in use (the context is read
plainly). Results go to benchmarks/RESULTS.md.

    OMP_NUM_THREADS=1 python benchmarks/policy_cost.py                  # 4,096 tokens, 6 layers, about five minutes
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from results import write_section

from longlens import keep_keys
from longlens.attention.hf_interface import LayerCall, attach
from longlens.policies.base import top_keys

SHAPE = dict(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536, vocab_size=4096)


def load_model(layers: int) -> Any:
    "A Llama with random weights"
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers, max_position_embeddings=2**17)).eval()


def block_means(share: float, size: int = 64) -> Callable[[LayerCall, int], Any]:
    "Of blocks of keys those with the highest product of query and mean key, by query"
    def choose(call: LayerCall, layer: int) -> Any:
        n = call.k.shape[2]
        means = call.k[0].unflatten(1, (n // size, size)).mean(2).repeat_interleave(call.group, 0)  # (heads, blocks, d)
        most = int(share * n // size)

        def pick(b: int, queries: torch.Tensor) -> torch.Tensor:
            scores = torch.bmm(call.q[b][:, queries], means.mT)
            scores = scores.masked_fill(torch.arange(n // size) > queries[:, None] // size, -torch.inf)
            kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(most, -1).indices, True)
            return kept.repeat_interleave(size, -1)
        return pick
    return choose


def scattered(share: float) -> Callable[[LayerCall, int], Any]:
    "Single keys with the highest product, by query and head: the oracle"
    def choose(call: LayerCall, layer: int) -> Any:
        n, k = call.k.shape[2], call.k[0]

        def pick(b: int, queries: torch.Tensor) -> torch.Tensor:
            end = int(queries[-1]) + 1  # what lies ahead of all of these queries need not be looked at
            q = call.q[b][:, int(queries[0]):end].reshape(len(k), -1, k.shape[-1])  # the query heads of a KV head, one after another
            scores = torch.bmm(q, k[:, :end].mT).view(call.q.shape[1], len(queries), end)
            return top_keys(scores.masked_fill_(torch.arange(end) > queries[:, None], -torch.inf), int(share * n))
        return pick
    return choose


def ways(hf: Any, n: int, layers: int) -> dict[str, Callable[[], AbstractContextManager]]:
    "What is compared"
    half = {i: torch.rand(3, n // 2, generator=torch.Generator().manual_seed(i)).argsort(-1) < n // 8 for i in range(layers)}
    stream = {i: torch.arange(n)[None] + 512 for i in range(layers)}
    return {
        "plain forward, longlens": lambda: attach(hf),
        "eviction, once: 25 % of the first half, by KV head": lambda: keep_keys(hf, half, since=n // 2),
        "eviction, as it streams: 512 keys": lambda: keep_keys(hf, stream),
        "selection: 25 % of the blocks of 64 keys, by query": lambda: keep_keys(hf, choose=block_means(.25)),
        "selection: 25 % of the single keys, by query (oracle)": lambda: keep_keys(hf, choose=scattered(.25)),
    }


def measure(hf: Any, n: int, layers: int, repeats: int) -> dict[str, float]:
    "The shortest processor time of each way"
    ids = torch.randint(0, 4096, (1, n), generator=torch.Generator().manual_seed(0))
    best: dict[str, float] = {}
    all_ways: dict[str, Callable[[], AbstractContextManager]] = {"plain forward, transformers (sdpa)": nullcontext, **ways(hf, n, layers)}
    with torch.no_grad():
        hf(ids[:, :256])
        for _ in range(repeats):
            for name, around in all_ways.items():
                with around():
                    start = time.process_time()
                    hf(ids, logits_to_keep=1)
                    best[name] = min(best.get(name, 1e9), time.process_time() - start)
    return best


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=4096)
    p.add_argument("--layers", type=int, default=6)
    p.add_argument("--repeats", type=int, default=3)
    a = p.parse_args()
    best = measure(load_model(a.layers), a.tokens, a.layers, a.repeats)
    plain = best["plain forward, longlens"]
    rows = "\n".join(f"| {name} | {t:.2f} s | {t / plain:.2f} |" for name, t in best.items())
    threads = os.environ.get("OMP_NUM_THREADS", "?")
    command = f"OMP_NUM_THREADS=1 python benchmarks/policy_cost.py --tokens {a.tokens} --layers {a.layers} --repeats {a.repeats}"
    write_section("Policies: what running under one costs", f"""A random Llama of SmolLM2-135M's shape with {a.layers} layers, \
{a.tokens:,} tokens, float32, torch {torch.__version__}, {threads} CPU thread(s) ({platform.machine()}); processor seconds of one \
forward, the shortest of {a.repeats}, interleaved. It says what a measurement costs here, and nothing of how fast a policy is where it \
is served. `{command}`.

| way | time | times the plain forward |
|---|---:|---:|
{rows}""")


if __name__ == "__main__": main()
