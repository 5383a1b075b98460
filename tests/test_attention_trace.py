"""Attention back to the sources: rows and rollout of every architecture against transformers' own eager patterns."""

from __future__ import annotations

import pytest
import torch
from test_parity import CASES, N, agree, eager, forward, padding
from transformers import DynamicCache
from zoo import ZOO, token_ids, zoo_model

from longlens.measure.answer_rows import MeanRows, mean_over_layers
from longlens.measure.capture import capture
from longlens.measure.rollout import Rollout

SPANS = {"head": (0, 5), "body": (5, 24), "tail": (24, 33)}  # every sample has these positions
ROWS = (range(30, 36), [20, 29, 35])  # queries of each sample
WEIGHTS = {(0, 1): 1.0, (1, 0): 0.5, (1, 3): 2.0}


def rolled_out(P: torch.Tensor, skip: float = 0.5) -> torch.Tensor:  # (layers, n, n)
    "Products of the formed matrices of one sample, (layers, heads, n, n), after every layer"
    eye, out = torch.eye(P.shape[-1], dtype=torch.float64), []
    for mean in P.double().mean(1): out.append(((1 - skip) * mean + skip * eye) @ (out[-1] if out else eye))
    return torch.stack(out)


@pytest.mark.parametrize("name,side,chunked", CASES, ids=[f"{n}-{s or 'whole'}-{'chunks' if c else 'once'}" for n, s, c in CASES])
@torch.no_grad()
def test_rows_and_rollout_agree_with_eager(name: str, side: str | None, chunked: bool) -> None:
    model, ids, keep = ZOO[name](), token_ids(N, batch=2), padding(side)
    stats = (MeanRows(ROWS), MeanRows(ROWS, by="layer", label="layers"), MeanRows(ROWS, by="layer", weights=WEIGHTS, label="some"),
             Rollout(SPANS, ROWS[0], in_chunks=chunked))
    with capture(model, *stats) as seen: forward(model, ids, keep, chunked)
    P, _ = eager(model, ids, keep)
    means, some = mean_over_layers(seen, "layers"), mean_over_layers(seen, "some")
    for b in range(2):
        text = slice(None) if keep is None else keep[b].nonzero()[:, 0]
        own = P[:, b][:, :, text][..., text].double()
        rows = own[:, :, list(ROWS[b])].mean(2)  # (layers, heads, n)
        frame = seen.frame("mean_rows").filter(sample=b)
        got = torch.zeros_like(rows)  # layers whose sliding cache let go of the first keys have no rows for them
        got[frame["layer"].to_torch(), frame["head"].to_torch(), frame["position"].to_torch()] = frame["weight"].to_torch().double()
        agree(got.numpy().ravel(), rows, f"{name} rows {b}")
        there = len(means[b])  # in chunks, what comes after the last query's chunk is not in it
        assert there > ROWS[b][-1] and (chunked or there == own.shape[-1])
        agree(means[b].numpy(), rows.mean((0, 1))[:there], f"{name} mean {b}")
        want = sum(w * rows[at] for at, w in WEIGHTS.items()) / sum(WEIGHTS.values())
        agree(some[b].numpy(), want[:there], f"{name} weighted {b}")
        R = rolled_out(own)[:, list(ROWS[0])].mean(1)
        want = torch.stack([R[:, a:z].sum(-1) for a, z in SPANS.values()], -1)
        agree(seen.frame("rollout").filter(sample=b)["mass"].to_numpy(), want, f"{name} rollout {b}")


@torch.no_grad()
def test_texts_that_take_turns_roll_out_apart() -> None:
    "Two texts over two caches, chunk by chunk, through one statistic"
    model, texts = zoo_model("llama"), [token_ids(N, seed=s) for s in (1, 2)]
    caches = [DynamicCache(config=model.config) for _ in texts]
    with capture(model, Rollout(SPANS, range(34, 40), in_chunks=True)) as seen:
        for a, b in ((0, 20), (20, 36), (36, N)):
            for ids, cache in zip(texts, caches, strict=True): model(ids[:, a:b], past_key_values=cache)
    for i, ids in enumerate(texts):
        R = rolled_out(eager(model, ids, None)[0][:, 0])[:, 34:40].mean(1)
        want = torch.stack([R[:, a:z].sum(-1) for a, z in SPANS.values()], -1)
        agree(seen.frame("rollout").filter(sample=i)["mass"].to_numpy(), want, f"text {i}")


@torch.no_grad()
def test_a_forward_that_fails_midway_does_not_leak_into_the_next() -> None:
    model, ids = ZOO["llama"](), token_ids(N)
    class Stop(Exception): ...
    def fail(*_: object) -> None: raise Stop
    stat = Rollout(SPANS, range(30, 36))
    with capture(model, stat) as seen:
        handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(Stop): model(token_ids(N, seed=5))
        handle.remove()
        model(ids)
    with capture(model, Rollout(SPANS, range(30, 36))) as clean: model(ids)
    assert seen.frame("rollout").equals(clean.frame("rollout"))
