"""What a sweep saves: the same grids with shared beginnings and batches, and every prompt by itself.

One run compares them on needle-lm, interleaved; the fastest time of each counts. Every way answers every question, gives the
log-probability of the right answer, and must agree with the others. The plain way is transformers alone: for every prompt one `generate`,
and one forward for the score.

    python benchmarks/sweep.py                  # some minutes on two cores
    python benchmarks/sweep.py --length 512 --repeats 1
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

from results import apart, write_section

WAYS = {  # name -> what it says in the table, and arguments of sweep
    "shared": ("shared beginnings, batches of 8 (default)", {}),
    "single": ("shared beginnings, one by one", {"batch_size": 1}),
    "alone": ("longlens, every prompt by itself", {"reuse": False, "batch_size": 1}),
    "plain": ("transformers, every prompt by itself", None),
}


def needles(lm: Any, length: int, depths: int, trials: int) -> list:
    "A needle grid of one length in one haystack"
    import longlens as ll
    from longlens.sweeps.cells import Cell
    hay, at = ll.Haystack.generated(0), [100 * i / (depths - 1) for i in range(depths)]
    return [Cell.of(ll.needle_context(lm, length, d, wording="facts", haystack=hay, seed=t)) for d in at for t in range(trials)]


def documents(lm: Any, n: int, questions: int) -> list:
    "Questions with the right document at five places"
    from longlens.probes.middle.inputs import gold_positions
    from longlens.prompts.multi_document import place_answer
    from longlens.prompts.questions import fact_questions
    from longlens.sweeps.cells import Cell
    return [Cell.of(place_answer(lm, q, g)) for q in fact_questions(questions, n) for g in gold_positions(n)]


def grids(lm: Any, length: int) -> dict[str, Callable[[], list]]:
    "What is swept"
    return {
        f"{length:,} tokens, 10 depths, 1 needle each": lambda: needles(lm, length, 10, 1),
        f"{length:,} tokens, 10 depths, 3 needles each": lambda: needles(lm, length, 10, 3),
        f"{length // 8:,} to {length:,} tokens (4 lengths), 10 depths, 2 needles each":
            lambda: [c for k in (8, 4, 2, 1) for c in needles(lm, length // k, 10, 2)],
        "20 documents, 5 places, 4 questions": lambda: documents(lm, 20, 4),
    }


def plainly(lm: Any, cells: list) -> list[float]:
    "Answers and scores with transformers alone"
    import torch
    out = []
    with torch.no_grad():
        for c in cells:
            lm.hf.generate(c.ids[None], max_new_tokens=4, do_sample=False, pad_token_id=0)
            logits = lm.hf(torch.cat([c.ids, c.completion])[None]).logits[0, len(c) - 1 : -1].log_softmax(-1)
            out.append(float(logits.gather(-1, c.completion[:, None]).sum()))
    return out


def measured(length: int, repeats: int) -> dict[str, dict[str, Any]]:
    "Seconds, tokens and scores of every way on every grid; runs in a fresh process"
    import longlens as ll
    from longlens.probes.generate import Ask
    lm, out = ll.load(), {}
    for name, make in grids(lm, length).items():
        cells = make()
        row: dict[str, Any] = {w: {"seconds": math.inf} for w in WAYS}
        for _ in range(repeats):
            for way, (_, how) in WAYS.items():
                start = time.perf_counter()
                if how is None: scores, tokens = plainly(lm, cells), sum(map(len, cells))
                else:
                    done = ll.sweep(lm, cells, Ask(4, heads_on="$^", mean_on="$^"), **how)
                    scores, tokens = done.table("answers")["logprob"].to_list(), int(done.costs["tokens"].sum())
                row[way] |= {"seconds": min(row[way]["seconds"], time.perf_counter() - start), "scores": scores, "tokens": tokens}
        out[name] = {"cells": len(cells), **row}
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--length", type=int, default=2048, help="tokens of the longest prompt")
    p.add_argument("--repeats", type=int, default=3)
    a = p.parse_args()
    report(a, apart(measured, a.length, a.repeats))


def report(a: argparse.Namespace, found: dict[str, dict[str, Any]]) -> None:
    import torch
    rows = ["| grid | way | prompt tokens computed | of all | time | times the first | largest difference of log-probabilities |",
            "|---|---|---:|---:|---:|---:|---:|"]
    for name, row in found.items():
        base, total = row["plain"], row["plain"]["tokens"]
        for way, (said, _) in WAYS.items():
            r = row[way]
            off = max(abs(x - y) for x, y in zip(r["scores"], base["scores"], strict=True))
            rows.append(f"| {name} ({row['cells']} prompts) | {said} | {r['tokens']:,} | {100 * r['tokens'] / total:.1f} % | "
                        f"{r['seconds']:.2f} s | {r['seconds'] / row['shared']['seconds']:.2f}x | {off:.0e} |")
    threads = f"OMP_NUM_THREADS={n} " if (n := os.environ.get("OMP_NUM_THREADS")) else ""
    command = " ".join([f"{threads}python benchmarks/sweep.py", *sys.argv[1:]])
    text = [f"needle-lm, answers of up to 4 tokens and the log-probability of the right one, torch {torch.__version__}, "
            f"{torch.get_num_threads()} CPU thread(s) ({platform.machine()}). With d depths and t needles each the least that can be "
            f"computed is a share of 1/2 + 1/(d t): the haystack once, and for each prompt what comes after its needle. `{command}`.",
            "", *rows]
    write_section("Sweeps", "\n".join(text))


if __name__ == "__main__": main()
