"""Sink_k of sail-sg/Attention-Sink (arXiv 2410.10781) on the same 64-token sequences, with its own functions.

python benchmarks/agreement/attention_sink.py --repo CHECKOUT
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import TEXT, Comparison, apart, arguments, commit_of, functions, smollm2

FILE, SEQUENCES = "eval_sink_open_source.py", 20


class Ready(dict):
    "What a tokenizer gives, where the tokens are known"

    def to(self, device: Any) -> Ready:
        return self


def sink_rates(module: Any, lm: Any, ids: torch.Tensor) -> np.ndarray:  # percent, (T,)
    "The published metric from its own two functions: patterns by generate(), then the metric on them"
    read = lambda row, return_tensors: Ready(input_ids=row[None], attention_mask=torch.ones_like(row[None]))
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "attention.npy")
        module.measure_attention_sink(lm.hf, read, list(ids), path, ids.shape[1], torch.device("cpu"))
        return module.compute_attention_sink(path, 0.3).numpy()


def main() -> None:
    from longlens.probes.sinks.metrics import SinkSettings, made_sequences, metric_frame, natural_sequences

    a = arguments(__doc__, "sail-sg/Attention-Sink")
    lm, settings = smollm2(a), SinkSettings(sequences=SEQUENCES)
    module = functions(a.repo / FILE, "measure_attention_sink", "compute_attention_sink", np=np, torch=torch, tqdm=lambda x: x)
    text = lm.tokens(TEXT.read_text(encoding="utf-8"))
    kinds = {"natural": natural_sequences(lm, [text], settings), **made_sequences(lm, settings)}
    c = Comparison(
        "attention_sink",
        "Attention-Sink",
        f"sail-sg/Attention-Sink at {commit_of(a.repo)}, `{FILE}`",
        "`measure_attention_sink` (eager patterns by `generate`) and `compute_attention_sink`, as they are.",
    )
    frame = metric_frame(lm, kinds, settings)
    lm.hf.set_attn_implementation("eager")
    for kind, ids in kinds.items():
        theirs, mine = sink_rates(module, lm, ids), frame.filter(kind=kind).sort("k")
        ours = mine["sink_rate"].to_numpy()
        c.add(
            f"Sink_1, {kind} tokens",
            f"{len(ids)} sequences of {ids.shape[1]}",
            f"{theirs[0]:.4f} %",
            f"{ours[0]:.4f} %",
            apart(theirs[0], ours[0]),
        )
        c.add(
            f"Sink_k for every k, {kind} tokens",
            "the same",
            f"sum {theirs.sum():.4f}",
            f"sum {ours.sum():.4f}",
            apart(theirs, ours),
            ""
            if np.allclose(theirs, ours, atol=1e-3)
            else f"the last keys: theirs {theirs[-2:].round(2).tolist()}, ours {ours[-2:].round(2).tolist()}",
        )
    c.write()


if __name__ == "__main__":
    main()
