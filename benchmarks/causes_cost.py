"""What it costs to patch heads and to cut rows off, at any length: one read of the text, then runs over a few rows.

A random Llama of 2 layers and 4 heads; the same tokens; each length runs in a process of its own, so that its largest memory is
its own. Results go to benchmarks/RESULTS.md.

    OMP_NUM_THREADS=1 python benchmarks/causes_cost.py                  # up to 32,000 tokens, about a minute on a quiet core
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from results import write_section

import longlens as ll
from longlens.interventions.base import intervene
from longlens.interventions.patching import PatchHeads, head_outputs

SHAPE = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def load_model() -> ll.LongModel:
    "A Llama with random weights"
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return ll.load(LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=2**17)).eval())


def peak() -> float:
    "Megabytes that the process had at most"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    "Processor seconds, and what came of it"
    start = time.process_time()
    out = run()
    return time.process_time() - start, out


def measure(n: int, chunk: int) -> dict[str, float]:
    "One length: seconds of each step, and how much memory grew"
    lm, ids, rows = load_model(), torch.randint(3, 512, (n,), generator=torch.Generator().manual_seed(0)), (n - 2, n)
    lm.logits(ids[:256])
    before = peak()
    read, prefix = timed(lambda: lm.prefill(ids[:-2], chunk))
    kept, outputs = timed(lambda: head_outputs(lm, ids, rows, prefix))

    def patched() -> None:
        with intervene(lm, PatchHeads(outputs, rows, [(1, 2)])): prefix.logits_after(ids[-2:])

    def cut(way: Callable) -> Callable[[], None]:
        def run() -> None:
            with way(lm, {"fact": (100, 120)}, rows, [(1, 2)]): prefix.logits_after(ids[-2:])
        return run

    return {"read": read, "head outputs": kept, "patched": timed(patched)[0], "knock-out": timed(cut(ll.knock_out))[0],
            "value zeroing": timed(cut(ll.zero_values))[0], "memory": peak() - before, "pattern": 4 * n * n * 4 / 2**20}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, nargs="*", default=[2000, 8000, 32000])
    p.add_argument("--chunk", type=int, default=2000)
    p.add_argument("--one", type=int, help="measure this length only, and print it")
    a = p.parse_args()
    if a.one:
        sys.stdout.write(json.dumps(measure(a.one, a.chunk)) + "\n")
        return
    found = []
    for n in a.tokens:
        command = [sys.executable, __file__, "--one", str(n), "--chunk", str(a.chunk)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append((n, json.loads(done.stdout.splitlines()[-1])))
    steps = "read", "head outputs", "patched", "knock-out", "value zeroing"
    times = [(n, m, " | ".join(f"{m[s]:.3f} s" for s in steps)) for n, m in found]
    rows = "\n".join(f"| {n:,} | {t} | {m['memory']:.0f} MB | {m['pattern']:,.0f} MB |" for n, m, t in times)
    shown = f"OMP_NUM_THREADS=1 python benchmarks/causes_cost.py --tokens {' '.join(map(str, a.tokens))} --chunk {a.chunk}"
    write_section("Causes: what patched heads and cut rows cost", f"""A random Llama of 2 layers and 4 heads of 16, float32, torch \
{torch.__version__}, {os.environ.get("OMP_NUM_THREADS", "?")} CPU thread(s) ({platform.machine()}); processor seconds, once each. The \
text is read once, in chunks of {a.chunk:,}; head outputs are those of two rows, and each run that follows is over these two rows, with \
one head patched or cut off from 20 tokens. Memory: how much the largest size of the process grew over all of it; pattern: what one \
layer's weights would take. `{shown}`.

| tokens | read once | head outputs | one head patched | knock-out | value zeroing | memory | pattern of a layer |
|---:|---:|---:|---:|---:|---:|---:|---:|
{rows}""")


if __name__ == "__main__": main()
