"""Patched heads against TransformerLens, over the same weights"""
from __future__ import annotations

import pytest
import torch
import zoo

import longlens as ll


@pytest.mark.parametrize("rows", [(39, 40), (30, 40)])
@torch.no_grad()
def test_patched_heads_are_those_of_transformer_lens(rows: tuple[int, int]) -> None:
    "hook_z of one head at some rows, from the clean run into the other"
    lm = ll.load(zoo.zoo_model("llama"))
    bridge = lm.bridge
    clean = zoo.token_ids(40)[0]
    corrupt = clean.clone()
    corrupt[5:8] = torch.tensor([9, 8, 7])
    heads = [(0, 1), (0, 3), (1, 0), (1, 2)]
    found = ll.patch_heads(lm, clean, corrupt, (11, 12), rows, heads=heads).frames["heads"]
    _, cache = bridge.run_with_cache(clean[None])
    for x in found.iter_rows(named=True):
        name, head, at = f"blocks.{x['layer']}.attn.hook_z", x["head"], slice(*rows)
        z = cache[name]

        def put(mine: torch.Tensor, hook: object, z: torch.Tensor = z, head: int = head, at: slice = at) -> torch.Tensor:
            mine = mine.clone()
            if mine.ndim == 4: mine[:, at, head] = z[:, at, head]
            else: mine.unflatten(-1, (zoo.HEADS, -1))[:, at, head] = z.unflatten(-1, (zoo.HEADS, -1))[:, at, head]
            return mine

        logits = bridge.run_with_hooks(corrupt[None], fwd_hooks=[(name, put)])[0, -1]
        assert x["difference"] == pytest.approx(float(logits[11] - logits[12]), abs=1e-3)
