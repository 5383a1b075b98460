"""benchmarks/AGREEMENT.md: a section for each script, with the day it was made and where the reference's code is from"""
from __future__ import annotations

import json
import re
import sys
from datetime import date
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "agreement"
sys.path.insert(0, str(FOLDER))
import table

# what kvpress keeps is in RESULTS.md, with the policies
SCRIPTS = sorted({p.stem for p in FOLDER.glob("*.py")} - {"common", "table", "__main__", "kvpress"})


def test_every_script_is_in_the_order_of_the_table() -> None: assert sorted(table.ORDER) == SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_results_or_waits(name: str) -> None:
    path = FOLDER / "results" / f"{name}.json"
    if not path.exists():
        assert f"{name}.py" in table.waiting()[0]
        return
    c = json.loads(path.read_text(encoding="utf-8"))
    assert c["name"] == name and c["rows"] and date.fromisoformat(c["date"]) <= date.today()
    assert re.search(r"at [0-9a-f]{7,}, \d{4}-\d\d-\d\d|installed|no snapshot", c["code"]), "where is the code from?"
    for row in c["rows"]: assert row["what"] and row["on"] and row["theirs"] and row["ours"] and row["difference"], row
    section = table.section(c)
    assert all(table.cell(row["what"]) in section for row in c["rows"]) and c["date"] in section


def test_the_page_is_the_one_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = table.FILE.read_text(encoding="utf-8")
    monkeypatch.setattr(table, "FILE", tmp_path / "page.md")
    table.make()
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == before, "run python benchmarks/agreement"
