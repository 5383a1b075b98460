"What all tests share: on the machines of continuous integration, a browser test that cannot run has failed"
from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lab import ARGS, find_chromium, missing

# without a GPU the kernels are interpreted, which Triton wants to know before it is imported (by torch.compile, too)
if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    "Bytes are named by their argument: workers must agree on the names of tests, and bytes may hold a time (gzip)"
    return argname if isinstance(val, bytes) else None


# files that take longest: they begin first, so that no process is left with one of them at the end (--no-loadscope-reorder)
LONG = ("test_docs", "test_cluster", "test_cli", "test_tutorials", "test_collapse", "test_trace_cost", "test_trace", "test_sweep",
        "test_budget", "test_explorers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "Long files first"
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    "Where CI=true, a skipped test that is marked `browser` is a failure that says why it was skipped"
    report = yield
    if report.skipped and item.get_closest_marker("browser") and os.environ.get("CI", "").lower() in ("1", "true"):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"browser tests must run where CI=true, and this one was skipped: {why}"
    return report


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    "A headless Chromium, or a skip that says what is missing"
    if why := missing("playwright"): pytest.skip(why)
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=find_chromium(), headless=True, args=ARGS)
        yield chromium
        chromium.close()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    "Every way out is closed; gives what was tried"
    tried: list[Any] = []

    def refuse(self: Any, address: Any, *args: Any) -> None:
        tried.append(address)
        raise OSError("the network is closed in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: refuse(None, a))
    return tried
