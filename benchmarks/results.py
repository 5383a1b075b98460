"""Results of the benchmarks, kept in one Markdown file: each script replaces its own section."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("RESULTS.md")
HEAD = "# Benchmark results\n\nWritten by the scripts in `benchmarks/`; every number was measured by the command its section names.\n"


def write_section(title: str, text: str) -> None:
    "Put a section into RESULTS.md, in place of an older one of the same title"
    old = FILE.read_text(encoding="utf-8") if FILE.exists() else HEAD
    section = f"## {title}\n\n{text}\n\nMeasured on {date.today().isoformat()}.\n"
    pattern = rf"^## {re.escape(title)}\n.*?(?=^## |\Z)"
    new, found = re.subn(pattern, lambda _: section + "\n", old, flags=re.S | re.M)
    if not found: new = f"{old.rstrip()}\n\n{section}"
    FILE.write_text(new.rstrip() + "\n", encoding="utf-8")
    print(f"\n{section}\nwritten to {FILE.name}")


def apart(f: Callable, *args: Any) -> Any:
    "The result of a call in a process of its own"
    with multiprocessing.get_context("spawn").Pool(1) as pool: return pool.apply(f, args)


def _status(field: str) -> int:  # bytes, of this process
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def peak_bytes(f: Callable[[], Any]) -> float:
    "Peak resident bytes of a call over what the process holds before it (Linux)"
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    f()
    return _status("VmHWM") - before
