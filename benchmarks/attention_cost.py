"""What exact attention statistics cost: a plain forward, longlens with all statistics, and the tools that form the patterns.

One run compares them side by side: the same random-weight Llama, the same tokens, the same process settings. Times are
interleaved (plain, longlens, plain, ...) in one process and the fastest of each counts; memory is the peak of a fresh process
for each, over what the loaded and warmed-up model needs by itself. Results go to benchmarks/RESULTS.md.

    python benchmarks/attention_cost.py                       # 1,024 to 16,384 tokens on the CPU, about 25 minutes on two cores
    python benchmarks/attention_cost.py --lengths 1024 4096   # a quick look
    python benchmarks/attention_cost.py --device cuda --dtype bfloat16 --shape llama-3-8b --lengths 8192 32768 131072 --chunk 4096
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from results import apart, peak_bytes, write_section

LIMIT = 6 * 2**30  # bytes: a method that needs more is not run
SHAPES = {
    "small": dict(num_hidden_layers=4, hidden_size=512, num_attention_heads=8, num_key_value_heads=8, intermediate_size=1408,
                  vocab_size=4096),
    "llama-3-8b": dict(num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
                       vocab_size=128256, rope_theta=500000.0),
}


@dataclass(frozen=True)
class Setting:
    "What is run"
    shape: str
    device: str
    dtype: str
    chunk: int | None


def load_model(s: Setting) -> Any:
    "A LongModel with random weights"
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from longlens import load
    from longlens.needle_lm.data import needle_tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[s.shape], max_position_embeddings=2**20, bos_token_id=1, eos_token_id=2)
    with torch.device(s.device):
        torch.set_default_dtype(getattr(torch, s.dtype))
        hf = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    return load(hf, needle_tokenizer())  # TransformerLens wants one; any will do


def statistics(names: list[str] | None = None) -> list:
    "All built-in statistics that look at the whole pattern, or the named ones"
    import longlens as ll
    from longlens.measure.statistics import MassiveActivations
    every = [ll.SinkMass(4), ll.Entropy(), ll.Support(), ll.Distance(), ll.Received(), ll.ValueNorm(), ll.ResidualNorm(),
             ll.SpanMass({"first": (0, 100), "middle": (400, 500)}), MassiveActivations()]
    return [x for x in every if names is None or type(x).__name__ in names]


def run(method: str, lm: Any, ids: Any, chunk: int | None, only: list[str] | None = None) -> None:
    "One forward by one of the methods"
    import torch

    from longlens import capture
    forward = partial(lm.prefill, ids, chunk=chunk) if chunk else partial(lm, ids, logits_to_keep=1)
    with torch.no_grad():
        if method == "sdpa": forward()
        elif method == "longlens":
            with capture(lm, *statistics(only)) as seen: forward()
            assert seen.groups
        elif method == "eager":
            lm.hf.set_attn_implementation("eager")
            out = lm(ids, logits_to_keep=1, output_attentions=True)
            lm.hf.set_attn_implementation("sdpa")
            assert len(out.attentions) == lm.n_layers
        elif method == "bridge":
            _, cache = lm.bridge.run_with_cache(ids[None], names_filter=lambda name: name.endswith("hook_pattern"), return_type=None)
            assert len(cache) == lm.n_layers


def prepare(s: Setting, n: int) -> tuple[Any, Any]:
    import torch
    lm = load_model(s)
    ids = torch.randint(3, lm.vocab_size, (n,), generator=torch.Generator().manual_seed(1))
    return lm, ids


def peak(s: Setting, method: str, n: int) -> float:
    "Peak bytes of one forward over what the warmed-up model holds; runs in a fresh process"
    lm, ids = prepare(s, n)
    run(method, lm, ids[:256], s.chunk)
    if s.device == "cuda":
        import torch
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(method, lm, ids, s.chunk)
        return torch.cuda.max_memory_allocated() - before
    return peak_bytes(partial(run, method, lm, ids, s.chunk))


def times(s: Setting, methods: dict[str, list[str] | None], n: int, repeats: int) -> dict[str, float]:
    "Fastest seconds of each method, interleaved; `methods` is name -> statistics (None: all); runs in a fresh process"
    lm, ids = prepare(s, n)
    best = dict.fromkeys(methods, math.inf)
    for _ in range(repeats):
        for name, only in methods.items():
            start = time.perf_counter()
            run(name.split(":")[0], lm, ids, s.chunk, only)
            if s.device == "cuda": __import__("torch").cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def needs(method: str, n: int, shape: str) -> int:
    "Bytes of the patterns a method keeps, in float32"
    c = SHAPES[shape]
    return 0 if method in ("sdpa", "longlens") else 4 * c["num_hidden_layers"] * c["num_attention_heads"] * n * n


def slope(lengths: list[int], values: list[float]) -> float:
    "Exponent of n in a power law fitted by least squares"
    x, y = [math.log(n) for n in lengths], [math.log(max(v, 1e-9)) for v in values]    # a peak may be 0 bytes
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


NAMES = {"sdpa": "plain forward (sdpa)", "longlens": "longlens, all statistics", "eager": "eager, output_attentions",
         "bridge": "TransformerBridge, patterns"}


def table(rows: list[dict], value: str, unit: str, scale: float, digits: int) -> list[str]:
    "Markdown: a row for each method, a column for each length; absolute values, and the ratio to the plain forward"
    lengths = sorted({r["n"] for r in rows})
    at = {(r["method"], r["n"]): r[value] for r in rows}
    out = ["| method | " + " | ".join(f"n = {n:,}" for n in lengths) + " | exponent |", "|---|" + "---:|" * (len(lengths) + 1)]
    for m, name in NAMES.items():
        have = [n for n in lengths if (m, n) in at]
        said = {n: f"{at[m, n] / scale:,.{digits}f} {unit} ({at[m, n] / at['sdpa', n]:.2f}x)" for n in have}
        cells = [said.get(n, f"over {LIMIT >> 30} GB") for n in lengths]
        exponent = f"{slope(have, [at[m, n] for n in have]):.2f}" if len(have) > 1 else ""
        out.append(f"| {name} | " + " | ".join(cells) + f" | {exponent} |")
    return out


def own_costs(s: Setting, n: int, repeats: int) -> list[str]:
    "Markdown: what each statistic costs when it is the only one"
    names = [type(x).__name__ for x in statistics()]
    t = apart(times, s, {"sdpa": None, **{f"longlens:{x}": [x] for x in names}, "longlens": None}, n, repeats)
    out = [f"| captured, n = {n:,} | time, as a multiple of the plain forward |", "|---|---:|"]
    return out + [f"| {k.partition(':')[2] or 'all of them'} | {v / t['sdpa']:.2f}x |" for k, v in t.items() if k != "sdpa"]


def measure(s: Setting, n: int, repeats: int) -> list[dict]:
    "Seconds and peak bytes of every method that fits, at one length"
    fits = [m for m in NAMES if needs(m, n, s.shape) <= LIMIT and not (s.device == "cuda" and m in ("eager", "bridge") and n > 8192)]
    seconds = apart(times, s, dict.fromkeys(fits), n, repeats)
    rows = [{"method": m, "n": n, "seconds": seconds[m], "bytes": apart(peak, s, m, n)} for m in fits]
    for r in rows: print(f"{r['method']:9} n {n:6,}  {r['seconds']:8.3f} s  {r['bytes'] / 2**20:9,.1f} MB", flush=True)
    return rows


def command() -> str:
    "How this script was called"
    threads = [f"OMP_NUM_THREADS={n}"] if (n := os.environ.get("OMP_NUM_THREADS")) else []
    return " ".join([*threads, "python benchmarks/attention_cost.py", *sys.argv[1:]])


def report(s: Setting, rows: list[dict], own: list[str]) -> None:
    "Write what has been measured so far"
    import torch
    where = torch.cuda.get_device_name() if s.device == "cuda" else f"{torch.get_num_threads()} CPU thread(s) ({platform.machine()})"
    shape = ", ".join(f"{k.removeprefix('num_').replace('_', ' ')} {v}" for k, v in SHAPES[s.shape].items())
    text = [f"Random-weight Llama ({shape}), {s.dtype}, torch {torch.__version__}, {where}. Ratios are to the plain forward of the same "
            f"length. `{command()}`, settings {asdict(s)}.",
            "", "Time of one forward:", "", *table(rows, "seconds", "s", 1, 2),
            "", "Peak memory over the loaded model:", "", *table(rows, "bytes", "MB", 2**20, 0), "",
            "Each statistic by itself. These times, and the plain forward they "
            "are multiples of, were measured after one another in a part of the run of their own: how far \"all of them\" is from the same "
            "length above says how much times of this machine vary.", "", *own]
    write_section(f"Cost of attention statistics ({s.device}, {s.shape})", "\n".join(text))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], help="tokens")
    p.add_argument("--shape", choices=SHAPES, default="small")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--chunk", type=int, help="run as a chunked prefill")
    p.add_argument("--own", type=int, default=4096, help="tokens for the cost of each statistic by itself")
    p.add_argument("--repeats", type=int, default=3)
    a = p.parse_args()
    s = Setting(a.shape, a.device, a.dtype, a.chunk)
    rows: list[dict] = []
    own = own_costs(s, a.own, a.repeats)
    for n in a.lengths:
        rows += measure(s, n, a.repeats)
        report(s, rows, own)


if __name__ == "__main__": main()
