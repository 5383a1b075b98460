"""What it takes to trace an answer in 100,000 tokens: paragraphs first, then sentences and tokens inside the winners.

needle-lm is asked about a text far longer than it was made for: what it says does not matter here, what it costs does. The same answer is
traced with different methods inside, each in a fresh process, and what was announced beforehand stands beside what was taken.

    OMP_NUM_THREADS=1 python benchmarks/coarse_to_fine.py                     # three quarters of an hour
    OMP_NUM_THREADS=1 python benchmarks/coarse_to_fine.py --tokens 10000
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from typing import Any

from results import apart, peak_bytes, write_section

INNER = {"attention": "mean attention: one forward over all paragraphs", "attntrace": "AttnTrace: 30 draws of 40 % of the paragraphs"}


def made_text(tokens: int) -> str:
    "Paragraphs of twelve sentences, a fact in the middle one"
    from longlens.needle_lm.data import filler, needle_tokenizer
    tok, paragraphs, have = needle_tokenizer(), list[str](), 0
    while have < tokens:
        paragraphs.append(filler(12, seed=len(paragraphs)))
        have += len(tok(paragraphs[-1])["input_ids"])
    paragraphs[len(paragraphs) // 2] += " The code for Ada is lamb."
    return "\n\n".join(paragraphs)


def measured(inner: str, tokens: int) -> dict[str, Any]:
    "One trace; runs in a fresh process"
    import longlens as ll
    lm, text = ll.load(allow_longer=True), made_text(tokens)
    how: dict[str, Any] = dict(question="What is the code for Ada?", answer="lamb", method="coarse_to_fine", inner=inner, by="paragraphs")
    planned, found, start = ll.plan(ll.trace_context, lm, text, **how), [], time.process_time()
    peak = peak_bytes(lambda: found.append(ll.trace_context(lm, text, **how, budget=planned.tokens)))
    costs = found[0].frames["costs"].sum()
    return {"said": planned.tokens, "tokens": costs["tokens"][0], "seconds": time.process_time() - start, "peak": peak,
            "prompt": found[0].meta["prompt_tokens"], "sources": len(found[0].frames["sources"])}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--tokens", type=int, default=100_000, help="of the context")
    p.add_argument("--inner", nargs="+", choices=INNER, default=list(INNER))
    a = p.parse_args()
    report({name: apart(measured, name, a.tokens) for name in a.inner})


def report(found: dict[str, dict[str, Any]]) -> None:
    import torch
    rows = ["| inside | tokens announced, at most | tokens through the model | processor seconds | peak memory |",
            "|---|---:|---:|---:|---:|"]
    for name, r in found.items():
        rows.append(f"| {INNER[name]} | {r['said']:,} | {r['tokens']:,} | {r['seconds']:,.0f} | {r['peak'] / 1e6:,.0f} MB |")
    threads = f"OMP_NUM_THREADS={n} " if (n := os.environ.get("OMP_NUM_THREADS")) else ""
    command = " ".join([f"{threads}python benchmarks/coarse_to_fine.py", *sys.argv[1:]])
    first = next(iter(found.values()))
    text = [f"needle-lm (5 layers, 8 heads), a prompt of {first['prompt']:,} tokens in {first['sources']:,} paragraphs, far longer than it "
            f"was made for: what it finds does not matter here. The best paragraphs are cut into sentences, those into tokens. float32, "
            f"torch {torch.__version__}, {torch.get_num_threads()} CPU thread(s) ({platform.machine()}). `{command}`.", "", *rows]
    write_section("Context traceback of a long text, coarse to fine", "\n".join(text))


if __name__ == "__main__": main()
