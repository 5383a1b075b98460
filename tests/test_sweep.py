"""Sweeps: killed and resumed, shared beginnings on many architectures, keys, and what is refused"""
from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import CAUSAL, VOCAB, token_ids, zoo_model

import longlens as ll
from longlens.attention.hf_interface import UnsupportedModel
from longlens.interventions.heads import Ablate, Streaming, Temperature
from longlens.probes.generate import Ask
from longlens.sweeps.cells import Cell, Changed, Condition, Task, cell_key, fingerprint
from longlens.sweeps.plan import branch_points, make_batches
from longlens.sweeps.store import HEAD, Store, StoreError
from longlens.sweeps.sweep import sweep

WORK = """
import sys, time
from dataclasses import dataclass
import longlens as ll
from longlens.sweeps.cells import Cell, Changed
from longlens.prompts.needle import needle_context
from longlens.prompts.haystack import Haystack
from longlens.interventions.heads import Temperature
from longlens.probes.generate import Ask
from longlens.sweeps.sweep import sweep
import torch
torch.set_num_threads(1)

class Slow(Ask):
    def run(self, lm, cells, start):
        time.sleep(float(sys.argv[2]))
        return super().run(lm, cells, start)

lm = ll.load()
cells = [Cell.of(needle_context(lm, n, d, wording="facts", haystack=Haystack.generated(0), seed=t), k, n=n, depth=d, trial=t)
         for n in (200, 400) for d in (0, 25, 50, 75, 100) for t in range(2) for k in (None, Changed((Temperature(1.1),)))]
print("begins", flush=True)
done = sweep(lm, cells, Slow(3, stop=("."), heads_on="needle"), out=sys.argv[1], batch_size=2)
for name in ("answers", "attention"): done.table(name).write_parquet(f"{sys.argv[3]}-{name}.parquet")
print("ends", flush=True)
"""


def _work(script: Path, folder: Path, pause: float, table: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(script), str(folder), str(pause), str(table)], stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def _parts(folder: Path) -> int: return len(list(folder.glob("part-*.parquet")))


def _work_here(script: Path, folder: Path, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), str(folder), "0", str(table)])
    runpy.run_path(str(script))


@pytest.mark.parametrize("kills", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_again_and_again_ends_with_the_identical_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int) -> None:
    "A sweep that is killed at some moment, several times, ends with the table of one that was not"
    script = tmp_path / "work.py"
    script.write_text(WORK)
    folder, finished = tmp_path / "killed", []
    for kill in range(kills):
        run = _work(script, folder, 0.3, tmp_path / "killed-table")
        assert run.stdout is not None and run.stdout.readline() == "begins\n"
        before = _parts(folder) if folder.exists() else 0
        deadline = time.monotonic() + 60
        while (_parts(folder) if folder.exists() else 0) == before and time.monotonic() < deadline: time.sleep(0.02)
        time.sleep(0.17 * kill)  # at some other moment each time
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        run.stdout.close()
        finished.append(sum(len(pl.read_parquet(p)) for p in folder.glob("part-*.parquet")))
    assert finished == sorted(finished) and 0 < finished[0] and finished[-1] < 40, finished
    for name in ("killed", "plain"): _work_here(script, tmp_path / name, tmp_path / f"{name}-table", monkeypatch)
    for name in ("answers", "attention"):
        assert_frame_equal(pl.read_parquet(tmp_path / f"plain-table-{name}.parquet"),
                           pl.read_parquet(tmp_path / f"killed-table-{name}.parquet"), check_exact=True)


@dataclass(frozen=True)
class Logits(Task):
    "Logits after the prompt and two more tokens"

    def new_tokens(self, cell: Cell) -> int: return 2

    def run(self, lm, cells, start):
        more = torch.cat([start.last, torch.full_like(start.last, 7), torch.full_like(start.last, 9)], 1)
        out = lm.hf(input_ids=more, past_key_values=start.fork(), use_cache=True).logits.double()
        return [{"logits": pl.DataFrame({"logits": row.flatten().numpy()})} for row in out]


def _tree(n: int = 120) -> list[Cell]:
    "Prompts that part at several places, one of them twice"
    base, other = token_ids(n)[0], token_ids(n, seed=1)[0]
    ids = [torch.cat([base[:k], other[:m]]) for k, m in ((0, 60), (30, 70), (30, 70), (64, 40), (64, 41), (100, 20), (100, 20), (n, 0))]
    ids[2] = ids[2].flip(0)
    return [Cell(x, {"i": i}) for i, x in enumerate(ids)]


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("condition", [None, Changed((Streaming(4, 24),)), Changed((Ablate([(0, 1)]), Temperature(1.3)))],
                         ids=["plain", "streaming", "ablated"])
def test_shared_beginnings_change_nothing(name: str, condition: Condition | None) -> None:
    lm = ll.load(zoo_model(name), check=False)
    cells = [replace(c, condition=condition) for c in _tree()]
    try: plain = sweep(lm, cells, Logits(), reuse=False, batch_size=1)
    except UnsupportedModel: pytest.skip(f"{name} cannot be changed like this")
    shared = sweep(lm, cells, Logits(), grain=8)
    assert shared.costs["tokens"].sum() < 0.75 * plain.costs["tokens"].sum()
    a, b = (s.table("logits")["logits"].to_torch() for s in (plain, shared))
    assert (a - b).abs().max() < 2e-5 * max(1, a.abs().max()), (a - b).abs().max()
    alone = lm.logits(torch.cat([cells[3].ids, torch.tensor([7, 9])]))[-3:].double().flatten()
    if condition is None: assert (alone - a.view(len(cells), -1)[3]).abs().max() < 2e-4 * max(1, a.abs().max())


@pytest.mark.parametrize("scaling", ["longrope", "dynamic"])
def test_positions_that_depend_on_the_length(scaling: str) -> None:
    "Only beginnings that are turned like the whole text are shared"
    more = {"longrope": {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)], "original_max_position_embeddings": 64},
            "dynamic": {"factor": 2.0}}[scaling]
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         max_position_embeddings=64 if scaling == "dynamic" else 512,
                         rope_parameters={"rope_type": scaling, "rope_theta": 10000.0, **more})
    lm = ll.load(LlamaForCausalLM(config), allow_longer=True)
    cells = [c for c in _tree() if len(c) > 70]
    if scaling == "dynamic":
        with pytest.raises(ValueError, match="turns its positions otherwise"): sweep(lm, cells, Logits())
        return
    assert min(cut for b in make_batches(cells, Logits(), lm.config, grain=8) for cut in b.cuts) > 64
    plain, shared = (sweep(lm, cells, Logits(), **how).table("logits")["logits"].to_torch() for how in ({"reuse": False}, {"grain": 8}))
    assert (plain - shared).abs().max() < 1e-5


@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=12), min_size=1, max_size=12), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_cuts_are_where_prompts_part(prompts: list[list[int]], grain: int) -> None:
    import numpy as np
    prompts = sorted(prompts)
    def common(a: list[int], b: list[int]) -> int:
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    found = branch_points([np.array(p) for p in prompts], grain)
    for i, p in enumerate(prompts):
        places = {min(common(p, q), len(p) - 1) // grain * grain for j, q in enumerate(prompts) if j != i}
        assert found[i] == tuple(sorted(places - {0}))


def test_every_setting_makes_another_key() -> None:
    lm = ll.load()
    cell, made = Cell(torch.arange(3, 40), spans={"gold": range(3, 9)}), fingerprint(lm)
    silent = [Changed((Ablate([(0, 1)], mode),)) for mode in ("zero", "uniform")]
    conditions = [None, *(Changed((Temperature(t),)) for t in (0.5, 1.5)), *silent]
    tasks = [Ask(), Ask(50), Ask(stop=(".",)), Ask(heads_on="needle"), Ask(mean_on="x")]
    keys = {cell_key(replace(cell, condition=c), t, made) for c in conditions for t in tasks}
    assert len(keys) == len(conditions) * len(tasks)


def test_weights_make_another_key() -> None:
    from transformers import AutoModelForCausalLM
    models = [zoo_model("llama"), AutoModelForCausalLM.from_config(zoo_model("llama").config)]
    assert len({fingerprint(m) for m in models}) == 2
    assert fingerprint(models[0]) == fingerprint(zoo_model("llama"))
    assert fingerprint(models[0].double()) != fingerprint(zoo_model("llama").float())
    zoo_model("llama").float()


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is a file"): Store(__file__)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("x")
    with pytest.raises(StoreError, match="is not empty and not a results folder"): Store(full)
    old = tmp_path / "old"
    Store(old)
    (old / HEAD).write_text(json.dumps({"longlens_sweep": 99}))
    with pytest.raises(StoreError, match="results of format 99, and this version of longlens writes format 1"): Store(old)
    (old / HEAD).write_text("{")
    with pytest.raises(StoreError, match="cannot be read"): Store(old)


def test_an_error_keeps_what_is_finished(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Fails(Logits):
        def run(self, lm, cells, start):
            if len(cells[0]) == 61: raise FloatingPointError("no number")
            return super().run(lm, cells, start)

    lm, cells = ll.load(zoo_model("llama"), check=False), [Cell(token_ids(n)[0]) for n in (40, 61, 80)]
    with pytest.raises(FloatingPointError): sweep(lm, cells, Fails(), out=tmp_path / "r")
    assert len(ll.plan(sweep, lm, cells, Fails(), out=tmp_path / "r").finished) == 1


def test_a_condition_that_the_model_cannot_take_is_refused_before_anything_runs(tmp_path: Path) -> None:
    from longlens.probes.remedies import REMEDIES
    lm, ids = ll.load(zoo_model("gpt2"), check=False), token_ids(40)[0]
    spans = {"document_0": range(5, 10), "document_1": range(10, 20)}
    for name in ("ms_poe", "set_based", "yarn"):
        cells = [Cell(ids), Cell(ids, spans=spans, condition=REMEDIES[name].condition)]
        with pytest.raises(UnsupportedModel, match="no rotary module"): sweep(lm, cells, Logits(), out=tmp_path / name)
    with pytest.raises(IndexError, match="layer 7"): sweep(lm, [Cell(ids), Cell(ids, condition=Changed((Ablate([(7, 0)]),)))], Logits())
    assert not list(tmp_path.glob("*/part-*"))


def test_answers_that_could_go_on_are_other_cells(tmp_path: Path) -> None:
    "An answer that was cut off where positions end is not given out for one that may go further"
    from longlens.needle_lm.data import filler
    lm = ll.load()
    cells = [Cell(lm.tokens(filler(250), allow_longer=True).ids[:2046])]
    short = sweep(lm, cells, Ask(6), out=tmp_path).table("answers")
    lm.allow_longer = True
    long = sweep(lm, cells, Ask(6), out=tmp_path).table("answers")
    assert short["ended"].to_list() == ["positions"] and long["ended"].to_list() == ["length"]
    assert long["reply"][0].startswith(short["reply"][0]) and len(long["reply"][0]) > len(short["reply"][0])


def test_looking_at_the_cell_does_not_ask_for_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    from longlens.probes.remedies import AsSet
    lm, spans = ll.load(), {"document_0": range(5, 40), "document_1": range(40, 90)}
    cell = Cell(torch.arange(3, 150), spans=spans, condition=AsSet())
    whole, pieces = (sweep(lm, [cell], Ask(3, heads_on="$^"), chunk=c) for c in (None, 16))
    assert pieces.costs["chunk"].to_list() == [16] and whole.table("answers")["reply"].equals(pieces.table("answers")["reply"])
    monkeypatch.setattr(AsSet, "whole", True)
    handle = lm.hf.register_forward_pre_hook(lambda m, a, k: (_ for _ in ()).throw(MemoryError("none left")), with_kwargs=True)
    try:
        with pytest.raises(MemoryError, match="in one piece, as its condition wants it"): sweep(lm, [cell], Ask(3))
    finally: handle.remove()
