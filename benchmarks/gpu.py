"""All of longlens on a GPU in one command of under 8 minutes: is every path right, what do exact statistics cost, and where does it go?

In this order, each written down as soon as it is there (benchmarks/RESULTS.md, and a copy in the folder $OUT if that is set):
the paths against float64 on the CPU; one layer's kernels at 8k to 128k tokens, in several tile sizes; a model of an 8B shape with
random weights, plain against all statistics, time and memory; a profile; tests/test_gpu.py and tests/test_triton.py. A part that
fails says why, and the others go on; what would not end in time is left out, and named.

    python benchmarks/gpu.py                       # the whole of it, on one device
    python benchmarks/gpu.py --parts check layer   # some of it
    python benchmarks/gpu.py --try                 # every line of it on a CPU, in Triton's interpreter, at sizes that mean nothing
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_plan import H200, SHAPES, expected
from results import write_section

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("check", "layer", "model", "profile", "tests")
ONE = "rows and columns in one"
NO_DEVICE = 3  # exit status: nothing could be measured
LENGTHS = (8192, 32768, 131072)
TRY = dict(layers=2, heads=4, kv_heads=2, d=16, hidden=64, inner=128, lengths=(128,))
FULL = dict(layers=32, heads=32, kv_heads=8, d=128, hidden=4096, inner=14336, lengths=LENGTHS)


@dataclass
class Bench:
    "What is run, and what has been found so far"
    device: str
    size: dict[str, Any]
    until: float  # time.monotonic() at which it must have ended
    sections: dict[str, list[str]] = field(default_factory=dict)

    @property
    def left(self) -> float: return self.until - time.monotonic()

    def write(self) -> None:
        "Write down what there is"
        text = "\n\n".join("\n".join([f"### {title}", "", *lines]) for title, lines in self.sections.items())
        if (folder := os.environ.get("OUT")): Path(folder, "RESULTS_GPU.md").write_text(text + "\n", encoding="utf-8")
        if self.device == "cuda": write_section("GPU", text)
        else: print(text)

    def part(self, title: str, make: Callable[[Bench], Iterator[str]]) -> None:
        "One part, line by line; what goes wrong in it is written in its place"
        lines = self.sections.setdefault(title, [])
        start = time.monotonic()
        try:
            for text in make(self):
                lines.append(text)
                print(text, flush=True)
                if self.device == "cuda": self.write()
        except Exception as e:
            last = traceback.extract_tb(e.__traceback__)[-1]
            lines += ["", f"**Failed**: {type(e).__name__}: {str(e)[:600]} ({Path(last.filename).name}:{last.lineno})"]
            traceback.print_exc()
        lines += ["", f"({time.monotonic() - start:.0f} s)"]
        if self.device == "cuda": torch.cuda.empty_cache()
        self.write()


def wait(b: Bench) -> None:
    if b.device == "cuda": torch.cuda.synchronize()


def fastest(b: Bench, work: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    "Shortest seconds of each, in turn; the first round compiles and does not count"
    best = dict.fromkeys(work, math.inf)
    for n in range(repeats + 1):
        for name, f in work.items():
            wait(b)
            start = time.perf_counter()
            f()
            wait(b)
            if n: best[name] = min(best[name], time.perf_counter() - start)
    return best


def machine(b: Bench) -> Iterator[str]:
    import triton
    name = torch.cuda.get_device_name() if b.device == "cuda" else "CPU, Triton's interpreter: a try of the script, not a measurement"
    yield f"{name}, torch {torch.__version__}, triton {triton.__version__}. `{' '.join(['python', 'benchmarks/gpu.py', *sys.argv[1:]])}`."


# ---- right?

def check(b: Bench) -> Iterator[str]:
    "Largest differences from float64 on the CPU, relative to the largest number"
    from dataclasses import replace

    from longlens.attention.kernels import attend
    from longlens.attention.masks import causal_mask, full_mask
    from longlens.attention.operator import AttentionOperator, summed_by
    n, past = (300, 77) if b.device == "cuda" else (40, 20)
    keep = torch.ones(2, n + past, dtype=torch.bool)
    keep[0, :past // 2] = False
    cases: dict[str, dict[str, Any]] = {
        "causal, after a cache": dict(mask=causal_mask(past)), "window": dict(mask=causal_mask(past, 50)), "full": dict(mask=full_mask()),
        "soft cap": dict(mask=causal_mask(past), softcap=5.), "padding": dict(mask=replace(causal_mask(past), keep=keep)),
        "learned sinks": dict(mask=causal_mask(past), sinks=torch.tensor([0., 2., -1., 4.])),
    }
    yield "| call | format | output | log-sum-exp | entropy | support | received | distance | top 8 |"
    yield "|---|---|" + "---:|" * 7
    for name, kw in cases.items():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            g = torch.Generator().manual_seed(0)
            qkv = [torch.randn(2, h, m, 64, generator=g).to(dtype) for h, m in ((4, n), (2, n + past), (2, n + past))]
            there = {k: v.to(b.device) if isinstance(v, torch.Tensor) else v for k, v in kw.items()}
            if kw["mask"].keep is not None: there["mask"] = replace(kw["mask"], keep=keep.to(b.device))
            moved = [t.to(b.device) for t in qkv]
            double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kw.items()}
            exact = AttentionOperator(*(t.double() for t in qkv), **double)
            op = AttentionOperator(*moved, **there)
            out, lse = attend(*moved, **there)
            with summed_by("triton"): found = op.entropy(), op.support(), op.received(), op.mean_distance(), op.topk([n - 1], 8)[0]
            want = exact.entropy(), exact.support(), exact.received(), exact.mean_distance(), exact.topk([n - 1], 8)[0]
            pairs = [(out, exact.output), (lse, exact.lse), *zip(found, want, strict=True)]
            off = [float((a.double().cpu() - w).nan_to_num(0, 0, 0).abs().max() / w.nan_to_num(0, 0, 0).abs().max()) for a, w in pairs]
            yield f"| {name} | {str(dtype).partition('.')[2]} | " + " | ".join(f"{x:.0e}" for x in off) + " |"


# ---- one layer

def layer_work(b: Bench, n: int, size: Any = None) -> dict[str, Callable[[], Any]]:
    "The kernels of one layer, by name"
    from longlens.attention.kernels import attend_call
    from longlens.attention.logits import make_call
    from longlens.attention.triton_columns import column_sums
    from longlens.attention.triton_rows import WantedRows, row_sums
    from longlens.attention.triton_tiles import Described
    s, dtype = b.size, torch.bfloat16 if b.device == "cuda" else torch.float32
    make = lambda h: torch.randn(1, n, h, s["d"], device=b.device, dtype=dtype).transpose(1, 2)  # tokens before heads, as in models
    call = make_call(make(s["heads"]), make(s["kv_heads"]), make(s["kv_heads"]))
    about = Described(call, attend_call(call)[1], size)
    sinks = torch.zeros(1, 1, n, 3, device=b.device)
    sinks[:, :, :4, 0] = sinks[:, :, :100, 1] = sinks[:, :, n // 2:n // 2 + 100, 2] = 1
    rows = lambda received: row_sums(about, WantedRows(True, True, True, columns=sinks, received=received))
    return {"attention": lambda: attend_call(call), "rows": lambda: rows(False), "columns": lambda: column_sums(about),
            ONE: lambda: rows(True)}


def layer(b: Bench) -> Iterator[str]:
    "Milliseconds a layer, and the plan's"
    from longlens.attention.triton_tiles import TileSize
    d = b.size["d"]
    sizes = [None, TileSize(128, 128, 8, 2), TileSize(64, 64, 4, 3)] if b.device == "cuda" else [None]
    yield (f"Milliseconds a layer ({b.size['heads']} heads, {b.size['kv_heads']} KV heads, size {d}); `tile` is queries x keys, warps, "
           "tiles on their way.")
    yield ""
    yield "| tokens | tile | attention | rows | columns | rows and columns in one | one / attention |"
    yield "|---:|---|" + "---:|" * 5
    for n in b.size["lengths"]:
        for size in sizes:
            if b.left < 90 and b.device == "cuda": return
            t = fastest(b, layer_work(b, n, size), 2)
            label = "as chosen" if size is None else f"{size.m} x {size.n}, {size.warps}, {size.stages}"
            yield f"| {n:,} | {label} | " + " | ".join(f"{1e3 * s:,.2f}" for s in t.values()) + f" | {t[ONE] / t['attention']:.2f} |"
        if b.device == "cuda":
            plan = {k: 1e3 * v / SHAPES["8B"].layers for k, (_, v) in expected(SHAPES["8B"], n, H200).items()}
            planned = [plan[x] for x in ("attention", "rows", "columns", "both in one")]
            yield f"| {n:,} | *the plan, H200* | " + " | ".join(f"{x:,.2f}" for x in planned) + " | |"


# ---- a model

def model_of(b: Bench) -> Any:
    "Random weights in an 8B shape, drawn on the device"
    from transformers import LlamaConfig, LlamaForCausalLM

    from longlens import load
    s = b.size
    config = LlamaConfig(
        num_hidden_layers=s["layers"], hidden_size=s["hidden"], num_attention_heads=s["heads"], intermediate_size=s["inner"],
        num_key_value_heads=s["kv_heads"], vocab_size=32000, max_position_embeddings=2**20, rope_theta=500000., bos_token_id=1,
        eos_token_id=2)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        if b.device == "cuda": torch.set_default_dtype(torch.bfloat16)
        with torch.device(b.device): hf = LlamaForCausalLM(config).eval()
    finally: torch.set_default_dtype(before)
    return load(hf)


def forwards(lm: Any, ids: torch.Tensor, chunk: int) -> dict[str, Callable[[], Any]]:
    import longlens as ll
    from longlens.measure.statistics import MassiveActivations

    def all_of_them() -> None:
        with ll.capture(lm, ll.SinkMass(4), ll.Entropy(), ll.Support(), ll.Distance(), ll.Received(), ll.ValueNorm(), ll.ResidualNorm(),
                        ll.SpanMass({"first": (0, 100), "middle": (100, 120)}), MassiveActivations()) as seen: lm.prefill(ids, chunk=chunk)
        assert seen.groups
    return {"plain": lambda: lm.prefill(ids, chunk=chunk), "all statistics": all_of_them}


def peak(b: Bench, f: Callable[[], Any]) -> float:
    "Bytes over what is held before"
    if b.device != "cuda": return math.nan
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    return float(torch.cuda.max_memory_allocated() - before)


def model(b: Bench) -> Iterator[str]:
    "Plain forward against all statistics"
    lm = model_of(b)
    count = sum(p.numel() for p in lm.hf.parameters())
    yield (f"Random-weight Llama of {count / 1e9:.2f} billion parameters, {lm.hf.dtype}, chunked prefill. Targets: at most 1.5x the time, "
           "1.1x the memory, 128k within 30 s.")
    yield ""
    yield "| tokens | chunk | plain | all statistics | ratio | memory, plain | all statistics | ratio |"
    yield "|---:|---:|" + "---:|" * 6
    last = 0.
    with torch.no_grad():
        for n in b.size["lengths"]:
            if b.device == "cuda" and b.left < 100 + 24 * last:  # four times as many tokens: up to 16 times the time, twice over
                yield f"| {n:,} | | *left out: {b.left:.0f} s are left* | | | | | |"
                continue
            chunk = min(n, 16384 if b.device == "cuda" else 64)
            work = forwards(lm, torch.randint(3, 32000, (n,), generator=torch.Generator().manual_seed(1)), chunk)
            t = fastest(b, work, 1 if n > 40000 else 2)
            memory = {name: peak(b, f) for name, f in work.items()}
            last = t["all statistics"]
            held, all_held = (x / 2**30 for x in memory.values())
            yield (f"| {n:,} | {chunk:,} | {t['plain']:.2f} s | {last:.2f} s | {last / t['plain']:.2f}x | {held:.2f} GiB | "
                   f"{all_held:.2f} GiB | {all_held / held:.2f}x |")
    b.size["lm"] = lm


def profile(b: Bench) -> Iterator[str]:
    "Where the time of all statistics goes, kernel by kernel"
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record
    lm = b.size.pop("lm", None) or model_of(b)
    n = b.size["lengths"][min(1, len(b.size["lengths"]) - 1)]
    work = forwards(lm, torch.randint(3, 32000, (n,), generator=torch.Generator().manual_seed(1)), min(n, 16384))
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if b.device == "cuda" else [])
    with torch.no_grad(), record(activities=activities) as found:
        work["all statistics"]()
        wait(b)
    of = (lambda e: e.self_device_time_total) if b.device == "cuda" else (lambda e: e.self_cpu_time_total)
    events = sorted(found.key_averages(), key=of, reverse=True)
    total = sum(map(of, events))
    yield f"{n:,} tokens, all statistics; self time on the device."
    yield ""
    yield "| kernel | calls | ms | of all |"
    yield "|---|---:|---:|---:|"
    for e in events[:12]: yield f"| `{e.key[:70].replace('|', ' ')}` | {e.count} | {of(e) / 1e3:,.1f} | {of(e) / total:.1%} |"
    from longlens.attention.triton_rows import rows_kernel
    for made in (m for cache in getattr(rows_kernel, "device_caches", {}).values() for m in cache[0].values()):
        yield (f"\nThe slowest of ours, `{made.name}`: {made.n_regs} registers, {made.n_spills} spilled, "
               f"{made.metadata.shared:,} bytes shared.")
        break


# ---- the tests

def tests(b: Bench) -> Iterator[str]:
    "Passed and failed"
    seconds = max(20., b.left - 15)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py", "tests/test_triton.py"]
    if b.device != "cuda": command = [*command[:-1], "-k", "refused or counts"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    try: done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, env=env)
    except subprocess.TimeoutExpired as e:
        yield f"Not ended after {seconds:.0f} s; so far: `{str(e.stdout or b'')[-300:]}`"
        return
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:] or "nothing was said"]
    yield f"`{' '.join(command[1:])}`: {lines[-1]}"
    for text in [x for x in lines if x.startswith(("FAILED", "ERROR"))][:20]: yield f"- {text[:200]}"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--minutes", type=float, default=7.5, help="in which it has to end")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    p.add_argument("--lengths", type=int, nargs="+", help="tokens")
    p.add_argument("--try", dest="trial", action="store_true", help="on a CPU, at sizes that mean nothing")
    a = p.parse_args()
    if not torch.cuda.is_available() and not a.trial:
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build for CPUs only"
        print(f"No CUDA device: torch {torch.__version__} is {build}, and sees none. Nothing was measured; RESULTS.md is as it was. "
              "`python benchmarks/gpu.py --try` runs every part on the CPU, which shows that it runs, and no times.", file=sys.stderr)
        return NO_DEVICE
    if a.trial: os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    size = dict(TRY if a.trial else FULL)
    if a.lengths: size["lengths"] = tuple(a.lengths)
    b = Bench("cpu" if a.trial else "cuda", size, time.monotonic() + 60 * a.minutes)
    titles = {"check": ("Right?", check), "layer": ("One layer", layer), "model": ("A model", model), "profile": ("Profile", profile),
              "tests": ("Tests", tests)}
    b.part("Machine", machine)
    for name in a.parts: b.part(*titles[name])
    return int(any("**Failed**" in x for lines in b.sections.values() for x in lines))


if __name__ == "__main__": sys.exit(main())
