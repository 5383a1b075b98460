"""Results of the benchmarks, kept in one Markdown file: each script replaces its own section."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

FILE = Path(__file__).with_name("RESULTS.md")
HEAD = "# Benchmark results\n\nWritten by the scripts in this folder; every number was measured by the command its section names.\n"


def write_section(title: str, text: str) -> None:
    "Put a section into RESULTS.md, in place of an older one of the same title"
    old = FILE.read_text(encoding="utf-8") if FILE.exists() else HEAD
    section = f"## {title}\n\n{text}\n\nMeasured on {date.today().isoformat()}.\n"
    pattern = rf"^## {re.escape(title)}\n.*?(?=^## |\Z)"
    new, found = re.subn(pattern, lambda _: section + "\n", old, flags=re.S | re.M)
    if not found: new = f"{old.rstrip()}\n\n{section}"
    FILE.write_text(new.rstrip() + "\n", encoding="utf-8")
    print(f"\n{section}\nwritten to {FILE.name}")
