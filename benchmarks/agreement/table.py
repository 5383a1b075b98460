"""AGREEMENT.md out of what the scripts of this folder have saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
FILE = FOLDER.parent / "AGREEMENT.md"
ORDER = (  # the scripts, as the table has them
    "eager_patterns",
    "transformerlens",
    "attention_sink",
    "massive_activations",
    "retrieval_head",
    "lost_in_the_middle",
    "ruler",
    "contextcite",
    "tracllm",
    "attntrace",
    "at2",
    "longcodezip",
    "citations",
    "qrhead",
    "duo_attention",
    "policies",
    "longembed",
    "task_scorers",
)
HEAD = """# Agreement with the reference code

The numbers of longlens beside those of the code it follows, on the same input and the same weights
(SmolLM2-135M-Instruct, float32, CPU). Made by the scripts in `benchmarks/agreement/`, one a reference: `python
benchmarks/agreement/NAME.py --repo CHECKOUT` runs the authors' functions out of a checkout of their repository; none of
their code is in this project. `python benchmarks/agreement` makes this page from what the scripts saved.
"""


def saved() -> list[dict[str, Any]]:
    "What each script saved, in the order of the table"
    paths = {p.stem: p for p in (FOLDER / "results").glob("*.json")}
    if unknown := paths.keys() - set(ORDER):
        raise ValueError(f"results/{min(unknown)}.json is of no script in ORDER of table.py")
    return [json.loads(paths[name].read_text(encoding="utf-8")) for name in ORDER if name in paths]


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def section(c: dict[str, Any]) -> str:
    "One reference"
    rows = ["| compared | input | theirs | longlens | difference | remark |", "|---|---|---|---|---|---|"]
    rows += [f"| {' | '.join(cell(r[k]) for k in ('what', 'on', 'theirs', 'ours', 'difference', 'note'))} |" for r in c["rows"]]
    missing = [f"- Not run: {text}" for text in c["not_run"]]
    parts = [f"## {c['reference']}", f"{c['code']}. {c['how']} `benchmarks/agreement/{c['name']}.py`, {c['date']}."]
    return "\n\n".join([*parts, *["\n".join(rows)] * bool(c["rows"]), *["\n".join(missing)] * bool(missing)])


def waiting() -> list[str]:
    "A section for scripts that have not been run"
    names = [name for name in ORDER if not (FOLDER / "results" / f"{name}.json").exists()]
    if not names:
        return []
    rows = [f"- `benchmarks/agreement/{name}.py`: written, and not yet run to its end on SmolLM2" for name in names]
    return ["\n\n".join(["## Not run yet", "\n".join(rows)])]


def make() -> None:
    "Write AGREEMENT.md"
    FILE.write_text("\n\n".join([HEAD.rstrip(), *map(section, saved()), *waiting()]) + "\n", encoding="utf-8")
    print(f"written to {FILE.name}")


if __name__ == "__main__":
    make()
