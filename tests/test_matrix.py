"A random tenth of the matrix of models and features: another one every day, the same one all day"
from __future__ import annotations

import datetime
import random

import pytest
from matrix import cell, cells

DAY = datetime.date.today().isoformat()
CHOSEN = random.Random(DAY).sample(cells(), len(cells()) // 10)


@pytest.mark.parametrize(("model", "feature"), CHOSEN, ids=[f"{m}-{f.replace(' ', '_')}" for m, f in CHOSEN])
def test_a_cell_is_right_or_refused(model: str, feature: str) -> None:
    result = cell(model, feature)
    assert result.good, f"{result.kind}: {result.text} (python tests/matrix.py {model} --features {feature!r}; drawn on {DAY})"
