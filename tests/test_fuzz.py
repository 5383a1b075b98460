"""A part of the fuzz in every run: 200 random inputs for the public functions (`make fuzz` runs 10,000). And what it found"""
from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import fuzz
import numpy as np
import pytest
import torch
import zoo

import longlens as ll
from longlens.models.forward import LongModel

INPUTS = int(os.environ.get("LONGLENS_FUZZ", "200"))
SHARES = fuzz.share(INPUTS, fuzz.functions())


def test_every_public_name_has_a_case_or_a_reason() -> None:
    names = set(fuzz.public_names())
    without = names - {*fuzz.CASES} - {*fuzz.NO_CASE}
    assert not without, f"no case in tests/fuzz.py, and no reason: {sorted(without)}"
    assert not {*fuzz.NO_CASE} - names and all(fuzz.NO_CASE.values())
    assert {n.split(".")[0] for n in fuzz.CASES} <= names


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SHARES)
def test_random_inputs(name: str) -> None:
    "Never a wrong number, never an error from inside"
    fuzz.run_case(name, SHARES[name], shrink=False)


def test_whose_error_it_is() -> None:
    "The judge of errors knows ours from those from inside"
    with pytest.raises(ValueError) as ours: ll.load("needle-lm", device="cpu").tokens("")
    assert fuzz.fault(ours.value) is None
    with pytest.raises(ValueError) as torchs: torch.tensor([[1], [1, 2]])
    assert fuzz.fault(torchs.value)
    with pytest.raises(TypeError) as pythons: ll.load(modle="a")  # type: ignore[call-arg]
    assert fuzz.fault(pythons.value)


# ---- what was an error from inside, or wrong without a word: settings and numbers of the wrong kind

def inside(block: AbstractContextManager) -> None:
    with block: fuzz.needle_lm()("a b c d")


def operator() -> ll.AttentionOperator:
    q = torch.randn(1, 4, 5, 8)
    return ll.AttentionOperator(q, q, q)


def seen() -> Any:
    with ll.capture(fuzz.needle_lm(), ll.Entropy(), ll.Received()) as out: fuzz.needle_lm()("a b c d")
    return out


Q = torch.randn(1, 4, 5, 8)
WRONG: dict[str, Callable[[LongModel], Any]] = {
    "score_many, batch_size 0": lambda lm: lm.score_many(["a"], ["b"], batch_size=0),
    "score_many, batch_size -1": lambda lm: lm.score_many(["a"], ["b"], batch_size=-1),
    "generate, -1": lambda lm: lm.generate("a", -1),
    "generate, 1.5": lambda lm: lm.generate("a", 1.5),
    "prefill, chunk 1.5": lambda lm: lm.prefill("a b c", 1.5),
    "logits, position 0.5": lambda lm: lm.logits("a b c", [0.5]),
    "logits, position text": lambda lm: lm.logits("a b c", "x"),
    "ids, ragged": lambda lm: lm([[1, 2], [3]]),
    "ids, too large": lambda lm: lm.tokens([2**70]),
    "ids, None": lambda lm: lm.tokens([None]),
    "crop, 1.5": lambda lm: lm.prefill("a b c").crop(1.5),
    "find, nth -1": lambda lm: lm.tokens("a b a").find("a", nth=-1),
    "find, nth -5": lambda lm: lm.tokens("a b a").find("a", nth=-5),
    "span, text": lambda lm: lm.tokens("a b").span("a", 1),
    "run, batch_size 0": lambda lm: ll.Run(batch_size=0),
    "run, seed -1": lambda lm: ll.Run(seed=-1),
    "context_gain, seed -1": lambda lm: ll.context_gain(lm, ["a stone lies in the river. " * 9], (4,), targets=2, seed=-1),
    "context_gain, batch_size -1": lambda lm: ll.context_gain(lm, ["a stone lies in the river. " * 9], (4,), targets=2, batch_size=-1),
    "SinkMass, 1.5": lambda lm: ll.SinkMass(1.5),
    "SinkMass, text": lambda lm: ll.SinkMass("one"),
    "Rows, top": lambda lm: ll.Rows([1], top="a"),
    "Rows, bins": lambda lm: ll.Rows([1], bins=1.5),
    "Entropy, queries": lambda lm: ll.Entropy(queries=[0.5]),
    "Entropy, bins": lambda lm: ll.Entropy(bins="ab"),
    "DistanceProfile, windows": lambda lm: ll.DistanceProfile(["a"]),
    "SpectralNorm": lambda lm: ll.SpectralNorm("a"),
    "SpectralNorm, tol": lambda lm: ll.SpectralNorm(tol="a"),
    "Rollout, skip": lambda lm: ll.Rollout({"a": (0, 1)}, [0], skip="a"),
    "frame, heads": lambda lm: seen().frame("entropy", heads=[0]),
    "frame, top": lambda lm: seen().frame("entropy", top=3),
    "temperature, text": lambda lm: inside(ll.temperature(lm, "a")),
    "temperature, None": lambda lm: inside(ll.temperature(lm, None)),
    "streaming, 1.5": lambda lm: inside(ll.streaming_attention(lm, 1.5, 2)),
    "streaming, text": lambda lm: inside(ll.streaming_attention(lm, "a", 2)),
    "ablate, numbers": lambda lm: inside(ll.ablate(lm, [3])),
    "ablate, text": lambda lm: inside(ll.ablate(lm, ["2-0"])),
    "ablate, one pair": lambda lm: inside(ll.ablate(lm, (2, 0))),
    "ablate, None": lambda lm: inside(ll.ablate(lm, None)),
    "ablate, floats": lambda lm: inside(ll.ablate(lm, [(0.5, 1)])),
    "ablate, three": lambda lm: inside(ll.ablate(lm, [(0, 1, 2)])),
    "ablate, ragged reference": lambda lm: inside(ll.ablate(lm, [(0, 0)], "mean", reference=[[1], [1, 2]])),
    "scale_spans, factor": lambda lm: inside(ll.scale_spans(lm, {"a": (0, 1)}, "a")),
    "scale_spans, no names": lambda lm: inside(ll.scale_spans(lm, [(0, 1)], 0.5)),
    "lambda_mask": lambda lm: inside(ll.lambda_mask(lm, "a")),
    "extend_window": lambda lm: inside(ll.extend_window(lm, "ntk", "a")),
    "extend_window, factor": lambda lm: inside(ll.extend_window(lm, "ntk", 4096, theta_factor="a")),
    "attend, integers": lambda lm: ll.attend(Q.long(), Q.long(), Q.long()),
    "attend, sinks": lambda lm: ll.attend(Q, Q, Q, sinks=torch.zeros(3)),
    "attend, cap 0": lambda lm: ll.attend(Q, Q, Q, softcap=0.0),
    "attend, cap -1": lambda lm: ll.attend(Q, Q, Q, softcap=-1.0),
    "attend, scale": lambda lm: ll.attend(Q, Q, Q, scale=float("nan")),
    "attend, list": lambda lm: ll.attend([1], Q, Q),
    "attend, mask": lambda lm: ll.attend(Q, Q, Q, mask=torch.ones(5, 5)),
    "rows, none": lambda lm: operator().rows([]),
    "rows, 0.5": lambda lm: operator().rows([0.5]),
    "topk, none": lambda lm: operator().topk([], 1),
    "window_mass, text": lambda lm: operator().window_mass("a"),
    "span_mass, none": lambda lm: operator().span_mass({}),
    "narrow, beyond": lambda lm: operator().narrow(range(3, 9)),
    "narrow, list": lambda lm: operator().narrow([1, 2]),
    "matmul, list": lambda lm: operator().matmul([1]),
    "matmul, no column": lambda lm: operator().matmul(torch.ones(5, 0)),
    "encode, half a character": lambda lm: fuzz.encoder().encode(["a \udc80"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_in_words(name: str) -> None:
    with pytest.raises((ValueError, TypeError)) as e: WRONG[name](fuzz.needle_lm())
    assert fuzz.fault(e.value) is None


@pytest.mark.parametrize("scale", [0.0, 5e-324])
def test_a_scale_of_nothing_is_uniform(scale: float) -> None:
    v = torch.randn(1, 2, 6, 3)
    out, lse = ll.attend(torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4), v, scale=scale)
    n = torch.arange(1, 7.0)
    torch.testing.assert_close(out, v.cumsum(2) / n[:, None])
    torch.testing.assert_close(lse, n.log().expand(1, 2, -1))


@pytest.mark.parametrize("form", [tuple, np.array, torch.tensor], ids=["tuple", "array", "tensor"])
def test_queries_windows_and_bins_in_any_form(form: Callable[[list[int]], Any]) -> None:
    "Arrays and tensors are what a list is"
    hf, ids = zoo.zoo_model("llama"), zoo.token_ids(20)

    def frames(form: Callable[[list[int]], Any]) -> list[Any]:
        made = [ll.Entropy(queries=form([3, 9]), bins=form([5, 12])), ll.DistanceProfile(form([1, 4])), ll.Rows(form([7])),
                ll.MeanRows(form([4])), ll.Rollout({"a": (0, 2)}, form([6]))]
        with ll.capture(hf, *made) as out, torch.no_grad(): hf(ids)
        return [out.frame(s.name) for s in made]
    assert all(a.equals(b) for a, b in zip(frames(form), frames(list), strict=True))
