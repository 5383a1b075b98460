"""The compiled loop for CPUs: the same sums as the tiles, with any number of threads, and without a compiler"""
from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import longlens as ll
from longlens.attention import compiled_pass
from longlens.attention.masks import causal_mask
from longlens.attention.operator import AttentionOperator, summed_by
from longlens.attention.reducers import DistanceSum, EntropySum, Product, ReceivedSum, SquareSum, WindowMass

HERE = shutil.which("c++") is not None
needs_compiler = pytest.mark.skipif(not HERE, reason="this machine has no C++ compiler")


@pytest.fixture()
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    "An empty cache, and nothing loaded"
    monkeypatch.setenv("LONGLENS_CACHE", str(tmp_path))
    compiled_pass._library.cache_clear()
    yield tmp_path
    compiled_pass._library.cache_clear()


def sums(op: AttentionOperator, kernels: str, weights: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    wanted = (EntropySum(), SquareSum(), DistanceSum(), WindowMass([5, 300]), WindowMass(range(1, 20)), ReceivedSum(), ReceivedSum(weights),
              Product(x))
    with summed_by(kernels): return AttentionOperator.of(op.call, op.lse).reduce(*wanted)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_as_the_tiles(threads: int) -> None:
    "Groups, windows, two samples, more columns and windows than a launch takes, keys beyond two sums in single precision"
    torch.manual_seed(threads)
    q, k = 3 * torch.randn(2, 4, 150, 40), torch.randn(2, 2, 5000, 40)
    weights, x = torch.rand(1, 150), torch.randn(2, 4, 5000, 19)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for mask in (causal_mask(offset=4850), causal_mask(offset=4850, window=4500)):
            op = AttentionOperator(q, k, mask=mask)
            for a, b in zip(sums(op, "compiled", weights, x), sums(op, "torch", weights, x), strict=True):
                assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), float((a - b).abs().max())
    finally: torch.set_num_threads(before)


@needs_compiler
def test_a_capture_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    "Statistics of a model: used where a pass is long, and the same without it"
    lm, used = ll.load(), []
    made = compiled_pass.add_up
    monkeypatch.setattr(compiled_pass, "add_up", lambda *a: used.append(1) or made(*a))
    text = "The merchant walked home. " * 230
    def measured() -> torch.Tensor:
        with ll.capture(lm, ll.Entropy(), ll.Received()) as seen: lm(text)
        return torch.cat([torch.tensor(seen.frame(name)[name].to_numpy()).float() for name in ("entropy", "received")])
    with summed_by("torch"): plain = measured()
    assert not used
    assert torch.allclose(measured(), plain, atol=2e-5) and len(used) == len(lm.attention_layers)


@pytest.mark.parametrize(("command", "said"), [("no-such-compiler", "FileNotFoundError"), ("false", "the compiler failed")])
def test_without_a_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch, command: str, said: str) -> None:
    "Torch does it, and whoever asks for the loop hears why there is none"
    monkeypatch.setenv("CXX", command)
    q = torch.randn(1, 2, 2000, 8)
    op = AttentionOperator(q, q)
    assert compiled_pass.worth_it(op.call) and op.entropy().isfinite().all()
    with summed_by("compiled"), pytest.raises(ValueError, match=rf"could not be compiled \({said}.*summed_by\('torch'\)"):
        AttentionOperator(q, q).entropy()


@needs_compiler
def test_a_wrong_library_is_not_used(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_pass, "_SOURCE", compiled_pass._SOURCE.replace("squares += p * p;", "squares += p;"))
    q = torch.randn(1, 2, 2000, 8)
    op = AttentionOperator(q, q)
    with pytest.warns(UserWarning, match="the compiled loop is wrong on this machine"): found = op.support()
    with summed_by("torch"): assert torch.equal(found, AttentionOperator.of(op.call, op.lse).support())
    assert len([*(fresh / "compiled").glob("*.so")]) == 1
