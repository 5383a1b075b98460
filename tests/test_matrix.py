"""A random tenth of the matrix of models and features, and the page that the whole of it wrote.

Another tenth each day. LONGLENS_MATRIX_SEED=20261130 repeats that day's; `python tests/matrix.py` runs all of it.
"""
from __future__ import annotations

import datetime
import os
import re
from pathlib import Path

import matrix
import pytest
import zoo

SEED = int(os.environ.get("LONGLENS_MATRIX_SEED") or f"{datetime.date.today():%Y%m%d}")
PAGE = Path(__file__).resolve().parent.parent / "docs/models.md"

# said once a model, where its states make longlens run it otherwise: tests/test_silent.py is about that
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(("model", "feature"), matrix.some_cells(SEED))
def test_a_cell_is_right_or_refused(model: str, feature: str) -> None:
    found = matrix.cell(model, feature)
    assert found.good, f"LONGLENS_MATRIX_SEED={SEED}: {model}, {feature}: {found.kind}, {found.text}"


def table() -> tuple[list[str], dict[str, list[str]]]:
    "Columns and rows of the page's table"
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    return rows[0][2:], {row[0]: row[2:] for row in rows[2:]}


def test_the_page_has_every_model_and_feature() -> None:
    columns, rows = table()
    assert columns == [*matrix.FEATURES] and list(rows) == [*zoo.EVERYTHING], "run `make matrix` again: there are other models or features"
    meant = set(matrix.cells())
    for model, marks in rows.items():
        for feature, mark in zip(columns, marks, strict=True):
            assert mark in (("yes", "refused") if (model, feature) in meant else ("",)), f"{model}, {feature}: {mark!r}"


def test_the_page_has_its_date_and_counts() -> None:
    text, marks = PAGE.read_text(encoding="utf-8"), [mark for row in table()[1].values() for mark in row if mark]
    found = re.search(r"Run on (\d{4}-\d\d-\d\d) with transformers \S+ and torch \S+ ", text)
    assert found and datetime.date.fromisoformat(found[1]) <= datetime.date.today()
    assert f"{len(zoo.EVERYTHING)} architectures, {len(marks)} cells. **yes** ({marks.count('yes')})" in text
    assert f"**refused** ({marks.count('refused')})" in text


def test_a_refusal_on_the_page_says_why() -> None:
    reasons = PAGE.read_text(encoding="utf-8").split("## What is refused, and why")[1]
    for model, marks in table()[1].items():
        for feature, mark in zip(table()[0], marks, strict=True):
            if mark != "refused": continue
            assert re.search(rf"^- \*\*{re.escape(model)}\*\* \([^)]*\b{feature}\b.*\): \S", reasons, re.M), (model, feature)


def test_the_tenth_can_be_repeated() -> None:
    assert matrix.some_cells(SEED) == matrix.some_cells(SEED) != matrix.some_cells(SEED + 1)
    assert len(matrix.some_cells(SEED)) == round(len(matrix.cells()) / 10)
