"""What sharing saves when an answer is traced: subsets of sources scored over one cache, and by a whole forward pass each.

One run compares them on needle-lm: the plain way runs every distinct subset that a method asks for as one whole forward pass over prompt
and answer. Both must give the same numbers, as far as float32 goes: where they differ most, both are compared with float64. What sharing
can reach at most is known beforehand: every distinct beginning of a prompt has to be computed once. It is said beside what was computed.

    python benchmarks/trace_subsets.py                  # some minutes on one core
    python benchmarks/trace_subsets.py --sources 10 --permutations 3
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from typing import Any

from results import apart, write_section

METHODS = {"loo": "leave one out", "stc": "one alone", "shapley": "Shapley values, {permutations} permutations",
           "tracllm": "TracLLM's search (STC, LOO, denoised Shapley with 20)"}  # the last one only if asked for


def made_prompt(lm: Any, sources: int) -> Any:
    "A prompt of so many sources of 100 words, with one fact in the middle"
    from longlens.needle_lm.data import filler
    from longlens.probes.traceback.prompts import trace_prompt
    words = filler(sources * 12, seed=0).split(" ")
    at = 100 * (sources // 2) + 40
    words[at:at] = "The code for Ada is lamb.".split(" ")
    return trace_prompt(lm, " ".join(words[: 100 * sources]), "What is the code for Ada?", "lamb", by="words", allow_longer=True)


class Asked:
    "A value function that remembers which subsets it was asked for, and answers with a scorer"

    def __init__(self, scorer: Any): self.scorer, self.n, self.kept = scorer, scorer.n, {}

    def __call__(self, kept: Any) -> Any:
        values = self.scorer(kept)
        self.kept |= {row.tobytes(): (row, v) for row, v in zip(kept, values, strict=True)}
        return values


def exact(lm: Any, prompt: Any, mask: Any) -> float:
    "The log-probability of the answer by one whole forward in float64"
    import copy

    import torch

    from longlens.probes.traceback.sources import subset_ids
    ids, answer = subset_ids(prompt, mask), prompt.answer.ids
    with torch.no_grad(): logits = copy.deepcopy(lm.hf).double()(torch.cat([ids, answer[:-1]])[None]).logits[0, len(ids) - 1 :]
    return float(logits.log_softmax(-1).gather(-1, answer[:, None]).sum())


def measured(name: str, sources: int, permutations: int) -> dict[str, Any]:
    "One method both ways; runs in a fresh process"
    import numpy as np

    import longlens as ll
    from longlens.probes.traceback.scorer import SubsetScorer, plain_scores
    from longlens.probes.traceback.tracer import GameJob, find_tracer
    lm = ll.load(allow_longer=True)
    prompt, tracer = made_prompt(lm, sources), find_tracer(name, {"permutations": permutations} if name == "shapley" else {})
    plain_scores(lm, prompt, np.ones((1, sources), bool))  # warm
    game = Asked(SubsetScorer(lm, prompt))
    start = time.process_time()
    tracer.run(GameJob(game))
    seconds, costs = time.process_time() - start, game.scorer.costs
    kept, values = (np.array(x) for x in zip(*game.kept.values(), strict=True))
    least = SubsetScorer(lm, prompt, batch_size=1).plan(kept).tokens
    start = time.process_time()
    plain = plain_scores(lm, prompt, kept)
    plain_seconds, worst = time.process_time() - start, int(np.abs(values - plain).argmax())
    true = exact(lm, prompt, kept[worst])
    return {"subsets": len(kept), "asked": costs.asked, "asked_tokens": costs.asked_tokens, "tokens": costs.tokens, "least": least,
            "plain": costs.plain_tokens, "seconds": seconds, "plain_seconds": plain_seconds,
            "off": float(abs(values - plain)[worst]), "plain_off": abs(plain[worst] - true), "shared_off": abs(values[worst] - true),
            "prompt": len(prompt)}



def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--sources", type=int, default=40, help="sources of 100 words")
    p.add_argument("--permutations", type=int, default=5)
    p.add_argument("--methods", nargs="+", choices=METHODS, default=["loo", "stc", "shapley"])
    a = p.parse_args()
    report(a, {m: apart(measured, m, a.sources, a.permutations) for m in a.methods})


def report(a: argparse.Namespace, found: dict[str, dict[str, Any]]) -> None:
    import torch
    rows = ["| method | subsets | tokens, one whole forward each | tokens computed | fewer | at most possible | "
            "processor seconds, plain | shared | faster | largest difference | there, from float64: plain | shared |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for name, r in found.items():
        rows.append(f"| {METHODS[name].format(permutations=a.permutations)} | {r['subsets']:,} | {r['plain']:,} | {r['tokens']:,} | "
                    f"{r['plain'] / r['tokens']:.2f}x | {r['plain'] / r['least']:.2f}x | {r['plain_seconds']:.1f} | {r['seconds']:.1f} | "
                    f"{r['plain_seconds'] / r['seconds']:.2f}x | {r['off']:.0e} | {r['plain_off']:.0e} | {r['shared_off']:.0e} |")
    threads = f"OMP_NUM_THREADS={n} " if (n := os.environ.get("OMP_NUM_THREADS")) else ""
    command = " ".join([f"{threads}python benchmarks/trace_subsets.py", *sys.argv[1:]])
    first = next(iter(found.values()))
    text = [f"needle-lm, {a.sources} sources of 100 words ({first['prompt']:,} tokens of prompt; more than it was made for, which does not "
            f"matter here), the log-probability of the answer, float32, torch {torch.__version__}, {torch.get_num_threads()} CPU thread(s) "
            f"({platform.machine()}). Subsets are distinct ones: what a method asks for twice is counted once for both ways. *At most "
            f"possible*: every distinct beginning of a prompt computed once, which is all that sharing can do in a causal model, because "
            f"what stands after a source that was left out is computed from other keys and values. For leave-one-out that is about half of "
            f"the tokens, and for one source alone nothing but the beginning of the template. `{command}`.", "", *rows]
    write_section("Context traceback", "\n".join(text))


if __name__ == "__main__": main()
