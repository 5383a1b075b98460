"A report that keeps to its minutes, says its plan before, and loses nothing"
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import longlens as ll
from longlens.budget import Speed, TimeBudget, TimeIsUp
from longlens.cli import main as cli
from longlens.cli.run_folder import RunFolder
from longlens.cli.runner import SectionRunner, Stopped
from longlens.cli.sizes import LADDERS, Size
from longlens.cli.time_plan import SHARES, plan_sections
from longlens.probes.heads.ablation import ablation_curve
from longlens.report import Report
from longlens.sweeps.speed import measure_speed
from longlens.sweeps.store import Store

COMMAND = Path(sys.executable).with_name("longlens")
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
MODEL = Speed((1.5e-3, 2e-7), (2.4e-3, 5e-7), .04)    # SmolLM2-135M on two cores
NAMES = ["sinks", "heads", "middle", "grid", "trace"]
GRID: dict[str, Any] = dict(lengths=(128,), depths=(0, 100), max_new_tokens=4)


@pytest.fixture(scope="module")
def lm() -> ll.LongModel: return ll.load()


def ticking(step: float = 1.0) -> TimeBudget:
    "Half a minute of a clock on which every look takes so many seconds"
    looks = iter(range(10**6))
    return TimeBudget(.5, clock=lambda: step * next(looks))


# ---- plans

@pytest.mark.parametrize("minutes", [1, 4, 20, 120])
def test_a_plan_fits_and_more_time_never_gives_less(minutes: float) -> None:
    plan = plan_sections(NAMES, {"model": MODEL}, 60 * minutes, 8192)
    assert plan.expected <= 60 * minutes
    longer = plan_sections(NAMES, {"model": MODEL}, 300 * minutes, 8192)
    for a, b in zip(plan.sections, longer.sections, strict=True):
        assert b.size is not None and (a.size is None or b.seconds >= a.seconds)
    if minutes >= 4: assert all(s.size is not None for s in plan.sections)


def test_a_plan_of_every_model_and_machine() -> None:
    "However slow the machine: what is planned fits, the rest is left out with a reason"
    for slow in (.01, .3, 1, 10, 100):
        for n in (70, 256, 2048):
            plan = plan_sections(NAMES, {"model": MODEL.slower(slow)}, 60, n)
            assert plan.expected <= 60 and all(s.size or "smallest size takes about" in s.why for s in plan.sections)
            assert all(s.size is None or s.size.tokens <= max(LADDERS[s.name][0].tokens, n) for s in plan.sections)


def test_the_speed_of_a_model_is_that_of_its_forwards(lm: ll.LongModel) -> None:
    speed = measure_speed(lm)
    begun = time.perf_counter()
    lm.prefill(torch.randint(lm.vocab_size, (384,)))
    assert speed.reading(384) / 12 < time.perf_counter() - begun < 12 * speed.reading(384)
    assert speed.reading(384, captured=True) > speed.reading(384) > speed.reading(128) > 0 < speed.word


# ---- probes

def test_a_probe_ends_with_its_last_whole_round(lm: ll.LongModel) -> None:
    whole = ll.needle_grid(lm, trials=6, **GRID)
    short = ll.needle_grid(lm, trials=6, time_budget=ticking(3), **GRID)
    done = short.meta["settings"]["trials"]
    assert 1 <= done < 6 and set(short.frames["answers"]["trial"]) == set(range(done))
    same = whole.frames["answers"].filter(pl.col("trial") < done).select("depth_percent", "trial", "reply", "score")
    assert short.frames["answers"].select(same.columns).sort("trial", "depth_percent").equals(same.sort("trial", "depth_percent"))
    asked = ll.lost_in_the_middle(lm, n_questions=6, n_documents=3, positions=2, time_budget=ticking(3))
    assert 1 <= asked.meta["settings"]["questions"] < 6 and set(asked.frames["answers"]["question"]) == set(range(
        asked.meta["settings"]["questions"]))


def test_no_round_in_time_and_the_next_call_goes_on(lm: ll.LongModel, tmp_path: Path) -> None:
    with pytest.raises(TimeIsUp, match=r"needle grid: time was up after .* the same call goes on from there"):
        ll.needle_grid(lm, trials=2, batch_size=1, time_budget=ticking(12), out=tmp_path, **GRID)
    left = ll.plan(ll.needle_grid, lm, trials=2, batch_size=1, out=tmp_path, time_budget=TimeBudget(1, MODEL), **GRID)
    assert len(left.finished) >= 1 and re.search(r"in \d batches, about [\d.]+ s", repr(left))  # type: ignore[attr-defined]


def test_an_ablation_compares_before_it_goes_on(lm: ll.LongModel, tmp_path: Path) -> None:
    asked = [ll.needle_context(lm, 128, 50, wording=lm.card.wording, seed="a")]
    silence = partial(ablation_curve, lm, [(2, 0), (2, 1), (3, 4)], asked, torch.arange(20, 84), [1, 2, 3], 2, progress=False)
    whole = silence()
    f = silence(time_budget=ticking(5), first=2, store=Store(tmp_path))
    assert set(f["silenced"]) >= {0, 2} and len(f) < len(whole)
    assert f.equals(whole.join(f, on=["silenced", "which", "draw"], how="semi", maintain_order="left"))
    assert {"top", "random"} == set(f.filter(silenced=2)["which"])
    with pytest.raises(TimeIsUp, match="after 2 of 10 steps"): silence(time_budget=ticking(12), first=2)
    kept = len(Store(tmp_path).rows) or sum(len(pl.read_parquet(file)) for file in tmp_path.glob("part-*"))
    assert kept >= len(f) and silence(store=Store(tmp_path)).equals(whole)


def test_sinks_are_not_measured_twice(lm: ll.LongModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = lm.tokens("The boat came home, and nobody was there to see it. " * 20)
    first = ll.attention_sinks(lm, text, sequences=4, out=tmp_path)
    monkeypatch.setattr("longlens.probes.sinks.probe.metric_frame", lambda *a: pytest.fail("it was measured again"))
    monkeypatch.setattr("longlens.probes.sinks.probe.text_frames", lambda *a: pytest.fail("it was measured again"))
    again = ll.attention_sinks(lm, text, sequences=4, out=tmp_path)
    assert all(again.frames[name].equals(f) for name, f in first.frames.items())
    with pytest.raises(TimeIsUp): ll.attention_sinks(lm, text, sequences=4, out=tmp_path, time_budget=ticking(40))


# ---- the report

class Table(Report):
    def findings(self) -> list[str]: return ["found"]


class Machine:
    "Sections that take `slow` times as long as expected, on a clock of their own"

    def __init__(self, slow: float, monkeypatch: pytest.MonkeyPatch):
        self.slow, self.now, self.sizes = slow, 0.0, dict[str, Size]()
        monkeypatch.setattr("longlens.cli.runner.time.monotonic", lambda: self.now)

    def measure(self, name: str, size: Size, time_budget: TimeBudget | None, out: Path) -> Report:
        assert time_budget is not None
        self.sizes[name] = size
        seconds = self.slow * size.seconds(MODEL)
        self.now += min(seconds, 60 * time_budget.minutes)
        if seconds > 60 * time_budget.minutes: raise TimeIsUp(f"{name} was too slow")
        return Table({"table": pl.DataFrame({"x": [1]})})


@pytest.mark.parametrize("slow", [.3, 1, 2, 8])
def test_a_report_keeps_to_its_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: float) -> None:
    "However wrong the first measurement of the speed was"
    machine = Machine(slow, monkeypatch)
    plan = plan_sections(NAMES, {"model": MODEL}, 240, 4096)
    before = [s.size for s in plan.sections]
    monkeypatch.setattr("longlens.charts.page.write_page", lambda reports, page, **how: None)
    SectionRunner(RunFolder.begin(tmp_path / "out", {}), plan, machine.measure, "model", 4).run()
    assert machine.now <= 240 * 1.05
    if slow <= 2: assert [s.state for s in plan.sections] == ["finished"] * 5
    if slow == .3: assert sum(s.size.seconds(MODEL) > b.seconds(MODEL) for s, b in zip(plan.sections, before, strict=True) if s.size and b)
    made = Report.load(tmp_path / "out/time")
    assert made.table["taken_seconds"].drop_nulls().sum() <= 252 and made.findings()[0].startswith("Planned for 4 min, took")
    assert all(s.state == "finished" or any(s.why in line for line in made.findings()) for s in plan.sections)
    assert any(re.match(r"with 20 min: ", line) for line in made.findings())


def test_a_stopped_report_has_a_page_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, shown = Machine(1, monkeypatch), []
    monkeypatch.setattr("longlens.charts.page.write_page", lambda reports, page, **how: shown.append([type(r).__name__ for r in reports]))

    def stopped(name: str, size: Size, **how: Any) -> Report:
        if name == "middle": raise KeyboardInterrupt
        return machine.measure(name, size, **how)

    plan = plan_sections(NAMES, {"model": MODEL}, 240, 2048)
    with pytest.raises(Stopped, match="attention sinks, retrieval heads finished: .*The same command goes on from there"):
        SectionRunner(RunFolder.begin(tmp_path / "out", {"a": 1}), plan, stopped, "model", 4).run()
    assert shown == [["Table", "Table", "TimeReport"]]
    folder = RunFolder.begin(tmp_path / "out", {"a": 1})
    assert [n for n in NAMES if folder.finished(n)] == ["sinks", "heads"]
    with pytest.raises(ValueError, match=r"a is 2 \(there: 1\). Start anew with --overwrite"): RunFolder.begin(tmp_path / "out", {"a": 2})


def test_every_section_has_a_ladder_and_a_share() -> None:
    assert set(LADDERS) == set(SHARES) and sum(SHARES.values()) == pytest.approx(1)


# ---- the command

ASKED = ["report", "needle-lm", "--probes", "trace,grid", "--context", "400"]


def started(out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([str(COMMAND), *ASKED, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV, text=True)


def until(lines: Iterator[str], what: str) -> list[str]:
    "The lines up to one that holds this"
    seen = []
    for line in lines:
        seen.append(line)
        if what in line: return seen
    pytest.fail(f"no line with {what!r}: {seen}")


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals to a process")
def test_killed_and_interrupted_reports_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    "kill -9 in the second section; then SIGTERM; then the same command to its end: what is finished is used"
    out = tmp_path / "out"
    with started(out) as command:
        assert command.stdout is not None
        seen = until(command.stdout, "2 of 2")
        command.kill()
    plan, first = (next(i for i, line in enumerate(seen) if what in line) for what in ("about", "1 of 2"))
    assert plan < first and all(any(t in line for line in seen[plan:first]) for t in ("traceback", "needle grid"))
    assert json.loads((out / "run.json").read_text())["sections"]["trace"]["state"] == "finished"
    with started(out) as command:
        assert command.stdout is not None and command.stderr is not None
        seen = until(command.stdout, "1 of 1 · needle grid")
        assert "finished before: trace\n" in seen
        command.send_signal(signal.SIGTERM)
        errors = command.stderr.read()
        assert command.wait(60) == 130
    assert f"stopped; traceback finished: {out / 'index.html'}. The same command goes on from there" in errors
    assert "carries the answer" in (out / "index.html").read_text(encoding="utf-8")
    assert cli.main([*ASKED, "--out", str(out)]) == 0
    shown, errors = capsys.readouterr()
    assert "finished before: trace\n" in shown and "\r" not in errors
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "How this report was made" in page and [Report.load(out / n) for n in ("trace", "grid", "time")]


def test_minutes_of_wall_clock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "needle-lm", "--probes", "sinks,grid", "--minutes", "0.2", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "planned for 12 s: about" in shown and re.search(r"1 of 2 · attention sinks · [\d.]+ s of 12 s", shown)
    made = Report.load(tmp_path / "out/time")
    assert made.meta["minutes"] == .2 and made.table["taken_seconds"].sum() <= 2 * 12
    assert any(line.startswith("with 1 min: ") for line in made.findings())


def test_a_step_is_kept_at_once(tmp_path: Path) -> None:
    def make(i: int) -> dict[str, pl.DataFrame]: return {"tokens": pl.DataFrame({"i": [i]})}
    for i in range(3): Store(tmp_path).once(["step", i], partial(make, i))
    assert Store(tmp_path).once(["step", 2], lambda: pytest.fail("it was made again"))["tokens"]["i"].to_list() == [2]


def test_the_smallest_collapse_runs() -> None:
    "As the encoder's section of a slow machine: fewer candidates than queries are asked for otherwise"
    from longlens.cli.encoder_text import load_asked_encoder
    from longlens.cli.sections import ENCODER_SECTIONS
    enc = load_asked_encoder(cli.parser().parse_args(["report", "--encoder", "--out", "x"]))
    report = ENCODER_SECTIONS["collapse"](enc, None, None, LADDERS["collapse"][0])
    assert report.findings() and report.frames["retrieval"]["value"].null_count() == 0


def test_no_size_of_collapse_asks_for_more_questions_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    "Of the sample, 37 questions have a passage that MiniLM reads in 64 tokens, and the larger sizes have 40 candidates and more"
    from longlens.cli.encoder_text import load_asked_encoder, sample_questions, short_questions
    from longlens.cli.sections import ENCODER_SECTIONS
    enc = load_asked_encoder(cli.parser().parse_args(["report", "--encoder", "--out", "x"]))
    there, asked = sample_questions(enc, 1), []
    assert there is not None
    monkeypatch.setattr("longlens.length_collapse", lambda *a, **how: asked.append(how), raising=False)
    for size in LADDERS["collapse"]: ENCODER_SECTIONS["collapse"](enc, None, None, size)
    assert [how["n_queries"] for how in asked] == [min(size.candidates, short_questions(enc, there)) for size in LADDERS["collapse"]]
    assert short_questions(enc, there) == 37
