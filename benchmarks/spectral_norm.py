"""What the spectral norm of every head's attention costs: longlens, which never forms the pattern, against the formed matrix.

One run compares them on the same model and the same text, a random encoder of ModernBERT's shape (12 heads of 64, windows of 128 tokens
in two layers of three). sigma_a is the largest singular value of (I - 11^T/n) P. Where the pattern is formed, it is formed for all heads
of a layer, as `output_attentions` would, and then goes through the same Lanczos bidiagonalisation, a power iteration, or
`torch.linalg.svdvals`, which is done for a few heads of each layer only and compared by the time a head takes. Times are interleaved and
the fastest of each counts, by the clock and by the processor: other work on the machine disturbs the second less, so that one says how
much more a way takes. Memory is the peak of a fresh process for each, over the loaded model.

    python benchmarks/spectral_norm.py                     # 4,096 tokens: a quarter of an hour on one slow core
    python benchmarks/spectral_norm.py --length 512
    python benchmarks/spectral_norm.py --whole             # all 22 layers, longlens and the formed pattern with the same Lanczos
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
    "longlens": "longlens: Lanczos, the pattern never formed",
    "lanczos": "formed pattern, the same Lanczos",
    "power": "formed pattern, power iteration",
    "svd": "formed pattern, `torch.linalg.svdvals`",
}


def prepare(length: int, layers: int) -> tuple[Any, Any]:
    "A random encoder and a text"
    import torch
    from transformers import ModernBertConfig, ModernBertModel
    torch.manual_seed(0)
    config = ModernBertConfig(num_hidden_layers=layers, vocab_size=1000, max_position_embeddings=max(8192, length), initializer_range=.04,
                              pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, reference_compile=False)
    model = ModernBertModel(config).eval().requires_grad_(False)
    return model, torch.randint(3, 1000, (1, length))


def centred_power(p: Any, tol: float, most: int) -> tuple[Any, int]:  # (heads,) and steps
    "Power iteration with the formed patterns (heads, n, n), to the same residual as Lanczos"
    import torch
    p = p - p.mean(1, keepdim=True)
    v = torch.randn(len(p), p.shape[2], 1, generator=torch.Generator().manual_seed(0)).to(p)
    v /= v.norm(dim=1, keepdim=True)
    steps, left = 0, True
    while left and steps < most:
        y = p @ v
        size = y.norm(dim=1, keepdim=True)
        z = p.mT @ (y / size)
        left = bool(((z - size * v).norm(dim=1) > tol * size[:, 0]).any())
        v, steps = z / z.norm(dim=1, keepdim=True), steps + 1
    return size[:, 0, 0], steps


def statistic(way: str, tol: float, svd_heads: int, most: int) -> Any:
    "What is captured"
    import torch

    from longlens.measure.base import Call, Statistic
    from longlens.measure.spectral import CenteredLanczos, SpectralNorm, _run
    if way == "longlens": return SpectralNorm(tol=tol)

    class FormedLanczos(CenteredLanczos):
        "The same steps with a matrix"
        def __init__(self, op: Any, p: Any):
            self.p = p
            super().__init__(op)

        def products(self, off: Any, active: Any) -> tuple[Any, Any]:
            y = (self.p @ self.v[..., None])[..., 0] - off
            return y, (y[..., None, :] @ self.p)[..., 0, :]

    class Formed(Statistic):
        "sigma_a of the formed pattern; NaN for heads that are left out"
        name = "spectral_norm"

        def update(self, state: dict, call: Call) -> None:
            p = call.op.dense(limit=call.op.shape[3])
            value, steps = torch.full(call.op.shape[:2], torch.nan, dtype=torch.float64), torch.zeros(call.op.shape[:2])
            if way == "lanczos": value, _, steps, _ = _run(FormedLanczos(call.op, p), 200, tol)
            elif way == "power": value[0], steps[:] = centred_power(p[0], tol, most)
            else:
                for h in range(min(svd_heads, p.shape[1])): value[0, h] = torch.linalg.svdvals(p[0, h] - p[0, h].mean(0))[0]
            state |= {"sigma_a": value, "iterations": steps}

        def table(self, state: dict) -> tuple[dict, dict]: return {"head": range(state["sigma_a"].shape[1])}, state

    return Formed()


def run(way: str, model: Any, ids: Any, settings: tuple) -> Any:  # a frame; None for a plain forward
    "One forward with the measurement"
    import torch

    from longlens.measure.capture import capture
    with torch.no_grad():
        if way == "plain":
            model(ids)
            return None
        with capture(model, statistic(way, *settings)) as seen: model(ids)
    return seen.frame("spectral_norm")


def times(length: int, layers: int, repeats: int, settings: tuple) -> tuple[dict[str, float], dict[str, float], dict[str, tuple]]:
    "Fastest seconds, by clock and processor, and values and steps of every head, interleaved; runs in a fresh process"
    model, ids = prepare(length, layers)
    best, cpu = (dict.fromkeys(("plain", *WAYS), math.inf) for _ in range(2))
    found = {}
    for way in best: run(way, model, ids[:, :128], settings)
    for _ in range(repeats):
        for way in best:
            start, busy = time.perf_counter(), time.process_time()
            frame = run(way, model, ids, settings)
            best[way], cpu[way] = min(best[way], time.perf_counter() - start), min(cpu[way], time.process_time() - busy)
            if frame is not None: found[way] = frame["sigma_a"].to_list(), frame["iterations"].to_list()
    return best, cpu, found


def peak(way: str, length: int, layers: int, settings: tuple) -> float:
    "Peak bytes of one forward over what the warmed-up model holds; runs in a fresh process"
    model, ids = prepare(length, layers)
    tol, _, most = settings
    run(way, model, ids[:, :128], settings)
    return peak_bytes(lambda: run(way, model, ids, (tol, 1, min(most, 3))))


def once(way: str, length: int, layers: int, settings: tuple) -> tuple[float, float, float, list[float]]:
    "Seconds by clock and processor, peak bytes, and values of every head, of one forward; runs in a fresh process"
    model, ids = prepare(length, layers)
    run(way, model, ids[:, :128], settings)
    kept: list[Any] = []
    start, busy = time.perf_counter(), time.process_time()
    memory = peak_bytes(lambda: kept.append(run(way, model, ids, settings)))
    seconds, cpu = time.perf_counter() - start, time.process_time() - busy
    return seconds, cpu, memory, [] if kept[0] is None else kept[0]["sigma_a"].to_list()


def whole(length: int, settings: tuple, layers: int = 22) -> None:
    "All layers of ModernBERT-base: its own section"
    import numpy as np
    import torch
    got = {way: apart(once, way, length, layers, settings) for way in ("plain", "longlens", "lanczos")}
    rows = ["| way | heads | time, the forward included | of the processor | times the first | peak memory |", f"|---|{'---:|' * 5}"]
    for way in ("longlens", "lanczos"):
        seconds, cpu, memory, values = got[way]
        more = (cpu - got["plain"][1]) / (got["longlens"][1] - got["plain"][1])
        rows.append(f"| {WAYS[way]} | {len(values)} | {seconds:.1f} s | {cpu:.1f} s | {more:.1f}x | {memory / 2**20:,.0f} MB |")
    off = float(np.abs(np.array(got["longlens"][3]) / np.array(got["lanczos"][3]) - 1).max())
    threads = f"OMP_NUM_THREADS={n} " if (n := os.environ.get("OMP_NUM_THREADS")) else ""
    text = [f"The same encoder with all {layers} layers, one text of {length:,} tokens, each way once in a process of its own, "
            f"{torch.get_num_threads()} CPU thread(s) ({platform.machine()}), torch {torch.__version__}. A plain forward takes "
            f"{got['plain'][1]:.1f} s of the processor and {got['plain'][2] / 2**20:,.0f} MB; times the first are without it. The two ways "
            f"differ by {off:.0e} at most. `{threads}python benchmarks/spectral_norm.py --whole`.", "", *rows]
    write_section("Spectral norm of attention, all layers", "\n".join(text))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--length", type=int, default=4096, help="tokens of the text")
    p.add_argument("--layers", type=int, default=2, help="layers of the encoder; the first and the fourth see everything")
    p.add_argument("--tol", type=float, default=1e-4, help="residual, as a share of the value")
    p.add_argument("--svd-heads", type=int, default=1, help="heads a layer that the full SVD is taken of")
    p.add_argument("--power-steps", type=int, default=100, help="most steps of the power iteration")
    p.add_argument("--repeats", type=int, default=1)
    p.add_argument("--whole", action="store_true", help="all 22 layers, without the two slowest ways")
    a = p.parse_args()
    settings = (a.tol, a.svd_heads, a.power_steps)
    if a.whole: return whole(a.length, settings)
    seconds, cpu, found = apart(times, a.length, a.layers, a.repeats, settings)
    memory = {w: apart(peak, w, a.length, a.layers, settings) for w in ("plain", *WAYS)}
    report(a, seconds, cpu, found, memory)


def report(a: argparse.Namespace, seconds: dict, cpu: dict, found: dict[str, tuple], memory: dict[str, float]) -> None:
    import numpy as np
    import torch
    values = {w: np.array(v) for w, (v, _) in found.items()}
    done = {w: int((~np.isnan(v)).sum()) for w, v in values.items()}
    a_head = {w: (cpu[w] - cpu["plain"]) / done[w] for w in WAYS}
    head = ("way", "heads", "time, the forward included", "of the processor", "a head", "times the first",
            "steps, median and most", "peak memory", "largest difference from the SVD")
    rows = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for w, name in WAYS.items():
        steps = np.array(found[w][1])
        off = np.nanmax(abs(values[w] / values["svd"] - 1))
        told = "" if w == "svd" else f"{np.median(steps):.0f}, {steps.max():.0f}"
        rows.append(f"| {name} | {done[w]} | {seconds[w]:.1f} s | {cpu[w]:.1f} s | "
                    f"{a_head[w]:.2f} s | {a_head[w] / a_head['longlens']:.1f}x | {told} | "
                    f"{memory[w] / 2**20:,.0f} MB | {'' if w == 'svd' else f'{off:.0e}'} |")
    threads = f"OMP_NUM_THREADS={n} " if (n := os.environ.get("OMP_NUM_THREADS")) else ""
    command = " ".join([f"{threads}python benchmarks/spectral_norm.py", *sys.argv[1:]])
    text = [f"A random encoder of ModernBERT's shape with {a.layers} layer(s), one text of {a.length:,} tokens, float32, residuals below "
            f"{a.tol:g} of the value (the power iteration ends after {a.power_steps} steps at the latest), torch {torch.__version__}, "
            f"{torch.get_num_threads()} CPU thread(s) ({platform.machine()}). A plain forward takes "
            f"{cpu['plain']:.1f} s of the processor and "
            f"{memory['plain'] / 2**20:,.0f} MB. The time a head is processor time without that. `{command}`.", "", *rows]
    write_section("Spectral norm of attention", "\n".join(text))


if __name__ == "__main__": main()
