"""What it costs to read past the trained length by each method: against the plain forward, side by side in one process.

The same random-weight Llama of SmolLM2-135M's shape, trained length 1,024 by its config, the same tokens; times are interleaved (plain,
linear, ...), and the shortest of each counts. Results go to benchmarks/RESULTS.md.

    OMP_NUM_THREADS=1 python benchmarks/position_cost.py                  # 2,048 tokens, 2 layers, about two minutes
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from results import write_section

from longlens import intervene, position_method
from longlens.attention.hf_interface import attach
from longlens.interventions.methods import POSITION_METHODS
from longlens.interventions.moved import Jittered, Unrotated

SHAPE = dict(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536, vocab_size=4096)


def load_model(layers: int) -> Any:
    "A Llama with random weights"
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers, max_position_embeddings=1024)).eval()


def ways(hf: Any, factor: float) -> dict[str, Callable[[], AbstractContextManager]]:
    "What is compared"
    named = {name: partial(position_method, hf, name, factor) for name in POSITION_METHODS}
    moved = {"jittered": lambda: intervene(hf, Jittered(0.3)), "unrotated": lambda: intervene(hf, Unrotated())}
    return {"plain forward, transformers (sdpa)": nullcontext, "plain forward, longlens": lambda: attach(hf), **named, **moved}


def measure(hf: Any, n: int, repeats: int) -> dict[str, float]:
    "The shortest processor time of each way"
    ids, best = torch.randint(0, 4096, (1, n), generator=torch.Generator().manual_seed(0)), {}
    with torch.no_grad():
        hf(ids[:, :256])
        for _ in range(repeats):
            for name, around in ways(hf, n / 1024).items():
                with around():
                    start = time.process_time()
                    hf(ids, logits_to_keep=1)
                    best[name] = min(best.get(name, 1e9), time.process_time() - start)
    return best


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=2048)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--repeats", type=int, default=2)
    a = p.parse_args()
    best = measure(load_model(a.layers), a.tokens, a.repeats)
    plain = best["plain forward, longlens"]
    rows = "\n".join(f"| {name} | {t:.2f} s | {t / plain:.2f} |" for name, t in best.items())
    command = f"OMP_NUM_THREADS=1 python benchmarks/position_cost.py --tokens {a.tokens} --layers {a.layers} --repeats {a.repeats}"
    write_section("Positions: what reading by a method costs", f"""A random Llama of SmolLM2-135M's shape with {a.layers} layers and a \
trained length of 1,024, {a.tokens:,} tokens, float32, torch {torch.__version__}, {os.environ.get("OMP_NUM_THREADS", "?")} CPU thread(s) \
({platform.machine()}); processor seconds of one forward, the shortest of {a.repeats}, interleaved. `{command}`.

| method | time | times the plain forward |
|---|---:|---:|
{rows}""")


if __name__ == "__main__": main()
