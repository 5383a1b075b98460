"""What the scripts of this folder share: the model, functions out of somebody else's files, and rows of the table."""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

RESULTS = Path(__file__).with_name("results")
TEXT = Path(__file__).parents[2] / "LICENSE"  # English, always the same, 2,224 tokens of SmolLM2


def arguments(doc: str, repository: str = "") -> argparse.Namespace:
    "The command line of a script; `repository` where it needs a checkout of one"
    p = argparse.ArgumentParser(description=doc.splitlines()[0])
    if repository:
        p.add_argument("--repo", type=Path, required=True, help=f"a checkout of https://github.com/{repository}")
    p.add_argument("--model", default=os.environ.get("LONGLENS_AGREEMENT_MODEL", "smollm2"), help="what longlens loads")
    return p.parse_args()


def smollm2(a: argparse.Namespace) -> Any:
    "The model of all comparisons"
    import longlens as ll

    return ll.load(a.model)


def text_ids(lm: Any, n: int, start: int = 0) -> Any:  # (n,)
    "Tokens of English text"
    return lm.tokens(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).ids[start : start + n]


def commit_of(repo: Path) -> str:
    "Commit and day of a checkout"
    done = subprocess.run(["git", "-C", str(repo), "log", "-1", "--format=%h, %cs"], capture_output=True, text=True)
    return done.stdout.strip() or "no git history"


def functions(path: Path, *names: str, change: Sequence[tuple[str, str]] = (), **given: Any) -> SimpleNamespace:
    "Only these definitions of a file, executed with what they need; no import of the file runs. `change`: text for text, before that"
    text = path.read_text(encoding="utf-8")
    for old, new in change:
        if old not in text:
            raise ValueError(f"{path.name} has no {old!r}: its authors have changed it")
        text = text.replace(old, new)

    def defined(node: ast.AST) -> set[str]:
        if isinstance(node, ast.Assign):
            return {t.id for t in node.targets if isinstance(t, ast.Name)}
        return {getattr(node, "name", "")}

    parts = [node for node in ast.parse(text).body if defined(node) & set(names)]
    if missing := set(names) - set().union(*map(defined, parts)):
        raise ValueError(f"{path.name} does not define {', '.join(missing)}")
    space = {name: getattr(typing, name) for name in typing.__all__} | given
    exec(compile(ast.Module(parts, []), path.name, "exec"), space)  # noqa: S102
    return SimpleNamespace(**{name: space[name] for name in names}, space=space)


def apart(theirs: Any, ours: Any) -> str:
    "The largest absolute difference of two arrays, and how many numbers were compared"
    a, b = np.asarray(theirs, dtype=float), np.asarray(ours, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"theirs has the shape {a.shape}, ours {b.shape}")
    off = float(np.nanmax(np.abs(a - b), initial=0.0))
    return f"{off:.1e} at most, of {a.size:,} numbers" if a.size > 1 else f"{off:.1e}"


@dataclass
class Comparison:
    "One reference: what was compared with it, and how its code was had"

    name: str  # of the script
    reference: str  # as the table calls it
    code: str  # where its code is from: repository, commit, files
    how: str  # what of it was run, and how
    date: str = field(default_factory=lambda: date.today().isoformat())
    rows: list[dict[str, str]] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)  # sentences

    def add(self, what: str, on: str, theirs: str, ours: str, difference: str, note: str = "") -> None:
        "A row of the table"
        self.rows.append({"what": what, "on": on, "theirs": theirs, "ours": ours, "difference": difference, "note": note})
        print(" | ".join(self.rows[-1].values()))

    def write(self) -> None:
        "Save it, and make the table anew"
        from table import make

        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{self.name}.json").write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        make()


SENTENCES = (  # each with the space before it, so that tokens stay the same whatever else is left out
    " Brightwater is a small town on the northern shore of a long lake.",
    " Its harbour was built of grey stone in 1803.",
    " The library of Brightwater was founded by Clara Winslow, a retired captain.",
    " It stands beside the old mill.",
    " Every summer the town holds a race of wooden boats.",
    " The mayor, Thomas Reed, opens it with a song.",
    " In winter the lake freezes, and people walk to the island.",
    " The island has a chapel and two houses.",
    " A railway came in 1871 and was closed again in 1964.",
    " The station is a bakery now.",
)
QUESTION = "Who founded the library of Brightwater?"


def stub(name: str, **members: Any) -> None:
    "Stand in for a module that the authors import and that nothing here calls"
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules.setdefault(name, module)
