"The parts on real questions of two tutorials, whose long cells the notebook tests leave out: their code, on a few made questions"
from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbfiles
import pytest

import longlens as ll
from longlens.probes.traceback.evaluation import cases as cases_of
from longlens.probes.traceback.evaluation.cases import fact_cases
from longlens.prompts import questions
from longlens.prompts.questions import Question, fact_questions

FOLDER = Path(__file__).resolve().parent.parent / "nbs/tutorials"
SMALLER = {    # what stands in the place of each notebook's settings
    "03_middle": "ASKED, QUESTIONS, DOCUMENTS, PLACES = 4, 3, (3, 4), 3",
    "06_traceback": """PASSAGES, ASKED, CASES, AMONG, INJECTED, LONGEST, HEADS = 4, 4, 2, 2, 2, 5, [(2, 0)]
MORE, FITTED, CITED, KEEP = 4, 1, 1, 60
SAMPLED = {"shapley": {"permutations": 1}, "contextcite": {"ablations": 6, "held_out": 0}, "attntrace": {"draws": 2}}""",
}


def cells(name: str) -> list[str]:
    "The code cells before the model is needle-lm, or before there must be many more questions, with the smaller settings"
    found = [nbfiles.source(c) for c in nbfiles.read(FOLDER / f"{name}.ipynb")["cells"] if c["cell_type"] == "code"]
    end = next(i for i, code in enumerate(found) if "ll.load()" in code or "ll.fit_at2(" in code)
    at = [i for i, code in enumerate(found[:end]) if code.startswith("# settings")]
    assert len(at) == 1, f"{name} has {len(at)} cells that begin with '# settings'"
    names = lambda text: set(re.findall(r"\b[A-Z]{3,}\b", text))
    assert names(found[at[0]]) == names(SMALLER[name]) | ({"KEPT", "MIDDLE"} if name == "06_traceback" else {"KEPT"})
    return [*found[:at[0]], SMALLER[name], *found[at[0] + 1 : end]]


def made(name: str) -> list[Question]:
    "Questions that needle-lm can answer, each with its document; one is the question that a tutorial picks out"
    some = [replace(q, others=()) for q in fact_questions(4, 1, sentences=2)]
    if name == "03_middle": return some
    return [replace(q, question=q.question.removesuffix("?")) for q in some[1:]] + [
        replace(some[0], question="where was the film coming home for christmas filmed", answer_prefix="")]


@pytest.mark.parametrize("name", SMALLER)
def test_real_part(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "All cells run one after the other; needle-lm stands in for SmolLM2; it has no chat template, and obeys no injected instruction"
    small = ll.load()
    monkeypatch.setattr(ll, "load", lambda *_: small)
    monkeypatch.setattr(questions, "read_questions", lambda *_: made(name))
    monkeypatch.setattr(cases_of, "injection_cases", lambda *_, **__: fact_cases(2, 150, conflict="anywhere", copies=2, seed=1))
    space: dict[str, Any] = {"__name__": "__main__", "KEPT": str(tmp_path / "kept"), "MIDDLE": str(tmp_path / "middle")}
    for code in cells(name): exec(compile(code.replace("chat=True", "chat=None"), f"{name}.ipynb", "exec"), space)    # noqa: S102
    assert any(tmp_path.iterdir())
