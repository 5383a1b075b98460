"""README.md from nbs/index.ipynb, without Quarto.

Markdown cells stand as they are, code cells become fences, stored text outputs follow them. Cells marked
`#| hide` are left out. Links and images, relative to nbs/, are made relative to the repository.
"""
from __future__ import annotations

import argparse
import posixpath
import re
import sys
from pathlib import Path

from nbfiles import Cell, directives, read, source, without_directives

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Made from nbs/index.ipynb by `make readme`: edit that. -->\n"
LINK = re.compile(r"(\]\(|(?:src|href)=\")(?![a-z]+:|#|/)([^)\"\s]+)")


def outputs(cell: Cell) -> list[str]:
    "The cell's stored outputs as text"
    found = []
    for out in cell.get("outputs", []):
        if out["output_type"] == "error": raise ValueError(f"nbs/index.ipynb stores an error: {out['evalue']}")
        text = out.get("text") or out.get("data", {}).get("text/plain") or []
        if out.get("name") != "stderr": found.append("".join(text).rstrip("\n"))
    return [text for text in found if text.strip()]


def render(cell: Cell) -> str:
    "One cell as markdown, its links still relative to nbs/"
    marks = directives(cell)
    if {"hide", "default_exp"} & set(marks) or marks.get("include") == "false": return ""
    if cell["cell_type"] == "markdown": return source(cell).strip("\n")
    shown = without_directives(cell)
    if not shown.strip(): return ""
    code = [] if marks.get("echo") == "false" else [f"```python\n{shown}\n```"]
    return "\n\n".join(code + [f"```text\n{text}\n```" for text in outputs(cell)])


def from_root(text: str) -> str:
    "The text with links relative to the repository instead of nbs/"
    def move(link: re.Match[str]) -> str:
        target, hash_, anchor = link[2].partition("#")
        return f"{link[1]}{posixpath.normpath(posixpath.join('nbs', target))}{hash_}{anchor}"
    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)    # fences stay as they are
    return "".join(part if part.startswith("```") else LINK.sub(move, part) for part in parts)


def readme(index: Path) -> str:
    "The whole README"
    cells = [render(cell) for cell in read(index)["cells"] if cell["cell_type"] != "raw"]
    return from_root("\n\n".join([NOTE.rstrip("\n"), *filter(None, cells)]) + "\n")


def main(args: list[str] | None = None) -> int:
    "Write README.md, or say whether it is up to date"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if README.md is out of date")
    asked = parser.parse_args(args)
    text, file = readme(ROOT / "nbs/index.ipynb"), ROOT / "README.md"
    same = file.exists() and file.read_text(encoding="utf-8") == text
    if asked.check: return 0 if same else 1
    if not same: file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
