"""What exact statistics must cost on a GPU, counted before they are measured: operations and bytes a layer, and what bounds each.

The counts are those of the kernels as they are written (tests/test_triton.py counts what they load on a small case). The limits of
a device are its maker's; a kernel reaches a share of them, which is given beside and was not measured here.

    python benchmarks/gpu_plan.py          # the table of RESULTS.md
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from results import write_section


@dataclass(frozen=True)
class Shape:
    "A model's sizes"
    layers: int
    heads: int
    kv_heads: int
    d: int  # of a head
    parameters: float  # in the layers, which every token meets once


@dataclass(frozen=True)
class Device:
    "Limits of a device, and the share of each that kernels are expected to reach"
    products: float  # operations a second of matrix units, 16-bit numbers
    sums: float  # float32 operations a second outside of them
    exponentials: float  # a second
    memory: float  # bytes a second
    share: float = .6


SHAPES = {"1B": Shape(16, 32, 8, 64, 0.97e9), "8B": Shape(32, 32, 8, 128, 7.0e9), "70B": Shape(80, 64, 8, 128, 68.5e9)}
# NVIDIA's data sheet of the H200 SXM: 989 TFLOP/s (bf16, dense), 67 TFLOP/s (float32), 4.8 TB/s; 132 multiprocessors at 1.83 GHz, each
# of which gives 16 exponentials a cycle (CUDA programming guide, compute capability 9.0)
H200 = Device(989e12, 67e12, 132 * 1.83e9 * 16, 4.8e12)
TILE = 128, 64  # queries and keys of a tile (attention/triton_tiles, for heads of 128 and 16 bits)


@dataclass(frozen=True)
class Cost:
    "What one kernel does in one layer"
    products: float  # operations of matrix units
    sums: float  # float32 operations
    exponentials: float
    memory: float  # bytes from and to the device's memory, at least: every input once, every result once
    cache: float  # bytes that tiles read, of which the second-level cache gives most

    def seconds(self, on: Device) -> dict[str, float]:
        "Seconds by each limit"
        return {"products": self.products / on.products / on.share, "sums": self.sums / on.sums / on.share,
                "exponentials": self.exponentials / on.exponentials / on.share, "memory": self.memory / on.memory / on.share}

    def bound(self, on: Device) -> tuple[str, float]:
        "What takes longest, and its seconds: the others run beside it"
        return max(self.seconds(on).items(), key=lambda x: x[1])


def weights(n: int, window: int | None = None) -> float:
    "Weights of a causal pattern of one head"
    return n * (n + 1) / 2 if window is None or window >= n else window * n - window * (window - 1) / 2


def attention(s: Shape, n: int) -> Cost:
    "Causal attention: two products a weight (scores, and values), a maximum, a shift, an exponential and a sum"
    w = weights(n) * s.heads
    each = 2 * n * s.d * (2 * s.heads + 2 * s.kv_heads)
    return Cost(4 * s.d * w, 5 * w, w, each, 4 * s.d * w / TILE[0])


def rows_kernel(s: Shape, n: int, columns: int = 16) -> Cost:
    "Entropy, squares, distance: one product, one exponential, and two, two and three operations a weight; columns where a block has some"
    w = weights(n) * s.heads
    inputs = 2 * n * s.d * (s.heads + s.kv_heads) + 4 * n * s.heads
    return Cost(2 * s.d * w, 9 * w, w, inputs + 4 * n * s.heads * (3 + columns), 2 * s.d * w / TILE[0])


def one_kernel(s: Shape, n: int) -> Cost:
    "Both in one pass: two operations a weight more, and an atomic addition a key and tile"
    rows, w = rows_kernel(s, n), weights(n) * s.heads
    return Cost(rows.products, rows.sums + w, w, rows.memory + 4 * n * s.heads, rows.cache + 8 * w / TILE[0])


def columns_kernel(s: Shape, n: int) -> Cost:
    "Received attention: one product, one exponential and two operations a weight"
    w = weights(n) * s.heads
    inputs = 2 * n * s.d * (s.heads + s.kv_heads) + 4 * n * s.heads
    return Cost(2 * s.d * w, 2 * w, w, inputs + 4 * n * s.heads, 2 * s.d * w / TILE[1])


def torch_tiles(s: Shape, n: int, passes: int = 12) -> float:
    "Bytes that tiles of plain torch move: a float32 written or read a weight and step (logits, exponential, and each sum)"
    return 4. * passes * weights(n) * s.heads


def linear(s: Shape, n: int) -> Cost:
    "A layer's matrices: two operations a parameter and token"
    p = s.parameters / s.layers
    return Cost(2 * p * n, 0, 0, 2 * p + 2 * n * s.heads * s.d * 8, 0)


PARTS = {"matrices": linear, "attention": attention, "rows": rows_kernel, "columns": columns_kernel, "both in one": one_kernel}


def expected(s: Shape, n: int, on: Device = H200) -> dict[str, tuple[str, float]]:
    "What bounds each part of all layers, and its seconds"
    found = {name: cost(s, n).bound(on) for name, cost in PARTS.items()}
    return {name: (by, seconds * s.layers) for name, (by, seconds) in found.items()}


def ratio(s: Shape, n: int, kernels: Iterable[str], on: Device = H200) -> float:
    "All statistics by some kernels against the plain forward"
    t = {name: seconds for name, (_, seconds) in expected(s, n, on).items()}
    return 1 + sum(t[name] for name in kernels) / (t["matrices"] + t["attention"])


def line(name: str, n: int) -> str:
    s = SHAPES[name]
    got, per = expected(s, n), {part: cost(s, n) for part, cost in PARTS.items()}
    kernels, exponentials = (sum(getattr(per[x], what) for x in ("rows", "columns")) for what in ("products", "exponentials"))
    cells = [f"{got[part][1]:,.2f} s ({got[part][0]})" for part in PARTS]
    moved = per["rows"].memory + per["columns"].memory
    apart, together = ratio(s, n, ["rows", "columns"]), ratio(s, n, ["both in one"])
    return (f"| {name} | {n:,} | {kernels / 1e12:,.1f} | {exponentials / 1e12:,.3f} | {moved / 1e9:,.2f} | "
            f"{torch_tiles(s, n) / 1e12:,.2f} | {' | '.join(cells)} | {apart:.2f}x | {together:.2f}x |")


def table(lengths: Iterable[int] = (8192, 32768, 131072, 1048576)) -> list[str]:
    "Markdown"
    head = ["model", "tokens", "statistics: products a layer, 10^12", "exponentials a layer, 10^12", "memory a layer, GB",
            "torch tiles instead: memory a layer, TB", "matrices, all layers", "attention", "rows kernel", "columns kernel",
            "rows and columns in one", "all / plain, two kernels", "one kernel"]
    return ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1), *(line(name, n) for name in SHAPES for n in lengths)]


def main() -> None:
    text = [f"Counted, not measured: an H200 at {H200.share:.0%} of its maker's limits (989 TFLOP/s of bf16 products, 67 TFLOP/s of "
            f"float32 sums, {H200.exponentials / 1e12:.1f} x 10^12 exponentials a second, 4.8 TB/s), causal attention, bf16, one "
            "text, the whole of it at once. In brackets what bounds a part; products, exponentials and memory of the statistics are "
            "those of both kernels. `python benchmarks/gpu_plan.py`; a test counts the loads of both kernels on a small case.",
            "", *table(), "",
            "What follows: from 8k tokens on nothing is bound by memory. A kernel of statistics forms the scores once, where "
            "attention has two products, and so costs half of it; rows and columns apart therefore double the attention, which is "
            "over 1.5x at 128k tokens (8B). Rows and columns in one pass (columns by atomic additions) stay below 1.5x, and are "
            "what is run unless torch is told to be deterministic. Heads of 64 are bound by exponentials, in the forward nearly so "
            "too. Tiles of plain torch would move terabytes a layer."]
    write_section("GPU: the plan on paper", "\n".join(text))


if __name__ == "__main__": main()
