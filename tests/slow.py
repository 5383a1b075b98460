"""Tests that take minutes, which `make test` leaves out: `make slow` runs them, and writes benchmarks/SLOW.md"""
from __future__ import annotations

import os
import platform
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pytest

OUT = Path(__file__).resolve().parent.parent / "benchmarks/SLOW.md"
HEAD = """# Slow tests

What takes minutes is marked `slow`, is left out by `make test`, and is run by `make slow`, which writes this page.

Run on {date} with Python {python}, transformers {transformers} and torch {torch}, on {cores} CPU cores:
{passed} passed, {failed} failed, in {minutes:.0f} minutes.

| test | what it checks | seconds | |
|---|---|---|---|
"""


class Told:
    "What came of each test"

    def __init__(self) -> None:
        self.about: dict[str, str] = {}
        self.rows: dict[str, tuple[float, str]] = {}    # seconds of all three phases, and the worst outcome

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items: self.about[item.nodeid] = (getattr(item, "obj", item).__doc__ or "").strip().split("\n")[0]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        seconds, outcome = self.rows.get(report.nodeid, (0.0, "passed"))
        self.rows[report.nodeid] = seconds + report.duration, outcome if report.outcome == "passed" else report.outcome


def main() -> int:
    "Run them, write the page, and say whether all passed"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    told, start = Told(), time.monotonic()
    code = pytest.main(["-m", "slow", str(Path(__file__).parent), *sys.argv[1:]], plugins=[told])
    outcomes = [outcome for _, outcome in told.rows.values()]
    head = HEAD.format(date=datetime.now(UTC).date(), python=platform.python_version(), transformers=version("transformers"),
                       torch=version("torch").split("+")[0], cores=os.cpu_count(), passed=outcomes.count("passed"),
                       failed=outcomes.count("failed"), minutes=(time.monotonic() - start) / 60)
    lines = [f"| `{name.removeprefix('tests/')}` | {told.about[name]} | {seconds:.0f} | {outcome} |"
             for name, (seconds, outcome) in sorted(told.rows.items())]
    OUT.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    return int(code)


if __name__ == "__main__": sys.exit(main())
