"""Patterns and head scores of TransformerLens beside those of longlens, on a bridge over the same weights.

python benchmarks/agreement/transformerlens.py
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from common import Comparison, apart, arguments, smollm2

PERIOD, SEED = 64, 0


def patterns(lm: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # (layers, heads, n, n), (n, vocab)
    "What the hooks of the bridge see"
    with torch.no_grad():
        logits, cache = lm.bridge.run_with_cache(ids[None], names_filter=lambda name: name.endswith("hook_pattern"))
    return torch.cat([cache[f"blocks.{i}.attn.hook_pattern"] for i in range(lm.n_layers)]), logits[0]


def main() -> None:
    from transformer_lens import head_detector as tl

    import longlens as ll
    from longlens.probes.heads.scores import _repeated, pattern_scores

    a = arguments(__doc__)
    lm = smollm2(a)
    ids = _repeated(lm, PERIOD, 1, SEED)[0]
    P, logits = patterns(lm, ids)
    c = Comparison(
        "transformerlens",
        "TransformerLens",
        f"transformer-lens {version('transformer-lens')}, installed",
        "`TransformerBridge` over the same weights (`lm.bridge`), its hooks, and the functions of `head_detector`.",
    )
    on = f"{PERIOD} random tokens twice, {len(ids)} with the first"
    with ll.capture(lm, ll.Received(), ll.Entropy()) as seen:
        mine = lm.logits(ids)
    received = torch.cat(seen.tensors("received", "received"), 1)[:, 0]
    entropy = seen.frame("entropy").sort("layer", "head")["entropy"].to_numpy().reshape(lm.n_layers, -1)
    wanted = -(P.double() * P.double().clamp_min(1e-300).log()).sum(-1).mean(-1).numpy()
    c.add(
        "attention received by every token, out of hook_pattern",
        on,
        f"largest {P.sum(-2).max():.5f}",
        f"largest {received.max():.5f}",
        apart(P.sum(-2), received),
    )
    c.add(
        "entropy, out of hook_pattern",
        on,
        f"mean {wanted.mean():.6f} nats",
        f"mean {entropy.mean():.6f} nats",
        apart(wanted, entropy),
    )
    c.add("logits of the bridge", on, f"mean {logits.mean():.6f}", f"mean {mine.mean():.6f}", apart(logits, mine))
    mine_scores = pattern_scores(lm, PERIOD, 1, SEED)
    for name, title, note in HEADS:
        D = getattr(tl, f"get_{name}_detection_pattern")(ids[None])
        how = dict(exclude_bos=False, exclude_current_token=False, error_measure="mul")
        theirs = np.array(
            [[tl.compute_head_attention_similarity_score(head, detection_pattern=D, **how) for head in layer] for layer in P]
        )
        ours = mine_scores[name.removesuffix("_head")].numpy()
        rows = len(ids) if name.startswith("prev") else PERIOD  # over which ours is a mean
        rescaled = theirs * len(ids) / rows
        best = [np.unravel_index(x.argmax(), x.shape) for x in (theirs, ours)]
        c.add(
            title,
            on,
            f"strongest {best[0][0]}-{best[0][1]}, {theirs.max():.4f}; {rescaled.max():.4f} of the rows that count",
            f"strongest {best[1][0]}-{best[1][1]}, {ours.max():.4f}",
            apart(rescaled, ours),
            note,
        )
    c.write()


HEADS = (
    ("previous_token_head", "previous-token score (`mul`)", "both are means over all rows; the first row has no token before it"),
    (
        "induction_head",
        "induction score (`mul`)",
        "theirs divides by all rows, ours by the rows of the repetition; compared after rescaling",
    ),
)


if __name__ == "__main__":
    main()
