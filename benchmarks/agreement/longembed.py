"""LongEmbed (dwzhu-pku/LongEmbed, arXiv 2404.12096): poolings on states of SmolLM2, positions of longer texts, SelfExtend's positions.

python benchmarks/agreement/longembed.py --repo CHECKOUT
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from common import SENTENCES, Comparison, apart, arguments, commit_of, functions, smollm2

KNOWN, LENGTHS = 512, (300, 512, 700, 1024, 1500, 4096)
POOLS = {"avg": "mean", "weightedavg": "weightedmean", "cls": "cls", "last": "lasttoken"}


def states(lm: Any) -> tuple[torch.Tensor, torch.Tensor]:  # (batch, n, d), (batch, n)
    "Last hidden states of texts of different lengths, padded on the right"
    texts = ["".join(SENTENCES[:k]).strip() for k in (1, 4, 10)]
    tok = lm.tokenizer
    tok.padding_side, tok.pad_token = "right", tok.pad_token or tok.eos_token
    batch = tok(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = lm.hf.model(**batch, use_cache=False).last_hidden_state
    return out, batch["attention_mask"]


def main() -> None:
    from longlens.encoders.pooling import Pooling
    from longlens.interventions.extend import Grouped, Interpolated, Recurrent

    a = arguments(__doc__, "dwzhu-pku/LongEmbed")
    lm = smollm2(a)
    pool = functions(a.repo / "src/utils.py", "pool", Tensor=torch.Tensor, torch=torch).pool
    places = functions(
        a.repo / "src/encoder_model.py", "get_position_ids", Tensor=torch.Tensor, torch=torch, math=math
    ).get_position_ids
    c = Comparison(
        "longembed",
        "LongEmbed",
        f"dwzhu-pku/LongEmbed at {commit_of(a.repo)}, `src/utils.py` and `src/encoder_model.py`",
        "`pool` and `get_position_ids`, as they are.",
    )
    hidden, mask = states(lm)
    for theirs, ours in POOLS.items():
        want, got = pool(hidden, mask.clone(), theirs), Pooling(ours)(hidden, mask)
        c.add(
            f"pooling {theirs} (longlens: {ours})",
            f"3 texts, {', '.join(map(str, mask.sum(1).tolist()))} tokens",
            f"mean length {want.norm(dim=1).mean():.5f}",
            f"mean length {got.norm(dim=1).mean():.5f}",
            apart(want, got),
        )
    kinds = {"recurrent": Recurrent, "group": Grouped, "interpolate": Interpolated}
    for mode, kind in kinds.items():
        want = [places(torch.zeros(1, n), mode, KNOWN, 4096)[0].numpy() for n in LENGTHS]
        what = kind(length=4096, trained=KNOWN)
        got = [what.rows(torch.arange(n)[None], torch.tensor([[n]]))[0].numpy() for n in LENGTHS]
        scale = 4096 // KNOWN if mode == "interpolate" else 1
        off = [apart(x / scale, y) for x, y in zip(want, got, strict=True)]
        note = (
            "theirs counts in a table of 4,096 rows made by interpolation, ours in the 512 rows that were learned"
            if scale > 1
            else ""
        )
        long = [i for i, n in enumerate(LENGTHS) if scale == 1 or n <= KNOWN]
        if scale > 1:
            note += (
                "; a text of 512 tokens or less keeps its own rows in both"
                if all(np.allclose(want[i] / scale, got[i]) for i in long)
                else "; short texts differ"
            )
        worst = max(off, key=lambda x: float(x.split()[0]))
        c.add(
            f"positions, {mode}",
            f"texts of {', '.join(f'{n:,}' for n in LENGTHS)} tokens, {KNOWN} rows learned",
            f"up to {max(x.max() for x in want) / scale:g}",
            f"up to {max(x.max() for x in got):g}",
            worst,
            note,
        )
    c.not_run.append(
        "its encoders and its tasks: E5 and E5-RoPE weights and the data are on the hub, and its encoder class calls `.cuda()`"
    )
    c.not_run.append(
        "`self_extend_patch.py`, which is written for e5rope and Mistral classes of transformers 4 with flash attention"
    )
    c.write()


if __name__ == "__main__":
    main()
