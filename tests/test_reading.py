"A text that is longer than the windows of the model that reads it"
from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from zoo import ZOO, token_ids

import longlens as ll
from longlens.apps.head_panels import attended_tokens
from longlens.apps.one_head import HeadAttention, read_head, strongest
from longlens.apps.reading import PromptReading, read_text

N = 70    # tokens; windows are 8 to 16


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma2", "gemma3", "gpt_oss"])
def read(request: pytest.FixtureRequest) -> tuple[Any, PromptReading]:
    lm = ll.load(ZOO[request.param]())
    return lm, read_text(lm, token_ids(N)[0])


@pytest.mark.parametrize("position", [0, 5, 40, N - 1])
def test_a_row_is_that_of_the_whole_text(read: tuple[Any, PromptReading], position: int) -> None:
    lm, reading = read
    row, want = reading.live.row(position), torch.zeros(lm.n_layers, lm.n_heads, position + 1)
    with ll.capture(lm, ll.Rows([position], top=None)) as seen: lm(token_ids(N))
    f = seen.frame("rows")
    want[f["layer"].to_numpy(), f["head"].to_numpy(), f["position"].to_numpy()] = f["weight"].to_torch()
    torch.testing.assert_close(row, want, atol=1e-5, rtol=1e-4)


def test_nothing_is_said_of_what_a_window_hides(read: tuple[Any, PromptReading]) -> None:
    lm, reading = read
    for layer, window in enumerate(windows_of(lm)):
        rows = attended_tokens(reading, layer, 1, N - 1, most=30)
        assert len(rows) == min(30, window)
        assert min(r["position"] for r in rows) >= N - window
        assert all(r["weight"] > 0 for r in rows)


def windows_of(lm: Any) -> list[int]:
    "How far every layer sees"
    kinds = getattr(lm.config, "layer_types", None) or ["sliding_attention"] * lm.n_layers
    window = getattr(lm.config, "sliding_window", None) or N
    return [window if kind == "sliding_attention" else N for kind in kinds]


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_an_explorer_opens(name: str) -> None:
    app = ll.explore(ll.load(ZOO[name]()), token_ids(N)[0])
    assert app is not None


def test_rows_and_columns_of_one_head_are_those_of_the_whole_text(read: tuple[Any, PromptReading]) -> None:
    "Also where layers have windows, soft caps and learned sinks, and where the text is read in chunks"
    lm, reading = read
    with ll.capture(lm, ll.Rows(range(N), top=None)) as seen: lm(token_ids(N))
    f = seen.frame("rows")
    for layer, head in ((0, 1), (lm.n_layers - 1, 0)):
        want, mine = torch.zeros(N, N), f.filter(layer=layer, head=head)
        want[mine["query"].to_numpy(), mine["position"].to_numpy()] = mine["weight"].to_torch()
        for chunk in (None, 16):
            one = read_head(reading.live, layer, head, chunk)
            for at in (0, 5, 40, N - 1):
                torch.testing.assert_close(one.row(at), want[at], atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(one.column(at), want[:, at], atol=1e-5, rtol=1e-4)


def test_100_000_tokens_take_less_than_300_ms() -> None:
    "Where a token looks and who looks at it, in a head of 64 numbers: what the kernel does when a token is pointed at"
    from longlens.apps.one_head import HeadPart
    from longlens.attention.logits import make_call
    n, g = 100_000, torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, n, 64, generator=g), torch.randn(1, 1, n, 64, generator=g)
    part = HeadPart(make_call(q, k, None, None, None), torch.full((1, 1, n), 11.5), torch.arange(n), torch.arange(n))
    one, took = HeadAttention(0, 0, (part,), n), []
    for at in (99_000, 50_000, 3, 70_000, 20_000):
        start = time.perf_counter()
        strongest(one.row(at)), strongest(one.column(at))
        took.append(time.perf_counter() - start)
    assert sorted(took)[2] < 0.2, took
