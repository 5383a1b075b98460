"A text that is longer than the windows of the model that reads it"
from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import ZOO, token_ids

import longlens as ll
from longlens.apps.head_panels import attended_tokens
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
