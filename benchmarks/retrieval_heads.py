"""What finding retrieval heads costs: teacher forcing with longlens, and decoding with all attention patterns returned.

One run compares them on the same model and the same prompts, a grid of depths at one length. The reference decodes greedily and asks
for `output_attentions` at every step, as the published code does (nightdessert/Retrieval_Head); its prompt is run with sdpa, which
transformers allows, or with eager attention throughout. Every way gives the retrieval score of every head, and they must agree.
Times are interleaved and the fastest of each counts; memory is the peak of a fresh process for each, over the loaded model.

    python benchmarks/retrieval_heads.py                  # 2,048 tokens, ten depths: some minutes on two cores
    python benchmarks/retrieval_heads.py --length 512 --depths 3
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

from results import apart, peak_bytes, write_section

WAYS = {  # name -> what it says in the table
    "shared": "longlens, teacher forcing, prompts share their beginnings (default)",
    "forced": "longlens, teacher forcing, every prompt anew",
    "decode": "longlens, decoding",
    "sdpa+eager": "transformers, prompt with sdpa, then output_attentions at every step",
    "eager": "transformers, eager attention throughout, output_attentions at every step",
    "eager, 50 steps": "the same, always 50 steps (the published code stops at a new line only)",
}


def prepare(length: int, depths: int) -> tuple[Any, list]:
    "needle-lm and its prompts, the deepest needle first"
    import longlens as ll
    lm = ll.load()
    at = [100 * i / (depths - 1) for i in range(depths)][::-1]
    return lm, [ll.needle_context(lm, length, d, wording="facts", n_keys=4, value_words=3, seed="benchmark") for d in at]


def reference(lm: Any, ctx: Any, eager: bool, steps: int | None) -> Any:  # (layers, heads)
    "The published score of one prompt, decoding with attention patterns returned"
    import torch
    from transformers import DynamicCache
    ids, needle, cache = ctx.tokens.ids, ctx.spans["needle"], DynamicCache(config=lm.config)
    score, end = torch.zeros(lm.n_layers, lm.n_heads), set(lm.hf.generation_config.eos_token_id)
    with torch.no_grad():
        lm.hf.set_attn_implementation("eager" if eager else "sdpa")
        lm.hf(ids[None, :-1], past_key_values=cache, logits_to_keep=1, output_attentions=eager)
        lm.hf.set_attn_implementation("eager")
        token = ids[-1:]
        for step in range(steps or 50):
            out = lm.hf(token[None], past_key_values=cache, output_attentions=True)
            token = out.logits[0, -1:].argmax(-1)
            top = torch.stack([a[0, :, -1].argmax(-1) for a in out.attentions])  # (layers, heads)
            inside = (top >= needle.start) & (top < needle.stop)
            if step < 50: score += (inside & (ids[top.clamp(max=len(ids) - 1)] == token)) / len(needle)
            if steps is None and int(token) in end: break
        lm.hf.set_attn_implementation("sdpa")
    return score


def run(way: str, lm: Any, contexts: Sequence) -> Any:  # (layers, heads)
    "Mean retrieval score of every head over the prompts"
    import torch

    from longlens.probes.heads.scores import Watch, run_trials
    if "eager" in way: return torch.stack([reference(lm, c, way != "sdpa+eager", 50 if "50" in way else None) for c in contexts]).mean(0)
    trials = run_trials(lm, contexts, Watch("decode" if way == "decode" else "teacher"), reuse=way == "shared", batch_size=1)
    for t in trials: assert t.right, f"needle-lm did not say {t.context.completion!r} but {t.said!r}: take another seed"
    return torch.stack([t.retrieval_score for t in trials]).mean(0)


def times(length: int, depths: int, repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    "Fastest seconds and scores of each way, interleaved; runs in a fresh process"
    lm, contexts = prepare(length, depths)
    best, scores = dict.fromkeys(WAYS, math.inf), {}
    for _ in range(repeats):
        for way in WAYS:
            start = time.perf_counter()
            scores[way] = run(way, lm, contexts)
            best[way] = min(best[way], time.perf_counter() - start)
    return best, {w: s.tolist() for w, s in scores.items()}


def peak(way: str, length: int) -> float:
    "Peak bytes of one prompt over what the warmed-up model holds; runs in a fresh process"
    lm, contexts = prepare(length, 2)
    _, short = prepare(256, 2)
    if way != "plain": run(way, lm, short[:1])
    def once() -> None:
        if way == "plain": lm.prefill(contexts[0].tokens)
        else: run(way, lm, contexts[:1])
    if way == "plain": lm.prefill(short[0].tokens)
    return peak_bytes(once)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--length", type=int, default=2048, help="tokens of a prompt")
    p.add_argument("--depths", type=int, default=10, help="prompts, the needle at so many depths")
    p.add_argument("--repeats", type=int, default=3)
    a = p.parse_args()
    seconds, scores = apart(times, a.length, a.depths, a.repeats)
    memory = {w: apart(peak, w, a.length) for w in ("plain", *WAYS)}
    report(a, seconds, scores, memory)


def report(a: argparse.Namespace, seconds: dict[str, float], scores: dict[str, Any], memory: dict[str, float]) -> None:
    import torch
    same = {w: torch.tensor(s) for w, s in scores.items()}
    base = same["sdpa+eager"]
    found = {w: {tuple(h) for h in (s >= .1).nonzero().tolist()} for w, s in same.items()}
    head = ("way", "time of the grid", "times the first", "peak memory of a prompt", "of a plain forward", "largest difference of scores",
            "same heads")
    rows = [f"| {' | '.join(head)} |", "|---|---:|---:|---:|---:|---:|---|"]
    for w, name in WAYS.items():
        off = (same[w] - base).abs().max().item()
        rows.append(f"| {name} | {seconds[w]:.2f} s | {seconds[w] / seconds['shared']:.1f}x | {memory[w] / 2**20:,.0f} MB | "
                    f"{memory[w] / memory['plain']:.2f}x | {off:.0e} | {'yes' if found[w] == found['sdpa+eager'] else 'no'} |")
    threads = f"OMP_NUM_THREADS={n} " if (n := os.environ.get("OMP_NUM_THREADS")) else ""
    command = " ".join([f"{threads}python benchmarks/retrieval_heads.py", *sys.argv[1:]])
    heads = ", ".join(f"{x}-{y}" for x, y in sorted(found["sdpa+eager"]))
    text = [f"needle-lm, {a.depths} prompts of {a.length:,} tokens, answers of 4 tokens (three words and a full stop), torch "
            f"{torch.__version__}, {torch.get_num_threads()} CPU thread(s) ({platform.machine()}). Retrieval heads found by all: {heads}. "
            f"Scores are compared with the fourth row. `{command}`.", "", *rows]
    write_section("Finding retrieval heads", "\n".join(text))


if __name__ == "__main__": main()
