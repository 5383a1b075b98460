"""Run notebooks and store their outputs in them: tools/execute.py nbs/index.ipynb ...

Each runs in a process of its own, in its own folder, through execnb (which nbdev_test uses too). Two runs give the
same file: no counts, addresses, random ids, or progress bars. How charts and widgets are stored, outputs.py says. Cells
that nbdev_test would skip (`#| eval: false`, and the flags of settings.ini such as `slow`) are skipped and keep the
outputs they have; --flags runs some of them.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from nbfiles import Cell, directives, read, source, write
from outputs import store_charts, with_widget

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = re.compile(r"(<[^<>]*?) at 0x[0-9a-fA-F]+(>)")
RANDOM_ID = re.compile(r"(altair-viz-)[0-9a-f]{32}")


def skipped(cell: Cell, flags: set[str]) -> bool:
    "Is this a cell that does not run?"
    marks = directives(cell)
    return (cell["cell_type"] != "code" or marks.get("eval", "").lower() == "false" or bool(flags & set(marks))
            or "nbdev_export(" in source(cell))


def tidy(output: dict[str, Any]) -> dict[str, Any]:
    "An output without what differs from run to run"
    if "execution_count" in output: output["execution_count"] = None
    data = with_widget(output.get("data", {}))
    text = json.dumps({**output, "data": data} if "data" in output else output)
    text = ADDRESS.sub(r"\1\2", text)
    number = hashlib.sha256(RANDOM_ID.sub(r"\1", text).encode()).hexdigest()[:32]
    return json.loads(RANDOM_ID.sub(rf"\g<1>{number}", text))


def run(path: Path, flags: set[str], timeout: int) -> str:
    "Execute one notebook in place; what went wrong, or nothing"
    from execnb.shell import CaptureShell
    notebook = read(path)
    if any("altair" in source(cell) for cell in notebook["cells"]): store_charts()
    os.environ["IN_TEST"] = "1"    # nbdev: nothing is exported while a notebook runs
    sys.path.insert(0, str(ROOT))
    os.chdir(path.parent)
    shell = CaptureShell(path)
    for number, cell in enumerate(notebook["cells"]):
        if skipped(cell, flags): continue
        outputs = shell.run(source(cell), stderr=False, timeout=timeout)    # warnings and progress go to the terminal
        if shell.exc: return f"{path}, cell {number}: {type(shell.exc).__name__}: {shell.exc}\n\n{source(cell)}"
        cell["outputs"], cell["execution_count"] = [tidy(out) for out in outputs], None
    write(notebook, path)
    return ""


def main(args: list[str] | None = None) -> int:
    "Execute each notebook in a process of its own"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--flags", default="", help="run cells with these flags too, e.g. 'slow gpu'")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one cell")
    asked = parser.parse_args(args)
    if len(asked.notebooks) == 1:
        ini = ConfigParser(interpolation=None)
        ini.read(ROOT / "settings.ini", encoding="utf-8")
        wrong = run(asked.notebooks[0].resolve(), set(ini["DEFAULT"]["tst_flags"].split()) - set(asked.flags.split()), asked.timeout)
        print(wrong, end="", file=sys.stderr)
        return bool(wrong)
    failed = 0
    for path in asked.notebooks:
        start = time.time()
        one = [sys.executable, __file__, str(path), "--flags", asked.flags, "--timeout", str(asked.timeout)]
        failed += subprocess.run(one).returncode != 0
        print(f"{path}: {time.time() - start:.0f} s")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
