"""Where the time of all statistics goes on a CPU: a pass over one head's pattern, step by step, as shares of the plain attention.

Steps are timed in turn in one process, processor seconds, the shortest of several rounds, so that other programs on the machine matter
little. A pass without reducers forms the logits and their exponentials; each row below adds one reducer to it.

    python benchmarks/pass_profile.py --tokens 8192
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable
from typing import Literal

import torch
from results import write_section

from longlens.attention import logits
from longlens.attention.operator import AttentionOperator, summed_by
from longlens.attention.reducers import DistanceSum, EntropySum, Pattern, Product, ReceivedSum, Reducer, SquareSum


class Nothing(Reducer):
    "Adds nothing up: the pass itself"
    key = ("nothing",)

    def start(self, op: Pattern) -> None: self.acc = op.per_query(1)

    def tile(self, p: torch.Tensor, log2p: torch.Tensor, at: logits.Tile) -> None: pass


def steps(op: AttentionOperator) -> dict[str, Callable[[], list[Reducer]]]:
    n = op.shape[3]
    sink, spans = torch.rand(1, 1, n, 1), torch.rand(1, 1, n, 2)
    return {
        "logits and exponentials": lambda: [Nothing()], "entropy": lambda: [EntropySum()], "sum of squares": lambda: [SquareSum()],
        "mean distance": lambda: [DistanceSum()], "received": lambda: [ReceivedSum()], "a column (sink mass)": lambda: [Product(sink)],
        "two columns (spans)": lambda: [Product(spans)],
        "all of them": lambda: [EntropySum(), SquareSum(), DistanceSum(), ReceivedSum(), Product(sink), Product(spans)],
    }


def logits_alone(op: AttentionOperator) -> None:
    for _ in op.log_tiles(): pass


def products_alone(op: AttentionOperator) -> None:
    "The same tiles as bare matrix products: no scale, shift or mask"
    q, k = (torch.nn.functional.pad(x[0], (0, 1)) for x in (op.call.q, op.call.k))
    for t in logits.tiles(op.call): torch.bmm(q[:, t.rows.start:t.rows.stop], k[:, t.keys.start:t.keys.stop].mT)


def measure(n: int, d: int, rounds: int) -> dict[str, float]:
    "Shortest processor seconds of each step"
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, n, d), torch.randn(1, 1, n, d)
    op = AttentionOperator(q, k, k)
    lse, work = op.lse, steps(op)

    def one(make: Callable[[], list[Reducer]], kernels: Literal["torch", "compiled"] = "torch") -> Callable[[], object]:
        def run() -> object:
            with summed_by(kernels): return AttentionOperator.of(op.call, lse).reduce(*make())
        return run
    timed: dict[str, Callable[[], object]] = {
        "plain attention": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True),
        "products": lambda: products_alone(op), "logits": lambda: logits_alone(op), **{name: one(make) for name, make in work.items()},
        "compiled": one(work["all of them"], "compiled")}
    best = dict.fromkeys(timed, math.inf)
    for _ in range(rounds):
        for name, f in timed.items():
            start = time.process_time()
            f()
            best[name] = min(best[name], time.process_time() - start)
    return best


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--size", type=int, default=64, help="of a head")
    p.add_argument("--rounds", type=int, default=5)
    a = p.parse_args()
    torch.set_num_threads(1)
    t = measure(a.tokens, a.size, a.rounds)
    base, plain = t["logits and exponentials"], t["plain attention"]
    line = lambda name, seconds: f"| {name} | {1e3 * seconds:.0f} ms | {seconds / plain:.2f} |"
    rows = [line("plain attention (torch's fused kernel)", plain), line("logits of all tiles", t["logits"]),
            line("of which bare products of these tiles", t["products"]), line("and their exponentials", base - t["logits"])]
    known = ("plain attention", "products", "logits", "logits and exponentials", "all of them", "compiled")
    rows += [line(f"and {name}", x - base) for name, x in t.items() if name not in known]
    rows += [line("the pass with all of them, by tiles of torch", t["all of them"])]
    rows += [line("**the same in the compiled loop**", t["compiled"])]
    text = [f"One head of size {a.size}, {a.tokens:,} tokens, causal, float32, torch {torch.__version__}, 1 CPU thread "
            f"({platform.machine()}); processor seconds, the shortest of {a.rounds} rounds, all steps in turn, other programs at work, so "
            "that a few milliseconds are noise. "
            f"`python benchmarks/pass_profile.py --tokens {a.tokens} --rounds {a.rounds}`.",
            "", "| step | time | of plain attention |", "|---|---:|---:|", *rows]
    write_section("A pass over a pattern on a CPU, step by step", "\n".join(text))


if __name__ == "__main__": main()
