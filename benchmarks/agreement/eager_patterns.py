"""Every statistic of longlens beside the same number out of the formed attention patterns of transformers.

python benchmarks/agreement/eager_patterns.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import Comparison, apart, arguments, smollm2, text_ids

N, SINK, WINDOW = 512, 4, 64


def formed(lm: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # (layers, heads, n, n), (n, vocab)
    "Patterns and logits of eager attention"
    lm.hf.set_attn_implementation("eager")
    with torch.no_grad():
        out = lm.hf(ids[None], output_attentions=True)
    lm.hf.set_attn_implementation("sdpa")
    return torch.cat(out.attentions), out.logits[0]


def reduced(P: torch.Tensor) -> dict[str, np.ndarray]:
    "What the statistics mean, in float64, layer by layer"
    n = P.shape[-1]
    i, j = torch.arange(n)[:, None], torch.arange(n)
    out: dict[str, list[torch.Tensor]] = {}
    for p in P:
        p = p.double()
        each = {
            "entropy, nats": -(p * p.clamp_min(1e-300).log()).sum(-1).mean(-1),
            "effective support, keys": (1 / (p**2).sum(-1)).mean(-1),
            f"attention to the first {SINK} tokens": p[..., :SINK].sum(-1).mean(-1),
            "mean distance, tokens": (p * (i - j)).sum(-1).mean(-1),
            f"attention to the last {WINDOW} tokens": p.masked_fill(i - j >= WINDOW, 0).sum(-1).mean(-1),
            "attention received by every token": p.sum(-2),
        }
        for name, x in each.items():
            out.setdefault(name, []).append(x)
    return {name: torch.stack(x).numpy() for name, x in out.items()}


def measured(lm: Any, ids: torch.Tensor) -> tuple[list[np.ndarray], torch.Tensor, np.ndarray]:
    "The same with longlens, in the same order; logits, and the key that each head looks at most in the last 50 rows"
    import longlens as ll

    few = range(len(ids) - 50, len(ids))
    by = {
        ll.Entropy(): "entropy",
        ll.Support(): "support",
        ll.SinkMass(SINK): "sink_mass",
        ll.Distance(): "mean_distance",
        ll.DistanceProfile((WINDOW,)): "mass",
    }
    with ll.capture(lm, *by, ll.Received(), ll.Rows(few, top=1)) as seen:
        logits = lm.logits(ids)

    def column(name: str, of: str) -> np.ndarray:
        return seen.frame(name).sort("layer", "head")[of].to_numpy().reshape(lm.n_layers, lm.n_heads)

    received = torch.cat(seen.tensors("received", "received"), 1)[:, 0].numpy()
    return [*(column(s.name, of) for s, of in by.items()), received], logits, seen.top_keys()[0][..., 0].numpy()


def main() -> None:
    a = arguments(__doc__)
    lm = smollm2(a)
    ids = text_ids(lm, N)
    P, logits = formed(lm, ids)
    want, (got, ours, looked) = reduced(P), measured(lm, ids)
    import transformers

    c = Comparison(
        "eager_patterns",
        "Eager patterns of transformers",
        f"transformers {transformers.__version__}, installed",
        "`output_attentions=True` with eager attention; the statistics are computed from the formed matrices in float64.",
    )
    on = f"{N} tokens of English, {P.shape[0]} x {P.shape[1]} heads"
    for (name, theirs), mine in zip(want.items(), got, strict=True):
        c.add(
            name,
            on,
            f"mean {theirs.mean():.6g}",
            f"mean {mine.mean():.6g}",
            apart(theirs, mine),
            f"largest value {theirs.max():.4g}",
        )
    theirs = P[..., -50:, :].argmax(-1).numpy()
    c.add(
        "the key each head looks at most, last 50 rows",
        on,
        f"{theirs.size:,} positions",
        f"{looked.size:,} positions",
        f"{(theirs != looked).sum()} differ",
    )
    c.add(
        "logits of every token",
        on,
        f"mean {logits.mean():.6g}",
        f"mean {ours.mean():.6g}",
        apart(logits, ours),
        f"largest {logits.abs().max():.4g}",
    )
    c.write()


if __name__ == "__main__":
    main()
