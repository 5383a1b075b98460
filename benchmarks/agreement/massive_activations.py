"""Largest and median magnitudes after every layer, with the custom layer of locuslab/massive-activations (arXiv 2402.17762).

python benchmarks/agreement/massive_activations.py --repo CHECKOUT
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import polars as pl
import torch
from common import Comparison, apart, arguments, commit_of, functions, smollm2, text_ids

FILE = "monkey_patch/modify_llama.py"
SENTENCE = "Summer is warm. Winter is cold."


def layerwise(lm: Any, ids: torch.Tensor) -> np.ndarray:  # (layers, 4)
    "Three largest magnitudes and their median, as experiment 2 of main_llm.py computes them from `feat`"
    with torch.no_grad():
        lm.hf(ids[None], use_cache=False)
    rows = []
    for layer in lm.hf.model.layers:
        sizes = layer.feat.abs()
        rows.append([*torch.sort(sizes.flatten(), descending=True).values[:3].tolist(), float(torch.median(sizes))])
    return np.array(rows)


def measured(lm: Any, ids: torch.Tensor) -> tuple[np.ndarray, pl.DataFrame]:
    "The same with longlens"
    import longlens as ll
    from longlens.measure.statistics import MassiveActivations

    with ll.capture(lm, MassiveActivations()) as seen:
        lm.prefill(ids)
    f = seen.frame("massive_activations").sort("layer", "rank")
    return np.column_stack([f["value"].abs().to_numpy().reshape(-1, 3), f["median"].to_numpy().reshape(-1, 3)[:, 0]]), f


def main() -> None:
    a = arguments(__doc__, "locuslab/massive-activations")
    lm = smollm2(a)
    inputs = {
        f"“{SENTENCE}”, {len(lm.tokens(SENTENCE))} tokens": lm.tokens(SENTENCE).ids,
        "512 tokens of English": text_ids(lm, 512),
    }
    ours = [measured(lm, ids) for ids in inputs.values()]
    changes = [
        (
            "hidden_states, self_attn_weights, present_key_value = self.self_attn(",
            "hidden_states, self_attn_weights = self.self_attn(",
        ),
        ("outputs += (present_key_value,)", "pass"),
        ("outputs = (hidden_states,)", "outputs = hidden_states"),
        (
            "        past_key_value=past_key_value,\n        output_attentions=output_attentions,\n        use_cache=use_cache,\n"
            "        **kwargs,\n    )\n\n    if residual",
            "        **kwargs,\n    )\n\n    if residual",
        ),
    ]
    module = functions(
        a.repo / FILE,
        "llama_custom_decoderlayer_forward",
        "enable_llama_custom_decoderlayer",
        change=changes,
        torch=torch,
        types=types,
        Optional=Any,
        Tuple=tuple,
    )
    for i, layer in enumerate(lm.hf.model.layers):
        module.enable_llama_custom_decoderlayer(layer, i)
    c = Comparison(
        "massive_activations",
        "massive-activations",
        f"locuslab/massive-activations at {commit_of(a.repo)}, `{FILE}`",
        "`llama_custom_decoderlayer_forward` in place of every layer's forward, with the call of the attention and what a layer "
        "returns written as transformers 5 has them; sort and median as `main_llm.py`, experiment 2.",
    )
    for (on, ids), (mine, frame) in zip(inputs.items(), ours, strict=True):
        theirs = layerwise(lm, ids)
        at = int(theirs[:, 0].argmax())
        where = frame.filter((pl.col("layer") == at) & (pl.col("rank") == 1)).row(0, named=True)
        c.add(
            "largest magnitude of any layer",
            on,
            f"{theirs[:, 0].max():,.2f}, layer {at}",
            f"{mine[:, 0].max():,.2f}, layer {mine[:, 0].argmax()}",
            apart(theirs[:, 0].max(), mine[:, 0].max()),
            f"at token {where['position']}, dimension {where['dim']}",
        )
        rel = np.abs(theirs - mine) / theirs
        c.add(
            "three largest of every layer",
            on,
            f"mean {theirs[:, :3].mean():.4f}",
            f"mean {mine[:, :3].mean():.4f}",
            f"{rel[:, :3].max():.1e} of the value at most, of {rel[:, :3].size} numbers",
        )
        c.add(
            "median of every layer",
            on,
            f"mean {theirs[:, 3].mean():.6f}",
            f"mean {mine[:, 3].mean():.6f}",
            apart(theirs[:, 3], mine[:, 3]),
        )
    c.write()


if __name__ == "__main__":
    main()
