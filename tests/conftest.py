"What all tests share: on the machines of continuous integration, a browser test that cannot run has failed"
from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    "Bytes are named by their argument: workers must agree on the names of tests, and bytes may hold a time (gzip)"
    return argname if isinstance(val, bytes) else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    "Where CI=true, a skipped test that is marked `browser` is a failure that says why it was skipped"
    report = yield
    if report.skipped and item.get_closest_marker("browser") and os.environ.get("CI", "").lower() in ("1", "true"):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"browser tests must run where CI=true, and this one was skipped: {why}"
    return report
