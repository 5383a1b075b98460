"Notebook files: read, write, and what a cell says of itself"
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

Cell = dict[str, Any]
Notebook = dict[str, Any]


def read(path: Path) -> Notebook:
    "A notebook as plain dictionaries"
    return json.loads(path.read_text(encoding="utf-8"))


def write(notebook: Notebook, path: Path) -> None:
    "Write a notebook the way nbdev and Jupyter do"
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def source(cell: Cell) -> str:
    "A cell's text"
    return "".join(cell["source"])


def directives(cell: Cell) -> dict[str, str]:
    "The cell's `#| name: value` lines"
    found = re.findall(r"^\s*#\s*\|\s*([\w-]+):?[ \t]*(.*)$", source(cell), flags=re.MULTILINE)
    return {name: value.strip() for name, value in found}


def without_directives(cell: Cell) -> str:
    "A cell's text without its `#|` lines"
    return re.sub(r"^\s*#\s*\|.*\n?", "", source(cell), flags=re.MULTILINE).strip("\n")
