"""Do longlens' policies keep the same keys as kvpress (NVIDIA), on the same weights and the same text?

kvpress is not a dependency, and none of its code is here: install it beside longlens (`pip install --no-deps kvpress cachetools`). Its
presses score the keys of each layer from a forward of transformers' own attention (sdpa); longlens decides from its attention operator.
The result is the share of kept keys, over all layers and KV heads, that both keep, and goes to benchmarks/RESULTS.md.

    python benchmarks/agreement/kvpress.py --model smollm2 --tokens 1024
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent]  # this file is named like the package

import torch
from results import write_section

import longlens as ll
from longlens.policies import attention, budgets, keys
from longlens.probes.policies.inputs import PolicyCase
from longlens.probes.policies.measures import read_prompts

POLICIES = {
    "SnapKV": attention.SnapKV(), "TOVA": attention.TOVA(), "Knorm": keys.Knorm(), "KeyDiff": keys.KeyDiff(),
    "ExpectedAttention": attention.ExpectedAttention(), "PyramidKV (beta 4)": budgets.PyramidKV(beta=4), "Ada-KV": budgets.AdaKV(),
}


def presses(ratio: float) -> dict[str, Any]:
    "kvpress' presses of the same settings; importing it wraps transformers' attention, so longlens has to be done before"
    import kvpress as kp
    return {
        "SnapKV": kp.SnapKVPress(ratio), "TOVA": kp.TOVAPress(ratio), "Knorm": kp.KnormPress(ratio), "KeyDiff": kp.KeyDiffPress(ratio),
        "ExpectedAttention": kp.ExpectedAttentionPress(ratio), "PyramidKV (beta 4)": kp.PyramidKVPress(ratio, beta=4),
        "Ada-KV": kp.AdaKVPress(kp.SnapKVPress(ratio)),
    }


def kept_by(press: Any, m: Any, hidden: torch.Tensor, layer: Any, kwargs: dict, budget: int) -> torch.Tensor:  # bool, (kv_heads, n)
    "Which keys of a layer a press keeps"
    if hasattr(press, "press"):
        press.compress(m, hidden, layer.keys, layer.values, None, kwargs)
        mask = torch.ones(layer.keys.shape[1:3], dtype=torch.bool)
        _, heads, at = m.masked_key_indices
        mask[heads, at] = False
        return mask
    scores = press.score(m, hidden, layer.keys, layer.values, None, kwargs)[0]
    count = press.get_layer_budget(m, scores.shape[-1]) if hasattr(press, "get_layer_budget") else budget
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, scores.topk(count, -1).indices, True)


@torch.no_grad()
def theirs(hf: Any, ids: torch.Tensor, chosen: dict[str, Any], budget: int) -> dict[str, dict[int, torch.Tensor]]:
    "Press -> layer -> which keys it keeps, all from one forward"
    kept: dict[str, dict[int, torch.Tensor]] = {name: {} for name in chosen}

    def hook(m: Any, args: tuple, kwargs: dict, out: Any) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        m.rotary_emb = hf.model.rotary_emb
        for name, press in chosen.items():
            kept[name][m.layer_idx] = kept_by(press, m, hidden, kwargs["past_key_values"].layers[m.layer_idx], kwargs, budget)

    hooks = [x.self_attn.register_forward_hook(hook, with_kwargs=True) for x in hf.model.layers]
    try: hf(ids[None], use_cache=True, logits_to_keep=1)
    finally:
        for h in hooks: h.remove()
    return kept


@torch.no_grad()
def mine(lm: ll.LongModel, ids: torch.Tensor, budget: int) -> dict[str, dict[int, torch.Tensor]]:
    "Policy of longlens -> layer -> which keys it keeps"
    _, prompts = read_prompts(lm, PolicyCase(ids, len(ids), 0), list(POLICIES.values()))
    return {name: {layer: p.keep(x, budget) for layer, x in prompts.items()} for name, p in POLICIES.items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="smollm2")
    p.add_argument("--tokens", type=int, default=1024)
    p.add_argument("--ratio", type=float, default=.5, help="share of keys that goes, kvpress' compression_ratio")
    a = p.parse_args()
    lm = ll.load(a.model)
    ids = ll.needle_context(lm, a.tokens, n_keys=1, seed=0).tokens.ids
    budget = max(1, int(len(ids) * (1 - a.ratio)))
    ours = mine(lm, ids, budget)
    chosen = presses(a.ratio)
    found, rows = theirs(lm.hf, ids, chosen, budget), []
    for name, left in found.items():
        right = {i: ours[name][i].expand_as(x) for i, x in left.items()}
        both = sum(int((left[i] & right[i]).sum()) for i in left)
        counts = [sum(int(x.sum()) for x in each.values()) for each in (left, right)]
        worst = min(float((left[i] & right[i]).sum() / left[i].sum()) for i in left)
        rows.append(f"| {name} | {counts[0]:,} | {counts[1]:,} | {100 * both / counts[0]:.3f} % | {100 * worst:.2f} % |")
        print(rows[-1], flush=True)
    table = "\n".join(rows)
    version = __import__("importlib.metadata").metadata.version("kvpress")
    command = f"python benchmarks/agreement/kvpress.py --model {Path(a.model).name} --tokens {a.tokens} --ratio {a.ratio}"
    write_section("Policies: the same keys as kvpress", f"""{Path(lm.name).name}, {len(ids):,} tokens, {100 * (1 - a.ratio):.0f} % of the \
keys kept, float32, kvpress {version}, torch {torch.__version__}. What differs lies within rounding: keys whose scores are equal to the \
last digits; and kvpress derives PyramidKV's layer budgets from a mean that is not rounded to whole keys. `{command}`.

| policy | keys kept by kvpress | by longlens | kept by both | in the layer that agrees least |
|---|---:|---:|---:|---:|
{table}""")


if __name__ == "__main__": main()
