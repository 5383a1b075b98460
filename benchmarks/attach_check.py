"""What the comparison costs that the first `attach` to a model makes: the beginning of a forward of three tokens, once per model.

needle-lm, and the small random Llama of attention_cost.py. One process, interleaved: a forward of 2,048 tokens, attaching for the first
time, and attaching again, in seconds of the processor, which other programs disturb less. The fastest of each counts.

    python benchmarks/attach_check.py           # less than a minute
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Callable

from attention_cost import Setting, load_model
from results import apart, write_section


def seconds(f: Callable[[], object]) -> float:
    start = time.process_time()
    f()
    return time.process_time() - start


def measured(model: str, length: int, repeats: int) -> dict[str, float]:
    "The fastest seconds (of the processor) of each; runs in a fresh process"
    import torch

    import longlens as ll
    from longlens.attention import hf_interface
    lm = ll.load() if model == "needle-lm" else load_model(Setting(model, "cpu", "float32", None))
    ids = torch.randint(10, lm.n_embeddings - 10, (length,), generator=torch.Generator().manual_seed(0))
    best: dict[str, float] = {}

    def attach() -> None:
        with hf_interface.attach(lm): pass

    def first() -> None:
        hf_interface._COMPARED.clear()
        attach()
    ways: dict[str, Callable[[], object]] = {"forward": lambda: lm(ids, logits_to_keep=1), "first": first, "again": attach}
    for way in ways.values(): way()
    for _ in range(repeats):
        for name, way in ways.items(): best[name] = min(best.get(name, math.inf), seconds(way))
    return best


def main() -> None:
    import torch
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--length", type=int, default=2048, help="tokens of the forward")
    p.add_argument("--repeats", type=int, default=20)
    a = p.parse_args()
    threads = f"OMP_NUM_THREADS={n} " if (n := os.environ.get("OMP_NUM_THREADS")) else ""
    command = " ".join([f"{threads}python benchmarks/attach_check.py", *sys.argv[1:]])
    text = [f"float32, torch {torch.__version__}, {torch.get_num_threads()} CPU thread(s) ({platform.machine()}). The first time that a "
            "model is attached to, three tokens run through it until a layer of each kind has been computed by its own function and by "
            "longlens, which must agree; later it is remembered. Seconds of the processor, with other programs at work: the last column, a "
            f"ratio taken side by side, is what counts. `{command}`.",
            "", f"| model | forward of {a.length:,} tokens | attach, the first time | attach, later | the comparison | of a forward |",
            "|---|---:|---:|---:|---:|---:|"]
    for model, name in (("needle-lm", "needle-lm (5 layers, width 128)"), ("small", "random Llama (4 layers, width 512)")):
        t = apart(measured, model, a.length, a.repeats)
        cost = t["first"] - t["again"]
        ms = {way: 1e3 * s for way, s in t.items()}
        text.append(f"| {name} | {ms['forward']:.0f} ms | {ms['first']:.1f} ms | {ms['again']:.1f} ms | {1e3 * cost:.1f} ms | "
                    f"{100 * cost / t['forward']:.1f} % |")
    write_section("The check when attaching", "\n".join(text))


if __name__ == "__main__": main()
