"""What tracing an answer by attention costs: AttnTrace's draws with longlens, and with all attention patterns formed.

One run compares them on the same model, prompt, answer and draws. The references ask transformers for `output_attentions`: for the whole
text with eager attention throughout, or only for the rows of the answer over a cache that sdpa filled. Every way gives the score
of every source, and they must agree. Times are interleaved and the fastest of each counts; memory is the peak of one prompt
of a draw in a fresh process, over the loaded model. Ways are compared by the time of the processor, which other work on the machine
changes little.

    python benchmarks/attention_trace.py                  # 4,096 tokens, 30 draws: some minutes on one core
    python benchmarks/attention_trace.py --length 1024 --draws 5
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import time
from typing import Any

from results import apart, peak_bytes, write_section

WAYS = {  # name -> what it says in the table
    "shared": "longlens, `attntrace`: prompts share their beginnings (default)",
    "alone": "longlens, every prompt by itself",
    "rows": "transformers, prompt with sdpa, then output_attentions for the answer's rows",
    "eager": "transformers, eager attention, output_attentions",
}
ONE = {
    "attention": "longlens, `attention`: one forward over all sources",
    "eager attention": "transformers, eager attention, the same",
}
ROLL = {
    "rollout": "longlens, `rollout`: one forward over all sources",
    "eager rollout": "transformers, eager attention, layers multiplied as they are formed",
}
TABLES = (WAYS, ONE, ROLL)  # the last way of each is what the others are compared with


def prepare(length: int) -> tuple[Any, Any]:
    "needle-lm, and a prompt of so many tokens with sources of 100 words"
    import longlens as ll
    from longlens.probes.traceback.prompts import ready_prompt
    lm = ll.load(allow_longer=True)
    ctx = ll.needle_context(lm, length, 40, wording="facts", n_keys=4, seed="benchmark")
    return lm, ready_prompt(lm, ctx, by="words", answer=ctx.completion)


def token_attention(way: str, lm: Any, prompt: Any, kept: Any) -> tuple[Any, Any]:  # (k,) and (k,)
    "Mean attention of the answer's rows to the tokens of one prompt, and whose tokens they are"
    import torch
    from transformers import DynamicCache

    from longlens.probes.traceback.methods.attention import glance
    from longlens.probes.traceback.sources import subset_tokens
    if way == "alone":
        g = glance(lm, prompt, kept)
        return g.attention, g.owner
    at = subset_tokens(prompt, kept)
    ids, n = torch.cat([prompt.ids[torch.from_numpy(at)], prompt.answer.ids])[None], len(at)
    with torch.no_grad():
        if way == "rows":
            cache = DynamicCache(config=lm.config)
            lm.hf(ids[:, :n - 1], past_key_values=cache, logits_to_keep=1)
            lm.hf.set_attn_implementation("eager")
            out = lm.hf(ids[:, n - 1:], past_key_values=cache, output_attentions=True)
        else:
            lm.hf.set_attn_implementation("eager")
            out = lm.hf(ids, output_attentions=True, use_cache=False, logits_to_keep=1)
        lm.hf.set_attn_implementation("sdpa")
        rows = len(prompt.answer) + 1
        mean = torch.stack([a[0, :, -rows:, :n].mean((0, 1)) for a in out.attentions]).mean(0)
    return mean.numpy().astype(float), prompt.owner[at]


def rolled(lm: Any, prompt: Any) -> Any:  # (sources,)
    "Rollout by formed patterns"
    import torch
    with torch.no_grad():
        lm.hf.set_attn_implementation("eager")
        patterns = lm.hf(prompt.whole[None], output_attentions=True, use_cache=False, logits_to_keep=1).attentions
        lm.hf.set_attn_implementation("sdpa")
        x = torch.stack([torch.tensor([float(i in r) for i in range(len(prompt.whole))]) for r in prompt.ranges], 1)
        for p in patterns: x = (p[0].mean(0) @ x + x) / 2
    return x[-len(prompt.answer) - 1:].mean(0).numpy()


def run(way: str, lm: Any, prompt: Any, draws: int) -> Any:  # (sources,)
    "The AttnTrace score of every source, or the mean attention to it"
    import numpy as np

    from longlens.probes.traceback.methods.attention import draw_sources, glances, mean_of_draws, pool_sources
    from longlens.probes.traceback.tracer import TRACERS, TraceJob
    if way in ("attention", "rollout"):
        return TRACERS[way].run(TraceJob(lm, prompt)).values
    if way == "eager attention": return pool_sources(*token_attention("eager", lm, prompt, np.arange(prompt.n)), prompt.n)
    if way == "eager rollout": return rolled(lm, prompt)
    subsets, values = draw_sources(prompt.n, draws=draws), np.full((draws, prompt.n), np.nan)
    if way == "shared":
        for numbers, g in glances(lm, prompt, subsets): values[numbers] = pool_sources(g.attention, g.owner, prompt.n, top=5)
    else:
        for i, kept in enumerate(subsets): values[i] = pool_sources(*token_attention(way, lm, prompt, kept), prompt.n, top=5)
    return mean_of_draws(values)[0]


def times(length: int, draws: int, repeats: int) -> tuple[dict[str, tuple[float, float]], dict[str, list[float]], dict[str, int]]:
    "Fewest seconds of the processor and of the clock, and scores, of each way, interleaved, and sizes; runs in a fresh process"
    from longlens.probes.traceback.methods.attention import draw_sources
    from longlens.probes.traceback.sources import subset_tokens
    lm, prompt = prepare(length)
    best, scores = dict.fromkeys([w for ways in TABLES for w in ways], (math.inf, math.inf)), {}
    for _ in range(repeats):
        for way in best:
            start = time.process_time(), time.perf_counter()
            scores[way] = run(way, lm, prompt, draws).tolist()
            taken = time.process_time() - start[0], time.perf_counter() - start[1]
            best[way] = min(best[way][0], taken[0]), min(best[way][1], taken[1])
    drawn = [len(subset_tokens(prompt, s)) for s in draw_sources(prompt.n, draws=draws)]
    return best, scores, {"tokens": len(prompt), "sources": prompt.n, "answer": len(prompt.answer), "draw": sum(drawn) // len(drawn)}


def peak(way: str, length: int) -> float:
    "Peak bytes of one draw (or one forward) over what the warmed-up model holds; runs in a fresh process"
    lm, prompt = prepare(length)
    _, short = prepare(512)
    if way == "plain":
        lm.prefill(short.ids)
        return peak_bytes(lambda: lm.prefill(prompt.ids))
    run(way, lm, short, 1)
    return peak_bytes(lambda: run(way, lm, prompt, 1))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--length", type=int, default=4096, help="tokens of the prompt with all sources")
    p.add_argument("--draws", type=int, default=30, help="subsets that AttnTrace draws")
    p.add_argument("--repeats", type=int, default=2)
    a = p.parse_args()
    measured = apart(times, a.length, a.draws, a.repeats)
    memory = {w: apart(peak, w, a.length) for w in ("plain", *WAYS, *ONE, *ROLL)}
    report(a, *measured, memory)


def report(a: argparse.Namespace, seconds: dict[str, tuple[float, float]], scores: dict[str, list[float]], sizes: dict[str, int],
           memory: dict[str, float]) -> None:
    import numpy as np
    import torch
    head = ("way", "processor", "times the first", "clock", "peak memory of a prompt",
            "largest difference of scores, as a share of the largest score")
    rows = [f"| {' | '.join(head)} |", "|---|---:|---:|---:|---:|---:|"]
    for ways in TABLES:
        first, base = next(iter(ways)), list(ways)[-1]
        for w, name in ways.items():
            off = np.abs(np.array(scores[w]) - scores[base]).max() / np.max(scores[base])
            cpu, clock = seconds[w]
            more = cpu / seconds[first][0]
            rows.append(f"| {name} | {cpu:.2f} s | {more:.1f}x | {clock:.1f} s | {memory[w] / 2**20:,.0f} MB | {off:.0e} |")
            if w != base: assert off < 1e-4, f"{name} gives other scores: off by {off}"
    threads = f"OMP_NUM_THREADS={n} " if (n := os.environ.get("OMP_NUM_THREADS")) else ""
    command = " ".join([f"{threads}python benchmarks/attention_trace.py", *sys.argv[1:]])
    text = [f"needle-lm, a prompt of {sizes['tokens']:,} tokens, {sizes['sources']} sources of 100 words, an answer of {sizes['answer']} "
            f"tokens; {a.draws} draws of 40 % of the sources, {sizes['draw']:,} tokens each on average; torch {torch.__version__}, "
            f"{torch.get_num_threads()} CPU thread(s) ({platform.machine()}). Scores are compared with those of eager attention. A plain "
            f"forward over all sources peaks at {memory['plain'] / 2**20:,.0f} MB. `{command}`.", "", *rows]
    write_section("Tracing an answer by attention", "\n".join(text))


if __name__ == "__main__": main()
